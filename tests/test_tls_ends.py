"""Over TLS each deliberate end says close_notify: without it the peer must take the end for a truncation."""

from __future__ import annotations

import collections
import contextlib
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Factory
from naive_peer import BLOCKED, GOAWAY, INIT, WELCOME, NaivePeer, frame
from OpenSSL import SSL
from support import Address, connect, free_port
from tls_peers import House, RawSocket, raw_context
from tunnels import text

TIMES = 20  # in a row: where two threads raced for the last word, it was lost in a quarter of the cases


@pytest.fixture
def join(house: House) -> Iterator[Callable[[Address, str], NaivePeer]]:
    """Connects a peer under a second TLS stack; the other end is a server or, for an accepted socket, a client."""
    with contextlib.ExitStack() as stack:
        contexts = {
            role: raw_context(SimpleNamespace(**house.files(role)), house.ca, groups="X25519MLKEM768")  # type: ignore[arg-type]
            for role in ("server", "client")
        }

        def open_peer(other: Address | socket.socket, role: str = "client") -> NaivePeer:
            sock = other if isinstance(other, socket.socket) else connect(other)
            tls = RawSocket(sock, contexts[role], role)
            stack.callback(sock.close)
            return NaivePeer(tls)  # type: ignore[arg-type]

        yield open_peer


def end_of(peer: NaivePeer) -> str:
    """How the connection ends, whatever still comes before."""
    try:
        while peer.sock.recv(1 << 16):
            continue
    except (SSL.Error, OSError) as error:
        return repr(error)
    return "close_notify"


def init(port: int, instance: int = 1) -> bytes:
    """An INIT of level 1."""
    return frame(INIT, 0, f"{port}:h:1\nversion=1\nwindow=65536\ninstance={instance:032x}".encode())


def ends_after(join: Callable[[Address], NaivePeer], server: Address, *words: bytes) -> collections.Counter[str]:
    """How TIMES connections end, one after the other, on which these words are said."""
    ends: collections.Counter[str] = collections.Counter()
    for _ in range(TIMES):
        peer = join(server)
        for word in words:
            peer.send(word)
        ends[end_of(peer)] += 1
        peer.sock.close()
    return ends


ALL = collections.Counter({"close_notify": TIMES})


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("port-denied", [init(80)]),
        ("INIT is", [frame(INIT, 0, b"none")]),
        ("never opened", [init(0), frame(BLOCKED, 9)]),
    ],
)
def test_refusals_and_protocol_errors(
    server: Factory, house: House, join: Callable[[Address], NaivePeer], reason: str, words: list[bytes]
) -> None:
    """A server that refuses, or meets a protocol error, before INIT or in a session."""
    serving = server(*house.flags("server"))
    assert ends_after(join, serving.control_address, *words) == ALL
    told = [line["reason"] for event in ("refused", "session-closed") for line in serving.events(event)]
    assert sum(reason in each or "at level 0" in each for each in told) >= TIMES - 1


def test_a_port_in_use(server: Factory, house: House, join: Callable[[Address], NaivePeer]) -> None:
    """A refusal that comes while another session serves."""
    port = free_port()
    serving = server(*house.flags("server"))
    holder = join(serving.control_address)
    holder.send(init(port))
    serving.wait_for("session-opened")
    assert ends_after(join, serving.control_address, frame(INIT, 0, f"{port}:h:1".encode())) == ALL


def test_a_session_that_is_replaced(server: Factory, house: House, join: Callable[[Address], NaivePeer]) -> None:
    """Each of a row of sessions that the next one replaces gets GOAWAY and close_notify."""
    port = free_port()
    serving = server(*house.flags("server"))
    ends: collections.Counter[str] = collections.Counter()
    old = join(serving.control_address)
    old.send(init(port))
    serving.wait_for("session-opened")
    for _ in range(TIMES):
        new = join(serving.control_address)
        new.send(init(port))
        new.expect(WELCOME, 0, f"version=1\nport={port}\nwindow=65536".encode())
        ends[end_of(old)] += 1
        old.sock.close()
        old = new
    assert ends == ALL


@pytest.mark.parametrize("end", ["expulsion", "stop"])
def test_all_at_once(
    server: Factory, house: House, join: Callable[[Address], NaivePeer], tmp_path: Path, end: str
) -> None:
    """Sessions that a reload forbids, and all those that there are when the server stops."""
    config = tmp_path / "server.ini"
    config.write_text("allow = *=0\n")
    serving = server("-c", str(config), *house.flags("server"))
    peers = []
    for number in range(TIMES):
        peer = join(serving.control_address)
        peer.send(init(0, number + 1))
        peers.append(peer)
    serving.wait_for_count(TIMES, "session-opened")
    config.write_text("allow = nobody=0\n")
    serving.send_signal(signal.SIGHUP if end == "expulsion" else signal.SIGTERM)
    assert collections.Counter(end_of(peer) for peer in peers) == ALL
    if end == "expulsion":
        serving.wait_for_count(TIMES, "expelled")
    else:
        for peer in peers:
            peer.sock.close()
        assert serving.wait() == 0


@pytest.mark.parametrize("end", ["protocol error", "refused"])
def test_the_clients_ends(client: Factory, house: House, join: Callable[..., NaivePeer], end: str) -> None:
    """A client that meets a protocol error, or a refusal, ends its session so, each time that it comes."""
    limits = {"FIRST_RETRY_S": 0.01}
    ends: collections.Counter[str] = collections.Counter()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10.0)
        flags = ("--server", text(listener.getsockname()), "--local", "127.0.0.1:9", "--reconnect-max=0.01")
        client(*house.flags("client"), *flags, limits=limits)
        for _ in range(TIMES):
            peer = join(listener.accept()[0], "server")
            peer.read_frame()
            if end == "refused":
                peer.send_frame(WELCOME, 0, b"error=too-many-clients\nmessage=Later.")
            else:
                peer.send_frame(INIT, 0)
            ends[end_of(peer)] += 1
            peer.sock.close()
    assert ends == ALL


def test_a_client_that_stops(client: Factory, house: House, join: Callable[..., NaivePeer]) -> None:
    """A client's stop says GOAWAY and close_notify on each of its sessions."""
    mappings = [f"--forward={port}:127.0.0.1:9" for port in range(8001, 8021)]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10.0)
        asking = client(*house.flags("client"), "--server", text(listener.getsockname()), *mappings)
        peers = []
        for _ in mappings:
            peer = join(listener.accept()[0], "server")
            peer.read_frame()
            peer.send_frame(WELCOME, 0, b"version=1\nport=8001\nwindow=65536")
            peers.append(peer)
        asking.wait_for_count(len(peers), "session-opened")
        started = time.monotonic()
        asking.send_signal(signal.SIGTERM)
        for peer in peers:
            while (got := peer.read_frame())[0] != GOAWAY:
                continue
            assert got == (GOAWAY, 0, b"stopping")
            assert end_of(peer) == "close_notify"
            peer.sock.close()
        assert asking.wait() == 0
        assert time.monotonic() - started < 3.0
