"""Ends that know level 1 and ends that do not, in all combinations, over plain TCP and over TLS: each carries the
same traffic, and where one end is old the other is at level 0 too."""

from __future__ import annotations

import hashlib
import socket
import threading
from contextlib import ExitStack

import pytest
from conftest import Factory
from support import Service, Sink, connect, echo, ends_with, eventually, read_all, read_exactly, reset, running
from tunnels import BLOCK, Mode, all_streams_closed, closed_port, open_tunnel, text, visit

OLD: dict[str, tuple[str, ...]] = {
    "both new": (),
    "old client": ("client",),
    "old server": ("server",),
    "both old": ("server", "client"),
}


class Talk:
    """A local service: a connection's first letter says what it does."""

    def __init__(self) -> None:
        self.sinks: list[Sink] = []

    def __call__(self, sock: socket.socket) -> None:
        word = read_exactly(sock, 1)
        if word == b"e":
            echo(sock)
        elif word == b"d":  # a download with a clean end
            for _ in range(4):
                sock.sendall(BLOCK)
            sock.shutdown(socket.SHUT_WR)
            read_all(sock)
        elif word == b"r":  # half an answer, then a reset
            sock.sendall(b"half")
            read_exactly(sock, 1)
            reset(sock)
        else:
            self.sinks.append(Sink())
            self.sinks[-1](sock)


@pytest.mark.parametrize("transport", ["plain", "TLS"])
@pytest.mark.parametrize("old", OLD)
def test_each_combination_forwards(
    server: Factory, client: Factory, old: str, transport: str, request: pytest.FixtureRequest
) -> None:
    """[N-1], [N-2]: an end meets one of either level: volume, many at once, clean ends, resets and refusals cross
    the tunnel as what they are; both logs say the level."""
    mode = Mode(old=OLD[old])
    if transport == "TLS":
        house = request.getfixturevalue("house")
        mode = mode._replace(server_flags=house.flags("server"), client_flags=house.flags("client"))
    level = 0 if OLD[old] else 1
    talk = Talk()
    with Service(talk) as service, ExitStack() as stack:
        tunnel = open_tunnel(server, client, service, mode=mode)
        assert tunnel.server.wait_for("session-opened")["level"] == str(level)

        visitors = [stack.enter_context(tunnel.connect()) for _ in range(30)]
        for number, visitor in enumerate(visitors):
            visitor.sendall(b"e" + b"%06d" % number)
        for number, visitor in enumerate(visitors):
            assert read_exactly(visitor, 6) == b"%06d" % number
            visitor.close()

        with tunnel.connect() as visitor:
            visitor.sendall(b"d")
            assert hashlib.sha256(read_all(visitor)).digest() == hashlib.sha256(4 * BLOCK).digest()
        with tunnel.connect() as visitor:
            visitor.sendall(b"s" + 4 * BLOCK)
        eventually(lambda: talk.sinks and talk.sinks[0].end)
        assert (talk.sinks[0].end, talk.sinks[0].received == 4 * BLOCK) == ("eof", True)

        with tunnel.connect() as visitor:
            visitor.sendall(b"r")
            assert read_exactly(visitor, 4) == b"half"
            visitor.sendall(b"x")
            assert ends_with(visitor) == "reset"
        visitor = tunnel.connect()
        visitor.sendall(b"shalf")
        eventually(lambda: talk.sinks[1:] and talk.sinks[1].received == b"half")
        reset(visitor)
        assert talk.sinks[1].ended.wait(10)
        assert talk.sinks[1].end == "reset"

        whole = threading.Event()
        with tunnel.connect() as visitor:  # both directions at once
            visitor.sendall(b"e")

            def read() -> None:
                assert read_exactly(visitor, 2 * len(BLOCK)) == 2 * BLOCK
                whole.set()

            with running(read):
                visitor.sendall(2 * BLOCK)
            assert whole.is_set()
        all_streams_closed(tunnel.server, tunnel.client)
        assert tunnel.client.wait_for("session-opened", level=level)

    with closed_port() as nowhere:
        control = text(tunnel.server.control_address)
        client(*mode.client_flags, "--server", control, "--local", text(nowhere), old="client" in mode.old)
        refusing = tunnel.server.session_address(local=text(nowhere))
        assert visit(refusing, b"hello") == "reset"


@pytest.mark.parametrize("old", ["both new", "old client"])
def test_half_close_by_level(server: Factory, client: Factory, old: str) -> None:
    """[E-2], [T-3]: a half-closed request has its reply at level 1; at level 0, where the first end closes both
    directions, the reply may be lost."""

    def answer(sock: socket.socket) -> None:
        request = read_all(sock)
        sock.sendall(b"reply to " + request)

    with Service(answer) as service:
        tunnel = open_tunnel(server, client, service, mode=Mode(old=OLD[old]))
        with connect(tunnel.public) as visitor:
            visitor.sendall(b"question")
            visitor.shutdown(socket.SHUT_WR)
            got = read_all(visitor)
        assert got in ([b"", b"reply to question"] if OLD[old] else [b"reply to question"])
