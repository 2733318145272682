"""All that a public port meets, all at once, on loopback, while a good client and good visitors measure.

`python tests/long/attack.py --seconds 60`. The attackers are a process of their own,
which ends with its standard input.
Each attack comes from an address of its own (127.0.1.x), is bounded in count and rate, and stops with the run.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from load import HEADER, Load
from longrun import Stage, main, require, stage
from OpenSSL import SSL
from support import ROOT, Address, eventually

import rtunnel
import rtunnel_tls
from rtunnel import FrameType, encode

HELD = 200  # connections that an attack of the patient kind holds at most
ROW = 20000  # connections of the attack that does nothing else


class Attackers:
    """Each public method but `run` is an attack, in a thread of its own until the process ends.

    Outsiders have no certificate; mallory has one of this house, and opens ports as any client may.
    """

    def __init__(self, control: Address, public: Address, pki: Path, seconds: float) -> None:
        self._control, self._public, self._seconds = control, public, seconds
        files = {"cert": pki / "mallory.crt", "key": pki / "mallory.key", "ca": pki / "ca.crt"}
        self._context = rtunnel_tls.TlsContext("default", **files, verify_name="127.0.0.1")
        hello = rtunnel_tls._Ssl(self._context)
        with contextlib.suppress(SSL.WantReadError):
            hello.do_handshake()
        self._hello = bytes(hello.take(memoryview(b"")))
        self._sources = itertools.count(1)

    def run(self) -> None:
        """Attack until the standard input ends."""
        attacks = [getattr(self, name) for name in vars(Attackers) if not name.startswith("_") and name != "run"]
        for attack in attacks:
            threading.Thread(target=self._guarded, args=(attack,), name=attack.__name__, daemon=True).start()
        sys.stdin.read()

    def _guarded(self, attack: Callable[[Callable[[Address], socket.socket]], None]) -> None:
        source = f"127.0.1.{next(self._sources)}"

        def dial(address: Address) -> socket.socket:
            return socket.create_connection(address, 2.0, (source, 0))

        while True:
            with contextlib.suppress(*rtunnel.TRANSPORT_ERRORS, rtunnel_tls.HandshakeError, rtunnel.RtunnelError):
                attack(dial)
            time.sleep(0.01)

    def _hold(
        self, dial: Callable[[Address], socket.socket], address: Address, first: bytes, drip: bytes = b"",
        ended: bool = False,
    ) -> None:  # fmt: skip
        """Hold connections that say something once, and then a little each second, or no more."""
        held: list[socket.socket] = []
        try:
            while True:
                time.sleep(0.02 if len(held) < HELD else 1.0)
                if len(held) < HELD:
                    held.append(dial(address))
                    held[-1].sendall(first)
                    if ended:
                        held[-1].shutdown(socket.SHUT_WR)
                for sock in held:
                    with contextlib.suppress(OSError):
                        sock.send(drip)
        finally:
            for sock in held:
                sock.close()

    # -- outsiders at the control port

    def silent(self, dial: Callable[[Address], socket.socket]) -> None:
        self._hold(dial, self._control, b"")

    def a_byte_a_second(self, dial: Callable[[Address], socket.socket]) -> None:
        self._hold(dial, self._control, b"", b"\x16")

    def half_a_handshake(self, dial: Callable[[Address], socket.socket]) -> None:
        self._hold(dial, self._control, self._hello)

    def hello_flood(self, dial: Callable[[Address], socket.socket]) -> None:
        """Each costs the server an encapsulation and a signature."""
        with dial(self._control) as sock:
            sock.sendall(self._hello)
            sock.recv(1)

    def garbage(self, dial: Callable[[Address], socket.socket]) -> None:
        with dial(self._control) as sock:
            sock.sendall(secrets.choice([os.urandom(10000), b"GET / HTTP/1.1\r\n\r\n", encode(FrameType.INIT, 0)]))
            sock.recv(100)

    def connections_in_a_row(self, dial: Callable[[Address], socket.socket]) -> None:
        began = time.monotonic()
        for number in range(ROW):
            dial(self._control).close()
            time.sleep(max(0.0, began + number * self._seconds / ROW - time.monotonic()))
        time.sleep(self._seconds)

    # -- mallory, who has a certificate

    def _enter(self, dial: Callable[[Address], socket.socket], window: int = 65536) -> rtunnel_tls.TlsTransport:
        carrier = rtunnel.PlainTransport(dial(self._control))
        try:
            transport = rtunnel_tls.TlsTransport.handshake(carrier, self._context, rtunnel.deadline(5.0))
            init = rtunnel.Init(0, "mallory:1", secrets.token_hex(16), 1, window)
            transport.send(encode(FrameType.INIT, 0, init.payload()))
        except BaseException:
            carrier.close()
            raise
        return transport

    def _welcome(self, transport: rtunnel_tls.TlsTransport) -> Address:
        """The port that mallory has got. Raises Refused."""
        decoder, buffer = rtunnel.Decoder(), memoryview(bytearray(65536))
        while count := transport.receive_into(buffer):
            for event in decoder.feed(buffer[:count]):
                if isinstance(event, rtunnel.Frame) and event.type == FrameType.WELCOME:
                    return "127.0.0.1", rtunnel.Welcome.parse(event.payload).port
        raise OSError("no welcome")

    def oversized_frames(self, dial: Callable[[Address], socket.socket]) -> None:
        with contextlib.closing(self._enter(dial)) as transport:
            transport.send(rtunnel.HEADER.pack(secrets.choice([2, 4, 200]), 1, 2**32 - 1) + b"x" * 1000)
            self._welcome(transport)
            time.sleep(0.1)

    def ping_flood(self, dial: Callable[[Address], socket.socket]) -> None:
        with contextlib.closing(self._enter(dial)) as transport:
            while True:
                transport.send(encode(FrameType.PING, 0, bytes(8)) * 1000)

    def windows_that_never_open(self, dial: Callable[[Address], socket.socket]) -> None:
        """Visitors of its own port send for ever, and it takes one byte of each."""
        with contextlib.closing(self._enter(dial, window=1)) as transport:
            address = self._welcome(transport)
            self._hold(dial, address, bytes(100000), bytes(1000))

    def leases_in_a_loop(self, dial: Callable[[Address], socket.socket]) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                transport = self._enter(dial)
                stack.callback(transport.close)
                self._welcome(transport)
                time.sleep(0.02)

    def goaway_and_stay(self, dial: Callable[[Address], socket.socket]) -> None:
        """Give each port back at once, and keep the session."""
        with contextlib.ExitStack() as stack:
            for _ in range(100):
                transport = self._enter(dial)
                stack.callback(transport.close)
                self._welcome(transport)
                transport.send(encode(FrameType.GOAWAY, 0))
                time.sleep(0.02)

    def visitors_that_come_and_go(self, dial: Callable[[Address], socket.socket]) -> None:
        """And a client that reads nothing of them, with a visitor that has filled the way."""
        with contextlib.closing(self._enter(dial, window=1 << 30)) as transport:
            address = self._welcome(transport)
            with dial(address) as pouring, contextlib.suppress(TimeoutError):
                while True:
                    pouring.sendall(bytes(1 << 20))
            for _ in range(2000):
                dial(address).close()
                time.sleep(0.001)

    # -- visitors of the good client's port

    def never_reads(self, dial: Callable[[Address], socket.socket]) -> None:
        self._hold(dial, self._public, HEADER.pack(1, 0, 1 << 20), ended=True)

    def never_writes(self, dial: Callable[[Address], socket.socket]) -> None:
        self._hold(dial, self._public, b"")


def attack(seconds: float) -> None:
    """Measure without attack for a quarter of the time (10 s at most), with it, and after it."""
    quiet_s = min(10.0, seconds / 4)
    with stage() as here:
        here.start_server()
        here.start_client()
        eventually(here.serves)
        print(f"before: {here.cost()}")
        alone = measure(here, quiet_s)
        most = {"memory": 0.0, "threads": 0, "descriptors": 0}
        command = [sys.executable, __file__, "--attack", str(here.control[1]), str(here.public[1])]
        attackers = subprocess.Popen([*command, here.house.folder, str(seconds)], stdin=subprocess.PIPE, cwd=ROOT)
        try:
            attacked = measure(here, seconds - quiet_s, most)
        finally:
            assert attackers.stdin is not None
            attackers.stdin.close()
            attackers.wait(20)
        print("during, the server's most: " + ", ".join(f"{name} {value:.0f}" for name, value in most.items()))
        after = measure(here, quiet_s)
        long = seconds > rtunnel.POOL_IDLE_S  # else the attacker's ports still linger, and threads idle
        left = 40 if long else 40 + rtunnel.MAX_LEASES
        eventually(lambda: here.server.descriptors() < left, 20.0, "descriptors are given back")
        if long:
            eventually(lambda: here.server.threads() < 30, 20.0, "idle threads leave")
        print(f"after:  {here.cost()}")
    for name, load in (("before", alone), ("during", attacked), ("after", after)):
        print(
            f"{name}: {len(load.seconds)} requests, {100 * load.success_rate:.2f} % answered, p50 "
            f"{load.quantile_ms(0.5):.1f} ms, p99 {load.quantile_ms(0.99):.1f} ms, failed {dict(load.failed)}"
        )
        require(not load.wrong + here.answers.wrong, f"wrong bytes: {load.wrong + here.answers.wrong}")
        require(len(load.seconds) > 0 and load.success_rate == 1.0, f"{name}: requests have failed")


def measure(here: Stage, seconds: float, most: dict[str, float] | None = None) -> Load:
    """Good visitors for so long; `most` is raised to what the server costs meanwhile."""
    end = time.monotonic() + seconds
    with Load(here.public, 4, pause_s=0.02) as load:
        while time.monotonic() < end:
            time.sleep(0.1)  # how often it is looked at; nothing waits for it
            if most is not None:
                server = here.server
                now = (server.memory_bytes() / 1e6, server.threads(), server.descriptors())
                most.update({name: max(most[name], value) for name, value in zip(most, now, strict=True)})
    return load


if __name__ == "__main__":
    if sys.argv[1:2] == ["--attack"]:
        ports = [("127.0.0.1", int(port)) for port in sys.argv[2:4]]
        Attackers(*ports, Path(sys.argv[4]), float(sys.argv[5])).run()
    else:
        main(attack, 60.0)
