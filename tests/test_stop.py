"""The end: a signal stops either program within 2 s, with status 0, whatever it is doing; nothing is left."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime

import pytest
from conftest import Factory
from level1 import control_address, stop
from naive_peer import NEW_CONN, NaivePeer
from support import (
    EchoCrowd,
    Program,
    Service,
    connect,
    echo_service,
    ends_with,
    eventually,
    read_exactly,
    running,
    threads,
)
from tunnels import MODES, closed_port, fill, open_tunnel, own_sockets, raise_descriptor_limit, text, until_full

import rtunnel

both_signals = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@contextmanager
def stops(program: Program, number: int = signal.SIGTERM) -> Iterator[None]:
    """The block asks the program to stop; then it ends within 2 s, with status 0, and says so at last."""
    program.send_signal(number)
    yield
    assert program.wait() == 0
    times = [line.split()[0] for line in program.lines if " INFO stopp" in line]  # by its own clock: this one may wait
    first, last = (datetime.fromisoformat(told.removesuffix("Z")) for told in (times[0], times[-1]))
    assert (last - first).total_seconds() < 2.0
    assert program.events("stopping", signal=signal.Signals(number).name)
    assert program.records[-1].event == "stopped"
    assert not program.events("internal-error")


def check_reset(visitor: socket.socket) -> None:
    assert ends_with(visitor) == "reset"


@contextmanager
def hanging() -> Iterator[tuple[str, int]]:
    """An address that answers no dial."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        for sock in fill(listener.getsockname()):
            stack.enter_context(sock)
        yield listener.getsockname()


@both_signals
def test_an_idle_server(server: Factory, number: signal.Signals) -> None:
    """A server without a client stops."""
    serving = server("--public-listen", "127.0.0.1:0")
    assert serving.control_address
    with stops(serving, number):
        pass


@pytest.mark.parametrize(("mode", "number"), [("plain", signal.SIGINT), ("polled", signal.SIGTERM)])
def test_both_ends_of_a_busy_tunnel(server: Factory, client: Factory, mode: str, number: signal.Signals) -> None:
    """A client with idle and saturated streams stops; its visitors are reset and its port is closed; then the server
    stops, too."""
    full, block = threading.Event(), bytes(1 << 20)

    def push(sock: socket.socket) -> None:
        if read_exactly(sock, 1) == b"p":
            while True:
                full.set()
                sock.sendall(block)
        sock.recv(1)

    with Service(push) as service, ExitStack() as stack:
        tunnel = open_tunnel(server, client, service, mode=MODES[mode])
        visitors = [stack.enter_context(tunnel.connect()) for _ in range(8)]
        for visitor in visitors:
            visitor.sendall(b"p" if visitor in visitors[:4] else b"i")
        assert full.wait(10)
        with stops(tunnel.client, number):
            # All at the same time: at level 0 one that does not read holds up the others' ends.
            ends = [running(lambda visitor=visitor: check_reset(visitor)) for visitor in visitors]  # type: ignore[misc]
            with ExitStack() as readers:
                for end in ends:
                    readers.enter_context(end)
        tunnel.server.wait_for("lease-closed")
        with pytest.raises(ConnectionRefusedError):
            tunnel.connect()
        with stops(tunnel.server, number):
            pass


@pytest.mark.parametrize("which", ["server", "client"])
def test_1000_streams(server: Factory, client: Factory, which: str) -> None:
    """With 1,000 streams open either end stops, and every visitor is reset."""
    raise_descriptor_limit(8192)
    with EchoCrowd() as service, ExitStack() as stack:
        tunnel = open_tunnel(server, client, service)
        visitors = [stack.enter_context(tunnel.connect()) for _ in range(1000)]
        for visitor in visitors:
            visitor.sendall(b"x")
        for visitor in visitors:
            read_exactly(visitor, 1)
        with stops(getattr(tunnel, which)):
            pass
        for visitor in visitors:
            assert ends_with(visitor) == "reset"


@pytest.mark.parametrize("flags", [(), ("--public-listen", "127.0.0.1:0")])
def test_connections_that_said_nothing(server: Factory, flags: tuple[str, ...]) -> None:
    """With 200 control connections under way that have said nothing, or half a header, the server stops and they
    end."""
    serving = server(*flags, limits={"MAX_STRANGERS": 1000})
    with ExitStack() as stack:
        silent = [stack.enter_context(NaivePeer.connect(serving.control_address)) for _ in range(200)]
        for peer in silent[::2]:
            peer.send(b"\x04\x00\x00")
        if sys.platform == "linux":
            eventually(lambda: serving.threads() >= 200)
        with stops(serving):
            for peer in silent:
                peer.expect_end()


def test_a_client_in_a_wait(client: Factory) -> None:
    """A client that waits before its next attempt stops."""
    with closed_port() as address:
        asking = client("--server", text(address), "--local", "127.0.0.1:1")
        asking.wait_for("connect-failed")
        with stops(asking):
            pass


def test_a_client_that_connects(client: Factory) -> None:
    """A client whose server does not answer the dial stops: the dial is not waited for."""
    with hanging() as address:
        asking = client("--server", text(address), "--local", "127.0.0.1:1")
        asking.wait_for("connecting")
        with stops(asking):
            pass


def test_a_client_that_dials(server: Factory, client: Factory) -> None:
    """A client whose local service does not answer the dial stops; the visitor is reset."""
    with hanging() as address:
        tunnel = open_tunnel(server, client, address)
        with tunnel.connect() as visitor:
            tunnel.client.wait_for("stream-opened")
            with stops(tunnel.client):
                assert ends_with(visitor) == "reset"


def test_a_peer_that_reads_nothing(server: Factory) -> None:
    """A server whose client reads nothing, with a visitor that pushes, stops."""
    serving = server()
    with NaivePeer.connect(serving.control_address) as peer:
        peer.send_init(b"0:127.0.0.1:80")
        with connect(serving.lease_address()) as visitor:
            peer.expect(NEW_CONN, 1)
            until_full(visitor)
            with stops(serving):
                pass


def test_a_stopped_servers_ports_are_free(server: Factory, client: Factory) -> None:
    """When the server has ended, its control port and its public ports can be bound again at once."""
    with echo_service() as service:
        tunnel = open_tunnel(server, client, service)
        tunnel.check_echo()
        addresses = [tunnel.server.control_address, tunnel.public]
        with stops(tunnel.server):
            pass
        tunnel.client.wait_for("session-closed")
        for address in addresses:
            socket.create_server(address).close()


@pytest.mark.parametrize("first", ["server", "client"])
def test_nothing_is_left(monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """A server and a client that are stopped leave no thread, no descriptor and no socket in their process,
    whatever was open, and can be stopped in any order."""
    opened = threading.Event()
    log_event = rtunnel.log_event
    leases: list[str] = []

    def listen(level: int, event: str, /, **pairs: object) -> None:
        if event == "lease-opened":
            leases.append(str(pairs["address"]))
            opened.set()
        log_event(level, event, **pairs)

    monkeypatch.setattr(rtunnel, "log_event", listen)
    rtunnel.CLOCK.start()  # which lives as long as the process
    before = threads()
    sockets = own_sockets() if sys.platform == "linux" else 0
    with echo_service() as service, ExitStack() as stack:
        settings = rtunnel.Settings(control_listen=rtunnel.Address("127.0.0.1", 0), public_bind="127.0.0.1")
        serving = rtunnel.Server(settings, None)
        serving.start()
        control = rtunnel.Address(*control_address(serving))
        where = rtunnel.Mapping(0, rtunnel.Address(*service.address), control)
        asking = rtunnel.Client([where], rtunnel.Settings(), None)
        asking.start()
        assert opened.wait(10)
        host, _, port = leases[0].rpartition(":")
        visitors = [stack.enter_context(connect((host, int(port)))) for _ in range(20)]
        for visitor in visitors:
            visitor.sendall(b"x")
            assert read_exactly(visitor, 1) == b"x"
        for _ in range(5):
            stack.enter_context(connect(control))
        ends = [serving, asking] if first == "server" else [asking, serving]
        for end in ends:
            asked = time.monotonic()
            stop(end)
            assert time.monotonic() - asked < 5
        for visitor in visitors:
            assert ends_with(visitor) == "reset"
    eventually(lambda: not threads() - before)
    if sys.platform == "linux":
        eventually(lambda: own_sockets() == sockets)
