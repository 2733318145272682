"""The defects of the original, by their numbers: none of them is in this program."""

from __future__ import annotations

import signal
import socket
import threading
import time
from contextlib import ExitStack

import pytest
from conftest import Factory
from level1 import control_address, leases, stop
from naive_peer import CLOSE_CONN, DATA, INIT, NEW_CONN, NaivePeer, frame
from support import Service, connect, echo_service, ends_with, eventually, free_port, read_exactly
from tunnels import fill, open_tunnel, text

import rtunnel

CONTROL_HEADER_BYTES = 9


def test_defect_01_bytes_never_reach_the_wrong_visitor(server: Factory, client: Factory) -> None:
    """What a local connection of an earlier session still says reaches nobody, and that connection is reset:
    ids start at 1 again, but the new stream 1 is another."""
    control = f"127.0.0.1:{free_port()}"
    first = server("--control-listen", control)
    assert first.control_address
    served: list[socket.socket] = []
    go_on = threading.Event()

    def greet(sock: socket.socket) -> None:
        served.append(sock)
        sock.sendall(b"visitor %d" % len(served))
        go_on.wait(10)

    with Service(greet) as service:
        asking = client("--server", control, "--local", service.text, limits={"FIRST_RETRY_S": 0.05})
        with connect(first.lease_address()) as visitor:
            assert read_exactly(visitor, 9) == b"visitor 1"
            first.kill()
            assert ends_with(visitor) == "reset"
        second = server("--control-listen", control)
        with connect(second.lease_address()) as visitor:
            assert read_exactly(visitor, 9) == b"visitor 2"
            assert second.wait_for("stream-opened")["stream"] == "1"
            old, new = served
            try:
                for _ in range(100):
                    old.sendall(b"for visitor 1 alone")
                how = "open"
            except ConnectionError:
                how = "reset"
            new.sendall(b"for visitor 2")
            assert read_exactly(visitor, 13) == b"for visitor 2"
            assert how == "reset"
            go_on.set()
        asking.wait_for_count(2, "session-opened")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_defect_06_the_server_ends_with_a_client_connected(
    server: Factory, client: Factory, number: signal.Signals
) -> None:
    """With a client connected and a visitor served, a signal ends the server within 2 s, with status 0."""
    with echo_service() as service:
        tunnel = open_tunnel(server, client, service)
        with tunnel.connect() as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            asked = time.monotonic()
            assert tunnel.server.stop(number) == 0
            assert time.monotonic() - asked < 2.0
            assert ends_with(visitor) == "reset"


def test_defect_07_a_closed_listener_is_not_logged_for_ever(server: Factory, client: Factory) -> None:
    """After a client has left, its public port is a line of the log once, and costs no processor time."""
    with echo_service() as service:
        left = open_tunnel(server, client, service, LEASE_LINGER_S=0.05)
        left.client.kill()
        left.server.wait_for("lease-closed")
        left.server.wait_for("session-closed")
        used, lines = left.server.cpu_seconds(), len(left.server.lines)
        threading.Event().wait(0.5)  # a time in which nothing must happen
        assert left.server.lines[lines:] == []
        assert left.server.cpu_seconds() - used <= 0.05
        with pytest.raises(ConnectionRefusedError):
            left.connect()
        open_tunnel(lambda *_, **__: left.server, client, service).check_echo()
        address = text(left.public)
        assert sum(address in line for line in left.server.lines) == 2  # lease-opened, lease-closed


def test_defect_08_port_0_is_a_port_of_the_servers_choice(server: Factory, client: Factory) -> None:
    """A client that asks for port 0 gets a free port also where there is no global one, and both logs say which."""
    with echo_service() as service:
        serving = server()
        control = text(serving.control_address)
        asking = client("--server", control, "--local", service.text, "--remote-port", "0")
        public = serving.lease_address()
        assert public[1] != 0
        with connect(public) as visitor:
            visitor.sendall(b"hello")
            assert read_exactly(visitor, 5) == b"hello"
        assert asking.wait_for("session-opened")["public"] == text(public)


def test_defect_09_visitors_of_the_global_port_are_shared_fairly(server: Factory) -> None:
    """The global port's visitors go to its clients in turn while all have as many streams, never at random."""
    serving = server("--public-listen", "127.0.0.1:0")
    with ExitStack() as stack:
        clients = []
        for _ in range(2):
            clients.append(stack.enter_context(NaivePeer.connect(serving.control_address)))
            clients[-1].send_init(b"0:127.0.0.1:80")
            serving.wait_for("session-opened")
        for stream in range(1, 9):
            for each in clients:
                stack.enter_context(connect(serving.public_address))
                each.expect(NEW_CONN, stream)


def test_defect_10_an_answer_at_once_finds_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream is stored before its NEW_CONN is sent: bytes that come back while the send has not even returned
    reach the visitor."""
    dispatched = threading.Event()

    class Transport(rtunnel.PlainTransport):
        """Its send returns only when the answer to what it sent has been dispatched."""

        def send(self, frames: bytes | bytearray | memoryview) -> None:
            super().send(frames)
            if bytes(frames[:1]) == bytes([NEW_CONN]):
                assert dispatched.wait(10)

        def receive_into(self, buffer: memoryview) -> int:
            if bytes(buffer[:1]) == bytes([DATA]):
                dispatched.set()  # it comes back for more
            return super().receive_into(buffer)

    monkeypatch.setattr(rtunnel, "PlainTransport", Transport)
    loopback = rtunnel.Address("127.0.0.1", 0)
    serving = rtunnel.Server(rtunnel.Settings(control_listen=loopback, public_listen=loopback), None)
    try:
        serving.start()
        (lease,) = leases(serving)
        public, control = lease.address, control_address(serving)
        with NaivePeer.connect(control) as peer:
            peer.send_init(b"0:127.0.0.1:25")
            eventually(lambda: lease.sessions)
            with connect(public) as visitor:
                peer.expect(NEW_CONN, 1)
                peer.send_frame(DATA, 1, b"220 ready")
                assert read_exactly(visitor, 9) == b"220 ready"
    finally:
        dispatched.set()
        stop(serving)


def test_defect_10_banners_arrive_whole(server: Factory, client: Factory) -> None:
    """The banner of a local service that speaks first reaches each of 100 visitors."""
    with Service(lambda sock: sock.sendall(b"220 ready\r\n")) as service:
        tunnel = open_tunnel(server, client, service)
        for _ in range(100):
            with tunnel.connect() as visitor:
                assert read_exactly(visitor, 11) == b"220 ready\r\n"


def test_defect_11_dialling_holds_up_nobody(server: Factory, client: Factory) -> None:
    """While the local service does not answer the dial of one stream, another stream of the session goes on."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        tunnel = open_tunnel(server, client, listener.getsockname())
        visitor = stack.enter_context(tunnel.connect())
        listener.settimeout(10)
        local = stack.enter_context(listener.accept()[0])
        for sock in fill(listener.getsockname()):
            stack.enter_context(sock)
        stack.enter_context(tunnel.connect())
        tunnel.client.wait_for("stream-opened", stream=2)
        asked = time.monotonic()
        for _ in range(20):
            visitor.sendall(b"ping")
            assert read_exactly(local, 4) == b"ping"
            local.sendall(b"pong")
            assert read_exactly(visitor, 4) == b"pong"
        assert time.monotonic() - asked < 2.0, "it waited for the dial, which may take 5 s"
        assert not tunnel.client.events("dial-failed")


def test_defect_13_a_port_that_cannot_be_bound(server: Factory, client: Factory) -> None:
    """Where the port that a client asks for is taken, the server's log says why and closes the control connection:
    the client knows that nothing is mapped, and tries again."""
    with echo_service() as service:
        serving = server()
        flags = ("--server", text(serving.control_address), "--local", service.text)
        asking = client(*flags, "--remote-port", str(service.port), limits={"FIRST_RETRY_S": 0.05})
        failed = serving.wait_for("lease-failed", port=service.port)
        assert "in use" in failed["reason"]
        assert "port-in-use" in asking.wait_for("session-closed")["reason"]
        serving.wait_for("lease-failed", port=service.port)
        assert not serving.events("lease-opened")


@pytest.mark.parametrize("kind", [DATA, INIT, CLOSE_CONN, 0x7F])
def test_defect_13_an_announced_length_allocates_nothing(server: Factory, kind: int) -> None:
    """A header that announces 4 GiB costs its sender the connection and the server nothing."""
    serving = server()
    assert serving.control_address
    before = serving.memory_bytes()
    with NaivePeer.connect(serving.control_address) as peer:
        peer.send(frame(kind, 1)[: CONTROL_HEADER_BYTES - 4] + b"\xff" * 4)
        peer.expect_end()
    assert "4294967295" in serving.wait_for("refused")["reason"]
    assert serving.memory_bytes() - before < 4 << 20
