#!/usr/bin/env python3
"""rtunnel: a reverse TCP tunnel in blocking Python.

A client behind NAT dials out to a public server and holds one control connection to it. The server opens public
ports for the client; each visitor's connection crosses the control connection as frames (PROTOCOL.md) and reaches
a local service beside the client.

The promise: from this file a reader can say which bytes may arrive, which thread handles them, how much memory they
can cost, and which lock guards what; and from rtunnel_tls.py, why a peer that is not post-quantum, or not known, never
gets past the handshake.

Threads
-------
    thread           how many                 does                                    waits only in
    main             1                        signals: reload, state, drain and stop  a lock, in a drain a sleep,
                                                                                      0.25 s at a time; at the stop the
                                                                                      other threads
    control acceptor 1 (server)               accepts control connections, shuts the  its selector; for strangers that
                                              oldest strangers                        have been shut to leave
    public acceptor  1 per lease              accepts visitors                        its selector; while the lease
                                                                                      lingers an Event, 0.5 s at a time
    session reader   1 per control connection the handshake under one deadline; then  the transport; at level 0 also
                     (client: the mapping's,  decodes and dispatches frames. Never    a stream's full queue, 20 s; at
                     which dials the server   writes to the transport, never dials a  the end the control sender, the
                     and waits between two)   local service                           turn, its lease's acceptor
    control sender   1 per control connection sends control frames; its wait is the   the writer's queue with a
                                              session's clock; at the end resets the  timeout, the transport's send;
                                              streams                                 at the end 1 s for the pumps,
                                                                                      1 s for the reader
    stream pump      1 per stream (client:    socket to DATA frames; at last it       the socket, credit (1 s at a
                     it dials first; server:  alone closes the socket                 time), the writer, its drainer
                     it waits 5 s for a
                     client that returns)
    stream drainer   0 or 1 per stream, while queue to socket                         the socket, 0.5 s at a time
                     its socket is slow
Besides, who starts a thread waits until it runs, who logs waits for stderr, and an acceptor that failed for want of
descriptors or threads pauses for 0.25 s.

Locks
-----
Taken in this order, each for a few statements; nothing that can wait is done under one.
    Program._lock  what the stop and a reload have to find; on the server also the leases, with their sessions, and the
                   strangers. Ports are bound under it: bind and listen wait for nobody
    Session._lock  the streams, the last id, the PINGs, the timers, the first cause of the end
    Writer._lock   the frames to send, who waits for the turn. The *turn* itself is no lock but a field under
                   `_lock`: its holder alone calls the transport's `send`, and that may wait
    Stream._lock   one stream's queue, windows and state, and each call on its socket but the pump's `recv` and its
                   final `close`. Never taken under another, nor another under it but Budget._lock
    Budget._lock, Pool._lock, LimitLog._lock, PlainTransport._lock, Listener._closing   a number; the threads and the
                   idle; when a line was last logged; that a descriptor is not shut after it is closed

Errors
------
    RtunnelError
    +-- ConfigError      wrong usage, configuration or file: exit status 2
    +-- ProtocolError    the peer broke a rule of PROTOCOL.md: its session ends
    +-- Refused          the server will not serve this client: code and sentence
    +-- SessionEnded     this session has ended; carries the first cause
    +-- PoolClosed       the program stops: no new work

Exit status: 0 stopped as asked; 1 failed; 2 wrong usage, configuration or file; 3 the server refused for good.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import enum
import errno
import heapq
import ipaddress
import itertools
import json
import logging
import os
import random
import re
import secrets
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

import rtunnel_tls

__version__ = "0.1.0"

# ---- limits -----------------------------------------------------------------------------------------------------

MAX_CONTROL_PAYLOAD_BYTES = 4 * 1024  # every frame but DATA; INIT, the longest, needs some 300
MAX_DATA_PAYLOAD_BYTES = 1024 * 1024  # accepted in one DATA frame; decoding is cut-through, so it costs no memory
FRAME_SENT_BYTES = 64 * 1024  # a full DATA frame and its header: four TLS records, filled exactly. 16 KiB cost a third
# of the throughput, 256 KiB gain little and cost latency
MAX_STREAM_ID = 2**32 - 1  # ids rise and never wrap
MAX_UNKNOWN_FRAMES_BEFORE_INIT = 16  # room for a newer client's greetings, none for a stranger's stream of noise
MAX_REASON_BYTES = 64  # of a CLOSE_CONN; it goes into one log line

WINDOW_BYTES = 64 * 1024  # where each stream's window starts; yamux: 256 KiB, which 10,000 stalled visitors make 2.5 GB
MAX_WINDOW_BYTES = 16 * 1024 * 1024  # to which it grows: 160 MB/s at 100 ms of round trip
NEAR_WINDOW_BYTES = 1024 * 1024  # the same where the peer is near: more would only stand in queues, others behind it
LINK_BYTES_PER_S = 10**9  # what a round trip is taken to hold: 16 MiB from 17 ms on
MAX_CREDIT_BYTES = 2**31 - 1  # as in HTTP/2 (RFC 9113, section 6.9.1)
UNLIMITED = 2**62  # level 0: a window that never runs out
SESSION_BUDGET_BYTES = 64 * 1024 * 1024  # of what all windows of a session have grown by
STALL_S = 5.0  # a grown window whose queue has not moved for so long gives its growth back
WATCH_S = 1.0  # how often a pump that waits for credit looks whether its socket was reset
MAX_UNSENT_FRAMES = 4096  # of control, whose streams may have ended: beyond that no stream is opened
MAX_PROVOKED = 64  # unsent PONGs and refusals: a peer that asks and does not read
MAX_MESSAGE_CHARACTERS = 256  # of the server's sentence in a WELCOME; it goes into one log line
MAX_ASSIGNED_PORTS = 1024  # instances whose server-chosen port is remembered

LEVEL_0_QUEUE_BYTES = 1024 * 1024  # per stream: level 0 has no credit, so the queue is bounded by waiting
LEVEL_0_WAIT_S = 20.0  # how long the reader waits for one stream's full queue, all others with it

SMALL_FRAME_BYTES = 16 * 1024  # up to this size a frame may be queued behind another thread's turn (one TLS record)
SMALL_QUEUE_BYTES = 256 * 1024  # of queued small frames; then their threads wait too, which is the back-pressure
SMALL_QUEUE_FRAMES = 1024  # the same for tiny frames, whose objects cost more than their bytes

FIRST_BUFFER_BYTES = 1024  # receive buffers start small and grow, four times, where they are filled: 10,000 are idle
READER_BUFFER_BYTES = 256 * 1024  # one large receive holds many frames
DRAIN_BYTES = 256 * 1024  # in one send of a drainer, which the reader's next feed of that stream has to wait for
UNSENT_BYTES = 128 * 1024  # in the kernel (TCP_NOTSENT_LOWAT): or small frames wait behind megabytes of others'

ANONYMOUS = "anonymous"  # the identity in plain mode
REPLACED = "replaced"  # the GOAWAY to a session whose holder has a newer one
FINAL_REFUSALS = {"bad-request", "port-denied"}  # trying again would not help

MAX_STRANGERS = 64  # connections that are no client yet: each costs a thread or two and, with TLS, some 300 kB.
# Beyond that the oldest goes, so that the silent cannot lock others out; sshd (100) drops the newest, at random
MAX_STRANGERS_PER_SITE = 16  # the same for one IPv4 address, or one IPv6 network of 64 bits
MAX_RETIRED = 8  # a client's sessions that a GOAWAY has retired, and that still have streams
MAX_CLIENTS = 256  # each may cost its budget
MAX_LEASES = 64  # of one identity; in plain mode all are one. Each costs a port, a thread, a listen queue
MAX_STREAMS = 16384  # of one process: each costs a descriptor, a thread or two, and 64 KiB where it is stalled
MAX_SESSION_STREAMS = 12288  # of one session at the server: no client's visitors take all places
STUCK_S = 600.0  # a stream whose other direction has ended lives so long at most without a byte
STUCK_CHECK_S = 10.0
LOG_EVERY_S = 1.0  # a line about a limit, at most
MAIN_STEP_S = 0.25  # how often main looks what has come: on Windows no signal wakes it, nor does a final refusal

HELLO_TIMEOUT_S = 10.0  # from accept to INIT; the original's handshake has no limit and keeps everybody out
SILENT_CLIENT_S = 2.0  # without INIT: the original's way to join a global port
DIAL_TIMEOUT_S = 5.0  # of a local service, all its addresses together; the original's value
CONNECT_TIMEOUT_S = 10.0  # of the server
LINGER_S = 5.0  # after our FIN, for what a socket still sends: closing earlier would send RST and eat our last bytes
DRAIN_STEP_S = 0.5  # how long a drainer, or a polled pump, waits before it looks whether its stream was aborted
STOP_TIMEOUT_S = 1.3  # of the whole stop; what then still dials or resolves a name is a daemon thread
POOL_IDLE_S = 10.0  # a thread without work ends
STACK_BYTES = 256 * 1024  # per thread; smaller ones save no memory, and overflow ends in SIGSEGV
ACCEPT_PAUSE_S = 0.25  # after an accept that failed for want of descriptors: the selector would spin
LISTEN_BACKLOG = 1024  # socketserver's default is 5
LIVED_S = 10.0  # a session that lasted so long, or brought a frame, is open and sets the backoff back
REPLACED_RETRY_S = 30.0  # after GOAWAY `replaced`: two clones must not evict each other in a loop
LEASE_LINGER_S = 5.0  # a port waits so long for its client's return: two attempts of a client
HEARTBEAT_S = 15.0  # yamux: 30 s
HEARTBEATS_TO_DEATH = 3  # without a byte received
WRITE_TIMEOUT_S = 30.0  # level 1: a transport that takes no byte for so long is dead; yamux: 10 s
ABORTED_AT_ONCE = 64  # of the streams of a session that has ended: pumps that are closing, all at once
ABORT_PACE_S = 1.0  # so long; then all that are left, for what a pump waits for may take longer
FAREWELL_S = 1.0  # for the peer to read our last frame, and for us to read why a write failed
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


class Refused(RtunnelError):
    """The server will not serve this client; a code of PROTOCOL.md and a sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class SessionEnded(RtunnelError):
    """The session has ended; the message is the first cause."""


class PoolClosed(RtunnelError):
    """The program stops; no work is taken any more."""


# ---- addresses --------------------------------------------------------------------------------------------------


LABEL = r"[!-\-/-9;-Z^-~]{1,63}"  # of a host name or an IPv4 address: printable ASCII but '.', ':' and brackets


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
        """Whose connections are counted together: an IPv4 address, or an IPv6 network of 64 bits, one house's."""
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
        host, _, port = text.rpartition(":")
        try:
            if bracketed := re.fullmatch(r"\[(.+)\]", host):
                host = bracketed[1]
                ipaddress.IPv6Address(host)
            elif not (re.fullmatch(LABEL + rf"(\.{LABEL})*\.?", host) or (listen and not host)):
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


class PortRules:
    """Which identity may open which ports: those of `*`, unless it has rules of its own. 0: one that we choose."""

    DEFAULT = "*=0,1024-65535"

    def __init__(self, items: Sequence[tuple[str, list[range]]]) -> None:
        """`items` as `parse` gives them; none: DEFAULT. Raises ConfigError where the first has no name."""
        self._ports: dict[str, list[range]] = {}
        name = ""
        for named, ports in items or [self.parse(self.DEFAULT)]:
            name = named or name
            if not name:
                raise ConfigError("--allow begins without a name: write NAME=PORTS")
            self._ports.setdefault(name, []).extend(ports)

    @staticmethod
    def parse(text: str) -> tuple[str, list[range]]:
        """`NAME=PORT,PORT-PORT`. In a file's list a comma ends the item: what has no name belongs to the one before.

        Raises ConfigError.
        """
        name, equals, spans = text.rpartition("=")
        if bool(name) != bool(equals):
            raise ConfigError(f"{text!r} is no rule: write NAME=PORTS, as alice=8080,9000-9100 or *=0")
        ports = []
        for span in spans.split(","):
            first, dash, last = span.strip().partition("-")
            lowest = parse_port(first)
            ports.append(range(lowest, parse_port(last if dash else first, lowest=lowest) + 1))
        return name.strip(), ports

    def allow(self, identity: str, port: int) -> bool:
        return any(port in ports for ports in self._ports.get(identity, self._ports.get("*", ())))


class Networks(tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]):
    """From where visitors are served; empty: from everywhere."""

    @classmethod
    def parse(cls, text: str) -> Networks:
        """`CIDR,CIDR`. Raises ConfigError."""
        try:
            return cls(ipaddress.ip_network(cidr.strip()) for cidr in text.split(",")) if text else cls()
        except ValueError as error:
            raise ConfigError(f"{text!r} is no list of networks, as 192.0.2.0/24,2001:db8::/32: {error}") from None

    def admit(self, visitor: Address) -> bool:
        address = ipaddress.ip_address(visitor.shown_host)
        return not self or any(address in network for network in self)


# ---- frames: no socket, no thread, no clock, no log (PROTOCOL.md, "Frames") ---------------------------------------

HEADER = struct.Struct(">BII")  # type, stream, payload length
HEADER_BYTES = HEADER.size
U32 = struct.Struct(">I")


class FrameType(enum.IntEnum):
    """The frame types that are known; any other is skipped."""

    NEW_CONN = 0x01
    DATA = 0x02
    CLOSE_CONN = 0x03
    INIT = 0x04
    WELCOME = 0x05
    WINDOW = 0x06
    EOF = 0x07
    PING = 0x08
    PONG = 0x09
    GOAWAY = 0x0A
    BLOCKED = 0x0B


class Rule(NamedTuple):
    """What makes a frame legal (PROTOCOL.md, "Frames")."""

    level: int  # the lowest one that has it
    sender: str  # "server", "client" or "both"
    on_stream: bool  # its id is a stream's; else 0
    lengths: range  # of the payload in bytes; the original sends none that is checked, so from level 1 on


RULES = {
    FrameType.NEW_CONN: Rule(0, "server", True, range(MAX_REASON_BYTES + 1)),
    FrameType.DATA: Rule(0, "both", True, range(MAX_DATA_PAYLOAD_BYTES + 1)),
    FrameType.CLOSE_CONN: Rule(0, "both", True, range(MAX_REASON_BYTES + 1)),
    FrameType.INIT: Rule(0, "client", False, range(MAX_CONTROL_PAYLOAD_BYTES + 1)),
    FrameType.WELCOME: Rule(0, "server", False, range(MAX_CONTROL_PAYLOAD_BYTES + 1)),
    FrameType.WINDOW: Rule(1, "both", True, range(4, 5)),
    FrameType.EOF: Rule(1, "both", True, range(1)),
    FrameType.PING: Rule(1, "both", False, range(8, 9)),
    FrameType.PONG: Rule(1, "both", False, range(8, 9)),
    FrameType.GOAWAY: Rule(1, "both", False, range(MAX_REASON_BYTES + 1)),
    FrameType.BLOCKED: Rule(1, "both", True, range(1)),
}
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


def check(frame: Frame, *, level: int, role: str) -> None:
    """Raises ProtocolError where a `role` must not receive such a frame at that level."""
    rule, name = RULES[FrameType(frame.type)], FrameType(frame.type).name
    if rule.sender == role:
        raise ProtocolError(f"{name} is not for a {role} to receive")
    if rule.level > level:
        raise ProtocolError(f"{name} at level {level}")
    if level and (rule.on_stream != bool(frame.stream) or len(frame.payload) not in rule.lengths):
        raise ProtocolError(f"{name} with id {frame.stream} and {len(frame.payload)} bytes of payload")


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
        self._error = ""  # its words only: an exception would keep its traceback, and that all of the session

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame | DataPart]:
        """The events in `data`, in order. Raises ProtocolError where a payload is over its limit."""
        if self._error:
            raise ProtocolError(self._error)
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
            elif self._type in RULES:
                self._payload += part
                if not self._remaining:
                    payload = bytes(self._payload)
                    self._payload.clear()
                    yield Frame(self._type, self._stream, payload)

    def _begin(self, kind: int, stream: int, length: int) -> None:
        limit = MAX_DATA_PAYLOAD_BYTES if kind == DATA else MAX_CONTROL_PAYLOAD_BYTES
        if length > limit:
            self._error = f"frame type {kind:#04x} announces {length} bytes, the limit is {limit}"
            raise ProtocolError(self._error)
        self._type, self._stream, self._remaining = kind, stream, length
        if kind not in RULES:
            self.unknown_frames += 1


def key_values(lines: str) -> dict[str, str]:
    """`key=value` lines; of a key that comes twice the last counts."""
    return dict(line.split("=", 1) for line in lines.split("\n") if "=" in line)


def number(text: str | None, lowest: int, highest: int) -> int:
    """Raises ProtocolError unless the text is such a number."""
    if text is None or not re.fullmatch(r"[0-9]{1,10}", text) or not lowest <= int(text) <= highest:
        raise ProtocolError(f"{(text or '')[:32]!r} is no number from {lowest} to {highest}")
    return int(text)


class Init(NamedTuple):
    """What an INIT frame asks for (PROTOCOL.md, "INIT")."""

    port: int
    local: str  # the local service as the client names it: for the log only
    instance: str = ""  # 128 random bits in hex; empty: unknown
    version: int = 0
    window: int = WINDOW_BYTES

    @classmethod
    def parse(cls, payload: bytes) -> Init:
        """Raises Refused where a client of level 1 can be told what is wrong, else ProtocolError."""
        text = payload.decode("utf-8", "surrogateescape")
        first, _, lines = text.partition("\n")
        pairs = key_values(lines)
        port, colon, local = first.partition(":")
        try:
            if not colon or not re.fullmatch(r"[0-9]{1,5}", port):
                raise ProtocolError(f"INIT is {first[:32]!r}, PORT:LOCAL is wanted")
            init = cls(number(port, 0, 65535), local)
            if "version" not in pairs:
                return init
            init = init._replace(instance=pairs.get("instance", ""))
            payload.decode("utf-8")
            if not re.fullmatch(r"[0-9a-f]{32}", init.instance):
                raise ProtocolError("instance is not 32 hexadecimal digits")
            window = number(pairs.get("window"), 1, MAX_CREDIT_BYTES)
            return init._replace(version=number(pairs["version"], 1, 2**31), window=window)
        except UnicodeDecodeError as error:
            raise Refused("bad-request", "INIT is not UTF-8") from error
        except ProtocolError as error:
            if "version" not in pairs:
                raise
            raise Refused("bad-request", str(error)) from error

    def payload(self) -> bytes:
        lines = f"\nversion={self.version}\nwindow={self.window}\ninstance={self.instance}" if self.version else ""
        return f"{self.port}:{self.local}{lines}".encode("ascii")


class Welcome(NamedTuple):
    """The server's answer to an INIT of level 1 (PROTOCOL.md, "WELCOME")."""

    port: int
    window: int = WINDOW_BYTES

    @classmethod
    def parse(cls, payload: bytes) -> Welcome:
        """Raises Refused where the server says so, ProtocolError where it says nothing that is known."""
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


def proxy_line(visitor: Address | None, public: Address) -> bytes:
    """A PROXY protocol version 1 header (haproxy's proxy-protocol.txt, section 2.1). `visitor` None: unknown."""
    if visitor is None:
        return b"PROXY UNKNOWN\r\n"
    hosts = [ipaddress.ip_address(address.shown_host) for address in (visitor, public)]
    if {host.version for host in hosts} == {4}:
        return f"PROXY TCP4 {hosts[0]} {hosts[1]} {visitor.port} {public.port}\r\n".encode("ascii")
    # One header has one family: an IPv4 address beside an IPv6 one is written mapped, and in groups of hexadecimal
    # digits, the only form that the specification has.
    texts = [f"::ffff:{host.packed.hex(':', 2)}" if host.version == 4 else str(host) for host in hosts]
    return f"PROXY TCP6 {texts[0]} {texts[1]} {visitor.port} {public.port}\r\n".encode("ascii")


# ---- flow control: arithmetic alone (PROTOCOL.md, "Flow control") -------------------------------------------------


class SendWindow:
    """The bytes of DATA that this side may still send on one stream. Locking: its stream's."""

    def __init__(self, credit: int) -> None:
        self.credit = credit

    def spend(self, count: int) -> None:
        assert 0 < count <= self.credit
        self.credit -= count

    def grant(self, count: int) -> None:
        """Raises ProtocolError for 0 and for an overflow."""
        if not count or self.credit + count > MAX_CREDIT_BYTES:
            raise ProtocolError(f"WINDOW of {count} on top of {self.credit}, the limit is {MAX_CREDIT_BYTES}")
        self.credit += count


def window_limit(rtt_s: float | None) -> int:
    """To what a window may grow: to what a fast link holds in a round trip, None: not measured yet."""
    far = MAX_WINDOW_BYTES if rtt_s is None else int(LINK_BYTES_PER_S * rtt_s)
    return min(max(NEAR_WINDOW_BYTES, far), MAX_WINDOW_BYTES)


class ReceiveWindow:
    """The bytes of DATA that the peer may still send on one stream. Locking: its stream's.

    Invariant: bytes queued + credit + owed == size + debt, until the end.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.credit = size  # what the peer holds
        self.owed = 0  # bytes that have left for the socket and are not yet granted again
        self.debt = 0  # a growth that was taken back: withheld from what leaves next

    @property
    def grown(self) -> int:
        """What this window may cost above WINDOW_BYTES: its share of the session's budget."""
        return max(0, self.size + self.debt - WINDOW_BYTES)

    def receive(self, count: int) -> None:
        """Raises ProtocolError where the peer has not had that much credit."""
        if count > self.credit:
            raise ProtocolError(f"{count} bytes of DATA, the credit was {self.credit}")
        self.credit -= count

    def drain(self, count: int) -> tuple[int, int]:
        """Bytes have left for the socket: what to grant now (from half a window on), and what of a debt is paid."""
        paid = min(count, self.debt)
        self.debt -= paid
        self.owed += count - paid
        return (self._grant() if 2 * self.owed >= self.size else 0), paid

    def growth(self, limit: int = MAX_WINDOW_BYTES) -> int:
        """How much the window would like to grow: to the double, at most to the limit; not in debt."""
        return 0 if self.debt else min(self.size, max(0, limit - self.size))

    def grow(self, count: int) -> int:
        """Returns what to grant: the growth and all that is owed."""
        self.size += count
        self.owed += count
        return self._grant()

    def shrink(self) -> None:
        """Take the growth back: it becomes a debt."""
        self.debt += self.size - WINDOW_BYTES
        self.size = WINDOW_BYTES

    def _grant(self) -> int:
        count, self.owed = self.owed, 0
        self.credit += count
        return count


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


class LimitLog:
    """A line of its event at most once a second; it counts those that it stands for. For what strangers can cause."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # guarded by _lock
        self._last: dict[str, tuple[float, int]] = {}  # event: when it was logged, and how many have come since

    def __call__(self, event: str, /, **pairs: object) -> None:
        now = time.monotonic()
        with self._lock:
            at, held_back = self._last.get(event, (-LOG_EVERY_S, 0))
            if now < at + LOG_EVERY_S:
                self._last[event] = at, held_back + 1
                return
            self._last[event] = now, 0
        log_event(WARNING, event, **pairs, **({"more_like_it": held_back} if held_back else {}))


log_limit = LimitLog()


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


def nothing() -> None:
    pass


Task = Callable[[], object]  # without arguments: `task(*args)` would cost each thread 400 bytes of stack (NOTES.md)


class Worker(threading.Thread):
    """A thread of the pool, or one that is to be: what it does next, and the lock that it sleeps on."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(daemon=True)
        self._pool = pool
        self.task: Task = nothing
        self.wake = threading.Lock()
        self.wake.acquire()

    def run(self) -> None:
        self._pool.work(self)


class Pool:
    """Daemon threads that are reused: starting one waits for it to run, which halves the connection rate.

    Threads: `run` from any, `close` from main.
    Locking: `_lock` guards everything below the marker.
    Invariant: a worker is in `_idle` until somebody takes it out; who does so gives it a task and wakes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = threading.Condition(self._lock)  # the last thread has left
        # guarded by _lock
        self._idle: list[Worker] = []  # the last to idle is the first to work: its memory is warm
        self._workers: set[Worker] = set()
        self._closing = False

    def run(self, name: str, task: Task) -> None:
        """Run the task in a thread of that name. Raises PoolClosed; RuntimeError where no thread can be started."""
        with self._lock:
            if self._closing:
                raise PoolClosed("stopping")
            worker = self._idle.pop() if self._idle else Worker(self)
            self._workers.add(worker)
        worker.name, worker.task = name, task
        worker.wake.release()
        if worker.ident is None:
            try:
                worker.start()
            except RuntimeError:
                self._leave(worker)
                raise

    def work(self, worker: Worker) -> None:
        """The worker's life."""
        while worker.wake.acquire(timeout=POOL_IDLE_S) or not self._may_leave(worker):
            try:
                worker.task()
            except Exception:  # the safety net of every thread: the others go on
                log_internal_error()
            worker.task = nothing  # an idle thread keeps nothing alive
            with self._lock:
                if self._closing:
                    break
                self._idle.append(worker)
        self._leave(worker)

    def _may_leave(self, worker: Worker) -> bool:
        """False where a task is on its way."""
        with self._lock:
            idle = worker in self._idle
            if idle:
                self._idle.remove(worker)
        if not idle:
            worker.wake.acquire()
        return idle

    def _leave(self, worker: Worker) -> None:
        with self._lock:
            self._workers.discard(worker)
            if self._closing and self._idle:
                self._idle.pop().wake.release()  # to do nothing, and leave
            if not self._workers:
                self._left.notify_all()

    def close(self, deadline: Deadline) -> None:
        """Let the idle go, each the next, and wait for the others, until the deadline."""
        with self._lock:
            self._closing = True  # under the lock: a worker that is about to idle must see it
            if self._idle:
                self._idle.pop().wake.release()
            while self._workers and self._left.wait(deadline.remaining()):
                pass


class LateCondition:
    """A condition that is made when somebody first waits: an idle stream's would be 1 kB. Called with its lock held."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._condition: threading.Condition | None = None

    def wait(self, seconds: float | None = None) -> bool:
        """False where the time is over."""
        self._condition = self._condition or threading.Condition(self._lock)
        return self._condition.wait(seconds)

    def notify_all(self) -> None:
        if self._condition is not None:
            self._condition.notify_all()


class Budget:
    """A number that many draw on. Locking: its own lock, under which no other is taken."""

    def __init__(self, limit: int) -> None:
        self._lock = threading.Lock()
        self._left = limit

    def take(self, count: int) -> int:
        """As much of it as there is."""
        with self._lock:
            taken = min(count, self._left)
            self._left -= taken
            return taken

    def give(self, count: int) -> None:
        with self._lock:
            self._left += count

    @property
    def left(self) -> int:
        with self._lock:
            return self._left


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


def has_error(sock: socket.socket) -> bool:
    """Whether the peer has reset it; without reading the error, which would clear it. False where poll is missing."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def reset_at_close(sock: socket.socket, reset: bool = True) -> None:
    """Make `close` send RST, that of the kernel too when the process is killed; or, at a clean end, FIN again."""
    linger = struct.pack("HH" if os.name == "nt" else "ii", reset, 0)  # struct linger has u_short on Windows
    with contextlib.suppress(OSError):  # macOS: the peer's reset was faster
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


def reason_of(error: BaseException) -> str:
    """One short phrase for a log line."""
    if isinstance(error, TimeoutError) and not error.args[1:]:
        return str(error) or "timed out"
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


class Listener(socketserver.ThreadingTCPServer):
    """A listening port, the control port and the public ones alike; each connection runs in a thread of the pool.

    Threads: its acceptor, in `serve_forever`; the public methods from any other.
    The life of a connection: `get_request` accepts; `admit(sock, peer)` says whether it is served, still in the
    acceptor; `process_request` gives it to the pool, where `handle(sock, peer)` serves it; then, and whatever has
    failed, `shutdown_request` calls `left(sock)` and closes the socket. `handle_error` logs what escaped. `tick` is
    called at least every 0.5 s.
    """

    allow_reuse_address = os.name == "posix"  # on Windows that option would let another program share the port
    request_queue_size = LISTEN_BACKLOG

    def __init__(
        self,
        address: Address,
        pool: Pool,
        handle: Callable[[socket.socket, Address], None],
        tick: Callable[[], None] = lambda: None,
        admit: Callable[[socket.socket, Address], bool] = lambda sock, peer: True,
        left: Callable[[socket.socket], None] = lambda sock: None,
    ) -> None:
        """Bind and listen; what comes waits until `resume`. Raises OSError."""
        self._admit = admit
        self._left = left
        self._pool = pool
        self._handle = handle
        self._tick = tick
        self._asked = threading.Event()
        self._open = threading.Event()
        self._closing = threading.Lock()  # held in `shutdown` and `close` of the socket, as in PlainTransport
        if not address.host and socket.has_dualstack_ipv6():
            address = Address("::", address.port)
        family, _, _, _, target = socket.getaddrinfo(address.host or "0.0.0.0", address.port, type=socket.SOCK_STREAM)[
            0
        ]
        self.address_family = family
        super().__init__(target, socketserver.BaseRequestHandler)  # type: ignore[arg-type]  # the hook is overridden
        self.address = Address(*self.socket.getsockname()[:2])
        self._acceptor = threading.Thread(target=self._accept, name=f"acceptor {self.address}", daemon=True)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(self.server_address[0] != "::"))
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        super().server_bind()

    def start(self) -> None:
        """Start the acceptor; what comes still waits. Raises OSError where no thread can be had."""
        try:
            self._acceptor.start()
        except RuntimeError as error:
            self.socket.close()
            raise OSError(str(error)) from error

    def resume(self) -> None:
        """Accept, from now on or again."""
        self._open.set()

    def pause(self) -> None:
        """Let connections wait in the listen queue."""
        self._open.clear()

    def _accept(self) -> None:
        with contextlib.suppress(_AskedToStop):
            self.serve_forever(poll_interval=DRAIN_STEP_S)
        with self._closing:
            self.socket.close()

    def service_actions(self) -> None:
        if self._asked.is_set():  # `shutdown()` would wait here, one port after the other
            raise _AskedToStop
        self._tick()

    def get_request(self) -> tuple[socket.socket, Any]:
        if not self._open.wait(DRAIN_STEP_S) or self._asked.is_set():  # the selector alone would spin
            raise BlockingIOError
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                log_limit("accept-failed", address=self.address, reason=reason_of(error))
                self._asked.wait(ACCEPT_PAUSE_S)
            raise  # socketserver goes on with the next

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return self._admit(request, Address(*client_address[:2]))

    def process_request(self, request: Any, client_address: Any) -> None:
        address = Address(*client_address[:2])
        try:
            self._pool.run(f"connection {address}", lambda: self.process_request_thread(request, address))
        except (PoolClosed, RuntimeError) as error:
            log_limit("connection-dropped", peer=address, reason=reason_of(error))
            self.shutdown_request(request)
            self._asked.wait(ACCEPT_PAUSE_S)

    def finish_request(self, request: Any, client_address: Any) -> None:
        self._handle(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._left(request)
        request.close()  # only: socketserver would send FIN first and turn each reset into a clean end

    def handle_error(self, request: Any, client_address: Any) -> None:
        log_internal_error()  # the handler's safety net

    def ask_to_stop(self) -> None:
        """No more connections; returns at once. The acceptor closes the socket, on Linux the port is free already."""
        self._asked.set()
        self._open.set()
        with self._closing, contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # Linux: wakes the selector; elsewhere its poll interval does

    def join(self) -> None:
        """After `ask_to_stop`: wait until the socket is closed, at most the selector's poll interval."""
        if self._acceptor.ident is not None and self._acceptor is not threading.current_thread():
            self._acceptor.join()


class _AskedToStop(Exception):
    """Leaves `serve_forever`."""


# ---- transport and writer ---------------------------------------------------------------------------------------


class PlainTransport:
    """What a session reads and writes: a TCP connection.

    Threads: `receive_into` and `close` from the session reader; `send`, `flush` and `finish` from the holder of the
    writer's turn; `shutdown` from any, also when it is closed. The socket carries no Python timeout: it would bound a
    whole `send`, be shared by reader and writer, and turn each receive into poll and receive.
    Locking: `_lock` is held in `shutdown` and `close`, or the one could meet a descriptor that the other has just
    closed, and that a new connection has got.
    """

    identity = ANONYMOUS
    receipt = None

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError where the peer is gone already."""
        self._sock = sock
        self._lock = threading.Lock()
        self.wants_flush: Callable[[], None] = lambda: None  # plain TCP never does
        self.peer = str(Address(*sock.getpeername()[:2]))
        tune(sock, control=True)

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for bytes; 0 at the end. Raises OSError."""
        return self._sock.recv_into(buffer)

    def send(self, frames: bytes | bytearray | memoryview) -> None:
        """Send all. Raises OSError."""
        try:
            self._sock.sendall(frames)
        except BlockingIOError:
            raise TimeoutError(f"the peer took no byte for {WRITE_TIMEOUT_S:g} s") from None

    def set_timeout(self, seconds: float | None) -> None:
        """Of each wait, in the handshake only, when one thread has the transport: TimeoutError."""
        self._sock.settimeout(seconds)

    def flush(self) -> None:
        """Send what the transport itself has to say: plain TCP nothing."""

    def finish(self) -> None:
        """No more will be sent; the peer sees a clean end. Raises OSError."""
        self._sock.shutdown(socket.SHUT_WR)

    def limit_write(self, seconds: float) -> None:
        """A `send` that makes no progress for so long fails."""
        whole, fraction = divmod(seconds, 1)
        timeout = (
            struct.pack("L", round(1000 * seconds))
            if os.name == "nt"
            else struct.pack("ll", int(whole), int(1e6 * fraction))
        )
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)

    def shutdown(self) -> None:
        """End it both ways; whoever waits in it wakes."""
        with self._lock, contextlib.suppress(OSError):  # the peer may have been faster
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            self._sock.close()


Transport = PlainTransport | rtunnel_tls.TlsTransport
TRANSPORT_ERRORS = (OSError, rtunnel_tls.TransportError)


def log_receipt(transport: Transport) -> None:
    if transport.receipt is not None:
        log_event(INFO, "handshake", peer=transport.peer, **transport.receipt.pairs())
        if transport.receipt.days_left <= rtunnel_tls.WARN_DAYS:
            warn_of_expiry(transport.identity, transport.receipt.days_left)


def warn_of_expiry(certificate: str, days_left: int) -> None:
    log_event(WARNING, "certificate-expires", certificate=certificate, days_left=days_left)


class Writer:
    """Many threads' frames onto one transport, in groups.

    Whoever holds the *turn* writes, in one send, the control queue, the queued small frames and its own frame; then
    at most one further batch, so that it is not enslaved; then the next in line has the turn, so that nobody starves
    (whoever lets go of a plain Lock usually gets it again).

    Threads: `send`, `push` from pumps; `serve`, `finish` from the control sender; `wait_unused` from the reader; the
    others from any, they never wait.
    Locking: `_lock` guards everything below the marker. The transport is called by the turn's holder, without it.
    Invariant: where the turn is free nothing waits to be sent, but what the control sender has just been told of.
    Memory: SMALL_QUEUE_BYTES of small frames. Control frames are bounded by structure: WINDOW is summed per stream;
    one NEW_CONN, one BLOCKED and one last frame per stream, and no new stream beyond MAX_UNSENT_FRAMES; one PING;
    MAX_PROVOKED of what only the peer provokes.
    """

    SENDER = "the control sender"

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)  # the control sender waits here, at the end the reader too
        # guarded by _lock
        self._control: list[bytes] = []
        self._provoked = 0  # of those
        self._grants: dict[int, int] = {}  # stream: bytes of credit, for its next WINDOW
        self._small: list[tuple[Stream, bytes]] = []
        self._small_bytes = 0
        self._waiting: collections.deque[tuple[threading.Lock, Stream]] = collections.deque()  # each with its ticket
        self._holder: object = None  # who has the turn: a thread's id; between two, the next one's ticket, or SENDER
        self._woken = False
        self._clock_woken = False
        self._cause: str | None = None
        self._last = b""  # the frame to say before the end

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
            if self._holder is None:
                batch = self._take_turn_locked(frame)
                ticket = None
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
                batch = self._take_turn_locked(None if stream.cut else frame)
        self._write(batch)

    def _fits_locked(self, frame: bytes | memoryview) -> bool:
        fits = len(frame) <= SMALL_FRAME_BYTES and self._small_bytes + len(frame) <= SMALL_QUEUE_BYTES
        return fits and len(self._small) < SMALL_QUEUE_FRAMES

    def post(self, frame: bytes, *, wake: bool = True, provoked: bool = False) -> None:
        """Queue a control frame, ahead of all DATA. Without `wake` the caller must `push` it.

        Raises SessionEnded; ProtocolError where the peer provokes more than it reads.
        """
        with self._lock:
            self._check_open_locked()
            self._provoked += provoked
            if provoked and self._provoked > MAX_PROVOKED:  # who posts anything else is not to blame
                raise ProtocolError(f"over {MAX_PROVOKED} answers are unsent")
            self._control.append(frame)
            if wake:
                self._tell_sender_locked()

    def grant(self, stream: Stream, count: int) -> None:
        """Queue credit for the peer: a WINDOW, summed with what is still unsent of its stream."""
        with self._lock:
            if self._cause is None and not stream.cut:
                self._grants[stream.number] = self._grants.get(stream.number, 0) + count
                self._tell_sender_locked()

    def cut(self, stream: Stream, frame: bytes) -> None:
        """Queue the stream's last frame, ahead of all DATA; its own that is still here is dropped."""
        with self._lock:
            stream.cut = True
            self._grants.pop(stream.number, None)
            self._small = [entry for entry in self._small if entry[0] is not stream]
            self._small_bytes = sum(len(entry[1]) for entry in self._small)
            for entry in [entry for entry in self._waiting if entry[1] is stream]:
                self._waiting.remove(entry)
                entry[0].release()
        self.post(frame)

    def is_behind(self) -> bool:
        """Whether the peer reads too little for more streams: each leaves frames behind, also when it has ended."""
        with self._lock:
            return len(self._control) > MAX_UNSENT_FRAMES

    def unsent_bytes(self) -> int:
        with self._lock:
            return self._small_bytes + sum(map(len, self._control))

    def push(self) -> None:
        """Write what is queued, if the turn is free; else its holder does. Raises SessionEnded."""
        with self._lock:
            self._check_open_locked()
            if self._holder is not None or not self._control:
                return
            batch = self._take_turn_locked()
        self._write(batch)

    def wake(self) -> None:
        """Have the transport flushed, by whoever has the turn, or by the control sender."""
        with self._lock:
            self._woken = True
            self._tell_sender_locked()

    def wake_clock(self) -> None:
        """Make the control sender look at the clock, whoever has the turn: `serve` returns."""
        with self._lock:
            self._clock_woken = True
            self._changed.notify_all()

    def _tell_sender_locked(self) -> None:
        assert self._lock.locked()
        if self._holder is None:  # else its holder sees to it
            self._changed.notify_all()

    def serve(self, seconds: float | None) -> None:
        """For the control sender: write the control queue, wait at most so long for it. Raises SessionEnded."""
        with self._lock:
            if not self._has_work_locked() and not self._clock_woken:
                self._changed.wait(seconds)
            self._clock_woken = False
            self._check_open_locked()
            if not self._has_work_locked():
                return
            batch = self._take_turn_locked()
        self._write(batch)

    def _has_work_locked(self) -> bool:
        return (self._holder is None and self._has_more()) or self._holder is self.SENDER or self._cause is not None

    def _has_more(self) -> bool:
        """Also called without the lock: what that look misses, `_pass_turn` sees."""
        return bool(self._control or self._small or self._grants or self._woken)

    def close(self, cause: str, last: bytes = b"") -> None:
        """No more frames but a last one; everybody who waits gets SessionEnded. The first cause stays."""
        with self._lock:
            if self._cause is None:
                self._cause, self._last = cause, last
            for ticket, _ in self._waiting:
                ticket.release()
            self._waiting.clear()
            if not isinstance(self._holder, int):  # whoever was to have the turn next will not take it
                self._holder = None
            self._changed.notify_all()

    def finish(self) -> None:
        """For the control sender, after `close`: say the last frame, if there is one, and that no more comes."""
        self.wait_unused()
        with self._lock:  # a WELCOME that is still queued goes first: without it the last frame is not understood
            last = b"".join([*self._control, self._last]) if self._last else b""
            self._control.clear()
        with contextlib.suppress(*TRANSPORT_ERRORS):  # it has failed, or was shut
            if last:
                self._transport.send(last)
            self._transport.finish()

    def wait_unused(self) -> None:
        """Wait until nobody is in the transport's `send`; a send that waits ends with the transport's shutdown."""
        with self._lock:
            while self._holder is not None:
                self._changed.wait()

    def _check_open_locked(self) -> None:
        assert self._lock.locked()
        if self._cause is not None:
            raise SessionEnded(self._cause)

    def _take_turn_locked(self, own: bytes | memoryview | None = None) -> tuple[bytes | memoryview | None, bool]:
        """This thread has the turn, and a batch to write: what is queued, then its own frame; and whether to flush."""
        assert self._lock.locked()
        self._holder = threading.get_ident()
        if not self._has_more():
            return own, False
        flush, self._woken = self._woken, False
        frames: list[bytes | memoryview] = [*self._control]
        frames += [encode(FrameType.WINDOW, number, U32.pack(count)) for number, count in self._grants.items()]
        frames += [small for _, small in self._small]
        frames += [own] if own is not None else []
        self._control.clear()
        self._grants.clear()
        self._small.clear()
        self._provoked = self._small_bytes = 0
        return b"".join(frames) or None, flush

    def _write(self, batch: tuple[bytes | memoryview | None, bool]) -> None:
        """Write the batch, one more if others came meanwhile, and pass the turn on."""
        assert self._holder == threading.get_ident(), "only the holder of the turn writes"
        try:
            self._put(*batch)
            if self._has_more():
                with self._lock:
                    batch = self._take_turn_locked()
                self._put(*batch)
        except TRANSPORT_ERRORS as error:
            self.close(reason_of(error))
            raise SessionEnded(reason_of(error)) from error
        finally:
            self._pass_turn()

    def _put(self, frames: bytes | memoryview | None, flush: bool) -> None:
        if frames is not None:
            self._transport.send(frames)
        if flush:
            self._transport.flush()

    def _pass_turn(self) -> None:
        with self._lock:
            self._holder = None
            if self._cause is not None:
                self._changed.notify_all()
            elif self._waiting:
                self._holder, _ = self._waiting.popleft()
                self._holder.release()
            elif self._has_more():
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
    Locking: `_lock` guards everything below the marker. No call that can wait is made, and no other lock but the
    budget's is taken, under it. Only the pump closes the socket, when no drainer is at work: a descriptor closed under
    another thread's call could carry its bytes to a stranger.
    Invariant: `_queued` is the bytes in `_queue` and in the drainer's hands; with no drainer both are empty, or
    there is no socket yet. `_queued` never exceeds the window, at level 0 LEVEL_0_QUEUE_BYTES.
    Level 0 is a window that never runs out, but for the reader's wait.
    """

    def __init__(self, session: Session, number: int, sock: socket.socket | None, visitor: Address | None) -> None:
        self._session = session
        self.number = number
        self.visitor = visitor
        self._level = session.level
        self._opened = time.monotonic()
        self._sent = 0  # bytes from the socket to the tunnel; this and the next are the pump's
        self._sent_at = self._opened  # the last of them, or the end
        self._lock = threading.Lock()
        self._changed = LateCondition(self._lock)  # less queued, more credit, a drainer gone, an end
        # guarded by _lock
        self._sock: socket.socket | None = None
        self._queue = bytearray()
        self._queued = 0
        self._moved = self._opened  # when the queue last got shorter, or the end came
        self._draining = False
        self._send_window = SendWindow(session.peer_window if self._level else UNLIMITED)
        self._receive_window = ReceiveWindow(WINDOW_BYTES if self._level else UNLIMITED)
        self._inbound = Inbound.OPEN
        self._ended_at = 0.0  # when FIN was sent
        self._outbound_ended = False  # the socket's end of file was told to the peer
        self._received = 0  # bytes from the tunnel
        self._peer_closed = False  # CLOSE_CONN has come: what the socket still sends is discarded
        self._close_sent = False  # each side sends at most one CLOSE_CONN, at level 0 exactly one
        self._aborted: str | None = None  # the first cause
        self._lingered = False  # level 0: 5 s have passed since our FIN, no more is discarded
        self._closed = False
        # guarded by Writer._lock
        self.cut = False  # this side's last frame is queued
        if sock is not None:
            with self._lock:
                self._attach_locked(sock)

    # -- called by the session reader

    def feed(self, part: memoryview) -> None:
        """DATA for the socket: at once where it takes it, else queued. Raises ProtocolError.

        At level 0 waits while the queue is full, 20 s.
        """
        with self._lock:
            if not self._takes_locked("DATA"):
                return
            self._receive_window.receive(len(part))
            self._received += len(part)
            sent = grant = 0
            if not self._queued and not self._draining and self._sock is not None:
                sent = self._send_locked(part)
                grant = self._drained_locked(sent)
            if sent < len(part) and self._has_room_locked(len(part) - sent):
                self._queue += part[sent:]
                self._queued += len(part) - sent
            drain = self._settle_locked()
        if grant:
            self._session.writer.grant(self, grant)
        if drain:
            self._start_drainer()

    def close_received(self, reason: bytes) -> None:
        """The peer's CLOSE_CONN. Level 1: a reset. Level 0: with a reason a reset, bare a clean end behind the DATA."""
        with self._lock:
            if self._peer_closed:
                return
            self._peer_closed = True
            answer = not self._close_sent and not self._level
            self._close_sent = True
            if reason or self._level:
                self._abort_locked("peer: " + quoted(reason[:MAX_REASON_BYTES].decode("ascii", "replace")))
            elif answer and not self._received and self._session.role == "server":
                self._abort_locked("peer: refused")  # how the original's client says so
            else:
                self._end_inbound_locked()
        if answer:
            self._session.writer.cut(self, encode(FrameType.CLOSE_CONN, self.number))
            self._session.after(LINGER_S, self._check_linger)

    def end_received(self) -> None:
        """The peer's EOF: FIN for the socket behind what is queued. Raises ProtocolError."""
        with self._lock:
            if self._takes_locked("EOF"):
                self._end_inbound_locked()

    def grant_received(self, count: int) -> None:
        """The peer's WINDOW; dropped where the stream has ended. Raises ProtocolError."""
        with self._lock:
            if self._aborted is None and not (self._outbound_ended and self._inbound is not Inbound.OPEN):
                self._send_window.grant(count)
                self._changed.notify_all()

    def blocked_received(self) -> None:
        """The peer has bytes and no credit: where nothing is queued the window was the brake, and doubles.

        What is owed goes back too, also where nothing can grow: up to half a window may be on its way to be granted,
        and a peer that bursts would reach half its speed with it.
        """
        window = self._receive_window
        with self._lock:
            if self._queued or self._inbound is not Inbound.OPEN or self._aborted is not None or window.debt:
                return
            count = self._session.budget.take(window.growth(window_limit(self._session.shortest_rtt_s)))
            first = count and not window.grown
            grant = window.grow(count)
        if grant:
            self._session.writer.grant(self, grant)
        if first:
            self._session.after(STALL_S, self._check_stalled)

    def _takes_locked(self, name: str) -> bool:
        """False for what an ended stream drops. Raises ProtocolError for what comes after EOF."""
        assert self._lock.locked()
        if self._aborted is None and self._inbound is not Inbound.OPEN and self._level and not self._outbound_ended:
            raise ProtocolError(f"{name} after EOF on stream {self.number}")
        return self._aborted is None and self._inbound is Inbound.OPEN

    # -- called by the control sender's clock

    def _check_linger(self) -> None:
        """Level 0: a socket that has not answered our FIN within 5 s is closed; the kernel delivers on."""
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

    def _check_stalled(self) -> None:
        """A grown window whose queue has not moved for 5 s gives its growth back."""
        with self._lock:
            if self._closed or not self._receive_window.grown:
                return
            wait = self._moved + STALL_S - time.monotonic() if self._queued else STALL_S
            if wait <= 0:
                self._receive_window.shrink()
                return
        self._session.after(wait, self._check_stalled)

    def check_stuck(self) -> None:
        """A stream whose other direction has ended may live 10 minutes more without a byte."""
        with self._lock:
            half_open = self._outbound_ended or self._inbound is not Inbound.OPEN
            if half_open and time.monotonic() - max(self._moved, self._sent_at) > STUCK_S - STUCK_CHECK_S:
                self._abort_locked("stuck")

    def state(self) -> dict[str, object]:
        """What a line of the log says about it."""
        with self._lock:
            state: dict[str, object] = {"stream": self.number, "peer": self.visitor, "received": self._received}
            state |= {"sent": self._sent, "queued": self._queued, "seconds": time.monotonic() - self._opened}
            if self._level:
                state |= {"window": self._receive_window.size, "credit": self._send_window.credit}
            return state | {"ended": self._inbound is Inbound.ENDED, "outbound_ended": self._outbound_ended}

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
        """The pump's life: dial (client), socket to DATA frames, the ends, close."""
        log_event(DEBUG, "stream-opened", stream=self.number, peer=self.visitor, level=self._level)
        try:
            self._session.writer.push()  # its NEW_CONN, if it is new
            if connect is None or self._dial(connect):
                self._pump()
                self._end_outbound()
            self._report_abort()
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
        grant = 0
        with self._lock:
            self._attach_locked(sock)
            if self._queue:  # a request, mostly, which the socket takes at once: that spares a drainer
                sent = self._send_locked(memoryview(self._queue)[:DRAIN_BYTES])
                del self._queue[:sent]
                self._queued = len(self._queue)
                grant = self._drained_locked(sent)
            drain = self._settle_locked()
        if grant:
            self._session.writer.grant(self, grant)
        if drain:
            self._start_drainer()
        return True

    def _attach_locked(self, sock: socket.socket) -> None:
        if DONT_WAIT is None:
            sock.setblocking(False)
        reset_at_close(sock)  # from the start: whatever kills this process, no end that is not clean looks clean
        self._sock = sock

    def _pump(self) -> None:
        """Socket to DATA frames, until its end, an abort, or the end of the session (raises SessionEnded)."""
        sock = self._sock
        assert sock is not None
        buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        while not self._is_over() and (self._send_window.credit or self._wait_for_credit(sock)):
            try:
                count = self._receive(sock, buffer[HEADER_BYTES : HEADER_BYTES + self._send_window.credit])
            except OSError as error:
                self.abort("reset" if isinstance(error, ConnectionError) else reason_of(error))
                return
            if not count or self._is_over():
                return
            if self._peer_closed:
                continue  # discarded: the peer has forgotten the stream
            with self._lock:
                self._send_window.spend(count)
            # The header stands in front of the payload: no copy on the way to the transport.
            HEADER.pack_into(buffer, 0, DATA, self.number, count)
            self._session.writer.send(self, buffer[: HEADER_BYTES + count])
            self._sent += count
            self._sent_at = time.monotonic()
            if HEADER_BYTES + count == len(buffer) < FRAME_SENT_BYTES:
                buffer = memoryview(bytearray(4 * len(buffer)))

    def _receive(self, sock: socket.socket, buffer: memoryview) -> int:
        while True:
            if DONT_WAIT is None and not wait_ready(sock, writing=False, seconds=DRAIN_STEP_S):
                if self._is_over():
                    return 0
                continue
            try:
                return sock.recv_into(buffer)
            except BlockingIOError:
                continue

    def _is_over(self) -> bool:
        return self._aborted is not None or self._lingered

    def _wait_for_credit(self, sock: socket.socket) -> bool:
        """False at the end of the stream. With bytes to send and no credit says BLOCKED, once."""
        said = False
        while not self._send_window.credit and not self._is_over():
            if not said and wait_ready(sock, writing=False, seconds=0):
                self._session.writer.post(encode(FrameType.BLOCKED, self.number))
                said = True
            self._watch(sock, lambda: self._send_window.credit > 0)
        return not self._is_over()

    def _watch(self, sock: socket.socket, done: Callable[[], bool]) -> None:
        """Wait a second for what another thread does, and look whether the socket was reset meanwhile.

        A reset shows in POLLERR even behind unread bytes. SO_ERROR is not read: that would clear the error, and the
        next receive would look like a clean end.
        """
        with self._lock:
            if not done() and self._aborted is None:
                self._changed.wait(WATCH_S)
            over = done()
        if not over and has_error(sock):
            self.abort("reset")

    def _end_outbound(self) -> None:
        """The socket has no more: say so behind its DATA. Level 1: the other direction lives on until it has ended."""
        with self._lock:
            if self._aborted is not None or self._close_sent:
                return
            self._outbound_ended = True
            self._sent_at = time.monotonic()
            if not self._level:
                self._close_sent = True
                self._end_inbound_locked()  # the first end of file ends both directions
            sock = self._sock
        self._session.writer.send(self, encode(FrameType.EOF if self._level else FrameType.CLOSE_CONN, self.number))
        assert sock is not None
        while self._inbound is not Inbound.ENDED and not self._is_over():
            self._watch(sock, lambda: self._inbound is Inbound.ENDED)

    def _report_abort(self) -> None:
        """CLOSE_CONN with the reason, unless the peer has sent its own. Level 0: behind all DATA; level 1: ahead."""
        with self._lock:
            if self._aborted is None or self._close_sent:
                return
            self._close_sent = True
            reason = self._aborted.encode("ascii", "replace")[:MAX_REASON_BYTES]
        frame = encode(FrameType.CLOSE_CONN, self.number, reason)
        if self._level:
            self._session.writer.cut(self, frame)
        else:
            self._session.writer.send(self, frame)

    def _close(self) -> None:
        with self._lock:
            while self._draining:
                self._changed.wait()
            sock, self._sock = self._sock, None
            self._inbound = Inbound.ENDED
            self._closed = True
            if self._level:
                self._session.budget.give(self._receive_window.grown)
        if sock is not None:
            reset_at_close(sock, self._aborted is not None)
            sock.close()
        self._session.forget(self)
        log_event(
            DEBUG, "stream-closed", stream=self.number, peer=self.visitor, level=self._level, received=self._received,
            sent=self._sent, seconds=time.monotonic() - self._opened, reason=self._aborted or "clean",
        )  # fmt: skip

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

    def _drained_locked(self, count: int) -> int:
        """So many bytes have left for the socket; returns the credit to grant."""
        assert self._lock.locked()
        self._moved = time.monotonic()
        grant, paid = self._receive_window.drain(count)
        if paid:
            self._session.budget.give(paid)
        return grant if self._inbound is Inbound.OPEN else 0

    def _has_room_locked(self, count: int) -> bool:
        """False where the stream is aborted. At level 0 waits until `count` bytes fit, 20 s; then it is reset."""
        deadline = Deadline(LEVEL_0_WAIT_S)
        while not self._level and self._queued + count > LEVEL_0_QUEUE_BYTES and self._aborted is None:
            if not self._changed.wait(deadline.remaining()) and not deadline.remaining():
                self._abort_locked("stalled")
        return self._aborted is None and self._inbound is Inbound.OPEN

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
            self._changed.notify_all()
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
            if not wait_ready(sock, writing=True, seconds=DRAIN_STEP_S):
                continue
            with self._lock:  # a reset that this send meets, and so hides from the pump, is marked in one step
                sent = self._send_locked(rest[:DRAIN_BYTES])
                rest = rest[sent:]
                self._queued -= sent
                grant = self._drained_locked(sent)
                self._changed.notify_all()
            if grant:
                self._session.writer.grant(self, grant)

    def _end_inbound_locked(self) -> None:
        """The tunnel has no more for the socket: FIN, now or when the queue is written."""
        assert self._lock.locked()
        if self._inbound is Inbound.OPEN:
            self._inbound = Inbound.ENDING
            self._moved = time.monotonic()
            self._settle_locked()


# ---- session ----------------------------------------------------------------------------------------------------


class Settings(NamedTuple):
    """What the sessions of one process share."""

    heartbeat_s: float = HEARTBEAT_S
    session_budget_bytes: int = SESSION_BUDGET_BYTES
    drain_s: float = 0.0
    proxy_protocol: bool = False  # the client's
    allow: PortRules = PortRules(())  # this and the next are the server's
    visitors: Networks = Networks()


class Session:
    """One control connection's life: its transport, its streams, its clock. The same class on both sides.

    Threads: `run` is the session reader; `_send_control` the control sender; everything public else from any.
    Locking: `_lock` guards everything below the marker. Writer._lock may be taken under it, as `post` never waits.
    Invariant: a stream is in `_streams` from before its NEW_CONN is sent until its socket is closed. Our ids rise
    and are never used again, and each session has its own streams, so a frame never meets another stream's socket.
    """

    role = ""  # "server" or "client"

    def __init__(self, transport: Transport, pool: Pool, settings: Settings) -> None:
        self.transport = transport
        self.writer = Writer(transport)
        transport.wants_flush = self.writer.wake
        self.decoder = Decoder()
        self.settings = settings
        self.budget = Budget(settings.session_budget_bytes)
        self.level = 0  # fixed before the first stream
        self.peer_window = WINDOW_BYTES  # at level 1, where each stream's credit starts
        self.refused: Refused | None = None  # the reader's
        self.rtt_s: float | None = None  # of the last PING; this and the next are the reader's
        self.shortest_rtt_s: float | None = None
        self._pool = pool
        self._received_at = time.monotonic()  # the reader's
        self._reader_left = threading.Event()
        self._sender_left = threading.Event()
        self._order = itertools.count()  # ties of timers: callables have no order
        self._lock = threading.Lock()
        self._fewer = LateCondition(self._lock)  # a stream has gone
        # guarded by _lock
        self._streams: dict[int, Stream] = {}
        self._last_stream = 0
        self._ping: tuple[bytes, float] | None = None  # ours that is not answered yet, and when it was sent
        self._timers: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._cause: str | None = None
        self.after(STUCK_CHECK_S, self._check_stuck)

    # -- the session reader

    def run(self) -> str:
        """Read and dispatch until the end; returns its cause. The transport is closed then, all streams aborted."""
        try:
            self.start_thread(f"control sender {self.transport.peer}", self._send_control)
        except (PoolClosed, RuntimeError) as error:
            self.end(reason_of(error))
            self._sender_left.set()
        try:
            try:
                self._read()
            except Refused as refused:
                self.refused = refused
                self.refuse(refused)
                self._read()  # discards: a close with unread bytes would send RST and swallow the reason
            self.end("closed by the peer")
        except (*TRANSPORT_ERRORS, RtunnelError) as error:
            self.end(reason_of(error))
        except Exception:  # the reader's safety net
            log_internal_error()
            self.end("internal error")
        finally:
            self._reader_left.set()
            self._sender_left.wait()
            self.writer.wait_unused()
            self.transport.close()
            # It is garbage at once: in cycles its buffers, 400 kB with TLS, would wait for a collection.
            with self._lock:
                self._timers.clear()
            self.transport.wants_flush = lambda: None
        assert self._cause is not None
        return self._cause

    def _read(self) -> None:
        buffer = memoryview(bytearray(FIRST_BUFFER_BYTES))
        while count := self.transport.receive_into(buffer):
            if self._cause is not None:
                continue  # this side has said its last word
            self._received_at = time.monotonic()
            for event in self.decoder.feed(buffer[:count]):
                if isinstance(event, DataPart):
                    self._on_data(event)
                else:
                    check(event, level=self.level, role=self.role)
                    self.on_frame(event)
            self.on_received()
            if count == len(buffer) < READER_BUFFER_BYTES:
                buffer = memoryview(bytearray(4 * len(buffer)))

    def _on_data(self, event: DataPart) -> None:
        self.check_may_send("DATA")
        if stream := self._find(event.stream):
            stream.feed(event.part)

    def on_frame(self, frame: Frame) -> None:
        """A whole frame that `check` has passed; the roles add theirs. Raises ProtocolError."""
        self.check_may_send(FrameType(frame.type).name)
        if RULES[FrameType(frame.type)].on_stream:
            if stream := self._find(frame.stream):
                self._on_stream_frame(stream, frame)
        elif frame.type == FrameType.PING:
            self.writer.post(encode(FrameType.PONG, 0, frame.payload), provoked=True)
        elif frame.type == FrameType.PONG:
            self._on_pong(frame.payload)
        else:
            self.on_goaway(frame.payload.decode("ascii", "replace"))

    @staticmethod
    def _on_stream_frame(stream: Stream, frame: Frame) -> None:
        if frame.type == FrameType.WINDOW:
            stream.grant_received(*U32.unpack(frame.payload))
        elif frame.type == FrameType.EOF:
            stream.end_received()
        elif frame.type == FrameType.BLOCKED:
            stream.blocked_received()
        else:
            stream.close_received(frame.payload)

    def _on_pong(self, payload: bytes) -> None:
        with self._lock:
            sent, self._ping = self._ping, None
            if sent is None or sent[0] != payload:
                raise ProtocolError("PONG without a PING")
        self.rtt_s = time.monotonic() - sent[1]
        self.shortest_rtt_s = min(self.rtt_s, self.shortest_rtt_s or self.rtt_s)

    def rtt(self) -> dict[str, float]:
        """For a log line: the last round trip, where one is known."""
        return {} if self.rtt_s is None else {"rtt_ms": 1000 * self.rtt_s}

    def on_goaway(self, reason: str) -> None:
        """The peer will open, or take, no more streams here."""

    def refuse(self, refused: Refused) -> None:
        """Tell the peer, where it can be told, and end."""
        self.end(str(refused))

    def on_received(self) -> None:
        """Called after each receive was dispatched."""

    def check_may_send(self, name: str) -> None:
        """Raises ProtocolError where the peer may not send such a frame yet."""

    def _find(self, number: int) -> Stream | None:
        """The stream, None where it has ended. Raises ProtocolError for an id that was never opened."""
        stream = self._streams.get(number)  # one look, which needs no lock
        if stream is None:
            with self._lock:
                if number > self._last_stream or not number:
                    raise ProtocolError(f"frame for stream {number}, which was never opened")
                stream = self._streams.get(number)  # it may have been opened between
        return stream

    # -- the control sender, whose wait is the session's clock

    def _send_control(self) -> None:
        try:
            while True:
                self.writer.serve(self._run_timers())
        except SessionEnded as ended:
            self._abort_streams(str(ended))
            self.writer.finish()
            self._reader_left.wait(FAREWELL_S)  # after a failed write the reader may still read why
            self.end(str(ended))
        except BaseException:
            self.end("internal error")
            self._abort_streams("internal error")
            raise
        finally:
            self._sender_left.set()

    def _abort_streams(self, cause: str) -> None:
        """Reset the streams that `part` has left, for a second no faster than their pumps can close.

        Ten thousand pumps that wake at once, and each ask for the interpreter's lock every 5 ms, keep the process from
        all other work for seconds: the stop took 3 to 8 s (NOTES.md).
        """
        deadline = Deadline(ABORT_PACE_S)
        still = self.streams()[::-1]
        while still:
            still.pop().abort(cause)
            with self._lock:
                while len(self._streams) - len(still) > ABORTED_AT_ONCE and self._fewer.wait(deadline.remaining()):
                    pass

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
            self.writer.wake_clock()

    def start_level_1(self) -> None:
        """Both sides have announced it, and WELCOME is on its way: heartbeat, a limit on each write."""
        self.transport.limit_write(WRITE_TIMEOUT_S)
        self.after(0, self._beat)
        self.after(HEARTBEATS_TO_DEATH * self.settings.heartbeat_s, self._check_alive)

    def _check_stuck(self) -> None:
        for stream in self.streams():
            stream.check_stuck()
        self.after(STUCK_CHECK_S, self._check_stuck)

    def _beat(self) -> None:
        with self._lock:
            due, ping = self._ping is None, os.urandom(8)  # one at a time: an answer may be slower than the heartbeat
            if due:
                self._ping = ping, time.monotonic()
        if due:
            self.writer.post(encode(FrameType.PING, 0, ping))
        self.after(self.settings.heartbeat_s, self._beat)

    def _check_alive(self) -> None:
        limit = HEARTBEATS_TO_DEATH * self.settings.heartbeat_s
        left = self._received_at + limit - time.monotonic()
        if left <= 0:
            self.end(f"the peer is dead: no byte for {limit:g} s")
        else:
            self.after(left, self._check_alive)

    # -- any thread

    def end(self, cause: str) -> None:
        """End the session and reset its streams; the first cause stays. Never waits: its threads do the rest."""
        self.part(cause)
        self.transport.shutdown()

    def part(self, cause: str, last: bytes = b"") -> None:
        """End it as `end` does, but let the control sender say a last frame, and the peer read it, for a second."""
        with self._lock:
            self._cause = cause = self._cause or cause
            # The control sender, which resets the others, may be in a send that takes long.
            first = list(itertools.islice(self._streams.values(), ABORTED_AT_ONCE))
        self.writer.close(cause, last)
        for stream in first:
            stream.abort(cause)

    def say_goodbye(self, reason: str) -> None:
        """`part` with a GOAWAY, at level 0 without."""
        self.part(reason, encode(FrameType.GOAWAY, 0, reason.encode("ascii")) if self.level else b"")

    def shutdown(self) -> None:
        """What the stop does to it."""
        self.say_goodbye("stopping")

    def expel(self, reason: str) -> None:
        """End it: its peer is no longer allowed."""
        log_event(WARNING, "expelled", peer=self.transport.peer, identity=self.transport.identity, reason=reason)
        self.end(reason)

    def retire(self, reason: str) -> None:
        """No new streams here; those that are open go on, and a client of level 1 connects anew."""
        if self.level:
            with contextlib.suppress(SessionEnded):
                self.writer.post(encode(FrameType.GOAWAY, 0, reason.encode("ascii")))

    def streams(self) -> list[Stream]:
        with self._lock:
            return list(self._streams.values())

    def state(self) -> dict[str, object]:
        """What a line of the log says about it."""
        receipt = self.transport.receipt
        state = {"peer": self.transport.peer, "identity": self.transport.identity, "level": self.level}
        state |= {"streams": self.stream_count(), "unsent": self.writer.unsent_bytes(), "budget_left": self.budget.left}
        state |= self.rtt()
        return state if receipt is None else state | {"certificate_days_left": receipt.days_left}

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
            self._fewer.notify_all()

    def start_thread(self, name: str, task: Task) -> None:
        """A thread whose internal error ends this session. Raises PoolClosed, RuntimeError."""
        self._pool.run(name, lambda: self.guarded(task))

    def guarded(self, task: Task) -> None:
        """Run a stream's thread; an error that nobody foresaw ends the session and reaches the safety net."""
        try:
            task()
        except BaseException:
            self.end("internal error")
            raise

    def _add_locked(self, stream: Stream) -> None:
        assert self._lock.locked()
        if self._cause is not None:
            raise SessionEnded(self._cause)
        self._last_stream = max(self._last_stream, stream.number)
        self._streams[stream.number] = stream


class Program:
    """What server and client share: threads, the TLS context, and what the stop has to end.

    Threads: `stop_connections` from main, the rest from any.
    Locking: `_lock` guards everything below the marker, and what the server adds there.
    """

    def __init__(self, settings: Settings, context: rtunnel_tls.TlsContext | None) -> None:
        self.settings = settings
        self.stop_asked = threading.Event()  # by a signal, or by a final refusal
        self.status = 0  # the process's exit status
        self._context = context
        self._pool = Pool()
        self._lock = threading.Lock()
        # the stop has begun; on the server also: a session has joined or left a lease, a stranger has left
        self._changed = threading.Condition(self._lock)
        # guarded by _lock
        self._connections: list[PlainTransport | Session] = []  # in their handshake, or sessions
        self._stopping = False

    def secure(self, carrier: PlainTransport, deadline: Deadline) -> Transport:
        """The transport of a new control connection: the carrier itself, or TLS over it.

        Raises HandshakeError, OSError, SessionEnded.
        """
        context = self._context
        if context is None:
            return carrier
        with self.registered(carrier):
            return rtunnel_tls.TlsTransport.handshake(carrier, context, deadline.remaining)

    @contextlib.contextmanager
    def registered(self, connection: PlainTransport | Session) -> Iterator[None]:
        """While it lasts the stop and a reload find it. Raises SessionEnded where the stop has begun."""
        with self._lock:
            if self._stopping:
                raise SessionEnded("stopping")
            self._connections.append(connection)
        try:
            if isinstance(connection, Session):
                self.judge(connection)  # from now on a reload does
            yield
        finally:
            with self._lock:
                self._connections.remove(connection)

    def _take_nothing_new(self) -> None:
        with self._lock:
            self._stopping = True
            self._changed.notify_all()

    def stop_connections(self) -> None:
        """No new ones; all that are there end."""
        self._take_nothing_new()
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.shutdown()

    def sessions(self) -> list[Session]:
        with self._lock:
            return [connection for connection in self._connections if isinstance(connection, Session)]

    def stream_count(self) -> int:
        return sum(session.stream_count() for session in self.sessions())

    def drain(self, in_hurry: Callable[[], bool]) -> None:
        """Nothing new, and the open streams may finish: as long as `--drain` says, or until somebody is in a hurry."""
        deadline = Deadline(self.settings.drain_s)
        self._take_nothing_new()
        for session in self.sessions():
            session.retire("stopping")
        while self.stream_count() and deadline.remaining() and not in_hurry():
            time.sleep(min(MAIN_STEP_S, deadline.remaining()))

    def reload(self, fresh: Program) -> None:
        """New handshakes and ports go by the settings of `fresh`; sessions that they do not allow are cut.

        Sessions, streams and listening addresses stay. Raises ConfigError.
        """
        if (self._context is None) != (fresh._context is None):
            raise ConfigError("--tls is neither turned on nor off by a reload: restart the program")
        self.settings, self._context = fresh.settings, fresh._context
        for session in self.sessions():
            self.judge(session)

    def judge(self, session: Session) -> None:
        """End a session that is no longer allowed."""
        context, receipt = self._context, session.transport.receipt
        if context is not None and receipt is not None and context.revokes(receipt):
            session.expel("its certificate is revoked")

    def log_state(self) -> None:
        """A line about this process, and one for each session and each stream."""
        context = self._context
        days = {} if context is None else {"certificate_days_left": min(context.days_left().values())}
        log_event(INFO, "state", threads=threading.active_count(), **self.limits_used(), **days)
        for session in self.sessions():
            log_event(INFO, "state-session", **session.state())
            for stream in session.streams():
                log_event(INFO, "state-stream", session=session.transport.peer, **stream.state())

    def limits_used(self) -> dict[str, str]:
        """Of what is limited, `used/limit`."""
        return {"streams": f"{self.stream_count()}/{MAX_STREAMS}"}


# ---- server -----------------------------------------------------------------------------------------------------


class ServerSession(Session):
    """The server's side: takes INIT, opens streams for visitors."""

    role = "server"

    def __init__(
        self,
        transport: Transport,
        pool: Pool,
        settings: Settings,
        server: Server,
        sock: socket.socket,
        deadline: Deadline,
    ) -> None:
        super().__init__(transport, pool, settings)
        self._server = server
        self.sock = sock  # whose place among the strangers it has
        self._heard = False  # any byte; the reader's
        self.init: Init | None = None  # the reader's
        self.is_client = False  # set once, by the reader (INIT) or the control sender (2 s)
        # guarded by Server._lock
        self.lease: Lease | None = None
        self.visitors = 0  # streams, and those about to be
        if server.has_global_port:
            self.after(SILENT_CLIENT_S, self._join_silent)
        self.after(deadline.remaining(), self._check_hello)

    @property
    def holder(self) -> str | None:
        """Whom a lease belongs to: the certificate's name, in plain mode the instance, which nobody else knows."""
        if self.transport.identity != ANONYMOUS:
            return f"identity {self.transport.identity}"
        return f"instance {self.init.instance}" if self.init and self.init.instance else None

    def on_frame(self, frame: Frame) -> None:
        if frame.type != FrameType.INIT:
            super().on_frame(frame)
            return
        self._check_unknown_frames()
        if self.init is not None:
            raise ProtocolError("a second INIT")
        self.init = Init.parse(frame.payload)
        self._server.open_lease(self, self.init)
        self.is_client = True
        if self.level:
            self.start_level_1()

    def on_received(self) -> None:
        self._heard = True
        self._check_unknown_frames()

    def _check_unknown_frames(self) -> None:
        if not self.is_client and self.decoder.unknown_frames > MAX_UNKNOWN_FRAMES_BEFORE_INIT:
            raise ProtocolError(f"over {MAX_UNKNOWN_FRAMES_BEFORE_INIT} unknown frames before INIT")

    def on_goaway(self, reason: str) -> None:
        self._server.leave_lease(self, "client: " + quoted(reason), linger=False)

    def check_may_send(self, name: str) -> None:
        if not self.is_client:
            raise ProtocolError(f"{name} before INIT")

    def refuse(self, refused: Refused) -> None:
        # A bad request comes before the level is fixed, and only from a client of level 1.
        if self.level or (refused.code == "bad-request" and not self.has_had_streams()):
            lines = f"error={refused.code}\nmessage={refused.message}"
            self.part(str(refused), encode(FrameType.WELCOME, 0, lines.encode("ascii", "replace")))
        else:
            self.end(str(refused))

    def _join_silent(self) -> None:
        if not self.is_client and not self._heard:
            self.is_client = self._server.join_silent(self) or self.is_client

    def _check_hello(self) -> None:
        if not self.is_client:
            self.end(f"no INIT within {HELLO_TIMEOUT_S:.0f} s")

    def has_room(self) -> bool:
        """Whether it takes one more visitor. Called with Server._lock."""
        return self.visitors < MAX_SESSION_STREAMS and not self.writer.is_behind()

    def serve_visitor(self, sock: socket.socket, visitor: Address) -> None:
        """Open a stream for a visitor and be its pump. Raises SessionEnded where none can be opened."""
        with self._lock:
            if self._last_stream == MAX_STREAM_ID:
                raise SessionEnded("its stream ids are used up")
            stream = Stream(self, self._last_stream + 1, sock, visitor)
            # Both in one locked step: ids rise on the wire too, and the answer, be it faster than this thread,
            # finds the stream (defect 10).
            payload = str(visitor).encode("ascii") if self.level else b""
            self.writer.post(encode(FrameType.NEW_CONN, stream.number, payload), wake=False)
            self._add_locked(stream)
        if stream.number == MAX_STREAM_ID:
            self.retire("stream ids are used up")
        self.guarded(stream.run)

    def retire(self, reason: str) -> None:
        self._server.leave_lease(self, reason, linger=self.level > 0)
        super().retire(reason)

    def expel(self, reason: str) -> None:
        self._server.leave_lease(self, reason, linger=False)
        super().expel(reason)


class Lease:
    """A public port, and the sessions that serve it: one, the newest of its holder; on the global port all.

    Guarded by Server._lock.
    """

    def __init__(self, listener: Listener, session: ServerSession | None) -> None:
        self.listener = listener
        self.holder = session.holder if session else None
        self.identity = session.transport.identity if session else ""  # it counts for MAX_LEASES
        self.shared = session is None  # the global port
        self.sessions: list[ServerSession] = []  # who had a visitor last stands last
        self.lingers_until: float | None = None  # its visitors wait in the listen queue for the holder's return

    def join(self, session: ServerSession) -> list[ServerSession]:
        """Returns the sessions that this one replaces: its holder's, on the global port those of its instance."""
        instance = session.init.instance if session.init else ""
        others = [other for other in self.sessions if other is not session]  # it is there where its INIT came late
        replaced = [
            other
            for other in others
            if not self.shared or (instance and other.init and other.init.instance == instance)
        ]
        self.sessions = [*(other for other in others if other not in replaced), session]
        for other in replaced:
            other.lease = None
        session.lease = self
        self.lingers_until = None
        self.listener.resume()
        return replaced

    def state(self) -> dict[str, object]:
        """What a line of the log says about it."""
        peers = ",".join(session.transport.peer for session in self.sessions)
        lingers = self.lingers_until is not None
        return {"address": self.listener.address, "identity": self.identity, "sessions": peers, "lingers": lingers}

    def choose(self, ended: list[ServerSession]) -> ServerSession | None:
        """For a visitor: of those that sent INIT, or else of all, the one with the fewest visitors; it counts."""
        alive = [session for session in self.sessions if session not in ended and session.has_room()]
        asked = [session for session in alive if session.init is not None]
        session = min(asked or alive, key=lambda client: client.visitors, default=None)
        if session is not None:
            session.visitors += 1
            self.sessions.remove(session)
            self.sessions.append(session)
        return session


@dataclasses.dataclass
class Stranger:
    """A control connection that is no client yet. Guarded by Server._lock."""

    carrier: PlainTransport
    site: str
    gives_way: bool = False  # it has been shut, and has yet to leave


class Server(Program):
    """The control port, the sessions, and the leases that they hold.

    Threads: `serve_control` is each session's reader, `_serve_visitor` each stream's pump; `start`, `stop` from main;
    `_tick` from each lease's acceptor.
    Locking: `_lock` guards everything below the marker and all leases. Under it Session._lock and Writer._lock may be
    taken, and ports be bound: bind and listen wait for nobody, and two who want one port come one after the other.
    """

    def __init__(
        self,
        control: Address,
        public: Address | None,
        public_bind: str,
        settings: Settings,
        context: rtunnel_tls.TlsContext | None,
    ) -> None:
        super().__init__(settings, context)
        self._control_address = control
        self._public_address = public
        self._public_bind = public_bind
        self._control: Listener | None = None  # main's
        # guarded by _lock
        self._leases: dict[int, Lease] = {}  # by port
        self._strangers: dict[socket.socket, Stranger] = {}  # the oldest first
        self._visitors = 0  # that are accepted and not closed
        self._assigned: collections.OrderedDict[tuple[str, str], int] = collections.OrderedDict()  # ports by instance

    @property
    def has_global_port(self) -> bool:
        return self._public_address is not None

    def start(self) -> None:
        """Open the ports. Raises RtunnelError where one cannot be bound."""
        try:
            if self._public_address is not None:
                option, address = "public", self._public_address
                with self._lock:
                    lease = self._bind_locked(address, None)
                lease.listener.start()
                lease.listener.resume()
                log_event(INFO, "listening", kind="public", address=lease.listener.address)
            option, address = "control", self._control_address
            self._control = Listener(
                address, self._pool, self.serve_control, admit=self._greet_stranger, left=self._forget_stranger
            )
            self._control.start()
            self._control.resume()
            log_event(INFO, "listening", kind="control", address=self._control.address)
        except OSError as error:
            self.stop()
            raise RtunnelError(f"--{option}-listen {address}: {reason_of(error)}") from error

    def drain(self, in_hurry: Callable[[], bool]) -> None:
        for listener in self._listeners():
            listener.ask_to_stop()
        super().drain(in_hurry)

    def _listeners(self) -> list[Listener]:
        with self._lock:
            listeners = [lease.listener for lease in self._leases.values()]
        return listeners + ([self._control] if self._control else [])

    def stop(self) -> None:
        """No more connections, all streams reset, all threads joined that do not resolve or dial."""
        deadline = Deadline(STOP_TIMEOUT_S)
        listeners = self._listeners()
        for listener in listeners:
            listener.ask_to_stop()
        self.stop_connections()
        for listener in listeners:
            listener.join()
        self._pool.close(deadline)

    # -- control connections

    def serve_control(self, sock: socket.socket, address: Address) -> None:
        """The life of a control connection, in its reader's thread."""
        deadline = Deadline(HELLO_TIMEOUT_S)
        stranger, level, opened, limited = self._strangers[sock], 0, False, False
        try:
            transport = self.secure(stranger.carrier, deadline)
            log_receipt(transport)
            session = ServerSession(transport, self._pool, self.settings, self, sock, deadline)
            with self.registered(session):
                reason = session.run()
                level, opened = session.level, session.is_client
                limited = session.refused is not None and session.refused.code == "too-many-clients"
                self.leave_lease(session, reason, linger=level > 0)
        except (OSError, rtunnel_tls.HandshakeError, SessionEnded) as error:
            reason = reason_of(error)
        if opened:
            log_event(INFO, "session-closed", peer=address, level=level, reason=reason, **session.rtt())
            return
        if stranger.gives_way:
            reason = f"over {MAX_STRANGERS} connections, or {MAX_STRANGERS_PER_SITE} of one site, are no clients yet"
        if stranger.gives_way or limited:
            log_limit("refused", peer=address, level=level, reason=reason)
        else:
            log_event(WARNING, "refused", peer=address, level=level, reason=reason)

    def _greet_stranger(self, sock: socket.socket, address: Address) -> bool:
        """In the acceptor: it takes a place among the strangers, and where none is free the oldest gives way.

        While as many are still on their way out, nobody is accepted: that bounds their threads.
        """
        try:
            stranger = Stranger(PlainTransport(sock), address.site)
        except OSError as error:  # it is gone already
            log_event(WARNING, "refused", peer=address, level=0, reason=reason_of(error))
            return False
        with self._lock:
            while len(self._strangers) >= 2 * MAX_STRANGERS and not self._stopping:
                self._changed.wait()
            self._strangers[sock] = stranger
            everybody = [other for other in self._strangers.values() if not other.gives_way]
            neighbours = [other for other in everybody if other.site == stranger.site]
            for crowd, limit in ((neighbours, MAX_STRANGERS_PER_SITE), (everybody, MAX_STRANGERS)):
                if len(crowd) > limit:
                    crowd[0].gives_way = True
                    crowd[0].carrier.shutdown()  # its reader wakes, and leaves
                    break
        return True

    def _forget_stranger(self, sock: socket.socket) -> None:
        """It has become a client, or is about to be closed."""
        with self._lock:
            self._forget_stranger_locked(sock)

    def _forget_stranger_locked(self, sock: socket.socket) -> None:
        assert self._lock.locked()
        if self._strangers.pop(sock, None) is not None:
            self._changed.notify_all()

    def open_lease(self, session: ServerSession, init: Init) -> None:
        """What INIT asks for: a public port of its own, or a share of the global one. Raises Refused."""
        peer = session.transport.peer
        try:
            with self._lock:
                known = set(self._leases)
                lease, replaced = self._join_lease_locked(session, init)
        except OSError as error:
            log_event(ERROR, "lease-failed", port=init.port, peer=peer, level=session.level, reason=reason_of(error))
            code = "port-in-use" if error.errno == errno.EADDRINUSE else "port-denied"
            if error.errno in OUT_OF_RESOURCES:
                code = "too-many-clients"
            raise Refused(code, f"port {init.port} cannot be opened: {reason_of(error)}") from error
        address = lease.listener.address
        if address.port not in known:
            self._start(lease)
            log_event(INFO, "lease-opened", address=address, peer=peer, level=session.level)
        log_event(
            INFO, "session-opened", peer=peer, identity=session.transport.identity, level=session.level,
            port=address.port, local=init.local[:MAX_MESSAGE_CHARACTERS],
        )  # fmt: skip
        for other in replaced:
            log_event(INFO, "session-replaced", peer=other.transport.peer, by=peer, level=other.level)
            other.say_goodbye("replaced")
            session.after(FAREWELL_S, lambda other=other: other.end("replaced"))  # type: ignore[misc]

    def _join_lease_locked(self, session: ServerSession, init: Init) -> tuple[Lease, list[ServerSession]]:
        """The session's lease from now on, and the sessions that it replaces. Raises Refused, OSError."""
        # The server's first frame fixes the level. No visitor is given to the session while WELCOME is on its way.
        if init.version and not session.visitors and not session.has_had_streams():
            session.level, session.peer_window = 1, init.window
        if self._stopping:
            raise Refused("shutting-down", "the server stops")
        lease = self._find_locked(session, init)
        self._check_limits_locked(session, init, lease)
        lease = lease or self._bind_free_locked(session, init)
        replaced = lease.join(session)  # before WELCOME, which fails where the session has ended: its end leaves it
        if session.level:  # its first frame, ahead of all NEW_CONN
            with contextlib.suppress(SessionEnded):
                session.writer.post(encode(FrameType.WELCOME, 0, Welcome(lease.listener.address.port).payload()))
        self._forget_stranger_locked(session.sock)
        self._changed.notify_all()
        return lease, replaced

    def _find_locked(self, session: ServerSession, init: Init) -> Lease | None:
        """The lease that the session joins; None where it gets a new one. Raises Refused."""
        if self._public_address is not None:
            return next(lease for lease in self._leases.values() if lease.shared)
        port = init.port or self._assigned.get((session.holder or "", init.instance), 0)
        lease = self._leases.get(port)
        mine = lease is not None and session.level and lease.holder is not None and lease.holder == session.holder
        if lease is not None and not mine:
            if not init.port:
                return None
            raise Refused("port-in-use", f"port {port} belongs to another client")
        return lease

    def _check_limits_locked(self, session: ServerSession, init: Init, lease: Lease | None) -> None:
        """Where a port is opened, its rules are checked. Raises Refused."""
        assert self._lock.locked()
        identity = session.transport.identity
        if not self._may_open(session):
            raise Refused("port-denied", f"{identity} may not open port {init.port} (--allow)")
        replaces = lease is not None and not lease.shared and lease.sessions
        if not replaces and self._client_count_locked() >= MAX_CLIENTS:
            raise Refused("too-many-clients", f"{MAX_CLIENTS} clients are connected")
        if lease is None and sum(other.identity == identity for other in self._leases.values()) >= MAX_LEASES:
            raise Refused("too-many-clients", f"{identity} has {MAX_LEASES} ports open")

    def _may_open(self, session: ServerSession) -> bool:
        """By the rules of now. The global port is open to all clients."""
        asked = session.init
        return (
            asked is None or self.has_global_port or self.settings.allow.allow(session.transport.identity, asked.port)
        )

    def _client_count_locked(self) -> int:
        """Sessions, those too that have left their lease, but have streams."""
        assert self._lock.locked()
        sessions = (session for session in self._connections if isinstance(session, ServerSession))
        return sum(session.sock not in self._strangers for session in sessions)

    def judge(self, session: Session) -> None:
        super().judge(session)
        if isinstance(session, ServerSession) and not self._may_open(session):
            session.expel("its port is no longer allowed")

    def log_state(self) -> None:
        super().log_state()
        with self._lock:
            lines = [lease.state() for lease in self._leases.values()]
        for line in lines:
            log_event(INFO, "state-lease", **line)

    def limits_used(self) -> dict[str, str]:
        with self._lock:
            used = {
                "strangers": f"{len(self._strangers)}/{MAX_STRANGERS}",
                "clients": f"{self._client_count_locked()}/{MAX_CLIENTS}",
                "leases": str(len(self._leases)),
                "visitors": f"{self._visitors}/{MAX_STREAMS}",
            }
        return super().limits_used() | used

    def _bind_free_locked(self, session: ServerSession, init: Init) -> Lease:
        """A lease of the port asked for, or that this instance had before, or any. Raises OSError."""
        key = (session.holder or "", init.instance)
        if not init.port and (port := self._assigned.get(key)):
            with contextlib.suppress(OSError):
                return self._bind_locked(Address(self._public_bind, port), session)
        lease = self._bind_locked(Address(self._public_bind, init.port), session)
        if not init.port and init.instance:
            self._assigned[key] = lease.listener.address.port
            while len(self._assigned) > MAX_ASSIGNED_PORTS:
                self._assigned.popitem(last=False)
        return lease

    def _bind_locked(self, address: Address, session: ServerSession | None) -> Lease:
        """A new lease: the session's, or the global port's. Its visitors wait until it is resumed. Raises OSError."""
        assert self._lock.locked()

        def serve(sock: socket.socket, visitor: Address) -> None:
            self._serve_visitor(lease, sock, visitor)

        listener = Listener(
            address, self._pool, serve, lambda: self._tick(lease), self._admit_visitor, self._visitor_left
        )
        lease = Lease(listener, session)
        self._leases[lease.listener.address.port] = lease
        return lease

    def _start(self, lease: Lease) -> None:
        """Start its acceptor; not under the lock, for that waits until the thread runs. Raises SessionEnded."""
        try:
            lease.listener.start()
        except OSError as error:
            with self._lock:
                sessions = list(lease.sessions)  # nearly always one
            for session in sessions:
                self.leave_lease(session, reason_of(error), linger=False)
                session.end(reason_of(error))
            raise SessionEnded(reason_of(error)) from error

    def join_silent(self, session: ServerSession) -> bool:
        """Whether a connection without INIT has become a client of the global port."""
        with self._lock:
            lease = next((lease for lease in self._leases.values() if lease.shared), None)
            if session.lease is not None or lease is None or len(lease.sessions) >= MAX_CLIENTS:
                return session.lease is not None  # its INIT was faster; or there is no place, then it stays a stranger
            lease.join(session)
            self._forget_stranger_locked(session.sock)
        log_event(INFO, "session-opened", peer=session.transport.peer, level=0, port=lease.listener.address.port)
        return True

    def leave_lease(self, session: ServerSession, reason: str, *, linger: bool) -> None:
        """No more visitors for this session; without another its port closes, after 5 s where it may linger."""
        with self._lock:
            lease, session.lease = session.lease, None
            if lease is None:
                return
            lease.sessions.remove(session)
            self._changed.notify_all()
            if lease.sessions or (lease.shared and not linger):
                return
            if linger and not self._stopping:
                lease.listener.pause()
                lease.lingers_until = time.monotonic() + LEASE_LINGER_S
                return
            self._drop_locked(lease)
        log_event(INFO, "lease-closed", address=lease.listener.address, reason=reason)
        lease.listener.join()

    def _tick(self, lease: Lease) -> None:
        """The acceptor's, twice a second: a lease that has lingered long enough closes; a global one refuses again."""
        with self._lock:
            if lease.lingers_until is None or time.monotonic() < lease.lingers_until:
                return
            lease.lingers_until = None
            if lease.shared:
                lease.listener.resume()
                return
            self._drop_locked(lease)
        log_event(INFO, "lease-closed", address=lease.listener.address, reason="its client did not come back")

    def _drop_locked(self, lease: Lease) -> None:
        assert self._lock.locked()
        del self._leases[lease.listener.address.port]
        lease.listener.ask_to_stop()

    def _serve_visitor(self, lease: Lease, sock: socket.socket, visitor: Address) -> None:
        """The life of a visitor's connection, in its pump's thread."""
        deadline = Deadline(LEASE_LINGER_S)
        ended: list[ServerSession] = []
        try:
            tune(sock)
            while session := self._choose(lease, ended, deadline):
                try:
                    return session.serve_visitor(sock, visitor)
                except SessionEnded:
                    ended.append(session)
                finally:
                    with self._lock:
                        session.visitors -= 1
            raise SessionEnded("no client is connected, or none takes more")
        except (SessionEnded, OSError) as error:
            reset_at_close(sock)
            log_limit("visitor-refused", peer=visitor, reason=reason_of(error))

    def _admit_visitor(self, sock: socket.socket, visitor: Address) -> bool:
        """In the acceptor: before a byte is read, and before there is a thread."""
        with self._lock:
            self._visitors += 1
            full = self._visitors > MAX_STREAMS
        if not full and self.settings.visitors.admit(visitor):
            return True
        log_limit("visitor-refused", peer=visitor, reason="too many are here" if full else "not of --visitors")
        reset_at_close(sock)
        return False

    def _visitor_left(self, sock: socket.socket) -> None:
        with self._lock:
            self._visitors -= 1

    def _choose(self, lease: Lease, ended: list[ServerSession], deadline: Deadline) -> ServerSession | None:
        """A session for a visitor. One who was accepted just before a session ended waits as those in the queue do."""
        with self._lock:
            while (session := lease.choose(ended)) is None and not self._stopping:
                full = any(session not in ended for session in lease.sessions)
                may_return = lease.sessions or lease.lingers_until is not None
                if full or not may_return or not self._changed.wait(deadline.remaining()):
                    break
            return session


# ---- client -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mapping:
    """One public port and the local service that it leads to."""

    remote_port: int  # 0: the server chooses
    local: Address
    # 128 random bits in hex, kept over reconnects; never logged: in plain mode it is what a lease belongs to
    instance: str = dataclasses.field(default_factory=lambda: secrets.token_hex(16), repr=False, compare=False)

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
    """The client's side: asks for a port, dials the local service for each NEW_CONN."""

    role = "client"

    def __init__(self, transport: Transport, pool: Pool, settings: Settings, client: Client, mapping: Mapping) -> None:
        super().__init__(transport, pool, settings)
        self._client = client
        self._mapping = mapping
        self._began = time.monotonic()
        self._heard = False  # any frame; the reader's. The server's first one fixes the level
        self._public: Address | None = None  # told by WELCOME
        self.is_open = False  # set once, by the reader (first frame) or the control sender (10 s)
        self.goaway: str | None = None  # the server's reason; the reader's
        init = Init(mapping.remote_port, str(mapping.local), mapping.instance, version=1)
        self.writer.post(encode(FrameType.INIT, 0, init.payload()))
        self.after(LIVED_S, self._open)

    def on_frame(self, frame: Frame) -> None:
        if frame.type == FrameType.WELCOME:
            if self._heard:
                raise ProtocolError("WELCOME behind another frame")
            welcome = Welcome.parse(frame.payload)
            self._public = Address(Address.parse(self.transport.peer).host, welcome.port)
            self.level, self.peer_window = 1, welcome.window
            self._client.expects_welcome = True
            self.start_level_1()
        self._heard = True
        self._open()
        if frame.type == FrameType.NEW_CONN:
            self._on_new_conn(frame)
        elif frame.type != FrameType.WELCOME:
            super().on_frame(frame)

    def _open(self) -> None:
        """The server has taken this session: in TLS 1.3 the handshake alone does not say so."""
        if not self._heard and self._client.expects_welcome:  # once: it may have become an original, which says nothing
            self._client.expects_welcome = False
            self.end(f"no WELCOME within {LIVED_S:g} s")
        elif not self.is_open:
            self.is_open = True
            public = self._public or f"port {self._mapping.remote_port}"
            log_event(
                INFO, "session-opened", public=public, local=self._mapping.local, level=self.level,
                server=self.transport.peer,
            )  # fmt: skip
            log_receipt(self.transport)  # behind the public address, which users look for in the first line

    def on_goaway(self, reason: str) -> None:
        if self.goaway is not None:
            return  # another thread has the mapping already
        log_event(INFO, "goaway", server=self.transport.peer, level=self.level, reason=reason)
        if reason != REPLACED:
            if len(self._client.sessions()) >= self._client.max_sessions:
                raise SessionEnded("GOAWAY again, and older sessions still have streams")  # this thread connects anew
            young = time.monotonic() < self._began + FIRST_RETRY_S
            try:
                self._client.connect(self._mapping, FIRST_RETRY_S if young else 0)  # this session's streams go on
            except RuntimeError as error:
                raise SessionEnded(reason_of(error)) from error  # the same
        self.goaway = reason

    def _on_new_conn(self, frame: Frame) -> None:
        visitor = self._visitor(frame.payload) if self.level else None
        if self.writer.is_behind():
            raise ProtocolError(f"NEW_CONN, with over {MAX_UNSENT_FRAMES} frames that the server has not read")
        full = self._client.stream_count() >= MAX_STREAMS
        with self._lock:
            # At level 0 any order: the original numbers its visitors before it takes their turn to write.
            if not frame.stream or frame.stream in self._streams or (self.level and frame.stream <= self._last_stream):
                raise ProtocolError(f"NEW_CONN for stream {frame.stream} after stream {self._last_stream}")
            stream = Stream(self, frame.stream, None, visitor)
            self._add_locked(stream)
        try:
            if full:
                raise RuntimeError(f"{MAX_STREAMS} streams are open")
            self.start_thread(f"pump {stream.number}", lambda: stream.run(lambda: self._dial_local(stream)))
        except RuntimeError as error:  # that stream alone ends
            stream.abort(reason_of(error))
            self.forget(stream)
            log_limit("stream-refused", peer=visitor, reason=reason_of(error))
            reason = reason_of(error).encode("ascii", "replace")[:MAX_REASON_BYTES]
            self.writer.post(encode(FrameType.CLOSE_CONN, stream.number, reason), provoked=True)

    @staticmethod
    def _visitor(payload: bytes) -> Address:
        try:
            address = Address.parse(payload.decode("ascii"))
            ipaddress.ip_address(address.shown_host)
        except (ConfigError, ValueError):
            raise ProtocolError(f"NEW_CONN says that the visitor is {payload!r}") from None
        return address

    def _dial_local(self, stream: Stream) -> socket.socket:
        try:
            sock = dial(self._mapping.local, DIAL_TIMEOUT_S)
            if self.settings.proxy_protocol:
                public = self._public or self._mapping.local  # at level 0 it is not said
                sock.sendall(proxy_line(stream.visitor, public))  # fits into an empty socket buffer: does not wait
            return sock
        except OSError as error:
            log_event(
                WARNING, "dial-failed", local=self._mapping.local, stream=stream.number, peer=stream.visitor,
                level=self.level, reason=reason_of(error),
            )  # fmt: skip
            raise


class Client(Program):
    """One thread a mapping: dial the server, run the session, wait, again.

    Threads: `start`, `stop` from main; `_run_mapping` in each mapping's thread, which is its session's reader.
    """

    def __init__(
        self,
        server: Address,
        mappings: Sequence[Mapping],
        reconnect_max_s: float,
        settings: Settings,
        context: rtunnel_tls.TlsContext | None,
        load_context: Callable[[], rtunnel_tls.TlsContext | None] | None = None,
    ) -> None:
        super().__init__(settings, context)
        self._load_context = load_context or (lambda: context)
        self._server = server
        self._mappings = mappings
        self.max_sessions = len(mappings) + MAX_RETIRED
        self.expects_welcome = False  # the server is of level 1: its silence is the network's. Any reader sets it
        self._reconnect_max_s = reconnect_max_s

    def start(self) -> None:
        for mapping in self._mappings:
            self.connect(mapping)

    def connect(self, mapping: Mapping, wait_s: float = 0) -> None:
        """Start the mapping's thread."""
        self._pool.run(f"mapping {mapping.local}", lambda: self._run_mapping(mapping, wait_s))

    def stop(self) -> None:
        """End all sessions, join all threads that do not resolve or dial."""
        deadline = Deadline(STOP_TIMEOUT_S)
        self.stop_asked.set()
        self.stop_connections()
        self._pool.close(deadline)

    def reload(self, fresh: Program) -> None:
        assert isinstance(fresh, Client)
        super().reload(fresh)
        self._load_context = fresh._load_context

    def _renew_context(self) -> None:
        """Connect with the certificate that is there now; where that is broken, with the one of before."""
        try:
            self._context = self._load_context()
        except rtunnel_tls.TlsConfigError as error:
            log_event(ERROR, "reload-failed", reason=error)

    def _run_mapping(self, mapping: Mapping, wait_s: float) -> None:
        self.stop_asked.wait(wait_s)
        backoff = Backoff(self._reconnect_max_s)
        while not self.stop_asked.is_set():
            log_event(DEBUG, "connecting", server=self._server)
            self._renew_context()
            event, level, refused, rtt = "connect-failed", 0, False, dict[str, float]()
            session: ClientSession | None = None
            try:
                with contextlib.closing(dial(self._server, CONNECT_TIMEOUT_S)) as sock:
                    transport = self.secure(PlainTransport(sock), Deadline(HELLO_TIMEOUT_S))
                    session = ClientSession(transport, self._pool, self.settings, self, mapping)
                    with self.registered(session):
                        reason = session.run()
                event, level, rtt = "session-closed", session.level, session.rtt()
            except (OSError, rtunnel_tls.HandshakeError, SessionEnded) as error:
                refused, reason = isinstance(error, ConnectionRefusedError), reason_of(error)
            wait = backoff.next_s(refused=refused)
            if session is not None:
                if session.is_open:
                    backoff.reset()
                    wait = backoff.next_s(refused=False)
                if session.refused is not None and session.refused.code in FINAL_REFUSALS:
                    log_event(ERROR, "refused", server=self._server, local=mapping.local, level=level, reason=reason)
                    self.status = 3
                    self.stop_asked.set()
                if session.goaway == REPLACED:
                    wait = REPLACED_RETRY_S
                elif session.goaway is not None:
                    log_event(INFO, event, server=self._server, level=level, reason=reason, **rtt)
                    return  # another thread has the mapping since the GOAWAY
            if not self.stop_asked.is_set():
                log_event(WARNING, event, server=self._server, level=level, reason=reason, retry_s=wait, **rtt)
                self.stop_asked.wait(wait)


# ---- configuration and commands -----------------------------------------------------------------------------------


class Option(NamedTuple):
    """One row of the table behind flags, environment, configuration files and help."""

    group: str
    name: str
    default: Any
    parse: Callable[[str], Any]
    metavar: str
    help: str
    action: str = "store"


def listen_address(text: str) -> Address | None:
    return Address.parse(text, listen=True) if text else None


def dial_address(text: str) -> Address | None:
    return Address.parse(text) if text else None


def bind_host(text: str) -> str:
    host = text.strip("[]")
    with contextlib.suppress(ValueError):  # no name: it is bound under a lock, where nobody may wait for a resolver
        return str(ipaddress.ip_address(host)) if host else ""
    raise ConfigError(f"{text!r} is no IP address: write one of this machine's, or nothing for all")


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) or not float(text):
        raise ConfigError(f"{text!r} is no time: write a number of seconds above 0")
    return float(text)


def seconds_or_none(text: str) -> float:
    return 0.0 if text == "0" else seconds(text)


def mebibytes(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        raise ConfigError(f"{text!r} is no size: write a number of MiB")
    return int(text) * 1024 * 1024


def cpu(text: str) -> int | str:
    if text in ("auto", "any"):
        return text
    if not re.fullmatch(r"[0-9]{1,4}", text):
        raise ConfigError(f"{text!r} is no CPU: write its number, auto or any")
    return int(text)


def log_level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise ConfigError(f"{text!r} is no level: write debug, info, warning or error")
    return text


def profile(text: str) -> str:
    if text not in rtunnel_tls.PROFILES:
        raise ConfigError(f"{text!r} is no profile: write {', '.join(rtunnel_tls.PROFILES)}")
    return text


# fmt: off
def tls_options(role: str) -> list[Option]:
    return [
        Option("TLS", "tls", False, bool, "",
               "post-quantum mutual TLS; without it nothing is encrypted, and anybody may connect", "switch"),
        Option("TLS", "tls-cert", f"conf/pki/{role}.crt", str, "FILE", "our certificate, and those below the root"),
        Option("TLS", "tls-key", f"conf/pki/{role}.key", str, "FILE", "its key, readable by its owner only"),
        Option("TLS", "tls-ca", "conf/pki/ca.crt", str, "FILE", "the authorities whose certificates are admitted"),
        Option("TLS", "tls-crl", "", str, "FILE", "the revocation lists of all of them; empty: none is looked at"),
        Option("TLS", "tls-profile", "default", profile, "NAME", f"one of {', '.join(rtunnel_tls.PROFILES)}"),
    ]


SHARED_OPTIONS = [
    Option("limits", "heartbeat", "15", seconds, "SECONDS", "a PING so often; three times that without a byte: dead"),
    Option("limits", "session-budget", "64", mebibytes, "MIB", "what the windows of one session may grow by, in all"),
    Option("limits", "drain", "0", seconds_or_none, "SECONDS",
           "at SIGTERM the open streams have so long to finish; 0: they are reset at once"),
    Option("limits", "cpu", "auto", cpu, "NUMBER",
           "the CPU to run on: one is faster than several; auto: the first for a server, another for a client; "
           "any: all of them"),
    Option("log", "log-level", "info", log_level, "LEVEL", "debug, info, warning or error"),
]
OPTIONS = {
    "server": [
        Option("ports", "control-listen", ":7000", listen_address, "ADDRESS", "where clients connect"),
        Option("ports", "public-listen", "", listen_address, "ADDRESS",
               "one global public port that all clients serve; empty: each client asks for its own"),
        Option("ports", "public-bind", "", bind_host, "HOST",
               "the address that ports chosen by clients are opened on; empty: all interfaces"),
        Option("ports", "allow", [], PortRules.parse, "NAME=PORTS",
               "the ports that an identity may open, 0 is one of the server's choice, * whoever has no rule; "
               f"repeatable, in a file list [a, b]; none: {PortRules.DEFAULT}", "append"),
        Option("ports", "visitors", "", Networks.parse, "CIDR,CIDR",
               "the networks whose visitors are served; empty: all"),
        *tls_options("server"),
        *SHARED_OPTIONS,
    ],
    "client": [
        Option("tunnel", "server", "", dial_address, "ADDRESS", "the server's control port; required"),
        Option("tunnel", "local", "", dial_address, "ADDRESS", "the local service, host:port"),
        Option("tunnel", "remote-port", "0", parse_port, "PORT", "the public port; 0: the server chooses"),
        Option("tunnel", "forward", [], Mapping.parse, "PORT:HOST:PORT",
               "remote port and local service, instead of the two above; repeatable, in a file list [a, b]", "append"),
        Option("tunnel", "proxy-protocol", False, bool, "",
               "tell the local service the visitor's address in a PROXY protocol line, version 1", "switch"),
        Option("tunnel", "reconnect-max", "30", seconds, "SECONDS", "the longest wait between two attempts"),
        *tls_options("client"),
        Option("TLS", "tls-server-name", "", str, "NAME",
               "the host or address that the server's certificate must name; empty: the one in --server"),
        *SHARED_OPTIONS,
    ],
}
# fmt: on


class ConfigFile(configargparse.DefaultConfigFileParser):  # type: ignore[misc]
    """Flat `key = value` lines; a key that no option has is an error that names the file."""

    command = ""  # each command has a subclass

    def parse(self, stream: TextIO) -> dict[str, Any]:
        try:
            settings: dict[str, Any] = super().parse(stream)
        except UnicodeDecodeError:
            raise configargparse.ConfigFileParserException(f"{stream.name}: this is no UTF-8 text") from None
        options = {option.name: option for option in OPTIONS[self.command]}
        for key, value in settings.items():
            if key not in options:
                raise configargparse.ConfigFileParserException(f"{stream.name}: unknown key {key!r}; --help lists all")
            if isinstance(value, list) and options[key].action != "append":
                raise configargparse.ConfigFileParserException(f"{stream.name}: {key} takes one value, and no list")
        return settings


class CommandParser(configargparse.ArgumentParser):  # type: ignore[misc]
    """Errors are one sentence: at the start on stderr, with status 2; at a reload in the log."""

    def error(self, message: str) -> NoReturn:
        shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
        raise ConfigError(f"{self.prog}: {shown}")


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
        typed: dict[str, Any] = {"action": option.action, "type": option.parse, "metavar": option.metavar}
        if option.action == "switch":
            typed = {"action": argparse.BooleanOptionalAction}
        groups[option.group].add_argument(f"--{option.name}", default=option.default, help=option.help, **typed)
    parser.set_defaults(run=run_program, parser=parser, command=command)


def make_program(settings: argparse.Namespace) -> Server | Client:
    """What the settings ask for, not started. Raises ConfigError, TlsConfigError."""
    return make_server(settings) if settings.command == "server" else make_client(settings)


def make_server(settings: argparse.Namespace) -> Server:
    if settings.control_listen is None:
        raise ConfigError("--control-listen must not be empty: write host:port or :port")
    if settings.public_listen and settings.allow:
        raise ConfigError("--allow is about ports that clients ask for, and with --public-listen they ask for none")
    shared = Settings(
        settings.heartbeat, settings.session_budget, drain_s=settings.drain, allow=PortRules(settings.allow),
        visitors=settings.visitors,
    )  # fmt: skip
    context = make_context(settings)
    warn(settings, context)
    return Server(settings.control_listen, settings.public_listen, settings.public_bind, shared, context)


def make_client(settings: argparse.Namespace) -> Client:
    if not settings.server:
        raise ConfigError("--server is required: write the server's host:port")
    if bool(settings.local) == bool(settings.forward):
        raise ConfigError("either --local (with --remote-port) or --forward is required, and not both")
    if settings.forward and settings.remote_port:
        raise ConfigError("--remote-port belongs to --local: in --forward the remote port stands first")
    mappings = settings.forward or [Mapping(settings.remote_port, settings.local)]
    shared = Settings(settings.heartbeat, settings.session_budget, settings.drain, settings.proxy_protocol)
    context = make_context(settings)
    warn(settings, context)
    return Client(settings.server, mappings, settings.reconnect_max, shared, context, lambda: make_context(settings))


def make_context(settings: argparse.Namespace) -> rtunnel_tls.TlsContext | None:
    """None in plain mode. Raises TlsConfigError."""
    if not settings.tls:
        return None
    name = (settings.tls_server_name or settings.server.host) if settings.command == "client" else None
    return rtunnel_tls.make_context(
        settings.command, settings.tls_profile, cert=settings.tls_cert, key=settings.tls_key, ca=settings.tls_ca,
        crl=settings.tls_crl or None, verify_name=name,
    )  # fmt: skip


def warn(settings: argparse.Namespace, context: rtunnel_tls.TlsContext | None) -> None:
    """Log what is worth a warning at the start and at each reload."""
    address = settings.server if settings.command == "client" else settings.control_listen
    if context is None:
        if not address.is_loopback:
            log_event(WARNING, "plain-mode", address=address, meaning="nothing is encrypted, and anybody may connect")
        return
    for file, _, days_left in context.expiring():
        warn_of_expiry(file, days_left)
    if context.keylog is not None:
        log_event(WARNING, "secrets-logged", file=context.keylog, meaning="SSLKEYLOGFILE: who reads it reads all")


def run(program: Server | Client, remake: Callable[[], Server | Client]) -> int:
    """Run until SIGINT, SIGTERM or Ctrl+Break; SIGHUP reloads what `remake` makes, SIGUSR1 logs the state.

    The first SIGTERM drains where `--drain` says so; SIGINT, and a second signal, do not wait; one more ends at once.
    """
    asked: collections.deque[str] = collections.deque()  # SIGHUP, SIGUSR1
    stopped_by: list[str] = []

    def in_hurry() -> bool:
        return len(stopped_by) > 1 or stopped_by[:1] != ["SIGTERM"] or not program.settings.drain_s

    wake = threading.Lock()  # held but between a signal and main's look at it
    wake.acquire()

    def on_signal(number: int, frame: types.FrameType | None) -> None:
        # It takes notes for main, and sets no Event: main may be inside that one, with the lock that `set` wants.
        name = signal.Signals(number).name
        with contextlib.suppress(RuntimeError):  # it is released already
            wake.release()
        if name in ("SIGHUP", "SIGUSR1"):
            asked.append(name)
        elif stopped_by and in_hurry():
            os._exit(1)
        else:
            stopped_by.append(name)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), on_signal)
    program.start()
    while not (stopped_by or program.stop_asked.is_set()):
        wake.acquire(timeout=MAIN_STEP_S)
        while asked:
            if asked.popleft() == "SIGUSR1":
                program.log_state()
            else:
                reload(program, remake)
    log_event(INFO, "stopping", signal=stopped_by[0] if stopped_by else "none")
    program.stop_asked.set()
    if not in_hurry():
        program.drain(in_hurry)
        stopped_by.append("drained")  # from now on one more signal ends at once
    program.stop()
    log_event(INFO, "stopped", status=program.status)
    try:
        sys.stderr.flush()
    except OSError:  # a full disk: the interpreter would try once more, and make that the exit status
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    return program.status


def reload(program: Server | Client, remake: Callable[[], Server | Client]) -> None:
    """What is broken is refused, all of it, in whatever way it is, and the old stays."""
    try:
        program.reload(remake())
    except Exception as error:
        log_event(ERROR, "reload-failed", reason=reason_of(error))
    else:
        log_event(INFO, "reloaded")


def stay_on_cpu(number: int | str, role: str) -> None:
    """Keep this process's threads, that are yet to start, on one CPU: a number, or `auto`; Linux alone.

    Only one of them has the interpreter's lock. On several CPUs each hand-over of the lock wakes another CPU, which
    costs more than what the thread then does: half of all processor time, with many short connections (NOTES.md).
    A server and a client of one machine must not choose the same, nor need all its clients.
    """
    if number == "any" or not hasattr(os, "sched_setaffinity"):
        return
    allowed = sorted(os.sched_getaffinity(0))
    if number == "auto":
        number = allowed[0] if role == "server" or len(allowed) == 1 else random.choice(allowed[1:])
    elif number not in allowed:
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
    with contextlib.suppress(ValueError, OSError):  # macOS refuses "unlimited"
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def add_pki(commands: Any) -> None:
    """`pki init|issue|renew|revoke|show`: the certificate authority of rtunnel_tls, in a folder."""
    pki = commands.add_parser(
        "pki", help="make and show certificates", description="A certificate authority in a folder."
    )
    actions = pki.add_subparsers(
        dest="action", required=True, metavar="init|issue|renew|revoke|show", parser_class=CommandParser
    )
    algorithms = list(rtunnel_tls.ALGORITHMS)
    init = actions.add_parser("init", help="make an authority and its empty revocation list")
    init.add_argument("--algorithm", choices=algorithms, default="mldsa65", help="of its key (default: mldsa65)")
    init.add_argument("--name", default="rtunnel CA", help="its common name (default: rtunnel CA)")
    init.add_argument("--years", type=int, default=10, help="how long it is valid (default: 10)")
    issue = actions.add_parser("issue", help="issue a key and its certificate")
    role = issue.add_mutually_exclusive_group(required=True)
    role.add_argument("--server", nargs="+", metavar="HOST", help="for a server that clients dial by these names")
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
    for action in (init, issue, renew, revoke, show):
        action.add_argument("--dir", default="conf/pki", help="the folder (default: conf/pki)")
    pki.set_defaults(run=run_pki, parser=pki)


# What `pki` says behind the path of what it has made: which file goes where next.
PKI_NEXT = {
    "init": "Copy ca.crt and crl.pem to each machine (--tls-ca, --tls-crl). ca.key must never leave this folder.",
    "issue": "Copy {name}.crt and {name}.key to {name}'s machine (--tls-cert, --tls-key), with ca.crt and crl.pem.",
    "renew": "Copy {name}.crt and {name}.key over the old pair on {name}'s machine, then send that rtunnel SIGHUP. "
    "The old pair is valid until it ends: if it has leaked, revoke it by the serial number that `pki show` tells.",
    "revoke": "Copy crl.pem to each machine, over the file that its --tls-crl names, then send each rtunnel SIGHUP. "
    "Until then what was revoked is still admitted there.",
}


def run_pki(settings: argparse.Namespace) -> int:
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # a certificate's name need not fit the terminal
    if settings.action == "init":
        options = {"algorithm": settings.algorithm, "name": settings.name, "years": settings.years}
        print(rtunnel_tls.init_authority(settings.dir, **options, force=settings.force))
    elif settings.action == "issue":
        options = {"days": settings.days, "algorithm": settings.algorithm, "force": settings.force}
        print(rtunnel_tls.issue(settings.dir, settings.name, hosts=settings.server, **options))
    elif settings.action == "renew":
        print(rtunnel_tls.renew(settings.dir, settings.name))
    elif settings.action == "revoke":
        print(rtunnel_tls.revoke(settings.dir, settings.name, serial=settings.serial))
    else:
        print("\n".join(rtunnel_tls.show(settings.file or settings.dir)))
    if settings.action in PKI_NEXT:
        print(PKI_NEXT[settings.action].format(name=settings.name))
    return 0


def run_program(settings: argparse.Namespace) -> int:
    if settings.print_config:
        shown = settings.parser.format_values()
        print(shown, end="")
        for option in OPTIONS[settings.command]:  # of the defaults, which stand last, it leaves out the switches
            if option.action == "switch" and not re.search(rf"\b{option.name}\b(?!-)", shown):
                print(f"  --{option.name}: {option.default}")
        return 0
    start_log(settings.log_level)
    threading.stack_size(STACK_BYTES)
    raise_descriptor_limit()
    stay_on_cpu(settings.cpu, settings.command)
    return run(make_program(settings), lambda: make_program(settings.parse_again()))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    top = CommandParser(prog="rtunnel", description="A reverse port-mapping tunnel.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=f"rtunnel {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    add_command(commands, "server", "open public ports for clients")
    add_command(commands, "client", "make a local service reachable through a server")
    add_pki(commands)
    top.set_defaults(parse_again=lambda: top.parse_args(arguments))
    try:
        settings = top.parse_args(arguments)
        try:
            return settings.run(settings)  # type: ignore[no-any-return]
        except (ConfigError, rtunnel_tls.TlsConfigError) as error:
            return settings.parser.error(str(error))  # type: ignore[no-any-return]
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except RtunnelError as error:
        log_event(ERROR, "failed", reason=error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
