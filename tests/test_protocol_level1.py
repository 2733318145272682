"""Level 1 against a peer that is written from PROTOCOL.md alone: what breaks a rule, and what keeps them all."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
from conftest import Factory
from naive_peer import (
    BLOCKED,
    CLOSE_CONN,
    DATA,
    EOF,
    GOAWAY,
    INIT,
    NEW_CONN,
    PING,
    PONG,
    WELCOME,
    WINDOW,
    Level1Peer,
    NaivePeer,
    frame,
    init_text,
    lines_of,
)
from support import (
    ROOT,
    Address,
    Program,
    Service,
    Sink,
    connect,
    echo_service,
    ends_with,
    eventually,
    free_port,
    read_all,
    read_exactly,
    reset,
    running,
)
from tunnels import closed_port, text, visit
from vector_files import FRAMES, SESSIONS, Case

KIB = 1024
WINDOW_BYTES = 64 * KIB
DOCUMENT = (ROOT / "PROTOCOL.md").read_text()


def name_of(peer: NaivePeer) -> str:
    """A peer's address, as the server logs it."""
    return text(peer.sock.getsockname())


def number(payload: bytes) -> int:
    return int.from_bytes(payload, "big")


# --- the vectors of sessions ---------------------------------------------------------------------------------


def test_each_protocol_error_has_a_vector() -> None:
    """Each rule of PROTOCOL.md that makes something a protocol error, or has it refused with a code, is shown by a
    vector that breaks it; and each vector of a session cites rules that are there."""
    rules = dict(re.findall(r"^- \*\*\[([A-Z]-\d+)\]\*\* (.*)$", DOCUMENT, re.M))
    marks = re.compile("protocol error|MUST be refused with")
    wanted = {rule for rule, said in rules.items() if marks.search(said) and not rule.startswith("X")}
    broken = {rule for case in (*FRAMES, *SESSIONS) if case.error or case.refusal for rule in case.rules}
    assert wanted <= broken
    assert all(case.rules and set(case.rules) <= set(rules) for case in SESSIONS)


def play(case: Case, peer: NaivePeer) -> None:
    """Send the bytes, and hear what comes back until the end, or until the session has shown that it goes on."""
    with contextlib.suppress(ConnectionError):  # the other end has heard enough
        peer.send(case.raw)
    hear = peer.hear if isinstance(peer, Level1Peer) else peer.read_frame
    if isinstance(peer, Level1Peer):
        peer.unanswered += [payload for type, _, payload, _ in case.events if type == PONG]
    if case.refusal:
        type, stream, payload = hear()
        assert (type, stream) == (WELCOME, 0)
        assert lines_of(payload)["error"] == case.refusal
        assert 1 <= len(lines_of(payload)["message"]) <= 256
        peer.expect_end()
        return
    for event in case.events:
        got = hear()
        while got[0] == PING:  # before WELCOME is understood a NaivePeer plays
            got = hear()
        assert (*got, 0) == event
    if case.error:
        until_end(peer)
    elif isinstance(peer, Level1Peer):
        peer.check_alive()


def until_end(peer: NaivePeer) -> None:
    """Read what still comes, until the other end closes."""
    with contextlib.suppress(EOFError, ConnectionError):
        while peer.read_frame():
            continue


class ToServer:
    """A server that is sent vectors, beside a session that must not notice."""

    def __init__(self) -> None:
        limits = {"LEASE_LINGER_S": 0.1}
        self.program = Program("server", "--control-listen", "127.0.0.1:0", "--public-bind", "127.0.0.1", limits=limits)
        self.neighbour = Level1Peer.as_client(self.program.control_address)
        self.visitor = connect(self.neighbour.public)
        assert self.neighbour.hear_visitor() == 1

    def close(self) -> None:
        self.visitor.close()
        self.neighbour.sock.close()
        self.program.kill()

    def play(self, case: Case) -> None:
        control = self.program.control_address
        with ExitStack() as stack:
            if case.after.startswith("level 1"):
                peer: NaivePeer = stack.enter_context(Level1Peer.as_client(control))
            else:
                peer = stack.enter_context(NaivePeer.connect(control))
                if case.after != "nothing":
                    peer.send_init(b"0:h:1")
            name = name_of(peer)
            if case.after.endswith("stream 1"):
                public = self.program.session_address(peer=name)
                visitor = stack.enter_context(connect_small(public))
                assert peer.read_frame()[:2] in ((NEW_CONN, 1), (PING, 0))
                if isinstance(peer, Level1Peer) and not peer.visitors:
                    peer.hear_visitor()
                if "stalled" not in case.after:
                    stack.enter_context(running(lambda: ends_with(visitor), peer.sock.close))
            play(case, peer)
        event = "refused" if case.after == "nothing" else "session-closed"
        assert case.error in self.program.wait_for(event, peer=name)["reason"]
        warned = [each for each in self.program.records if each.level == "WARNING" and each.fields["peer"] == name]
        closed = self.program.events("session-closed", peer=name)
        assert len(warned) + len(closed) == 1
        self.visitor.sendall(b"still here")
        assert self.neighbour.hear_data(1, 10) == b"still here"
        self.neighbour.send_data(1, b"and here")
        assert read_exactly(self.visitor, 8) == b"and here"


def connect_small(address: Address) -> socket.socket:
    """A connection with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.settimeout(10.0)
    sock.connect(address)
    return sock


class ToClient:
    """A client that is sent vectors: it dials again after each."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10.0)
        self._services = {kind: Service(handle) for kind, handle in (("takes", ends_with), ("stalled", self._hang))}
        self._leave = threading.Event()
        server = text(self._listener.getsockname())
        forward = [f"0:{self._services['takes'].text}", f"0:{self._services['stalled'].text}"]
        flags = ("--forward", forward[0], "--forward", forward[1], "--reconnect-max", "0.05")
        self.program = Program("client", "--server", server, *flags, limits={"FIRST_RETRY_S": 0.01})

    def _hang(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        self._leave.wait(10)

    def close(self) -> None:
        self.program.kill()
        self._listener.close()
        for service in self._services.values():
            service.__exit__()

    def accept(self, case: Case) -> NaivePeer:
        """The next session of the mapping that the case wants; its INIT is read."""
        wanted = self._services["stalled" if "stalled" in case.after else "takes"].text
        while True:
            accepted, _ = self._listener.accept()
            peer = Level1Peer(accepted, plays="server", window=WINDOW_BYTES)
            type, _, payload = peer.read_frame()
            assert type == INIT
            if payload.split(b"\n")[0] == f"0:{wanted}".encode():
                peer.lines = lines_of(payload)
                return peer if case.after.startswith("level 1") else NaivePeer(accepted)
            accepted.close()

    def play(self, case: Case) -> None:
        with self.accept(case) as peer:
            if isinstance(peer, Level1Peer):
                peer.send_frame(WELCOME, 0, b"version=1\nport=4711\nwindow=65536")
                if case.after.endswith("stream 1"):
                    peer.open(1)
            elif case.after.endswith("stream 1"):
                peer.send_frame(NEW_CONN, 1)
            play(case, peer)
        self._leave.set()
        self._leave = threading.Event()
        if case.error:
            eventually(lambda: self._closed(case.error), what=case.error)
        assert not [each for each in self.program.records if each.level == "ERROR"]

    def _closed(self, words: str) -> bool:
        """Whether the log has a line, not seen before, of a session that ended for this reason."""
        with contextlib.suppress(AssertionError):
            while words not in self.program.wait_for("session-closed", 0.0)["reason"]:
                continue
            return True
        return False


@pytest.fixture(scope="module")
def to_server() -> Iterator[ToServer]:
    tested = ToServer()
    yield tested
    tested.close()


@pytest.fixture(scope="module")
def to_client() -> Iterator[ToClient]:
    tested = ToClient()
    yield tested
    tested.close()


@pytest.mark.parametrize("case", [case for case in SESSIONS if case.to == "server"], ids=lambda case: case.name)
def test_what_a_server_is_sent(to_server: ToServer, case: Case) -> None:
    """[X-1], [X-2]: each vector has the answer that it says; an error ends its session with one line in the log, and
    a session beside it goes on."""
    to_server.play(case)


@pytest.mark.parametrize("case", [case for case in SESSIONS if case.to == "client"], ids=lambda case: case.name)
def test_what_a_client_is_sent(to_client: ToClient, case: Case) -> None:
    """[X-1], [X-3]: each vector has the answer that it says; an error ends its session with one line in the log, and
    the client comes again."""
    to_client.play(case)
