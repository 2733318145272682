"""The heartbeat: a dead peer is found, a live one never looks dead."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from level1 import Ends, Peer, PeerServer, mapping, new_instance
from naive_peer import NaivePeer
from relay import Relay
from support import Service, connect, eventually, running

import rtunnel
from rtunnel import FrameType

HEARTBEAT_S = 0.1


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ends in this process, stopped after the test."""
    with Ends() as made:
        yield made


@pytest.fixture(params=["server", "client"])
def peer(request: pytest.FixtureRequest, ends: Ends) -> Iterator[NaivePeer]:
    """The peer of a real server, or of a real client, with a short heartbeat; WELCOME has been said."""
    with contextlib.ExitStack() as stack:
        if request.param == "server":
            peer = stack.enter_context(Peer.connect(ends.open_server(heartbeat_s=HEARTBEAT_S)))
            peer.send_init(f"0:127.0.0.1:80\nversion=1\nwindow=65536\ninstance={new_instance()}".encode())
            assert peer.read_frame()[0] == FrameType.WELCOME
        else:
            server = stack.enter_context(PeerServer())
            ends.open_client(server.address, mapping(("127.0.0.1", 9)), heartbeat_s=HEARTBEAT_S, reconnect_max_s=30)
            peer = server.accept()
        yield peer


def test_a_ping_at_the_start_and_every_heartbeat(peer: NaivePeer) -> None:
    """The first frame behind WELCOME is a PING, and more follow, of 8 bytes that are new each time."""
    pings = []
    for _ in range(5):
        kind, stream, payload = peer.read_frame()
        assert (kind, stream, len(payload)) == (FrameType.PING, 0, 8)
        peer.send_frame(FrameType.PONG, 0, payload)
        pings.append(payload)
    assert len(set(pings)) == 5


def test_a_ping_is_answered_with_its_bytes(peer: NaivePeer) -> None:
    """Each PING is answered by a PONG with the same 8 bytes, in order."""
    for number in range(10):
        peer.send_frame(FrameType.PING, 0, b"%08d" % number)
    answers = []
    while len(answers) < 10:
        kind, _, payload = peer.read_frame()
        if kind == FrameType.PONG:
            answers.append(payload)
    assert answers == [b"%08d" % number for number in range(10)]


def test_dead_after_three_heartbeats_without_a_byte(ends: Ends, peer: NaivePeer) -> None:
    """A peer of which no byte has come for three heartbeats is dead: the connection ends, and the log says why."""
    pings = 0
    with contextlib.suppress(EOFError):
        while True:
            kind, _, _ = peer.read_frame()
            pings += kind == FrameType.PING
    assert pings <= 4, "at the start and at one, two and three heartbeats"
    closed = ends.log.wait_for("session-closed", level=1)
    assert closed["reason"] == "the peer is dead: no byte for 0.3 s"
    assert "rtt_ms" not in closed


def test_any_byte_is_a_sign_of_life(ends: Ends, peer: NaivePeer) -> None:
    """Whoever answers no PING but sends something, be it parts of a frame that nobody knows, is alive."""
    unknown = b"\xee" + (0).to_bytes(4, "big") + (4000).to_bytes(4, "big") + bytes(4000)
    sent, pings = 0, 0
    while pings < 8:
        pings += peer.read_frame()[0] == FrameType.PING
        peer.send(unknown[sent : sent + 100])
        sent += 100
    assert not ends.log.events("session-closed")


def test_a_late_pong(ends: Ends, peer: NaivePeer) -> None:
    """The answer to each of the last 4 PINGs is welcome; to an older one it is a protocol error."""
    pings = []
    while len(pings) < 5:
        kind, _, payload = peer.read_frame()
        if kind == FrameType.PING:
            pings.append(payload)
            peer.send_frame(FrameType.WINDOW if False else 0xEE, 0)  # alive
    for payload in pings[4:0:-1]:
        peer.send_frame(FrameType.PONG, 0, payload)
    peer.send_frame(FrameType.PING, 0, b"still on")
    while peer.read_frame()[:3] != (FrameType.PONG, 0, b"still on"):
        pass
    peer.send_frame(FrameType.PONG, 0, pings[0])
    ends.log.wait_for("session-closed", reason="PONG without a PING")


def test_the_round_trip_in_the_log(ends: Ends) -> None:
    """Both ends tell the last round trip at the end of a session: it is that of the network between them."""
    with Relay(ends.open_server(), one_way_s=0.03) as relay:
        ends.open_client(relay.address, mapping(("127.0.0.1", 9)), reconnect_max_s=30)
        [session] = eventually(ends.sessions)
        eventually(lambda: session.rtt_s)
        client = ends.client_sessions()[0]
        eventually(lambda: client.rtt_s)
        relay.cut()
        for each in (ends.log.wait_for("session-closed", 1), ends.log.wait_for("session-closed", 2)):
            assert 60 <= float(each["rtt_ms"]) < 5000


@pytest.mark.parametrize("sender", ["server", "client"])
def test_a_transport_that_takes_nothing(ends: Ends, sender: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transport that takes no byte for WRITE_TIMEOUT_S is dead, while its other direction is alive."""
    monkeypatch.setattr(rtunnel, "WRITE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(rtunnel, "FAREWELL_S", 0.1)

    def pour(sock: socket.socket) -> None:
        while True:
            sock.sendall(bytes(1 << 16))

    with Service(pour) as service, Relay(ends.open_server()) as relay, contextlib.ExitStack() as stack:
        ends.open_client(relay.address, mapping(service.address), reconnect_max_s=30)
        public = ends.public()
        relay.stall(up=sender == "client", down=sender == "server")
        for _ in range(100):  # windows in all more than the kernel holds for one connection
            visitor = stack.enter_context(connect(public))
            if sender == "server":
                visitor.sendall(bytes(rtunnel.WINDOW_BYTES))
            elif len(ends.log.events("stream-opened")) < 2:
                pass
        ends.log.wait_for("session-closed", reason="the peer took no byte for 0.3 s")


def test_a_busy_link_never_looks_dead(ends: Ends) -> None:
    """Streams that saturate the link both ways for longer than it takes to be dead: PONGs come through all the time,
    and the session lives."""

    def echo(sock: socket.socket) -> None:
        while part := sock.recv(1 << 18):
            sock.sendall(part)

    def saturate() -> None:
        with connect(public) as visitor:

            def send() -> None:
                with contextlib.suppress(OSError):
                    while not over:
                        visitor.sendall(bytes(1 << 18))
                    visitor.shutdown(socket.SHUT_WR)

            with running(send):
                while visitor.recv(1 << 18):
                    pass

    over: list[bool] = []
    with Service(echo) as service, contextlib.ExitStack() as stack:
        public = ends.open_tunnel(service, heartbeat_s=0.4)
        sessions = [ends.sessions()[0], ends.client_sessions()[0]]
        for _ in range(3):
            stack.enter_context(running(saturate, lambda: over.append(True)))
        for _ in range(5):
            before = [session.rtt_s for session in sessions]
            eventually(
                lambda before=before: all(  # type: ignore[misc]
                    session.rtt_s != earlier for session, earlier in zip(sessions, before, strict=True)
                )
            )
        over.append(True)
    assert [closed["reason"] for closed in ends.log.events("session-closed")] == []


def test_control_frames_do_not_wait_behind_data(ends: Ends) -> None:
    """To a peer that reads nothing for a while the PONG comes ahead of all DATA that the kernel has not yet taken."""

    def pour(sock: socket.socket) -> None:
        while True:
            sock.sendall(bytes(1 << 18))

    with Service(pour) as service, PeerServer() as server:
        ends.open_client(server.address, mapping(service.address))
        peer = server.accept(b"version=1\nport=4711\nwindow=16000000")
        for stream in range(1, 9):
            peer.send_frame(FrameType.NEW_CONN, stream, b"203.0.113.7:51234")
        [session] = ends.client_sessions()
        eventually(lambda: len(session.writer._waiting) >= 7, what="all pumps wait for the transport")
        peer.send_frame(FrameType.PING, 0, b"urgent!!")
        before, taken = None, 0
        while before is None:
            kind, _, payload = peer.hear(FrameType.DATA, FrameType.PONG)
            taken += len(payload)
            if kind == FrameType.PONG:
                before = taken
        assert before < 16_000_000, "of 8 x 16 MB that might have gone ahead"
        over = peer.sock
        over.shutdown(socket.SHUT_RDWR)
