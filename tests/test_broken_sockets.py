"""Sockets that are reset while nobody reads from them (PROTOCOL.md, section 4).

A visitor's: the write to it fails, which ends this stream with a reset, soon, and nothing else. A
local service's: what it had said before is for the visitor all the same.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

import pytest
from level1 import Ends, Peer, PeerServer, mapping
from naive_peer import CLOSE_CONN, EOF, Level1Peer
from support import Service, connect, eventually, read_exactly, reset
from tunnels import Factory

import rtunnel
from rtunnel import FrameType

WINDOW_BYTES = 65536


def hear_reset(peer: Level1Peer, stream: int) -> None:
    """The stream is closed as reset; what the peer sends meanwhile is dropped; the session lives."""
    for _ in range(3):
        peer.send_data(stream, b"late")
    while (got := peer.hear())[0] != CLOSE_CONN:
        continue
    assert got == (CLOSE_CONN, stream, b"reset")
    peer.check_alive()


def test_a_visitor_that_resets_without_credit(server: Factory) -> None:
    """Its bytes wait for credit, so that nobody reads from its socket."""
    with Level1Peer.as_client(server().control_address, window=WINDOW_BYTES) as peer:
        visitor = connect(peer.public)
        stream = peer.hear_visitor()
        visitor.sendall(bytes(WINDOW_BYTES + 1000))
        peer.hear_data(stream, WINDOW_BYTES)
        reset(visitor)
        hear_reset(peer, stream)


def test_a_visitor_that_resets_behind_its_end(server: Factory) -> None:
    """It has ended its own direction, so that nobody reads from its socket any more."""
    with Level1Peer.as_client(server().control_address) as peer:
        visitor = connect(peer.public)
        stream = peer.hear_visitor()
        peer.send_data(stream, b"hello")
        read_exactly(visitor, 5)
        visitor.shutdown(socket.SHUT_WR)
        peer.expect(EOF, stream)
        reset(visitor)
        hear_reset(peer, stream)


def answer(sock: socket.socket) -> None:
    """Say more than the peer has credit for; the close resets, for a byte is unread."""
    read_exactly(sock, 1)
    sock.sendall(bytes(range(250)) * 20)


def blocked_answer(peer: Peer) -> bytes:
    """What comes of it for a credit of 1,000."""
    peer.send_frame(FrameType.NEW_CONN, 1, b"203.0.113.7:51234")
    peer.send_frame(FrameType.DATA, 1, b"ab")
    said, is_blocked = b"", False
    while len(said) < 1000 or not is_blocked:  # BLOCKED may overtake DATA
        kind, _, payload = peer.hear(FrameType.DATA, FrameType.BLOCKED, FrameType.WINDOW)
        is_blocked |= kind == FrameType.BLOCKED
        said += payload if kind == FrameType.DATA else b""
    assert len(said) == 1000
    return said


@pytest.mark.parametrize("late", [b"", b"late"])
def test_an_answer_before_a_reset_waits_for_credit(looks: Callable[[], int], late: bytes) -> None:
    """A service that answers and resets loses nothing of its answer to a visitor who takes it slowly, whether or not
    more is still sent to it."""
    with Ends() as ends, PeerServer() as server, Service(answer) as service:
        ends.open_client(server.address, mapping(service.address))
        peer = server.accept(b"version=1\nport=4711\nwindow=1000")
        said = blocked_answer(peer)
        if late:
            peer.send_frame(FrameType.DATA, 1, late)
        before = looks()
        eventually(lambda: looks() > before + 3)
        peer.send_frame(FrameType.WINDOW, 1, (1_000_000).to_bytes(4, "big"))
        while (got := peer.hear(FrameType.DATA, FrameType.CLOSE_CONN))[0] == FrameType.DATA:
            said += got[2]
        assert said == bytes(range(250)) * 20
        assert got[2] == b"reset"


def test_an_answer_that_nobody_takes(looks: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for ever: the stream ends with a reset when nothing has been taken for 30 s, here none."""
    monkeypatch.setattr(rtunnel.ClientSession, "unread_wait_s", 0.0)
    with Ends() as ends, PeerServer() as server, Service(answer) as service:
        ends.open_client(server.address, mapping(service.address))
        peer = server.accept(b"version=1\nport=4711\nwindow=1000")
        blocked_answer(peer)
        assert peer.hear(FrameType.CLOSE_CONN)[2] == b"reset"


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often a waiting pump has looked for a reset, which it does all the time here."""
    has_error, count = rtunnel.has_error, 0
    lock = threading.Lock()

    def counted(sock: socket.socket) -> bool:
        nonlocal count
        with lock:
            count += 1
        return has_error(sock)

    monkeypatch.setattr(rtunnel, "has_error", counted)
    monkeypatch.setattr(rtunnel, "WATCH_S", 0.01)
    return lambda: count
