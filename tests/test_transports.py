"""What each method of a transport promises: one conformance test, which plain TCP and TLS both pass."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from support import eventually
from tls_peers import House, Task, tcp_pair, within

import rtunnel
import rtunnel_tls

BLOCK = os.urandom(1 << 20)


class Ends(NamedTuple):
    """Two transports that talk to each other, and the sockets below them: of the first, of the second."""

    near: Any
    far: Any
    near_socket: socket.socket
    far_socket: socket.socket


Open = Callable[[], contextlib.AbstractContextManager[Ends]]


@contextlib.contextmanager
def plain() -> Iterator[Ends]:
    with tcp_pair() as (near, far):
        ends = Ends(rtunnel.PlainTransport(near), rtunnel.PlainTransport(far), near, far)
        yield ends
        for end in ends[:2]:
            end.close()


def tls(house: House) -> Open:
    @contextlib.contextmanager
    def over_tls() -> Iterator[Ends]:
        with plain() as ends:
            server = Task(rtunnel_tls.TlsTransport.handshake, ends.far, house.server(), within(10))
            near = rtunnel_tls.TlsTransport.handshake(ends.near, house.client(), within(10))
            far = server.result()
            yield ends._replace(near=near, far=far)

    return over_tls


def take(transport: Any, count: int) -> bytes:
    """So many bytes, or fewer at the end."""
    got = bytearray()
    view = memoryview(bytearray(1 << 16))
    while len(got) < count and (number := transport.receive_into(view[: count - len(got)])):
        got += view[:number]
    return bytes(got)


FAILURES = (OSError, rtunnel_tls.TransportError)


def conforms(open_ends: Open, *, identity: str, is_authenticated: bool, has_timeout: bool) -> None:
    """Each of these is a promise that a session relies on."""
    with open_ends() as ends:
        tells_its_peer(ends, identity, is_authenticated)
        carries_bytes(ends)
        is_duplex(ends)
        flushes(ends)
        finishes(ends)
    with open_ends() as ends:
        wakes_who_waits(ends)
    with open_ends() as ends:
        limits_a_write(ends)
    with open_ends() as ends:
        fails_after_a_reset(ends)
    with open_ends() as ends:
        closes(ends)
        assert hasattr(ends.near, "set_timeout") == has_timeout
    if has_timeout:
        with open_ends() as ends:
            limits_each_wait(ends)


def tells_its_peer(ends: Ends, identity: str, is_authenticated: bool) -> None:
    """`peer` is the other socket's address; `identity` and `receipt` are what the handshake has proven."""
    host, port = ends.near_socket.getpeername()
    assert ends.near.peer == f"{host}:{port}"
    assert ends.far.identity == identity
    assert (ends.far.receipt is not None) == is_authenticated == (ends.near.receipt is not None)
    if is_authenticated:
        assert ends.far.receipt.identity == identity


def carries_bytes(ends: Ends) -> None:
    """`send` takes bytes, bytearrays and memoryviews, all of them; `receive_into` gives at least one byte, and as many
    as there are and fit, in order; nothing is written beyond the buffer."""
    for data in (b"a", bytearray(b"bc"), memoryview(b"defg")[1:]):
        ends.near.send(data)
    assert take(ends.far, 6) == b"abcefg"
    ends.far.send(b"0123456789")
    buffer = bytearray(b"........")
    assert ends.near.receive_into(memoryview(buffer)[2:6]) == 4
    assert bytes(buffer) == b"..0123.."
    assert take(ends.near, 6) == b"456789"
    sender = Task(ends.near.send, BLOCK)  # more than the kernel takes at once
    assert take(ends.far, len(BLOCK)) == BLOCK
    sender.result()


def is_duplex(ends: Ends) -> None:
    """One thread may send while another receives, at both ends, and no direction waits for the other."""
    tasks = [Task(end.send, BLOCK) for end in ends[:2]] + [Task(take, end, len(BLOCK)) for end in ends[:2]]
    outcomes = [task.result() for task in tasks]
    assert outcomes[2:] == [BLOCK, BLOCK]


def flushes(ends: Ends) -> None:
    """A send of nothing sends what the transport has to say, if anything, and no byte of ours; `wants_flush` can be
    set."""
    asked: list[int] = []
    ends.near.wants_flush = lambda: asked.append(1)
    ends.near.send(b"")
    ends.near.send(b"x")
    assert take(ends.far, 1) == b"x"
    assert not asked


def finishes(ends: Ends) -> None:
    """After `finish` the peer gets what was sent before, and then 0, as often as it asks; the other way goes on."""
    ends.near.send(b"last")
    ends.near.finish()
    assert take(ends.far, 5) == b"last"
    assert ends.far.receive_into(memoryview(bytearray(8))) == 0
    ends.far.send(b"reply")
    assert take(ends.near, 5) == b"reply"
    ends.far.finish()
    assert ends.near.receive_into(memoryview(bytearray(8))) == 0


def wakes_who_waits(ends: Ends) -> None:
    """`shutdown`, from any thread, ends a receive and a send that wait; a second one does nothing."""
    outcomes: list[object] = []

    def receive() -> None:
        with contextlib.suppress(*FAILURES):
            outcomes.append(ends.near.receive_into(memoryview(bytearray(8))))

    def send() -> None:
        with contextlib.suppress(*FAILURES):
            while True:
                ends.near.send(BLOCK)

    tasks = [Task(receive), Task(send)]
    eventually(lambda: not select.select([], [ends.near_socket], [], 0)[1], what="the send waits")
    ends.near.shutdown()
    for task in tasks:
        task.result()
    assert outcomes in ([], [0])
    ends.near.shutdown()
    ends.far.shutdown()


def limits_a_write(ends: Ends) -> None:
    """After `limit_write` a `send` of which the peer takes nothing for so long fails; one that moves on does not."""
    ends.near.limit_write(0.25)
    slow = Task(take, ends.far, len(BLOCK))
    ends.near.send(BLOCK)
    assert slow.result() == BLOCK
    begun = time.monotonic()
    with pytest.raises(OSError, match=r"no byte for|timed out"):
        ends.near.send(64 * BLOCK)  # more than both kernels hold
    assert 0.2 < time.monotonic() - begun < 10


def fails_after_a_reset(ends: Ends) -> None:
    """A reset is no clean end: `receive_into` raises, and so does `send`, at the latest once the kernel knows."""
    ends.far_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    ends.far.close()
    with pytest.raises(FAILURES):
        ends.near.receive_into(memoryview(bytearray(8)))

    def fails() -> bool:
        try:
            ends.near.send(b"x")
        except FAILURES:
            return True
        return False

    eventually(fails)


def closes(ends: Ends) -> None:
    """After `close` the descriptor is let go, a late `shutdown` harms nobody, and `send` fails."""
    ends.near.close()
    assert ends.near_socket.fileno() == -1
    ends.near.shutdown()
    ends.near.close()
    with pytest.raises(FAILURES):
        ends.near.send(b"x")


def limits_each_wait(ends: Ends) -> None:
    """`set_timeout`, which only the transport below TLS has: a wait for so long is a TimeoutError; None ends that."""
    ends.near.set_timeout(0.05)
    with pytest.raises(TimeoutError):
        ends.near.receive_into(memoryview(bytearray(8)))
    ends.near.set_timeout(None)
    ends.far.send(b"x")
    assert take(ends.near, 1) == b"x"


@pytest.mark.parametrize("kind", ["plain", "tls"])
def test_a_transport_keeps_its_promises(kind: str, house: House) -> None:
    """Both transports pass the same."""
    if kind == "plain":
        conforms(plain, identity="anonymous", is_authenticated=False, has_timeout=True)
    else:
        conforms(tls(house), identity="client", is_authenticated=True, has_timeout=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the option's number is Linux's")
def test_the_write_limit_of_32_bit_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where time has 64 bits there SO_SNDTIMEO is option 67, which takes two such numbers; all of Linux has it."""
    monkeypatch.setattr(socket, "SO_SNDTIMEO", 67)
    with tcp_pair() as (near, _):
        transport = rtunnel.PlainTransport(near)
        transport.limit_write(0.25)
        with pytest.raises(TimeoutError, match="no byte for"):
            transport.send(64 * BLOCK)
