"""What the tests of level 1 need: both ends in the test's own process, their log, a peer that says single frames."""

from __future__ import annotations

import contextlib
import logging
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from naive_peer import NaivePeer
from support import Address, Fields, Record, Service, connect, eventually, parse_line
from tap import tapped
from tls_peers import House

import rtunnel
from rtunnel import FrameType

LOOPBACK = rtunnel.Address("127.0.0.1", 0)


# --- both ends in this process: their state can be looked at, their limits patched -----------------------------


class Log(logging.Handler):
    """What the program logs in this process, at debug level, while the block lasts."""

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
        rtunnel.LOG.setLevel(logging.DEBUG)
        rtunnel.LOG.handlers[:] = [self]
        rtunnel.LOG.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate = self._before
        for record in self._records:  # shown where the test has failed
            print(record.level, record.event, *(f"{key}={value}" for key, value in record.fields.items()))
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
        self.server = rtunnel.Server(LOOPBACK, public, LOOPBACK.host, rtunnel.Settings(**settings), self._contexts[0])
        self.server.start()
        self._stack.callback(self.server.stop)
        assert self.server._control is not None
        return self.server._control.address

    def open_client(
        self,
        server: Address,
        *mappings: rtunnel.Mapping,
        reconnect_max_s: float = 0.05,
        **settings: Any,
    ) -> rtunnel.Client:
        """Start a client."""
        shared = rtunnel.Settings(**settings)
        client = rtunnel.Client(rtunnel.Address(*server), mappings, reconnect_max_s, shared, self._contexts[1])
        client.start()
        self._clients.append(client)
        self._stack.callback(client.stop)
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
        with self.server._lock:
            return [session for lease in self.server._leases.values() for session in lease.sessions]

    def client_sessions(self) -> list[rtunnel.ClientSession]:
        """The clients' sessions that there are now."""
        sessions = [session for client in self._clients for session in client.sessions()]
        return [session for session in sessions if isinstance(session, rtunnel.ClientSession)]


def mapping(local: Address, port: int = 0, instance: str | None = None) -> rtunnel.Mapping:
    """A mapping to a local service; its instance is a new one unless it is given."""
    return rtunnel.Mapping(port, rtunnel.Address(*local), instance or new_instance())


def new_instance() -> str:
    return secrets.token_hex(16)


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
        """The next client: its INIT is read, and WELCOME said."""
        sock, _ = self._listener.accept()
        peer = Peer(sock)
        self._peers.append(peer)
        kind, _, payload = peer.read_frame()
        assert kind == FrameType.INIT
        self.inits.append(rtunnel.Init.parse(payload))
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
