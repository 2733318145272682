"""Where the time goes in both ends of a tunnel over TLS, per message and per byte. `make profile` runs it.

Four looks at the same three loads, each in a tunnel of its own, because a look disturbs what it looks at: processor
time, functions (py-spy), system calls (strace), TLS records (a relay that counts them). NOTES.md says what they taught.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from peers import HOST, ROOT, Ours, Relay, Tunnel
from run import CLOSE, ECHO_PROBE, WEB_PROBE, Bench

PY_SPY = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
STRACE = shutil.which("strace")
RATE_HZ = 200  # of py-spy
SHOWN = 12  # functions and system calls of each end


class Load(NamedTuple):
    """What is done, and in which units it is counted."""

    name: str
    unit: str
    web: bool
    run: Callable[[Bench, Tunnel], float]  # returns the units


LOADS = [
    Load(
        "download, 1 stream", "MB", False, lambda bench, tunnel: bench.seconds * bench.bulk(tunnel, "down", 1, 0.01)[0]
    ),
    Load("HTTP keep-alive", "request", True, lambda bench, tunnel: bench.seconds * bench.wrk(tunnel, 64)[0]),
    Load("HTTP close", "connection", True, lambda bench, tunnel: bench.seconds * bench.wrk(tunnel, 32, *CLOSE)[0]),
]


class Records:
    """Counts TLS records and their bytes, by direction."""

    def __init__(self) -> None:
        self.records: collections.Counter[str] = collections.Counter()
        self.bytes: collections.Counter[str] = collections.Counter()

    @contextlib.contextmanager
    def relay(self, port: int) -> Iterator[int]:
        """To the port, counting on the way."""
        with socket.create_server((HOST, 0)) as listener:
            threading.Thread(target=self._accept, args=(listener, port), daemon=True).start()
            yield listener.getsockname()[1]

    def _accept(self, listener: socket.socket, port: int) -> None:
        near, _ = listener.accept()
        far = socket.create_connection((HOST, port))
        for ends in ((near, far, "client to server"), (far, near, "server to client")):
            threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        """A record is a header of 5 bytes, whose last two are the length of the rest (RFC 8446, 5.1)."""
        unread = bytearray()
        with contextlib.suppress(OSError):  # whoever ends first resets the other
            while part := source.recv(1 << 18):
                sink.sendall(part)
                unread += part
                while len(unread) >= 5 and len(unread) >= (size := 5 + int.from_bytes(unread[3:5], "big")):
                    del unread[:size]
                    self.records[way] += 1
                    self.bytes[way] += size


class Look:
    """One load in a tunnel of its own, seen in one way."""

    def __init__(self, bench: Bench, peer: Ours, load: Load) -> None:
        self.bench, self.peer, self.load = bench, peer, load

    @contextlib.contextmanager
    def tunnel(self, relay: Relay | None = None) -> Iterator[Tunnel]:
        local, probe = (self.bench.web, WEB_PROBE) if self.load.web else (self.bench.service, ECHO_PROBE)
        with self.peer.open(self.bench.folder, local, probe, relay) as tunnel:
            yield tunnel

    @staticmethod
    def ends(tunnel: Tunnel) -> dict[str, int]:
        assert tunnel.processes is not None
        server, client = tunnel.processes.started
        return {"server": server.pid, "client": client.pid}

    def processor_time(self) -> None:
        with self.tunnel() as tunnel:
            before = tunnel.cpu_s()
            units = self.load.run(self.bench, tunnel)
            after = tunnel.cpu_s()
            shares = [f"{end} {1e6 * (after[pid] - before[pid]) / units:.1f}" for end, pid in self.ends(tunnel).items()]
        print(f"  processor time, us/{self.load.unit}: " + ", ".join(shares) + f"  ({units:,.0f} {self.load.unit}s)")

    def functions(self) -> None:
        """Who py-spy found with the GIL: Python itself, without what the kernel and OpenSSL do meanwhile."""
        if PY_SPY is None:
            print("  functions: py-spy is missing (pip install py-spy)")
            return
        with self.tunnel() as tunnel, contextlib.ExitStack() as stack:
            files = {}
            for end, pid in self.ends(tunnel).items():
                files[end] = self.bench.folder / f"{end}.stacks"
                options = f"record --gil -p {pid} -d {round(self.bench.seconds)} -r {RATE_HZ} -f raw -o {files[end]}"
                spy = subprocess.Popen([PY_SPY, *options.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                stack.callback(spy.wait)
            self.load.run(self.bench, tunnel)
        for end, file in files.items():
            print(f"  functions, {end}:")
            counts: collections.Counter[str] = collections.Counter()
            for line in file.read_text().splitlines():
                stacked, _, count = line.rpartition(" ")
                counts[re.sub(r"\S*/", "", stacked.rpartition(";")[2])] += int(count)
            for function, samples in counts.most_common(SHOWN):
                print(f"    {100 * samples / sum(counts.values()):5.1f} %  {function}")

    def system_calls(self) -> None:
        if STRACE is None:
            print("  system calls: strace is missing")
            return
        with self.tunnel() as tunnel:
            tracers = {}
            for end, pid in self.ends(tunnel).items():
                command = [STRACE, "-f", "-c", "-o", str(self.bench.folder / f"{end}.calls"), "-p", str(pid)]
                tracers[end] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            units = self.load.run(self.bench, tunnel)
            for tracer in tracers.values():
                tracer.send_signal(signal.SIGINT)
                tracer.wait()
        for end in tracers:
            rows = re.findall(r"^\s*[\d.]+\s+[\d.]+\s+\d+\s+(\d+)(?:\s+\d+)?\s+(\w+)$", self.calls(end), re.MULTILINE)
            counts = {name: int(count) / units for count, name in rows if name != "total"}
            most = sorted(counts.items(), key=lambda entry: -entry[1])[:SHOWN]
            shown = ", ".join(f"{name} {count:.2f}" for name, count in most)
            print(f"  system calls/{self.load.unit}, {end}: {sum(counts.values()):.2f}  ({shown})")

    def calls(self, end: str) -> str:
        return (self.bench.folder / f"{end}.calls").read_text()

    def tls_records(self) -> None:
        seen = Records()
        with self.tunnel(seen.relay) as tunnel:
            units = self.load.run(self.bench, tunnel)
        for way, count in seen.records.items():
            size = seen.bytes[way] / count
            print(f"  TLS records/{self.load.unit}, {way}: {count / units:.2f}, of {size:,.0f} bytes on average")


def main() -> int:
    parser = argparse.ArgumentParser(prog="profile", description="Show where the time goes.")
    parser.add_argument("--seconds", type=int, default=4, help="of each look (default: 4)")
    parser.add_argument("--profile", default="default", help="plain, or a profile of TLS (default: default)")
    parser.add_argument("--program", type=Path, default=ROOT / "rtunnel.py", help="another copy of rtunnel.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        peer = Ours("ours", arguments.profile, Path(name), arguments.program.resolve())
        with Bench(Path(name), arguments.seconds, quick=True).running() as bench:
            for load in LOADS:
                print(f"{load.name}, {arguments.profile}:")
                look = Look(bench, peer, load)
                look.processor_time()
                look.functions()
                look.system_calls()
                if arguments.profile != "plain":
                    look.tls_records()
    return 0


if __name__ == "__main__":
    sys.exit(main())
