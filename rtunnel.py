#!/usr/bin/env python3
# ruff: noqa: E402  # signals are held back before the slow imports
"""rtunnel: a reverse TCP tunnel in blocking Python.

A client behind NAT dials out to a public server and holds one control connection to it. The server
opens public ports for the client. Each visitor's connection crosses the control connection as
frames (PROTOCOL.md) and reaches a local service beside the client.

The promise: from this file a reader can say which bytes may arrive, which thread handles them, how
much memory they can cost, and which lock guards what; and from rtunnel_tls.py, why a peer that is
not post-quantum, or not known, never gets past the handshake.

Threads
-------
A thread is known by the function that it begins in. It waits in the functions of the last column
and nowhere else; `*` marks what takes a rare case. A test holds the program to both tables.

    thread           how many        does (begins in)               may wait in
    main             1               signals, reload, drain and     heard, LogHandler.__init__,
                                     stop (main)                    Listener.__init__, Clock.start,
                                                                    tell_systemd, LogHandler.finish
    clock            1               what happens later; never      Clock._run
                                     waits in an action
                                     (Clock._run)
    log              1               writes the log's lines         LogHandler._write
                                     (LogHandler._write)
    acceptor         1 a port,       takes control connections,     Listener.get_request,
                     and more        visitors or scrapes; serves     Listener._has_successor*
                                     it as one of the next rows
                                     (Listener.serve_forever)
    session reader   1 a session     the handshake; then decodes    PlainTransport.receive_into,
                                     and dispatches frames, writes  PlainTransport.send,
                                     none, dials nobody             Session.run,
                                     (Server.serve_control,         OriginalStream.feed
                                     ClientSession.run)
    control sender   1 a session     control frames, and what       Writer.serve,
                                     pumps left; the end            PlainTransport.send
                                     (Session._send_control)
    mapping          1 a mapping     dials the server, shakes       Client._run_mapping, dial,
                     and server, at  hands, waits for the           Client._connect, Client._serve,
                     the client      session's end                  PlainTransport.receive_into,
                                     (Client._run_mapping)          PlainTransport.send,
                                                                    HttpProxy.dial,
                                                                    ProxyAnswer.readinto
    stream pump      0 or 1 a        the dial (client); socket to   dial, ClientSession._dial_local,
                     stream          frames                         PumpedStream._receive,
                                     (Server.serve_visitor,         PumpedStream._wait_for_credit,
                                     PumpedStream.run)              Lease.choose,
                                                                    Writer.send, PlainTransport.send
    scrape           1 a scrape, at  answers with the figures       Metrics.serve
                     --metrics       (Metrics.serve)
    stream drainer   0 or 1 a        queue to socket                Stream._drain
                     stream          (Stream._drain)
    idle worker      what was        waits for the next task        Pool._work
                     needed, 20 s    (Pool._work)

Locks
-----
Each is held for a few statements, and nobody waits under one, but for the file of SSLKEYLOGFILE.

    lock                            guards                         under it may be taken
    Program._lock                   sessions; at the server        Writer._lock, scheduler._lock,
                                    leases, strangers, visitors    PlainTransport._lock, Pool._lock,
                                                                   Listener._lock, Event._cond
    Session._lock                   streams, ids, timers,          Writer._lock, scheduler._lock,
                                    the cause of the end           Event._cond, Metrics._lock
    Stream._lock                    its queue, windows and state,  Writer._lock, Budget._lock,
                                    and the calls on its socket    Pool._lock
    Writer._lock                    what is queued, who writes     -
    LogHandler.lock                 a line on its way to a queue   Queue.mutex
    TlsTransport._lock              the SSL object, while OpenSSL  rtunnel_tls._appending
                                    computes
    Budget._lock, Pool._lock,       a number; the idle; counts;    -
    LimitLog._lock, Metrics._lock,  that no descriptor is shut
    PlainTransport._lock,           when it is closed; a line of
    Listener._lock,                 the file that SSLKEYLOGFILE
    rtunnel_tls._appending          names
    scheduler._lock, Event._cond,   the library's: the clock's     -
    Semaphore._cond, Queue.mutex    heap; events; semaphores; the
                                    log's queue

Whoever ends the last of a stream closes its socket: `Stream._close_if_done`.
A field below `# guarded by` is used under that lock, and a `_locked` method is called under it.
Where a read says `without the lock`, it reads one reference or number, which is whole with the GIL
and without it; and that is final once it is set, or who sets it wakes the reader, or the reader
looks again under the lock before it waits.

Errors
------
    RtunnelError
    +-- ConfigError      wrong usage, configuration or file: exit status 2
    +-- ProtocolError    the peer broke a rule of PROTOCOL.md: its session ends
    +-- Refused          the server will not serve this client: code and sentence
    +-- SessionEnded     this session has ended; carries the first cause
    +-- NoThread         no thread can be had, or the program stops

Exit status: 0 stopped as asked; 1 failed; 2 wrong usage, configuration or file; 3 the server
refused for good.
"""

from __future__ import annotations

import os
import signal
import sys

STOP_SIGNALS = ("SIGINT", "SIGTERM", "SIGBREAK")
SIGNALS = (*STOP_SIGNALS, "SIGHUP", "SIGUSR1")
HELD = {getattr(signal, name) for name in SIGNALS if hasattr(signal, name)}

if os.path.basename(sys.argv[0]) in ("rtunnel", "rtunnel.py") and hasattr(signal, "pthread_sigmask"):
    # As a program: a signal that comes during the imports, a quarter of a second, waits for main.
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD)

import _thread
import argparse
import base64
import collections
import contextlib
import dataclasses
import enum
import errno
import functools
import http.client
import ipaddress
import itertools
import json
import logging
import queue
import random
import re
import sched
import secrets
import select
import selectors
import socket
import socketserver
import struct
import textwrap
import threading
import time
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from logging import DEBUG, ERROR, INFO, WARNING
from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar

try:
    import configargparse

    import rtunnel_tls
except ModuleNotFoundError as missing:
    sys.exit(f"rtunnel: {missing}; install it by `pip install .`, or `. .venv/bin/activate` where that was done")

__version__ = "0.1.0"


def release_signals() -> None:
    """Let those in that were held back during the imports."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HELD)


# ---- limits -----------------------------------------------------------------------------------

# Each with its reason and, in brackets, what enforces it. PROTOCOL.md has those that a peer sees.

# the wire
MAX_CONTROL_PAYLOAD_BYTES = 4 * 1024  # every frame but DATA; INIT needs some 300 [Decoder]
MAX_DATA_PAYLOAD_BYTES = 1024 * 1024  # accepted; decoding is cut-through: no memory [Decoder]
FRAME_SENT_BYTES = 64 * 1024  # 16 KiB: a third slower; 256 KiB: more latency [PumpedStream._pump]
MAX_STREAM_ID = 2**32 - 1  # ids rise and never wrap [ServerSession.open_stream]
MAX_UNKNOWN_FRAMES_BEFORE_INIT = 16  # a newer client may greet, nobody may babble [Decoder]
MAX_REASON_BYTES = 64  # of a CLOSE_CONN or GOAWAY; it goes into one log line [FrameType]
MAX_MESSAGE_CHARACTERS = 256  # of the sentence in a WELCOME, likewise [Welcome.parse]

# a session's memory
WINDOW_BYTES = 64 * 1024  # where a window starts; yamux: 256 KiB, 2.5 GB for 10,000 [Stream]
MAX_WINDOW_BYTES = 16 * 1024 * 1024  # to which it grows: 160 MB/s at 100 ms [growth]
NEAR_WINDOW_BYTES = 1024 * 1024  # the same near by: more would only stand in queues [growth]
LINK_BYTES_PER_S = 10**9  # what a round trip is taken to hold: 16 MiB from 17 ms on [growth]
MAX_CREDIT_BYTES = 2**31 - 1  # as in HTTP/2 (RFC 9113, section 6.9.1) [add_credit]
UNLIMITED = 2**62  # level 0: a window that never runs out [Session]; after INIT: unknown frames
SESSION_BUDGET_BYTES = 64 * 1024 * 1024  # what a session's windows grow by, unless set [Budget]
BUDGET_SHARE = 4  # a window gets a quarter of what is left, and so nobody all of it [Budget.take]
MAX_UNSENT_BYTES = 256 * 1024  # of control frames that the peer leaves unread [Writer.is_behind]
QUEUE_BYTES = 256 * 1024  # of DATA behind another thread's send; then pumps wait [Writer.send]
QUEUE_FRAMES = 1024  # the same for tiny frames: their objects cost more than their bytes [the same]
RECORD_BYTES = 16 * 1024  # of TLS: a frame that fills one waits for no others [Writer.send]
GROUP_FRAMES = 8  # that do: while all who can run did, the peer would stand still [the same]
FIRST_BUFFER_BYTES = 1024  # receive buffers start small, and grow: 10,000 idle [_pump, _read]
READER_BUFFER_BYTES = 256 * 1024  # one large receive holds many frames [Session._read]
READER_FRAMES = 256  # dispatched in one go: tiny ones would keep all others waiting [the same]
DRAIN_BYTES = 256 * 1024  # in one send of a drainer, which holds its stream's lock [ByteQueue]
UNSENT_BYTES = 128 * 1024  # in the kernel (TCP_NOTSENT_LOWAT): small frames wait behind it [tune]
LEVEL_0_QUEUE_BYTES = 1024 * 1024  # of a stream: level 0 has no credit [OriginalStream]
LEVEL_0_WAIT_S = 20.0  # the reader's, for one stream's full queue; all others wait too [the same]

# how many
MAX_STRANGERS = 256  # no client yet: up to 1.6 MB each (TLS); sshd: 100 [Server.serve_control]
MAX_CLIENTS = 256  # each may cost its budget [Server._find_lease_locked]
MAX_LEASES = 64  # of one identity: a port, ACCEPTORS threads, a listen queue each [the same]
MAX_ASSIGNED_PORTS = 1024  # of instances, remembered [Server._bind_free_locked]
MAX_STREAMS = 16384  # of a process: a descriptor, up to two threads each [Server, ClientSession]
MAX_SESSION_STREAMS = 12288  # so that no client's visitors take all places [Lease.choose]
MAX_RETIRED = 8  # sessions of a client beyond its mappings, after GOAWAYs [ClientSession]
MAX_OPENING = 8  # control connections that a client opens at a time at a server [Client._connect]
LISTEN_BACKLOG = 1024  # that wait to be accepted, in the kernel [Listener]
ACCEPTORS = 8  # that wait at a port: the more, the fewer are fetched from the pool [Listener]
LOG_LINES = 10_000  # that wait to be written; then lines are lost, and counted [LogHandler]

# how long
HELLO_TIMEOUT_S = 10.0  # from accept to INIT; the original's has no end [Server.serve_control]
SILENT_CLIENT_S = 2.0  # without INIT: the original's way to join a global port [Server]
CONNECT_TIMEOUT_S = 10.0  # to the server, all its addresses together [dial]
DIAL_TIMEOUT_S = 5.0  # to a local service, the same; the original's value [dial]
NEXT_ADDRESS_S = 0.25  # until the next address is tried too (RFC 8305, section 5) [dial]
LIVED_S = 10.0  # a session that lasts so long without a word is mostly open [ClientSession]
HEARTBEAT_S = 15.0  # unless set; yamux: 30 s [Session._beat]
HEARTBEATS_TO_DEATH = 3  # without a byte received [Session._check_alive]
MAX_PINGS = 1024  # that may be unanswered: four hours of heartbeats [Session]
WRITE_TIMEOUT_S = 30.0  # level 1, twice that where a send has begun; yamux: 10 s [limit_write]
FAREWELL_S = 1.0  # from a session's end until its transport is shut, read or not [Session.end]
WATCH_S = 1.0  # between looks for a reset: the clock's, a pump's without credit [Session._sweep]
DRAIN_STEP_S = 0.5  # between a waiting drainer's, or polled pump's, looks for an abort [Stream]
LINGER_S = 5.0  # level 0: from FIN to close, which could eat our last bytes [OriginalStream]
STALL_S = 5.0  # a queue that has not moved for so long gives its growth back [Stream.sweep]
STUCK_S = 600.0  # without a byte, of a stream whose other direction has ended [Stream.sweep]
LEASE_LINGER_S = 5.0  # a port waits for its client's return: two attempts [Server.leave_lease]
FIRST_RETRY_S = 1.0  # a client's first wait; doubled up to --reconnect-max [Backoff]
REFUSED_RETRY_S = 2.0  # at most, where the host answers and its port is closed: a restart [Backoff]
REPLACED_RETRY_S = 30.0  # after GOAWAY `replaced`: no loop of clones [Client._serve]
KEEPALIVE_IDLE_S, KEEPALIVE_INTERVAL_S, KEEPALIVE_PROBES = 30, 10, 3  # TCP's own: 60 s [tune]
SCRAPE_S, MAX_SCRAPES = 5.0, 8  # one wait of a scrape, and how many at a time [Metrics.serve]
ACCEPT_PAUSE_S = 0.25  # after an accept without descriptors: the acceptor would spin [Listener]
POOL_IDLE_S = 10.0  # to twice that a thread waits for work: a crowd's end one by one [Pool]
STACK_BYTES = 256 * 1024  # of a thread; smaller saves no memory, overflow is SIGSEGV [run_program]
SWITCH_S = 0.1  # Python's 5 ms: 10,000 threads that wake would only ask for the GIL [run_program]
LOG_EVERY_S, LOG_BURST = 1.0, 2  # lines of an event that strangers or visitors can cause [LimitLog]
CLOCK_RETRY_S = 10.0  # a start whose certificates are not valid yet is tried again [run]
STEP_S = 0.5  # the longest wait of main (Windows: no signal wakes it); outside Linux, in accept
STOP_TIMEOUT_S = 1.3  # of the whole stop: the farewell, and a little more [run]
LOG_FLUSH_S = 0.5  # of the log's last lines: a pipe that nobody reads must not keep us [LogHandler]
EXPIRY_CHECK_S = 86_400.0  # a look at the days that certificates have left [Program]

REPLACED = "replaced"  # the GOAWAY to a session whose holder has a newer one
FINAL_REFUSALS = {"bad-request", "port-denied"}  # trying again would not help


# ---- errors -----------------------------------------------------------------------------------


class RtunnelError(Exception):
    """The root of what this module raises."""


class ConfigError(RtunnelError, argparse.ArgumentTypeError):
    """Wrong usage, configuration or file; says what to do. argparse puts the option before it."""


class ProtocolError(RtunnelError):
    """The peer broke a rule of PROTOCOL.md; the message names the rule's limit."""


class Refused(RtunnelError):
    """The server will not serve this client; a code of PROTOCOL.md and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code, self.message = code, message


class SessionEnded(RtunnelError):
    """The session has ended; the message is the first cause."""


class NoThread(RtunnelError):
    """No thread can be had: the system has no more, or the program stops."""


# ---- wire: addresses and frames; no socket, thread, clock or log (PROTOCOL.md, sections 2, 3) ----

# A host name or an IPv4 address. In a label: printable ASCII but '.', ':', '\', square brackets.
HOST = r"([!-\-/-9;-Z^-~]{1,63}(\.|$))+"


class Address(NamedTuple):
    """A host (a name or an address; empty: all interfaces) and a TCP port."""

    host: str
    port: int

    @property
    def shown_host(self) -> str:
        """An IPv4-mapped address as IPv4, and without a zone."""
        return self.host.removeprefix("::ffff:") if "." in self.host else self.host.partition("%")[0]

    @property
    def site(self) -> str:
        """Whose connections count together: an IPv4 address, or an IPv6 network of 64 bits."""
        address = ipaddress.ip_address(self.shown_host)
        return str(address if address.version == 4 else ipaddress.ip_network((address, 64), strict=False))

    @property
    def is_loopback(self) -> bool:
        with contextlib.suppress(ValueError):
            return ipaddress.ip_address(self.shown_host).is_loopback
        return self.host == "localhost"

    def __str__(self) -> str:
        host = self.shown_host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @classmethod
    def parse(cls, text: str, *, listen: bool = False) -> Address:
        """`host:port`, `[v6]:port`; with `listen` also `:port`. Raises ConfigError."""
        host, colon, port = text.rpartition(":")
        try:
            if bracketed := re.fullmatch(r"\[(.+)\]", host):
                host = bracketed[1]
                ipaddress.IPv6Address(host)
            elif host == "*" or not (re.fullmatch(HOST, host) or (listen and colon and not host)):
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


HEADER = struct.Struct(">BII")  # type, stream, payload length
HEADER_BYTES = HEADER.size
U32 = struct.Struct(">I")


class FrameType(enum.IntEnum):
    """What is known, and what makes it legal (PROTOCOL.md, section 2); any other is skipped."""

    level: int  # the lowest one that has it
    sender: str
    on_stream: bool  # its id is a stream's; else 0
    lengths: range  # of the payload in bytes; checked at level 1, the original ignores some
    handler: str  # a method of Stream or, on the control connection, Session

    def __new__(cls, value: int, level: int, sender: str, on_stream: bool, longest: int, handler: str) -> FrameType:
        self = int.__new__(cls, value)
        self._value_, self.level, self.sender, self.on_stream, self.handler = value, level, sender, on_stream, handler
        self.lengths = range(longest + 1) if longest > 8 else range(longest, longest + 1)
        return self

    # fmt: off
    NEW_CONN   = 0x01, 0, "server", True,  MAX_REASON_BYTES,          "on_new_conn"
    DATA       = 0x02, 0, "both",   True,  MAX_DATA_PAYLOAD_BYTES,    "feed"
    CLOSE_CONN = 0x03, 0, "both",   True,  MAX_REASON_BYTES,          "close_received"
    INIT       = 0x04, 0, "client", False, MAX_CONTROL_PAYLOAD_BYTES, "on_init"
    WELCOME    = 0x05, 0, "server", False, MAX_CONTROL_PAYLOAD_BYTES, "on_welcome"
    WINDOW     = 0x06, 1, "both",   True,  4,                         "window_received"
    EOF        = 0x07, 1, "both",   True,  0,                         "end_received"
    PING       = 0x08, 1, "both",   False, 8,                         "on_ping"
    PONG       = 0x09, 1, "both",   False, 8,                         "on_pong"
    GOAWAY     = 0x0A, 1, "both",   False, MAX_REASON_BYTES,          "on_goaway"
    BLOCKED    = 0x0B, 1, "both",   True,  0,                         "blocked_received"
    # fmt: on


KNOWN = {int(kind): kind for kind in FrameType}
DATA = int(FrameType.DATA)  # a plain int: compared once for each part
SPEAKS_TLS = "the peer speaks TLS and this end does not: start both with --tls, or both without"


class Frame(NamedTuple):
    """A whole frame that is not DATA. Of an unknown type the payload is not kept."""

    type: int
    stream: int
    payload: bytes


class DataPart(NamedTuple):
    """A part of a DATA frame's payload, valid until the next event; `remaining` bytes follow."""

    stream: int
    part: memoryview
    remaining: int


def encode(kind: int, stream: int, payload: bytes = b"") -> bytes:
    """The bytes of one frame (PROTOCOL.md, section 2)."""
    return HEADER.pack(kind, stream, len(payload)) + payload


def check(frame: Frame, *, level: int, role: str) -> None:
    """Raises ProtocolError where a `role` must not receive such a frame at that level."""
    kind, length = KNOWN[frame.type], len(frame.payload)
    if kind.sender == role:
        raise ProtocolError(f"{kind.name} is not for a {role} to receive")
    if kind.level > level:
        raise ProtocolError(f"{kind.name} at level {level}")
    if level and (kind.on_stream != bool(frame.stream) or length not in kind.lengths):
        raise ProtocolError(f"{kind.name} with id {frame.stream} and {length} bytes of payload")


class Decoder:
    """Turns whatever bytes have arrived into events. No DATA payload is ever assembled.

    Threads: the session reader; the clock asks for what is unknown or has begun.
    Memory: at most a header and MAX_CONTROL_PAYLOAD_BYTES that have arrived; an announced length
    allocates nothing. After a ProtocolError it is at the same header, and repeats the error.
    """

    def __init__(self) -> None:
        self.unknown_frames = 0
        self.unknown_limit = UNLIMITED
        self._header = bytearray()  # of a header that is cut off
        self._payload = bytearray()  # of a control frame that is cut off
        self._type = 0
        self._stream = 0
        self._remaining = 0  # payload bytes that have yet to arrive

    def is_inside_control(self) -> bool:
        """Whether a header, or a frame that is not DATA, has begun and not ended."""
        return bool(self._header) or (self._remaining > 0 and self._type != DATA)

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame | DataPart]:
        """The events in `data`, in order. Raises ProtocolError for what is over its limit."""
        view = memoryview(data)
        position, end = 0, len(view)
        while position < end:
            if not self._remaining:
                header = view[position : position + HEADER_BYTES - len(self._header)]
                position += len(header)
                self._header += header
                # A TLS record where a frame begins: alert or handshake (RFC 8446, 5.1).
                if self._header.startswith((b"\x15\x03", b"\x16\x03")):
                    raise ProtocolError(SPEAKS_TLS)
                if len(self._header) < HEADER_BYTES:
                    return
                kind, stream, length = HEADER.unpack(self._header)
                limit = MAX_DATA_PAYLOAD_BYTES if kind == DATA else MAX_CONTROL_PAYLOAD_BYTES
                if length > limit:
                    raise ProtocolError(f"frame type {kind:#04x} announces {length} bytes, the limit is {limit}")
                if kind not in KNOWN:
                    self.unknown_frames += 1
                    if self.unknown_frames > self.unknown_limit:
                        raise ProtocolError(f"over {self.unknown_limit} unknown frames before INIT")
                self._type, self._stream, self._remaining = kind, stream, length
                self._header.clear()
            part = view[position : position + self._remaining]
            position += len(part)
            self._remaining -= len(part)
            if self._type == DATA:
                if part or not self._remaining:
                    yield DataPart(self._stream, part, self._remaining)
            else:
                if self._type in KNOWN:
                    self._payload += part
                if not self._remaining:
                    payload = bytes(self._payload)
                    self._payload.clear()
                    yield Frame(self._type, self._stream, payload)


def key_values(lines: str) -> dict[str, str]:
    """`key=value` lines; of a key that comes twice the last counts."""
    return dict(line.split("=", 1) for line in lines.split("\n") if "=" in line)


def number(text: str | None, lowest: int, highest: int) -> int:
    """Raises ProtocolError unless the text is such a number."""
    if text is None or not re.fullmatch(r"[0-9]{1,10}", text) or not lowest <= int(text) <= highest:
        raise ProtocolError(f"{(text or '')[:32]!r} is no number from {lowest} to {highest}")
    return int(text)


class Init(NamedTuple):
    """What an INIT frame asks for (PROTOCOL.md, section 3)."""

    port: int
    local: str  # the local service as the client names it: for the log only
    instance: str = ""  # 128 random bits in hex; empty: unknown
    version: int = 0
    window: int = WINDOW_BYTES
    takeover: bool = True  # from a session of the same holder that lives

    @classmethod
    def parse(cls, payload: bytes) -> Init:
        """Raises Refused where a client of level 1 can be told what is wrong, or ProtocolError."""
        first, _, lines = payload.decode("utf-8", "surrogateescape").partition("\n")
        pairs = key_values(lines)
        port, colon, local = first.partition(":")
        try:
            if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
                raise ProtocolError(f"INIT is {first[:32]!r}, PORT:LOCAL is wanted")
            init = cls(number(port, 0, 65535), local)
            if "version" not in pairs:
                return init
            payload.decode("utf-8")
            if not re.fullmatch(r"[0-9a-f]{32}", instance := pairs.get("instance", "")):
                raise ProtocolError("instance is not 32 hexadecimal digits")
            window, version = number(pairs.get("window"), 1, MAX_CREDIT_BYTES), number(pairs["version"], 1, 2**31)
            return cls(init.port, local, instance, version, window, pairs.get("takeover") != "no")
        except UnicodeDecodeError as error:
            raise Refused("bad-request", "INIT is not UTF-8") from error
        except ProtocolError as error:
            if "version" not in pairs:
                raise
            raise Refused("bad-request", str(error)) from error

    def payload(self) -> bytes:
        lines = f"\nversion={self.version}\nwindow={self.window}\ninstance={self.instance}" if self.version else ""
        lines += "" if self.takeover else "\ntakeover=no"
        return f"{self.port}:{self.local}{lines}".encode("ascii")


class Welcome(NamedTuple):
    """The server's answer to an INIT of level 1 (PROTOCOL.md, section 3)."""

    port: int
    window: int = WINDOW_BYTES

    @classmethod
    def parse(cls, payload: bytes) -> Welcome:
        """Raises Refused where the server refuses, ProtocolError where it says nothing known."""
        try:
            pairs = key_values(payload.decode("utf-8"))
        except UnicodeDecodeError:
            raise ProtocolError("WELCOME is not UTF-8") from None
        if "error" in pairs:
            raise Refused(pairs["error"], pairs.get("message", "")[:MAX_MESSAGE_CHARACTERS])
        number(pairs.get("version"), 1, 1)
        return cls(number(pairs.get("port"), 1, 65535), number(pairs.get("window"), 1, MAX_CREDIT_BYTES))

    def payload(self) -> bytes:
        return f"version=1\nport={self.port}\nwindow={self.window}".encode("ascii")


def parse_visitor(payload: bytes) -> Address:
    """NEW_CONN's visitor at level 1. Raises ProtocolError."""
    try:
        address = Address.parse(payload.decode("ascii"))
        host = ipaddress.ip_address(address.host)
        if isinstance(host, ipaddress.IPv6Address) and (host.ipv4_mapped or host.scope_id):
            raise ValueError
    except (ConfigError, ValueError):
        raise ProtocolError(f"NEW_CONN says that the visitor is {payload!r}") from None
    return address


def proxy_line(visitor: Address | None, public: Address) -> bytes:
    """A PROXY protocol header (haproxy's proxy-protocol.txt, 2.1). `visitor` None: unknown."""
    if visitor is None:
        return b"PROXY UNKNOWN\r\n"
    hosts = [ipaddress.ip_address(visitor.shown_host), ipaddress.IPv4Address(0)]
    with contextlib.suppress(ValueError):  # a server that only a proxy has looked up
        hosts[1] = ipaddress.ip_address(public.shown_host)
    family = max(host.version for host in hosts)
    # One header has one family. An IPv4 address beside an IPv6 one is written mapped, in groups of
    # hexadecimal digits: the specification has no other form.
    texts = [f"::ffff:{host.packed.hex(':', 2)}" if host.version < family else str(host) for host in hosts]
    return f"PROXY TCP{family} {texts[0]} {texts[1]} {visitor.port} {public.port}\r\n".encode("ascii")


# ---- windows: arithmetic alone (PROTOCOL.md, section 7) ---------------------------------------


def add_credit(credit: int, count: int) -> int:
    """What may be sent after a WINDOW of so many. Raises ProtocolError for 0 and an overflow."""
    if not count or credit + count > MAX_CREDIT_BYTES:
        raise ProtocolError(f"WINDOW of {count} on top of {credit}, the limit is {MAX_CREDIT_BYTES}")
    return credit + count


class ReceiveWindow:
    """The bytes of DATA that the peer may still send on one stream. Locking: its stream's.

    Invariant: bytes queued + credit + owed == size + debt, until the stream's end.
    """

    def __init__(self, size: int) -> None:
        self._first_size = size
        self.size = size
        self.credit = size  # what the peer holds
        self.owed = 0  # bytes that have left for the socket and are not yet granted again
        self.debt = 0  # a growth that was taken back: withheld from what leaves next

    @property
    def grown(self) -> int:
        """What this window may cost above its first size: its share of the session's budget."""
        return self.size + self.debt - self._first_size

    def receive(self, count: int) -> None:
        """Raises ProtocolError where the peer has not had that much credit."""
        if count > self.credit:
            raise ProtocolError(f"{count} bytes of DATA, the credit was {self.credit}")
        self.credit -= count

    def drain(self, count: int) -> tuple[int, int]:
        """Bytes have left for the socket. Returns what to grant now, and what of a debt is paid."""
        paid = min(count, self.debt)
        self.debt -= paid
        self.owed += count - paid
        # From half a window on: a WINDOW for each small DATA would double the frames.
        return (self.grow(0) if 2 * self.owed >= self.size else 0), paid

    def growth(self, rtt_s: float | None = None) -> int:
        """How much is wanted: to the double, at most to what a fast link holds in a round trip."""
        far = MAX_WINDOW_BYTES if rtt_s is None else int(LINK_BYTES_PER_S * rtt_s)  # None: unknown
        limit = min(max(NEAR_WINDOW_BYTES, far), MAX_WINDOW_BYTES)
        return 0 if self.debt else min(self.size, max(0, limit - self.size))

    def grow(self, count: int) -> int:
        """Returns what to grant: the growth and all that is owed."""
        self.size += count
        grant, self.owed = self.owed + count, 0
        self.credit += grant
        return grant

    def shrink(self) -> None:
        """Take the growth back. The peer holds it as credit, so it becomes a debt."""
        self.debt += self.size - self._first_size
        self.size = self._first_size


# ---- plumbing: budget, time, log, threads, sockets --------------------------------------------


class Budget:
    """What all windows of a session may grow by.

    Credit that a peer holds cannot be taken back, so an idle stream keeps its growth. Nobody may
    therefore take all: with 64 MiB five streams get 16, 12, 9, 7 and 5 MiB, and a sixth 4.
    Threads: any. Locking: `_lock`, under which no other is taken.
    """

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        # guarded by _lock
        self.left = limit  # read without it for the log

    def take(self, wanted: int, grown: int) -> int:
        """For a window that has grown by `grown`: its share, at most what it wants."""
        with self._lock:
            taken = max(0, min(wanted, (self.left + grown) // BUDGET_SHARE - grown))
            self.left -= taken
            return taken

    def give(self, count: int) -> None:
        with self._lock:
            self.left += count


def deadline(seconds: float) -> Callable[[], float]:
    """One limit that several blocking steps spend together: it tells the seconds left, or 0."""
    end = time.monotonic() + seconds
    return lambda: max(0.0, end - time.monotonic())


class Clock:
    """What happens later, of the whole process, in one thread.

    Actions hold no lock when they are called, and never wait: one that did would stop all others.
    Threads: any. The thread is a daemon, and lives as long as the process.
    """

    def __init__(self) -> None:
        self._scheduler = sched.scheduler(time.monotonic)  # which has a lock of its own
        self._changed = threading.Event()  # an event has been entered
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Before the first `after`. Does nothing where it runs already."""
        if self._thread is None:  # made here: Python 3.13.0 starts none of before a fork
            self._thread = threading.Thread(target=self._run, name="clock", daemon=True)
            self._thread.start()

    def after(self, seconds: float, action: Callable[[], object]) -> sched.Event:
        """Call it then. Returns what `cancel` takes."""
        event = self._scheduler.enter(seconds, 0, action)
        self._changed.set()
        return event

    def cancel(self, event: sched.Event) -> None:
        """Forget it; where it has been called, or is being called, that stands."""
        with contextlib.suppress(ValueError):
            self._scheduler.cancel(event)

    def _run(self) -> None:
        while True:
            self._changed.clear()  # before the look: what is entered from now on ends the wait
            try:
                self._changed.wait(self._scheduler.run(blocking=False))
            except Exception:  # the clock's safety net: the other actions go on
                log_internal_error()


CLOCK = Clock()

LOG = logging.getLogger("rtunnel")
logging.logThreads = False  # no line names a thread; those of the pool have no threading.Thread
PLAIN_VALUE = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII but space, quote, '=' and backslash


def log_event(level: int, event: str, /, **pairs: object) -> None:
    """One line: the event and its `key=value` pairs, escaped, so that no peer can forge a line."""
    if LOG.isEnabledFor(level):
        LOG.log(level, "%s", " ".join([event, *(f"{k}={quoted(v)}" for k, v in pairs.items())]))


def quoted(value: object) -> str:
    text = f"{value:.3f}" if isinstance(value, float) else str(value)
    return text if PLAIN_VALUE.fullmatch(text) else json.dumps(text)


class LimitLog:
    """Lines that strangers and visitors can cause: of each event at most LOG_BURST a second.

    Those beyond are counted, and the count is told when the second is over.
    Threads: any. Locking: `_lock` guards everything below the marker.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # guarded by _lock
        self._counts: dict[str, int] = {}  # by event, in the second that began with its first line

    def __call__(self, event: str, /, **pairs: object) -> None:
        with self._lock:
            count = self._counts[event] = self._counts.get(event, 0) + 1
        if count == 1:
            CLOCK.after(LOG_EVERY_S, lambda: self._tell(event))
        if count <= LOG_BURST:
            log_event(WARNING, event, **pairs)

    def _tell(self, event: str) -> None:
        with self._lock:
            held_back = self._counts.pop(event) - LOG_BURST
        if held_back > 0:
            log_event(WARNING, event, more_like_it=held_back)


log_limit = LimitLog()


def log_internal_error() -> None:
    """The exception that is being handled, as one line: its text may hold what a peer sent."""
    log_event(ERROR, "internal-error", traceback=traceback.format_exc())


class LogHandler(logging.Handler):
    """Leaves the lines to one more thread, which writes them to stderr, and alone may wait.

    Where stderr takes nothing (a pipe that nobody reads, a full disk) lines are lost, and counted.
    Threads: any; `_write` is the log's own. Locking: that of logging.Handler.
    """

    def __init__(self, level: str) -> None:
        """From now on it is the log: UTC time, level, event, pairs."""
        super().__init__()
        self.formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s\n", "%Y-%m-%dT%H:%M:%S")
        self.formatter.converter = time.gmtime
        self._lines: queue.Queue[str | None] = queue.Queue(LOG_LINES)
        self.dropped = 0  # where the queue was full
        self.failed = 0  # in a write
        self._thread = threading.Thread(target=self._write, name="log", daemon=True)
        self._thread.start()
        LOG.handlers[:] = [self]
        LOG.propagate = False
        LOG.setLevel(level.upper())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        """Write the rest, as far as it goes in LOG_FLUSH_S."""
        remaining = deadline(LOG_FLUSH_S)
        with contextlib.suppress(queue.Full):
            self._lines.put(None, timeout=LOG_FLUSH_S)
            self._thread.join(remaining())

    def _write(self) -> None:
        told = 0
        for line in iter(self._lines.get, None):
            try:
                sys.stderr.write(line)
                if lost := self.dropped + self.failed - told:
                    about = LOG.makeRecord(LOG.name, WARNING, "", 0, f"log-lines-lost count={lost}", (), None)
                    sys.stderr.write(self.format(about))
                    told += lost
            except Exception:  # the line is lost
                self.failed += 1


Task = Callable[[], object]  # without arguments: `task(*args)` costs each thread 400 bytes of stack
Inbox = queue.SimpleQueue[Task]  # of a pool's thread


class Pool:
    """Threads that are reused: a new one for each task costs a tenth of the short connections.

    They are made by `_thread`: a threading.Thread costs 4 kB more, and its start is a wait.
    Threads: any. Locking: `_lock` guards everything below the marker.
    Invariant: an inbox is in `_idle` until somebody takes it out, who puts a task into it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # guarded by _lock
        self._idle: dict[Inbox, None] = {}  # the last is the first to work: its memory is warm
        self._closed = False

    def run(self, task: Task) -> None:
        """Run the task in a thread of its own. Never waits. Raises NoThread."""
        with self._lock:
            if self._closed:
                raise NoThread("stopping")
            new = not self._idle
            inbox = Inbox() if new else self._idle.popitem()[0]
        inbox.put(task)  # as an argument it would live as long as the thread
        if new:
            try:
                _thread.start_new_thread(self._work, (inbox,))
            except RuntimeError as error:
                raise NoThread(str(error)) from error

    def _work(self, inbox: Inbox) -> None:
        """A thread's life."""
        while True:
            try:
                task = inbox.get(timeout=POOL_IDLE_S * random.uniform(1, 2))
            except queue.Empty:
                with self._lock:
                    if inbox in self._idle:
                        del self._idle[inbox]
                        return
                continue  # one is on its way
            try:
                task()
            except Exception:  # the safety net of every thread: the others go on
                log_internal_error()
            del task  # an idle thread keeps nothing alive
            with self._lock:
                if self._closed:
                    return
                self._idle[inbox] = None

    def close(self) -> None:
        """No more tasks; the idle leave."""
        with self._lock:
            self._closed = True
            if self._idle:  # each wakes the next: thousands at once would all ask for the GIL
                self._idle.popitem()[0].put(self.close)


# A send that does not wait, on a socket that does: Linux alone has it. macOS ignores the flag, and
# Windows has none. There stream sockets are non-blocking, and pumps wait in steps of DRAIN_STEP_S.
DONT_WAIT: int | None = socket.MSG_DONTWAIT if sys.platform == "linux" else None

# To the end of the CPU's queue, without the GIL. Windows has no such call.
let_others_run: Callable[[], None] = getattr(os, "sched_yield", lambda: None)

NO_ROUTE = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


def tune(sock: socket.socket, **more: int) -> None:
    """Small messages at once, dead peers found. `more` are other options of TCP."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # urgent bytes are not dropped
    wanted = {
        "TCP_NODELAY": 1,
        "TCP_KEEPIDLE": KEEPALIVE_IDLE_S,
        "TCP_KEEPALIVE": KEEPALIVE_IDLE_S,  # the same on macOS
        "TCP_KEEPINTVL": KEEPALIVE_INTERVAL_S,
        "TCP_KEEPCNT": KEEPALIVE_PROBES,
    }
    for name, value in (wanted | more).items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def ready(socks: Iterable[socket.socket], *, writing: bool, seconds: float) -> list[socket.socket]:
    """Those that can be read or written, or have an error to tell; waits at most so long."""
    # select() ends at descriptor 1,023, and epoll is a descriptor more.
    kind = selectors.PollSelector if hasattr(select, "poll") else selectors.SelectSelector
    with kind() as selector:
        for sock in socks:
            selector.register(sock, selectors.EVENT_WRITE if writing else selectors.EVENT_READ, sock)
        return [key.data for key, _ in selector.select(seconds)]


def has_error(sock: socket.socket) -> bool:
    """Whether the peer has reset it, also behind unread bytes. False where poll cannot tell."""
    if not hasattr(select, "poll"):
        return False
    # Reading SO_ERROR would clear the error, and the next receive look like a clean end.
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def dial(address: Address, seconds: float) -> socket.socket:
    """Connect to the first of the host's addresses that answers, in `seconds` for all.

    The next address is tried when one has failed, or has not answered for 250 ms: it may swallow
    packets (RFC 8305, section 5). An address that is alone needs no selector: `connect` waits.
    Raises OSError; of a name's addresses it says what each said.
    """
    remaining = deadline(seconds)
    rows = numeric(address) or socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    families = [list(group) for _, group in itertools.groupby(rows, lambda row: row[0])]
    # In the resolver's order, but IPv6 and IPv4 by turns (section 4).
    untried = [row for some in itertools.zip_longest(*families) for row in some if row is not None]
    pending: dict[socket.socket, str] = {}
    said: dict[str, OSError] = {}
    try:
        while untried or pending:
            left = remaining()
            if untried:
                row = untried.pop(0)
                host = str(row[4][0])
                alone = not (untried or pending)
                try:
                    sock = connect(row, max(left, 0.001) if alone else 0.0)
                except OSError as error:
                    said[host] = error
                    continue
                if alone:
                    return sock
                pending[sock] = host
            for sock in ready(pending, writing=True, seconds=min(NEXT_ADDRESS_S, left) if untried else left):
                host, code = pending.pop(sock), sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return sock
                sock.close()
                said[host] = OSError(code, os.strerror(code))
            if not left:
                said |= dict.fromkeys(pending.values(), TimeoutError("timed out"))
                break
    finally:
        for sock in pending:
            sock.close()
    if numeric(address):
        raise said.popitem()[1]
    reasons = "; ".join(f"{host}: {reason_of(error)}" for host, error in said.items())
    reached = [each for each in said.values() if each.errno not in NO_ROUTE]
    refused = reached and all(isinstance(error, ConnectionRefusedError) for error in reached)
    raise OSError(errno.ECONNREFUSED if refused else errno.EHOSTUNREACH, reasons or f"{address.host} has no address")


@functools.lru_cache
def numeric(address: Address) -> Sequence[Any]:
    """The row of getaddrinfo for an address that is no name; none for a name."""
    with contextlib.suppress(socket.gaierror):
        if "%" not in address.host:  # an interface may come back with another number
            return socket.getaddrinfo(*address, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[:1]
    return ()


def connect(row: Any, seconds: float) -> socket.socket:
    """To a row of getaddrinfo. In 0.0 s it has only begun to. Raises OSError."""
    sock = socket.socket(*row[:3])
    try:
        tune(sock)
        sock.settimeout(seconds)
        with contextlib.suppress(*() if seconds else (BlockingIOError,)):
            sock.connect(row[4])
        sock.settimeout(None)
        own, there = sock.getsockname(), row[4]
        # Where nobody listens, and our own port is by chance the one that is dialled.
        if own[1] == there[1] and there[0] in (own[0], "0.0.0.0", "::"):
            reset_at_close(sock)
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    except OSError:
        sock.close()
        raise
    return sock


@dataclasses.dataclass(frozen=True)
class HttpProxy:
    """An HTTP proxy that leads to servers by CONNECT (RFC 9110, section 9.3.6)."""

    address: Address
    credentials: bytes = dataclasses.field(repr=False)  # user:password, or empty

    @classmethod
    def parse(cls, text: str) -> HttpProxy | None:
        """`http://[USER:PASSWORD@]HOST:PORT`. Raises ConfigError, which does not repeat it."""
        with contextlib.suppress(ConfigError, UnicodeEncodeError):
            if not text:
                return None
            if found := re.fullmatch(r"http://(?:(\S+:\S*)@)?([^\s@/]+)/?", text):
                return cls(Address.parse(found[2]), urllib.parse.unquote_to_bytes(found[1] or ""))
        raise ConfigError("write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, other letters as %40")

    def dial(self, server: Address, seconds: float) -> socket.socket:
        """A connection to a server, whose name the proxy looks up. Raises OSError: `proxy ...`."""
        remaining, sock = deadline(seconds), None
        lines = [f"CONNECT {server} HTTP/1.1", f"Host: {server}"]
        if self.credentials:
            lines.append(f"Proxy-Authorization: Basic {base64.b64encode(self.credentials).decode()}")
        try:
            sock = dial(self.address, seconds)
            sock.sendall("\r\n".join([*lines, "", ""]).encode())  # into an empty buffer
            answer = http.client.HTTPResponse(ProxyAnswer(sock, remaining), method="CONNECT")  # type: ignore[arg-type]
            answer.begin()
            if answer.status // 100 == 2:
                sock.settimeout(None)
                return sock
            reason = f"{answer.status} {answer.reason}"
            if answer.status in (401, 407):  # some say the one for a wrong password
                reason += ": wrong user or password" if self.credentials else ": it wants USER:PASSWORD"
            raise OSError(errno.EACCES, reason)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if sock is not None:
                sock.close()
            said = ("" if isinstance(error, OSError) else "it speaks no HTTP: ") + reason_of(error).strip()
            number = errno.ETIMEDOUT if isinstance(error, TimeoutError) else getattr(error, "errno", errno.EPROTO)
            raise OSError(number, f"proxy {self.address}: {said[:MAX_MESSAGE_CHARACTERS]}") from error


class ProxyAnswer(socket.SocketIO):
    """What http.client reads an answer from: until the deadline, and no byte beyond its header.

    It is asked for a byte at a time, since it has no buffer: what follows is the server's.
    """

    def __init__(self, sock: socket.socket, remaining: Callable[[], float]) -> None:
        super().__init__(sock, "r")
        self._limited, self._remaining = sock, remaining

    def makefile(self, _: str) -> ProxyAnswer:
        return self

    def flush(self) -> None:
        """Also of what is closed: Python 3.13 tells what fails in a finalizer."""

    def readinto(self, buffer: Any) -> int | None:
        if not (left := self._remaining()):
            raise TimeoutError
        self._limited.settimeout(left)
        return super().readinto(buffer)


def reset_at_close(sock: socket.socket, reset: bool = True) -> None:
    """Make `close` send RST, the kernel's too when the process is killed; at a clean end FIN."""
    linger = struct.pack("HH" if os.name == "nt" else "ii", reset, 0)  # u_short on Windows
    with contextlib.suppress(OSError):  # macOS: reset, or shut both ways, already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def reason_of(error: BaseException) -> str:
    """One short phrase for a log line."""
    unnamed = "timed out" if isinstance(error, TimeoutError) else type(error).__name__
    return (isinstance(error, OSError) and error.strerror) or str(error) or unnamed


class Listener(socketserver.ThreadingTCPServer):
    """A listening port, the control port and the public ones alike.

    An acceptor serves what it takes, and then waits for the next: nothing is handed on, which would
    wake a thread more. Before it serves it sees to it that another one waits.
    A connection's life: `serve_forever` calls `get_request`, which waits for it, `process_request`
    (`admit`: is it served? then `handle`), and that closes it (`left`) unless `handle` returns
    True: then the connection lives on, and its end is no more the listener's.
    Each override names the trap of socketserver that it is there for.
    Threads: `stop` from any; `admit`, `handle` and `left` are called by acceptors.
    Locking: `_lock` guards what is below the marker. It is held while the socket is shut or closed,
    as in PlainTransport. Invariant: until the stop an acceptor waits, or is on its way.
    """

    allow_reuse_address = os.name == "posix"  # Windows: it would let another program share the port
    request_queue_size = LISTEN_BACKLOG

    def __init__(
        self, address: Address, pool: Pool, handle: Callable[[socket.socket, Address], bool | None],
        admit: Callable[[Address], bool] = lambda peer: True, left: Callable[[], None] = lambda: None,
        *, reset: bool = False,
    ) -> None:  # fmt: skip
        """Bind, listen and accept; a name is resolved, which waits. `reset`: at close. OSError."""
        self._pool, self._handle, self._admit, self._left, self._reset = pool, handle, admit, left, reset
        self._asked_to_stop = threading.Event()
        host = address.host or ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
        self.address_family, *_, target = socket.getaddrinfo(host, address.port, type=socket.SOCK_STREAM)[0]
        super().__init__(target, socketserver.BaseRequestHandler)  # type: ignore[arg-type]  # never bytes
        self.address = Address(*self.socket.getsockname()[:2])
        self._lock = threading.Lock()
        # guarded by _lock
        self._waiting = 1  # acceptors that wait, or are on their way
        try:
            pool.run(self.serve_forever)
        except NoThread as error:
            self.socket.close()
            raise OSError(str(error)) from error

    def server_bind(self) -> None:
        """What is accepted inherits the options; on Windows nobody else gets our port."""
        if self.address_family == socket.AF_INET6:  # IPv4 beside it, where all interfaces are meant
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != "::")
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        tune(self.socket)
        reset_at_close(self.socket, self._reset)
        super().server_bind()
        if sys.platform != "linux":  # elsewhere a stop does not wake who accepts
            self.socket.settimeout(STEP_S)

    def stop(self) -> None:
        """No more connections. Never waits: on Linux the port is free, elsewhere within 0.5 s."""
        self._asked_to_stop.set()
        with self._lock, contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # Linux: wakes all acceptors

    def serve_forever(self, poll_interval: float = STEP_S) -> None:
        """An acceptor's life. A poll before each accept would wake all of them for one visitor."""
        while True:
            with self._lock:
                if self._waiting > ACCEPTORS or self._asked_to_stop.is_set():
                    self._waiting -= 1
                    if not self._waiting:
                        self.socket.close()
                    return
            self._handle_request_noblock()  # type: ignore[attr-defined]  # the socket blocks: it waits

    def get_request(self) -> tuple[socket.socket, Any]:
        """Without descriptors it would spin. On macOS who has gone has no address: a TypeError."""
        try:
            sock, (host, port, *_) = super().get_request()
            return sock, (host, port)
        except (OSError, TypeError, MemoryError) as error:  # also the stop, a step's end
            if isinstance(error, MemoryError) or getattr(error, "errno", 0) in OUT_OF_RESOURCES:
                log_limit("accept-failed", address=self.address, reason=reason_of(error))
                self._asked_to_stop.wait(ACCEPT_PAUSE_S)
            raise OSError from error  # socketserver goes on with the next

    def _has_successor(self, peer: Address) -> bool:
        """Whether another waits in this thread's place; if need be, one of the pool."""
        with self._lock:
            if self._waiting > 1:
                self._waiting -= 1
                return True
        try:
            self._pool.run(self.serve_forever)
            return True
        except NoThread as error:
            log_limit("connection-dropped", peer=peer, reason=reason_of(error))
            self._asked_to_stop.wait(ACCEPT_PAUSE_S)
            return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """By functions, in this thread, in place of a class and a new thread each time."""
        peer, gave_way, kept = Address(*client_address), False, None
        try:
            gave_way = self._admit(peer) and self._has_successor(peer)
            kept = gave_way and self._handle(request, peer)
        except Exception:  # the safety net: socketserver would print to stderr
            log_internal_error()
        if not kept:
            self._left()
            request.close()  # socketserver would send FIN first: each reset, a clean end
        with self._lock:
            self._waiting += gave_way  # else it has never ceased to count


# ---- transport and writer ---------------------------------------------------------------------


class PlainTransport:
    """What a session reads and writes: a TCP connection.

    Threads: `receive_into` and `close` from the session reader; `send` and `finish` from whom the
    writer lets write; `shutdown` from any, also when it is closed.
    The socket carries no Python timeout once the handshake is over. That would bound a whole
    `send`, be shared by reader and writer, and turn each receive into poll and receive.
    Locking: `_lock` is held in `shutdown` and `close`. Else the one could meet a descriptor that
    the other has just closed, and that a new connection has got.
    """

    identity = rtunnel_tls.NO_IDENTITY
    receipt = None

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError where the peer is gone already."""
        self._sock = sock
        self._lock = threading.Lock()
        self.wants_flush: Callable[[], None] = lambda: None  # plain TCP never does
        self.set_timeout = sock.settimeout  # in the handshake: one thread has it then
        self.peer = str(Address(*sock.getpeername()[:2]))
        tune(sock, TCP_NOTSENT_LOWAT=UNSENT_BYTES)  # a short kernel queue

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end. Raises OSError."""
        return self._sock.recv_into(buffer)

    def send(self, frames: bytes | bytearray | memoryview) -> None:
        """Send all. Raises OSError."""
        try:
            self._sock.sendall(frames)
        except BlockingIOError:
            raise TimeoutError(f"the peer took no byte for {WRITE_TIMEOUT_S:g} s") from None

    def limit_write(self, seconds: float) -> None:
        """A `send` that makes no progress for so long fails."""
        # 67 is SO_SNDTIMEO_NEW, of a 32-bit Linux whose time has 64 bits.
        timeout = struct.pack("qq" if socket.SO_SNDTIMEO == 67 else "ll", int(seconds), int(seconds % 1 * 1e6))
        if os.name == "nt":
            timeout = struct.pack("L", round(1000 * seconds))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def finish(self) -> None:
        """No more will be sent; the peer sees a clean end. Raises OSError."""
        self._sock.shutdown(socket.SHUT_WR)

    def shutdown(self) -> None:
        """End it both ways; whoever waits in it wakes."""
        with self._lock, contextlib.suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)

    stop = shutdown

    def close(self) -> None:
        with self._lock:
            self._sock.close()


Transport = PlainTransport | rtunnel_tls.TlsTransport
TRANSPORT_ERRORS = (OSError, rtunnel_tls.TransportError)


class Writer:
    """Many threads' frames onto one transport, one send at a time, in groups.

    A pump that finds nobody writing writes all that is queued and its own frame: so a lone message
    needs no other thread. Where several pumps have small frames, the first lets the others leave
    theirs before it writes: one TLS record then carries many. A pump that finds somebody writing
    leaves its frame in the queue, and waits only where that is full: that is the back-pressure.
    What is left is the control sender's, which writes until nothing is.

    Threads: `send` from pumps, `serve` from the control sender; the rest never waits, and is any's.
    Locking: `_lock` guards everything below the marker. The transport is called without it, by the
    one thread that has set `_writing`.
    Invariant: where something is queued somebody writes or gathers, or the control sender is woken.
    Memory: QUEUE_BYTES of DATA. Of control frames there are at most, for each stream, a NEW_CONN, a
    WINDOW (they are summed) and a last frame; for each and each DATA a BLOCKED; our PINGs;
    MAX_UNSENT_BYTES of all else, which only the peer provokes.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)  # for the control sender
        self._room = threading.Condition(self._lock)  # for pumps, the first first
        # guarded by _lock
        self._writing = False
        self._gathering = False  # a pump lets others leave frames; until it runs nobody else does
        self._last = 0  # the stream that sent last: who is alone never gathers
        self._small_frames = 0  # that were sent since a large one: nor does who is beside bulk
        self._control = bytearray()  # frames
        self._grants: dict[int, int] = {}  # stream: bytes of credit, for its next WINDOW
        self._queue: list[tuple[Stream, bytes]] = []
        self._queue_bytes = 0
        self._waiting: set[Stream] = set()  # whose pumps wait
        self._flush = False  # the transport has something to say
        self._cause: str | None = None

    def send(self, stream: Stream, frame: bytes | memoryview = b"") -> None:
        """Send a frame behind all earlier ones of its stream; waits while the transport is slow.

        What comes after the stream's last frame is dropped. Without a frame this sends what is
        posted, unless somebody is writing, who sees to it. Raises SessionEnded.
        """
        with self._lock:
            # Who comes later waits behind those who wait, or they would never get room.
            is_full = self._waiting or not self._has_room_locked(len(frame))
            if self._writing and frame and is_full and self._cause is None:
                self._waiting.add(stream)
                self._room.wait()
                while not (self._has_room_locked(len(frame)) or stream.silenced or self._cause is not None):
                    self._room.wait()
                self._waiting.remove(stream)
                self._room.notify()  # there may be room for the next one, too
            if self._cause is not None:
                raise SessionEnded(self._cause)
            if stream.silenced or not (frame or self._has_work_locked()):
                return
            self._small_frames = self._small_frames + 1 if len(frame) < RECORD_BYTES else 0
            has_company = self._last != stream.number and self._small_frames > GROUP_FRAMES
            gathers = has_company and len(self._queue) < GROUP_FRAMES - 1
            self._last = stream.number
            if self._writing or gathers:
                if frame:
                    self._queue.append((stream, bytes(frame)))
                    self._queue_bytes += len(frame)
                if self._writing or self._gathering:
                    return  # who writes or gathers sees to it
                self._gathering = True
            else:
                batch = self._take_all_locked(frame)
        if gathers:
            let_others_run()
            with self._lock:
                self._gathering = False
                if self._writing or self._cause is not None or not self._has_work_locked():
                    return
                batch = self._take_all_locked()
        self._write(batch)

    def _has_room_locked(self, count: int) -> bool:
        fits = self._queue_bytes + count <= QUEUE_BYTES or not self._queue
        return fits and len(self._queue) < QUEUE_FRAMES

    def post(self, frame: bytes, *, provoked: bool = False, wake: bool = True) -> None:
        """Queue a control frame, ahead of all DATA. Without `wake` the caller must `send`.

        Raises SessionEnded; ProtocolError where the peer provokes more than it reads.
        """
        with self._lock:
            if self._cause is not None:
                raise SessionEnded(self._cause)
            if provoked and self.is_behind():
                raise ProtocolError(f"over {MAX_UNSENT_BYTES} bytes of answers are unsent")
            self._control += frame
            if wake:
                self._wake_sender_locked()

    def grant(self, stream: Stream, count: int) -> None:
        """Queue credit for the peer: a WINDOW, summed with what is unsent of its stream."""
        with self._lock:
            if self._cause is None and not stream.silenced:
                self._grants[stream.number] = self._grants.get(stream.number, 0) + count
                self._wake_sender_locked()

    def post_last(self, stream: Stream, frame: bytes, *, behind_data: bool = False) -> None:
        """Queue a stream's last frame, behind its DATA or in place of it; at the end nothing."""
        with self._lock:
            if self._cause is not None:
                return
            stream.silenced, queued = True, self._queue_bytes
            self._grants.pop(stream.number, None)
            if behind_data and any(each is stream for each, _ in self._queue):
                self._queue.append((stream, frame))
            else:
                self._queue = [entry for entry in self._queue if entry[0] is not stream]
                self._control += frame
            self._queue_bytes = sum(len(entry[1]) for entry in self._queue)
            if stream in self._waiting:  # one of them is its own pump
                self._room.notify_all()
            elif self._queue_bytes < queued:  # there may be room for the next
                self._room.notify()
            self._wake_sender_locked()

    def is_behind(self) -> bool:
        """Whether the peer reads too little for more streams: each leaves frames behind."""
        return len(self._control) > MAX_UNSENT_BYTES  # read without the lock: a number is whole

    def unsent_bytes(self) -> int:
        """For the log, read without the lock."""
        return self._queue_bytes + len(self._control)

    def flush(self) -> None:
        """Have the control sender send what the transport itself has to say."""
        with self._lock:
            self._flush = True
            self._wake_sender_locked()

    def _wake_sender_locked(self) -> None:
        if not self._writing:  # else who writes wakes it at the end
            self._work.notify()

    def serve(self) -> str:
        """The control sender's work, until the end and its last frame; returns the cause."""
        while True:
            with self._lock:
                while self._writing or not (self._has_work_locked() or self._cause):
                    self._work.wait()
                if self._cause is not None:
                    cause, rest = self._cause, self._control
                    break
                batch = self._take_all_locked()
            with contextlib.suppress(SessionEnded):  # then there is a cause
                self._write(batch)
        with contextlib.suppress(*TRANSPORT_ERRORS):  # it has failed, or was shut
            if rest:
                self._transport.send(rest)
            self._transport.finish()
        return cause

    def _has_work_locked(self) -> bool:
        return bool(self._control or self._queue or self._grants or self._flush)

    def close(self, cause: str, last_frame: bytes = b"") -> None:
        """No more frames but a last one; who waits gets SessionEnded. The first cause stays."""
        with self._lock:
            if self._cause is None:
                self._cause, self._queue = cause, []  # whose streams hold the session, a cycle
                # A WELCOME that is queued goes first: the last frame is not understood without it.
                self._control = self._control + last_frame if last_frame else bytearray()
            self._work.notify()
            self._room.notify_all()

    def _take_all_locked(self, own: bytes | memoryview = b"") -> bytes | memoryview:
        """What is queued, then the caller's own frame; the caller must write it."""
        batch = own  # without a copy
        if self._has_work_locked():
            windows = [encode(FrameType.WINDOW, number, U32.pack(count)) for number, count in self._grants.items()]
            batch = b"".join([self._control, *windows, *(frame for _, frame in self._queue), own])
            self._control.clear()
            self._grants.clear()
            self._queue.clear()
            self._queue_bytes = 0
            self._flush = False  # each send takes along what the transport has to say
            self._room.notify()
        self._writing = True  # not before there was the memory for the batch
        return batch

    def _write(self, batch: bytes | memoryview) -> None:
        """What comes meanwhile is the control sender's, so nobody is enslaved. SessionEnded."""
        try:
            self._transport.send(batch)
        except TRANSPORT_ERRORS as error:
            self.close(reason_of(error))
            raise SessionEnded(reason_of(error)) from error
        finally:
            with self._lock:
                self._writing = False
                if self._has_work_locked() or self._cause:
                    self._work.notify()


# ---- stream (PROTOCOL.md, sections 4, 6 and 7) ------------------------------------------------


class ByteQueue(list[bytearray]):
    """What waits for a socket, in blocks. One large buffer would cost up to twice its size.

    It is copied whole as it grows, and what it leaves stays resident in malloc's arenas.
    Locking: its stream's.
    """

    __slots__ = ()

    def size(self) -> int:
        return sum(map(len, self))

    def put(self, part: memoryview) -> None:
        while part:
            if not self or len(self[-1]) >= DRAIN_BYTES:
                self.append(bytearray())
            taken = part[: DRAIN_BYTES - len(self[-1])]
            self[-1] += taken
            part = part[len(taken) :]

    def drop(self, count: int) -> None:
        """So many bytes of the first block have left."""
        del self[0][:count]
        if not self[0]:
            del self[0]


class Receiving(enum.Enum):
    """The direction from the tunnel to the socket."""

    OPEN = "open"  # DATA is taken
    ENDING = "ending"  # the peer's end has come; the queue is yet to be written
    ENDED = "ended"  # FIN is sent; what still comes is dropped
    BROKEN = "broken"  # the socket takes no more, but may have something to read; likewise dropped


class Sending(enum.Enum):
    """The direction from the socket to the tunnel."""

    OPEN = "open"
    ENDED = "ended"  # the socket's end of file has been told
    CLOSED = "closed"  # CLOSE_CONN has been said or has come: the peer has forgotten the stream


def end_frame(kind: FrameType, number: int, reason: str) -> bytes:
    """CLOSE_CONN or GOAWAY."""
    return encode(kind, number, reason.encode("ascii", "replace")[:MAX_REASON_BYTES])


class Stream:
    """One visitor's connection, carried by one session: its state, and the way to its socket.

    Threads: fed and ended by the session reader, drained by its drainer, swept by the clock,
    aborted by any, closed by whoever ends the last of it.
    Locking: `_lock` guards everything below the marker. Under it no call waits. Pump and drainer
    alone use the socket without it, and while one of them is at work nobody closes it: a descriptor
    closed under another thread's call could carry its bytes to a stranger.
    Invariant: the queue never exceeds window + debt. While something is queued and there is a
    socket, a drainer is at work.
    """

    level = 1  # of the session that carries it
    first_window = WINDOW_BYTES

    def __init__(self, session: Session, number: int, sock: socket.socket | None, visitor: Address | None) -> None:
        self._session = session
        self.number = number
        self.visitor = visitor
        self._opened_at = time.monotonic()
        self._sent = 0  # bytes from the socket to the tunnel; this and the next are the pump's
        self._sent_at = self._opened_at  # the last of them, or the end
        self._lock = threading.Lock()
        # guarded by _lock
        self._changed: threading.Condition | None = None  # more credit, an end, room
        self._receiving = Receiving.OPEN
        self._sending = Sending.OPEN
        self._cause: str | None = None  # of an end that is not clean; the first
        self._was_reset = False  # the socket: what it said before goes ahead of CLOSE_CONN
        self._pumping = True  # its pump is at work, or on its way
        self._is_over = False  # the pump has nothing more to receive
        self._is_closed = False
        self._sock = sock
        self._queue = ByteQueue()
        self._draining = False  # a drainer is at work
        self._moved_at = self._opened_at  # the queue last got shorter, the end came, or FIN went
        self._received = 0  # bytes from the tunnel
        self._credit = session.peer_window  # bytes of DATA that this side may still send
        self._receive_window = ReceiveWindow(self.first_window)
        # guarded by Writer._lock
        self.silenced = False  # this side's last frame is queued
        if sock is not None and DONT_WAIT is None:
            sock.setblocking(False)

    def feed(self, part: memoryview) -> None:
        """DATA for the socket: at once where it takes it, else queued. Raises ProtocolError."""
        with self._lock:
            if not self._takes_locked("DATA"):
                return
            self._receive_window.receive(len(part))
            self._received += len(part)
            if not self._queue and self._sock is not None:
                part = part[self._deliver_locked(part) :]
            if part:
                self._queue.put(part)
                self._start_drainer_locked()
        self._close_if_done()

    def end_received(self, _: bytes = b"") -> None:
        """FIN for the socket behind what is queued. Raises ProtocolError."""
        with self._lock:
            if self._takes_locked("EOF"):
                self._end_receiving_locked()
        self._close_if_done()

    def close_received(self, reason: bytes) -> None:
        """The peer's CLOSE_CONN: a reset. It takes nothing more: what is unsent is dropped."""
        with self._lock:
            self._session.writer.post_last(self, b"")
            if not self._has_ended_locked():
                self._sending = Sending.CLOSED
                self._abort_locked("peer: " + quoted(reason.decode("ascii", "replace")))
        self._close_if_done()

    def window_received(self, payload: bytes) -> None:
        """The peer's WINDOW; dropped where the stream has ended. Raises ProtocolError."""
        with self._lock:
            if not self._has_ended_locked():
                self._credit = add_credit(self._credit, *U32.unpack(payload))
                self._notify_locked()

    def blocked_received(self, _: bytes = b"") -> None:
        """The peer has bytes and no credit: where nothing is queued the window was the brake.

        It doubles then. What is owed goes back too, also where nothing can grow: up to half a
        window may be owed, and a peer that bursts would reach half its speed with it.
        """
        with self._lock:
            window, session = self._receive_window, self._session
            if self._queue or self._receiving is not Receiving.OPEN or window.debt:
                return
            wanted = window.growth(session.shortest_rtt_s)
            if grant := window.grow(session.budget.take(wanted, window.grown)):
                session.writer.grant(self, grant)

    def sweep(self) -> None:
        """The clock's, each second: growth back from what stands, an end to what is stuck."""
        now = time.monotonic()
        with self._lock:
            if self._queue and now - self._moved_at > STALL_S and self._receive_window.grown:
                self._receive_window.shrink()
            half_open = self._sending is not Sending.OPEN or self._receiving is not Receiving.OPEN
            if half_open and now - max(self._moved_at, self._sent_at) > STUCK_S:
                self._abort_locked("stuck")
            # Where the pump has left nobody else sees the error, and nobody needs what this clears.
            sock = None if self._pumping else self._sock
            if sock is not None and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._abort_locked("reset", was_reset=True)
        self._close_if_done()

    def state(self) -> dict[str, object]:
        """What a line of the log says about it."""
        with self._lock:
            credit = {"window": self._receive_window.size, "credit": self._credit} if self.level else {}
            return {
                "stream": self.number, "peer": self.visitor, "received": self._received, "sent": self._sent,
                "queued": self._queue.size(), "seconds": time.monotonic() - self._opened_at, **credit,
                "ended": self._receiving is Receiving.ENDED, "outbound_ended": self._sending is not Sending.OPEN,
            }  # fmt: skip

    def carried(self) -> dict[tuple[str, str], int]:
        """For Metrics. Both numbers are read without the lock."""
        return {("stream_bytes_total", "from_tunnel"): self._received, ("stream_bytes_total", "to_tunnel"): self._sent}

    def abort(self, cause: str) -> None:
        """End both directions with a reset of the socket; the first cause stays. Never waits."""
        with self._lock:
            self._abort_locked(cause)
        self._close_if_done()

    def _abort_locked(self, cause: str, *, was_reset: bool = False) -> None:
        if self._cause is None and not self._is_closed:
            if self._has_ended_locked():
                self._sending = Sending.CLOSED  # for the wire it has ended: nothing is said
            self._cause, self._was_reset = cause, was_reset
            self._stop_receiving_locked()
            self._end_pump_locked()

    def _stop_receiving_locked(self, state: Receiving = Receiving.ENDED) -> None:
        """Nothing more goes to the socket, neither what is queued nor FIN."""
        self._receiving = state
        self._queue = ByteQueue()
        self._notify_locked()

    def _end_pump_locked(self) -> None:
        self._is_over = True
        if self._sock is not None:
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RD)  # SHUT_WR would send FIN, a clean end

    def _notify_locked(self) -> None:
        if self._changed is not None:
            self._changed.notify_all()

    def _takes_locked(self, name: str) -> bool:
        """False for what an ended stream drops. Raises ProtocolError for what comes after EOF."""
        if self._receiving is Receiving.OPEN:
            return True
        if self._receiving is not Receiving.BROKEN and not self._has_ended_locked():
            raise ProtocolError(f"{name} after EOF on stream {self.number}")
        return False

    def _has_ended_locked(self) -> bool:
        """For the wire: both ends have sent EOF, or one CLOSE_CONN, or one is about to."""
        half = self._receiving is not Receiving.OPEN
        return self._cause is not None or (half and self._sending is not Sending.OPEN)

    def _deliver_locked(self, data: memoryview) -> int:
        """Give the socket what it takes without waiting: all that is written to it but PROXY's.

        Returns how much it took; all, where it will never take more.
        """
        assert self._sock is not None
        try:
            count = self._sock.send(data, DONT_WAIT or 0)
        except BlockingIOError:
            return 0
        except OSError:
            # What the socket has received before can still be read: often the answer that explains
            # the reset. So the pump goes on, and aborts the stream when it has read all.
            if self._sending is Sending.OPEN:
                self._stop_receiving_locked(Receiving.BROKEN)
            else:
                self._abort_locked("reset", was_reset=True)
            return len(data)
        self._moved_at = time.monotonic()
        grant, paid = self._receive_window.drain(count)
        if paid:
            self._session.budget.give(paid)
        if grant and self._receiving is Receiving.OPEN:
            self._session.writer.grant(self, grant)
        return count

    def _write_queue_locked(self) -> None:
        """What the socket takes of the queue; behind all of it FIN, where the peer has ended."""
        if self._sock is None:  # it is still being dialled
            return
        if self._queue:
            with memoryview(self._queue[0]) as view:
                count = self._deliver_locked(view)
            if self._queue:  # else the socket takes no more, and all was dropped
                self._queue.drop(count)
        if self._receiving is Receiving.ENDING and not self._queue:
            self._receiving = Receiving.ENDED
            reset_at_close(self._sock, self._sending is Sending.OPEN)  # macOS: not at close
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_WR)
            self._moved_at = time.monotonic()
        self._notify_locked()

    def _end_receiving_locked(self) -> None:
        """The tunnel has no more for the socket: FIN, now or when the queue is written."""
        if self._receiving is Receiving.OPEN:
            self._receiving = Receiving.ENDING
            self._moved_at = time.monotonic()
            self._write_queue_locked()

    def _start_drainer_locked(self) -> None:
        if not self._queue or self._draining or (sock := self._sock) is None:
            return
        try:
            self._session.start_thread(lambda: self._drain(sock))
            self._draining = True
        except NoThread as error:
            self._abort_locked(reason_of(error))

    def _drain(self, sock: socket.socket) -> None:
        """The drainer: the queue to the socket, until the queue is empty."""
        try:
            while True:
                with self._lock:
                    self._write_queue_locked()
                    # In the step that finds the queue empty: the reader starts another for more.
                    self._draining = bool(self._queue)
                    if not self._draining:
                        break
                ready([sock], writing=True, seconds=DRAIN_STEP_S)
        except BaseException:
            with self._lock:
                self._draining = False
            raise  # it ends the session, and that aborts this stream
        finally:
            self._close_if_done()

    def _close_if_done(self) -> None:
        """The last step, where pump and drainer have left and nothing more goes to the socket.

        Whoever has done the last of that comes here behind it, and nobody has to be woken for it.
        Before it CLOSE_CONN, unless it or the peer's was said. What is read without the lock stays.
        """
        if self._receiving is not Receiving.ENDED:
            return
        with self._lock:
            if self._pumping:
                return
            if self._cause is not None and self._sending is not Sending.CLOSED:
                self._sending = Sending.CLOSED
                frame = end_frame(FrameType.CLOSE_CONN, self.number, self._cause)
                behind = self._was_reset or not self.level  # T-4, E-1
                self._session.writer.post_last(self, frame, behind_data=behind)
            if self._draining or self._is_closed:
                return
            self._is_closed = True
            sock, self._sock = self._sock, None
            self._session.budget.give(self._receive_window.grown)
        if sock is not None:
            reset_at_close(sock, self._cause is not None)
            sock.close()
        self._session.forget(self)
        log_event(
            DEBUG, "stream-closed", stream=self.number, peer=self.visitor,
            level=self._session.level, received=self._received, sent=self._sent,
            seconds=time.monotonic() - self._opened_at, reason=self._cause or "clean",
        )  # fmt: skip


class PumpedStream(Stream):
    """The same with its pump, from the socket to the tunnel, whose thread `run` is."""

    def run(self, connect: Callable[[], socket.socket] | None = None) -> None:
        """The pump's life: dial (client), socket to DATA frames, its end."""
        log_event(DEBUG, "stream-opened", stream=self.number, peer=self.visitor, level=self._session.level)
        try:
            sock = self._sock  # read without the lock: the server's is there from the start
            if connect is not None:
                sock = connect()
                reset_at_close(sock)  # at once: whatever kills us, no cut looks like an end
                if DONT_WAIT is None:
                    sock.setblocking(False)
                with self._lock:
                    self._sock = sock
                    self._write_queue_locked()  # mostly a request, which it takes: no drainer
                    self._start_drainer_locked()
            assert sock is not None
            self._end_sending(self._pump(sock, is_new=connect is None))
        except (OSError, SessionEnded) as error:  # the dial's, the session's
            self.abort("refused" if isinstance(error, ConnectionRefusedError) else reason_of(error))
        finally:  # also at an internal error: it ends the session, and that aborts this stream
            self.pump_left()

    def pump_left(self) -> None:
        """The end of `run`, or in its place where there is no thread for it."""
        with self._lock:
            self._pumping = False
        self._close_if_done()

    def _pump(self, sock: socket.socket, *, is_new: bool) -> bytes | memoryview:
        """Socket to DATA frames, until its end, an abort, or the session's end (SessionEnded).

        Returns a frame that is to go with the end: a short answer is one record with it. The
        NEW_CONN of a stream that is new waits for its first bytes where they are here already.
        Credit and states are read without the lock: only this thread spends credit, and an abort
        that is missed here shows at the next receive, since whoever aborts wakes the pump.
        """
        buffer, looks_for_end = memoryview(bytearray(FIRST_BUFFER_BYTES)), not is_new
        while not self._is_over:
            if not self._credit:
                self._wait_for_credit(sock)
                continue
            room = buffer[HEADER_BYTES : HEADER_BYTES + self._credit]
            count = self._receive(sock, room, wait=not is_new)
            if count is None:
                self._session.writer.send(self)  # NEW_CONN alone
                is_new = False
                continue
            if not count:
                break
            if self._is_over or self._sending is Sending.CLOSED:
                continue  # discarded: the peer has forgotten the stream
            more = self._receive(sock, room[count:], wait=False) if looks_for_end and room[count:] else None
            count += more or 0
            with self._lock:
                self._credit -= count
            # The header stands in front of the payload: no copy on the way to the transport.
            HEADER.pack_into(buffer, 0, DATA, self.number, count)
            self._sent += count
            if more == 0:
                return buffer[: HEADER_BYTES + count]
            self._session.writer.send(self, buffer[: HEADER_BYTES + count])
            self._sent_at = time.monotonic()
            is_new = looks_for_end = False
            if HEADER_BYTES + count == len(buffer) < FRAME_SENT_BYTES:
                buffer = memoryview(bytearray(4 * len(buffer)))
        return b""

    def _receive(self, sock: socket.socket, room: memoryview, *, wait: bool) -> int | None:
        """How many bytes came; 0 at the end, None where nothing is there yet."""
        if DONT_WAIT is None and not ready([sock], writing=False, seconds=DRAIN_STEP_S if wait else 0):
            return None
        try:
            return sock.recv_into(room, 0, 0 if wait else DONT_WAIT or 0)
        except BlockingIOError:
            return None
        except OSError as error:
            with self._lock:
                cause = "reset" if isinstance(error, ConnectionError) else reason_of(error)
                self._abort_locked(cause, was_reset=True)
            return 0

    def _wait_for_credit(self, sock: socket.socket) -> None:
        """With bytes to send and no credit says BLOCKED, once; looks each second for a reset."""
        said = False
        with self._lock:
            while not self._credit and not self._is_over:
                if not said and ready([sock], writing=False, seconds=0):
                    self._session.writer.post(encode(FrameType.BLOCKED, self.number))
                    said = True
                was_reset = not self._wait_locked(WATCH_S) and (has_error(sock) or self._receiving is Receiving.BROKEN)
                if was_reset and time.monotonic() - self._sent_at >= self._session.unread_wait_s:
                    self._abort_locked("reset", was_reset=True)

    def _wait_locked(self, seconds: float) -> bool:
        """For a change. The condition is made here: an idle stream's would be 1 kB."""
        self._changed = self._changed or threading.Condition(self._lock)
        return self._changed.wait(seconds)

    def _end_sending(self, unsent: bytes | memoryview) -> None:
        """The socket has no more: say so, behind what is unsent."""
        with self._lock:
            if self._receiving is Receiving.BROKEN:
                self._abort_locked("reset", was_reset=True)
            if self._cause is None and self._sending is Sending.OPEN:
                self._sent_at = time.monotonic()
                unsent = b"".join([unsent, encode(self._end_sending_locked(), self.number)])
        self._session.writer.send(self, unsent)

    def _end_sending_locked(self) -> FrameType:
        self._sending = Sending.ENDED
        return FrameType.EOF


# ---- who may what -----------------------------------------------------------------------------


class PortRules:
    """Which identity may open which ports: those of `*`, unless it has rules of its own."""

    DEFAULT = "*=0,1024-65535"  # 0: one that the server chooses

    def __init__(self, items: Sequence[tuple[str, list[range]]]) -> None:
        """`items` as `parse` gives them; none: DEFAULT. Raises ConfigError."""
        self._ports: dict[str, list[range]] = {}
        name = ""
        for named, ports in items or [self.parse(self.DEFAULT)]:
            name = named or name
            if not name:
                raise ConfigError("--allow begins without a name: write NAME=PORTS")
            self._ports.setdefault(name, []).extend(ports)

    @staticmethod
    def parse(text: str) -> tuple[str, list[range]]:
        """`NAME=PORT,PORT-PORT`. Raises ConfigError.

        In a file's list a comma ends the item: what has no name belongs to the one before.
        """
        name, equals, spans = text.rpartition("=")
        # Not a second rule behind a comma: it would be a part of the first one's name.
        if bool(name) != bool(equals) or re.search("=[-0-9 ]+[, ]", name) or not re.fullmatch("[-0-9, ]+", spans):
            raise ConfigError(f"{text!r} is no rule: write NAME=PORTS, as alice=8080,9000-9100 or *=0")
        ports = []
        for span in spans.split(","):
            first, dash, last = span.strip().partition("-")
            lowest = parse_port(first)
            ports.append(range(lowest, parse_port(last if dash else first, lowest=lowest) + 1))
        return name.strip(), ports

    def allow(self, identity: str, port: int) -> bool:
        return any(port in ports for ports in self._ports.get(identity, self._ports.get("*", ())))


def parse_networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """From where visitors are served, `CIDR,CIDR`; empty: from everywhere. Raises ConfigError."""
    try:
        return [ipaddress.ip_network(cidr.strip()) for cidr in text.split(",")] if text else []
    except ValueError as error:
        raise ConfigError(f"{text!r} is no list of networks, as 192.0.2.0/24,2001:db8::/32: {error}") from None


# ---- session ----------------------------------------------------------------------------------


class Settings(argparse.Namespace):
    """The values of options, as the command line leaves them: in seconds, in bytes."""

    heartbeat: float = HEARTBEAT_S
    session_budget: int = SESSION_BUDGET_BYTES
    drain: float = 0.0
    metrics: Address | None = None
    proxy_protocol: bool = False  # this and the next three are the client's
    proxy: HttpProxy | None = None
    reconnect_max: float = 30.0
    tls_server_name: str = ""
    control_listen: Address  # this and the next four are the server's
    public_listen: Address | None = None
    public_bind: str = ""
    rules: PortRules = PortRules(())  # what `--allow` says
    visitors: Sequence[ipaddress.IPv4Network | ipaddress.IPv6Network] = ()


class Session:
    """One control connection's life: its transport, its streams, its timers. Both sides have it.

    Threads: `run` is the session reader; `_send_control` the control sender; the clock calls what
    `after` is given; everything public else from any.
    Locking: `_lock` guards everything below the marker.
    Invariant: a stream is in `_streams` from before its NEW_CONN is sent until its socket is
    closed. Our ids rise and are never used again, and each session has its own streams. So a frame
    never meets another stream's socket.
    """

    role = ""  # "server" or "client"
    unread_wait_s = 0.0  # what a socket received before its reset waits so long for credit

    def __init__(self, transport: Transport, program: Program) -> None:
        self.transport = transport
        self.program = program
        self.writer = Writer(transport)
        transport.wants_flush = self.writer.flush
        self.decoder = Decoder()
        self.budget = Budget(program.settings.session_budget)
        self._heartbeat_s = program.settings.heartbeat
        # Until the level is fixed, before the first stream.
        self.stream_kind: type[PumpedStream] = OriginalStream
        self.peer_window = UNLIMITED  # where each stream's credit starts
        self.rtt_s: float | None = None  # of the last PING; this and the next are the reader's
        self.shortest_rtt_s: float | None = None
        self._received_at = time.monotonic()  # the reader's; the clock looks at it
        # Ours that are unanswered, and their times: the clock appends, the reader takes them.
        self._pings: collections.deque[tuple[bytes, float]] = collections.deque(maxlen=MAX_PINGS)
        self._farewell_said = threading.Event()
        self.refusal = ""  # the code of its WELCOME, if that has refused; the reader's
        self._lock = threading.Lock()
        # guarded by _lock
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._timers: dict[str, sched.Event] = {}  # by their actions' names
        self._cause: str | None = None

    @property
    def level(self) -> int:
        return self.stream_kind.level

    def run(self) -> str:
        """Read and dispatch until the end; returns its cause. The transport is closed then."""
        self.after(WATCH_S, self._sweep)
        try:
            self.start_thread(self._send_control)
            self.program.check_allowed(self)  # from its registration on a reload does
            self._read()
            self.end("closed by the peer")
        except (*TRANSPORT_ERRORS, RtunnelError) as error:
            if isinstance(error, NoThread):
                self._farewell_said.set()
            if isinstance(error, (ProtocolError, Refused)):
                self.refusal = getattr(error, "code", "")
                self.program.metrics.count("refusals_total", self.refusal or "protocol")
            self.end(reason_of(error))
        except Exception:  # the reader's safety net
            self.end("internal error")
            log_internal_error()
        with contextlib.suppress(*TRANSPORT_ERRORS, MemoryError):
            self._read()  # discards, until the peer's end or the clock's shutdown
        self._farewell_said.wait()
        self.transport.close()
        # It is garbage at once: in cycles its buffers (TLS: 400 kB) would wait for a collection.
        self.transport.wants_flush = lambda: None
        with self._lock:
            CLOCK.cancel(self._timers.pop("farewell"))
            return self._cause or "ended"

    def _read(self) -> None:
        buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        while count := self.transport.receive_into(buffer):
            if self._cause is not None:  # read without the lock
                continue  # discarded: a close with unread bytes sends RST; it eats our last frame
            self._received_at = time.monotonic()
            for number, event in enumerate(self.decoder.feed(buffer[:count]), 1):
                if not number % READER_FRAMES:
                    let_others_run()
                if isinstance(event, DataPart):
                    if stream := self._find(event.stream):
                        stream.feed(event.part)
                elif event.type in KNOWN:
                    check(event, level=self.level, role=self.role)
                    self.on_frame(event)
            if count == len(buffer) < READER_BUFFER_BYTES:
                buffer = memoryview(bytearray(4 * len(buffer)))

    def on_frame(self, frame: Frame) -> None:
        """A whole frame that `check` has passed. Raises ProtocolError."""
        kind = KNOWN[frame.type]
        if not kind.on_stream or kind is FrameType.NEW_CONN:
            getattr(self, kind.handler)(frame)
        elif stream := self._find(frame.stream):
            getattr(stream, kind.handler)(frame.payload)

    def on_ping(self, frame: Frame) -> None:
        self.writer.post(encode(FrameType.PONG, 0, frame.payload), provoked=True)

    def on_pong(self, frame: Frame) -> None:
        sent = self._pings.popleft() if self._pings else None
        if sent is None or sent[0] != frame.payload:
            raise ProtocolError("PONG without a PING")
        self.rtt_s = time.monotonic() - sent[1]
        self.shortest_rtt_s = min(self.rtt_s, self.shortest_rtt_s or self.rtt_s)

    def _find(self, number: int) -> Stream | None:
        """The stream, None where it has ended. Raises ProtocolError for one that never was."""
        # Read without the lock: one look-up, and what it misses is looked for again under it.
        stream = self._streams.get(number)
        if stream is None:
            with self._lock:
                stream = self._streams.get(number)
                # At level 0 an original's streams of before a reconnect go on sending here (S-5).
                if stream is None and self.level and not 0 < number <= self._last_stream:
                    raise ProtocolError(f"frame for stream {number}, which was never opened")
        return stream

    def _send_control(self) -> None:
        self.guarded(lambda: self.end(self.writer.serve()))
        self._farewell_said.set()
        for stream in self.streams():
            stream.abort(self._cause or "ended")  # read without the lock: it stays as it is

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Have the clock call it then, unless the session has ended."""
        with self._lock:
            if self._cause is None:
                self._timers[action.__name__] = CLOCK.after(seconds, action)

    def start_timers(self) -> None:
        """Level 1: heartbeat, a limit on each write."""
        self.transport.limit_write(WRITE_TIMEOUT_S)
        self.after(0, self._beat)
        self.after(HEARTBEATS_TO_DEATH * self._heartbeat_s, self._check_alive)

    def _sweep(self) -> None:
        self.after(WATCH_S, self._sweep)
        for stream in self.streams():
            stream.sweep()

    def _beat(self) -> None:
        # Also while others are unanswered: an answer may stand behind bulk for long.
        ping = os.urandom(8)
        self._pings.append((ping, time.monotonic()))
        with contextlib.suppress(SessionEnded):
            self.writer.post(encode(FrameType.PING, 0, ping))
        self.after(self._heartbeat_s, self._beat)

    def _check_alive(self) -> None:
        limit = HEARTBEATS_TO_DEATH * self._heartbeat_s
        left = self._received_at + limit - time.monotonic()
        if left <= 0:
            self.end(f"the peer is dead: no byte for {limit:g} s")
            self.transport.shutdown()  # no farewell: who is in a send, or reads, wakes at once
        else:
            self.after(left, self._check_alive)

    def end(self, cause: str, last_frame: bytes = b"") -> None:
        """End the session and reset its streams; the first cause stays. Never waits.

        The control sender says what is queued, where there is a last frame, and then that, and
        that no more comes; the peer has a second to take it. Then the clock shuts the transport.
        """
        with self._lock:
            if self._cause is not None:
                return
            self._cause = cause
            while self._timers:
                CLOCK.cancel(self._timers.popitem()[1])
            self._timers["farewell"] = CLOCK.after(FAREWELL_S, self.transport.shutdown)
        self.writer.close(cause, last_frame)

    def stop(self, reason: str = "stopping") -> None:
        """End it with a GOAWAY."""
        self.end(reason, end_frame(FrameType.GOAWAY, 0, reason) if self.level else b"")

    def expel(self, reason: str) -> None:
        """End it: its peer is no longer allowed."""
        log_event(WARNING, "expelled", peer=self.transport.peer, identity=self.transport.identity, reason=reason)
        self.end(reason)

    def retire(self, reason: str) -> None:
        """No new streams here; those that are open go on. A client of level 1 connects anew."""
        if self.level:
            with contextlib.suppress(SessionEnded), self._lock:  # never ahead of a NEW_CONN
                self.writer.post(end_frame(FrameType.GOAWAY, 0, reason))

    def streams(self) -> list[Stream]:
        with self._lock:
            return list(self._streams.values())

    def stream_count(self) -> int:
        return len(self._streams)  # read without the lock: a number is whole

    def has_ended(self) -> bool:
        return self._cause is not None  # read without the lock: it stays as it is

    def has_had_streams(self) -> bool:
        return self._last_stream > 0  # read without the lock, likewise

    def state(self) -> dict[str, object]:
        """What a line of the log says about it; its numbers are read without the lock."""
        receipt = self.transport.receipt
        state: dict[str, object] = {
            "peer": self.transport.peer, "identity": self.transport.identity, "level": self.level,
            "streams": self.stream_count(), "unsent": self.writer.unsent_bytes(), "budget_left": self.budget.left,
        }  # fmt: skip
        return state | self.rtt() | ({"certificate_days_left": rtunnel_tls.days_left(receipt.end)} if receipt else {})

    def rtt(self) -> dict[str, float]:
        """For a log line: the last round trip, where one is known."""
        return {} if self.rtt_s is None else {"rtt_ms": 1000 * self.rtt_s}

    def add_locked(self, stream: Stream) -> None:
        """Raises SessionEnded."""
        if self._cause is not None:
            raise SessionEnded(self._cause)
        self.program.metrics.opened(stream)
        self._last_stream = max(self._last_stream, stream.number)
        self._streams[stream.number] = stream

    def forget(self, stream: Stream) -> None:
        """The stream's socket is closed."""
        with self._lock:
            del self._streams[stream.number]
        self.program.metrics.closed(stream)

    def start_thread(self, task: Task) -> None:
        """A thread whose internal error ends this session. Raises NoThread."""
        self.program.pool.run(lambda: self.guarded(task))

    def guarded(self, task: Task) -> None:
        """The safety net of a session's threads: an error that nobody foresaw ends the session."""
        try:
            task()
        except Exception:  # this session alone ends
            self.end("internal error")
            log_internal_error()


# ---- metrics: totals, and the port that tells of them -----------------------------------------

# Rules by which a connection, a mapping or a visitor was refused: rtunnel_tls's and PROTOCOL.md's
# words, then ours. One that a server makes up is `other`.
REFUSALS = (
    "alert", "authority", "certificate", "cipher", "closed", "deadline", "group", "identity", "key", "name", "purpose",
    "revoked", "signature", "tls", "validity", "version", "bad-request", "port-denied", "port-in-use", "shutting-down",
    "too-many-clients", "unavailable", "protocol", "silent", "strangers", "visitors", "streams", "no-client", "other",
)  # fmt: skip
# Without `rtunnel_`: what it is, its label, and of a counter the values that the label may have.
METRICS: dict[str, tuple[str, str, Sequence[str]]] = {
    "ready": ("1 where it serves: a server; a client whose mappings are each open at one server at least", "", ()),
    "sessions": ("control connections now whose handshake is over", "", ()),
    "mappings_open": ("mappings that are open now; each counts at each server", "", ()),
    "streams": ("visitors' connections now", "", ()),
    "streams_total": ("visitors' connections since the start", "", ("",)),
    "stream_bytes_total": ("what streams have carried", "direction", ("from_tunnel", "to_tunnel")),
    "handshakes_total": ("TLS handshakes that passed", "", ("",)),
    "refusals_total": ("connections, mappings and visitors that were refused", "rule", REFUSALS),
    "failed_dials_total": ("connections that could not be made", "to", ("server", "service")),
    "limit": ("the most of what is limited", "limit", ()),
    "limit_used": ("how much of it is used", "limit", ()),
    "log_lines_lost_total": ("lines of the log that could not be written", "", ()),
    "certificate_expiry_timestamp_seconds": ("when the first certificate or list in a file ends", "file", ()),
}

Figures = dict[tuple[str, str], float]  # by metric and label


def limited(name: str, used: int, limit: int) -> Figures:
    return {("limit_used", name): used, ("limit", name): limit}


class Metrics:
    """A program's totals since its start, and the port that tells Prometheus of them and of now.

    Threads: any; `listen` is main's, `serve` a scrape's, which calls `collect`.
    Locking: `_lock` guards everything below the marker; no other is taken under it.
    Invariant: a stream's bytes count once: it is among the open, or they are in the totals.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._places = threading.BoundedSemaphore(MAX_SCRAPES)
        self._lock = threading.Lock()
        # guarded by _lock
        self._totals = collections.Counter({(name, each): 0 for name, row in METRICS.items() for each in row[2]})
        self._open: set[Stream] = set()

    def count(self, name: str, value: str = "") -> None:
        """One more; where a peer has made the value up, of `other`."""
        with self._lock:
            self._totals[name, value if (name, value) in self._totals else "other"] += 1

    def opened(self, stream: Stream) -> None:
        with self._lock:
            self._open.add(stream)
            self._totals["streams_total", ""] += 1

    def closed(self, stream: Stream) -> None:
        with self._lock:
            self._open.remove(stream)
            self._totals.update(stream.carried())

    def totals(self) -> Figures:
        with self._lock:
            totals, streams = self._totals.copy(), list(self._open)
        for stream in streams:
            totals.update(stream.carried())
        return {**totals}

    def listen(self, address: Address) -> Listener:
        """The port. Raises ConfigError, OSError."""
        try:
            import prometheus_client.core
        except ImportError:
            raise ConfigError("--metrics needs prometheus-client: pip install prometheus-client") from None
        self._kinds = prometheus_client.core.GaugeMetricFamily, prometheus_client.core.CounterMetricFamily
        registry = prometheus_client.CollectorRegistry()
        registry.register(self)
        prometheus_client.ProcessCollector(registry=registry)
        self._answer = prometheus_client.MetricsHandler.factory(registry)
        return Listener(address, self._program.pool, self.serve)

    def collect(self) -> Iterator[Any]:
        """What the registry asks for."""
        figures = self._program.figures()
        for name, (meaning, label, _) in METRICS.items():
            family = self._kinds[name.endswith("_total")](f"rtunnel_{name}", meaning, labels=[label] * bool(label))
            for value in (value for named, value in figures if named == name):
                family.add_metric([value] * bool(label), figures[name, value])
            yield family

    def serve(self, sock: socket.socket, peer: Address) -> None:
        """A scrape; closed at once where too many are here."""
        if self._places.acquire(blocking=False):
            try:
                sock.settimeout(SCRAPE_S)
                self._answer(sock, peer, None)
            except (OSError, TypeError, ValueError) as error:  # its parser
                log_limit("scrape-failed", peer=peer, reason=reason_of(error))
            finally:
                self._places.release()


# ---- program: what server and client share ----------------------------------------------------

Trust = rtunnel_tls.TlsContext | None  # None: plain mode
AnyListener = TypeVar("AnyListener", bound=Listener)


class Program:
    """Threads, the TLS context, and what the stop has to end.

    Threads: main calls `start`, `retire_all`, `stop`, `reload`, `log_state`; the rest is any's.
    Locking: `_lock` guards everything below the marker, and what the server adds there.
    """

    def __init__(self, settings: Settings, context: Trust) -> None:
        self.settings, self._context = settings, context  # replaced whole: a reload, a renewal
        self.pool = Pool()
        self.metrics = Metrics(self)
        self._scraped: Listener | None = None  # main's
        # Main's post: names of signals, a final refusal, that the last connection has ended.
        self.words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.stopping = threading.Event()  # a drain or the stop has begun; set under _lock
        # guarded by _lock
        self._connections: list[PlainTransport | Session] = []  # in their handshake, or sessions

    def start(self) -> None:
        """Begin to serve. Raises RtunnelError."""
        CLOCK.start()
        self._warn_of_expiry()
        if self.settings.metrics:
            self._scraped = self.open_port("metrics", self.settings.metrics, self.metrics.listen)

    def open_port(self, option: str, address: Address, bind: Callable[[Address], AnyListener]) -> AnyListener:
        """A port that an option asks for. Raises RtunnelError."""
        try:
            listener = bind(address)
        except OSError as error:
            self.stop()
            raise RtunnelError(f"--{option} {address}: {reason_of(error)}") from error
        log_event(INFO, "listening", kind=option.removesuffix("-listen"), address=listener.address)
        return listener

    def _warn_of_expiry(self) -> None:
        """Now and every day, since nobody restarts a tunnel that works."""
        for file, end in self._context.ends.items() if self._context else ():
            if (days_left := rtunnel_tls.days_left(end)) <= rtunnel_tls.WARN_DAYS:
                log_event(WARNING, "certificate-expires", certificate=file, days_left=days_left)
        CLOCK.after(EXPIRY_CHECK_S, self._warn_of_expiry)

    def secure(self, carrier: PlainTransport, seconds: float, name: str = "", **about: object) -> Transport:
        """The carrier itself, or TLS over it. Raises HandshakeError, OSError, SessionEnded."""
        if self._context is None:
            return carrier
        context = self._context.naming(name) if name else self._context
        with self.registered(carrier):
            try:
                transport = rtunnel_tls.TlsTransport.handshake(carrier, context, deadline(seconds))
            except rtunnel_tls.HandshakeError as error:
                self.metrics.count("refusals_total", error.rule)
                raise
        self.metrics.count("handshakes_total")
        log_event(INFO, "handshake", peer=transport.peer, **about, **transport.receipt.facts)
        if (days_left := rtunnel_tls.days_left(transport.receipt.end)) <= rtunnel_tls.WARN_DAYS:
            log_event(WARNING, "certificate-expires", certificate=transport.identity, days_left=days_left)
        return transport

    @contextlib.contextmanager
    def registered(self, connection: PlainTransport | Session) -> Iterator[None]:
        """While it lasts the stop and a reload find it. Raises SessionEnded in the stop."""
        with self._lock:
            if self.stopping.is_set():
                raise SessionEnded("stopping")
            self._connections.append(connection)
        try:
            yield
        finally:
            with self._lock:
                self._connections.remove(connection)
            if not self.has_connections():
                self.words.put("ended")  # main listens to that in its stop

    def has_connections(self) -> bool:
        with self._lock:
            return bool(self._connections)

    def take_nothing_new(self) -> None:
        with self._lock:
            self.stopping.set()

    def retire_all(self) -> None:
        """For a drain: nothing new, and the open streams may finish."""
        self.take_nothing_new()
        for session in self.sessions():
            session.retire("stopping")

    def stop(self) -> None:
        """Nothing new, and all that is there ends. Never waits: `has_connections` tells."""
        self.take_nothing_new()
        if self._scraped is not None:
            self._scraped.stop()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.stop()
        self.pool.close()

    def sessions(self) -> list[Session]:
        with self._lock:
            return [each for each in self._connections if isinstance(each, Session)]

    def stream_count(self) -> int:
        return sum(session.stream_count() for session in self.sessions())

    def reload(self, fresh: Program) -> None:
        """From now on the settings of `fresh` count; what they forbid is cut, the rest stays."""
        with self._lock:  # a renewal that is under way must not bring the old back
            self.settings, self._context = fresh.settings, fresh._context
        for session in self.sessions():
            self.check_allowed(session)

    def check_allowed(self, session: Session) -> None:
        """End a session that is no longer allowed."""
        receipt = session.transport.receipt
        if self._context is not None and receipt is not None and self._context.revokes(receipt):
            session.expel("its certificate is revoked")

    def log_state(self) -> None:
        """A line about this process, and one for each session and each stream."""
        days = {"certificate_days_left": rtunnel_tls.days_left(*self._context.ends.values())} if self._context else {}
        figures = self.figures()
        used = {name: value for (metric, name), value in figures.items() if metric == "limit_used"}
        shown = {name: f"{value}/{figures.get(('limit', name), '')}".rstrip("/") for name, value in used.items()}
        log_event(INFO, "state", threads=1 + _thread._count(), **shown, **days)
        for session in self.sessions():
            log_event(INFO, "state-session", **session.state())
            for stream in session.streams():
                log_event(INFO, "state-stream", session=session.transport.peer, **stream.state())

    def figures(self) -> Figures:
        """The value of each metric and label."""
        streams = self.stream_count()
        figures = self.metrics.totals() | limited("streams", streams, MAX_STREAMS)
        figures |= {("sessions", ""): len(self.sessions()), ("streams", ""): streams}
        for file, end in self._context.ends.items() if self._context else ():
            shown = file.encode("utf-8", "backslashreplace").decode()  # a name may hold any bytes
            figures["certificate_expiry_timestamp_seconds", shown] = end.timestamp()
        lost = (each.dropped + each.failed for each in LOG.handlers if isinstance(each, LogHandler))
        return figures | {("log_lines_lost_total", ""): sum(lost)}


# ---- server: strangers, leases, visitors ------------------------------------------------------


class ServerSession(Session):
    """The server's side: takes INIT, opens streams for visitors."""

    role = "server"

    def __init__(self, transport: Transport, server: Server, carrier: PlainTransport) -> None:
        super().__init__(transport, server)
        self._server = server
        self.carrier = carrier  # whose place among the strangers it has
        self.decoder.unknown_limit = MAX_UNKNOWN_FRAMES_BEFORE_INIT
        self.init: Init | None = None  # this and the next two are the reader's
        self.instance = ""  # INIT's
        self.holder = ""  # of a lease: the certificate's name, in plain mode the instance
        self.is_client = False  # set once, by the reader (INIT) or the clock (2 s)
        # guarded by Server._lock
        self.lease: Lease | None = None
        self.visitors = 0  # streams, and those about to be

    def may_open(self) -> bool:
        """By the rules of now. The global port is open to all clients."""
        if self.init is None or self._server.global_lease is not None:
            return True
        return self.program.settings.rules.allow(self.transport.identity, self.init.port)

    def on_init(self, frame: Frame) -> None:
        if self.init is not None:
            raise ProtocolError("a second INIT")
        try:
            self.init = Init.parse(frame.payload)
            self.instance = self.init.instance
            self.holder = self.transport.identity if self.transport.receipt else self.instance
            self._server.open_lease(self, self.init)
            self.decoder.unknown_limit = UNLIMITED
        except Refused as refused:
            text = f"error={refused.code}\nmessage={refused.message}".encode("ascii", "replace")
            # A bad request comes before the level is fixed, and only from a client of level 1.
            told = self.level or (refused.code == "bad-request" and not self.has_had_streams())
            self.end(str(refused), encode(FrameType.WELCOME, 0, text) if told else b"")
            raise

    def on_goaway(self, frame: Frame) -> None:
        self._server.leave_lease(self, "client: " + quoted(frame.payload.decode("ascii", "replace")), linger=False)

    def join_silent(self) -> None:
        # An original that has nothing to say begins no other frame; if it has, its INIT may come.
        if self.decoder.is_inside_control():  # a header that has begun may be DATA's
            self.after(WATCH_S, self.join_silent)
        elif not self.decoder.unknown_frames:
            try:
                self._server.open_lease(self, Init(0, ""))
            except Refused:  # a place may become free
                self.after(WATCH_S, self.join_silent)

    def check_hello(self) -> None:
        if not self.is_client:
            self.program.metrics.count("refusals_total", "silent")
            self.end(f"no INIT within {HELLO_TIMEOUT_S:.0f} s")

    def open_stream(self, sock: socket.socket, visitor: Address) -> PumpedStream:
        """For a visitor; the caller is its pump. Raises SessionEnded where none opens."""
        with self._lock:
            # Read without the lock: a GOAWAY, which is behind the lease's end, waits for ours.
            if self.lease is None or self._cause is not None or self._last_stream == MAX_STREAM_ID:
                raise SessionEnded(self._cause or "it takes no more")
            stream = self.stream_kind(self, self._last_stream + 1, sock, visitor)
            # Under the lock: ids rise on the wire too, and the answer finds the stream (defect 10).
            payload = str(visitor).encode("ascii") if self.level else b""
            self.writer.post(encode(FrameType.NEW_CONN, stream.number, payload), wake=False)
            self.add_locked(stream)
        if stream.number == MAX_STREAM_ID:
            self.retire("stream ids are used up")
        return stream

    def forget(self, stream: Stream) -> None:
        super().forget(stream)
        self._server.visitor_left(self)

    def retire(self, reason: str) -> None:
        self._server.leave_lease(self, reason, linger=self.level > 0)
        super().retire(reason)

    def expel(self, reason: str) -> None:
        self._server.leave_lease(self, reason, linger=False)
        super().expel(reason)


class Lease(Listener):
    """A public port, and the sessions that serve it. Called with Server._lock, but `choose`."""

    def __init__(self, server: Server, address: Address, session: ServerSession | None = None) -> None:
        """Of the session's holder; None: the global port. Raises OSError."""
        self.is_global = session is None
        self.holder = session.holder if session else ""
        self.identity = session.transport.identity if session else ""  # it counts for MAX_LEASES
        self.changed = threading.Condition(server._lock)  # a session has joined or left
        # guarded by Server._lock
        self.sessions: list[ServerSession] = []  # who had a visitor last stands last
        self.lingers = deadline(0)  # visitors wait so long for the holder's return
        self.instance = ""  # of the session that joined last
        # No partial: it would cost each visitor's thread a page of stack. Reset, from the first
        # moment: whatever kills us, no cut looks like an end.
        super().__init__(
            address, server.pool, lambda sock, visitor: server.serve_visitor(self, sock, visitor),
            server.admit_visitor, server.visitor_left, reset=True,
        )  # fmt: skip

    def replaced_by(self, session: ServerSession) -> list[ServerSession]:
        """All others; at the global port its own of before a reconnect."""
        others = (each for each in self.sessions if each is not session)
        return [each for each in others if not self.is_global or session.instance == each.instance != ""]

    def join(self, session: ServerSession) -> list[ServerSession]:
        """Returns those that it replaces."""
        for other in (replaced := self.replaced_by(session)):
            other.lease = None
        self.sessions = [*(each for each in self.sessions if each not in (*replaced, session)), session]
        session.lease, session.is_client = self, True
        self.instance, self.lingers = session.instance, deadline(0)
        return replaced

    def choose(self, stopping: threading.Event) -> ServerSession | None:
        """For a visitor, who waits here, the session with fewest; from now on it counts there."""
        with self.changed:
            while self.lingers() and not self.sessions and not stopping.is_set():
                self.changed.wait(self.lingers())
            alive = (each for each in self.sessions if not each.writer.is_behind())
            able = [each for each in alive if each.visitors < MAX_SESSION_STREAMS]
            asked = [each for each in able if each.init is not None]  # else the silent serve
            session = min(asked or able, key=lambda each: each.visitors, default=None)
            if session is not None:
                session.visitors += 1
                self.sessions.remove(session)
                self.sessions.append(session)
            return session


class Server(Program):
    """The control port, the sessions, and the leases that they hold.

    Threads: `serve_control` is each session's reader, `serve_visitor` each stream's pump; main
    calls `start`, acceptors `admit_visitor`, any thread `leave_lease` and `visitor_left`.
    Locking: `_lock` guards everything below the marker and all leases. Under it ports may be bound,
    at addresses, not names: that waits for nobody, and two who want one port come one after the
    other.
    """

    def __init__(self, settings: Settings, context: Trust) -> None:
        super().__init__(settings, context)
        self._control: Listener | None = None  # main's
        self.global_lease: Lease | None = None  # set before the control port is open
        # guarded by _lock
        self._leases: dict[int, Lease] = {}  # by port
        self._strangers: dict[PlainTransport, str] = {}  # with their sites, the oldest first
        self._visitors = 0  # that are accepted and not closed
        self._assigned: dict[tuple[str, str], int] = {}  # ports that we chose, the oldest first

    def start(self) -> None:
        """Open the ports, while main is alone. Raises RtunnelError where one cannot be bound."""
        super().start()
        try:  # an address that this machine does not have may come later, at boot
            if self.settings.public_bind:
                Lease(self, Address(self.settings.public_bind, 0)).stop()
        except OSError as error:
            log_event(WARNING, "public-bind-unavailable", address=self.settings.public_bind, reason=reason_of(error))
        if self.settings.public_listen:
            lease = self.open_port("public-listen", self.settings.public_listen, functools.partial(Lease, self))
            self._leases[lease.address.port] = self.global_lease = lease  # without the lock
        bind = functools.partial(Listener, pool=self.pool, handle=self.serve_control)
        self._control = self.open_port("control-listen", self.settings.control_listen, bind)

    def take_nothing_new(self) -> None:
        super().take_nothing_new()
        with self._lock:
            listeners: list[Listener | None] = [*self._leases.values(), self._control]
            for lease in self._leases.values():
                lease.changed.notify_all()
        for listener in filter(None, listeners):
            listener.stop()

    # -- control connections

    def serve_control(self, sock: socket.socket, address: Address) -> None:
        """The life of a control connection, in its reader's thread."""
        remaining, carrier, session = deadline(HELLO_TIMEOUT_S), None, None
        try:
            carrier = PlainTransport(sock)
            with self._lock:
                self._strangers[carrier] = address.site
                # Beyond the limit the oldest of the site that has most goes.
                if len(self._strangers) > MAX_STRANGERS:
                    largest = collections.Counter(self._strangers.values()).most_common(1)[0][0]
                    oldest = next(each for each, site in self._strangers.items() if site == largest)
                    del self._strangers[oldest]
                    oldest.shutdown()  # its reader wakes, and leaves
            session = ServerSession(self.secure(carrier, remaining()), self, carrier)
            with self.registered(session):
                if self.global_lease is not None:
                    session.after(SILENT_CLIENT_S, session.join_silent)
                session.after(remaining(), session.check_hello)
                reason = session.run()
                self.leave_lease(session, reason, linger=session.level > 0)
        except (OSError, rtunnel_tls.HandshakeError, SessionEnded) as error:
            reason = reason_of(error)
        finally:
            with self._lock:  # one that is neither a stranger nor a client has given way
                gave_way = carrier is not None and self._strangers.pop(carrier, None) is None
        if session is not None and session.is_client:
            log_event(INFO, "session-closed", peer=address, level=session.level, reason=reason, **session.rtt())
            return
        if gave_way:
            self.metrics.count("refusals_total", "strangers")
            reason = f"over {MAX_STRANGERS} connections are no clients yet, most of its site"
        log_limit("refused", peer=address, level=session.level if session else 0, reason=reason)

    def _client_count_locked(self) -> int:
        """Sessions, those too that have left their lease, but have streams."""
        return sum(isinstance(each, ServerSession) and each.is_client for each in self._connections)

    # -- leases

    def open_lease(self, session: ServerSession, init: Init) -> None:
        """A port of its own, or a share of the global one. Raises Refused.

        For a silent client the clock asks, unless its INIT, or its end, was faster.
        """
        peer = session.transport.peer
        try:
            with self._lock:
                if init is not session.init and (session.is_client or session.has_ended()):
                    return
                # The first frame fixes the level. No visitor comes while WELCOME is on its way.
                if init.version and not session.visitors and not session.has_had_streams():
                    session.stream_kind, session.peer_window = PumpedStream, init.window
                port = init.port or self._assigned.get((session.holder, init.instance), 0)
                found = self._find_lease_locked(session, init, port)
                lease = found or self._bind_free_locked(session, init, port)
                # Before WELCOME, which fails where the session has ended: its end leaves the lease.
                replaced = lease.join(session)
                self._strangers.pop(session.carrier, None)
                lease.changed.notify_all()
                if session.level:
                    with contextlib.suppress(SessionEnded):  # first, ahead of all NEW_CONN
                        session.writer.post(encode(FrameType.WELCOME, 0, Welcome(lease.address.port).payload()))
        except OSError as error:
            reason = reason_of(error)
            log_event(ERROR, "lease-failed", port=init.port, peer=peer, level=session.level, reason=reason)
            code = "port-in-use" if error.errno == errno.EADDRINUSE else "unavailable"
            if error.errno in OUT_OF_RESOURCES:
                code = "too-many-clients"
            raise Refused(code, f"port {init.port} cannot be opened: {reason}") from error
        if found is None:
            log_event(INFO, "lease-opened", address=lease.address, peer=peer, level=session.level)
        about = {"peer": peer, "identity": session.transport.identity, "level": session.level}
        log_event(INFO, "session-opened", **about, port=lease.address.port, local=init.local[:MAX_MESSAGE_CHARACTERS])
        for other in replaced:
            log_event(INFO, "session-replaced", peer=other.transport.peer, by=peer, level=other.level)
            other.stop(REPLACED)
        if session.level and init.version:
            session.start_timers()

    def _find_lease_locked(self, session: ServerSession, init: Init, port: int) -> Lease | None:
        """The lease that the session joins; None where it gets a new one. Raises Refused."""
        identity = session.transport.identity
        if self.stopping.is_set():
            raise Refused("shutting-down", "the server stops")
        if not session.may_open():
            raise Refused("port-denied", f"{identity} may not open port {init.port} (--allow)")
        lease = self.global_lease or self._leases.get(port)
        if lease and not lease.is_global:
            is_anothers = not session.level or session.holder != lease.holder
            if init.port and is_anothers:
                raise Refused("port-in-use", f"port {port} belongs to another client")
            # Who wants any port takes none from another instance, which may want this one.
            if is_anothers or (not init.port and lease.instance != init.instance):
                lease = None
        replaces = bool(lease and lease.replaced_by(session))
        if lease and replaces and not init.takeover:
            raise Refused("port-in-use", f"another session of yours serves port {lease.address.port}")
        if not (replaces or session.is_client) and self._client_count_locked() >= MAX_CLIENTS:
            raise Refused("too-many-clients", f"{MAX_CLIENTS} clients are connected")
        if lease is None and sum(each.identity == identity for each in self._leases.values()) >= MAX_LEASES:
            raise Refused("too-many-clients", f"{identity} has {MAX_LEASES} ports open")
        return lease

    def _bind_free_locked(self, session: ServerSession, init: Init, port: int) -> Lease:
        """The port asked for, or that this instance had before, or any. Raises OSError."""
        try:
            lease = Lease(self, Address(self.settings.public_bind, port), session)
        except OSError:
            if port == init.port:
                raise
            lease = Lease(self, Address(self.settings.public_bind, 0), session)
        self._leases[lease.address.port] = lease
        if not init.port and init.instance:
            self._assigned[session.holder, init.instance] = lease.address.port
            if len(self._assigned) > MAX_ASSIGNED_PORTS:
                idle = (key for key, each in self._assigned.items() if each not in self._leases)
                del self._assigned[next(idle, next(iter(self._assigned)))]
        return lease

    def leave_lease(self, session: ServerSession, reason: str, *, linger: bool) -> None:
        """No more visitors for it. Without another session its port closes, or lingers for 5 s."""
        with self._lock:
            lease, session.lease = session.lease, None
            if lease is None:
                return
            lease.sessions.remove(session)
            if linger and not lease.sessions and not self.stopping.is_set():
                lease.lingers = deadline(LEASE_LINGER_S)
                CLOCK.after(LEASE_LINGER_S, lambda: self._close_unused(lease, "its client did not come back"))
        self._close_unused(lease, reason)

    def _close_unused(self, lease: Lease, reason: str) -> None:
        """Close its port, unless it is served or lingers; the global one only refuses visitors."""
        with self._lock:
            lease.changed.notify_all()  # those who wait for a session
            port, unused = lease.address.port, not lease.sessions and not lease.lingers()
            if not unused or lease.is_global or self._leases.get(port) is not lease:
                return
            del self._leases[port]
            lease.stop()
        log_event(INFO, "lease-closed", address=lease.address, reason=reason)

    # -- visitors

    def admit_visitor(self, visitor: Address) -> bool:
        """In the acceptor: before a byte is read, and before there is a thread."""
        with self._lock:
            self._visitors += 1
            full = self._visitors > MAX_STREAMS
        networks = self.settings.visitors
        if not full and (not networks or any(ipaddress.ip_address(visitor.shown_host) in each for each in networks)):
            return True
        log_limit("visitor-refused", peer=visitor, reason="too many are here" if full else "not of --visitors")
        self.metrics.count("refusals_total", "streams" if full else "visitors")
        return False

    def visitor_left(self, session: ServerSession | None = None) -> None:
        with self._lock:
            self._visitors -= 1
            if session is not None:
                session.visitors -= 1

    def serve_visitor(self, lease: Lease, sock: socket.socket, visitor: Address) -> bool:
        """Find a session, and be the pump of a stream there; False where there is none."""
        while session := lease.choose(self.stopping):
            try:
                stream = session.open_stream(sock, visitor)
            except SessionEnded as ended:  # its reader has yet to say so
                self.leave_lease(session, str(ended), linger=session.level > 0)
                with self._lock:
                    session.visitors -= 1
            else:
                session.guarded(stream.run)
                return True
        log_limit("visitor-refused", peer=visitor, reason="no client is connected, or none takes more")
        self.metrics.count("refusals_total", "no-client")
        return False

    def check_allowed(self, session: Session) -> None:
        super().check_allowed(session)
        if isinstance(session, ServerSession) and not session.may_open():
            session.expel("its port is no longer allowed")

    def log_state(self) -> None:
        super().log_state()
        with self._lock:
            leases = [(lease, [each.transport.peer for each in lease.sessions]) for lease in self._leases.values()]
        for lease, peers in leases:
            about = {"address": lease.address, "identity": lease.identity}
            lingers = lease.lingers() > 0  # read without the lock
            log_event(INFO, "state-lease", **about, sessions=",".join(peers), lingers=lingers)

    def figures(self) -> Figures:
        with self._lock:
            figures = limited("strangers", len(self._strangers), MAX_STRANGERS)
            figures |= limited("clients", self._client_count_locked(), MAX_CLIENTS)
            figures |= limited("visitors", self._visitors, MAX_STREAMS)
            figures["limit_used", "leases"] = len(self._leases)  # of each identity
            figures["mappings_open", ""] = sum(len(lease.sessions) for lease in self._leases.values())
            figures["ready", ""] = self._control is not None and not self.stopping.is_set()
        return super().figures() | figures


# ---- client: mappings, retries ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mapping:
    """One public port of one server, and the local service that it leads to."""

    remote_port: int  # 0: the server chooses
    local: Address
    server: Address = dataclasses.field(default=Address("", 0))  # its control port
    # 128 random bits in hex, kept over reconnects; never logged: in plain mode it owns a lease.
    instance: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16), repr=False, compare=False)

    def about(self) -> dict[str, object]:
        """For a log line."""
        return {"server": self.server, "local": self.local, "port": self.remote_port}

    @classmethod
    def parse(cls, text: str) -> Mapping:
        """`REMOTE_PORT:HOST:PORT`. Raises ConfigError."""
        port, colon, local = text.partition(":")
        if not colon:
            raise ConfigError(f"{text!r} is no mapping: write REMOTE_PORT:HOST:PORT")
        return cls(parse_port(port), Address.parse(local))


class Backoff:
    """Seconds to wait before a mapping's next attempt: 1 s, doubled up to a maximum.

    Up to a quarter is taken off at random: the clients of a restarted server come one by one.
    """

    takeover = True  # the next attempt may replace a session of the same holder

    def __init__(self, maximum_s: float) -> None:
        self._maximum_s = maximum_s
        self.reset()

    def reset(self) -> None:
        self._next_s = FIRST_RETRY_S

    def next_s(self, *, refused: bool = False) -> float:
        wait = min(self._next_s, REFUSED_RETRY_S) if refused else self._next_s
        self._next_s = min(2 * self._next_s, self._maximum_s)
        return min(wait, self._maximum_s) * random.uniform(0.75, 1.0)


class ClientSession(Session):
    """The client's side: asks for a port, dials the local service for each NEW_CONN."""

    role = "client"
    unread_wait_s = WRITE_TIMEOUT_S  # an answer is for the visitor; at the server he has gone

    def __init__(self, transport: Transport, client: Client, mapping: Mapping, takeover: bool = True) -> None:
        super().__init__(transport, client)
        self.over = threading.Event()  # the mapping may go on: a GOAWAY has come, or the end
        self.reason = ""  # of its end
        self.goaway: str | None = None  # the server's reason; the reader's
        self.is_open = False  # set once, by the reader (first frame) or the clock (10 s)
        self.began = time.monotonic()
        self._client, self.mapping = client, mapping
        self._heard = False  # any frame; the reader's. The server's first one fixes the level
        self._public: Address | None = None  # told by WELCOME
        init = Init(mapping.remote_port, str(mapping.local), mapping.instance, 1, takeover=takeover)
        self.writer.post(encode(FrameType.INIT, 0, init.payload()))

    def state(self) -> dict[str, object]:
        return super().state() | self.mapping.about()

    def run(self) -> str:
        try:
            with self._client.registered(self):
                self.after(LIVED_S, self._check_lived)
                self.reason = super().run()
        except SessionEnded:  # the program stops
            self.transport.close()
        finally:
            self.over.set()
        if self.goaway is not None and self.goaway != REPLACED:  # else the mapping says it
            about = {**self.mapping.about(), "level": self.level, "reason": self.reason}
            log_event(INFO, "session-closed", **about, **self.rtt())
        return self.reason

    def on_frame(self, frame: Frame) -> None:
        heard, self._heard = self._heard, True
        if frame.type != FrameType.WELCOME:
            self._open()
        elif heard:
            raise ProtocolError("WELCOME behind another frame")
        super().on_frame(frame)

    def on_welcome(self, frame: Frame) -> None:
        self.stream_kind = PumpedStream
        welcome = Welcome.parse(frame.payload)
        # Where a proxy is the transport's peer, we know the server as we were told of it.
        there = self.mapping.server if self._client.settings.proxy else Address.parse(self.transport.peer)
        self._public = Address(there.host, welcome.port)
        self.peer_window = welcome.window
        self._client.welcomed.update(each for each in self._client.mappings if each.server == self.mapping.server)
        self.start_timers()
        self._open()
        if self._client.stopping.is_set():
            self.retire("stopping")

    def _check_lived(self) -> None:
        """Nothing has come for 10 s: so is an original's silence, and a broken network's."""
        if not self._heard and self.mapping in self._client.welcomed:
            self._client.welcomed.discard(self.mapping)  # once: it may be an original
            self.end(f"no WELCOME within {LIVED_S:g} s")
        elif self._heard or self.mapping.remote_port:
            self._open()
        else:
            meaning = "an original server serves it at its global port, if it has one"
            log_event(WARNING, "session-unanswered", **self.mapping.about(), meaning=meaning)

    def _open(self) -> None:
        """The server has taken this session: in TLS 1.3 the handshake alone does not say so."""
        with self._lock:
            is_new, self.is_open = not self.is_open, True
        if is_new:
            self._client.has_opened(self.mapping)
            about = {**self.mapping.about(), "level": self.level, "peer": self.transport.peer}
            log_event(INFO, "session-opened", public=self._public or f"port {self.mapping.remote_port}", **about)

    def on_goaway(self, frame: Frame) -> None:
        """The streams go on; the mapping connects anew: now, or where replaced, after the end."""
        if self.goaway is not None:
            return
        reason = frame.payload.decode("ascii", "replace")
        log_event(INFO, "goaway", **self.mapping.about(), level=self.level, reason=reason)
        if reason != REPLACED and self._client.has_too_many(self.mapping.server):
            raise SessionEnded("GOAWAY again, and older sessions still have streams")
        self.goaway = reason
        if reason != REPLACED:
            self.over.set()

    def on_new_conn(self, frame: Frame) -> None:
        visitor, number = parse_visitor(frame.payload) if self.level else None, frame.stream
        if self.writer.is_behind():
            raise ProtocolError(f"NEW_CONN, with over {MAX_UNSENT_BYTES} bytes that the server has not read")
        with self._lock:
            # An original numbers its visitors before it queues their frames: in any order (S-2).
            if not number or number in self._streams or (self.level and number <= self._last_stream):
                raise ProtocolError(f"NEW_CONN for stream {number} after stream {self._last_stream}")
            stream = self.stream_kind(self, number, None, visitor)
            self.add_locked(stream)
        try:
            if self._client.stream_count() > MAX_STREAMS:
                raise NoThread(f"{MAX_STREAMS} streams are open")
            if not self.level and self._client.stopping.is_set():  # there is no GOAWAY
                raise NoThread("stopping")
            self.start_thread(lambda: stream.run(lambda: self._dial_local(stream)))
        except NoThread as error:  # that stream alone ends
            log_limit("stream-refused", peer=visitor, reason=reason_of(error))
            self._client.metrics.count("refusals_total", "streams")
            stream.abort(reason_of(error))
            stream.pump_left()

    def _dial_local(self, stream: Stream) -> socket.socket:
        try:
            sock = dial(self.mapping.local, DIAL_TIMEOUT_S)
            if self._client.settings.proxy_protocol:
                public = self._public or self.mapping.local  # at level 0 it is not said
                sock.sendall(proxy_line(stream.visitor, public))  # into an empty buffer
            return sock
        except OSError as error:
            about = {**self.mapping.about(), "stream": stream.number, "peer": stream.visitor}
            log_limit("dial-failed", **about, level=self.level, reason=reason_of(error))
            self._client.metrics.count("failed_dials_total", "service")
            raise


class Client(Program):
    """One thread a mapping and server: dial it, have the session read, wait for its end, again.

    Threads: `start`, `stop`, `reload` from main; `_run_mapping` is each mapping's thread.
    Locking: Program's; it guards everything below the marker too.
    """

    def __init__(self, mappings: Sequence[Mapping], settings: Settings, context: Trust) -> None:
        super().__init__(settings, context)
        self.mappings = mappings
        # By server: one that swallows packets must not keep connections to others waiting.
        self._opening = {each.server: threading.BoundedSemaphore(MAX_OPENING) for each in mappings}
        # At servers of level 1, whose silence is the network's. Changed in one step, by any thread.
        self.welcomed: set[Mapping] = set()
        # guarded by _lock
        self._denied: dict[Mapping, str] = {}  # those refused for good, with what was said
        self._has_served = False  # any mapping was open once

    def start(self) -> None:
        super().start()
        for mapping in self.mappings:
            self.pool.run(functools.partial(self._run_mapping, mapping))

    def has_too_many(self, server: Address) -> bool:
        """Whether as many older sessions there as may have streams yet, after its GOAWAYs."""
        there = sum(each.mapping.server == server for each in self.sessions() if isinstance(each, ClientSession))
        return there >= sum(each.server == server for each in self.mappings) + MAX_RETIRED

    def has_opened(self, mapping: Mapping) -> None:
        with self._lock:
            self._has_served = True
            self._denied.pop(mapping, None)

    def _run_mapping(self, mapping: Mapping) -> None:
        backoff, wait_s = Backoff(self.settings.reconnect_max), 0.0
        while not self.stopping.wait(wait_s):
            try:
                wait_s = self._serve(mapping, backoff)
            except Exception:  # the safety net: the mapping goes on
                log_internal_error()
                wait_s = backoff.next_s()

    def _serve(self, mapping: Mapping, backoff: Backoff) -> float:
        """One session, until it takes no more visitors; returns the seconds until the next."""
        about = mapping.about()
        try:
            session = self._connect(mapping, backoff.takeover)
        except (OSError, rtunnel_tls.HandshakeError, SessionEnded, NoThread) as error:
            wait = backoff.next_s(refused=isinstance(error, ConnectionRefusedError))
            self.metrics.count("failed_dials_total", "server")
            if not self.stopping.is_set():
                log_event(WARNING, "connect-failed", **about, level=0, reason=reason_of(error), retry_s=wait)
            return wait
        session.over.wait()
        if session.is_open:
            backoff.reset()
            backoff.takeover |= session.level > 0  # a WELCOME has come (G-2)
            backoff.takeover &= session.goaway != REPLACED  # a clone lives in peace
        else:
            self.metrics.count("failed_dials_total", "server")
        if session.goaway == REPLACED:
            wait = REPLACED_RETRY_S
        elif session.goaway is not None:
            return FIRST_RETRY_S if time.monotonic() < session.began + FIRST_RETRY_S else 0
        elif session.refusal in FINAL_REFUSALS:
            wait = self._take_denial(mapping, session.reason)
        else:
            wait = backoff.next_s()
        if not self.stopping.is_set():
            about |= {"level": session.level, "reason": session.reason, "retry_s": wait}
            log_event(WARNING, "session-closed", **about, **session.rtt())
        return wait

    def _connect(self, mapping: Mapping, takeover: bool) -> ClientSession:
        """A session that is read. Raises OSError, HandshakeError, SessionEnded, NoThread."""
        with self._opening[mapping.server]:
            log_event(DEBUG, "connecting", **mapping.about())
            context = self._context
            try:  # the certificate that is there now; where it is broken, the old one
                renewed = context and context.load_anew()
                with self._lock:
                    if context is self._context:  # else a reload, or another mapping, was faster
                        self._context = renewed
            except rtunnel_tls.TlsConfigError as error:
                log_event(ERROR, "reload-failed", reason=error)
            proxy = self.settings.proxy
            sock = (proxy.dial if proxy else dial)(mapping.server, CONNECT_TIMEOUT_S)
            try:
                name = self.settings.tls_server_name or mapping.server.host
                transport = self.secure(PlainTransport(sock), HELLO_TIMEOUT_S, name, **mapping.about())
                session = ClientSession(transport, self, mapping, takeover)
                self.pool.run(session.run)
            except BaseException:
                sock.close()
                raise
        return session

    def figures(self) -> Figures:
        ours = (each for each in self.sessions() if isinstance(each, ClientSession) and not self.stopping.is_set())
        serving = [each.mapping for each in ours if each.is_open and each.goaway is None]
        wanted, served = ({(each.remote_port, each.local) for each in some} for some in (self.mappings, serving))
        return super().figures() | {("ready", ""): wanted == served, ("mappings_open", ""): len(serving)}

    def _take_denial(self, mapping: Mapping, reason: str) -> float:
        """It is tried again, slowly. Where nothing ever was open, and all are denied: status 3."""
        with self._lock:
            new = self._denied.get(mapping) != reason
            self._denied[mapping] = reason
            hopeless = not self._has_served and len(self._denied) == len(self.mappings)
        if new:
            log_event(ERROR, "refused", **mapping.about(), reason=reason)
        if hopeless:
            self.take_nothing_new()
            self.words.put("refused")
        return self.settings.reconnect_max


# ---- the original's ways: level 0 (PROTOCOL.md, section 5) ------------------------------------


class OriginalStream(PumpedStream):
    """A stream at level 0: one CLOSE_CONN each way ends both directions; there is no credit."""

    level = 0
    first_window = UNLIMITED

    def feed(self, part: memoryview) -> None:
        """The reader waits while the queue is full, 20 s at most, then resets the stream (S-6)."""
        remaining = deadline(LEVEL_0_WAIT_S)
        with self._lock:
            while self._receiving is Receiving.OPEN and self._queue.size() + len(part) > LEVEL_0_QUEUE_BYTES:
                if not self._wait_locked(remaining()) and not remaining():
                    self._abort_locked("stalled")
        super().feed(part)

    def close_received(self, reason: bytes) -> None:
        """With a reason a reset; bare, a clean end behind the DATA. Answered once (E-1)."""
        with self._lock:
            answer, self._sending = self._sending is not Sending.CLOSED, Sending.CLOSED
            if reason:
                self._abort_locked("peer: " + quoted(reason[:MAX_REASON_BYTES].decode("ascii", "replace")))
            elif answer and not self._received and self._session.role == "server":
                self._abort_locked("peer: refused")  # how the original's client says so (E-6)
            else:
                self._end_receiving_locked()
        if answer:
            self._session.writer.post_last(self, encode(FrameType.CLOSE_CONN, self.number))
        self._close_if_done()

    def _end_sending_locked(self) -> FrameType:
        """The first end of file ends both directions (E-2)."""
        self._sending = Sending.CLOSED
        self._end_receiving_locked()
        return FrameType.CLOSE_CONN

    def sweep(self) -> None:
        """A socket is closed 5 s after our FIN; what it sends until then is discarded (E-7)."""
        super().sweep()
        with self._lock:
            # Where the socket's own end came first, or an abort, the pump has nothing more to read.
            if self._receiving is Receiving.ENDED and time.monotonic() - self._moved_at > LINGER_S:
                self._end_pump_locked()


# ---- command line -----------------------------------------------------------------------------


class Option(NamedTuple):
    """One row of the table behind flags, environment, configuration files and help."""

    group: str
    name: str
    default: Any
    parse: Callable[[str], Any]  # bool: a switch, --NAME and --no-NAME, that takes no value
    metavar: str
    help: str
    action: str | type[argparse.Action] = "store"
    example: str = ""  # for --example-config: a value, = is the default; behind `#` it is not set

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")


def dial_address(text: str, *, listen: bool = False) -> Address | None:
    return Address.parse(text, listen=listen) if text else None


def bind_host(text: str) -> str:
    host = text.strip("[]")
    # No name: it is bound under a lock, where nobody may wait for a resolver.
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host)) if host else ""
    raise ConfigError(f"{text!r} is no IP address: write one of this machine's, or nothing for all")


def written(pattern: str, what: str, form: str, convert: Callable[[str], Any] = str) -> Callable[[str], Any]:
    """The parser of options that match the pattern; `what` and `form` tell who writes another."""

    def parse(text: str) -> Any:
        if not re.fullmatch(pattern, text):
            raise ConfigError(f"{text!r} is no {what}: write {form}")
        return convert(text)

    return parse


listen_address = functools.partial(dial_address, listen=True)
TIME = r"[0-9]{1,6}(\.[0-9]{1,9})?"  # three of the most are what Windows can wait for
seconds = written("(?=.*[1-9])" + TIME, "time", "a number of seconds above 0 and below 1000000", float)
seconds_or_none = written(TIME, "time", "a number of seconds below 1000000", float)
mebibytes = written("[0-9]{1,6}", "size", "a number of MiB", lambda text: int(text) * 1024 * 1024)
cpu = written("auto|any|[0-9]{1,4}", "CPU", "its number, auto or any")
log_level = written("debug|info|warning|error", "level", "debug, info, warning or error")
profile = written("|".join(rtunnel_tls.PROFILES), "profile", ", ".join(rtunnel_tls.PROFILES))


# fmt: off
def common_options(role: str) -> list[Option]:
    made_by = "pki issue NAME --server HOST..." if role == "server" else "pki issue NAME --client"
    server_name = Option("TLS", "tls-server-name", "", str, "NAME",
                         "the host or address that each server's certificate must name; empty: the one in --server")
    return [
        Option("TLS", "tls", False, bool, "", "post-quantum mutual TLS; without it nothing is encrypted, and anybody "
               "may connect", argparse.BooleanOptionalAction, "true"),
        Option("TLS", "tls-cert", f"conf/pki/{role}.crt", os.path.expanduser, "FILE",
               f"our certificate, and those below the root; made by: rtunnel {made_by}", example="="),
        Option("TLS", "tls-key", f"conf/pki/{role}.key", os.path.expanduser, "FILE",
               "its key, readable by its owner only", example="="),
        Option("TLS", "tls-ca", "conf/pki/ca.crt", os.path.expanduser, "FILE",
               "the authorities whose certificates are admitted; made by: rtunnel pki init", example="="),
        Option("TLS", "tls-crl", "", os.path.expanduser, "FILE",
               "the revocation lists of all of them; made by: rtunnel pki init, and pki revoke; empty: none is looked "
               "at", example="conf/pki/crl.pem" if role == "server" else ""),
        Option("TLS", "tls-profile", "default", profile, "NAME",
               "what is admitted in a handshake, where both ends need something in common; one of "
               + ", ".join(rtunnel_tls.PROFILES)),
        *([server_name] if role == "client" else []),
        Option("limits", "heartbeat", f"{HEARTBEAT_S:g}", seconds, "SECONDS",
               "a PING so often; a peer from which no byte comes for three times as long is dead"),
        Option("limits", "session-budget", f"{SESSION_BUDGET_BYTES >> 20}", mebibytes, "MIB",
               "what the windows of one session may grow by, all streams together"),
        Option("limits", "drain", "0", seconds_or_none, "SECONDS", "at SIGTERM nothing new is taken, and the open "
               "streams have so long to finish; 0: they are reset at once"),
        Option("limits", "cpu", "auto", cpu, "NUMBER", "the CPU to run on: Python hands over faster on one than across "
               "several; auto: the first for a server, another for a client; any: all of them"),
        Option("log", "log-level", "info", log_level, "LEVEL", "debug, info, warning or error"),
        Option("log", "metrics", "", listen_address, "ADDRESS", "serve figures for Prometheus there, to whoever asks; "
               "needs prometheus-client; empty: none"),
    ]


OPTIONS = {
    "server": [
        Option("ports", "control-listen", ":7000", listen_address, "ADDRESS",
               "where clients connect: host:port, [IPv6]:port, or :port for all interfaces", example="="),
        Option("ports", "public-listen", "", listen_address, "ADDRESS",
               "one global public port that all clients serve; empty: each client asks for its own"),
        Option("ports", "public-bind", "", bind_host, "HOST",
               "the address that ports chosen by clients are opened on; empty: all interfaces"),
        Option("ports", "allow", [], PortRules.parse, "NAME=PORTS",
               "the ports that an identity may open: the name in its certificate, `anonymous` without TLS; 0 is a port "
               "of the server's choice, * whoever has no rule of his own; repeatable, in a file list [a, b]; "
               f"none: {PortRules.DEFAULT}", "append", "# [alice=8080,9000-9100, bob=0, *=0]"),
        Option("ports", "visitors", "", parse_networks, "CIDR,CIDR",
               "the networks whose visitors are served, others are closed before a byte is read; empty: all"),
        *common_options("server"),
    ],
    "client": [
        Option("tunnel", "server", [], Address.parse, "ADDRESS",
               "a server's control port, host:port or [IPv6]:port; required; repeatable, in a file list [a, b]: each "
               "mapping is open at each of them", "append", "127.0.0.1:7000"),
        Option("tunnel", "proxy", "", HttpProxy.parse, "URL",
               "the HTTP proxy to the servers, http://HOST:PORT or http://USER:PASSWORD@HOST:PORT; empty: none"),
        Option("tunnel", "local", "", dial_address, "ADDRESS", "the local service", example="127.0.0.1:8000"),
        Option("tunnel", "remote-port", "0", parse_port, "PORT",
               "the public port that leads to it; 0: the server chooses one", example="8080"),
        Option("tunnel", "forward", [], Mapping.parse, "PORT:HOST:PORT",
               "remote port and local service, instead of the two above; repeatable, in a file list [a, b]", "append",
               "# [8080:127.0.0.1:8000, 2222:127.0.0.1:22]"),
        Option("tunnel", "proxy-protocol", False, bool, "", "tell the local service, which must expect it, each "
               "visitor's address in a PROXY protocol line, version 1", argparse.BooleanOptionalAction, "# false"),
        Option("tunnel", "reconnect-max", "30", seconds, "SECONDS",
               "the longest wait between two attempts; who was replaced by another session waits 30"),
        *common_options("client"),
    ],
}
EXAMPLE_HEAD = (
    "Configuration of `rtunnel {} -c FILE`: flat `key = value` lines, every option of the command. A line that begins "
    "with `#` is not read; what it shows is the default, or an example. Flags win over the environment "
    "(RTUNNEL_LOG_LEVEL, ...), the environment over this file. A relative path begins where the program is started."
)
# What a reload takes; the others want a restart.
RELOADED = {"allow", "visitors", "proxy", "proxy-protocol", "heartbeat", "session-budget", "drain", "tls-server-name",
            "tls-cert", "tls-key", "tls-ca", "tls-crl", "tls-profile"}
# fmt: on


@dataclasses.dataclass
class ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """Flat `key = value` lines in UTF-8. What would be lost in silence is an error."""

    options: dict[str, Option]

    def parse(self, stream: TextIO) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        try:
            stream.seek(0)  # not in a pipe, which a reload could not read again
            lines = stream.readlines()
        except (OSError, UnicodeDecodeError):
            raise configargparse.ConfigFileParserException(f"{stream.name}: this is no file of UTF-8 text") from None
        for number, line in enumerate(lines, 1):
            key, fault = re.split(r"[=:\s]", line.strip(), maxsplit=1)[0], ""
            if not key or key[0] in "#;":
                continue
            if key not in self.options:
                fault = f"unknown key {key!r}; --help lists all, and there are no sections"
            elif key in settings:
                fault = f"{key} comes twice" + "; write a list [a, b]" * (self.options[key].action == "append")
            else:
                if re.match(r"[^=:\s]+\s*[=:]\s*[#;]", line.strip()):
                    fault = f"{key} would be a comment: put that on a line of its own"
                settings |= super().parse([line])
                value, repeatable = settings.get(key), self.options[key].action == "append"
                if isinstance(value, list) and not (value and repeatable):
                    fault = f"{key} takes " + ("a list that is not empty" if repeatable else "one value, without []")
            if fault:
                raise configargparse.ConfigFileParserException(f"{stream.name}, line {number}: {fault}")
        return settings


class CommandParser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Errors are one sentence: at the start on stderr, with status 2; at a reload in the log."""

    def error(self, message: str) -> NoReturn:
        shown = rtunnel_tls.escaped(masked(" ".join(message.split())))
        raise ConfigError(f"{self.prog}: {shown}")


def masked(text: str) -> str:
    """Without the password of a URL, in whatever option it was written."""
    return re.sub(r"(\w://(?!USER:PASSWORD@)[^\s:]*:)\S*@", r"\1***@", text)


def add_command(commands: Any, command: str, summary: str) -> None:
    parser = commands.add_parser(
        command, help=summary, description=summary, allow_abbrev=False, auto_env_var_prefix="RTUNNEL_",
        config_file_parser_class=ConfigFile({option.name: option for option in OPTIONS[command]}),
        config_file_open_func=functools.partial(open, encoding="utf-8-sig"),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_env_var_help=False, add_config_file_help=False,
        epilog="Flags win over the environment (RTUNNEL_..., as RTUNNEL_LOG_LEVEL), the environment over the file.",
    )  # fmt: skip
    about = "a file of key = value lines; of several the last counts"
    path = written("(?s).+", "file", "its path")
    parser.add_argument("-c", "--config", is_config_file=True, metavar="FILE", type=path, help=about)
    show = functools.partial(parser.add_argument, action="store_true", env_var="-")  # no variable
    show("--print-config", help="show each setting and where it came from, and exit")
    show("--example-config", help="show a commented file of all settings, and exit")
    for title, options in itertools.groupby(OPTIONS[command], lambda option: option.group):
        group = parser.add_argument_group(title)
        for each in options:
            typed: dict[str, Any] = {} if each.parse is bool else {"type": each.parse, "metavar": each.metavar}
            group.add_argument(f"--{each.name}", action=each.action, default=each.default, help=each.help, **typed)
    parser.set_defaults(run=run_program, parser=parser, command=command)


def make_program(first: Settings) -> Program:
    """What the settings of now ask for, not started. Raises ConfigError, TlsConfigError.

    What a reload cannot change stays as it was first, and is named.
    """
    settings = first.parse_again()
    reloaded = RELOADED if settings.tls_crl else RELOADED - {"tls-crl"}  # else it would admit again
    kept = {each.name: each.attribute for each in OPTIONS[first.command] if each.name not in reloaded}
    changed = [name for name, attribute in kept.items() if getattr(settings, attribute) != getattr(first, attribute)]
    if changed:
        log_event(WARNING, "reload-ignored", settings=", ".join(changed), meaning="restart the program for these")
    vars(settings).update({attribute: getattr(first, attribute) for attribute in kept.values()})
    program = make_server(settings) if settings.command == "server" else make_client(settings)
    first.tls_crl = settings.tls_crl  # what the next reload cannot take away
    return program


def make_server(settings: Settings) -> Server:
    if settings.control_listen is None:
        raise ConfigError("--control-listen must not be empty: write host:port or :port")
    if settings.public_listen and settings.allow:
        raise ConfigError("--allow is about ports that clients ask for, and with --public-listen they ask for none")
    settings.rules = PortRules(settings.allow)
    return Server(settings, make_context(settings, settings.control_listen))


def make_client(settings: Settings) -> Client:
    if not settings.server:
        raise ConfigError("--server is required: write the server's host:port")
    if bool(settings.local) == bool(settings.forward):
        raise ConfigError("either --local (with --remote-port) or --forward is required, and not both")
    if settings.forward and settings.remote_port:
        raise ConfigError("--remote-port belongs to --local: in --forward the remote port stands first")
    mappings = settings.forward or [Mapping(settings.remote_port, settings.local)]
    for option, values in (
        ("--server", [str(address).lower() for address in settings.server]),
        ("--forward", [str(each.remote_port or each.local) for each in mappings]),
    ):
        if twice := [value for value, count in collections.Counter(values).items() if count > 1]:
            raise ConfigError(f"{option} has {twice[0]} twice: write each once")
    everywhere = [Mapping(each.remote_port, each.local, server) for each in mappings for server in settings.server]
    return Client(everywhere, settings, make_context(settings, *settings.server))


def make_context(settings: Settings, *addresses: Address) -> Trust:
    """For ours, or the servers'. Logs what is worth a warning. Raises TlsConfigError."""
    context = None
    if settings.tls:
        names = [settings.tls_server_name or each.host for each in addresses if settings.command == "client"]
        context = rtunnel_tls.TlsContext(
            settings.tls_profile, cert=settings.tls_cert, key=settings.tls_key, ca=settings.tls_ca,
            crl=settings.tls_crl or None, verify_name=names[0] if names else None,
        )  # fmt: skip
        for name in names:
            context.naming(name)  # a host may be none for it
        if context.keylog is not None:
            log_event(WARNING, "secrets-logged", file=context.keylog, meaning="SSLKEYLOGFILE: who reads it reads all")
    for address in addresses:
        if context is None and not address.is_loopback:
            log_event(WARNING, "plain-mode", address=address, meaning="nothing is encrypted, and anybody may connect")
    if settings.metrics and not settings.metrics.is_loopback:
        log_event(WARNING, "metrics-open", address=settings.metrics, meaning="whoever reaches it reads them")
    return context


def run(make: Callable[[], Program]) -> int:
    """Run until a signal asks for the end, or until the server has refused for good.

    What a signal does, by phase: SIGINT, SIGTERM and SIGBREAK (Windows: Ctrl+Break) stop; while it
    starts, as soon as it has. The last two let open streams finish, where `--drain` says so; any of
    the three ends that, and in the stop ends the process at once, status 1. SIGHUP reloads, and
    is refused in a drain. SIGUSR1 logs the state. In the stop these two do nothing.
    """
    words: queue.SimpleQueue[str] = queue.SimpleQueue()
    # A handler may interrupt main anywhere, so it must take no lock that main may hold.
    for number in HELD:
        signal.signal(number, lambda number, _: words.put(signal.Signals(number).name))
    release_signals()
    program = None
    while program is None:
        try:
            program = make()
        except rtunnel_tls.NotYetValid as error:  # without a battery a clock is wrong at boot: wait
            log_event(WARNING, "not-yet-valid", reason=error, retry_s=CLOCK_RETRY_S)
            if any(word in STOP_SIGNALS for word in heard(words, CLOCK_RETRY_S)):
                return 0
    program.words = words
    program.start()
    tell_systemd("READY=1")
    for word in heard(words, float("inf")):
        if word in STOP_SIGNALS or word == "refused":
            break
        if word == "SIGHUP":
            reload(program, make)
        elif word == "SIGUSR1":
            program.log_state()
    log_event(INFO, "stopping", signal=word if word in SIGNALS else "none")
    tell_systemd("STOPPING=1")
    status = 3 if word == "refused" else 0
    if word in ("SIGTERM", "SIGBREAK") and program.settings.drain:
        program.retire_all()
        for word in heard(words, program.settings.drain, program.stream_count):
            if word in STOP_SIGNALS:
                break
            if word == "SIGUSR1":
                program.log_state()
            elif word == "SIGHUP":
                log_event(WARNING, "reload-refused", reason="the program is stopping")
    program.stop()
    if any(word in STOP_SIGNALS for word in heard(words, STOP_TIMEOUT_S, program.has_connections)):
        return 1
    log_event(INFO, "stopped", status=status)
    return status


def heard(words: queue.SimpleQueue[str], seconds: float, goes_on: Callable[[], object] = lambda: True) -> Iterator[str]:
    """Main's post for so long, while that goes on; in steps: on Windows no signal ends a wait."""
    remaining = deadline(seconds)
    while goes_on() and remaining():
        with contextlib.suppress(queue.Empty):
            yield words.get(timeout=min(remaining(), STEP_S))


def tell_systemd(state: str) -> None:
    """What a unit of Type=notify waits for (sd_notify(3)); elsewhere nothing."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(state.encode(), re.sub("^@", "\0", address))


def reload(program: Program, make: Callable[[], Program]) -> None:
    """What is broken is refused, all of it, in whatever way it is, and the old stays."""
    tell_systemd(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
    try:
        program.reload(make())
    except Exception as error:
        log_event(ERROR, "reload-failed", reason=reason_of(error))
    else:
        log_event(INFO, "reloaded")
    tell_systemd("READY=1")


def stay_on_cpu(number: int | str, role: str) -> None:
    """Keep the threads that are yet to start on one CPU: a number, or `auto`; Linux alone.

    On several, each hand-over of the interpreter's lock wakes another CPU, which costs more than
    what the thread then does: half of all processor time, with many short connections (NOTES.md).
    A server and a client of one machine must not choose the same, nor need all its clients.
    """
    if number == "any" or not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    if number == "auto":
        number = allowed[0] if role == "server" or len(allowed) == 1 else random.choice(allowed[1:])
    if int(number) not in allowed:
        raise ConfigError(f"--cpu {number}: this process may run on {', '.join(map(str, allowed))}")
    with contextlib.suppress(OSError):  # where a sandbox forbids it
        os.sched_setaffinity(0, {int(number)})


def raise_descriptor_limit() -> None:
    """To the hard limit: each stream holds one descriptor."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in (hard, 65536, 10240):  # macOS refuses "unlimited", and what its kernel has not
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
            return


def add_pki(commands: Any) -> None:
    """`pki init|issue|renew|revoke|show`: the certificate authority of rtunnel_tls, in a folder."""
    about = "A certificate authority in a folder."
    pki = commands.add_parser("pki", help="make and show certificates", description=about)
    actions = pki.add_subparsers(dest="action", required=True, metavar="init|issue|renew|revoke|show")
    algorithms = list(rtunnel_tls.ALGORITHMS)
    init = actions.add_parser("init", help="make an authority and its empty revocation list")
    init.add_argument("--algorithm", choices=algorithms, default="mldsa65", help="of its key (default: mldsa65)")
    init.add_argument("--name", default="rtunnel CA", help="its common name (default: rtunnel CA)")
    init.add_argument("--years", type=int, default=10, help="how long it is valid (default: 10)")
    issue = actions.add_parser("issue", help="issue a key and its certificate")
    role = issue.add_mutually_exclusive_group(required=True)
    about = "for a server that clients dial by these names"
    role.add_argument("--server", dest="hosts", nargs="+", metavar="HOST", help=about)
    role.add_argument("--client", action="store_true", help="for a client")
    issue.add_argument("--days", type=int, default=rtunnel_tls.LEAF_DAYS, help="how long it is valid (default: 397)")
    issue.add_argument("--algorithm", choices=algorithms, help="of its key (default: the authority's)")
    renew = actions.add_parser("renew", help="issue a new pair of the same name, role, hosts and algorithm")
    revoke = actions.add_parser("revoke", help="put certificates on the revocation list, which is written anew")
    which = revoke.add_mutually_exclusive_group()
    which.add_argument("name", nargs="?", help="NAME: all of its valid certificates; or the file of one")
    which.add_argument("--serial", metavar="HEX", help="the certificate of this serial number, as a log line tells it")
    show = actions.add_parser("show", help="show the folder's certificates, or one file's")
    show.add_argument("file", nargs="?", help="a certificate (default: all of the folder, and all that was issued)")
    for action in (issue, renew):
        action.add_argument("name", help="of NAME.crt and NAME.key, and of who they are for")
    for action in (init, issue):
        action.add_argument("--force", action="store_true", help="replace what is there")
    makers = (rtunnel_tls.init_authority, rtunnel_tls.issue, rtunnel_tls.renew, rtunnel_tls.revoke, rtunnel_tls.show)
    for action, make in zip((init, issue, renew, revoke, show), makers, strict=True):
        action.add_argument("--dir", default="conf/pki", type=os.path.expanduser, help="the folder (default: conf/pki)")
        action.set_defaults(make=make)
    pki.set_defaults(run=run_pki, parser=pki)


# The arguments that have a parameter of the same name in what `pki` calls.
PKI_ARGUMENTS = {"name", "hosts", "days", "years", "algorithm", "serial", "file", "force"}
# What `pki` says behind the path of what it has made: which file goes where next.
PKI_NEXT = {
    "init": "Copy ca.crt and crl.pem to each machine (--tls-ca, --tls-crl). ca.key must never leave this folder.",
    "issue": "Copy {name}.crt and {name}.key to {name}'s machine (--tls-cert, --tls-key), with ca.crt and crl.pem.",
    "renew": "Copy {name}.crt and {name}.key over the old pair on {name}'s machine, then send that rtunnel SIGHUP. "
    "The old pair is valid until it ends: if it has leaked, revoke it by the serial number that `pki show` tells.",
    "revoke": "Copy crl.pem to each machine, over the file that its --tls-crl names, then send each rtunnel SIGHUP. "
    "Until then what was revoked is still admitted there.",
}


def run_pki(settings: Settings) -> int:
    release_signals()
    options = {key: value for key, value in vars(settings).items() if key in PKI_ARGUMENTS}
    print(settings.make(settings.dir, **options))
    if settings.action in PKI_NEXT:
        print(PKI_NEXT[settings.action].format(name=settings.name))
    return 0


def example_config(command: str) -> str:
    """A file of all options, commented out where it shows the default or a mere example."""
    fill = functools.partial(textwrap.fill, width=100, initial_indent="# ", subsequent_indent="# ")
    blocks = [fill(EXAMPLE_HEAD.format(command))]
    for group, options in itertools.groupby(OPTIONS[command], lambda option: option.group):
        blocks.append(f"# ---- {group}")
        for option in options:
            unit = f" ({option.metavar})" if option.metavar else ""
            about = fill(option.help[0].upper() + option.help[1:] + unit + ".")
            value = option.default if option.example == "=" else option.example or f"# {option.default}"
            line = "# " * value.startswith("# ") + f"{option.name} = {value.removeprefix('# ')}"
            blocks.append(f"{about}\n{line}".rstrip())
    return "\n\n".join(blocks) + "\n"


def run_program(settings: Settings) -> int:
    if settings.example_config:
        print(example_config(settings.command), end="")
        return 0
    if settings.print_config:
        shown = masked(settings.parser.format_values())
        print(shown, end="")
        for option in OPTIONS[settings.command]:  # of the defaults it leaves out the switches
            names = rf"(--(no-)?)?{option.name}|RTUNNEL_{option.attribute.upper()}"
            if option.parse is bool and not re.search(rf"[\s:=]({names})[\s:=]", shown):
                print(f"  --{option.name}: {option.default}")
        return 0
    known = {"RTUNNEL_" + option.attribute.upper() for options in OPTIONS.values() for option in options}
    if unknown := sorted(name for name in os.environ if name.startswith("RTUNNEL_") and name not in known):
        raise ConfigError(f"the environment has {unknown[0]}, and no option is called so: unset it")
    # Where 0, 1 or 2 is closed, the next socket would get it, and what is written there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    stay_on_cpu(settings.cpu, settings.command)
    threading.stack_size(STACK_BYTES)
    sys.setswitchinterval(SWITCH_S)
    raise_descriptor_limit()
    log = LogHandler(settings.log_level)
    try:
        return run(lambda: make_program(settings))
    except ConfigError:
        raise
    except RtunnelError as error:
        log_event(ERROR, "failed", reason=error)
        return 1
    finally:
        log.finish()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    top = CommandParser(prog="rtunnel", description="A reverse port-mapping tunnel.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"rtunnel {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")  # of its class
    add_command(commands, "server", "open public ports for clients")
    add_command(commands, "client", "make a local service reachable through a server")
    add_pki(commands)
    top.set_defaults(parse_again=lambda: top.parse_args(arguments, Settings()))
    try:
        settings = top.parse_args(arguments, Settings())
        try:
            return settings.run(settings)  # type: ignore[no-any-return]
        except (ConfigError, rtunnel_tls.TlsConfigError) as error:
            return settings.parser.error(str(error))  # type: ignore[no-any-return]
    except ConfigError as error:
        with contextlib.suppress(OSError, AttributeError):  # nobody reads, or there is no stderr
            sys.stderr.write(f"{error}\n")
        return 2


def entry() -> NoReturn:
    """The process: `main`, and an end that waits for no thread.

    The interpreter's own end waits for a lock that a thread may hold that writes to a stopped
    terminal. What is left of streams is reset by the kernel (SO_LINGER).
    """
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # a name need not fit the terminal
    warnings.simplefilter("ignore")  # a library's, of odd certificates: they would go past the log
    try:
        status = main()
        _ = sys.stdout and sys.stdout.flush()
    except BrokenPipeError:  # of `--print-config | head`: who reads has enough
        status = 0
    except (OSError, KeyboardInterrupt, RuntimeError) as error:  # RuntimeError: no thread
        status = 1
        with contextlib.suppress(OSError, AttributeError):
            sys.stderr.write(f"rtunnel: {reason_of(error)}\n")
    os._exit(status)


if __name__ == "__main__":
    entry()
