"""Throughput of one stream over distance: `python bench/distance.py [--seconds S] [--tls]`.

A relay in a process of its own adds a round trip and limits nothing else. Through it go the control connection of a
tunnel, and for comparison a plain TCP connection to the same service. A multiplexer whose window is fixed moves at
most one window each round trip: the last column says how many times that of 256 KiB the tunnel reaches.
"""

from __future__ import annotations

import argparse
import contextlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support import Address, Program, reachable, read_all  # noqa: E402

import rtunnel_tls  # noqa: E402

ROUND_TRIPS_S = (0.05, 0.1)
FIXED_WINDOW_BYTES = 256 * 1024
BLOCK_BYTES = 256 * 1024
MB = 1e6


def serve() -> None:
    """The local service: to `D` it sends until the visitor has enough; after `U` it counts what comes, and tells."""
    listener = socket.create_server(("127.0.0.1", 0))
    print("{}:{}".format(*listener.getsockname()), flush=True)
    buffer = bytearray(BLOCK_BYTES)
    while True:
        sock, _ = listener.accept()
        with sock, contextlib.suppress(ConnectionError):
            if sock.recv(1) == b"D":
                while True:
                    sock.sendall(buffer)
            total = 0
            while count := sock.recv_into(buffer):
                total += count
            sock.sendall(str(total).encode())


def download(address: Address, seconds: float) -> tuple[float, float]:
    """Bytes per second that a visitor receives: over all the time, and over its second half."""
    with socket.create_connection(address) as sock:
        sock.sendall(b"D")
        buffer = bytearray(BLOCK_BYTES)
        total = at_half = 0
        begun = half = time.monotonic()
        while (now := time.monotonic()) < begun + seconds:
            if not at_half and now > begun + seconds / 2:
                at_half, half = total, now
            total += sock.recv_into(buffer)
        return total / (now - begun), (total - at_half) / (now - half)


def upload(address: Address, seconds: float) -> tuple[float, float]:
    """Bytes per second that the service receives from a visitor, from its first send until the service has told."""
    with socket.create_connection(address) as sock:
        buffer = bytes(BLOCK_BYTES)
        begun = time.monotonic()
        sock.sendall(b"U")
        while time.monotonic() < begun + seconds:
            sock.sendall(buffer)
        sock.shutdown(socket.SHUT_WR)
        speed = int(read_all(sock)) / (time.monotonic() - begun)
        return speed, speed


@contextlib.contextmanager
def child(*arguments: str) -> Iterator[Address]:
    """A Python program that prints its address first."""
    with subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield reachable(process.stdout.readline().strip())
        finally:
            process.kill()


def relay(target: Address, round_trip_s: float) -> contextlib.AbstractContextManager[Address]:
    """A relay to the target at half the round trip each way."""
    return child(str(ROOT / "tests" / "relay.py"), "{}:{}".format(*target), str(round_trip_s / 2))


@contextlib.contextmanager
def tunnel(service: Address, round_trip_s: float, flags: dict[str, Sequence[str]]) -> Iterator[Address]:
    """A server, and far away a client beside the service; the public address."""
    with contextlib.ExitStack() as stack:
        listen = ("--control-listen", "127.0.0.1:0", "--public-bind", "127.0.0.1")
        server = Program("server", *listen, *flags["server"])
        stack.callback(server.kill)
        control = stack.enter_context(relay(server.control_address, round_trip_s))
        local = ("--server", "{}:{}".format(*control), "--local", "{}:{}".format(*service))
        client = Program("client", *local, *flags["client"])
        stack.callback(client.kill)
        yield server.lease_address()


def tls_flags(folder: Path) -> dict[str, Sequence[str]]:
    """Post-quantum TLS with an authority of its own."""
    rtunnel_tls.init_authority(folder)
    rtunnel_tls.issue(folder, "server", hosts=["127.0.0.1"])
    rtunnel_tls.issue(folder, "client", hosts=None)
    return {
        role: (
            "--tls",
            f"--tls-ca={folder / 'ca.crt'}",
            f"--tls-cert={folder / role}.crt",
            f"--tls-key={folder / role}.key",
        )
        for role in ("server", "client")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of one stream over distance.")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each transfer, the window's growth included")
    parser.add_argument("--tls", action="store_true", help="the tunnel over post-quantum TLS")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        return serve()

    name = "TLS" if arguments.tls else "plain"
    print(f"one stream, {arguments.seconds:g} s each, MB/s (in brackets: the second half of the time)\n")
    print(f"| round trip | way | TCP alone | tunnel, {name} | fixed 256 KiB window | tunnel / fixed |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, child(str(Path(__file__).resolve()), "--serve") as service:
        flags: dict[str, Sequence[str]] = tls_flags(Path(folder)) if arguments.tls else {"server": (), "client": ()}
        for round_trip_s in ROUND_TRIPS_S:
            for way, transfer in (("download", download), ("upload", upload)):
                with relay(service, round_trip_s) as far:
                    alone, alone_later = transfer(far, arguments.seconds)
                with tunnel(service, round_trip_s, flags) as public:
                    through, through_later = transfer(public, arguments.seconds)
                fixed = FIXED_WINDOW_BYTES / round_trip_s
                print(
                    f"| {1000 * round_trip_s:.0f} ms | {way} | {alone / MB:.0f} ({alone_later / MB:.0f}) "
                    f"| {through / MB:.1f} ({through_later / MB:.1f}) | {fixed / MB:.1f} | {through / fixed:.0f} |",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    main()
