"""Random sessions of both roles, at both levels, held to the judge's states in both directions.

A driver plays the other end. It says any frame, legal or not, and the visitor, or the service, does anything. The judge
tells beforehand what each frame is: at a protocol error our end must close, at any other frame it must go on; and
whatever it says itself must break no rule. `python tests/test_random_sessions.py --seconds 600` goes on for so long.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))

import pytest
import tap
from conftest import Factory
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from judge import (
    CLIENT,
    CLOSE_CONN,
    DATA,
    EOF,
    GOAWAY,
    INIT,
    KINDS,
    NEW_CONN,
    PING,
    PONG,
    SERVER,
    WELCOME,
    WINDOW,
    Frame,
    Judge,
    step,
)
from judged import judge_all
from naive_peer import NaivePeer, init_text
from support import Address, Program, connect, reset
from tunnels import text

WAIT_S = 10.0
VISITOR = b"203.0.113.7:51234"
COUNTS: collections.Counter[str] = collections.Counter()


class World:
    """One program of ours, and where its other ends are."""

    def __init__(self, role: int, program: Program, listener: socket.socket, service: socket.socket) -> None:
        self.role, self.program, self.listener, self.service = role, program, listener, service

    def dial(self) -> NaivePeer:
        """The control connection of the next session."""
        if self.role == SERVER:
            return NaivePeer.connect(self.program.control_address)
        return NaivePeer(self.listener.accept()[0], WAIT_S)


class Session(RuleBasedStateMachine):
    """A session of a program with this driver."""

    world: ClassVar[World]
    level: ClassVar[int]

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.driver = self.world.role, 1 - self.world.role
        self.sockets: dict[int, socket.socket] = {}  # the visitor's, or the service's

    @initialize()
    def open(self) -> None:
        """A session, as far as its level."""
        COUNTS["sessions"] += 1
        self.peer = self.world.dial()
        self.judge = Judge()
        self.said: dict[int, bytes] = {}  # as DATA that our end takes, by stream
        self.written: dict[int, bytes] = {}  # what the socket has got of it
        self.heard: dict[int, bytes] = {}  # as DATA
        self.spoken: dict[int, bytes] = {}  # what the socket has said
        self.public: Address | None = None
        self.over = False
        self.pings = 0
        if self.driver == CLIENT:
            instance = os.urandom(16).hex()
            self.say(INIT, 0, init_text(0, instance) if self.level else b"0:127.0.0.1:80")
            if self.level:
                welcome = self.hear()
                self.public = "127.0.0.1", int(dict(line.split("=") for line in welcome.decode().split())["port"])
            else:
                self.public = self.world.program.lease_address()
            return
        assert self.hear()
        if self.level:
            self.say(WELCOME, 0, b"version=1\nport=4711\nwindow=65536")
        else:
            self.open_stream()  # the first frame is no WELCOME

    def go_on(self) -> None:
        """The next session, where a protocol error has ended the last one. (No rule has a precondition: what they
        would look at depends on time, and hypothesis takes its choices by them.)"""
        if self.over:
            self.teardown()
            self.open()

    # -- frames

    @staticmethod
    def frame(sender: int, kind: int, stream: int, payload: bytes) -> Frame:
        """For the judge."""
        is_data = kind == DATA
        kept, count = (b"", len(payload)) if is_data else (payload, 0)
        return Frame(time.monotonic(), sender, kind, stream, len(payload), kept, 0, count)

    def is_error(self, kind: int, stream: int, payload: bytes) -> bool:
        """Whether the driver would break a rule that ends the session."""
        frame = self.frame(self.driver, kind, stream, payload)
        broken = step(self.judge.session, self.judge.streams.get(stream), frame).broken
        return broken is not None and broken.is_error

    def say(self, kind: int, stream: int, payload: bytes) -> None:
        """Say a frame, and see that our end does as the judge expects."""
        COUNTS["frames"] += 1
        frame = self.frame(self.driver, kind, stream, payload)
        before = self.judge.streams.get(stream)
        broken = step(self.judge.session, before, frame).broken
        if kind == DATA and not (broken and broken.is_error) and before and not before.has_ended:
            self.said[stream] = self.said.get(stream, b"") + payload
        self.judge.take(frame)
        try:
            self.peer.send_frame(kind, stream, payload)
        except OSError:
            assert broken is not None, "our end has closed without a reason"
        if broken is not None and broken.is_error:
            COUNTS[f"[{broken.rule}]"] += 1
            self.expect_end(stream, broken.rule)

    def hear(self) -> bytes:
        """The next frame's payload; judged. EOFError at the connection's end."""
        kind, stream, payload = self.peer.read_frame()
        frame = self.frame(self.ours, kind, stream, payload)
        COUNTS["heard"] += 1
        broken = self.judge.take(frame)
        assert broken is None, self.judge.findings[-1]
        if kind == DATA:
            self.heard[stream] = self.heard.get(stream, b"") + payload
            assert self.spoken[stream].startswith(self.heard[stream])
        elif kind == PING and not self.over:
            with contextlib.suppress(OSError):
                self.say(PONG, 0, payload)
        self.last = kind, stream, payload
        return payload

    def sync(self) -> None:
        """Our end has judged all that was said, and goes on; all that it has said is heard."""
        if self.over or not self.level:
            return
        self.pings += 1
        payload = self.pings.to_bytes(8, "big")
        self.say(PING, 0, payload)
        while not self.over:
            self.hear()
            if self.last == (PONG, 0, payload):
                return

    def expect_end(self, stream: int, rule: str) -> None:
        """After a protocol error: our end closes, unless its own end of the stream has crossed it."""
        self.over = True
        if self.level:
            with contextlib.suppress(OSError):
                self.peer.send_frame(PING, 0, b"lastping")
        try:
            while True:
                kind, _, payload = self.peer.read_frame()
                if kind == PONG and payload == b"lastping":
                    raise AssertionError(f"our end goes on after {rule}: {self.judge.findings[-1]}")
                if kind == CLOSE_CONN and _ == stream:
                    return
        except (EOFError, ConnectionError):
            return

    # -- the socket behind our end

    def alive(self) -> list[int]:
        return sorted(self.sockets)

    def open_stream(self) -> None:
        """A visitor comes; at our client's the driver says so."""
        stream = self.judge.session.last + 1
        self.said[stream] = self.written[stream] = self.heard[stream] = self.spoken[stream] = b""
        if self.driver == CLIENT:
            assert self.public is not None
            sock = connect(self.public)
            while stream not in self.judge.streams:
                self.hear()
        else:
            self.say(NEW_CONN, stream, VISITOR if self.level else b"")
            sock = self.world.service.accept()[0]
        self.sockets[stream] = sock

    @rule()
    def visitor(self) -> None:
        """A visitor comes, where the session takes one: [G-1], [L-4]."""
        self.go_on()
        if len(self.sockets) < 4 and self.judge.session.goaway == (False, False):
            self.open_stream()
            self.sync()

    @rule(pick=st.integers(0, 3), action=st.sampled_from(["say", "say much", "read", "end", "reset", "close"]))
    def socket_acts(self, pick: int, action: str) -> None:
        """The visitor, or the service, of one stream does something."""
        self.go_on()
        if not self.sockets:
            return
        stream = self.alive()[pick % len(self.sockets)]
        sock = self.sockets[stream]
        try:
            if action in ("say", "say much"):
                sock.settimeout(0)
                block = os.urandom(100_000 if action == "say much" else 100)
                self.spoken[stream] += block[: sock.send(block)]
            elif action == "read":
                sock.settimeout(0)
                self.written[stream] += sock.recv(1 << 20)
                assert self.said[stream].startswith(self.written[stream])
            elif action == "end":
                sock.shutdown(socket.SHUT_WR)
            else:
                (reset if action == "reset" else socket.socket.close)(sock)
                del self.sockets[stream]
        except BlockingIOError:
            pass
        except OSError:  # our end has reset it
            self.sockets.pop(stream).close()
        self.sync()

    # -- any frame

    @rule(
        kind=st.sampled_from([DATA, DATA, EOF, CLOSE_CONN, WINDOW, PING, *KINDS, 0x63]),
        where=st.sampled_from(["open", "open", "open", "open", "last", "next", "zero", "highest"]),
        pick=st.integers(0, 3),
        size=st.sampled_from([0, 1, 4, 8, 8, 64, 65, 5000, 65527, 65536, 100_000]),
        fits=st.booleans(),
        number=st.sampled_from([0, 1, 1000, 65536, 2**31 - 1, 2**32 - 1]),
        dares=st.sampled_from([False, False, False, False, True]),
    )
    def any_frame(self, kind: int, where: str, pick: int, size: int, fits: bool, number: int, dares: bool) -> None:
        """A frame, legal or not; one in five of those that would end the session."""
        self.go_on()
        last = self.judge.session.last
        known = self.alive() or [last]
        stream = {"open": known[pick % len(known)], "last": last, "next": last + 1, "zero": 0}.get(where, 2**32 - 1)
        if fits and kind in KINDS and kind != DATA:  # a length that the table has; and an id
            lengths = KINDS[kind].lengths
            size = min(max(size, lengths[0]), lengths[-1])
            stream = stream if KINDS[kind].on_stream else 0
        if kind == WELCOME and self.driver == SERVER and self.judge.session.level is None:
            return  # a refusal would end the program
        if kind == NEW_CONN and self.driver == SERVER:
            payload = VISITOR if fits and self.level else b"?" * min(size, 64)
            if not self.is_error(kind, stream, payload):  # the rule above opens streams
                return
        elif kind == WINDOW and size == 4:
            payload = number.to_bytes(4, "big")
        elif kind == GOAWAY:
            payload = b"restart"
        elif kind != DATA and size > 4096:
            payload = b"x" * 4097
        else:
            payload = (b"0123456789" * 10_000)[:size]
        if dares or not self.is_error(kind, stream, payload):
            self.say(kind, stream, payload)
            self.sync()

    @invariant()
    def hears_all(self) -> None:
        """What has come meanwhile is judged, also at level 0."""
        self.peer.sock.settimeout(0)
        try:
            while not self.over and self.peer.sock.recv(1, socket.MSG_PEEK):
                self.peer.sock.settimeout(WAIT_S)
                self.hear()
                self.peer.sock.settimeout(0)
        except BlockingIOError:
            pass
        finally:
            self.peer.sock.settimeout(WAIT_S)

    def teardown(self) -> None:
        for sock in self.sockets.values():
            sock.close()
        self.sockets.clear()
        self.peer.sock.close()
        assert self.world.program.process.poll() is None, "the program has ended"
        assert not self.world.program.events("internal-error")


LIMITS = {"FIRST_RETRY_S": 0.01, "REFUSED_RETRY_S": 0.01, "LEASE_LINGER_S": 0.01}
KINDS_OF_SESSION = [(role, level) for role in (SERVER, CLIENT) for level in (1, 0)]


@contextlib.contextmanager
def world(role: int, start: Any) -> Any:
    with (
        socket.create_server(("127.0.0.1", 0), backlog=64) as listener,
        socket.create_server(("127.0.0.1", 0), backlog=64) as service,
    ):
        listener.settimeout(WAIT_S)
        service.settimeout(WAIT_S)
        if role == SERVER:
            flags = ("server", "--control-listen=127.0.0.1:0", "--public-bind=127.0.0.1")
        else:
            flags = ("client", f"--server={text(listener.getsockname())}", f"--local={text(service.getsockname())}")
        yield World(role, start(*flags, "--log-level=debug", limits=LIMITS), listener, service)


def drive(place: World, level: int, examples: int, *, random: bool) -> None:
    """So many random sessions with one program."""
    machine = type("RandomSession", (Session,), {"world": place, "level": level})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=25, deadline=None, database=None, derandomize=not random,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


@pytest.mark.parametrize(("role", "level"), KINDS_OF_SESSION)
def test_random_sessions(role: int, level: int, program: Factory) -> None:
    """Our end closes at each frame that the judge calls a protocol error, goes on at each other, and breaks no rule."""
    with world(role, program) as place:
        drive(place, level, 4, random=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="Random sessions, judged, for so long.")
    parser.add_argument("--seconds", type=float, default=600)
    end = time.monotonic() + parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        os.environ[tap.VARIABLE] = f"{folder}/tap"
        while time.monotonic() < end:
            for role, level in KINDS_OF_SESSION:
                started: list[Program] = []

                def start(*arguments: str, **options: Any) -> Program:
                    started.append(Program(*arguments, **options))  # noqa: B023
                    return started[-1]  # noqa: B023

                try:
                    with world(role, start) as place:
                        drive(place, level, 50, random=True)
                except BaseException:
                    print("\n".join(line for each in started for line in each.lines[-20:]))
                    raise
                finally:
                    for each in started:
                        each.kill()
            if found := judge_all(Path(folder), 1 << 26):
                print("\n".join(found))
                return 1
            for file in Path(folder).iterdir():
                file.unlink()
    print(", ".join(f"{name} {count}" for name, count in sorted(COUNTS.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
