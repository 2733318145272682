"""Dialling a host with several addresses (RFC 8305): the first that answers wins, and a failure names them all."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from level1 import Ends, mapping
from support import Address, Service, connect, echo, free_port, read_exactly, running
from tunnels import closed_port, fill, visit

import rtunnel

NAME = "several.example"
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="fills a listen queue, which only Linux tells of")


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., rtunnel.Address]:
    """Makes NAME stand for these addresses, in this order; other names are resolved as ever."""
    getaddrinfo = socket.getaddrinfo

    def set_addresses(*addresses: Any, families: tuple[int, ...] = ()) -> rtunnel.Address:
        rows: list[Any] = []
        for at, address in enumerate(addresses):
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            rows.append((families[at] if families else family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address))
        monkeypatch.setattr(
            socket,
            "getaddrinfo",
            lambda host, *rest, **more: (
                rows if host == NAME and not more.get("flags") else getaddrinfo(host, *rest, **more)
            ),
        )
        return rtunnel.Address(NAME, addresses[0][1])

    return set_addresses


@pytest.fixture
def black_hole() -> Iterator[Address]:
    """An address that swallows packets: a listener whose queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for sock in fill(listener.getsockname()):
            stack.enter_context(sock)
        yield listener.getsockname()


def peer_of(sock: socket.socket) -> Address:
    with sock:
        assert sock.getblocking()
        return sock.getpeername()


def test_the_first_that_answers(resolve: Callable[..., rtunnel.Address]) -> None:
    """Of two that answer the first is taken, and the second one never hears of it."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        address = resolve(first.getsockname(), second.getsockname())
        assert peer_of(rtunnel.dial(address, 5.0)) == first.getsockname()
        second.settimeout(0.1)
        with pytest.raises(TimeoutError):
            second.accept()


@linux_only
def test_an_address_that_swallows_packets(resolve: Callable[..., rtunnel.Address], black_hole: Address) -> None:
    """The next address is tried after 250 ms: a first one that swallows packets costs no more."""
    assert rtunnel.NEXT_ADDRESS_S == 0.25
    with socket.create_server(("127.0.0.1", 0)) as listener:
        started = time.monotonic()
        address = resolve(black_hole, black_hole, listener.getsockname())
        assert peer_of(rtunnel.dial(address, 5.0)) == listener.getsockname()
        assert 0.5 <= time.monotonic() - started < 2.0


@linux_only
def test_an_address_that_answers_late(resolve: Callable[..., rtunnel.Address], black_hole: Address) -> None:
    """An address that has not answered when the next one is tried is still waited for, and may be the first."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as late, contextlib.ExitStack() as stack:
        for sock in fill(late.getsockname()):
            stack.enter_context(sock)
        late.settimeout(0.02)

        def make_room() -> None:
            """The kernel sends a SYN again after a second."""
            done.wait(2 * rtunnel.NEXT_ADDRESS_S)
            while not done.is_set():
                with contextlib.suppress(TimeoutError):
                    late.accept()[0].close()

        with running(make_room, done.set):
            assert peer_of(rtunnel.dial(resolve(late.getsockname(), black_hole), 9.0)) == late.getsockname()


@linux_only
def test_none_answers_in_time(resolve: Callable[..., rtunnel.Address], black_hole: Address) -> None:
    """The time is one for all addresses; the error names each with what it said."""
    with closed_port() as closed:
        address = resolve(black_hole, ("127.0.0.2", closed[1]))
        started = time.monotonic()
        with pytest.raises(OSError, match=r"127\.0\.0\.1: timed out") as caught:
            rtunnel.dial(address, 0.6)
        assert 0.6 <= time.monotonic() - started < 2.0
        assert "127.0.0.2: Connection refused" in str(caught.value)
        assert not isinstance(caught.value, ConnectionRefusedError)


def test_an_address_that_refuses(resolve: Callable[..., rtunnel.Address]) -> None:
    """Where one refuses the next is dialled at once."""
    with socket.create_server(("127.0.0.1", 0)) as listener, closed_port() as closed:
        started = time.monotonic()
        address = resolve(closed, closed, listener.getsockname())
        assert peer_of(rtunnel.dial(address, 5.0)) == listener.getsockname()
        assert time.monotonic() - started < rtunnel.NEXT_ADDRESS_S


def test_all_refuse(resolve: Callable[..., rtunnel.Address]) -> None:
    """Where all refuse the error is a refusal, at once, and names all: the client then waits less (X-3)."""
    with closed_port() as closed:
        address = resolve(("127.0.0.1", closed[1]), ("127.0.0.2", closed[1]))
        started = time.monotonic()
        with pytest.raises(ConnectionRefusedError) as caught:
            rtunnel.dial(address, 5.0)
        assert time.monotonic() - started < 1.0
        assert rtunnel.reason_of(caught.value) == "127.0.0.1: Connection refused; 127.0.0.2: Connection refused"


@pytest.mark.parametrize("code", sorted(rtunnel.NO_ROUTE))
def test_all_to_which_there_is_a_route_refuse(
    resolve: Callable[..., rtunnel.Address], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A host that refuses is about to be there again, also where it has an IPv6 address and we have no IPv6 (X-3)."""
    connect_to = rtunnel.connect

    def no_ipv6(row: Any, seconds: float) -> socket.socket:
        if row[0] == socket.AF_INET6:
            raise OSError(code, os.strerror(code))
        return connect_to(row, seconds)

    monkeypatch.setattr(rtunnel, "connect", no_ipv6)
    with closed_port() as closed:
        with pytest.raises(ConnectionRefusedError, match=f"2001:db8::1: {os.strerror(code)}"):
            rtunnel.dial(resolve(("127.0.0.1", closed[1]), ("2001:db8::1", closed[1], 0, 0)), 5.0)
        with pytest.raises(OSError, match=os.strerror(code)) as caught:
            rtunnel.dial(resolve(("2001:db8::1", closed[1], 0, 0)), 5.0)
        assert not isinstance(caught.value, ConnectionRefusedError)


def test_an_interface_that_comes_back_with_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a link-local address's interface is asked for anew at each dial."""
    numbers, dialled = iter((3, 5)), []

    def resolve(host: str, port: int, *_: object, **__: object) -> list[Any]:
        return [(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("fe80::1", port, 0, next(numbers)))]

    def refuse(row: Any, seconds: float) -> socket.socket:
        dialled.append(row[4][3])
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(rtunnel, "connect", refuse)
    for _ in range(2):
        with pytest.raises(ConnectionRefusedError):
            rtunnel.dial(rtunnel.Address("fe80::1%x", 7000), 1.0)
    assert dialled == [3, 5]


def test_one_address_is_not_named_twice() -> None:
    """Where the host is an address, which stands in the log line anyhow, its error is told as it is."""
    with closed_port() as closed, pytest.raises(ConnectionRefusedError) as caught:
        rtunnel.dial(rtunnel.Address(*closed), 5.0)
    assert rtunnel.reason_of(caught.value) == "Connection refused"


def test_a_host_without_an_address(resolve: Callable[..., rtunnel.Address], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that stands for no address is told as such."""
    ask = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda *asked, **how: ask(*asked, **how) if how.get("flags") else [])
    with pytest.raises(OSError, match=rf"{NAME} has no address"):
        rtunnel.dial(rtunnel.Address(NAME, 1), 5.0)


@pytest.mark.parametrize("what", ["no route", "no such family"])
def test_an_address_that_the_system_cannot_dial(resolve: Callable[..., rtunnel.Address], what: str) -> None:
    """An address without a route, or of a family that the system lacks, fails at once: the next one is dialled, and
    nothing passes for an answer."""
    unknown = 45  # of no system that this runs on
    broken = ("255.255.255.255", 9)
    families = (socket.AF_INET if what == "no route" else unknown, socket.AF_INET)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = resolve(broken, listener.getsockname(), families=families)
        started = time.monotonic()
        assert peer_of(rtunnel.dial(address, 5.0)) == listener.getsockname()
        assert time.monotonic() - started < 0.2
        with pytest.raises(OSError, match=r"255\.255\.255\.255: "):
            rtunnel.dial(resolve(broken, families=families[:1]), 5.0)


def test_families_take_turns(resolve: Callable[..., rtunnel.Address]) -> None:
    """IPv6 and IPv4 are tried by turns, in the resolver's order otherwise: a family that does not work costs one step
    and not one for each of its addresses (RFC 8305, section 4)."""
    with closed_port() as closed:
        four = [(f"127.0.0.{n}", closed[1]) for n in (2, 3)]
        six = [(f"::ffff:127.0.0.{n}", closed[1], 0, 0) for n in (4, 5, 6)]
        with pytest.raises(ConnectionRefusedError) as caught:
            rtunnel.dial(resolve(*six, *four), 5.0)
        tried = [each.split(": ")[0] for each in rtunnel.reason_of(caught.value).split("; ")]
        assert tried == [six[0][0], four[0][0], six[1][0], four[1][0], six[2][0]]


@pytest.mark.skipif(sys.platform == "win32", reason="nobody else gets a bound port there")
@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("0.0.0.0",), ("127.0.0.1", "127.0.0.2")])
def test_a_connection_to_itself(
    resolve: Callable[..., rtunnel.Address], monkeypatch: pytest.MonkeyPatch, hosts: tuple[str, ...]
) -> None:
    """Where nobody listens, and the system gives our end by chance the very port that is dialled, TCP connects it to
    itself: that is a refusal, and the port is free for its service again."""
    here = ("127.0.0.1", free_port())

    def bind_there(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):  # one alone can have it
            sock.bind(here)

    monkeypatch.setattr(rtunnel, "tune", bind_there)
    where = resolve(*((host, here[1]) for host in hosts)) if hosts[1:] else rtunnel.Address(hosts[0], here[1])
    with pytest.raises(ConnectionRefusedError):
        rtunnel.dial(where, 2.0)
    socket.create_server(here).close()


@linux_only
@pytest.mark.parametrize("which", ["server", "local service"])
def test_through_a_tunnel(resolve: Callable[..., rtunnel.Address], black_hole: Address, which: str) -> None:
    """A server, and a local service, whose name stands first for an address that swallows packets are reached."""
    with Service(echo) as service, Ends() as ends:
        control = ends.open_server()
        if which == "server":
            ends.open_client(resolve(black_hole, control), mapping(service.address))
        else:
            ends.open_client(control, mapping(resolve(black_hole, service.address)))
        started = time.monotonic()
        with connect(ends.public()) as visitor:
            visitor.sendall(b"marco")
            assert read_exactly(visitor, 5) == b"marco"
        assert time.monotonic() - started < 3.0


@linux_only
def test_what_the_log_says(resolve: Callable[..., rtunnel.Address], black_hole: Address) -> None:
    """A dial that fails, to the server or to the local service, is logged with the addresses that were tried."""
    with pytest.MonkeyPatch.context() as patch, Ends() as ends, closed_port() as closed:
        patch.setattr(rtunnel, "DIAL_TIMEOUT_S", 0.4)
        both = resolve(black_hole, ("127.0.0.2", closed[1]))
        said = "127.0.0.2: Connection refused; 127.0.0.1: timed out"
        ends.open_client(ends.open_server(), mapping(both))
        assert visit(ends.public()) == "reset"
        assert ends.log.wait_for("dial-failed", reason=said)["local"].startswith(NAME)
        patch.setattr(rtunnel, "CONNECT_TIMEOUT_S", 0.4)
        ends.open_client(both, mapping(closed))
        assert ends.log.wait_for("connect-failed", reason=said)["server"].startswith(NAME)


def test_out_of_descriptors(resolve: Callable[..., rtunnel.Address], monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is out of descriptors is told so, whatever the number of addresses."""

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    address = resolve(("127.0.0.1", 1), ("127.0.0.2", 1))
    monkeypatch.setattr(rtunnel.socket, "socket", fail)
    with pytest.raises(OSError, match="Too many open files"):
        rtunnel.dial(address, 5.0)
