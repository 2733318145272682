"""Measures rtunnel beside no tunnel, `ssh -R` and other programs, on loopback, in one run. `make bench` runs it.

For each measure the peers take turns, so that a slow minute of the machine meets all of them; the table has the median
of the rounds, the lowest and the highest. Writes results.json, results.md and results.svg beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import report
from peers import (
    HOST,
    ROOT,
    Direct,
    Failed,
    Ours,
    Peer,
    Processes,
    Script,
    Ssh,
    Tunnel,
    eventually,
    free_port,
    is_listening,
)

HERE = Path(__file__).resolve().parent
ECHO_PROBE = b"Ea"  # load.c: an echo of what follows
WEB_PROBE = b"GET / HTTP/1.0\r\n\r\n"
DESCRIPTORS_TO_SPARE = 500
OPEN_LIMIT_S = 120.0  # for all idle visitors to open, and again for all to answer
NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 1024; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600; client_body_temp_path {folder};
  proxy_temp_path {folder}; fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{ listen 127.0.0.1:{port} backlog=1024; location / {{ return 200 "{page}"; }} }}
}}
"""
PAGE = "A page of six hundred bytes. " * 20


class Tool:
    """A load tool at work (load.c)."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in, self._out = process.stdin, process.stdout

    def numbers(self) -> list[float]:
        """Of the next line; none where it is a word. Raises Failed."""
        if line := self._out.readline():
            return [float(word) for word in line.split() if word != "start"]
        raise Failed("the load broke off")

    def go(self) -> None:
        self._in.write("\n")
        self._in.flush()


class Bench:
    """The load tools, the services behind the tunnels, and how long to measure."""

    def __init__(self, folder: Path, seconds: float, quick: bool) -> None:
        self.folder = folder
        self.seconds = seconds
        self.quick = quick
        self.warm_s = 0.3 if quick else 1.0
        self.service = self.web = 0  # ports, once `running`
        self.tool = folder / "load"
        self.missing: dict[str, str] = {}  # what is not measured, and why

    @contextlib.contextmanager
    def running(self) -> Iterator[Bench]:
        """Compile the tools and start the services, as far as this machine can."""
        with Processes(self.folder) as services:
            compiler, wrk = shutil.which("cc"), shutil.which("wrk")
            nginx = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
            if compiler is None:
                self.missing["all but http"] = "there is no C compiler (cc) for the load tools"
            else:
                subprocess.run([compiler, "-O2", "-pthread", "-o", self.tool, HERE / "load.c"], check=True)
                self.service = int(Tool(services.start([self.tool, "serve"])).numbers()[0])
            if nginx is None or wrk is None:
                self.missing["http"] = "wrk or nginx is not installed (Debian: apt install wrk nginx-light)"
            else:
                self.web, settings = free_port(), self.folder / "nginx.conf"
                settings.write_text(NGINX.format(folder=self.folder, port=self.web, page=PAGE))
                services.start([nginx, "-c", settings, "-p", self.folder])
                eventually(lambda: is_listening(self.web), "nginx does not listen")
            yield self

    @contextlib.contextmanager
    def distance(self, rtt_ms: int, port: int) -> Iterator[int]:
        """A relay to the port, so far away."""
        with Processes(self.folder) as relays:
            relay = relays.start([sys.executable, ROOT / "tests/relay.py", f"{HOST}:{port}", rtt_ms / 2000])
            assert relay.stdout is not None
            yield int(relay.stdout.readline().rpartition(":")[2])

    @contextlib.contextmanager
    def load(self, *words: object) -> Iterator[Tool]:
        """A load tool at work."""
        with Processes(self.folder) as tools:
            yield Tool(tools.start([self.tool, *words]))

    def bulk(self, tunnel: Tunnel, way: str, streams: int, warm_s: float | None = None) -> tuple[float, float]:
        """MB/s, and processor seconds of both ends for each GB."""
        words = [way, tunnel.port, self.service, streams, warm_s or self.warm_s, self.seconds]
        with self.load("bulk", *words) as tool:
            tool.numbers()
            before = tunnel.cpu_s()
            count, seconds = tool.numbers()
            after = tunnel.cpu_s()
        if not count:
            raise Failed("no byte arrived")
        return count / seconds / 1e6, sum(after[pid] - before.get(pid, 0) for pid in after) / (count / 1e9)

    def wrk(self, tunnel: Tunnel, connections: int, *options: str) -> float:
        """Requests/s."""
        seconds = max(1, round(self.seconds))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", *options, f"http://{HOST}:{tunnel.port}/"]
        said = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True).stdout
        if trouble := re.findall(r"Socket errors.*|Non-2xx.*", said):
            raise Failed("wrk: " + " ".join(trouble))
        return float(re.search(r"Requests/sec:\s*([0-9.]+)", said)[1])  # type: ignore[index]


def measure_bulk(bench: Bench, tunnel: Tunnel, way: str) -> dict[str, float]:
    """One stream, eight streams."""
    one, cost = bench.bulk(tunnel, way, 1)
    return {f"{way}_1": one, f"{way}_8": bench.bulk(tunnel, way, 8)[0]} | ({f"{way}_cpu": cost} if cost else {})


def measure_http(bench: Bench, tunnel: Tunnel) -> dict[str, float]:
    return {"keepalive": bench.wrk(tunnel, 64), "close": bench.wrk(tunnel, 32, "-HConnection: close")}


def measure_echo(bench: Bench, tunnel: Tunnel) -> dict[str, float]:
    """64 bytes there and back, idle and beside a stream that takes all it can get."""
    words = ["echo", tunnel.port, 64, bench.warm_s, bench.seconds]
    with bench.load(*words) as tool:
        idle = tool.numbers()
    with bench.load("bulk", "down", tunnel.port, bench.service, 1, bench.warm_s, 3600) as stream:
        stream.numbers()
        with bench.load(*words) as tool:
            busy = tool.numbers()
    figures = {"echo_idle_p50": idle[0], "echo_idle_p99": idle[1]}
    return figures | {"echo_busy_p50": busy[0] / 1000, "echo_busy_p99": busy[1] / 1000}


def measure_idle(bench: Bench, tunnel: Tunnel, count: int) -> dict[str, float]:
    """So many visitors that say nothing: what they cost, and whether they are still there."""
    before = tunnel.resident_kb()
    with bench.load("idle", tunnel.port, count, OPEN_LIMIT_S) as tool:
        opened, seconds = tool.numbers()
        if opened < count:
            raise Failed(f"{opened:.0f} of {count} visitors were served within {seconds:.0f} s")
        cost = (tunnel.resident_kb() - before) / count
        tool.go()
        answered, _ = tool.numbers()
        if answered < count:
            raise Failed(f"{answered:.0f} of {count} idle visitors got an answer")
    return {f"open_{count}": seconds} | ({f"memory_{count}": cost} if cost > 0 else {})


def measure_distance(bench: Bench, tunnel: Tunnel, rtt_ms: int) -> dict[str, float]:
    """One download; windows grow by round trips, so it is warmed up for 40 of them."""
    return {f"distance_{rtt_ms}": bench.bulk(tunnel, "down", 1, bench.warm_s + 0.040 * rtt_ms)[0]}


class Measure(NamedTuple):
    """One row of the table behind --only: what is done in one tunnel."""

    name: str
    run: Callable[[Bench, Tunnel], dict[str, float]]
    web: bool = False
    rtt_ms: int = 0
    in_quick: bool = True
    descriptors: int = 0


MEASURES = [
    Measure("download", lambda bench, tunnel: measure_bulk(bench, tunnel, "down")),
    Measure("upload", lambda bench, tunnel: measure_bulk(bench, tunnel, "up")),
    Measure("http", measure_http, web=True),
    Measure("echo", measure_echo),
    Measure("idle-1000", lambda bench, tunnel: measure_idle(bench, tunnel, 1000), descriptors=1000),
    Measure("idle-10000", lambda bench, tunnel: measure_idle(bench, tunnel, 10000), in_quick=False, descriptors=10000),
    Measure("distance-50", lambda bench, tunnel: measure_distance(bench, tunnel, 50), rtt_ms=50),
    Measure("distance-100", lambda bench, tunnel: measure_distance(bench, tunnel, 100), rtt_ms=100, in_quick=False),
]


def measure_all(bench: Bench, measures: Sequence[Measure], peers: Sequence[Peer], runs: int) -> report.Figures:
    """All measures, each in `runs` rounds of all peers. What fails is noted, and the rest goes on."""
    figures: report.Figures = {}
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    for measure in measures:
        local, probe = (bench.web, WEB_PROBE) if measure.web else (bench.service, ECHO_PROBE)
        relay = functools.partial(bench.distance, measure.rtt_ms) if measure.rtt_ms else None
        if measure.descriptors + DESCRIPTORS_TO_SPARE > limit:
            bench.missing[measure.name] = f"a process may have {limit} descriptors here"
            continue
        if not local:
            continue  # `missing` has the reason
        for turn in range(runs):
            for peer in peers:
                try:
                    with peer.open(bench.folder, local, probe, relay) as tunnel:
                        measured = measure.run(bench, tunnel)
                except (Failed, subprocess.SubprocessError) as error:
                    bench.missing[f"{measure.name}, {peer.name}"] = str(error)
                    measured = {}
                for figure, value in measured.items():
                    figures.setdefault(figure, {}).setdefault(peer.name, []).append(value)
                shown = "  ".join(f"{figure} {value:.4g}" for figure, value in measured.items())
                print(f"{measure.name} {turn + 1}/{runs}  {peer.name}: {shown or 'failed'}", flush=True)
    return figures


def describe_machine() -> dict[str, Any]:
    """What the figures depend on."""

    def first_line(*command: str) -> str:
        with contextlib.suppress(OSError):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            return (done.stdout + done.stderr).partition("\n")[0].strip()
        return "missing"

    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    openssl = "from OpenSSL import SSL; print(SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode())"
    return {
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "its OpenSSL": first_line(sys.executable, "-c", openssl),
        "ssh": first_line("ssh", "-V"),
        "load before": f"{os.getloadavg()[0]:.1f}",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def named_file(text: str) -> tuple[str, Path]:
    name, equals, file = text.partition("=")
    if not equals or not Path(file).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=FILE")
    return name, Path(file).resolve()


def parse_arguments() -> argparse.Namespace:
    names = [measure.name for measure in MEASURES]
    parser = argparse.ArgumentParser(prog="bench", description="Measure rtunnel beside others, on loopback.")
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all works; no figures")
    parser.add_argument("--only", action="append", choices=names, metavar="MEASURE", help=f"repeatable: {names}")
    parser.add_argument("--peers", help="only those whose name matches this expression")
    parser.add_argument("--runs", type=int, help="rounds (default: 3; quick: 1)")
    parser.add_argument("--seconds", type=float, help="of each measurement (default: 5; quick: 1)")
    parser.add_argument("--peer", type=named_file, action="append", default=[], metavar="NAME=SCRIPT",
                        help="another program; the script gets CTRL_PORT, SERVER_PORT, PUBLIC_PORT, LOCAL_PORT and "
                             "PID_FILE (peers.py, Script)")  # fmt: skip
    parser.add_argument("--also", type=named_file, action="append", default=[], metavar="NAME=FILE",
                        help="another copy of rtunnel.py: two versions in one run")  # fmt: skip
    parser.add_argument("--output", type=Path, default=HERE, metavar="FOLDER", help="for results.* (default: here)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    quick = arguments.quick
    wanted = arguments.only or [one.name for one in MEASURES if one.in_quick or not quick]
    measures = [one for one in MEASURES if one.name in wanted]
    runs = arguments.runs or (1 if quick else 3)
    machine = describe_machine()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = Bench(folder, arguments.seconds or (1.0 if quick else 5.0), quick)
        peers: list[Peer] = [Direct("direct"), Ours("plain", "plain", folder), Ours("default", "default", folder)]
        peers += [Ours("cnsa2", "cnsa2", folder), Ssh("ssh -R", folder)]
        for label, file in arguments.also:
            peers += [Ours(f"{label} {profile}", profile, folder, file) for profile in ("plain", "default")]
        peers += [Script(label, file) for label, file in arguments.peer]
        for peer in list(peers):
            if reason := peer.missing():
                bench.missing[peer.name] = reason
                peers.remove(peer)
        peers = [peer for peer in peers if re.search(arguments.peers or "", peer.name)]
        with bench.running():
            figures = measure_all(bench, measures, peers, runs)
    names = [peer.name for peer in peers]
    results = report.Results(machine, runs, bench.seconds, names, figures, bench.missing)
    (arguments.output / "results.json").write_text(json.dumps(results._asdict(), indent=1) + "\n")
    (arguments.output / "results.md").write_text(report.markdown(results))
    (arguments.output / "results.svg").write_text(report.chart(results))
    print("\n" + report.markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
