"""The judge itself: its tables are PROTOCOL.md's, it agrees with the vectors, and it finds what a mutation breaks."""

from __future__ import annotations

import contextlib
import json
import re
import select
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import judge
import pytest
import vector_files
from conftest import Factory
from judge import (
    BLOCKED,
    CLIENT,
    CLOSE_CONN,
    DATA,
    EOF,
    GOAWAY,
    INIT,
    KINDS,
    MAY_SEND,
    NEW_CONN,
    PING,
    PONG,
    SERVER,
    WELCOME,
    WINDOW,
    Broken,
    Frame,
    Judge,
    Scanner,
    read_recording,
)
from naive_peer import frame, init_text
from support import ROOT, Service, connect, echo_service, eventually, read_all, read_exactly, reset
from tls_peers import House
from tunnels import text

PROTOCOL = (ROOT / "PROTOCOL.md").read_text("utf-8")

# ---- tables --------------------------------------------------------------------------------------------------------


def rows(heading: str, columns: int) -> list[list[str]]:
    """The rows of the first table behind a line of PROTOCOL.md."""
    behind = PROTOCOL[PROTOCOL.index(heading) :]
    table = re.search(r"\n\|[- |]+\|\n((?:\|.*\|\n)+)", behind)
    assert table is not None
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]
    assert all(len(row) == columns for row in found)
    return found


def test_the_table_of_frames() -> None:
    """The judge's table of frames is that of PROTOCOL.md, section 2."""
    senders = {"client": (CLIENT,), "server": (SERVER,), "both": (CLIENT, SERVER)}
    told = {
        int(number, 16): (name, int(level), senders[sender], stream == "stream")
        for number, name, level, sender, stream, _ in rows("| type | name | from level", 6)
    }
    assert told == {number: kind[:4] for number, kind in KINDS.items()}


def test_the_table_of_states() -> None:
    """What an end may send in each state of a stream is what PROTOCOL.md says, section 4."""
    names = {kind.name: number for number, kind in KINDS.items()}
    told = {
        re.sub(r" \(.*", "", state): {names[word] for word in may.split(", ") if word != "nothing"}
        for state, *_, may in rows("### A stream's states at level 1", 7)
        if state != "never opened"
    }
    assert told == MAY_SEND


PAYLOADS = {  # that fit; of the others it is 8 bytes
    NEW_CONN: b"203.0.113.7:51234", DATA: b"x", CLOSE_CONN: b"", WINDOW: b"\0\0\0\1", EOF: b"", BLOCKED: b"",
    INIT: b"8080:127.0.0.1:80", WELCOME: b"version=1\nport=4711\nwindow=65536",
}  # fmt: skip
STATES = {"before INIT": "", "level 0": "level 0", "INIT sent, no answer yet": "INIT", "level 1": "level 1"}


@pytest.mark.parametrize("row", rows("What each end may send on the control connection", 3), ids=lambda row: row[0])
def test_the_table_of_the_control_connection(row: list[str]) -> None:
    """In each state the judge finds a broken rule in each frame that the table does not have (section 3), streams and
    unknown frames apart, and in no other."""
    for end, cell in ((SERVER, row[1]), (CLIENT, row[2])):
        may = {kind.name for kind in KINDS.values() if re.search(rf"\b{kind.name}\b", cell)}
        may |= {"NEW_CONN"} if end == SERVER and row[0] in ("before INIT", "INIT sent, no answer yet") else set()
        found = set()
        for number, kind in KINDS.items():
            trace = Trace(STATES[row[0].partition(", after")[0]])
            if "after its GOAWAY" in row[0]:
                trace.say(end, frame(GOAWAY, 0, b"restart"))
            trace.say(1 - end, frame(PING, 0, bytes(8)) if "level 1" in row[0] else b"")
            last = b"stopping" if number == GOAWAY else bytes(8)
            trace.say(end, frame(number, 1 if kind.on_stream else 0, PAYLOADS.get(number, last)))
            found |= set() if trace.broken else {kind.name}
        assert found == may, (row[0], judge.ENDS[end])
    assert "`stopping`" not in cell or "after its GOAWAY" in row[0]


def test_the_table_of_errors() -> None:
    """The codes of a refusal are those of PROTOCOL.md, section 11."""
    assert {row[0].strip("`") for row in rows("## 11. Errors", 3)} - {"any other"} == judge.CODES


def test_the_limits() -> None:
    """The judge's numbers are those of PROTOCOL.md, section 12."""
    told = {row[0]: int(re.sub(r"[^0-9].*", "", row[1].replace(",", ""))) for row in rows("## 12. Limits", 3)}
    assert told["payload of any frame but DATA"] == judge.MAX_CONTROL_BYTES
    assert told["payload of DATA, accepted"] == judge.MAX_DATA_BYTES
    assert told["DATA frame, sent, header included"] == judge.MAX_SENT_BYTES + 9
    assert told["unknown frames before INIT"] == judge.MAX_STRANGE_FRAMES
    assert told["message of a refusal"] == judge.MAX_MESSAGE
    assert told["credit"] == judge.MAX_CREDIT
    assert told["window, at most"] == judge.MAX_WINDOW
    assert told["growth of all windows of a session"] == judge.MAX_GROWTH
    assert told["reason"] in judge.SHORT
    assert told["reason"] + 1 not in judge.SHORT


# ---- the judge on bytes --------------------------------------------------------------------------------------------

HELLO = init_text(8080, "ab" * 16, 65536)
WELCOMED = b"version=1\nport=4711\nwindow=65536"
VISITOR = PAYLOADS[NEW_CONN]


class Trace:
    """Frames that are said one after the other, and judged at once."""

    def __init__(self, after: str = "", growth: int = judge.MAX_GROWTH) -> None:
        self.judge = Judge(growth)
        self._scanners = (Scanner(CLIENT), Scanner(SERVER))
        level = 1 if "level 1" in after else 0
        if level or "level 0" in after or after == "INIT":
            self.say(CLIENT, frame(INIT, 0, b"8080:127.0.0.1:80" if after == "level 0" else HELLO))
        if level:
            self.say(SERVER, frame(WELCOME, 0, WELCOMED))
        if "stream 1" in after:
            self.say(SERVER, frame(NEW_CONN, 1, VISITOR if level else b""))
        assert not self.judge.findings

    def say(self, end: int, raw: bytes, at: float = 0.0) -> None:
        for each in self._scanners[end].feed(at, raw):
            self.judge.take(each)

    @property
    def broken(self) -> list[Broken]:
        return [each.broken for each in self.judge.findings]


@pytest.mark.parametrize("case", vector_files.SESSIONS, ids=lambda case: case.name)
def test_the_vectors_of_sessions(case: vector_files.Case) -> None:
    """Where a vector says that an end refuses the bytes, the judge finds a protocol error, and one of the vector's
    rules; else none."""
    sender = CLIENT if case.to == "server" else SERVER
    after = case.after if case.after != "nothing" else "INIT" * (case.to == "client")
    trace = Trace(after)
    trace.say(sender, case.raw)
    errors = {each.rule for each in trace.broken if each.is_error or each.rule in ("O-2", "N-5")}
    assert bool(errors) == bool(case.error or case.refusal), trace.judge.findings
    assert not errors or errors & set(case.rules), (trace.judge.findings, case.rules)
    assert all(each.by == sender for each in trace.broken)


def data(stream: int, count: int) -> bytes:
    return frame(DATA, stream, b"x" * count)


def window(stream: int, count: int) -> bytes:
    return frame(WINDOW, stream, count.to_bytes(4, "big"))


FULL = data(1, 60000) + data(1, 5536)  # a whole window

# rule, after, then who says what, at which second
ROWS: list[tuple[str, str, list[tuple[int, bytes, float]]]] = [
    ("", "level 1, stream 1", [(CLIENT, FULL, 0), (SERVER, window(1, 32768), 0), (CLIENT, data(1, 32768), 0)]),
    ("", "level 1, stream 1", [(SERVER, FULL + frame(EOF, 1), 0), (CLIENT, data(1, 9) + frame(EOF, 1), 0)]),
    ("", "level 1, stream 1", [(SERVER, frame(CLOSE_CONN, 1), 0), (CLIENT, data(1, 9), 1)]),  # it crosses
    ("", "level 1, stream 1", [(CLIENT, FULL + frame(BLOCKED, 1), 0), (SERVER, window(1, 131072), 0)]),
    ("", "level 0, stream 1", [(CLIENT, data(1, 9) + frame(CLOSE_CONN, 1), 0), (SERVER, frame(CLOSE_CONN, 1), 0)]),
    ("", "level 1", [(SERVER, frame(PING, 0, b"12345678"), 0), (CLIENT, frame(PONG, 0, b"12345678"), 4)]),
    ("", "level 1", [(SERVER, 2 * frame(PING, 0, b"12345678"), 0), (CLIENT, 2 * frame(PONG, 0, b"12345678"), 4)]),
    ("", "INIT", [(SERVER, frame(NEW_CONN, 1), 0), (CLIENT, data(1, 9), 0)]),  # the original's server
    ("", "INIT", [(SERVER, frame(WELCOME, 0, b"error=port-in-use\nmessage=taken"), 0)]),
    ("", "INIT", [(SERVER, frame(WELCOME, 0, b"error=unavailable\nmessage=no such address"), 0)]),
    ("", "level 1", [(SERVER, frame(GOAWAY, 0, b"restart") + frame(GOAWAY, 0, b"stopping"), 0)]),
    ("W-2", "level 1, stream 1", [(CLIENT, FULL + data(1, 1), 0)]),
    ("W-3", "level 1, stream 1", [(CLIENT, window(1, 0), 0)]),
    ("W-5", "level 1, stream 1", [(CLIENT, FULL + 2 * frame(BLOCKED, 1), 0)]),
    ("W-6", "level 1, stream 1", [(CLIENT, window(1, 1), 0)]),  # nothing has come that it could return
    ("W-6", "level 1, stream 1", [(CLIENT, FULL + frame(BLOCKED, 1), 0), (SERVER, window(1, 131073), 0)]),
    ("F-2", "level 1, stream 1", [(CLIENT, data(1, 0), 0)]),
    ("F-2", "level 0, stream 1", [(CLIENT, data(1, 65528), 0)]),
    ("S-1", "level 1, stream 1", [(SERVER, frame(NEW_CONN, 3, VISITOR), 0)]),
    ("S-1", "level 0, stream 1", [(CLIENT, data(2, 1), 0)]),  # dropped
    ("S-1", "level 0, stream 1", [(SERVER, frame(CLOSE_CONN, 2**32 - 1), 0)]),
    ("S-1", "level 0, stream 1", [(SERVER, data(0, 1), 0)]),
    ("S-2", "level 1, stream 1", [(SERVER, frame(NEW_CONN, 1, VISITOR), 0)]),
    ("S-5", "level 1, stream 1", [(CLIENT, data(2, 1), 0)]),
    ("S-5", "level 1", [(SERVER, frame(CLOSE_CONN, 1), 0)]),
    ("S-5", "INIT", [(CLIENT, data(1, 1), 0)]),
    ("S-8", "level 1", [(SERVER, frame(NEW_CONN, 1, b"[::ffff:203.0.113.7]:1"), 0)]),
    ("S-8", "level 1", [(SERVER, frame(NEW_CONN, 1, b"[fe80::1%eth0]:1"), 0)]),
    ("S-8", "level 1", [(SERVER, frame(NEW_CONN, 1, b"203.0.113.7:0"), 0)]),
    ("S-8", "level 1", [(SERVER, frame(NEW_CONN, 1, b"203.0.113.7"), 0)]),
    ("T-2", "level 1, stream 1", [(CLIENT, frame(EOF, 1) + data(1, 1), 0)]),
    ("T-3", "level 1, stream 1", [(CLIENT, frame(EOF, 1) + frame(BLOCKED, 1), 0)]),
    ("T-3", "level 1, stream 1", [(SERVER, frame(CLOSE_CONN, 1), 0), (CLIENT, data(1, 9), 6)]),  # it knows by now
    ("T-4", "level 1, stream 1", [(CLIENT, frame(CLOSE_CONN, 1) + data(1, 1), 0)]),
    ("E-1", "level 0, stream 1", [(CLIENT, frame(CLOSE_CONN, 1) + data(1, 1), 0)]),
    ("E-1", "level 0, stream 1", [(CLIENT, 2 * frame(CLOSE_CONN, 1), 0)]),
    ("E-3", "level 0, stream 1", [(CLIENT, frame(CLOSE_CONN, 1, b"a\nb"), 0)]),
    ("E-3", "level 1", [(CLIENT, frame(GOAWAY, 0, b"\x1b[2J"), 0)]),
    ("G-1", "level 1", [(SERVER, frame(GOAWAY, 0, b"stopping") + frame(NEW_CONN, 1, VISITOR), 0)]),
    ("G-5", "level 1", [(CLIENT, 2 * frame(GOAWAY, 0, b"restart"), 0)]),
    ("H-1", "level 1, stream 1", [(CLIENT, frame(PING, 0, b"12345678"), 0), (SERVER, data(1, 1), 6)]),
    ("H-2", "level 1, stream 1", [
        (CLIENT, frame(PING, 0, b"12345678"), 0), (SERVER, frame(PING, 0, b"12345678"), 0), (SERVER, data(1, 1), 6),
    ]),
    ("H-3", "level 1", [(SERVER, frame(PING, 0, b"12345678"), 0), (CLIENT, frame(PONG, 0, b"12345679"), 0)]),
    ("H-3", "level 1", [
        (SERVER, frame(PING, 0, b"12345678") + frame(PING, 0, b"abcdefgh"), 0),
        (CLIENT, frame(PONG, 0, b"abcdefgh"), 0),
    ]),
    ("F-10", "", [(CLIENT, frame(0x16, 0x0301_0200), 0)]),
    ("H-3", "level 1", [(SERVER, frame(PING, 0, b"12345678"), 0), (CLIENT, 2 * frame(PONG, 0, b"12345678"), 0)]),
    ("N-1", "", [(CLIENT, frame(INIT, 0, b"80:h:1"), 0), (SERVER, frame(WELCOME, 0, WELCOMED), 0)]),
    ("N-2", "INIT", [(SERVER, frame(NEW_CONN, 1) + frame(WELCOME, 0, WELCOMED), 0)]),
    ("N-2", "INIT", [(CLIENT, frame(PING, 0, b"12345678"), 0)]),
    ("N-6", "INIT", [(SERVER, frame(WELCOME, 0, b"error=full\nmessage=taken"), 0)]),
    ("N-6", "INIT", [(SERVER, frame(WELCOME, 0, b"error=port-in-use\nmessage=x") + frame(PING, 0, bytes(8)), 0)]),
    ("N-7", "INIT", [(SERVER, frame(WELCOME, 0, b"version=2\nport=1\nwindow=1"), 0)]),
    ("O-1", "", [(CLIENT, data(1, 1), 0)]),  # dropped
    ("O-1", "", [(CLIENT, frame(CLOSE_CONN, 0), 0)]),
    ("O-5", "", [(CLIENT, frame(EOF, 1), 0)]),
    ("O-9", "level 1", [(CLIENT, frame(INIT, 0, HELLO), 0)]),
    ("X-1", "level 1", [(CLIENT, frame(PING, 1, b"12345678"), 0), (SERVER, frame(PING, 0, bytes(8)), 6)]),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "after", "said"), ROWS)
def test_rows(rule: str, after: str, said: list[tuple[int, bytes, float]]) -> None:
    """Each trace breaks the rule that stands before it, by the end that speaks last, or none."""
    trace = Trace(after)
    for end, raw, at in said:
        trace.say(end, raw, at)
    if not rule:
        assert not trace.broken
    else:
        assert (trace.broken[-1].rule, trace.broken[-1].by) == (rule, said[-1][0])


def test_growth_over_the_budget() -> None:
    """Credit beyond what an end has announced is counted over the streams that have not ended [W-8]."""
    trace = Trace("level 1")
    for stream in range(1, 7):
        trace.say(SERVER, frame(NEW_CONN, stream, VISITOR))
        trace.say(CLIENT, data(stream, 60000) + data(stream, 5536))
        for _ in range(8):
            trace.say(CLIENT, frame(BLOCKED, stream))
            trace.say(SERVER, window(stream, 1))
        trace.say(SERVER, window(stream, 16_000_000))
        if stream == 1:
            trace.say(SERVER, frame(CLOSE_CONN, stream))
    assert [(each.rule, each.by) for each in trace.broken] == [("W-8", SERVER)]
    assert trace.judge.session.last == 6


@pytest.mark.parametrize("more", [0, 1])
def test_growth_over_a_quarter(more: int) -> None:
    """A window grows by no more than a quarter of the budget, however often its peer is blocked [W-6]."""
    trace = Trace("level 1, stream 1", growth=1 << 17)
    for _ in range(2):
        trace.say(CLIENT, FULL + frame(BLOCKED, 1))
        trace.say(SERVER, window(1, 65536))
    trace.say(CLIENT, frame(BLOCKED, 1))
    trace.say(SERVER, window(1, (1 << 15) + more))
    assert [(each.rule, each.by) for each in trace.broken] == [("W-6", SERVER)] * more


def test_what_was_dropped_counts_for_nothing() -> None:
    """What an original's client says of its streams of before is dropped: INIT, and the same stream, may follow."""
    trace = Trace()
    trace.say(CLIENT, data(1, 9) + frame(CLOSE_CONN, 1) + frame(INIT, 0, PAYLOADS[INIT]) + data(1, 9))
    trace.say(SERVER, frame(NEW_CONN, 1) + data(1, 9))
    trace.say(CLIENT, data(1, 9) + frame(CLOSE_CONN, 1))
    assert [each.rule for each in trace.broken] == ["O-1", "O-1", "S-1"]
    assert not any(each.is_error for each in trace.broken)


def test_more_pings_than_are_remembered() -> None:
    """Of an end that asks on without an answer the judge forgets PINGs, and then holds no PONG against the other."""
    trace = Trace("level 1")
    trace.say(CLIENT, b"".join(frame(PING, 0, bytes(8)) for _ in range(judge.MAX_PINGS + 1)))
    trace.say(SERVER, frame(PING, 0, bytes(8)) + frame(PONG, 0, bytes(8)) * (judge.MAX_PINGS + 1))
    assert not trace.broken


@pytest.mark.parametrize("size", [1, 2, 9, 10, 1000])
def test_any_cut_gives_the_same_frames(size: int) -> None:
    """The scanner makes the same of any cut; of DATA it says which bytes of a frame have passed."""
    raw = frame(INIT, 0, HELLO) + data(1, 300) + frame(0x63, 5, b"?") + data(2, 0) + frame(PING, 0, bytes(8))

    def scan(size: int) -> tuple[list[tuple[int, ...]], list[Frame]]:
        scanner = Scanner(CLIENT)
        frames = [each for at in range(0, len(raw), size) for each in scanner.feed(0, raw[at : at + size])]
        return [(each.kind, each.stream, each.length) for each in frames if not each.offset], frames

    heads, frames = scan(size)
    assert heads == scan(len(raw))[0]
    assert sum(each.count for each in frames) == 300


def test_a_recording_is_read_back(tmp_path: Path) -> None:
    """What the tap writes is read back as the same frames, and the program tells what is wrong with them."""
    frames = [*Scanner(CLIENT).feed(0, frame(INIT, 0, HELLO)), *Scanner(SERVER).feed(1, frame(WELCOME, 0, WELCOMED))]
    frames += Scanner(SERVER).feed(2, frame(NEW_CONN, 2, VISITOR) + data(2, 5))
    file = tmp_path / "recording"
    file.write_text("".join(judge.to_line(each, 3, each.sender == SERVER) for each in frames))
    (recording,) = read_recording(file.read_text())
    assert recording.frames == frames
    assert recording.recorded_at == SERVER
    ran = subprocess.run([sys.executable, judge.__file__, "--json", file], capture_output=True, text=True)
    assert ran.returncode == 1
    told = json.loads(ran.stdout)
    assert (told["level"], told["frames"]) == (1, 4)
    assert told["broken"] == [{"rule": "S-1", "by": "server", "frame": 3}]


# ---- the judge on programs -----------------------------------------------------------------------------------------


def own_findings(folder: Path) -> tuple[set[tuple[str, str]], int]:
    """What our ends have broken, by rule and end, and in how many recorded frames."""
    found, frames = set(), 0
    for file in folder.iterdir():
        for recording in read_recording(file.read_text()):
            done = judge.judge(recording.frames)
            frames += done.frames
            found |= {
                (each.broken.rule, judge.ENDS[each.broken.by])
                for each in done.findings
                if each.broken.by == recording.recorded_at
            }
    return found, frames


@pytest.mark.parametrize("over", ["plain", "tls", "level 0"])
def test_a_session_of_ours(over: str, house: House, server: Factory, client: Factory, judged: Path) -> None:
    """Each end of a tunnel is recorded, over TLS too, and neither breaks a rule."""
    flags = {end: house.flags(end) if over == "tls" else () for end in ("server", "client")}
    with echo_service() as service:
        serving = server(*flags["server"])
        asking = client("--server", text(serving.control_address), "--local", service.text, *flags["client"],
                        old=over == "level 0")  # fmt: skip
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(b"x" * 300_000)
            assert read_exactly(visitor, 300_000) == b"x" * 300_000
        eventually(lambda: asking.events("stream-closed"))
        serving.stop()
    found, frames = own_findings(judged)
    assert not found
    assert len(list(judged.iterdir())) == 2
    assert frames > 2 * 10


def talk(sock: socket.socket) -> None:
    """A service that says something and its end, and reads what comes."""
    sock.sendall(b"x" * 100_000)
    sock.shutdown(socket.SHUT_WR)
    read_all(sock)


def say_nothing(sock: socket.socket) -> None:
    """A service that does not even read; until its connection has ended."""
    waiting = select.poll()
    waiting.register(sock, 0)
    waiting.poll()


class Mutation(NamedTuple):
    """Code that breaks a rule, at which end, and what makes it show."""

    rule: str
    end: str
    patch: str
    service: Callable[[socket.socket], None] = talk
    old: bool = False  # at level 0


def double(name: str) -> str:
    """Each frame of this type is said twice."""
    return (
        f"encode = m.encode\nm.encode = lambda kind, stream, payload=b'': "
        f"encode(kind, stream, payload) * (2 if kind == m.FrameType.{name} else 1)"
    )


def other(name: str, stream: str = "stream", payload: str = "payload") -> str:
    """Each frame of this type has another id or payload."""
    return (
        f"encode = m.encode\nm.encode = lambda kind, stream, payload=b'': encode(kind, {stream}, {payload}) "
        f"if kind == m.FrameType.{name} else encode(kind, stream, payload)"
    )


MUTATIONS = [
    Mutation("F-2", "server", "m.FRAME_SENT_BYTES = 1 << 18"),
    Mutation("W-2", "server", "m.Stream._credit = property(lambda stream: m.UNLIMITED, lambda stream, credit: None)",
             say_nothing),
    Mutation("W-6", "client", other("WINDOW", payload="m.U32.pack(1 << 20)")),
    Mutation("W-5", "server", double("BLOCKED"), say_nothing),
    Mutation("S-1", "server", other("NEW_CONN", stream="stream + 1")),
    Mutation("S-8", "server", other("NEW_CONN", payload="payload[::-1]")),
    Mutation("T-2", "client", double("EOF")),
    Mutation("T-4", "client", double("CLOSE_CONN"), reset),
    Mutation("E-1", "client", double("CLOSE_CONN"), reset, old=True),
    Mutation("E-3", "client", other("CLOSE_CONN", payload="b'a\\nb'"), reset),
    Mutation("H-3", "client", other("PONG", payload="payload[::-1]")),
    Mutation("O-9", "client", double("INIT")),
    Mutation("O-1", "client", "encode = m.encode\nm.encode = lambda kind, stream, payload=b'': "
             "(encode(m.DATA, 1, b'x') if kind == m.FrameType.INIT else b'') + encode(kind, stream, payload)"),
    Mutation("S-1", "client", other("CLOSE_CONN", stream="stream + 9"), reset, old=True),
    Mutation("G-5", "server", "m.Session.start_timers = lambda session: session.writer.post("
             "2 * m.encode(m.FrameType.GOAWAY, 0, b'x'))"),
    Mutation("G-1", "server", "m.Session.start_timers = lambda session: session.writer.post("
             "m.encode(m.FrameType.GOAWAY, 0, b'x'))"),
    Mutation("N-2", "server", double("WELCOME")),
]  # fmt: skip


@pytest.mark.unjudged("the mutations break the rules on purpose")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation.rule} {mutation.end}")
def test_a_mutation_is_found(mutation: Mutation, server: Factory, client: Factory, judged: Path) -> None:
    """A program whose code has been changed to break one rule is found, with that rule and that end."""
    patches = {mutation.end: mutation.patch}
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(Service(mutation.service))
        serving = server(patch=patches.get("server", ""))
        client("--server", text(serving.control_address), "--local", service.text, old=mutation.old,
               patch=patches.get("client", ""))  # fmt: skip
        visitors: list[socket.socket] = []

        def found() -> bool:
            """A visitor says more, another one where that has ended. Some mutations let none come."""
            try:
                if not visitors:
                    where = "127.0.0.1", int(serving.events("lease-opened")[-1]["address"].rpartition(":")[2])
                    visitors.append(stack.enter_context(connect(where)))
                    visitors[0].setblocking(False)
                visitors[0].send(b"x" * 100_000)
            except BlockingIOError:
                pass
            except (OSError, IndexError):
                visitors.clear()
            return (mutation.rule, mutation.end) in own_findings(judged)[0]

        eventually(found, what=f"{mutation.rule} is found")
