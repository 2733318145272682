"""A whole tunnel for a test: a server, a client, and where its visitors go."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from support import Address, Program, Service, connect, ends_with, eventually, read_exactly, running

Factory = Callable[..., Program]


class Mode(NamedTuple):
    """What a tunnel runs on: more flags for each end, constants that are replaced, the ends that know level 0 only."""

    server_flags: tuple[str, ...] = ()
    client_flags: tuple[str, ...] = ()
    limits: Mapping[str, Any] = {}
    old: tuple[str, ...] = ()


# "polled" is the path of systems without MSG_DONTWAIT: non-blocking sockets, each wait is a poll.
MODES = {"plain": Mode(), "polled": Mode(limits={"DONT_WAIT": None}), "level 0": Mode(old=("client",))}


class Tunnel(NamedTuple):
    """A server, a client with one mapping, and the mapping's public address."""

    server: Program
    client: Program
    public: Address

    def connect(self) -> socket.socket:
        """A visitor."""
        return connect(self.public)

    def check_echo(self, word: bytes = b"marco") -> None:
        """A visitor of an echo service gets its word back."""
        with self.connect() as visitor:
            visitor.sendall(word)
            assert read_exactly(visitor, len(word)) == word


def text(address: Address) -> str:
    """An address as flags have it."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_tunnel(
    server: Factory,
    client: Factory,
    local: Service | Address,
    *,
    mode: Mode = MODES["plain"],
    flags: Sequence[str] = (),
    **limits: Any,
) -> Tunnel:
    """A tunnel to a local service that is ready for visitors. `flags` are the server's, `limits` both ends'."""
    replaced = {**mode.limits, **limits}
    serving = server(*mode.server_flags, *flags, limits=replaced, old="server" in mode.old)
    address = local.address if isinstance(local, Service) else local
    control = text(serving.control_address)
    asking = client(
        *mode.client_flags, "--server", control, "--local", text(address), limits=replaced, old="client" in mode.old
    )
    if "--public-listen" in flags:
        serving.wait_for("session-opened")
        return Tunnel(serving, asking, serving.public_address)
    return Tunnel(serving, asking, serving.lease_address())


def visit(address: Address, said: bytes = b"") -> str:
    """How a visitor fares that says something and waits for the end: "eof", "reset", however early, or "refused"."""
    try:
        with connect(address) as visitor:
            visitor.sendall(said)
            return ends_with(visitor)
    except (ConnectionResetError, ConnectionAbortedError, BrokenPipeError):
        return "reset"
    except ConnectionRefusedError:
        return "refused"


def http_proxy(target: Address | None = None) -> Service:
    """An HTTP proxy, whose CONNECT leads to where it says, or always to `target`."""

    def lead(sock: socket.socket) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += read_exactly(sock, 1)
        host, _, port = request.split()[1].decode().rpartition(":")
        with connect(target or (host.strip("[]"), int(port)), 60) as far:
            sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            with running(functools.partial(_copy, far, sock)):
                _copy(sock, far)

    return Service(lead)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
    for each in (source, target):
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def tcp_pair(receive_buffer: int = 0) -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection over loopback; the second with a small receive buffer, where one is given."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if receive_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        listener.listen()
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.settimeout(10.0)
    return near, far


@contextlib.contextmanager
def closed_port() -> Iterator[Address]:
    """An address that refuses connections, and that nobody else gets meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, never listening
        yield holder.getsockname()


BLOCK = os.urandom(1 << 20)


def until_full(sock: socket.socket) -> int:
    """Send blocks until nothing is taken for a quarter of a second; how many bytes were taken."""
    sock.settimeout(0.25)
    sent = 0
    try:
        while sent < 64 * len(BLOCK):
            sent += sock.send(BLOCK[sent % len(BLOCK) :])
    except TimeoutError:
        return sent
    raise AssertionError("there is no back-pressure")


def fill(address: Address) -> list[socket.socket]:
    """Connect until the listener's queue is full: who dials it now waits. The caller closes what is returned."""
    taken: list[socket.socket] = []
    for _ in range(16):
        sock = socket.socket()
        taken.append(sock)
        sock.settimeout(0.2)
        try:
            sock.connect(address)
        except TimeoutError:
            return taken
    raise AssertionError("this system takes more connections than its listener asked for")


def raise_descriptor_limit(wanted: int) -> None:
    """This process may open so many descriptors, where its hard limit allows it."""
    with contextlib.suppress(ImportError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))


def own_sockets() -> int:
    """How many sockets this process has open now. Linux only."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return count


def stream_counts(client: Program) -> tuple[int, int]:
    """How many streams a program has opened and closed so far, by its debug log."""
    return len(client.events("stream-opened")), len(client.events("stream-closed"))


def all_streams_closed(*programs: Program) -> None:
    """Wait until each stream that was opened is closed."""
    for each in programs:
        eventually(lambda each=each: len(set(stream_counts(each))) == 1)  # type: ignore[misc]
