"""Says whether a recorded session conforms to PROTOCOL.md, else which rule was broken, by whom and at which frame.

    python tests/helpers/judge.py FILE              a recording that tap.py has written
    python tests/helpers/judge.py FILE.pcapng       a capture, by tshark; --keylog FILE where it is of TLS

`step` is the judge: a pure function, state and frame to state and the rule that the frame breaks. It imports nothing of
the program.

What it is fair to say. A recording is made at some place of the way between the two ends, and frames cross on the
way. So a frame that *allows* something (NEW_CONN, WELCOME, WINDOW, PING) is always seen before what it allows, and the
judge is strict there. A frame that *forbids* something (the other end's CLOSE_CONN or EOF) may still be on its way to
an end that speaks: the judge holds that against it only `KNOWN_S` later. What an end forbids itself holds at once.
"""

from __future__ import annotations

import argparse
import base64
import ipaddress
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import scanner

# ---- the tables of PROTOCOL.md -------------------------------------------------------------------------------------

NEW_CONN, DATA, CLOSE_CONN, INIT, WELCOME, WINDOW, EOF, PING, PONG, GOAWAY, BLOCKED = range(1, 12)
CLIENT, SERVER = 0, 1
ENDS = ("client", "server")


class Kind(NamedTuple):
    """One row of the table of frames (section 2)."""

    name: str
    level: int  # from which on it is known
    senders: tuple[int, ...]
    on_stream: bool
    lengths: range  # of the payload, at level 1


ANY, SHORT = range(4097), range(65)
BOTH = (CLIENT, SERVER)
KINDS = {
    NEW_CONN: Kind("NEW_CONN", 0, (SERVER,), True, SHORT),
    DATA: Kind("DATA", 0, BOTH, True, range(1_048_577)),
    CLOSE_CONN: Kind("CLOSE_CONN", 0, BOTH, True, SHORT),
    INIT: Kind("INIT", 0, (CLIENT,), False, ANY),
    WELCOME: Kind("WELCOME", 1, (SERVER,), False, ANY),
    WINDOW: Kind("WINDOW", 1, BOTH, True, range(4, 5)),
    EOF: Kind("EOF", 1, BOTH, True, range(1)),
    PING: Kind("PING", 1, BOTH, False, range(8, 9)),
    PONG: Kind("PONG", 1, BOTH, False, range(8, 9)),
    GOAWAY: Kind("GOAWAY", 1, BOTH, False, SHORT),
    BLOCKED: Kind("BLOCKED", 1, BOTH, True, range(1)),
}

# "this end may send", by the state in which it sees the stream (section 4).
MAY_SEND = {
    "open": {DATA, EOF, CLOSE_CONN, WINDOW, BLOCKED},
    "sending ended": {CLOSE_CONN, WINDOW},
    "receiving ended": {DATA, EOF, CLOSE_CONN, BLOCKED},
    "ended": set(),
}
CODES = {  # section 11
    "bad-request", "port-denied", "port-in-use", "unavailable", "too-many-clients", "shutting-down",
}  # fmt: skip

# Section 12.
MAX_CONTROL_BYTES = 4096
MAX_DATA_BYTES = 1_048_576
MAX_SENT_BYTES = 65_536 - 9  # the payload of a DATA frame that is sent
MAX_STRANGE_FRAMES = 16
MAX_MESSAGE = 256
MAX_CREDIT = 2_147_483_647
MAX_WINDOW = 16_777_216
MAX_GROWTH = 67_108_864
GROWTH_SHARE = 4  # [W-6]: a quarter

MAX_PINGS = 4096  # of an end that asks on without an answer, the oldest
KNOWN_S = 5.0  # a frame that an end has been sent so long ago has reached it

# ---- frames and states ---------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """A frame that has passed. Of DATA: a part of one, `count` bytes from `offset` on; its first part has offset 0."""

    at: float  # seconds
    sender: int  # CLIENT or SERVER
    kind: int
    stream: int
    length: int  # of the payload, as announced
    payload: bytes = b""  # empty for DATA, and where the length is over its limit
    offset: int = 0
    count: int = 0

    def __str__(self) -> str:
        name = KINDS[self.kind].name if self.kind in KINDS else f"type 0x{self.kind:02x}"
        return f"{ENDS[self.sender]} {name} {self.stream} of {self.length} bytes"


class Stream(NamedTuple):
    """What is certain of a stream. Each pair: of the client, of the server."""

    credit: tuple[int, int] = (0, 0)  # level 1: bytes that this end may send
    window: tuple[int, int] = (0, 0)  # level 1: the most that this end may let the other have; BLOCKED doubles it
    eof: tuple[float | None, float | None] = (None, None)  # when this end has sent it
    closed: tuple[float | None, float | None] = (None, None)
    blocked: tuple[int, int] = (0, 0)  # how often this end has said so, less the WINDOWs that it has got

    @property
    def has_ended(self) -> bool:
        return any(at is not None for at in self.closed) or all(at is not None for at in self.eof)


class Ping(NamedTuple):
    """A PING's bytes, and when it has passed."""

    payload: bytes
    at: float


class Session(NamedTuple):
    """What is certain of a session. Each pair: of the client, of the server."""

    level: int | None = None  # fixed by the server's first frame, or by an INIT that knows level 0 only
    strange: int = 0  # frames of unknown types before INIT
    inits: int = 0
    version: int | None = None  # that INIT has announced; None: no such line
    bad_init: str = ""  # the rule that INIT breaks
    refused: bool = False
    window: tuple[int, int] = (0, 0)  # that this end has announced
    last: int = 0  # the highest id that NEW_CONN has named
    goaway: tuple[bool, bool] = (False, False)
    pings: tuple[tuple[Ping, ...], tuple[Ping, ...]] = ((), ())  # that are not answered yet
    forgotten: tuple[bool, bool] = (False, False)  # this end has sent more PINGs than are remembered
    pinged: tuple[bool, bool] = (False, False)
    grown: tuple[int, int] = (0, 0)  # by so much the credit that this end gave is above what it announced
    welcomed: float | None = None  # when level 1 began


class Broken(NamedTuple):
    """A rule that a frame breaks."""

    rule: str
    by: int
    text: str
    is_error: bool  # a protocol error, which ends the session; else the receiver takes, skips or drops the frame


class Verdict(NamedTuple):
    """The states after a frame, and the rule that it breaks."""

    session: Session
    stream: Stream | None
    broken: Broken | None = None


Pair = tuple  # of values, the client's and the server's


def _set(pair: Pair, end: int, value: object) -> Pair:
    """The pair with another value for one end."""
    return (value, pair[1]) if end == CLIENT else (pair[0], value)


class _Offence(Exception):
    """Inside `step` only: the rule that the frame breaks, a protocol error."""


def step(session: Session, stream: Stream | None, frame: Frame, growth: int = MAX_GROWTH) -> Verdict:
    """The judge. `stream` is that of the frame's id, None where no NEW_CONN has named it; `growth` the ends' budget.

    A frame that is a protocol error leaves the states as they were; one that is only wrong to send counts.
    """
    try:
        _check_shape(session, frame)
        if frame.kind not in KINDS:
            return Verdict(session._replace(strange=session.strange + 1), stream)
        if (fixed := _fix_level(session, frame)).level is None:
            return _judge_opening(fixed, frame)
        if fixed.level:
            _check_shape_1(frame)
        handler = _ON_CONTROL.get(frame.kind)
        verdict = handler(fixed, frame) if handler else _judge_stream(fixed, stream, frame, growth)
    except _Offence as offence:
        rule, text = offence.args
        return Verdict(session, stream, Broken(rule, frame.sender, text, True))
    return verdict if verdict.broken else verdict._replace(broken=_unseemly(fixed, stream, frame))


def _wrong(frame: Frame, rule: str, text: str) -> Broken:
    return Broken(rule, frame.sender, text, False)


# ---- the control connection ----------------------------------------------------------------------------------------


def _check_shape(session: Session, frame: Frame) -> None:
    """[F-1], [F-2], [F-8], [F-10], [O-5]: what holds at both levels."""
    kind = KINDS.get(frame.kind)
    if frame.kind in (0x15, 0x16) and frame.stream >> 24 == 3:
        raise _Offence("F-10", "a TLS record")
    if frame.kind == DATA:
        if frame.length > MAX_DATA_BYTES:
            raise _Offence("F-2", f"DATA of {frame.length} bytes")
    elif frame.length > MAX_CONTROL_BYTES:
        raise _Offence("F-1", f"a payload of {frame.length} bytes")
    if kind is None:
        if session.level is None and not session.inits and session.strange >= MAX_STRANGE_FRAMES:
            raise _Offence("O-5", f"over {MAX_STRANGE_FRAMES} frames of unknown types before INIT")
        return
    if frame.sender not in kind.senders:
        raise _Offence("F-8", f"{kind.name} is not the {ENDS[frame.sender]}'s to send")


def _check_shape_1(frame: Frame) -> None:
    """[F-7]: ids and lengths at level 1."""
    kind = KINDS[frame.kind]
    if kind.on_stream != bool(frame.stream):
        raise _Offence("F-7", f"{kind.name} with id {frame.stream}")
    if frame.length not in kind.lengths:
        raise _Offence("F-7", f"{kind.name} with {frame.length} bytes of payload")


def _fix_level(session: Session, frame: Frame) -> Session:
    """[N-1]: the server's first frame does; [F-9]: what may not come at level 0."""
    kind = KINDS[frame.kind]
    if session.level is None and frame.sender == SERVER and frame.kind != WELCOME:
        session = session._replace(level=0)
    if session.level == 0 and frame.kind == WELCOME:
        if session.inits and session.version is None:
            raise _Offence("N-1", "WELCOME, and INIT has not announced level 1")
        raise _Offence("N-2", "WELCOME behind another frame")
    if session.level == 0 and kind.level > 0:
        raise _Offence("F-9", f"{kind.name} at level 0")
    return session


def _judge_opening(session: Session, frame: Frame) -> Verdict:
    """Before the server's first frame, or at a WELCOME that is it."""
    if frame.kind == INIT:
        return _on_init(session, frame)
    if frame.kind == WELCOME:
        return _on_welcome(session, frame)
    if not session.inits:
        if frame.kind not in (DATA, CLOSE_CONN):
            raise _Offence("O-5", f"{KINDS[frame.kind].name} before INIT")
        return Verdict(session, None, _wrong(frame, "O-1", f"{KINDS[frame.kind].name} before INIT, which is dropped"))
    if KINDS[frame.kind].on_stream:
        raise _Offence("S-5", "no stream has been opened")
    after = _on_ping(session, frame).session if frame.kind == PING else session  # it may be answered
    return Verdict(after, None, _wrong(frame, "N-2", f"{KINDS[frame.kind].name} before the server's first frame"))


def _lines(text: str) -> dict[str, str]:
    """[N-4]"""
    return dict(line.split("=", 1) for line in text.split("\n") if "=" in line)  # type: ignore[misc]


def _number(text: str | None, lowest: int, highest: int) -> int | None:
    if text is None or not re.fullmatch("[0-9]{1,10}", text) or not lowest <= int(text) <= highest:
        return None
    return int(text)


def _on_init(session: Session, frame: Frame) -> Verdict:
    if session.inits:
        raise _Offence("O-9", "a second INIT")
    first, _, rest = frame.payload.partition(b"\n")
    port, colon, _ = first.partition(b":")
    bad = "" if colon and _number(port.decode("latin-1"), 0, 65535) is not None else "O-2"
    lines = _lines(rest.decode("utf-8", "replace"))
    after = session._replace(inits=1)
    if "version" not in lines:
        after = after._replace(bad_init=bad, level=0)
    else:
        version = _number(lines["version"], 1, 2_147_483_648)
        window = _number(lines.get("window"), 1, MAX_CREDIT)
        fine = version and window and re.fullmatch("[0-9a-f]{32}", lines.get("instance", "")) and not bad
        try:
            frame.payload.decode()
        except UnicodeDecodeError:
            fine = False
        after = after._replace(
            version=version or 1, bad_init="" if fine else "N-5", window=_set(session.window, CLIENT, window or 0)
        )
    if after.bad_init:
        return Verdict(after, None, _wrong(frame, after.bad_init, "INIT's text"))
    return Verdict(after, None)


def _on_welcome(session: Session, frame: Frame) -> Verdict:
    if session.level is not None:
        raise _Offence("N-2", "a second WELCOME")
    lines = _lines(frame.payload.decode("utf-8", "replace"))
    if "error" in lines:
        after, broken = session._replace(level=1, refused=True), None
        if lines["error"] not in CODES or "message" not in lines or len(lines["message"]) > MAX_MESSAGE:
            broken = _wrong(frame, "N-6", f"a refusal with the code {lines['error']!r}")
        return Verdict(after, None, broken)
    window = _number(lines.get("window"), 1, MAX_CREDIT)
    if lines.get("version") != "1" or not _number(lines.get("port"), 1, 65535) or not window:
        raise _Offence("N-7", "WELCOME's text")
    after = session._replace(level=1, welcomed=frame.at, window=_set(session.window, SERVER, window))
    if not session.inits:
        return Verdict(after, None, _wrong(frame, "N-1", "WELCOME, and no INIT has come"))
    if session.bad_init:
        return Verdict(after, None, _wrong(frame, session.bad_init, "an INIT that must be refused was taken"))
    return Verdict(after, None)


def _on_ping(session: Session, frame: Frame) -> Verdict:
    unanswered = session.pings[frame.sender]
    after = session._replace(pinged=_set(session.pinged, frame.sender, True))
    if len(unanswered) < MAX_PINGS:
        more = (*unanswered, Ping(frame.payload, frame.at))
        after = after._replace(pings=_set(session.pings, frame.sender, more))
    else:
        after = after._replace(forgotten=_set(session.forgotten, frame.sender, True))
    return Verdict(after, None)


def _on_pong(session: Session, frame: Frame) -> Verdict:
    """[H-3]: in the order of the PINGs."""
    asked = session.pings[1 - frame.sender]
    at = next((at for at, ping in enumerate(asked) if ping.payload == frame.payload), None)
    if at != 0 and not session.forgotten[1 - frame.sender]:
        raise _Offence("H-3", "PONG without its PING, or ahead of an older one's")
    if at is None:
        return Verdict(session, None)
    return Verdict(session._replace(pings=_set(session.pings, 1 - frame.sender, asked[at + 1 :])), None)


def _on_goaway(session: Session, frame: Frame) -> Verdict:
    """[G-4]: a further one does nothing. An end has a second one to say where it is stopped."""
    after = session._replace(goaway=_set(session.goaway, frame.sender, True))
    if session.goaway[frame.sender] and frame.payload != b"stopping":
        return Verdict(after, None, _wrong(frame, "G-5", f"a further GOAWAY, for the reason {frame.payload!r}"))
    return Verdict(after, None, _bad_reason(frame))


def _bad_reason(frame: Frame) -> Broken | None:
    """[E-3], of CLOSE_CONN and GOAWAY."""
    if len(frame.payload) > 64 or not all(0x20 <= byte < 0x7F for byte in frame.payload):
        return _wrong(frame, "E-3", f"a reason that is not up to 64 bytes of printable ASCII: {frame.payload[:64]!r}")
    return None


_ON_CONTROL: Mapping[int, Callable[[Session, Frame], Verdict]] = {
    INIT: _on_init,
    WELCOME: _on_welcome,
    PING: _on_ping,
    PONG: _on_pong,
    GOAWAY: _on_goaway,
}

# ---- streams -------------------------------------------------------------------------------------------------------


def _judge_stream(session: Session, stream: Stream | None, frame: Frame, growth: int) -> Verdict:
    if frame.kind == NEW_CONN:
        return _on_new_conn(session, stream, frame)
    if stream is None:
        text = f"{KINDS[frame.kind].name}, and no NEW_CONN has named stream {frame.stream}"
        if session.level and not 0 < frame.stream <= session.last:
            raise _Offence("S-5", text)
        return Verdict(session, None, _wrong(frame, "S-1", text))  # level 0, or an id that was left out: dropped
    return (_on_stream_1 if session.level else _on_stream_0)(session, stream, frame, growth)


def _on_new_conn(session: Session, stream: Stream | None, frame: Frame) -> Verdict:
    broken = None
    if session.level:
        if frame.stream <= session.last:
            raise _Offence("S-2", f"NEW_CONN for stream {frame.stream} after stream {session.last}")
        if not _is_visitor(frame.payload):
            raise _Offence("S-8", f"NEW_CONN says that the visitor is {frame.payload!r}")
        if session.goaway[SERVER]:
            broken = _wrong(frame, "G-1", "NEW_CONN after GOAWAY")
    elif not frame.stream or (stream is not None and not stream.has_ended):
        raise _Offence("S-2", f"NEW_CONN for stream {frame.stream}, which is open")
    if frame.stream != session.last + 1:
        broken = _wrong(frame, "S-1", f"NEW_CONN for stream {frame.stream} after stream {session.last}")
    opened = Stream(credit=(session.window[SERVER], session.window[CLIENT]), window=session.window)
    return Verdict(session._replace(last=max(session.last, frame.stream)), opened, broken)


def _is_visitor(payload: bytes) -> bool:
    """[S-8]"""
    match = re.fullmatch(r"(\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})", payload.decode("latin-1"))
    if match is None or not 0 < int(match[4]) < 65536:
        return False
    try:
        address = ipaddress.ip_address(match[2] or match[3])
    except ValueError:
        return False
    return address.version == (6 if match[2] else 4) and not getattr(address, "ipv4_mapped", None)


def _on_stream_0(session: Session, stream: Stream, frame: Frame, growth: int) -> Verdict:
    """Section 5."""
    if stream.closed[frame.sender] is not None:
        return Verdict(session, stream, _wrong(frame, "E-1", "a frame behind its own CLOSE_CONN"))
    if frame.kind == DATA:
        return Verdict(session, stream)
    return Verdict(session, stream._replace(closed=_set(stream.closed, frame.sender, frame.at)), _bad_reason(frame))


def _state_of(stream: Stream, end: int, now: float) -> str:
    """In which state this end sees it for certain: by what it has sent, and by what has reached it long ago."""
    other = 1 - end

    def known(at: float | None) -> bool:
        return at is not None and now - at > KNOWN_S

    if stream.closed[end] is not None or known(stream.closed[other]):
        return "ended"
    if stream.eof[end] is not None:
        return "ended" if known(stream.eof[other]) else "sending ended"
    return "receiving ended" if known(stream.eof[other]) else "open"


def _on_stream_1(session: Session, stream: Stream, frame: Frame, growth: int) -> Verdict:
    """Sections 4, 6 and 7."""
    end, kind = frame.sender, KINDS[frame.kind]
    state = _state_of(stream, end, frame.at)
    dropped = stream.has_ended  # for the receiver, or will be: then nothing is a protocol error
    broken = None
    if frame.kind not in MAY_SEND[state] and not frame.offset:
        rule = "T-2" if state == "sending ended" and frame.kind in (DATA, EOF) else "T-3"
        if rule == "T-2" and not dropped:
            raise _Offence(rule, f"{kind.name} behind EOF")
        if stream.closed[end] is not None:
            rule = "T-4"
        broken = _wrong(frame, rule, f"{kind.name} in the state '{state}'")
    if frame.kind == DATA:
        return _on_data_1(session, stream, frame, broken)
    if frame.kind == WINDOW:
        return _on_window(session, stream, frame, growth, broken)
    if frame.kind == BLOCKED:
        if stream.blocked[end] > 0:  # it may wait to be sent while a WINDOW comes: so they are counted
            broken = broken or _wrong(frame, "W-5", "BLOCKED again, and no WINDOW has come since")
        return Verdict(session, _on_blocked(session, stream, end, growth), broken)
    if frame.kind == EOF:
        after = stream._replace(eof=_set(stream.eof, end, frame.at))
    else:
        after = stream._replace(closed=_set(stream.closed, end, frame.at))
        broken = broken or _bad_reason(frame)
    if after.has_ended and not dropped:
        session = session._replace(grown=(_grown(session, stream, CLIENT, -1), _grown(session, stream, SERVER, -1)))
    return Verdict(session, after, broken)


def _on_blocked(session: Session, stream: Stream, end: int, growth: int) -> Stream:
    """[W-6]: how large the other end may make its window now. What other streams have left of the budget is not
    certain: one whose end is on its way has given back what it had. So the share is that of the whole budget."""
    first, before = session.window[1 - end], stream.window[1 - end]
    most = min(2 * before, max(MAX_WINDOW, first), first + growth // GROWTH_SHARE)
    return stream._replace(
        blocked=_set(stream.blocked, end, stream.blocked[end] + 1),
        window=_set(stream.window, 1 - end, max(most, before)),
    )


def _grown(session: Session, stream: Stream, end: int, sign: int) -> int:
    """By how much the windows that `end` granted have grown, with (1) or without (-1) this stream's."""
    return session.grown[end] + sign * max(0, stream.credit[1 - end] - session.window[end])


def _on_data_1(session: Session, stream: Stream, frame: Frame, broken: Broken | None) -> Verdict:
    end, other = frame.sender, 1 - frame.sender
    credit = stream.credit[end] - frame.count
    if credit < 0:
        if not stream.has_ended:
            raise _Offence("W-2", f"{-credit} bytes beyond the credit")
        credit, broken = 0, broken or _wrong(frame, "W-2", f"{-credit} bytes beyond the credit")
    after = stream._replace(credit=_set(stream.credit, end, credit))
    if stream.credit[end] > session.window[other] and not stream.has_ended:
        less = _grown(session, stream, other, -1)
        session = session._replace(grown=_set(session.grown, other, less))
        session = session._replace(grown=_set(session.grown, other, _grown(session, after, other, 1)))
    return Verdict(session, after, broken)


def _on_window(session: Session, stream: Stream, frame: Frame, growth: int, broken: Broken | None) -> Verdict:
    end, other = frame.sender, 1 - frame.sender
    count = int.from_bytes(frame.payload, "big")
    if stream.has_ended:
        return Verdict(session, stream, broken)
    if not count or stream.credit[other] + count > MAX_CREDIT:
        raise _Offence("W-3", f"WINDOW of {count} on a credit of {stream.credit[other]}")
    after = stream._replace(
        credit=_set(stream.credit, other, stream.credit[other] + count),
        blocked=_set(stream.blocked, other, stream.blocked[other] - 1),
    )
    less = session._replace(grown=_set(session.grown, end, _grown(session, stream, end, -1)))
    grown = _grown(less, after, end, 1)
    session = session._replace(grown=_set(session.grown, end, grown))
    if after.credit[other] > stream.window[end]:
        text = f"a credit of {after.credit[other]}, and the window can be {stream.window[end]} at most"
        broken = broken or _wrong(frame, "W-6", text)
    elif grown > growth:
        broken = broken or _wrong(frame, "W-8", f"the windows have grown by {grown} bytes")
    return Verdict(session, after, broken)


# ---- what is wrong to send, and disturbs nobody --------------------------------------------------------------------


def _unseemly(session: Session, stream: Stream | None, frame: Frame) -> Broken | None:
    """Of a frame that a receiver takes: [F-2], [N-6], [H-1], [H-2]."""
    if frame.kind == DATA and not frame.offset and not 1 <= frame.length <= MAX_SENT_BYTES:
        return _wrong(frame, "F-2", f"a DATA frame of {frame.length} bytes of payload")
    if session.refused and frame.sender == SERVER:
        return _wrong(frame, "N-6", "a frame behind the refusal")
    if session.welcomed is None or frame.offset:
        return None
    if not session.pinged[frame.sender] and frame.kind != PING and frame.at - session.welcomed > KNOWN_S:
        return _wrong(frame, "H-1", "no PING since the session has its level")
    asked = session.pings[1 - frame.sender]
    if asked and frame.kind != PONG and frame.at - asked[0].at > KNOWN_S:
        return _wrong(frame, "H-2", "the other end's PING has not been answered")
    return None


# ---- a whole session -----------------------------------------------------------------------------------------------


class Finding(NamedTuple):
    """A broken rule, at a frame of a session."""

    index: int  # of the frame, from 1 on
    frame: Frame
    broken: Broken

    def __str__(self) -> str:
        rule, by, text, _ = self.broken
        return f"[{rule}] broken by the {ENDS[by]} at frame {self.index} ({self.frame.at:.3f} s, {self.frame}): {text}"


class Judge:
    """A session from its first frame on: the states that `step` is given, and what it has found."""

    def __init__(self, growth: int = MAX_GROWTH) -> None:
        self.session = Session()
        self.streams: dict[int, Stream] = {}
        self.findings: list[Finding] = []
        self.frames = 0
        self.error: list[Finding | None] = [None, None]  # each end's protocol error
        self._growth = growth
        self._accused: set[tuple[str, int]] = set()  # [H-1], [H-2], [X-1]: once is enough

    def take(self, frame: Frame) -> Broken | None:
        """Judge the next frame. After an end's protocol error nothing that it sends is judged any more."""
        self.frames += not frame.offset
        if self.error[frame.sender]:
            return None
        if broken := self._late(frame):
            return self._find(frame, broken)
        verdict = step(self.session, self.streams.get(frame.stream), frame, self._growth)
        self.session = verdict.session
        if verdict.stream is not None:
            self.streams[frame.stream] = verdict.stream
        return self._find(frame, verdict.broken) if verdict.broken else None

    def _late(self, frame: Frame) -> Broken | None:
        """[X-1]: who has got a protocol error closes the control connection."""
        offence = self.error[1 - frame.sender]
        if offence is None or frame.at - offence.frame.at <= KNOWN_S:
            return None
        return Broken("X-1", frame.sender, f"a frame long after the other end's protocol error ({offence})", False)

    def _find(self, frame: Frame, broken: Broken) -> Broken:
        if broken.rule in ("H-1", "H-2", "X-1"):
            if (broken.rule, broken.by) in self._accused:
                return broken
            self._accused.add((broken.rule, broken.by))
        self.findings.append(Finding(self.frames, frame, broken))
        if broken.is_error:
            self.error[broken.by] = self.findings[-1]
        return broken


def judge(frames: Iterable[Frame], growth: int = MAX_GROWTH) -> Judge:
    """Judge a whole session."""
    done = Judge(growth)
    for frame in frames:
        done.take(frame)
    return done


# ---- bytes, recordings and captures --------------------------------------------------------------------------------


class Scanner:
    """The bytes of one direction to frames; keeps no payload of DATA."""

    def __init__(self, sender: int) -> None:
        self._sender = sender
        self._scanner = scanner.Scanner()

    def feed(self, at: float, raw: bytes | bytearray | memoryview) -> Iterator[Frame]:
        for kind, stream, length, payload, offset, count in self._scanner.feed(raw):
            yield Frame(at, self._sender, kind, stream, length, payload, offset, count)


class Recording(NamedTuple):
    """One session's frames, and at which end they were recorded; None for a capture, which is between both."""

    name: str
    recorded_at: int | None
    frames: list[Frame]


def to_line(frame: Frame, connection: int, is_sent: bool) -> str:
    """A frame as a line of a recording."""
    return scanner.to_line(frame.at, connection, is_sent, frame[2:])


def read_recording(text: str) -> list[Recording]:
    """The sessions of a recording. Which end it was made at shows by INIT, else by what the recorder has written."""
    connections: dict[str, list[tuple[bool, list[str]]]] = {}
    role = ""
    for line in text.splitlines():
        words = line.split(" ")
        if words[0] == "recorded":
            role = words[1]
        elif len(words) >= 7:
            connections.setdefault(words[1], []).append((words[2] == "out", words))
    recordings = []
    for number, rows in connections.items():
        inits = [is_sent for is_sent, words in rows if words[3] == str(INIT)]
        own = CLIENT if (inits[0] if inits else role == "client") else SERVER
        frames = [_from_words(words, own if is_sent else 1 - own) for is_sent, words in rows]
        recordings.append(Recording(f"connection {number} at the {ENDS[own]}", own, frames))
    return recordings


def _from_words(words: list[str], sender: int) -> Frame:
    kind, stream, length = int(words[3]), int(words[4]), int(words[5])
    if kind == DATA:
        return Frame(float(words[0]), sender, kind, stream, length, offset=int(words[6]), count=int(words[7]))
    payload = b"" if words[6] == "-" else bytes.fromhex(words[6])
    return Frame(float(words[0]), sender, kind, stream, length, payload)


def read_capture(file: Path, keylog: Path | None = None) -> list[Recording]:
    """The sessions of a capture: each TCP connection of INIT, or of what [O-5] drops and then INIT. Needs tshark."""
    options = ["-o", f"tls.keylog_file:{keylog}"] if keylog else []
    command = ["tshark", "-r", str(file), *options]
    layer = "tls" if keylog else "tcp"
    listed = subprocess.run(
        [*command, "-T", "fields", "-e", "tcp.stream"], capture_output=True, text=True, check=True
    ).stdout
    numbers = sorted({int(word) for word in listed.split()})
    wanted = [word for number in numbers for word in ("-z", f"follow,{layer},yaml,{number}")]
    followed = subprocess.run([*command, "-q", *wanted], capture_output=True, text=True, check=True).stdout
    sessions = [list(_from_follow(text)) for text in sorted(re.split(r"(?m)^peers:", followed)[1:], key=_first)]
    found = [frames for frames in sessions if _begins_with_init(frames)]
    return [Recording(f"session {number}", None, frames) for number, frames in enumerate(found, 1)]


def _begins_with_init(frames: list[Frame]) -> bool:
    return next((each.kind for each in frames if each.kind not in (DATA, CLOSE_CONN)), None) == INIT


def _first(text: str) -> float:
    """When the first bytes have passed, in seconds since 1970."""
    found = re.search(r"timestamp: ([\d.]+)", text)
    return float(found[1]) if found else 0.0


def _from_follow(text: str) -> Iterator[Frame]:
    """tshark's `follow` in YAML. The client speaks first."""
    pattern = r"peer: (\d)\n.*?timestamp: ([\d.]+)\n\s+data: !!binary \|\n((?: {4,}[^ \n]+\n)+)"
    scanners: dict[str, Scanner] = {}
    for match in re.finditer(pattern, text):
        scanner = scanners.setdefault(match[1], Scanner(SERVER if scanners else CLIENT))
        yield from scanner.feed(float(match[2]) - _first(text), base64.b64decode(match[3]))


def read(file: Path, keylog: Path | None = None) -> list[Recording]:
    """The sessions of a recording or a capture."""
    with file.open("rb") as opened:
        head = opened.read(4)
    if head in (b"\x0a\x0d\x0d\x0a", b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\xc3\xd4", b"\x4d\x3c\xb2\xa1"):
        return read_capture(file, keylog)
    return read_recording(file.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description="Judge recorded sessions by PROTOCOL.md.")
    parser.add_argument("file", type=Path, help="a recording of tap.py, or a capture (pcap, pcapng; needs tshark)")
    parser.add_argument("--keylog", type=Path, help="the file of SSLKEYLOGFILE, for a capture of TLS")
    parser.add_argument("--budget", type=int, default=MAX_GROWTH, help="--session-budget of the ends, in bytes")
    parser.add_argument("--json", action="store_true", help="one object for each session")
    arguments = parser.parse_args()
    broken = 0
    recordings = read(arguments.file, arguments.keylog)
    for name, _, frames in recordings:
        done = judge(frames, arguments.budget)
        broken += len(done.findings)
        if arguments.json:
            found = [
                {"rule": each.broken.rule, "by": ENDS[each.broken.by], "frame": each.index} for each in done.findings
            ]
            print(json.dumps({"session": name, "level": done.session.level, "frames": done.frames, "broken": found}))
            continue
        print(f"{name}: level {done.session.level}, {done.frames} frames:", "" if done.findings else "conforms")
        for each in done.findings:
            print(f"    {each}")
    if not recordings:
        print("no session found", file=sys.stderr)
    return 1 if broken or not recordings else 0


if __name__ == "__main__":
    sys.exit(main())
