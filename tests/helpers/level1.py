"""What the tests of level 1 need: both ends in the test's own process, their log, a peer that says single frames."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from naive_peer import NaivePeer
from support import Address, Fields, Record, Service, connect, eventually, parse_line
from tap import tapped
from tls_peers import House

import rtunnel
from rtunnel import FrameType

LOOPBACK = rtunnel.Address("127.0.0.1", 0)


# --- both ends in this process: their state can be looked at, their limits patched -----------------------------


class Log(logging.Handler):
    """What the program logs in this process, at debug level, while the block lasts; no line is held back."""

    def __init__(self) -> None:
        super().__init__()
        self._records: list[Record] = []
        self._times_s: list[float] = []  # of each

    def emit(self, record: logging.LogRecord) -> None:
        parsed = parse_line(f"2026-01-01T00:00:00.000Z {record.levelname} {record.getMessage()}")
        assert parsed is not None, record.getMessage()
        self._records.append(parsed)  # one thread at a time: the handler's lock
        self._times_s.append(time.monotonic())

    def events(self, event: str, **fields: object) -> list[Fields]:
        """The fields of each line so far with this event and these fields."""
        return [
            record.fields
            for record in list(self._records)
            if record.event == event and all(record.fields.get(key) == str(value) for key, value in fields.items())
        ]

    def wait_for(self, event: str, count: int = 1, deadline: float = 10.0, **fields: object) -> Fields:
        """The fields of the `count`-th such line."""
        what = f"{count} {event} {fields or ''}"
        eventually(lambda: len(self.events(event, **fields)) >= count, deadline, what)
        return self.events(event, **fields)[count - 1]

    def times_of(self, event: str) -> list[float]:
        """When each such line was logged, in seconds."""
        return [at for record, at in zip(self._records, self._times_s, strict=False) if record.event == event]

    def __enter__(self) -> Log:
        self._before = rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate
        self._burst, rtunnel.LOG_BURST = rtunnel.LOG_BURST, 1_000_000
        rtunnel.LOG.setLevel(logging.DEBUG)
        rtunnel.LOG.handlers[:] = [self]
        rtunnel.LOG.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate = self._before
        rtunnel.LOG_BURST = self._burst
        for record in self._records:  # shown where the test has failed
            print(record.level, record.event, *(f"{key}={value}" for key, value in record.fields.items()))
        self.check()

    def check(self) -> None:
        """Nothing failed that nobody foresaw."""
        assert not self.events("internal-error"), self.events("internal-error")


class Ends:
    """A server and any number of clients in this process, and the log of all; over TLS where there is a house."""

    def __init__(self, house: House | None = None) -> None:
        self._contexts = (house.server(), house.client(name="127.0.0.1")) if house else (None, None)
        self.log = Log()
        self._stack = contextlib.ExitStack()
        self._clients: list[rtunnel.Client] = []
        self.server: rtunnel.Server

    def __enter__(self) -> Ends:
        self._stack.enter_context(self.log)
        self._stack.enter_context(tapped())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def open_server(self, *, public: rtunnel.Address | None = None, **settings: Any) -> Address:
        """Start the server; returns its control address."""
        where = {"control_listen": LOOPBACK, "public_listen": public, "public_bind": LOOPBACK.host}
        self.server = rtunnel.Server(rtunnel.Settings(**where, **settings), self._contexts[0])
        self.server.start()
        self._stack.callback(stop, self.server)
        return control_address(self.server)

    def open_client(
        self,
        server: Address,
        *mappings: rtunnel.Mapping,
        **settings: Any,
    ) -> rtunnel.Client:
        """Start a client."""
        there = [dataclasses.replace(each, server=rtunnel.Address(*server)) for each in mappings]
        client = rtunnel.Client(there, rtunnel.Settings(**{"reconnect_max": 0.05, **settings}), self._contexts[1])
        client.start()
        self._clients.append(client)
        self._stack.callback(stop, client)
        return client

    def open_tunnel(self, local: Service | Address, **settings: Any) -> Address:
        """A server and a client with one mapping; returns the public address, which is ready for visitors."""
        address = local.address if isinstance(local, Service) else local
        self.open_client(self.open_server(**settings), mapping(address), **settings)
        return self.public()

    def public(self, count: int = 1) -> Address:
        """The public address of the `count`-th session that was opened."""
        eventually(lambda: len(self.opened()) >= count, what=f"session {count} is opened")
        return "127.0.0.1", int(self.opened()[count - 1]["port"])

    def opened(self) -> list[Fields]:
        """What the server has logged of each session that it opened."""
        return [fields for fields in self.log.events("session-opened") if "identity" in fields]

    def sessions(self) -> list[rtunnel.ServerSession]:
        """The server's sessions that have a lease."""
        return [session for lease in leases(self.server) for session in lease.sessions]

    def client_sessions(self) -> list[rtunnel.ClientSession]:
        """The clients' sessions that there are now."""
        sessions = [session for client in self._clients for session in client.sessions()]
        return [session for session in sessions if isinstance(session, rtunnel.ClientSession)]


def stop(program: rtunnel.Program) -> None:
    """Stop it, and wait until its connections have ended."""
    program.stop()
    eventually(lambda: not program.has_connections(), 5.0, "the connections end")


def mapping(local: Address, port: int = 0, instance: str | None = None) -> rtunnel.Mapping:
    """A mapping to a local service; its instance is a new one unless it is given."""
    return rtunnel.Mapping(port, rtunnel.Address(*local), instance=instance or new_instance())


def new_instance() -> str:
    return secrets.token_hex(16)


# --- what the program does not tell: the only places that know its private names -------------------------------


def control_address(server: rtunnel.Server) -> Address:
    """Where clients reach a server that has been started."""
    assert server._control is not None
    return server._control.address


def leases(server: rtunnel.Server) -> list[rtunnel.Lease]:
    """The leases that there are now, those too that linger."""
    with server._lock:
        return list(server._leases.values())


def knows_no_instance(server: rtunnel.Server) -> bool:
    """Whether it remembers no port that it has chosen for a client."""
    with server._lock:
        return not server._assigned


def ended_by(session: rtunnel.Session) -> str | None:
    """The cause of a session's end; None while it lives."""
    with session._lock:
        return session._cause


def received_at(session: rtunnel.Session) -> float:
    """When its peer last gave a sign of life."""
    return session._received_at


def forget_timers() -> None:
    """What the clock has still to do, for ends that have been stopped: it would be in the log of another test."""
    for event in rtunnel.CLOCK._scheduler.queue:
        rtunnel.CLOCK.cancel(event)


def beat(session: rtunnel.Session) -> None:
    """What the clock does every heartbeat."""
    session._beat()


def hear_silence(session: rtunnel.ServerSession) -> None:
    """What the clock does with a global port's connection from which no INIT has come for 2 s."""
    session.join_silent()


def pretend_ping(session: rtunnel.Session, payload: bytes, seconds_ago: float) -> None:
    """As if this PING had been sent so long ago."""
    with session._lock:
        session._pings.append((payload, time.monotonic() - seconds_ago))


def receive_window(stream: rtunnel.Stream) -> rtunnel.ReceiveWindow:
    """What the peer may still send on a stream."""
    return stream._receive_window


def queued_bytes(stream: rtunnel.Stream) -> int:
    """What waits for the stream's socket."""
    with stream._lock:
        return stream._queue.size()


def window_and_queue(stream: rtunnel.Stream) -> tuple[int, int]:
    """Two sums that are always the same: what is queued, held as credit and owed; size and debt."""
    with stream._lock:
        window = stream._receive_window
        return stream._queue.size() + window.credit + window.owed, window.size + window.debt


def open_stream(session: rtunnel.Session, sock: socket.socket | None, visitor: rtunnel.Address) -> rtunnel.Stream:
    """A new stream of a session, at its level; `run` is its pump's."""
    with session._lock:
        stream = session.stream_kind(session, session._last_stream + 1, sock, visitor)
        session.add_locked(stream)
    return stream


def idle_threads(pool: rtunnel.Pool) -> int:
    """How many of its threads wait for work."""
    with pool._lock:
        return len(pool._idle)


@contextlib.contextmanager
def writer_in_use(writer: rtunnel.Writer) -> Iterator[None]:
    """As if a thread were in the transport's send for as long as the block lasts."""
    with writer._lock:
        while writer._writing:
            writer._work.wait(0.01)
        writer._writing = True
    try:
        yield
    finally:
        with writer._lock:
            writer._writing = False
            writer._work.notify()
            writer._room.notify_all()


def is_in_a_send(writer: rtunnel.Writer) -> bool:
    """Whether a thread is in the transport's send, and has stayed there for a tenth of a second."""
    seen = []
    for _ in range(30):
        seen.append(writer._writing)
        time.sleep(0.005)
    return all(seen[10:])


@contextlib.contextmanager
def small_control_sockets() -> Iterator[None]:
    """The program's control sockets hold as little as the system allows of what is sent."""
    tune = rtunnel.tune

    def small(sock: socket.socket, **control: int) -> None:
        tune(sock, **control)
        if control:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rtunnel, "tune", small)
        yield


def connect_small(address: Address) -> socket.socket:
    """A connection whose receive buffer is as small as the system allows."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    sock.settimeout(10.0)
    sock.connect(address)
    return sock


def waiting_pumps(writer: rtunnel.Writer) -> int:
    """How many threads wait for room in its queue."""
    with writer._lock:
        return len(writer._waiting)


# --- a peer of level 1 -----------------------------------------------------------------------------------------


class Peer(NaivePeer):
    """One end of a control connection of level 1, frame by frame; answers each PING that it meets."""

    credit: dict[int, int]  # by stream: bytes of DATA that it may still send

    def __init__(self, sock: socket.socket, timeout: float = 10.0) -> None:
        super().__init__(sock, timeout)
        self.credit = {}
        self.pings: list[bytes] = []  # that have come
        self.port = 0

    @classmethod
    def as_client(cls, server: Address, port: int = 0, instance: str = "", window: int = 65536) -> Peer:
        """Connect, ask for a port, and take the WELCOME."""
        peer = cls(connect(server))
        peer.send_init(init(port, instance or new_instance(), window))
        welcome = dict(line.split("=", 1) for line in peer.hear(FrameType.WELCOME)[2].decode().split("\n"))
        if "error" in welcome:
            peer.sock.close()
            raise Unwelcome(welcome["error"], welcome["message"])
        peer.port = int(welcome["port"])
        return peer

    @property
    def public(self) -> Address:
        return "127.0.0.1", self.port

    def hear(self, *types: FrameType) -> tuple[int, int, bytes]:
        """The next frame that is no PING; of one of these types, where any is given."""
        while True:
            kind, stream, payload = self.read_frame()
            if not self._note(kind, stream, payload):
                continue
            assert not types or kind in types, f"{FrameType(kind).name} {stream} {payload[:64]!r} came instead"
            return kind, stream, payload

    def take(self) -> None:
        """Note all frames that have come, and wait for none."""
        while select.select([self.sock], [], [], 0)[0]:
            self._note(*self.read_frame())

    def _note(self, kind: int, stream: int, payload: bytes) -> bool:
        """Keep account of credit, answer a PING; False for that."""
        if kind == FrameType.PING:
            self.pings.append(payload)
            self.send_frame(FrameType.PONG, 0, payload)
            return False
        if kind == FrameType.NEW_CONN:
            self.credit[stream] = 65536
        elif kind == FrameType.WINDOW:
            self.credit[stream] += int.from_bytes(payload, "big")
        return True

    def send_data(self, stream: int, payload: bytes) -> None:
        """DATA within the credit."""
        self.credit[stream] -= len(payload)
        assert self.credit[stream] >= 0
        for start in range(0, len(payload), 65536):
            self.send_frame(FrameType.DATA, stream, payload[start : start + 65536])


class Unwelcome(Exception):
    """The server's refusal: code and sentence."""


class PeerServer:
    """A listener that clients dial; each connection is a `Peer`."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10.0)
        self.address: Address = self._listener.getsockname()
        self.inits: list[rtunnel.Init] = []
        self._peers: list[Peer] = []

    def __enter__(self) -> PeerServer:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self._peers:
            peer.sock.close()
        self._listener.close()

    def accept(self, welcome: bytes = b"version=1\nport=4711\nwindow=65536") -> Peer:
        """The next client: its INIT is read, and WELCOME said, unless that is empty."""
        sock, _ = self._listener.accept()
        peer = Peer(sock)
        self._peers.append(peer)
        kind, _, payload = peer.read_frame()
        assert kind == FrameType.INIT
        self.inits.append(rtunnel.Init.parse(payload))
        if welcome:
            peer.send_frame(FrameType.WELCOME, 0, welcome)
        return peer


def init(port: int, instance: str, window: int = 65536) -> bytes:
    """The payload of an INIT of level 1."""
    return f"{port}:127.0.0.1:80\nversion=1\nwindow={window}\ninstance={instance}".encode()


def in_threads(tasks: list[Callable[[], Any]]) -> None:
    """Run all at once, each in a thread; the first exception is raised."""
    failures: list[BaseException] = []

    def guarded(task: Callable[[], Any]) -> None:
        try:
            task()
        except BaseException as error:  # raised below, in the test's thread
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(task,), name=f"task {n}") for n, task in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
