"""The frames section: the codec alone, without a socket (PROTOCOL.md, sections 2 and 12)."""

from __future__ import annotations

import ast
import re
import tracemalloc
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_peer import NAMES, frame
from support import ROOT
from vector_files import FRAMES, Case, from_hex

import rtunnel


class Heard(NamedTuple):
    """What a decoder made of some bytes."""

    events: list[tuple[int, int, bytes, int]]  # type, stream, payload, bytes of the frame still to come
    skipped: int
    error: str


def hear(pieces: Iterable[bytes]) -> Heard:
    """Feed a new decoder; parts of one DATA frame are joined."""
    decoder = rtunnel.Decoder()
    events: list[tuple[int, int, bytes, int]] = []
    missing = 0  # bytes of the last DATA frame that are to come
    error = ""
    try:
        for piece in pieces:
            for event in decoder.feed(piece):
                if isinstance(event, rtunnel.DataPart):
                    part = bytes(event.part)
                    if missing:
                        _, stream, payload, _ = events.pop()
                        assert (stream, len(part) + event.remaining) == (event.stream, missing)
                        part = payload + part
                    missing = event.remaining
                    events.append((rtunnel.FrameType.DATA, event.stream, part, missing))
                elif event.type not in set(rtunnel.FrameType):
                    assert (missing, event.payload) == (0, b""), "what is unknown is not kept"
                else:
                    assert not missing, "a frame inside a DATA payload"
                    events.append((event.type, event.stream, bytes(event.payload), 0))
    except rtunnel.ProtocolError as caught:
        error = str(caught)
    return Heard(events, decoder.unknown_frames, error)


def encoded(heard: Heard) -> bytes:
    """The events' bytes by the program's encoder; a DATA frame that is not whole ends where its bytes end."""
    raw = bytearray()
    for type, stream, payload, remaining in heard.events:
        whole = rtunnel.encode(type, stream, payload + bytes(remaining))
        raw += whole[: len(whole) - remaining]
    return bytes(raw)


# --- vectors ------------------------------------------------------------------------------------------------


def check(vector: Case, pieces: Iterable[bytes]) -> None:
    heard = hear(pieces)
    assert heard.events == list(vector.events)
    assert heard.skipped == vector.skipped
    assert bool(heard.error) == bool(vector.error), heard.error
    assert vector.error in heard.error.replace(",", "").replace("_", "")


@pytest.mark.parametrize("vector", FRAMES, ids=lambda v: v.name)
def test_vector_fed_whole(vector: Case) -> None:
    """[F-1] to [F-3], [F-10]: each vector gives the events, or the error, that it says."""
    check(vector, [vector.raw])


@pytest.mark.parametrize("vector", [v for v in FRAMES if len(v.raw) < 5000], ids=lambda v: v.name)
def test_vector_fed_byte_by_byte(vector: Case) -> None:
    """[F-5]: byte by byte, each vector gives the same."""
    check(vector, (vector.raw[i : i + 1] for i in range(len(vector.raw))))


@pytest.mark.parametrize("vector", [v for v in FRAMES if not v.skipped], ids=lambda v: v.name)
def test_vector_encodes_again(vector: Case) -> None:
    """The events of a vector encode to the bytes that it began with."""
    raw = encoded(hear([vector.raw]))
    assert raw == vector.raw[: len(raw)]
    complete = not vector.error and vector.events
    assert raw or not complete


def test_the_documents_table_is_in_the_vectors() -> None:
    """PROTOCOL.md's four frames are the cases of original.txt."""
    text = (ROOT / "PROTOCOL.md").read_text()
    rows = [line.split("|")[2].strip(" `") for line in text.splitlines() if line.endswith("` |")]
    known = {vector.raw for vector in FRAMES if vector.name.startswith("original")}
    assert len(rows) == 4
    assert {from_hex(row) for row in rows} <= known


def test_wire_numbers() -> None:
    """The types are the numbers of PROTOCOL.md's frame table, and a header has 9 bytes."""
    rows = re.findall(r"^\| 0x([0-9A-F]{2}) \| ([A-Z_]+) \|", (ROOT / "PROTOCOL.md").read_text(), re.M)
    assert {int(number, 16): name for number, name in rows} == NAMES
    assert {t.value: t.name for t in rtunnel.FrameType} == NAMES
    assert rtunnel.HEADER_BYTES == 9


# --- properties ---------------------------------------------------------------------------------------------

ids = st.one_of(st.integers(0, 5), st.integers(0, 2**32 - 1))
small = st.binary(max_size=40)
known_frames = st.builds(frame, st.sampled_from(sorted(NAMES)), ids, small)
tls_record = re.compile(rb"[\x15\x16]\x03")  # [F-10]
unknown_frames = st.builds(frame, st.integers(0, 255), ids, small).filter(lambda raw: not tls_record.match(raw))
lying_headers = st.builds(
    lambda type, stream, length: frame(type, stream)[:5] + length.to_bytes(4, "big"),
    st.integers(0, 255),
    ids,
    st.one_of(
        st.sampled_from([4095, 4096, 4097, 1 << 16, 1 << 20, (1 << 20) + 1, 2**32 - 1]),
        st.integers(0, 2**32 - 1),
    ),
)
streams_of_bytes = st.one_of(
    st.binary(max_size=200),
    st.lists(st.one_of(known_frames, unknown_frames), max_size=12).map(b"".join),
    st.lists(st.one_of(known_frames, unknown_frames, lying_headers, small), max_size=12).map(b"".join),
)


@st.composite
def cut(draw: st.DrawFn, source: st.SearchStrategy[bytes] = streams_of_bytes) -> tuple[bytes, list[bytes]]:
    """Some bytes, and the same bytes in pieces, empty ones among them."""
    raw = draw(source)
    cuts = sorted(draw(st.lists(st.integers(0, len(raw)), max_size=20)))
    return raw, [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(cut())
def test_any_cut_gives_the_same(case: tuple[bytes, list[bytes]]) -> None:
    """[F-5]: any cut of any bytes gives the same events, or the same error behind the same events."""
    raw, pieces = case
    assert hear(pieces) == hear([raw])


@settings(max_examples=200, deadline=None)
@given(streams_of_bytes)
def test_byte_by_byte_gives_the_same(raw: bytes) -> None:
    """[F-5]: so does one byte after the other."""
    assert hear(raw[i : i + 1] for i in range(len(raw))) == hear([raw])


@settings(max_examples=200, deadline=None)
@given(cut(st.lists(known_frames, max_size=12).map(b"".join)))
def test_what_decodes_encodes_again(case: tuple[bytes, list[bytes]]) -> None:
    """Frames that decode, in any pieces, encode to the same bytes again."""
    raw, pieces = case
    heard = hear(pieces)
    assert not heard.error
    assert encoded(heard) == raw


@settings(max_examples=200, deadline=None)
@given(streams_of_bytes)
def test_what_was_understood_is_what_was_sent(raw: bytes) -> None:
    """Of any bytes without unknown frames, what decodes encodes to a prefix of them."""
    heard = hear([raw])
    if not heard.skipped:
        assert raw.startswith(encoded(heard))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(known_frames, unknown_frames), max_size=20))
def test_unknown_frames_change_nothing_else(frames: list[bytes]) -> None:
    """[F-3]: unknown frames are counted, and the others are heard as if they were not there."""
    known = [f for f in frames if f[0] in set(rtunnel.FrameType)]
    heard = hear([b"".join(frames)])
    assert heard.skipped == len(frames) - len(known)
    assert heard.events == hear([b"".join(known)]).events


@given(st.sampled_from(sorted(NAMES)), ids, small)
def test_encode_is_the_documents_layout(type: int, stream: int, payload: bytes) -> None:
    """Section 2: type, stream and length, big-endian, then the payload."""
    assert rtunnel.encode(type, stream, payload) == frame(type, stream, payload)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_feed_takes_any_bytes(kind: type) -> None:
    """A decoder is fed with whatever holds bytes."""
    assert hear([kind(frame(2, 1, b"hi"))]).events == [(2, 1, b"hi", 0)]


def test_reused_receive_buffer() -> None:
    """[F-4]: nothing of a fed buffer is kept by reference: a control frame survives the buffer's next use."""
    decoder = rtunnel.Decoder()
    raw = frame(4, 0, b"8080:127.0.0.1:80")
    buffer = bytearray(raw[:12])
    assert list(decoder.feed(memoryview(buffer))) == []
    buffer[:] = raw[12:24]
    assert list(decoder.feed(memoryview(buffer))) == []
    buffer[:] = raw[24:] + bytes(12 - len(raw[24:]))
    (event, *_) = decoder.feed(memoryview(buffer)[: len(raw) - 24])
    buffer[:] = bytes(12)
    assert bytes(event.payload) == b"8080:127.0.0.1:80"


# --- limits -------------------------------------------------------------------------------------------------


def test_limits_are_the_documents() -> None:
    """[F-1], [F-2]: 4 KiB of control payload, 1 MiB of DATA accepted, 64 KiB sent."""
    assert rtunnel.MAX_CONTROL_PAYLOAD_BYTES == 4096
    assert rtunnel.MAX_DATA_PAYLOAD_BYTES == 1048576
    assert rtunnel.HEADER_BYTES < rtunnel.FRAME_SENT_BYTES <= 65536


@pytest.mark.parametrize("type", [0, 1, 3, 4, 5, 6, 11, 0x47, 255])
@pytest.mark.parametrize("length", [4097, 1 << 20, 2**32 - 1])
def test_control_limit(type: int, length: int) -> None:
    """[F-1]: more payload in any frame but DATA is an error that names the limit, before it comes."""
    decoder = rtunnel.Decoder()
    with pytest.raises(rtunnel.ProtocolError, match=r"4,?096|4 KiB"):
        list(decoder.feed(frame(type, 1)[:5] + length.to_bytes(4, "big")))


@pytest.mark.parametrize("length", [(1 << 20) + 1, 2**32 - 1])
def test_data_limit(length: int) -> None:
    """[F-2]: more DATA is an error that names the limit, before it comes."""
    decoder = rtunnel.Decoder()
    with pytest.raises(rtunnel.ProtocolError, match=r"1,?048,?576|1 MiB"):
        list(decoder.feed(frame(2, 1)[:5] + length.to_bytes(4, "big")))


def test_header_as_is_raises_nothing_early() -> None:
    """[F-5]: eight bytes of a header that will be an error are no error yet."""
    assert list(rtunnel.Decoder().feed(b"\x02\x00\x00\x00\x01\xff\xff\xff")) == []


@pytest.mark.parametrize(
    ("type", "length"),
    [(2, 1 << 20), (2, 2**32 - 1), (4, 4096), (4, 2**32 - 1), (9, 4096), (0x47, 2**32 - 1)],
)
def test_announced_length_costs_no_memory(type: int, length: int) -> None:
    """[F-4]: a header allocates nothing for the payload that it announces."""
    header = frame(type, 1)[:5] + length.to_bytes(4, "big")
    list(rtunnel.Decoder().feed(frame(2, 1, b"x")))  # what Python sets up once is not counted
    tracemalloc.start()
    try:
        decoders = [rtunnel.Decoder() for _ in range(10)]
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for decoder in decoders:
            try:
                list(decoder.feed(header + b"x"))
            except rtunnel.ProtocolError:
                continue
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (peak - before) / 10 < 2048


def test_data_is_never_assembled() -> None:
    """[F-4]: a DATA frame of 1 MiB that comes in small pieces is held nowhere."""
    decoder = rtunnel.Decoder()
    piece = bytes(4096)
    list(decoder.feed(frame(2, 1)[:5] + (1 << 20).to_bytes(4, "big")))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        remaining = 1 << 20
        while remaining:
            (event,) = decoder.feed(piece)
            remaining -= len(piece)
            assert (len(event.part), event.remaining) == (len(piece), remaining)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < 8192


def test_tiny_frames_cost_no_state() -> None:
    """[F-4]: ten thousand skipped frames leave nothing behind but their number."""
    decoder = rtunnel.Decoder()
    many = frame(99, 1, b"abc") * 1000
    list(decoder.feed(many))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(9):
            assert {event.payload for event in decoder.feed(many)} == {b""}  # type: ignore[union-attr]
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert decoder.unknown_frames == 10_000
    assert after - before < 4096


# --- the section itself -------------------------------------------------------------------------------------

FORBIDDEN = {
    "socket",
    "threading",
    "time",
    "selectors",
    "select",
    "queue",
    "logging",
    "sys",
    "os",
}


def test_sections_without_a_world() -> None:
    """The sections up to the windows use no socket, thread, clock or log: their names do not occur there."""
    source = (ROOT / "rtunnel.py").read_text()
    lines = source.splitlines()
    banners = [(n, line) for n, line in enumerate(lines, 1) if line.startswith("# ---")]
    starts = [n for n, line in banners if line.startswith("# ---- windows:")]
    assert len(starts) == 1, "one banner line names the section of the windows"
    first = banners[0][0]  # what stands before holds signals back
    end = next((n for n, _ in banners if n > starts[0]), len(lines))
    used: set[str] = set()
    inside = 0
    for node in ast.walk(ast.parse(source)):
        number = getattr(node, "lineno", None)
        if number is None or not first <= number < end:
            continue
        if isinstance(node, ast.Name):
            used.add(node.id)
        inside += isinstance(node, ast.ClassDef)
    assert inside >= 3
    assert not used & FORBIDDEN
    assert "log" not in {name.lower() for name in used}
