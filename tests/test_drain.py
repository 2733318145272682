"""SIGTERM with `--drain`, GOAWAY, and the restart of a server (OPERATIONS.md, "How it behaves")."""

from __future__ import annotations

import contextlib
import itertools
import signal
import socket
import sys
import time
from typing import Any

import pytest
from level1 import Ends, Peer, PeerServer, mapping
from load import Load, answering
from support import Program, connect, echo_service, ends_with, eventually, free_port, read_exactly
from tunnels import Factory, Tunnel, text, visit

import rtunnel
from rtunnel import FrameType


def check_echo(sock: socket.socket) -> None:
    sock.sendall(b"marco")
    assert read_exactly(sock, 5) == b"marco"


@pytest.mark.parametrize("role", ["server", "client"])
def test_open_streams_finish(server: Factory, client: Factory, role: str) -> None:
    """With `--drain` SIGTERM takes nothing new, lets the open streams finish, and ends as soon as they have."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        tunnel, stopping = drained(server, client, service.address, role, 8.0)
        visitor = stack.enter_context(tunnel.connect())
        check_echo(visitor)
        started = time.monotonic()
        stopping.send_signal(signal.SIGTERM)
        tunnel.server.wait_for("lease-closed")
        assert visit(tunnel.public) == "refused"
        for _ in range(5):
            check_echo(visitor)
        visitor.shutdown(socket.SHUT_WR)
        assert ends_with(visitor) == "eof"
        assert stopping.wait() == 0
        assert time.monotonic() - started < 4.0


# On Windows Ctrl+Break is SIGBREAK. Another signal plays it elsewhere, and gets its name.
BREAK = """
import enum, signal
names = {each.name: each.value for each in signal.Signals}
signal.SIGBREAK = names["SIGBREAK"] = names.pop("SIGUSR2")
signal.Signals = enum.IntEnum("Signals", names)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals to spare")
def test_ctrl_break(server: Factory, client: Factory) -> None:
    """Ctrl+Break, which Windows has in place of SIGTERM, lets the open streams finish too; a second one ends that."""
    with echo_service() as service:
        serving = server("--drain=20", before=BREAK)
        client("--server", text(serving.control_address), "--local", service.text)
        with connect(serving.lease_address()) as visitor:
            check_echo(visitor)
            serving.send_signal(signal.SIGUSR2)
            serving.wait_for("stopping", signal="SIGBREAK")
            check_echo(visitor)
            serving.send_signal(signal.SIGUSR2)
            assert ends_with(visitor) == "reset"
        assert serving.wait() == 0


def drained(
    server: Factory, client: Factory, local: tuple[str, int], role: str, seconds: float
) -> tuple[Tunnel, Program]:
    """A tunnel, and that end of it which has `--drain`."""
    drain = (f"--drain={seconds}",)
    serving = server(*(drain if role == "server" else ()))
    where = ("--server", text(serving.control_address), "--local", text(local), "--reconnect-max=0.2")
    asking = client(*where, *(drain if role == "client" else ()))
    tunnel = Tunnel(serving, asking, serving.lease_address())
    return tunnel, serving if role == "server" else asking


@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]])
def test_the_end_of_the_drain(server: Factory, client: Factory, signals: list[int]) -> None:
    """A stream that does not finish is reset when the seconds are over; SIGINT and a second signal do not wait."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        seconds = 1.0 if signals == [signal.SIGTERM] else 30.0
        tunnel, stopping = drained(server, client, service.address, "server", seconds)
        visitor = stack.enter_context(tunnel.connect())
        check_echo(visitor)
        started = time.monotonic()
        stopping.send_signal(signals[0])
        stopping.wait_for("stopping")
        for number in signals[1:]:
            stopping.send_signal(number)
        assert ends_with(visitor) == "reset"
        assert stopping.wait() == 0
        took = time.monotonic() - started
        assert (1.0 <= took < 3.0) if signals == [signal.SIGTERM] else took < 2.0


def test_nobody_new_while_it_drains(server: Factory, client: Factory) -> None:
    """A client that connects while the server drains is not served: its port would be missed by the next server."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        tunnel, stopping = drained(server, client, service.address, "server", 5.0)
        visitor = stack.enter_context(tunnel.connect())
        check_echo(visitor)
        early = stack.enter_context(connect(tunnel.server.control_address))
        tunnel.server.wait_for("session-opened")

        def is_accepted() -> bool:
            stopping.send_signal(signal.SIGUSR1)
            return stopping.wait_for("state")["strangers"] == f"1/{rtunnel.MAX_STRANGERS}"

        eventually(is_accepted)
        stopping.send_signal(signal.SIGTERM)
        stopping.wait_for("lease-closed")
        reply = b""
        with contextlib.suppress(ConnectionError):  # closed already, where its thread came too late to be told
            early.sendall(rtunnel.encode(FrameType.INIT, 0, rtunnel.Init(0, "x:1", "ab" * 16, 1).payload()))
            reply = early.recv(1000)
        assert not reply or b"shutting-down" in reply
        assert len(tunnel.server.events("lease-opened")) == 1
        visitor.close()
        assert stopping.wait() == 0


def test_a_client_that_drains_dials_no_more(server: Factory, client: Factory) -> None:
    """A session that ends while its client drains has no successor: it would only be a stranger to the server."""
    with echo_service() as service:
        staying, leaving = server(), server()
        where = (f"--server={text(each.control_address)}" for each in (staying, leaving))
        asking = client(*where, f"--local={service.text}", "--reconnect-max=0.1", "--drain=30", "--log-level=debug")
        leaving.lease_address()
        with connect(staying.lease_address()) as visitor:
            check_echo(visitor)
            asking.send_signal(signal.SIGTERM)
            asking.wait_for("stopping")
            dialled = len(asking.events("connecting"))
            assert leaving.stop() == 0
            for _ in range(10):
                check_echo(visitor)
                time.sleep(0.1)  # ten times as long as a mapping waits before it dials
            assert len(asking.events("connecting")) == dialled
        assert asking.wait() == 0


def test_a_client_between_two_servers(server: Factory, client: Factory) -> None:
    """A client that gets GOAWAY keeps its streams and connects anew at once: to the next server on the same port,
    which serves its visitors while the old one lets the old streams finish."""
    control, public = free_port(), free_port()
    flags = (f"--control-listen=127.0.0.1:{control}", "--drain=10")
    with echo_service() as service, contextlib.ExitStack() as stack:
        old = server(*flags)
        old.wait_for("listening")
        asking = client(f"--server=127.0.0.1:{control}", f"--forward={public}:{service.text}", "--reconnect-max=0.2")
        old.wait_for("session-opened")
        before = stack.enter_context(connect(("127.0.0.1", public)))
        check_echo(before)
        old.send_signal(signal.SIGTERM)
        old.wait_for("lease-closed")
        new = server(*flags)
        new.wait_for("session-opened")
        after = stack.enter_context(connect(("127.0.0.1", public)))
        check_echo(after)
        check_echo(before)
        before.close()
        assert old.wait() == 0
        check_echo(after)
        asking.wait_for("session-closed")
        assert len(asking.events("session-opened")) == 2


def test_nothing_opens_behind_goaway() -> None:
    """[G-1]: a visitor who has chosen a session in the moment of its GOAWAY goes to another: NEW_CONN never follows."""
    with Ends() as ends, Peer.as_client(ends.open_server()) as peer:
        [session] = ends.sessions()
        session.retire("for the test")
        assert peer.hear(FrameType.GOAWAY)[2] == b"for the test"
        near, far = socket.socketpair()
        with near, far, pytest.raises(rtunnel.SessionEnded):
            session.open_stream(near, rtunnel.Address("203.0.113.7", 51234))


def test_nothing_opens_in_a_session_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """[S-1]: a visitor who meets a session in the moment of its end is announced to nobody."""
    with Ends() as ends, Peer.as_client(ends.open_server()) as peer:
        [session] = ends.sessions()
        close = session.writer.close

        def meet(*arguments: Any) -> None:
            near, far = socket.socketpair()
            with near, far, pytest.raises(rtunnel.SessionEnded):
                session.open_stream(near, rtunnel.Address("203.0.113.7", 51234))
            close(*arguments)

        monkeypatch.setattr(session.writer, "close", meet)
        session.stop("for the test")
        assert peer.hear(FrameType.GOAWAY, FrameType.NEW_CONN)[0] == FrameType.GOAWAY


def test_a_client_that_is_welcomed_while_it_drains() -> None:
    """[G-3]: a session that opens in the drain says GOAWAY at once: no visitor comes who would be reset."""
    with Ends() as ends, PeerServer() as server:
        client = ends.open_client(server.address, mapping(("127.0.0.1", 9)))
        peer = server.accept(b"")
        client.retire_all()
        peer.send_frame(FrameType.WELCOME, 0, b"version=1\nport=8080\nwindow=65536")
        assert peer.hear(FrameType.GOAWAY)[2] == b"stopping"


def test_no_new_streams_at_level_0_in_a_drain() -> None:
    """At level 0 there is no GOAWAY: who comes while the client drains is reset at once, not at its end."""
    with Ends() as ends, PeerServer() as server, echo_service() as service:
        client = ends.open_client(server.address, mapping(service.address))
        peer = server.accept(b"")
        peer.send_frame(FrameType.NEW_CONN, 1)
        peer.send_frame(FrameType.DATA, 1, b"marco")
        assert peer.hear(FrameType.DATA)[2] == b"marco"
        client.retire_all()
        peer.send_frame(FrameType.NEW_CONN, 2)
        assert peer.hear(FrameType.CLOSE_CONN) == (FrameType.CLOSE_CONN, 2, b"stopping")
        peer.send_frame(FrameType.DATA, 1, b"polo!")
        assert peer.hear(FrameType.DATA)[2] == b"polo!"


def test_a_second_goaway() -> None:
    """GOAWAY counts once: a client does not connect twice for two of them."""
    with PeerServer() as server, Ends() as ends:
        client = ends.open_client(server.address, mapping(("127.0.0.1", 1), 8080))
        first = server.accept()
        for reason in (b"stopping", b"stopping", b"stopping"):
            first.send_frame(FrameType.GOAWAY, 0, reason)
        server.accept()
        first.send_frame(FrameType.PING, 0, b"12345678")
        first.hear(FrameType.PONG)
        assert len(client.sessions()) == 2


def test_goaway_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that can start no thread when it connects anew after GOAWAY tries again until it can; the session that
    was sent away goes on."""
    failures = [rtunnel.NoThread("can't start new thread")]

    with PeerServer() as server, Ends() as ends:
        client = ends.open_client(server.address, mapping(("127.0.0.1", 1), 8080))
        first = server.accept()
        ends.log.wait_for("session-opened")
        run = client.pool.run

        def fail_once(task: rtunnel.Task) -> None:
            if failures:
                raise failures.pop()
            run(task)

        monkeypatch.setattr(client.pool, "run", fail_once)
        first.send_frame(FrameType.GOAWAY, 0, b"stopping")
        with pytest.raises(EOFError):  # it is closed before its INIT
            server.accept()
        server.accept()
        assert "can't start" in ends.log.wait_for("connect-failed")["reason"]
        first.send_frame(FrameType.PING, 0, b"12345678")
        first.hear(FrameType.PONG)


def test_a_server_that_sends_its_clients_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G-1]: a server that says GOAWAY again and again gets one connection a second, and no more sessions of a client
    than it may hold beside the new one: the next one ends, and is connected anew."""
    monkeypatch.setattr(rtunnel, "FIRST_RETRY_S", 0.3)
    monkeypatch.setattr(rtunnel, "MAX_RETIRED", 2)
    with PeerServer() as server, Ends() as ends:
        ends.open_client(server.address, mapping(("127.0.0.1", 1)))
        times = []
        for _ in range(3):
            server.accept().send_frame(FrameType.GOAWAY, 0, b"stopping")
            times.append(time.monotonic())
        assert min(later - earlier for earlier, later in itertools.pairwise(times)) > 0.2
        assert "GOAWAY again" in ends.log.wait_for("session-closed")["reason"]
        server.accept()
        eventually(lambda: len(ends.client_sessions()) == 3)


def test_a_restart_under_load(server: Factory, client: Factory) -> None:
    """Drained and started anew, again and again under load, a server loses no request of visitors that try again where
    the connection failed or was reset before the first byte."""
    control, public = free_port(), free_port()
    flags = (f"--control-listen=127.0.0.1:{control}", "--drain=10")
    with answering() as (service, answers):
        serving = server(*flags)
        serving.wait_for("listening")
        client(f"--server=127.0.0.1:{control}", f"--forward={public}:{service.text}", "--reconnect-max=0.2")
        serving.wait_for("session-opened")
        with Load(("127.0.0.1", public), 8, patient=True) as load:
            for _ in range(2):
                load.wait_for(100)
                assert serving.stop(signal.SIGTERM) == 0
                serving = server(*flags)
                serving.wait_for("session-opened")
            load.wait_for(100)
    assert not load.failed
    assert not load.wrong + answers.wrong
    assert load.retried
