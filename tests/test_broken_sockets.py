"""A visitor that resets its connection while DATA for it comes (PROTOCOL.md, section 4).

The write to its socket fails before anybody reads from it: that ends this stream with a reset, soon,
and nothing else.
"""

from __future__ import annotations

import socket

from naive_peer import CLOSE_CONN, EOF, Level1Peer
from support import connect, read_exactly, reset
from tunnels import Factory

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
