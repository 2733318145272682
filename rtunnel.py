#!/usr/bin/env python3
"""rtunnel: a reverse TCP tunnel in blocking Python.

A client behind NAT dials out to a public server and holds one control connection to it. The server opens public
ports for the client; each visitor's connection crosses the control connection as frames (PROTOCOL.md) and reaches
a local service beside the client.

The promise: from this file a reader can say which bytes may arrive, which thread handles them, how much memory
they can cost, and which lock guards what.

Threads
-------
    thread           how many                 does                                    waits only in
    main             1                        signals, the order of the stop          an Event, in steps of 0.5 s
    control acceptor 1 (server)               accepts control connections             its selector
    public acceptor  1 per public port        accepts visitors                        its selector
    session reader   1 per control connection decodes and dispatches frames; never    the transport; at level 0 also
                     (client: the mapping's)  writes to the transport, never dials    a stream's full queue, 20 s
    control sender   1 per control connection sends control frames; its wait is the   its queue with a timeout,
                                              session's clock                         the writer
    stream pump      1 per stream (client:    socket to DATA frames; at last it       the socket, the writer, its
                     it dials first)          alone closes the socket                 own drainer's end
    stream drainer   0 or 1 per stream, while queue to socket                         the socket, 0.5 s at a time
                     its socket is slow

Locks
-----
Taken in this order, each for a few statements; nothing that can wait is done under one.
    Server._lock   the connections, the clients of the global port, `_stopping`
    Session._lock  the streams, the last id, the timers, the first cause of the end
    Writer._lock   the frames to send, who waits for the turn. The *turn* itself is no lock but a flag under
                   `_lock`: its holder alone calls the transport's `send`, and that may wait
    Stream._lock   one stream's queue and state, and each call on its socket but the pump's `recv` and its final
                   `close`. Taken alone: nothing else is locked under it
    Pool._lock     the idle count and the set of threads

Errors
------
    RtunnelError
    +-- ConfigError      wrong usage, configuration or file: exit status 2
    +-- ProtocolError    the peer broke a rule of PROTOCOL.md: its session ends
    +-- SessionEnded     this session has ended; carries the first cause
    +-- PoolClosed       the program stops: no new work

Exit status: 0 stopped as asked; 1 failed; 2 wrong usage, configuration or file.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import enum
import errno
import heapq
import ipaddress
import itertools
import json
import logging
import os
import queue
import random
import re
import select
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any, NamedTuple, NoReturn, TextIO

import configargparse

__version__ = "0.1.0"

# ---- limits -----------------------------------------------------------------------------------------------------

MAX_CONTROL_PAYLOAD_BYTES = 4 * 1024  # every frame but DATA; INIT, the longest, needs some 300
MAX_DATA_PAYLOAD_BYTES = 1024 * 1024  # accepted in one DATA frame; decoding is cut-through, so it costs no memory
MAX_DATA_SENT_BYTES = 64 * 1024  # sent in one DATA frame: 16 KiB cost a third of the throughput, 256 KiB cost latency
MAX_STREAM_ID = 2**32 - 1  # ids rise and never wrap
MAX_UNKNOWN_FRAMES_BEFORE_INIT = 16  # room for a newer client's greetings, none for a stranger's stream of noise
MAX_REASON_BYTES = 64  # of a CLOSE_CONN; it goes into one log line

LEVEL_0_QUEUE_BYTES = 1024 * 1024  # per stream: level 0 has no credit, so the queue is bounded by waiting
LEVEL_0_WAIT_S = 20.0  # how long the reader waits for one stream's full queue, all others with it

SMALL_FRAME_BYTES = 16 * 1024  # up to this size a frame may be queued behind another thread's turn (one TLS record)
SMALL_QUEUE_BYTES = 256 * 1024  # of queued small frames; then their threads wait too, which is the back-pressure
SMALL_QUEUE_FRAMES = 1024  # the same for tiny frames, whose objects cost more than their bytes

FIRST_BUFFER_BYTES = 4 * 1024  # receive buffers start small and grow where they are filled: 10,000 streams are idle
READER_BUFFER_BYTES = 256 * 1024  # one large receive holds many frames
DRAIN_BYTES = 256 * 1024  # in one send of a drainer, which the reader's next feed of that stream has to wait for
UNSENT_BYTES = 128 * 1024  # in the kernel (TCP_NOTSENT_LOWAT): or small frames wait behind megabytes of others'

HELLO_TIMEOUT_S = 10.0  # from accept to INIT; the original's handshake has no limit and keeps everybody out
SILENT_CLIENT_S = 2.0  # without INIT: the original's way to join a global port
DIAL_TIMEOUT_S = 5.0  # of a local service, all its addresses together; the original's value
CONNECT_TIMEOUT_S = 10.0  # of the server
LINGER_S = 5.0  # after our FIN, for what a socket still sends: closing earlier would send RST and eat our last bytes
DRAIN_STEP_S = 0.5  # how long a drainer, or a polled pump, waits before it looks whether its stream was aborted
STOP_TIMEOUT_S = 1.5  # of the whole stop; what then still dials or resolves a name is a daemon thread
POOL_IDLE_S = 10.0  # a thread without work ends
STACK_BYTES = 256 * 1024  # per thread; smaller ones save no memory, and overflow ends in SIGSEGV
ACCEPT_PAUSE_S = 0.25  # after an accept that failed for want of descriptors: the selector would spin
LISTEN_BACKLOG = 1024  # socketserver's default is 5
LIVED_S = 10.0  # a session that lasted so long, or brought a frame, sets the backoff back
FIRST_RETRY_S = 1.0
REFUSED_RETRY_S = 2.0  # at most, where the server's host answers and only its port is closed: it restarts
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3  # a dead peer is found in 60 s


# ---- errors -----------------------------------------------------------------------------------------------------


class RtunnelError(Exception):
    """The root of what this module raises."""


class ConfigError(RtunnelError, argparse.ArgumentTypeError):
    """Wrong usage, configuration or file; the message names what to do. argparse puts the option's name before it."""


class ProtocolError(RtunnelError):
    """The peer broke a rule of PROTOCOL.md; the message names the rule's limit."""


class SessionEnded(RtunnelError):
    """The session has ended; the message is the first cause."""


class PoolClosed(RtunnelError):
    """The program stops; no work is taken any more."""


# ---- frames: no socket, no thread, no clock, no log (PROTOCOL.md, "Frames") ---------------------------------------

HEADER = struct.Struct(">BII")  # type, stream, payload length
HEADER_BYTES = HEADER.size


class FrameType(enum.IntEnum):
    """The frame types that are known; any other is skipped."""

    NEW_CONN = 0x01
    DATA = 0x02
    CLOSE_CONN = 0x03
    INIT = 0x04


KNOWN_TYPES = frozenset(int(kind) for kind in FrameType)
DATA = int(FrameType.DATA)  # a plain int: compared once for each part


class Frame(NamedTuple):
    """A whole frame that is not DATA."""

    type: int
    stream: int
    payload: bytes


class DataPart(NamedTuple):
    """A part of a DATA frame's payload, as it arrived. `part` is valid only until the next event is asked for;
    `remaining` bytes of the same frame follow."""

    stream: int
    part: memoryview
    remaining: int


def encode(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """The bytes of one frame (PROTOCOL.md, "Frames")."""
    return HEADER.pack(kind, stream, len(payload)) + payload


class Decoder:
    """Turns whatever bytes have arrived into events; cut-through: no DATA payload is ever assembled.

    Threads: the session reader alone. Memory: at most a header and MAX_CONTROL_PAYLOAD_BYTES that have arrived;
    an announced length allocates nothing. After a ProtocolError it repeats that error.
    """

    def __init__(self) -> None:
        self.unknown_frames = 0
        self._header = bytearray()  # of a header that is cut off
        self._payload = bytearray()  # of a control frame that is cut off
        self._type = 0
        self._stream = 0
        self._remaining = 0  # payload bytes that have yet to arrive
        self._error: ProtocolError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame | DataPart]:
        """The events in `data`, in order. Raises ProtocolError where a payload is over its limit."""
        if self._error:
            raise self._error
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if not self._remaining:
                header = view[position : position + HEADER_BYTES - len(self._header)]
                position += len(header)
                self._header += header
                if len(self._header) < HEADER_BYTES:
                    return
                self._begin(*HEADER.unpack(self._header))
                self._header.clear()
            part = view[position : position + self._remaining]
            position += len(part)
            self._remaining -= len(part)
            if self._type == DATA:
                if part or not self._remaining:
                    yield DataPart(self._stream, part, self._remaining)
            elif self._type in KNOWN_TYPES:
                self._payload += part
                if not self._remaining:
                    payload = bytes(self._payload)
                    self._payload.clear()
                    yield Frame(self._type, self._stream, payload)

    def _begin(self, kind: int, stream: int, length: int) -> None:
        limit = MAX_DATA_PAYLOAD_BYTES if kind == DATA else MAX_CONTROL_PAYLOAD_BYTES
        if length > limit:
            self._error = ProtocolError(f"frame type {kind:#04x} announces {length} bytes, the limit is {limit}")
            raise self._error
        self._type, self._stream, self._remaining = kind, stream, length
        if kind not in KNOWN_TYPES:
            self.unknown_frames += 1


class Init(NamedTuple):
    """What an INIT frame asks for (PROTOCOL.md, "INIT")."""

    port: int
    local: str  # the local service as the client names it: for the log only

    @classmethod
    def parse(cls, payload: bytes) -> Init:
        """Raises ProtocolError where no port stands before the first ':'."""
        found = re.match(rb"([0-9]{1,5}):([^\n]*)", payload)
        if not found or int(found[1]) > 65535:
            raise ProtocolError(f"INIT is {payload[:32]!r}, PORT:LOCAL with a port from 0 to 65535 is wanted")
        return cls(int(found[1]), found[2].decode("ascii", "replace"))

    def payload(self) -> bytes:
        return f"{self.port}:{self.local}".encode("ascii")


# ---- addresses --------------------------------------------------------------------------------------------------


LABEL = r"[!-\-/-9;-~]{1,63}"  # of a host name or an IPv4 address: printable ASCII but '.' and ':'


class Address(NamedTuple):
    """A host (a name or an address; empty: all interfaces) and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = self.host.removeprefix("::ffff:") if "." in self.host else self.host  # IPv4-mapped: shown as IPv4
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, listen: bool = False) -> Address:
        """`host:port`, `[v6]:port`; with `listen` also `:port`. Raises ConfigError."""
        host, _, port = text.rpartition(":")
        try:
            if bracketed := re.fullmatch(r"\[(.+)\]", host):
                host = bracketed[1]
                ipaddress.IPv6Address(host)
            elif not (re.fullmatch(LABEL + rf"(\.{LABEL})*\.?", host) or (listen and text.startswith(":"))):
                raise ValueError
        except ValueError:
            forms = "host:port, [IPv6]:port" + (" or :port" if listen else "")
            raise ConfigError(f"{text!r} is no address: write {forms}") from None
        return cls(host, parse_port(port, lowest=0 if listen else 1))


def parse_port(text: str, *, lowest: int = 0) -> int:
    """A TCP port from `lowest` to 65535. Raises ConfigError."""
    if not re.fullmatch(r"[0-9]{1,5}", text) or not lowest <= int(text) <= 65535:
        raise ConfigError(f"{text!r} is no port: write a number from {lowest} to 65535")
    return int(text)


# ---- time, log --------------------------------------------------------------------------------------------------


class Deadline:
    """One limit in seconds that several blocking steps spend together."""

    def __init__(self, seconds: float) -> None:
        self._at = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self._at - time.monotonic())


LOG = logging.getLogger("rtunnel")
PLAIN_VALUE = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but space, quote, '=' and backslash


def log_event(level: int, event: str, /, **pairs: object) -> None:
    """One line: the event and its `key=value` pairs. Whatever a peer sent is escaped, so it cannot forge a line."""
    if LOG.isEnabledFor(level):
        LOG.log(level, "%s", " ".join([event, *(f"{key}={quoted(value)}" for key, value in pairs.items())]))


def quoted(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if PLAIN_VALUE.fullmatch(text) else json.dumps(text)


def log_internal_error() -> None:
    """The exception that is being handled, in one line too: its text may hold what a peer sent."""
    log_event(ERROR, "internal-error", thread=threading.current_thread().name, traceback=traceback.format_exc())


def start_log(level: str) -> None:
    """Log to stderr: UTC time, level, event, pairs."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    logging.raiseExceptions = False  # a full disk must not stop the tunnel
    LOG.handlers[:] = [handler]
    LOG.propagate = False
    LOG.setLevel(level.upper())


# ---- threads ----------------------------------------------------------------------------------------------------


class Pool:
    """Daemon threads that are reused: starting one waits for it to run, which halves the connection rate.

    Threads: `run` from any, `close` from main.
    Locking: `_lock` guards everything below the marker.
    Invariant: tasks in `_tasks` never exceed the threads that wait for one, or are about to.
    """

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[str, Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)  # a thread has left
        # guarded by _lock
        self._idle = 0  # threads that wait for a task and have none promised
        self._threads: set[threading.Thread] = set()
        self._closing = False

    def run(self, name: str, task: Callable[..., None], *args: Any) -> None:
        """Run the task in a thread of that name. Raises PoolClosed; RuntimeError where no thread can be started."""
        with self._lock:
            if self._closing:
                raise PoolClosed("stopping")
            if self._idle:
                self._idle -= 1
                self._tasks.put((name, task, args))
                return
            thread = threading.Thread(target=self._work, args=(name, task, args), name=name, daemon=True)
            self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:
            self._leave(thread)
            raise

    def _work(self, name: str, task: Callable[..., None], args: tuple[Any, ...]) -> None:
        me = threading.current_thread()
        while True:
            me.name = name
            try:
                task(*args)
            except Exception:  # the safety net of every thread: the others go on
                log_internal_error()
            task, args = (lambda: None), ()  # an idle thread keeps nothing alive
            with self._lock:
                closing = self._closing
                self._idle += not closing
            if closing:
                return self._leave(me)
            try:
                name, task, args = self._tasks.get(timeout=POOL_IDLE_S)
            except queue.Empty:
                with self._lock:
                    surplus = self._idle > 0  # else a task has been promised to this one of the idle
                    self._idle -= surplus
                if surplus:
                    return self._leave(me)
                name, task, args = self._tasks.get()

    def _leave(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads.discard(thread)
            self._left.notify_all()

    def close(self, deadline: Deadline) -> None:
        """Let the idle go and wait for the others, until the deadline."""
        with self._lock:
            self._closing = True  # under the lock: a worker that is about to idle must see it
            for _ in range(self._idle):
                self._tasks.put(("pool", lambda: None, ()))
            self._idle = 0
            while self._threads and self._left.wait(deadline.remaining()):
                pass


# ---- sockets ----------------------------------------------------------------------------------------------------

# A send that never waits on a socket that does: Linux alone has it (macOS ignores the flag there, Windows has none).
# Elsewhere stream sockets are non-blocking, and their pumps wait in steps of DRAIN_STEP_S.
DONT_WAIT: int | None = socket.MSG_DONTWAIT if sys.platform == "linux" else None

OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def tune(sock: socket.socket, *, control: bool = False) -> None:
    """Small messages at once, dead peers found; on a control connection also a short queue in the kernel."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    wanted = {
        "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE": KEEPALIVE_IDLE_S,
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL_S,
        "TCP_KEEPCNT": KEEPALIVE_PROBES,
    }
    if control:
        wanted["TCP_NOTSENT_LOWAT"] = UNSENT_BYTES
    for name, value in wanted.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def wait_ready(sock: socket.socket, *, writing: bool, seconds: float) -> bool:
    """True when the socket can be read or written, or has an error to tell; waits at most so long."""
    if hasattr(select, "poll"):  # select() ends at descriptor 1,023
        poll = select.poll()
        poll.register(sock, select.POLLOUT if writing else select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    readers, writers = ([], [sock]) if writing else ([sock], [])
    return any(select.select(readers, writers, [sock], seconds))


def dial(address: Address, seconds: float) -> socket.socket:
    """Connect to the first of the host's addresses that answers, in `seconds` for all. Raises OSError."""
    deadline = Deadline(seconds)
    error: OSError | None = None
    for family, kind, protocol, _, target in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(0.001, deadline.remaining()))  # 0 would mean non-blocking
            sock.connect(target)
            sock.settimeout(None)
            tune(sock)
            return sock
        except OSError as failed:
            sock.close()
            error = error or failed
    raise error or OSError(f"{address.host} has no address")


def reset_at_close(sock: socket.socket, reset: bool = True) -> None:
    """Make `close` send RST, that of the kernel too when the process is killed; or, at a clean end, FIN again."""
    linger = struct.pack("HH" if os.name == "nt" else "ii", reset, 0)  # struct linger has u_short on Windows
    with contextlib.suppress(OSError):  # macOS: the peer's reset was faster
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def reason_of(error: BaseException) -> str:
    """One short phrase for a log line."""
    if isinstance(error, TimeoutError):
        return "timed out"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


class Listener(socketserver.ThreadingTCPServer):
    """A listening port, the control port and the public ones alike; each connection runs in a thread of the pool.

    Threads: its acceptor, in `serve_forever`; `ask_to_stop`, `stop` from any other.
    The life of a connection: `get_request` accepts; `process_request` gives it to the pool, where `handle(sock,
    peer)` serves it; then `shutdown_request` closes the socket. `handle_error` logs what escaped.
    """

    allow_reuse_address = os.name == "posix"  # on Windows that option would let another program share the port
    request_queue_size = LISTEN_BACKLOG

    def __init__(self, address: Address, pool: Pool, handle: Callable[[socket.socket, Address], None]) -> None:
        """Bind and start to accept. Raises OSError."""
        self._pool = pool
        self._asked = threading.Event()
        if not address.host and socket.has_dualstack_ipv6():
            address = Address("::", address.port)
        family, _, _, _, target = socket.getaddrinfo(address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM)[
            0
        ]
        self.address_family = family
        self._handle = handle
        super().__init__(target, socketserver.BaseRequestHandler)  # type: ignore[arg-type]  # the hook is overridden
        self.address = Address(*self.socket.getsockname()[:2])
        self._acceptor = threading.Thread(target=self._accept, name=f"acceptor {self.address}", daemon=True)
        try:
            self._acceptor.start()
        except RuntimeError as error:
            self.socket.close()
            raise OSError(str(error)) from error

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(self.server_address[0] != "::"))
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        super().server_bind()

    def _accept(self) -> None:
        with contextlib.suppress(_AskedToStop):
            self.serve_forever(poll_interval=DRAIN_STEP_S)

    def service_actions(self) -> None:
        if self._asked.is_set():  # `shutdown()` would wait here, one port after the other
            raise _AskedToStop

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                log_event(ERROR, "accept-failed", address=self.address, reason=reason_of(error))
                self._asked.wait(ACCEPT_PAUSE_S)
            raise  # socketserver goes on with the next

    def process_request(self, request: Any, client_address: Any) -> None:
        address = Address(*client_address[:2])
        try:
            self._pool.run(f"connection {address}", self.process_request_thread, request, address)
        except (PoolClosed, RuntimeError) as error:
            log_event(ERROR, "connection-dropped", peer=address, reason=reason_of(error))
            self.shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._handle(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        request.close()  # only: socketserver would send FIN first and turn each reset into a clean end

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_internal_error()  # the handler's safety net

    def ask_to_stop(self) -> None:
        """No more connections; returns at once."""
        self._asked.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # Linux: wakes the selector; elsewhere its poll interval does

    def stop(self) -> None:
        """Stop accepting and free the port; waits for the acceptor, at most its poll interval."""
        self.ask_to_stop()
        if self._acceptor is not threading.current_thread():
            self._acceptor.join()
        self.socket.close()


class _AskedToStop(Exception):
    """Leaves `serve_forever`."""


# ---- transport and writer ---------------------------------------------------------------------------------------


class PlainTransport:
    """What a session reads and writes: a TCP connection.

    Threads: `receive_into`, `finish` and `close` from the session reader; `send` and `flush` from the holder of the
    writer's turn; `shutdown` from any. The socket carries no Python timeout: it would bound a whole `send`, and turn
    each receive into poll and receive.
    """

    identity = "anonymous"

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.peer = str(Address(*sock.getpeername()[:2]))
        tune(sock, control=True)

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end. Raises OSError."""
        return self._sock.recv_into(buffer)

    def send(self, frames: bytes | bytearray | memoryview) -> None:
        """Send all. Raises OSError."""
        self._sock.sendall(frames)

    def flush(self) -> None:
        """Send what the transport itself has to say: plain TCP nothing."""

    def shutdown(self) -> None:
        """End it both ways; whoever waits in it wakes."""
        with contextlib.suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class Writer:
    """Many threads' frames onto one transport, in groups.

    Whoever holds the *turn* writes, in one send, the control queue, the queued small frames and its own frame; then
    at most one further batch, so that it is not enslaved; then the next in line has the turn, so that nobody starves
    (whoever lets go of a plain Lock usually gets it again).

    Threads: `send`, `push` from pumps; `post`, `wake`, `close` from any, they never wait; `serve`, `finish` from the
    control sender and the reader.
    Locking: `_lock` guards everything below the marker. The transport is called by the turn's holder, without it.
    Invariant: where the turn is free nothing waits to be sent, but what `post` has just told the control sender of.
    Memory: SMALL_QUEUE_BYTES of small frames; the control queue is bounded by who posts (at most one frame for each
    stream that is opened and one for each that ends).
    """

    def __init__(self, transport: PlainTransport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # the control sender waits here, at the end the reader too
        # guarded by _lock
        self._control: list[bytes] = []
        self._small: list[tuple[Stream, bytes]] = []
        self._small_bytes = 0
        self._waiting: collections.deque[tuple[threading.Lock, Stream]] = collections.deque()  # each with its ticket
        self._holder: object = None  # who has the turn: a thread's id; between two, the next one's ticket, or SENDER
        self._woken = False
        self._cause: str | None = None

    SENDER = "the control sender"

    def send(self, stream: Stream, frame: bytes | memoryview) -> None:
        """Send a frame behind all earlier ones of its stream; waits while the transport is slow.

        What comes after the stream's `cut` is dropped. Raises SessionEnded.
        """
        with self._lock:
            self._check_open_locked()
            if stream.cut:
                return
            if self._holder is not None and self._fits_locked(frame):
                self._small.append((stream, bytes(frame)))
                self._small_bytes += len(frame)
                return
            ticket = None
            if self._holder is None:
                self._holder = threading.get_ident()
            else:
                ticket = threading.Lock()
                ticket.acquire()
                self._waiting.append((ticket, stream))
        if ticket is not None:
            ticket.acquire()  # released with the turn, at the stream's cut, or at the end
            with self._lock:
                self._check_open_locked()
                if self._holder is not ticket:
                    return
                self._holder = threading.get_ident()
        self._write(stream, frame)

    def _fits_locked(self, frame: bytes | memoryview) -> bool:
        fits = len(frame) <= SMALL_FRAME_BYTES and self._small_bytes + len(frame) <= SMALL_QUEUE_BYTES
        return fits and len(self._small) < SMALL_QUEUE_FRAMES

    def cut(self, stream: Stream, frame: bytes) -> None:
        """Queue the stream's last frame ahead of all DATA; its own that is still here is dropped. Never waits."""
        with self._lock:
            stream.cut = True
            self._small = [entry for entry in self._small if entry[0] is not stream]
            self._small_bytes = sum(len(entry[1]) for entry in self._small)
            for ticket in [ticket for ticket, waiting in self._waiting if waiting is stream]:
                self._waiting.remove((ticket, stream))
                ticket.release()
        self.post(frame)

    def post(self, frame: bytes, *, wake: bool = True) -> None:
        """Queue a control frame, ahead of all DATA; never waits. Without `wake` the caller must `push` it."""
        with self._lock:
            self._check_open_locked()
            self._control.append(frame)
            if wake and self._holder is None:
                self._changed.notify_all()

    def push(self) -> None:
        """Write what is queued, if the turn is free; else its holder does. Raises SessionEnded."""
        with self._lock:
            self._check_open_locked()
            if self._holder is not None or not self._control:
                return
            self._holder = threading.get_ident()
        self._write()

    def wake(self) -> None:
        """Make the control sender flush the transport and look at the clock; never waits."""
        with self._lock:
            self._woken = True
            if self._holder is None:
                self._changed.notify_all()

    def serve(self, seconds: float | None) -> None:
        """For the control sender: write the control queue, wait at most so long for it. Raises SessionEnded."""
        with self._lock:
            if not self._has_work_locked():
                self._changed.wait(seconds)
            self._check_open_locked()
            if not self._has_work_locked():
                return
            self._holder = threading.get_ident()
        self._write()

    def _has_work_locked(self) -> bool:
        free = self._holder is None and bool(self._control or self._woken)
        return free or self._holder is self.SENDER or self._cause is not None

    def close(self, cause: str) -> None:
        """No more frames; everybody who waits gets SessionEnded. Never waits; the first cause stays."""
        with self._lock:
            self._cause = self._cause or cause
            for ticket, _ in self._waiting:
                ticket.release()
            self._waiting.clear()
            if not isinstance(self._holder, int):  # whoever was to have the turn next will not take it
                self._holder = None
            self._changed.notify_all()

    def wait_unused(self) -> None:
        """Wait until nobody is in the transport's `send`; after `close`, with the transport shut down."""
        with self._lock:
            while self._holder is not None:
                self._changed.wait()

    def _check_open_locked(self) -> None:
        assert self._lock.locked()
        if self._cause is not None:
            raise SessionEnded(self._cause)

    def _write(self, stream: Stream | None = None, frame: bytes | memoryview | None = None) -> None:
        """Write one batch with the own frame, one more if others came meanwhile, and pass the turn on."""
        try:
            for own in (frame, None):
                batch, flush = self._take_batch(stream, own)
                if batch is not None:
                    self._transport.send(batch)
                if flush:
                    self._transport.flush()
                if batch is None and not flush:
                    break
        except OSError as error:
            self.close(reason_of(error))
            raise SessionEnded(reason_of(error)) from error
        finally:
            self._pass_turn()

    def _take_batch(
        self, stream: Stream | None, own: bytes | memoryview | None
    ) -> tuple[bytes | memoryview | None, bool]:
        with self._lock:
            assert self._holder == threading.get_ident(), "only the holder of the turn writes"
            flush, self._woken = self._woken, False
            frames: list[bytes | memoryview] = [*self._control, *(small for _, small in self._small)]
            self._control.clear()
            self._small.clear()
            self._small_bytes = 0
            if own is not None and stream is not None and not stream.cut:
                frames.append(own)
        if len(frames) > 1:
            return b"".join(frames), flush
        return (frames[0] if frames else None), flush

    def _pass_turn(self) -> None:
        with self._lock:
            self._holder = None
            if self._cause is not None:
                self._changed.notify_all()
            elif self._waiting:
                self._holder, _ = self._waiting.popleft()
                self._holder.release()
            elif self._control or self._small or self._woken:
                self._holder = self.SENDER
                self._changed.notify_all()


# ---- stream -----------------------------------------------------------------------------------------------------


class Inbound(enum.Enum):
    """The direction from the tunnel to the socket."""

    OPEN = "open"  # DATA is taken
    ENDING = "ending"  # the peer's end has come; the queue is yet to be written
    ENDED = "ended"  # FIN is sent; nothing is taken any more


class Stream:
    """One visitor's connection, carried by one session.

    Threads: fed and ended by the session reader, run by its pump, drained by its drainer, aborted by any.
    Locking: `_lock` guards everything below the marker. No call that can wait and no other lock is taken under it.
    Only the pump closes the socket, when no drainer is at work: a descriptor closed under another thread's call
    could carry its bytes to a stranger.
    Invariant: `_queued` is the bytes in `_queue` and in the drainer's hands; with no drainer both are empty, or
    there is no socket yet. At level 0 `_queued` never exceeds LEVEL_0_QUEUE_BYTES.
    """

    def __init__(self, session: Session, number: int, sock: socket.socket | None, peer: str) -> None:
        self._session = session
        self.number = number
        self._peer = peer
        self._opened = time.monotonic()
        self._sent = 0  # bytes from the socket to the tunnel; the pump's
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # less queued, a drainer gone, an abort
        # guarded by _lock
        self._sock: socket.socket | None = None
        self._queue = bytearray()
        self._queued = 0
        self._draining = False
        self._inbound = Inbound.OPEN
        self._received = 0  # bytes from the tunnel
        self._peer_closed = False  # the peer's CLOSE_CONN has come: what the socket still sends is discarded
        self._close_sent = False  # each side sends exactly one CLOSE_CONN
        self._ended_at = 0.0  # when FIN was sent, on the monotonic clock
        self._aborted: str | None = None  # the first cause
        self._lingered = False  # 5 s have passed since then: no more is discarded
        self._closed = False
        # guarded by Writer._lock
        self.cut = False  # this side's last frame is queued
        if sock is not None:
            with self._lock:
                self._attach_locked(sock)

    # -- called by the session reader

    def feed(self, part: memoryview) -> None:
        """DATA for the socket: at once where it takes it, else queued. At level 0 waits for a full queue, 20 s."""
        with self._lock:
            self._received += len(part)
            if self._inbound is not Inbound.OPEN or self._aborted is not None:
                return  # a stream that has ended drops what still comes
            if not self._queued and not self._draining and self._sock is not None:
                part = part[self._send_locked(part) :]
                if not part or self._aborted is not None:
                    return
            if not self._wait_for_room_locked(len(part)):
                return
            self._queue += part
            self._queued += len(part)
            drain = self._settle_locked()
        if drain:
            self._start_drainer()

    def close_received(self, reason: bytes) -> None:
        """The peer's CLOSE_CONN: with a reason a reset, bare a clean end behind the DATA; answered at once."""
        with self._lock:
            if self._peer_closed:
                return
            self._peer_closed = True
            answer, self._close_sent = not self._close_sent, True
            if reason:
                self._abort_locked("peer: " + reason[:MAX_REASON_BYTES].decode("ascii", "replace"))
            elif answer and not self._received and self._session.refusal_is_silent:
                self._abort_locked("peer: refused")
            else:
                self._end_inbound_locked()
        if answer:
            self._session.writer.cut(self, encode(FrameType.CLOSE_CONN, self.number))
        self._session.after(LINGER_S, self._check_linger)

    def _check_linger(self) -> None:
        """The control sender's: a socket that has not answered our FIN within 5 s is closed; the kernel delivers on."""
        with self._lock:
            over = self._inbound is Inbound.ENDED
            wait = self._ended_at + LINGER_S - time.monotonic() if over else LINGER_S
            if self._closed or self._aborted is not None:
                return
            if wait <= 0:
                self._lingered = True
                self._wake_pump_locked()
                return
        self._session.after(wait, self._check_linger)

    # -- called by any thread

    def abort(self, reason: str) -> None:
        """End both directions with a reset of the socket; the first cause stays. Never waits."""
        with self._lock:
            self._abort_locked(reason)

    def _abort_locked(self, reason: str) -> None:
        assert self._lock.locked()
        if self._aborted is not None:
            return
        self._aborted = reason
        self._queued -= len(self._queue)
        self._queue = bytearray()
        self._wake_pump_locked()
        self._changed.notify_all()

    def _wake_pump_locked(self) -> None:
        assert self._lock.locked()
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)  # SHUT_WR would send FIN, a clean end

    # -- the pump

    def run(self, connect: Callable[[], socket.socket] | None = None) -> None:
        """The pump's life: dial (client), socket to DATA frames, the last CLOSE_CONN, close."""
        log_event(DEBUG, "stream-opened", stream=self.number, peer=self._peer)
        try:
            self._session.writer.push()  # its NEW_CONN, if it is new
            if connect is None or self._dial(connect):
                self._pump()
            self._send_close()
        except SessionEnded as ended:
            self.abort(str(ended))
        except BaseException:
            self.abort("internal error")
            raise
        finally:
            self._close()

    def _dial(self, connect: Callable[[], socket.socket]) -> bool:
        try:
            sock = connect()
        except OSError as error:
            self.abort("refused" if isinstance(error, ConnectionRefusedError) else reason_of(error))
            return False
        with self._lock:
            drain = self._attach_locked(sock)
        if drain:
            self._start_drainer()
        return True

    def _attach_locked(self, sock: socket.socket) -> bool:
        sock.setblocking(DONT_WAIT is not None)
        reset_at_close(sock)  # from the start: whatever kills this process, no end that is not clean looks clean
        self._sock = sock
        return self._settle_locked()

    def _pump(self) -> None:
        """Socket to DATA frames, until its end, an abort, or the end of the session (raises SessionEnded)."""
        sock = self._sock
        assert sock is not None
        buffer = memoryview(bytearray(HEADER_BYTES + FIRST_BUFFER_BYTES))
        while self._aborted is None and not self._lingered:
            try:
                count = self._receive(sock, buffer[HEADER_BYTES:])
            except OSError as error:
                self.abort("reset" if isinstance(error, ConnectionError) else reason_of(error))
                return
            if not count or self._aborted is not None:
                return
            if self._peer_closed:
                continue  # discarded: the peer has forgotten the stream
            # The header stands in front of the payload: no copy on the way to the transport.
            HEADER.pack_into(buffer, 0, DATA, self.number, count)
            self._session.writer.send(self, buffer[: HEADER_BYTES + count])
            self._sent += count
            if count == len(buffer) - HEADER_BYTES < MAX_DATA_SENT_BYTES:
                buffer = memoryview(bytearray(HEADER_BYTES + MAX_DATA_SENT_BYTES))

    def _receive(self, sock: socket.socket, buffer: memoryview) -> int:
        while True:
            if DONT_WAIT is None and not wait_ready(sock, writing=False, seconds=DRAIN_STEP_S):
                if self._aborted is not None or self._lingered:
                    return 0
                continue
            try:
                return sock.recv_into(buffer)
            except BlockingIOError:
                continue

    def _send_close(self) -> None:
        """Behind all DATA: bare at a clean end, else with the reason."""
        with self._lock:
            send, self._close_sent = not self._close_sent, True
            reason = self._aborted
            if reason is None:
                self._end_inbound_locked()  # level 0: the first end of file ends both directions
        if send:
            payload = (reason or "").encode("ascii", "replace")[:MAX_REASON_BYTES]
            self._session.writer.send(self, encode(FrameType.CLOSE_CONN, self.number, payload))

    def _close(self) -> None:
        with self._lock:
            while self._draining:
                self._changed.wait()
            sock, self._sock = self._sock, None
            self._inbound = Inbound.ENDED
            self._closed = True
        if sock is not None:
            reset_at_close(sock, self._aborted is not None)
            sock.close()
        self._session.forget(self)
        log_event(
            DEBUG,
            "stream-closed",
            stream=self.number,
            peer=self._peer,
            received=self._received,
            sent=self._sent,
            seconds=time.monotonic() - self._opened,
            reason=self._aborted or "clean",
        )

    # -- tunnel to socket

    def _send_locked(self, data: memoryview) -> int:
        """Give the socket what it takes without waiting; an error aborts the stream."""
        assert self._lock.locked()
        assert self._sock is not None
        try:
            return self._sock.send(data, DONT_WAIT or 0)
        except BlockingIOError:
            return 0
        except OSError:
            self._abort_locked("reset")
            return 0

    def _wait_for_room_locked(self, count: int) -> bool:
        """Level 0: wait until `count` bytes fit; a stream that has no room for 20 s is reset."""
        deadline = Deadline(LEVEL_0_WAIT_S)
        while self._queued + count > LEVEL_0_QUEUE_BYTES and self._aborted is None:
            if not self._changed.wait(deadline.remaining()) and not deadline.remaining():
                self._abort_locked("stalled")
        return self._aborted is None

    def _settle_locked(self) -> bool:
        """What the socket is owed: FIN, or a drainer, which counts as at work from now on; True: start it."""
        assert self._lock.locked()
        if self._sock is None or self._draining or self._aborted is not None:
            return False
        if self._queued:
            self._draining = True
        elif self._inbound is Inbound.ENDING:
            self._inbound = Inbound.ENDED
            self._ended_at = time.monotonic()
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
        return self._draining

    def _start_drainer(self) -> None:
        try:
            self._session.start_thread(f"drainer {self.number}", self._drain)
        except (PoolClosed, RuntimeError) as error:
            with self._lock:
                self._draining = False
                self._abort_locked(reason_of(error))

    def _drain(self) -> None:
        """The drainer: the queue to the socket, until the queue is empty."""
        try:
            while chunk := self._take_queue():
                self._drain_chunk(memoryview(chunk))
        except BaseException:
            self.abort("internal error")
            self._take_queue()  # the drainer is no longer at work
            raise

    def _take_queue(self) -> bytearray | None:
        """All that is queued; None, and the drainer no longer at work, where that is nothing or not wanted."""
        with self._lock:
            if self._queue and self._aborted is None:
                chunk, self._queue = self._queue, bytearray()
                return chunk
            # In the step that finds the queue empty: the reader starts another drainer for what comes now.
            self._draining = False
            self._settle_locked()
            self._changed.notify_all()
            return None

    def _drain_chunk(self, rest: memoryview) -> None:
        sock = self._sock  # stays: the pump closes it only when no drainer is at work
        assert sock is not None
        while rest and self._aborted is None:
            if wait_ready(sock, writing=True, seconds=DRAIN_STEP_S):
                with self._lock:  # a reset that this send meets, and so hides from the pump, is marked in one step
                    sent = self._send_locked(rest[:DRAIN_BYTES])
                    rest = rest[sent:]
                    self._queued -= sent
                    self._changed.notify_all()

    def _end_inbound_locked(self) -> None:
        """The tunnel has no more for the socket: FIN, now or when the queue is written."""
        assert self._lock.locked()
        if self._inbound is Inbound.OPEN:
            self._inbound = Inbound.ENDING
            self._settle_locked()


# ---- session ----------------------------------------------------------------------------------------------------


class Session:
    """One control connection's life: its transport, its streams, its clock. The same class on both sides.

    Threads: `run` is the session reader; `_send_control` the control sender; everything public else from any.
    Locking: `_lock` guards everything below the marker. Writer._lock may be taken under it, as `post` never waits.
    Invariant: a stream is in `_streams` from before its NEW_CONN is sent until its socket is closed. Our ids rise
    and are never used again, and each session has its own streams, so a frame never meets another stream's socket.
    """

    refusal_is_silent = False  # a bare CLOSE_CONN before any DATA means "refused": what the original's client sends

    def __init__(self, transport: PlainTransport, pool: Pool) -> None:
        self.transport = transport
        self.writer = Writer(transport)
        self.decoder = Decoder()
        self._pool = pool
        self._sender_left = threading.Event()
        self._order = itertools.count()  # ties of timers: callables have no order
        self._lock = threading.Lock()
        # guarded by _lock
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._cause: str | None = None

    # -- the session reader

    def run(self) -> str:
        """Read and dispatch until the end; returns its cause. The transport is closed then, all streams aborted."""
        try:
            self.start_thread(f"control sender {self.transport.peer}", self._send_control)
        except (PoolClosed, RuntimeError) as error:
            self.end(reason_of(error))
            self._sender_left.set()
        try:
            self._read()
            self.end("closed by the peer")
        except (OSError, RtunnelError) as error:
            self.end(reason_of(error))
        except Exception:  # the reader's safety net
            log_internal_error()
            self.end("internal error")
        finally:
            self._sender_left.wait()
            self.writer.wait_unused()
            self.transport.close()
        assert self._cause is not None
        return self._cause

    def _read(self) -> None:
        buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        while count := self.transport.receive_into(buffer):
            for event in self.decoder.feed(buffer[:count]):
                if isinstance(event, DataPart):
                    self._on_data(event)
                else:
                    self.on_frame(event)
            self.on_received()
            if count == len(buffer) < READER_BUFFER_BYTES:
                buffer = memoryview(bytearray(4 * len(buffer)))

    def _on_data(self, event: DataPart) -> None:
        self.check_may_send("DATA")
        if stream := self._find(event.stream):
            stream.feed(event.part)

    def on_frame(self, frame: Frame) -> None:
        """A whole frame; the roles add theirs. Raises ProtocolError."""
        if frame.type != FrameType.CLOSE_CONN:
            raise ProtocolError(f"{FrameType(frame.type).name} is not for this side to receive")
        self.check_may_send("CLOSE_CONN")
        if stream := self._find(frame.stream):
            stream.close_received(frame.payload)

    def on_received(self) -> None:
        """Called after each receive was dispatched."""

    def check_may_send(self, name: str) -> None:
        """Raises ProtocolError where the peer may not send stream frames yet."""

    def _find(self, number: int) -> Stream | None:
        """The stream, None where it has ended. Raises ProtocolError for an id that was never opened."""
        with self._lock:
            if number > self._last_stream or not number:
                raise ProtocolError(f"frame for stream {number}, which was never opened")
            return self._streams.get(number)

    # -- the control sender

    def _send_control(self) -> None:
        try:
            while True:
                self.writer.serve(self._run_timers())
        except SessionEnded as ended:
            self.end(str(ended))
        except BaseException:
            self.end("internal error")
            raise
        finally:
            self._sender_left.set()

    def _run_timers(self) -> float | None:
        """Do what is due; returns the seconds to the next timer."""
        while True:
            with self._lock:
                if not self._timers:
                    return None
                wait = self._timers[0][0] - time.monotonic()
                if wait > 0:
                    return wait
                action = heapq.heappop(self._timers)[2]
            action()

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have the control sender call it then, without a lock; it must not wait."""
        with self._lock:
            timer = (time.monotonic() + seconds, next(self._order), action)
            heapq.heappush(self._timers, timer)
            first = self._timers[0] is timer
        if first:
            self.writer.wake()

    # -- any thread

    def end(self, cause: str) -> None:
        """End the session and reset its streams; the first cause stays. Never waits: the reader does the rest."""
        with self._lock:
            self._cause = cause = self._cause or cause
            streams = list(self._streams.values())
        self.writer.close(cause)
        self.transport.shutdown()
        for stream in streams:
            stream.abort(cause)

    def stream_count(self) -> int:
        with self._lock:
            return len(self._streams)

    def has_had_streams(self) -> bool:
        with self._lock:
            return self._last_stream > 0

    def forget(self, stream: Stream) -> None:
        """The stream's socket is closed."""
        with self._lock:
            del self._streams[stream.number]

    def start_thread(self, name: str, task: Callable[..., None], *args: Any) -> None:
        """A thread whose internal error ends this session. Raises PoolClosed, RuntimeError."""
        self._pool.run(name, self.guarded, task, *args)

    def guarded(self, task: Callable[..., None], *args: Any) -> None:
        """Run a stream's thread; an error that nobody foresaw ends the session and reaches the safety net."""
        try:
            task(*args)
        except BaseException:
            self.end("internal error")
            raise

    def _add_locked(self, stream: Stream) -> None:
        assert self._lock.locked()
        if self._cause is not None:
            raise SessionEnded(self._cause)
        self._last_stream = max(self._last_stream, stream.number)
        self._streams[stream.number] = stream


# ---- server -----------------------------------------------------------------------------------------------------


class ServerSession(Session):
    """The server's side: takes INIT, opens streams for visitors."""

    refusal_is_silent = True

    def __init__(self, transport: PlainTransport, pool: Pool, server: Server, deadline: Deadline) -> None:
        super().__init__(transport, pool)
        self._server = server
        self._received = False  # any byte; the reader's
        self.asked = False  # INIT has come; the reader's
        self.is_client = False  # set once, by the reader (INIT) or the control sender (2 s)
        self.lease: Listener | None = None  # the reader's
        self.visitors = 0  # guarded by Server._lock
        if server.has_global_port:
            self.after(SILENT_CLIENT_S, self._join_silent)
        self.after(deadline.remaining(), self._check_hello)

    def on_frame(self, frame: Frame) -> None:
        if frame.type != FrameType.INIT:
            super().on_frame(frame)
            return
        self._check_unknown_frames()
        if self.asked:
            raise ProtocolError("a second INIT")
        self.asked = True
        self._server.open_lease(self, Init.parse(frame.payload))
        self.is_client = True

    def on_received(self) -> None:
        self._received = True
        self._check_unknown_frames()

    def _check_unknown_frames(self) -> None:
        if not self.is_client and self.decoder.unknown_frames > MAX_UNKNOWN_FRAMES_BEFORE_INIT:
            raise ProtocolError(f"over {MAX_UNKNOWN_FRAMES_BEFORE_INIT} unknown frames before INIT")

    def check_may_send(self, name: str) -> None:
        if not self.is_client:
            raise ProtocolError(f"{name} before INIT")

    def _join_silent(self) -> None:
        if not self.is_client and not self._received:
            self.is_client = True
            self._server.join_global_port(self)

    def _check_hello(self) -> None:
        if not self.is_client:
            self.end(f"no INIT within {HELLO_TIMEOUT_S:.0f} s")

    def serve_visitor(self, sock: socket.socket, address: Address) -> None:
        """Open a stream for a visitor and be its pump. Raises SessionEnded where none can be opened."""
        with self._lock:
            if self._last_stream == MAX_STREAM_ID:
                raise SessionEnded("its stream ids are used up")
            stream = Stream(self, self._last_stream + 1, sock, str(address))
            # Both in one locked step: ids rise on the wire too, and the answer, be it faster than this thread,
            # finds the stream (defect 10).
            self.writer.post(encode(FrameType.NEW_CONN, stream.number), wake=False)
            self._add_locked(stream)
        self.guarded(stream.run)


class Server:
    """The control port, the global public port, and the sessions with their leases.

    Threads: `serve_control` is each session's reader, `serve_visitor` each stream's pump; `start`, `stop` from main.
    Locking: `_lock` guards everything below the marker; nothing else is locked under it.
    """

    def __init__(self, control: Address, public: Address | None, public_bind: str) -> None:
        self._control_address = control
        self._public_address = public
        self._public_bind = public_bind
        self._pool = Pool()
        self._listeners: list[Listener] = []
        self._lock = threading.Lock()
        # guarded by _lock
        self._sessions: set[ServerSession] = set()
        self._clients: list[ServerSession] = []  # of the global port; who had a visitor last stands last
        self._stopping = False

    @property
    def has_global_port(self) -> bool:
        return self._public_address is not None

    def start(self) -> None:
        """Open the ports. Raises RtunnelError where one cannot be bound."""
        wanted = [("control", self._control_address, self.serve_control)]
        if self._public_address is not None:
            wanted.insert(0, ("public", self._public_address, self._serve_global_visitor))
        for kind, address, handle in wanted:
            try:
                listener = Listener(address, self._pool, handle)
            except OSError as error:
                self.stop()
                raise RtunnelError(f"--{kind}-listen {address}: {reason_of(error)}") from error
            self._listeners.append(listener)
            log_event(INFO, "listening", kind=kind, address=listener.address)

    def stop(self) -> None:
        """No more connections, all streams reset, all threads joined that do not resolve or dial."""
        deadline = Deadline(STOP_TIMEOUT_S)
        with self._lock:
            self._stopping = True
            sessions = list(self._sessions)
        for listener in self._listeners:
            listener.ask_to_stop()
        for session in sessions:
            session.end("stopping")
        for listener in self._listeners:
            listener.stop()
        self._pool.close(deadline)

    # -- control connections

    def serve_control(self, sock: socket.socket, address: Address) -> None:
        """The life of a control connection, in its reader's thread."""
        deadline = Deadline(HELLO_TIMEOUT_S)
        try:
            session = ServerSession(PlainTransport(sock), self._pool, self, deadline)
        except OSError as error:  # gone before it was looked at
            log_event(WARNING, "refused", peer=address, reason=reason_of(error))
            return
        with self._lock:
            self._sessions.add(session)
            if self._stopping:
                session.end("stopping")
        try:
            cause = session.run()
        finally:
            self._leave(session)
        event, level = ("session-closed", INFO) if session.is_client else ("refused", WARNING)
        log_event(level, event, peer=address, reason=cause)

    def open_lease(self, session: ServerSession, init: Init) -> None:
        """What INIT asks for: a public port of its own, or a share of the global one. Raises SessionEnded."""
        peer = session.transport.peer
        if self.has_global_port:
            self.join_global_port(session)
            return
        wanted = Address(self._public_bind, init.port)

        def serve_visitor(sock: socket.socket, address: Address) -> None:
            self._serve_visitor(session, sock, address)

        try:
            lease = Listener(wanted, self._pool, serve_visitor)
        except (OSError, RuntimeError) as error:
            log_event(ERROR, "lease-failed", address=wanted, peer=peer, reason=reason_of(error))
            raise SessionEnded(f"port {init.port} cannot be opened: {reason_of(error)}") from error
        session.lease = lease
        log_event(INFO, "session-opened", peer=peer, level=0, local=init.local)
        log_event(INFO, "lease-opened", address=lease.address, peer=peer)

    def join_global_port(self, session: ServerSession) -> None:
        """Let the session have visitors of the global port."""
        with self._lock:
            if session not in self._clients:
                self._clients.append(session)
        log_event(INFO, "session-opened", peer=session.transport.peer, level=0, init=session.asked)

    def _leave(self, session: ServerSession) -> None:
        """The session has ended: its port is free when this returns."""
        with self._lock:
            self._sessions.discard(session)
            if session in self._clients:
                self._clients.remove(session)
        if session.lease is not None:
            session.lease.stop()
            log_event(INFO, "lease-closed", address=session.lease.address, peer=session.transport.peer)

    # -- visitors

    def _serve_global_visitor(self, sock: socket.socket, address: Address) -> None:
        with self._lock:
            asked = [session for session in self._clients if session.asked]
            session = min(asked or self._clients, key=lambda client: client.visitors, default=None)
            if session is not None:
                session.visitors += 1
                self._clients.remove(session)
                self._clients.append(session)
        self._serve_visitor(session, sock, address)
        with self._lock:
            if session is not None:
                session.visitors -= 1

    def _serve_visitor(self, session: ServerSession | None, sock: socket.socket, address: Address) -> None:
        try:
            if session is None:
                raise SessionEnded("no client is connected")
            tune(sock)
            session.serve_visitor(sock, address)
        except (SessionEnded, OSError) as error:
            reset_at_close(sock)
            log_event(WARNING, "visitor-refused", peer=address, reason=reason_of(error))


# ---- client -----------------------------------------------------------------------------------------------------


class Mapping(NamedTuple):
    """One public port and the local service that it leads to."""

    remote_port: int  # 0: the server chooses
    local: Address

    @classmethod
    def parse(cls, text: str) -> Mapping:
        """`REMOTE_PORT:HOST:PORT`. Raises ConfigError."""
        port, colon, local = text.partition(":")
        if not colon:
            raise ConfigError(f"{text!r} is no mapping: write REMOTE_PORT:HOST:PORT")
        return cls(parse_port(port), Address.parse(local))


class Backoff:
    """Seconds to wait before the next attempt: 1 s, doubled up to a maximum, less up to a quarter at random, so
    that the clients of a restarted server do not all come at once."""

    def __init__(self, maximum_s: float) -> None:
        self._maximum_s = maximum_s
        self.reset()

    def reset(self) -> None:
        self._next_s = FIRST_RETRY_S

    def next_s(self, *, refused: bool) -> float:
        wait = min(self._next_s, REFUSED_RETRY_S) if refused else self._next_s
        self._next_s = min(2 * self._next_s, self._maximum_s)
        return min(wait, self._maximum_s) * random.uniform(0.75, 1.0)


class ClientSession(Session):
    """The client's side: dials the local service for each NEW_CONN."""

    def __init__(self, transport: PlainTransport, pool: Pool, mapping: Mapping) -> None:
        super().__init__(transport, pool)
        self._mapping = mapping
        self.writer.post(encode(FrameType.INIT, 0, Init(mapping.remote_port, str(mapping.local)).payload()))

    def on_frame(self, frame: Frame) -> None:
        if frame.type != FrameType.NEW_CONN:
            super().on_frame(frame)
            return
        with self._lock:
            # The original numbers its visitors before it takes their turn to write, so its ids may come in any order.
            if frame.stream in self._streams or not frame.stream:
                raise ProtocolError(f"NEW_CONN for stream {frame.stream}, which is open")
            stream = Stream(self, frame.stream, None, "")
            self._add_locked(stream)
        try:
            self.start_thread(f"pump {stream.number}", stream.run, self._dial_local)
        except RuntimeError as error:  # no thread to be had: that stream alone ends
            stream.abort(reason_of(error))
            self.forget(stream)
            self.writer.post(encode(FrameType.CLOSE_CONN, stream.number, b"no thread"))

    def _dial_local(self) -> socket.socket:
        try:
            return dial(self._mapping.local, DIAL_TIMEOUT_S)
        except OSError as error:
            log_event(WARNING, "dial-failed", local=self._mapping.local, reason=reason_of(error))
            raise


class Client:
    """One thread a mapping: dial the server, run the session, wait, again.

    Threads: `start`, `stop` from main; `_run_mapping` in each mapping's thread, which is its session's reader.
    Locking: `_lock` guards the live sessions.
    """

    def __init__(self, server: Address, mappings: Sequence[Mapping], reconnect_max_s: float) -> None:
        self._server = server
        self._mappings = mappings
        self._reconnect_max_s = reconnect_max_s
        self._pool = Pool()
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # guarded by _lock
        self._sessions: set[ClientSession] = set()

    def start(self) -> None:
        for mapping in self._mappings:
            self._pool.run(f"mapping {mapping.local}", self._run_mapping, mapping)

    def stop(self) -> None:
        """End all sessions, join all threads that do not resolve or dial."""
        self._stopping.set()
        with self._lock:
            sessions = list(self._sessions)
        for session in sessions:
            session.end("stopping")
        self._pool.close(Deadline(STOP_TIMEOUT_S))

    def _run_mapping(self, mapping: Mapping) -> None:
        backoff = Backoff(self._reconnect_max_s)
        while not self._stopping.is_set():
            log_event(DEBUG, "connecting", server=self._server)
            started = time.monotonic()
            refused = False
            try:
                sock = dial(self._server, CONNECT_TIMEOUT_S)
            except OSError as error:
                refused = isinstance(error, ConnectionRefusedError)
                event, reason = "connect-failed", reason_of(error)
            else:
                event, (reason, lived) = "session-closed", self._run_session(sock, mapping)
                if lived or time.monotonic() - started >= LIVED_S:
                    backoff.reset()
            if not self._stopping.is_set():
                wait = backoff.next_s(refused=refused)
                log_event(WARNING, event, server=self._server, reason=reason, retry_s=wait)
                self._stopping.wait(wait)

    def _run_session(self, sock: socket.socket, mapping: Mapping) -> tuple[str, bool]:
        """Run one session; returns why it ended, and whether the server ever sent a stream."""
        try:
            session = ClientSession(PlainTransport(sock), self._pool, mapping)
        except OSError as error:
            sock.close()
            return reason_of(error), False
        with self._lock:
            self._sessions.add(session)
        if self._stopping.is_set():
            session.end("stopping")
        wanted = {"remote_port": mapping.remote_port, "local": mapping.local}
        log_event(INFO, "session-opened", server=self._server, **wanted, level=0)
        try:
            return session.run(), session.has_had_streams()
        finally:
            with self._lock:
                self._sessions.discard(session)


# ---- configuration and commands -----------------------------------------------------------------------------------


class Option(NamedTuple):
    """One row of the table behind flags, environment, configuration files and help."""

    group: str
    name: str
    default: Any
    parse: Callable[[str], Any]
    metavar: str
    help: str
    repeatable: bool = False


def listen_address(text: str) -> Address | None:
    return Address.parse(text, listen=True) if text else None


def dial_address(text: str) -> Address | None:
    return Address.parse(text) if text else None


def bind_host(text: str) -> str:
    return Address.parse(f"{text}:0", listen=True).host


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not float(text):
        raise ConfigError(f"{text!r} is no time: write a number of seconds above 0")
    return float(text)


def log_level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"{text!r} is no level: write debug, info, warning or error")
    return text


# fmt: off
LOG_OPTIONS = [Option("log", "log-level", "info", log_level, "LEVEL", "debug, info, warning or error")]
OPTIONS = {
    "server": [
        Option("ports", "control-listen", ":7000", listen_address, "ADDRESS", "where clients connect"),
        Option("ports", "public-listen", "", listen_address, "ADDRESS",
               "one global public port that all clients serve; empty: each client asks for its own"),
        Option("ports", "public-bind", "", bind_host, "HOST",
               "the address that ports chosen by clients are opened on; empty: all interfaces"),
        *LOG_OPTIONS,
    ],
    "client": [
        Option("tunnel", "server", "", dial_address, "ADDRESS", "the server's control port; required"),
        Option("tunnel", "local", "", dial_address, "ADDRESS", "the local service, host:port"),
        Option("tunnel", "remote-port", "0", parse_port, "PORT", "the public port; 0: the server chooses"),
        Option("tunnel", "forward", [], Mapping.parse, "PORT:HOST:PORT",
               "remote port and local service, instead of the two above; repeatable, in a file a list [a, b]", True),
        Option("tunnel", "reconnect-max", "30", seconds, "SECONDS", "the longest wait between two attempts"),
        *LOG_OPTIONS,
    ],
}
# fmt: on


class ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """Flat `key = value` lines; a key that no option has is an error that names the file."""

    command = ""  # each command has a subclass

    def parse(self, stream: TextIO) -> dict[str, Any]:
        settings: dict[str, Any] = super().parse(stream)
        for key in settings:
            if not any(key == option.name for option in OPTIONS[self.command]):
                raise configargparse.ConfigFileParserException(f"{stream.name}: unknown key {key!r}; --help lists all")
        return settings


class CommandParser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Errors are one sentence on stderr, and status 2."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"{self.prog}: {' '.join(message.split())}\n")
        sys.exit(2)


def add_command(commands: Any, command: str, summary: str) -> None:
    parser = commands.add_parser(
        command, help=summary, description=summary, allow_abbrev=False, auto_env_var_prefix="RTUNNEL_",
        config_file_parser_class=type("ConfigFile", (ConfigFile,), {"command": command}),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        add_env_var_help=False, add_config_file_help=False,
        epilog="Flags win over the environment (RTUNNEL_..., as RTUNNEL_LOG_LEVEL), the environment over the file.",
    )  # fmt: skip
    parser.add_argument("-c", "--config", is_config_file=True, metavar="FILE", help="a file of key = value lines")
    parser.add_argument(
        "--print-config", action="store_true", help="show each setting and where it came from, and exit"
    )
    groups: dict[str, Any] = {}
    for option in OPTIONS[command]:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        action = "append" if option.repeatable else "store"
        groups[option.group].add_argument(f"--{option.name}", default=option.default, type=option.parse,
            metavar=option.metavar, help=option.help, action=action)  # fmt: skip
    parser.set_defaults(parser=parser, command=command)


def make_server(settings: argparse.Namespace) -> Server:
    if settings.control_listen is None:
        raise ConfigError("--control-listen must not be empty: write host:port or :port")
    return Server(settings.control_listen, settings.public_listen, settings.public_bind)


def make_client(settings: argparse.Namespace) -> Client:
    if not settings.server:
        raise ConfigError("--server is required: write the server's host:port")
    if bool(settings.local) == bool(settings.forward):
        raise ConfigError("either --local (with --remote-port) or --forward is required, and not both")
    if settings.forward and settings.remote_port:
        raise ConfigError("--remote-port belongs to --local: in --forward the remote port stands first")
    mappings = settings.forward or [Mapping(settings.remote_port, settings.local)]
    return Client(settings.server, mappings, settings.reconnect_max)


def run(program: Server | Client) -> int:
    """Run until SIGINT, SIGTERM or Ctrl+Break; a second one ends at once."""
    asked = threading.Event()
    names: list[str] = []

    def on_signal(number: int, frame: types.FrameType | None) -> None:
        if asked.is_set():
            os._exit(1)
        names.append(signal.Signals(number).name)
        asked.set()

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    program.start()
    while not asked.wait(0.5):  # in steps: on Windows a wait without end hides the signal
        pass
    log_event(INFO, "stopping", signal=names[0])
    program.stop()
    log_event(INFO, "stopped")
    return 0


def raise_descriptor_limit() -> None:
    """To the hard limit: each stream holds one descriptor."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with contextlib.suppress(ValueError, OSError):  # macOS refuses "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    top = CommandParser(prog="rtunnel", description="A reverse port-mapping tunnel.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"rtunnel {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="server|client", parser_class=CommandParser)
    add_command(commands, "server", "open public ports for clients")
    add_command(commands, "client", "make a local service reachable through a server")
    settings = top.parse_args(arguments)
    if settings.print_config:
        print(settings.parser.format_values(), end="")
        return 0
    start_log(settings.log_level)
    threading.stack_size(STACK_BYTES)
    raise_descriptor_limit()
    try:
        return run(make_server(settings) if settings.command == "server" else make_client(settings))
    except ConfigError as error:
        return settings.parser.error(str(error))  # type: ignore[no-any-return]
    except RtunnelError as error:
        log_event(ERROR, "failed", reason=error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
