"""Measures rtunnel beside no tunnel, `ssh -R` and other programs, on loopback, in one run. `make bench` runs it.

For each row the peers take turns, so that a slow minute of the machine meets all of them; the table has the median of
the rounds, the lowest and the highest. A whole run writes results.json, results.md and results.svg beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
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
    CACHE,
    HOST,
    ROOT,
    Direct,
    Failed,
    Ours,
    Peer,
    Processes,
    Ssh,
    Tunnel,
    bore,
    eventually,
    free_port,
    is_listening,
    other_version,
    rathole,
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
NO_SESSION = "ssh -N -R"  # slow before OpenSSH 10 (see Ssh): only where it is asked for
CLOSE = ("-HConnection: close",)
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
                self.service = int(Tool(services.start([self.tool, "serve"], is_read=True)).numbers()[0])
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
            relay = relays.start(
                [sys.executable, ROOT / "tests/helpers/relay.py", f"{HOST}:{port}", rtt_ms / 2000], is_read=True
            )
            assert relay.stdout is not None
            yield int(relay.stdout.readline().rpartition(":")[2])

    @contextlib.contextmanager
    def load(self, *words: object) -> Iterator[Tool]:
        """A load tool at work."""
        with Processes(self.folder) as tools:
            yield Tool(tools.start([self.tool, *words], is_read=True))

    def bulk(self, tunnel: Tunnel, way: str, streams: int, warm_s: float | None = None) -> tuple[float, float]:
        """MB/s, and processor seconds of both ends for each GB."""
        words = [way, tunnel.port, self.service, streams, warm_s or self.warm_s, self.seconds]
        with self.load("bulk", *words) as tool:
            tool.numbers()
            before = tunnel.cpu_s()
            count, seconds = tool.numbers()
            used = tunnel.cpu_s_since(before)
        if not count:
            raise Failed("no byte arrived")
        return count / seconds / 1e6, used / (count / 1e9)

    def wrk(self, tunnel: Tunnel, connections: int, *options: str) -> tuple[float, float]:
        """Requests/s, and processor microseconds of both ends for each."""
        seconds = max(1, round(self.seconds))
        command = ["wrk", "-t2", f"-c{connections}", f"-d{seconds}s", *options, f"http://{HOST}:{tunnel.port}/"]
        before = tunnel.cpu_s()
        said = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True).stdout
        used = tunnel.cpu_s_since(before)
        if trouble := re.findall(r"Socket errors.*|Non-2xx.*", said):
            raise Failed("wrk: " + " ".join(trouble))
        found = re.search(r"(\d+) requests in .*Requests/sec:\s*([0-9.]+)", said, re.DOTALL)
        if found is None or not int(found[1]):
            raise Failed("wrk: no request was answered")
        return float(found[2]), 1e6 * used / int(found[1])


Measured = dict[str, float]  # by row of the table (report.TITLES)


def measure_bulk(bench: Bench, tunnel: Tunnel, way: str, streams: int) -> Measured:
    speed, cost = bench.bulk(tunnel, way, streams)
    return {f"{way}_{streams}": speed} | ({f"{way}_cpu": cost} if streams == 1 and cost else {})


def measure_http(bench: Bench, tunnel: Tunnel, row: str, connections: int, *options: str) -> Measured:
    rate, cost = bench.wrk(tunnel, connections, *options)
    return {row: rate} | ({f"{row}_cpu": cost} if cost else {})


def measure_echo(bench: Bench, tunnel: Tunnel, *, busy: bool) -> Measured:
    """64 bytes there and back, on an idle tunnel or beside a stream that takes all it can get."""
    with contextlib.ExitStack() as stack:
        if busy:
            words = ["down", tunnel.port, bench.service, 1, bench.warm_s, 3600]
            stack.enter_context(bench.load("bulk", *words)).numbers()
        with bench.load("echo", tunnel.port, 64, bench.warm_s, bench.seconds) as tool:
            p50, p99, _ = tool.numbers()
    if busy:
        return {"echo_busy_p50": p50 / 1000, "echo_busy_p99": p99 / 1000}
    return {"echo_idle_p50": p50, "echo_idle_p99": p99}


def measure_idle(bench: Bench, tunnel: Tunnel, count: int) -> Measured:
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


def measure_distance(bench: Bench, tunnel: Tunnel, rtt_ms: int) -> Measured:
    """One download; windows grow by round trips, so it is warmed up for 40 of them."""
    return {f"distance_{rtt_ms}": bench.bulk(tunnel, "down", 1, bench.warm_s + 0.040 * rtt_ms)[0]}


class Measure(NamedTuple):
    """What --rows names: what is done in one tunnel."""

    name: str
    run: Callable[[Bench, Tunnel], Measured]
    web: bool = False
    rtt_ms: int = 0
    in_quick: bool = True
    descriptors: int = 0


def measures() -> list[Measure]:
    """All, in the order of the table."""
    do = functools.partial
    bulk = {"download": "down", "upload": "up"}
    return [
        *(
            Measure(f"{name}-{streams}", do(measure_bulk, way=way, streams=streams))
            for streams in (1, 8)
            for name, way in bulk.items()
        ),
        Measure("keepalive", lambda bench, tunnel: measure_http(bench, tunnel, "keepalive", 64), web=True),
        Measure("close", lambda bench, tunnel: measure_http(bench, tunnel, "close", 32, *CLOSE), web=True),
        Measure("echo-idle", do(measure_echo, busy=False)),
        Measure("echo-busy", do(measure_echo, busy=True)),
        Measure("idle-1000", do(measure_idle, count=1000), descriptors=1000),
        Measure("idle-10000", do(measure_idle, count=10000), in_quick=False, descriptors=10000),
        Measure("distance-50", do(measure_distance, rtt_ms=50), rtt_ms=50),
        Measure("distance-100", do(measure_distance, rtt_ms=100), rtt_ms=100, in_quick=False),
    ]


def measure_all(
    bench: Bench, wanted: Sequence[Measure], peers: Sequence[Peer], runs: int, figures: report.Figures
) -> None:
    """All rows, each in `runs` rounds of all peers, every second one backwards, into `figures`. What fails is noted,
    and the rest goes on."""
    for measure in wanted:
        if not (bench.web if measure.web else bench.service):
            continue  # `missing` has the reason
        for turn in range(runs):
            for peer in peers[:: -1 if turn % 2 else 1]:
                measured = measure_one(bench, measure, peer)
                for figure, value in measured.items():
                    figures.setdefault(figure, {}).setdefault(peer.name, []).append(value)
                shown = "  ".join(f"{figure} {value:.4g}" for figure, value in measured.items())
                print(f"{measure.name} {turn + 1}/{runs}  {peer.name}: {shown or 'failed'}", flush=True)


def measure_one(bench: Bench, measure: Measure, peer: Peer) -> Measured:
    """In a new tunnel. Nothing where it fails, which is noted."""
    local, probe = (bench.web, WEB_PROBE) if measure.web else (bench.service, ECHO_PROBE)
    relay = functools.partial(bench.distance, measure.rtt_ms) if measure.rtt_ms else None
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        if measure.descriptors * peer.sockets_per_visitor + DESCRIPTORS_TO_SPARE > limit:
            raise Failed(f"a process may have {limit} descriptors here")
        with peer.open(bench.folder, local, probe, relay) as tunnel:
            return measure.run(bench, tunnel)
    except (Failed, subprocess.SubprocessError) as error:
        bench.missing[f"{measure.name}, {peer.name}"] = str(error)
        return {}


def describe_machine(peers: Sequence[Peer]) -> dict[str, Any]:
    """What the figures depend on."""
    model = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    openssl = "from OpenSSL import SSL; print(SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode())"
    done = subprocess.run([sys.executable, "-c", openssl], capture_output=True, text=True, check=False)
    versions = {peer.name: peer.version() for peer in peers}
    return {
        "processor": f"{os.cpu_count()} x {model[1] if model else platform.machine()}",
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "its OpenSSL": done.stdout.strip() or "missing",
        **{name: version for name, version in versions.items() if version},
        "load before": f"{os.getloadavg()[0]:.1f}",
        "time": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def all_peers(folder: Path, ssh_root: Path, also: Sequence[tuple[str, Path]]) -> list[Peer]:
    """Each version of rtunnel beside the same mode of the others."""
    peers: list[Peer] = [Direct("direct")]
    for profile in ("plain", "default"):
        peers.append(Ours(profile, profile, folder))
        peers += [Ours(f"{label} {profile}", profile, folder, file) for label, file in also]
    return [
        *peers,
        Ours("cnsa2", "cnsa2", folder),
        Ssh("ssh -R", folder),
        Ssh("ssh 10", folder, root=ssh_root, options="-N"),
        Ssh("ssh 10 aes", folder, root=ssh_root, options="-N -c aes128-gcm@openssh.com"),
        Ssh(NO_SESSION, folder, options="-N"),
        rathole("rathole"),
        rathole("rathole noise", noise=True),
        bore("bore"),
    ]


def chosen(text: str, names: Sequence[str], what: str) -> list[str]:
    """The names of a list with commas. Raises Failed."""
    wanted = [name.strip() for name in text.split(",")]
    if unknown := [name for name in wanted if name not in names]:
        raise Failed(f"there is no {what} {', '.join(map(repr, unknown))}: it is one of {', '.join(names)}")
    return wanted


def named_version(text: str) -> tuple[str, str]:
    label, _, what = text.rpartition("=")
    if not what:
        raise ValueError
    return label or "before", what


def positive_number(text: str) -> float:
    if not 0 < float(text) < float("inf"):  # not a number is neither
        raise ValueError
    return float(text)


def whole_number(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench", description="Measure rtunnel beside others, on loopback.")
    rows = ", ".join(measure.name for measure in measures())
    parser.add_argument("--quick", action="store_true", help="one short round, to see that all works; no figures")
    parser.add_argument("--rows", metavar="LIST", help=f"only these, with commas: {rows}")
    parser.add_argument("--peers", metavar="LIST",
                        help=f"only these columns, with commas (default: all here but {NO_SESSION!r})")  # fmt: skip
    parser.add_argument("--runs", type=whole_number, help="rounds (default: 5; quick: 1)")
    parser.add_argument("--seconds", type=positive_number, help="of each measurement (default: 3; quick: 1)")
    parser.add_argument("--also", type=named_version, action="append", default=[], metavar="[NAME=]CODE",
                        help="another version in the same run (a folder, a copy of rtunnel.py, a git revision), and "
                             "the ratio to it; its name is 'before' where none is given")  # fmt: skip
    parser.add_argument("--ssh-root", type=Path, default=CACHE / "trixie", metavar="FOLDER",
                        help="a Debian root with OpenSSH 10 (bench/NOTES.md; default: %(default)s)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FOLDER",
                        help="for results.* (default: beside this program, of a whole run; else none)")  # fmt: skip
    return parser


def prepare(parser: argparse.ArgumentParser, folder: Path) -> tuple[argparse.Namespace, list[Measure], list[Peer]]:
    """All that can be wrong is found here, before the first measurement."""
    arguments = parser.parse_args()
    if arguments.rows is None and arguments.peers is None and not (arguments.quick or arguments.also):
        arguments.output = arguments.output or HERE
    try:
        also = [(label, other_version(what, folder)) for label, what in arguments.also]
        peers = all_peers(folder, arguments.ssh_root, also)
        names = [peer.name for peer in peers]
        if len(set(names)) < len(names):
            raise Failed("each --also wants a name of its own (--also NAME=CODE)")
        usual = [name for name in names if name != NO_SESSION]
        asked = chosen(arguments.peers, names, "peer") if arguments.peers is not None else usual
        rows = [measure.name for measure in measures() if measure.in_quick or not arguments.quick]
        if arguments.rows is not None:
            rows = chosen(arguments.rows, [measure.name for measure in measures()], "row")
        if arguments.output:
            arguments.output.mkdir(parents=True, exist_ok=True)
            if not os.access(arguments.output, os.W_OK):
                raise Failed(f"{arguments.output} is not writable")
    except (Failed, OSError) as error:
        parser.error(str(error))
    chosen_peers = [peer for peer in peers if peer.name in asked]
    return arguments, [measure for measure in measures() if measure.name in rows], chosen_peers


def main() -> int:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    status = 0
    with tempfile.TemporaryDirectory() as name:
        arguments, rows, peers = prepare(make_parser(), Path(name))
        quick = arguments.quick
        bench = Bench(Path(name), arguments.seconds or (1.0 if quick else 3.0), quick)
        bench.missing |= {peer.name: reason for peer in peers if (reason := peer.missing())}
        peers = [peer for peer in peers if peer.name not in bench.missing]
        machine, runs = describe_machine(peers), arguments.runs or (1 if quick else 5)
        figures: report.Figures = {}
        try:
            with bench.running():
                measure_all(bench, rows, peers, runs, figures)
        except KeyboardInterrupt:  # what was measured is shown, and does not replace a whole run's
            bench.missing["the rest"] = "interrupted"
            arguments.output = None if arguments.output == HERE else arguments.output
            status = 130
    names = [peer.name for peer in peers]
    results = report.Results(machine, runs, bench.seconds, names, figures, bench.missing)
    if arguments.output:
        report.write(results, arguments.output)
    print("\n" + report.markdown(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
