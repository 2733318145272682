"""The heartbeat: a dead peer is found, a live one never looks dead."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from level1 import (
    Ends,
    Peer,
    PeerServer,
    beat,
    connect_small,
    init,
    is_in_a_send,
    mapping,
    new_instance,
    received_at,
    small_control_sockets,
    waiting_pumps,
)
from naive_peer import NaivePeer, frame
from relay import Relay
from support import Service, connect, eventually, read_all, running

import rtunnel
from rtunnel import FrameType

HEARTBEAT_S = 0.2


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
            peer = stack.enter_context(Peer.connect(ends.open_server(heartbeat=HEARTBEAT_S)))
            peer.send_init(init(0, new_instance()))
            assert peer.read_frame()[0] == FrameType.WELCOME
        else:
            server = stack.enter_context(PeerServer())
            ends.open_client(server.address, mapping(("127.0.0.1", 9)), heartbeat=HEARTBEAT_S, reconnect_max=30)
            peer = server.accept()
        yield peer


def test_a_ping_at_the_start_and_every_heartbeat(peer: NaivePeer) -> None:
    """[H-1]: the first frame behind WELCOME is a PING, and more follow, of 8 bytes that are new each time."""
    pings = []
    for _ in range(3):
        kind, stream, payload = peer.read_frame()
        assert (kind, stream, len(payload)) == (FrameType.PING, 0, 8)
        peer.send_frame(FrameType.PONG, 0, payload)
        pings.append(payload)
    assert len(set(pings)) == 3


def test_a_ping_is_answered_with_its_bytes(peer: NaivePeer) -> None:
    """[H-2]: each PING is answered by a PONG with the same 8 bytes, in order."""
    for number in range(10):
        peer.send_frame(FrameType.PING, 0, b"%08d" % number)
    answers = []
    while len(answers) < 10:
        kind, _, payload = peer.read_frame()
        if kind == FrameType.PONG:
            answers.append(payload)
    assert answers == [b"%08d" % number for number in range(10)]


def test_dead_after_three_heartbeats_without_a_byte(ends: Ends, peer: NaivePeer) -> None:
    """[H-4]: a peer of which no byte has come for three heartbeats is dead: the connection ends, and the log says
    why."""
    said = list(rtunnel.Decoder().feed(read_all(peer.sock)))
    assert 2 <= len(said) <= 4
    assert all(isinstance(each, rtunnel.Frame) and each.type == FrameType.PING for each in said)
    closed = ends.log.wait_for("session-closed", level=1)
    assert closed["reason"] == "the peer is dead: no byte for 0.6 s"
    assert "rtt_ms" not in closed


@pytest.mark.parametrize("who", ["control sender", "pump"])
def test_a_silent_peer_that_reads_nothing(ends: Ends, who: str) -> None:
    """[H-4]: the clock does not wait for a send: a peer that reads nothing, and then falls silent, is dead after three
    heartbeats, whoever is in the transport's send."""
    with small_control_sockets(), contextlib.ExitStack() as stack:
        control = ends.open_server(heartbeat=0.3)
        peer = stack.enter_context(Peer(connect_small(control)))
        peer.send_init(init(0, new_instance(), 1 << 30))
        peer.port = int(peer.hear(FrameType.WELCOME)[2].partition(b"port=")[2].partition(b"\n")[0])
        [session] = ends.sessions()
        if who == "pump":
            visitor = stack.enter_context(connect(peer.public))
            stack.enter_context(running(lambda: push(visitor)))  # until the session ends
        while not is_in_a_send(session.writer):
            if who == "control sender":
                peer.sock.sendall(frame(FrameType.PING, 0, b"answer!!") * 500)
        silent = time.monotonic()
        closed = ends.log.wait_for("session-closed", level=1)
        assert closed["reason"] == "the peer is dead: no byte for 0.9 s"
        assert time.monotonic() - silent < 0.9 + 1.0


def push(sock: socket.socket) -> None:
    """Send without end."""
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(bytes(1 << 16))


def test_any_byte_is_a_sign_of_life(ends: Ends) -> None:
    """[H-4]: what counts is that a byte has come, be it a part of a header, and not that a PING is answered."""
    with NaivePeer.connect(ends.open_server(heartbeat=60)) as peer:
        peer.send_init(init(0, new_instance()))
        assert peer.read_frame()[0] == FrameType.WELCOME
        [session] = ends.sessions()
        for byte in frame(0xEE, 0, b"what nobody knows"):
            before = received_at(session)
            peer.send(bytes([byte]))
            eventually(lambda before=before: received_at(session) > before)  # type: ignore[misc]


def test_a_slow_answer(ends: Ends) -> None:
    """[H-1], [H-3]: PINGs go on while others are unanswered, and an answer is welcome however late it comes; but in
    their order, and only once."""
    with NaivePeer.connect(ends.open_server(heartbeat=60)) as peer:
        peer.send_init(init(0, new_instance()))
        assert peer.read_frame()[0] == FrameType.WELCOME
        kind, _, first = peer.read_frame()
        assert kind == FrameType.PING
        [session] = ends.sessions()
        beat(session)
        kind, _, second = peer.read_frame()
        assert (kind, second != first) == (FrameType.PING, True)
        peer.send_frame(FrameType.PONG, 0, first)
        eventually(lambda: session.rtt_s is not None)
        peer.send_frame(FrameType.PONG, 0, second)
        peer.send_frame(FrameType.PING, 0, b"still on")
        peer.expect(FrameType.PONG, 0, b"still on")
        peer.send_frame(FrameType.PONG, 0, first)
        ends.log.wait_for("session-closed", reason="PONG without a PING")


def test_the_oldest_ping_is_forgotten(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[H-3]: so many PINGs may be unanswered, and no more are remembered: the answer to one before them is one to
    none."""
    monkeypatch.setattr(rtunnel, "MAX_PINGS", 2)
    with NaivePeer.connect(ends.open_server(heartbeat=60)) as peer:
        peer.send_init(init(0, new_instance()))
        assert peer.read_frame()[0] == FrameType.WELCOME
        asked = [peer.read_frame()[2]]
        [session] = ends.sessions()
        for _ in range(2):
            beat(session)
            asked.append(peer.read_frame()[2])
        peer.send_frame(FrameType.PONG, 0, asked[0])
        ends.log.wait_for("session-closed", reason="PONG without a PING")


def test_answers_that_stand_behind_bulk(ends: Ends) -> None:
    """[H-1]: while PONGs stand behind bulk, for longer than their sender waits for a sign of life itself, PINGs go on:
    without them it would take this end for dead."""
    with NaivePeer.connect(ends.open_server(heartbeat=0.5)) as peer:
        peer.send_init(init(0, new_instance()))
        assert peer.read_frame()[0] == FrameType.WELCOME
        asked = []
        while len(asked) < rtunnel.HEARTBEATS_TO_DEATH + 2:
            peer.send_frame(0xEE, 0, b"bulk")
            kind, _, payload = peer.read_frame()
            assert kind == FrameType.PING
            asked.append(payload)
        for payload in asked:
            peer.send_frame(FrameType.PONG, 0, payload)
        [session] = ends.sessions()
        eventually(lambda: session.rtt_s is not None)
        assert not session.has_ended()


def test_the_round_trip_in_the_log(ends: Ends) -> None:
    """Both ends tell the last round trip at the end of a session: it is that of the network between them."""
    with Relay(ends.open_server(), one_way_s=0.03) as relay:
        ends.open_client(relay.address, mapping(("127.0.0.1", 9)), reconnect_max=30)
        [session] = eventually(ends.sessions)
        eventually(lambda: session.rtt_s)
        client = ends.client_sessions()[0]
        eventually(lambda: client.rtt_s)
        relay.cut()
        for each in (ends.log.wait_for("session-closed", 1), ends.log.wait_for("session-closed", 2)):
            assert 60 <= float(each["rtt_ms"]) < 5000


@pytest.mark.parametrize("sender", ["server", "client"])
def test_a_transport_that_takes_nothing(ends: Ends, sender: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[H-5]: a transport that takes no byte for WRITE_TIMEOUT_S is dead, while its other direction is alive."""
    monkeypatch.setattr(rtunnel, "WRITE_TIMEOUT_S", 0.3)
    monkeypatch.setattr(rtunnel, "FAREWELL_S", 0.1)

    def pour(sock: socket.socket) -> None:
        while True:
            sock.sendall(bytes(1 << 16))

    with Service(pour) as service, Relay(ends.open_server()) as relay, contextlib.ExitStack() as stack:
        ends.open_client(relay.address, mapping(service.address), reconnect_max=30)
        public = ends.public()
        relay.stall(up=sender == "client", down=sender == "server")
        for _ in range(100):  # windows in all more than the kernel holds for one connection
            visitor = stack.enter_context(connect(public))
            if sender == "server":
                visitor.sendall(bytes(rtunnel.WINDOW_BYTES))
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
        public = ends.open_tunnel(service, heartbeat=0.4)
        sessions = [ends.sessions()[0], ends.client_sessions()[0]]
        for _ in range(3):
            stack.enter_context(running(saturate, lambda: over.append(True)))
        for _ in range(4):
            before = [session.rtt_s for session in sessions]
            eventually(
                lambda before=before: all(  # type: ignore[misc]
                    session.rtt_s != earlier for session, earlier in zip(sessions, before, strict=True)
                )
            )
        over.append(True)
    assert [closed["reason"] for closed in ends.log.events("session-closed")] == []


def test_control_frames_do_not_wait_behind_data(ends: Ends) -> None:
    """[S-10]: to a peer that reads nothing for a while the PONG comes ahead of all DATA that the kernel has not yet
    taken."""

    def pour(sock: socket.socket) -> None:
        while True:
            sock.sendall(bytes(1 << 18))

    with Service(pour) as service, PeerServer() as server:
        ends.open_client(server.address, mapping(service.address))
        peer = server.accept(b"version=1\nport=4711\nwindow=16000000")
        for stream in range(1, 9):
            peer.send_frame(FrameType.NEW_CONN, stream, b"203.0.113.7:51234")
        [session] = ends.client_sessions()
        eventually(lambda: waiting_pumps(session.writer), what="pumps wait for the transport")
        peer.send_frame(FrameType.PING, 0, b"urgent!!")
        before, kind = 0, FrameType.DATA
        while kind != FrameType.PONG:
            kind, _, payload = peer.hear(FrameType.DATA, FrameType.PONG)
            before += len(payload)
        assert before < 16_000_000, "128 MB of DATA may be sent"


def test_a_network_that_goes_silent_before_welcome(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[X-3]: a client that knows its server as one of level 1 does not wait for ever for a WELCOME that was lost; but
    it stays the next time, for that server may be an original now."""
    monkeypatch.setattr(rtunnel, "LIVED_S", 0.2)
    with PeerServer() as server, socket.create_server(("127.0.0.1", 0)) as other:
        ends.open_client(server.address, mapping(("127.0.0.1", 9), 4711))
        welcomed = server.accept()
        ends.log.wait_for("session-opened", level=1)
        monkeypatch.setattr(rtunnel, "dial", lambda *_: connect(other.getsockname()))
        welcomed.sock.close()
        other.settimeout(10)
        with other.accept()[0] as silent:
            assert "no WELCOME" in ends.log.wait_for("session-closed", 2)["reason"]
            with other.accept()[0]:
                ends.log.wait_for("session-opened", level=0)
            silent.close()


def test_each_mapping_may_be_cut_off_from_its_welcome(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[X-3]: where several mappings come back together, none of them takes the silence for an original's."""
    monkeypatch.setattr(rtunnel, "LIVED_S", 0.2)
    with PeerServer() as server, socket.create_server(("127.0.0.1", 0)) as other, contextlib.ExitStack() as stack:
        ends.open_client(server.address, mapping(("127.0.0.1", 9), 4711), mapping(("127.0.0.1", 9), 4712))
        welcomed = [server.accept(), server.accept()]
        ends.log.wait_for("session-opened", 2, level=1)
        monkeypatch.setattr(rtunnel, "dial", lambda *_: connect(other.getsockname()))
        for peer in welcomed:
            peer.sock.close()
        other.settimeout(10)
        for _ in welcomed:
            stack.enter_context(other.accept()[0])
        for number in (3, 4):
            assert "no WELCOME" in ends.log.wait_for("session-closed", number)["reason"]
