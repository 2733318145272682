"""The writer: many threads' frames onto one transport, in groups, fairly, and by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from naive_peer import CLOSE_CONN, DATA, NEW_CONN, frame
from support import eventually

import rtunnel


class FakeStream:
    """As much of a stream as the writer looks at."""

    number = 1
    cut = False


class FakeTransport:
    """Keeps what is sent and by whom; a send can be held up; two at a time are an error.

    `allow` is how many sends may return; each that is under way is counted in `entered`.
    """

    def __init__(self) -> None:
        self.sends: list[bytes] = []
        self.threads: list[int] = []
        self.flushed = 0
        self.error: OSError | None = None
        self._busy = threading.Lock()
        self._changed = threading.Condition()
        self._allowed: float = float("inf")
        self._entered = 0

    def hold(self) -> None:
        """From now on a send returns only when it is let go."""
        with self._changed:
            self._allowed = self._entered

    def let_go(self, count: float = float("inf")) -> None:
        """So many more sends may return."""
        with self._changed:
            self._allowed += count
            self._changed.notify_all()

    def wait_entered(self, count: int) -> None:
        """Wait until so many sends have begun since the start."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._entered >= count, 10), f"{self._entered} of {count} sends"

    def send(self, frames: bytes | bytearray | memoryview) -> None:
        assert self._busy.acquire(blocking=False), "two threads are in the transport's send"
        try:
            with self._changed:
                self.sends.append(bytes(frames))
                self.threads.append(threading.get_ident())
                self._entered += 1
                number = self._entered
                self._changed.notify_all()
                assert self._changed.wait_for(lambda: self._allowed >= number, 10)
            if self.error:
                raise self.error
        finally:
            self._busy.release()

    def flush(self) -> None:
        assert self._busy.acquire(blocking=False), "two threads are in the transport"
        self.flushed += 1
        self._busy.release()

    def frames(self) -> list[tuple[int, int, bytes]]:
        """What has been sent, decoded."""
        decoder = rtunnel.Decoder()
        found: list[tuple[int, int, bytes]] = []
        partial = b""
        for event in decoder.feed(b"".join(self.sends)):
            if isinstance(event, rtunnel.DataPart):
                partial += event.part
                if not event.remaining:
                    found.append((DATA, event.stream, partial))
                    partial = b""
            else:
                found.append(tuple(event))  # type: ignore[arg-type]
        return found


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def writer(transport: FakeTransport) -> rtunnel.Writer:
    return rtunnel.Writer(transport)  # type: ignore[arg-type]


def send(writer: rtunnel.Writer, raw: bytes | memoryview, stream: Any = None) -> None:
    """Send a frame of a stream."""
    writer.send(stream or FakeStream(), raw)


class Threads:
    """Threads of a test: all are joined, and what one raised is raised by the test."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []

    def start(self, function: Callable[..., object], *args: Any) -> threading.Thread:
        def body() -> None:
            try:
                function(*args)
            except BaseException as error:  # raised in `threads`
                self.errors.append(error)

        thread = threading.Thread(target=body, daemon=True)  # a failing build must not keep the tests from ending
        self._threads.append(thread)
        thread.start()
        return thread

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@contextmanager
def threads(*, expect: type[BaseException] | None = None) -> Iterator[Threads]:
    """Threads whose errors are the test's, unless they are the expected ones."""
    started = Threads()
    yield started
    started.join()
    for error in started.errors:
        if expect is None or not isinstance(error, expect):
            raise error


def waiting(writer: rtunnel.Writer) -> int:
    """How many threads wait for the turn."""
    return len(writer._waiting)


SMALL = frame(DATA, 1, b"small")
LARGE = frame(DATA, 2, b"L" * 64 * 1024)


# --- groups -------------------------------------------------------------------------------------------------


def test_an_idle_writer_sends_at_once(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Where nobody writes, a frame is sent by its own thread before `send` returns."""
    send(writer, SMALL)
    assert (transport.sends, transport.threads) == ([SMALL], [threading.get_ident()])


def test_small_frames_are_sent_in_one_group(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Small frames that find the turn taken cost their threads no wait, and leave in one send."""
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        small = [frame(DATA, number, b"%d" % number) for number in range(1, 51)]
        for each in small:
            send(writer, each)  # returns at once: this thread would wait for ever else
        transport.let_go()
    assert transport.sends == [LARGE, b"".join(small)]


def test_a_large_frame_takes_the_queued_ones_along(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Whoever gets the turn writes, in one send, the control queue, the small frames, then its own frame."""
    control, late = frame(NEW_CONN, 9), frame(DATA, 3, b"late")
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        started.start(send, writer, LARGE)
        eventually(lambda: waiting(writer) == 1)
        send(writer, SMALL)
        send(writer, late)
        writer.post(control)
        transport.let_go(1)
        transport.wait_entered(2)
        transport.let_go()
    assert b"".join(transport.sends[1:]) == control + SMALL + late + LARGE
    assert len(transport.sends) <= 3


def test_control_frames_go_ahead_of_data(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A control frame that is posted after DATA was queued is sent before it."""
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, SMALL)
        writer.post(frame(NEW_CONN, 7))
        transport.let_go()
    assert transport.frames()[1:] == [(NEW_CONN, 7, b""), (DATA, 1, b"small")]


def test_a_queued_frame_is_a_copy(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A pump may use its buffer again as soon as `send` has returned."""
    buffer = bytearray(SMALL)
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        transport.let_go()
    assert transport.sends[1] == SMALL


def test_posting_never_waits_and_wakes_the_sender(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A posted frame is sent by the control sender, which `serve` is, where nobody else writes."""
    with threads(expect=rtunnel.SessionEnded) as started:
        sender = started.start(lambda: [writer.serve(None) for _ in range(100)])
        writer.post(frame(NEW_CONN, 1))
        eventually(lambda: transport.sends)
        writer.close("done")
    assert transport.threads == [sender.ident]


def test_pushing_sends_what_was_posted(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A frame that was posted without waking anybody is sent by whoever pushes; pushing nothing sends nothing."""
    writer.push()
    writer.post(frame(NEW_CONN, 1), wake=False)
    writer.post(frame(NEW_CONN, 2), wake=False)
    writer.push()
    assert transport.sends == [frame(NEW_CONN, 1) + frame(NEW_CONN, 2)]


def test_waking_flushes_the_transport(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Who needs the transport flushed wakes the control sender, which does it with the turn in its hand."""
    writer.wake()
    writer.serve(None)
    assert (transport.flushed, transport.sends) == (1, [])


@pytest.mark.parametrize("earlier", [True, False])
def test_waking_the_clock_is_never_lost(writer: rtunnel.Writer, transport: FakeTransport, earlier: bool) -> None:
    """Who sets a timer makes `serve` return at once, also while another thread has the turn and passes it on."""
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        if earlier:
            writer.wake_clock()
        sender = started.start(writer.serve, None)
        if not earlier:
            eventually(lambda: writer._changed._waiters)  # type: ignore[attr-defined]
            writer.wake_clock()
        sender.join(10)
        assert not sender.is_alive()
        transport.let_go()


def test_serving_waits_no_longer_than_asked(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Without work the control sender is back at its clock after the given time."""
    writer.serve(0.01)
    assert (transport.sends, transport.flushed) == ([], 0)


# --- order and limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 9000, 40_000])
def test_frames_of_a_stream_keep_their_order(writer: rtunnel.Writer, transport: FakeTransport, size: int) -> None:
    """Eight streams that write at the same time, small frames and large: each one's frames arrive whole, all, and
    in order, sent by one thread at a time."""
    rounds = 60

    def pump(stream: int) -> None:
        owner = FakeStream()
        for number in range(rounds):
            send(writer, frame(DATA, stream, b"%04d" % number + b"x" * (size * (number % 3))), owner)

    with threads(expect=rtunnel.SessionEnded) as started:
        started.start(lambda: [writer.serve(None) for _ in iter(int, 1)])
        pumps = [started.start(pump, stream) for stream in range(1, 9)]
        for each in pumps:
            each.join(10)
        eventually(lambda: len(transport.frames()) == 8 * rounds)
        writer.close("done")
    for stream in range(1, 9):
        numbers = [int(payload[:4]) for _, number, payload in transport.frames() if number == stream]
        assert numbers == list(range(rounds))


@pytest.mark.parametrize("limit", ["SMALL_QUEUE_BYTES", "SMALL_QUEUE_FRAMES"])
def test_the_queue_of_small_frames_is_bounded(writer: rtunnel.Writer, transport: FakeTransport, limit: str) -> None:
    """Over 256 KiB or 1,024 small frames, their threads wait too: that is the back-pressure."""
    payload = b"x" * (16 * 1024 - 9) if limit == "SMALL_QUEUE_BYTES" else b""
    count = getattr(rtunnel, limit) // (16 * 1024 if payload else 1)
    assert (rtunnel.SMALL_QUEUE_BYTES, rtunnel.SMALL_QUEUE_FRAMES) == (256 * 1024, 1024)
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        for _ in range(count):
            send(writer, frame(DATA, 1, payload))
        over = started.start(send, writer, frame(DATA, 1, payload))
        eventually(lambda: waiting(writer) == 1)
        assert over.is_alive()
        transport.let_go()
    assert len(transport.frames()) == count + 2


def test_nothing_follows_a_cut(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A stream's cut drops what it still has here, whether queued or waiting, wakes its pump, and is the last of
    it; other streams' frames stay."""
    stream, other, last = FakeStream(), FakeStream(), frame(CLOSE_CONN, 1)
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, frame(DATA, 1, b"queued"), stream)
        send(writer, frame(DATA, 5, b"stays"), other)
        pump = started.start(send, writer, frame(DATA, 1, bytes(64 * 1024)), stream)
        eventually(lambda: waiting(writer) == 1)
        writer.cut(stream, last)  # type: ignore[arg-type]
        pump.join(10)
        assert not pump.is_alive()
        send(writer, frame(DATA, 1, b"after"), stream)
        transport.let_go()
    send(writer, frame(DATA, 1, b"long after"), stream)
    assert transport.frames()[1:] == [(CLOSE_CONN, 1, b""), (DATA, 5, b"stays")]


def test_nothing_follows_a_cut_in_the_senders_own_hand(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut that comes when the stream's own thread has the turn, and has not yet sent, is still the last of it."""
    stream = FakeStream()
    write = writer._write

    def cut_first(*args: Any) -> None:
        if not stream.cut:
            writer.cut(stream, frame(CLOSE_CONN, 1))  # type: ignore[arg-type]
        write(*args)

    monkeypatch.setattr(writer, "_write", cut_first)
    send(writer, SMALL, stream)
    writer.push()
    assert (CLOSE_CONN, 1, b"") in transport.frames()
    assert transport.frames()[-1] == (CLOSE_CONN, 1, b"")


# --- fairness -----------------------------------------------------------------------------------------------


def test_who_waits_gets_the_turn_in_order(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """The turn goes to those who wait in their order, and to who has just had it last: nobody starves."""
    large = [frame(DATA, number, b"L" * 20_000) for number in range(1, 6)]
    transport.hold()

    def twice() -> None:
        owner = FakeStream()
        send(writer, large[0], owner)
        send(writer, large[4], owner)

    with threads() as started:
        started.start(twice)
        transport.wait_entered(1)
        for number in (1, 2, 3):
            started.start(send, writer, large[number])
            eventually(lambda number=number: waiting(writer) == number)  # type: ignore[misc]
        for count in range(2, 6):
            transport.let_go(1)
            transport.wait_entered(count)
        transport.let_go()
    assert [stream for _, stream, _ in transport.frames()] == [1, 2, 3, 4, 5]


def test_nobody_is_enslaved(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Who has the turn writes at most one batch of others' frames; what comes during that is the control
    sender's."""
    transport.hold()
    with threads(expect=rtunnel.SessionEnded) as started:
        pump = started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, SMALL)
        transport.let_go(1)
        transport.wait_entered(2)
        send(writer, SMALL)
        transport.let_go(1)
        pump.join(10)  # although more is queued
        assert not pump.is_alive()
        assert transport.sends == [LARGE, SMALL]
        sender = started.start(lambda: [writer.serve(None) for _ in range(9)])
        transport.wait_entered(3)
        transport.let_go()
        writer.close("done")
    assert transport.sends[2] == SMALL
    assert transport.threads == [pump.ident, pump.ident, sender.ident]


# --- the end ------------------------------------------------------------------------------------------------


def test_the_end_wakes_all_who_wait(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Closing never waits; all who wait for the turn, the control sender too, get the first cause, and so does who
    comes later. Whoever is inside the transport's send is waited for."""
    transport.hold()
    with threads(expect=rtunnel.SessionEnded) as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        sleepers = [started.start(send, writer, LARGE) for _ in range(5)]
        sleepers.append(started.start(lambda: [writer.serve(None) for _ in range(2)]))
        eventually(lambda: waiting(writer) == 5)
        writer.close("the first cause")
        writer.close("another")
        for sleeper in sleepers:
            sleeper.join(10)
            assert not sleeper.is_alive()
        assert [str(error) for error in started.errors] == ["the first cause"] * 6
        waiter = started.start(writer.wait_unused)
        assert len(transport.sends) == 1
        assert waiter.is_alive()
        transport.let_go()
    for late in (lambda: send(writer, SMALL), lambda: writer.post(SMALL), writer.push, lambda: writer.serve(0)):
        with pytest.raises(rtunnel.SessionEnded, match="the first cause"):
            late()
    assert len(transport.sends) == 1


def test_the_end_between_two_turns(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A turn that was promised to somebody who then finds the end does not keep the writer in use."""
    for _ in range(50):
        transport = FakeTransport()
        writer = rtunnel.Writer(transport)  # type: ignore[arg-type]
        transport.hold()
        with threads(expect=rtunnel.SessionEnded) as started:
            for _ in range(3):
                started.start(send, writer, LARGE)
            started.start(lambda writer=writer: [writer.serve(None) for _ in range(9)])  # type: ignore[misc]
            transport.wait_entered(1)
            transport.let_go()
            writer.close("stopping")
            writer.wait_unused()


def test_a_failed_send_ends_the_writer(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """An error of the transport reaches its thread chained, and everybody else as the cause."""
    transport.error = ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(rtunnel.SessionEnded, match="Connection reset by peer") as caught:
        send(writer, SMALL)
    assert caught.value.__cause__ is transport.error
    with pytest.raises(rtunnel.SessionEnded, match="Connection reset by peer"):
        writer.post(SMALL)
    writer.wait_unused()
