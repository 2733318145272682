"""What N server processes of one machine carry behind HAProxy, with one client that joins all: bulk and connections/s.

`python bench/servers.py --runs 3 --seconds 4`; prints a table. It needs haproxy, nginx, wrk and a C compiler.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import socket
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from peers import HOST, Direct, Failed, Ours, Peer, Processes, eventually, free_port, is_listening
from run import CLOSE, WEB_PROBE, Bench, Measured, measure_bulk, measure_http

HAPROXY = """
defaults
    mode tcp
    timeout connect 2s
    timeout client 1h
    timeout server 1h
    retries 3
    option redispatch 1
listen public
    bind {host}:{port}
    balance leastconn
{servers}
"""


def balance(processes: Processes, folder: Path, *servers: str) -> int:
    """HAProxy in front of these; its port."""
    port, config = free_port(), folder / f"haproxy-{free_port()}.cfg"
    lines = "\n".join(f"    server s{number} {server}" for number, server in enumerate(servers))
    config.write_text(HAPROXY.format(host=HOST, port=port, servers=lines))
    program = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin")
    assert program is not None
    processes.start([program, "-db", "-f", config])
    eventually(lambda: is_listening(port), "haproxy does not listen")
    return port


def accepts(host: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), 2):
        return True
    return False


class Balanced(Peer):
    """HAProxy alone."""

    def __init__(self, folder: Path) -> None:
        super().__init__("HAProxy alone")
        self._folder = folder

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        return balance(processes, self._folder, f"{HOST}:{local}")


class Several(Ours):
    """N servers, each on a CPU of its own where there are so many, and one client of all, behind HAProxy."""

    def __init__(self, count: int, profile: str, folder: Path) -> None:
        super().__init__(f"{count} behind HAProxy", profile, folder)
        self._count, self._folder = count, folder

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        public, program = free_port(), [sys.executable, self.program]
        where: list[object] = []
        hosts = [f"127.0.0.{number + 2}" for number in range(self._count)]
        cpus = sorted(os.sched_getaffinity(0))
        for number, host in enumerate(hosts):
            control = free_port()
            flags = ["--control-listen", f"{HOST}:{control}", "--public-bind", host, "--cpu", cpus[number % len(cpus)]]
            processes.start([*program, "server", *flags, *self.flags("server")])
            where += ["--server", f"{HOST}:{dialled(control)}"]
        ends = ["--local", f"{HOST}:{local}", "--remote-port", public, "--cpu", "auto"]
        processes.start([*program, "client", *where, *ends, *self.flags("client")])
        eventually(lambda: all(accepts(host, public) for host in hosts), "a server has no client")
        return balance(processes, self._folder, *(f"{host}:{public}" for host in hosts))


MEASURES: dict[str, tuple[bool, Callable[..., Measured]]] = {
    "download, 8 streams, MB/s": (False, functools.partial(measure_bulk, way="down", streams=8)),
    "upload, 8 streams, MB/s": (False, functools.partial(measure_bulk, way="up", streams=8)),
    "HTTP close, 32 at a time, connections/s": (
        True,
        lambda bench, tunnel: measure_http(bench, tunnel, "close", 32, *CLOSE),
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--profile", default="default")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        one = Ours("1 server", settings.profile, folder)
        several = [Several(count, settings.profile, folder) for count in (1, 2)]
        peers: list[Peer] = [Direct("direct"), Balanced(folder), one, *several]
        found: dict[tuple[str, str], list[float]] = {}
        with Bench(folder, settings.seconds, quick=False).running() as bench:
            for _ in range(settings.runs):
                for name, (web, measure) in MEASURES.items():
                    for peer in peers:
                        local, probe = (bench.web, WEB_PROBE) if web else (bench.service, b"Ea")
                        try:
                            with peer.open(folder, local, probe) as tunnel:
                                value = next(iter(measure(bench, tunnel).values()))
                        except Failed as error:
                            print(f"{peer.name}, {name}: {error}", file=sys.stderr)
                            continue
                        found.setdefault((name, peer.name), []).append(value)
    print("| |", " | ".join(peer.name for peer in peers), "|")
    print("|---|" + "---|" * len(peers))
    for name in MEASURES:
        cells = (found.get((name, peer.name)) for peer in peers)
        print(f"| {name} |", " | ".join(f"{statistics.median(cell):,.0f}" if cell else "-" for cell in cells), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main())
