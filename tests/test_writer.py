"""The writer: many threads' frames onto one transport, in groups, fairly, and by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from level1 import waiting_pumps
from naive_peer import CLOSE_CONN, DATA, GOAWAY, NEW_CONN, frame
from support import eventually

import rtunnel
from rtunnel import QUEUE_BYTES


class FakeStream:
    """As much of a stream as the writer looks at."""

    silenced = False

    def __init__(self, number: int = 1) -> None:
        self.number = number


class FakeTransport:
    """Keeps what is sent and by whom; a send can be held up; two at a time are an error.

    `allow` is how many sends may return; each that is under way is counted in `entered`.
    """

    def __init__(self) -> None:
        self.sends: list[bytes] = []
        self.threads: list[int] = []
        self.error: OSError | None = None
        self.finished = False
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
        assert not self.finished, "nothing can follow close_notify"
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

    def finish(self) -> None:
        """No more will be sent."""
        assert self._busy.acquire(blocking=False), "two threads are in the transport"
        self.finished = True
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


SMALL = frame(DATA, 1, b"small")
LARGE = frame(DATA, 2, b"L" * 64 * 1024)


def all_is_sent(writer: rtunnel.Writer) -> bool:
    with writer._lock:
        return not (writer._waiting or writer._writing or writer._has_work_locked())


@contextmanager
def held(writer: rtunnel.Writer, transport: FakeTransport, **expected: Any) -> Iterator[Threads]:
    """A thread is in the transport's send with LARGE, until it is let go; the control sender waits behind it.

    Both have ended after the block, which must let the send go.
    """
    transport.hold()
    with threads(**expected) as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        started.start(writer.serve)
        try:
            yield started
            eventually(lambda: all_is_sent(writer), what="all is sent")
        finally:
            transport.let_go()
            writer.close("the test is over")


def fill(writer: rtunnel.Writer) -> int:
    """Behind a send that is held: queue large frames until the next one would wait. Returns how many."""
    count = rtunnel.QUEUE_BYTES // len(LARGE)
    for _ in range(count):
        send(writer, LARGE)
    return count


# --- groups -------------------------------------------------------------------------------------------------


def test_an_idle_writer_sends_at_once(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Where nobody writes, a frame is sent by its own thread before `send` returns."""
    send(writer, SMALL)
    assert (transport.sends, transport.threads) == ([SMALL], [threading.get_ident()])


def test_frames_behind_a_send_leave_in_one_group(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Frames that find somebody writing cost their threads no wait, be they small or large, and leave in one send."""
    with held(writer, transport):
        queued = [frame(DATA, number, b"%d" % number) for number in range(1, 51)] + [LARGE]
        for each in queued:
            send(writer, each)  # returns at once: this thread would wait for ever else
        transport.let_go()
    assert transport.sends == [LARGE, b"".join(queued)]


def test_a_pump_takes_the_queued_ones_along(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Who finds nobody writing writes, in one send, the control frames, the queued DATA, then its own frame."""
    control, late = frame(NEW_CONN, 9), frame(DATA, 3, b"late")
    transport.hold()
    with threads() as started:  # without a control sender, which might be faster
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, SMALL)
        send(writer, late)
        writer.post(control)
        transport.let_go()
    send(writer, LARGE)
    assert transport.sends[1:] == [control + SMALL + late + LARGE]


def small_ones_only(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """No large frame was sent for a while."""
    for _ in range(rtunnel.GROUP_FRAMES):
        send(writer, SMALL, FakeStream(9))
    del transport.sends[1:]


def test_small_frames_of_several_streams_go_together(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pump with a small frame lets others run, and sends what they left with its own; the eighth does not wait."""
    count = rtunnel.GROUP_FRAMES
    frames = [frame(DATA, number, b"small") for number in range(1, count + 1)]

    def leave(*numbers: int) -> None:
        monkeypatch.setattr(rtunnel, "let_others_run", lambda: None)
        for number in numbers:
            send(writer, frames[number - 1], FakeStream(number))

    small_ones_only(writer, transport)
    monkeypatch.setattr(rtunnel, "let_others_run", lambda: leave(2, 3))
    send(writer, frames[0], FakeStream(1))
    assert transport.sends == [SMALL, b"".join(frames[:3])]
    monkeypatch.setattr(rtunnel, "let_others_run", lambda: leave(*range(2, count + 1)))
    send(writer, frames[0], FakeStream(1))
    assert transport.sends[2:] == [b"".join(frames)]


def test_who_waits_for_nobody(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame that fills a record, one that comes next, and a stream that sends alone, let nobody run before them."""
    asked: list[int] = []
    monkeypatch.setattr(rtunnel, "let_others_run", lambda: asked.append(1))
    for _ in range(3):
        send(writer, SMALL, FakeStream(1))
    send(writer, frame(DATA, 2, bytes(rtunnel.RECORD_BYTES)), FakeStream(2))
    for number in range(rtunnel.GROUP_FRAMES):  # so soon after it, neither does anybody
        send(writer, SMALL, FakeStream(number))
    assert not asked
    assert len(transport.sends) == 4 + rtunnel.GROUP_FRAMES
    send(writer, SMALL, FakeStream(1))
    assert asked


def test_the_end_while_others_run(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pump that let others run sends nothing behind the end: the transport is the control sender's then."""
    small_ones_only(writer, transport)
    monkeypatch.setattr(rtunnel, "let_others_run", lambda: writer.close("done"))
    send(writer, SMALL, FakeStream(1))
    assert transport.sends == [SMALL]
    with pytest.raises(rtunnel.SessionEnded, match="done"):
        send(writer, SMALL, FakeStream(1))


def test_a_last_frame_while_others_run(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream's last frame also drops what its pump has left for the send after others have run, and goes in it."""
    stream: Any = FakeStream(1)
    small_ones_only(writer, transport)
    monkeypatch.setattr(rtunnel, "let_others_run", lambda: writer.post_last(stream, frame(CLOSE_CONN, 1)))
    send(writer, SMALL, stream)
    assert transport.sends == [SMALL, frame(CLOSE_CONN, 1)]


def test_one_lets_others_run_at_a_time(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a pump lets others run another's large frame takes along what was left; what is left from then on is still
    the first one's to send."""
    asked: list[int] = []
    small = [frame(DATA, number, b"small") for number in range(4)]

    def others() -> None:
        asked.append(1)
        send(writer, LARGE, FakeStream(2))
        send(writer, small[2], FakeStream(2))
        send(writer, small[3], FakeStream(3))

    small_ones_only(writer, transport)
    monkeypatch.setattr(rtunnel, "let_others_run", others)
    send(writer, small[1], FakeStream(1))
    assert transport.sends == [SMALL, small[1] + LARGE, small[2], small[3]]
    assert asked == [1]


def test_control_frames_go_ahead_of_data(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A control frame that is posted after DATA was queued is sent before it."""
    with held(writer, transport):
        send(writer, SMALL)
        writer.post(frame(NEW_CONN, 7))
        transport.let_go()
    assert transport.frames()[1:] == [(NEW_CONN, 7, b""), (DATA, 1, b"small")]


def test_a_queued_frame_is_a_copy(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A pump may use its buffer again as soon as `send` has returned."""
    buffer = bytearray(SMALL)
    with held(writer, transport):
        send(writer, memoryview(buffer))
        buffer[:] = bytes(len(buffer))
        transport.let_go()
    assert transport.sends[1] == SMALL


def test_posting_never_waits_and_wakes_the_sender(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A posted frame is sent by the control sender, which `serve` is, where nobody else writes."""
    with threads() as started:
        sender = started.start(writer.serve)
        writer.post(frame(NEW_CONN, 1))
        eventually(lambda: transport.sends)
        writer.close("done")
    assert transport.threads == [sender.ident]


def test_a_send_without_a_frame(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Frames that were posted without waking anybody are sent by whoever calls send without one; it sends nothing
    where nothing is posted, and never waits for room."""
    send(writer, b"")
    writer.post(frame(NEW_CONN, 1), wake=False)
    writer.post(frame(NEW_CONN, 2), wake=False)
    send(writer, b"")
    assert transport.sends == [frame(NEW_CONN, 1) + frame(NEW_CONN, 2)]


def test_no_memory_for_a_batch(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who cannot make its batch has not begun to write: the others go on, and the end is not waited for in vain."""
    stream: Any = FakeStream()
    writer.grant(stream, 5)
    with monkeypatch.context() as patched:
        patched.setattr(rtunnel, "encode", lambda *_: int("x"))
        with pytest.raises(ValueError, match="x"):
            send(writer, SMALL, stream)
    send(writer, SMALL, stream)
    assert [kind for kind, *_ in transport.frames()] == [rtunnel.FrameType.WINDOW, DATA]
    writer.close("over")
    assert writer.serve() == "over"


def test_a_flush_calls_the_transport(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Where the transport itself has something to say, the control sender calls its send, with no frame."""
    with threads() as started:
        sender = started.start(writer.serve)
        writer.flush()
        eventually(lambda: transport.sends)
        writer.close("done")
    assert (transport.sends, transport.threads) == ([b""], [sender.ident])


def test_a_flush_behind_a_send_is_not_lost(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Where somebody is in a send already, which may have taken too little along, another follows it."""
    with held(writer, transport):
        writer.flush()
        transport.let_go()
        transport.wait_entered(2)
    assert transport.sends == [LARGE, b""]


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

    with threads() as started:
        started.start(writer.serve)
        pumps = [started.start(pump, stream) for stream in range(1, 9)]
        for each in pumps:
            each.join(10)
        eventually(lambda: len(transport.frames()) == 8 * rounds)
        writer.close("done")
    for stream in range(1, 9):
        numbers = [int(payload[:4]) for _, number, payload in transport.frames() if number == stream]
        assert numbers == list(range(rounds))


@pytest.mark.parametrize("limit", ["QUEUE_BYTES", "QUEUE_FRAMES"])
def test_the_queue_of_data_is_bounded(writer: rtunnel.Writer, transport: FakeTransport, limit: str) -> None:
    """Over 256 KiB or 1,024 frames behind a send, their threads wait: that is the back-pressure."""
    payload = b"x" * (16 * 1024 - 9) if limit == "QUEUE_BYTES" else b""
    count = getattr(rtunnel, limit) // (16 * 1024 if payload else 1)
    assert (rtunnel.QUEUE_BYTES, rtunnel.QUEUE_FRAMES) == (256 * 1024, 1024)
    with held(writer, transport) as started:
        for _ in range(count):
            send(writer, frame(DATA, 1, payload))
        over = started.start(send, writer, frame(DATA, 1, payload))
        eventually(lambda: waiting_pumps(writer) == 1)
        assert over.is_alive()
        assert writer.unsent_bytes() <= rtunnel.QUEUE_BYTES
        transport.let_go()
    assert len(transport.frames()) == count + 2


def test_a_frame_larger_than_the_queue_passes(
    writer: rtunnel.Writer, transport: FakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A single frame over the limit is taken where nothing else is queued: else its stream would stand for ever."""
    monkeypatch.setattr(rtunnel, "QUEUE_BYTES", 10)
    with held(writer, transport) as started:
        sender = started.start(send, writer, LARGE)
        sender.join(10)
        assert not sender.is_alive()
        transport.let_go()
    assert transport.sends == [LARGE, LARGE]


def test_nothing_follows_the_last_frame(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A stream's last frame drops what it still has here, whether queued or waiting, and wakes its pump; other
    streams' frames stay."""
    stream, other, last = FakeStream(), FakeStream(), frame(CLOSE_CONN, 1)
    with held(writer, transport) as started:
        send(writer, frame(DATA, 1, b"queued"), stream)
        send(writer, frame(DATA, 5, b"stays"), other)
        count = fill(writer)
        pump = started.start(send, writer, frame(DATA, 1, bytes(64 * 1024)), stream)
        eventually(lambda: waiting_pumps(writer) == 1)
        writer.post_last(stream, last)  # type: ignore[arg-type]
        pump.join(10)
        assert not pump.is_alive()
        send(writer, frame(DATA, 1, b"after"), stream)
        transport.let_go()
    assert transport.frames()[1:3] == [(CLOSE_CONN, 1, b""), (DATA, 5, b"stays")]
    assert [number for _, number, _ in transport.frames()[3:]] == [2] * count


def test_nothing_is_granted_after_the_last_frame(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Credit that waits to be granted is dropped with the stream's last frame, and none is granted later."""
    stream: Any = FakeStream()
    writer.grant(stream, 100)
    writer.post_last(stream, frame(CLOSE_CONN, 1))
    writer.grant(stream, 100)
    send(writer, b"")
    assert transport.frames() == [(CLOSE_CONN, 1, b"")]


def test_the_last_frame_comes_behind_the_one_in_hand(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A last frame that is posted when the stream's own thread is about to send is still the last of it."""
    stream: Any = FakeStream()
    plain_send = transport.send

    def post_first(frames: bytes) -> None:
        if not stream.silenced:
            writer.post_last(stream, frame(CLOSE_CONN, 1))
        plain_send(frames)

    transport.send = post_first  # type: ignore[method-assign, assignment]
    send(writer, SMALL, stream)
    send(writer, b"")
    send(writer, SMALL, stream)
    assert transport.frames() == [(DATA, 1, b"small"), (CLOSE_CONN, 1, b"")]


# --- fairness -----------------------------------------------------------------------------------------------


def test_who_waits_gets_room_in_order(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Those who wait for room get it in their order, and who comes later waits behind them: nobody starves."""
    with held(writer, transport) as started:
        count = fill(writer)
        for number in range(1, 5):
            # The last of them would find room, as small as it is.
            started.start(send, writer, frame(DATA, 10 + number, b"L" * (65_536 if number < 4 else 1)))
            eventually(lambda number=number: waiting_pumps(writer) == number)  # type: ignore[misc]
        transport.let_go()
    assert [stream for _, stream, _ in transport.frames()] == [2] * (1 + count) + [11, 12, 13, 14]


def test_nobody_is_enslaved(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A pump writes one batch; what comes during that is the control sender's."""
    transport.hold()
    with threads() as started:
        pump = started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, SMALL)
        transport.let_go(1)
        pump.join(10)  # although something is queued
        assert not pump.is_alive()
        assert transport.sends == [LARGE]
        sender = started.start(writer.serve)
        transport.wait_entered(2)
        send(writer, SMALL)
        transport.let_go()
        transport.wait_entered(3)
        writer.close("done")
    assert transport.sends == [LARGE, SMALL, SMALL]
    assert transport.threads == [pump.ident, sender.ident, sender.ident]


# --- the end ------------------------------------------------------------------------------------------------


def test_the_end_wakes_all_who_wait(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Closing never waits; all who wait for room get the first cause, and so does who comes later. The control sender
    waits for whoever is inside the transport's send, then gets it too."""
    served: list[str] = []
    transport.hold()
    with threads(expect=rtunnel.SessionEnded) as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        fill(writer)
        sleepers = [started.start(send, writer, LARGE) for _ in range(5)]
        sender = started.start(lambda: served.append(writer.serve()))
        eventually(lambda: waiting_pumps(writer) == 5)
        writer.close("the first cause")
        writer.close("another")
        for sleeper in sleepers:
            sleeper.join(10)
            assert not sleeper.is_alive()
        assert [str(error) for error in started.errors] == ["the first cause"] * 5
        with pytest.raises(rtunnel.SessionEnded, match="the first cause"):
            send(writer, LARGE)  # it does not wait for room that nobody makes any more
        assert len(transport.sends) == 1
        assert sender.is_alive()
        assert not transport.finished
        transport.let_go()
    assert (served, transport.finished) == (["the first cause"], True)
    for late in (lambda: send(writer, SMALL), lambda: writer.post(SMALL), lambda: send(writer, b"")):
        with pytest.raises(rtunnel.SessionEnded, match="the first cause"):
            late()
    assert writer.serve() == "the first cause"
    assert len(transport.sends) == 1


def test_the_end_between_two_sends(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Room that was promised to somebody who then finds the end does not keep the writer in use."""
    for _ in range(50):
        transport = FakeTransport()
        writer = rtunnel.Writer(transport)  # type: ignore[arg-type]
        transport.hold()
        with threads(expect=rtunnel.SessionEnded) as started:
            for _ in range(6):
                started.start(send, writer, LARGE)
            started.start(writer.serve)
            transport.wait_entered(1)
            transport.let_go()
            writer.close("stopping")


def test_a_failed_send_ends_the_writer(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """An error of the transport reaches its thread chained, and everybody else as the cause."""
    transport.error = ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(rtunnel.SessionEnded, match="Connection reset by peer") as caught:
        send(writer, SMALL)
    assert caught.value.__cause__ is transport.error
    with pytest.raises(rtunnel.SessionEnded, match="Connection reset by peer"):
        writer.post(SMALL)
    assert writer.serve() == "Connection reset by peer"  # which says no more


def test_the_last_word(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A writer that ends with a last frame sends the control frames that are queued, then that, and no DATA; it comes
    behind the send that is under way. The peer then sees the end."""
    transport.hold()
    with threads() as started:
        started.start(send, writer, LARGE)
        transport.wait_entered(1)
        send(writer, SMALL)
        writer.post(frame(NEW_CONN, 1))
        writer.close("done", frame(GOAWAY, 0, b"done"))
        finisher = started.start(writer.serve)
        assert finisher.is_alive()
        assert not transport.finished
        transport.let_go()
    assert transport.sends == [LARGE, frame(NEW_CONN, 1) + frame(GOAWAY, 0, b"done")]
    assert transport.finished


def test_an_end_without_a_last_word(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """A writer that ends without a last frame sends nothing more, and the peer sees the end."""
    writer.post(frame(NEW_CONN, 1), wake=False)
    writer.close("done")
    assert writer.serve() == "done"
    assert (transport.sends, transport.finished) == ([], True)


def test_a_last_frame_counts_where_nothing_stands_before_it(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """[S-11]: a stream's last frame waits behind its own DATA alone; where it has none queued, it is among the control
    frames, whose number says that the peer does not read."""
    transport.hold()
    with threads() as started:
        started.start(writer.serve)
        started.start(send, writer, frame(DATA, 1, b"held"), FakeStream(1))
        transport.wait_entered(1)
        ended = FakeStream(2)
        send(writer, frame(DATA, 2, b"first"), ended)
        for stream in (ended, *(FakeStream(number) for number in range(3, 9))):
            writer.post_last(stream, frame(CLOSE_CONN, stream.number), behind_data=True)  # type: ignore[arg-type]
        assert writer.unsent_bytes() - len(writer._control) == len(frame(DATA, 2, b"first") + frame(CLOSE_CONN, 2))
        assert len(writer._control) == 6 * rtunnel.HEADER_BYTES
        transport.let_go()
        eventually(lambda: len(transport.frames()) == 9)
        writer.close("done")
    sent = [(kind, number) for kind, number, _ in transport.frames()]
    assert sent.index((DATA, 2)) < sent.index((CLOSE_CONN, 2))


def test_a_stream_that_ends_wakes_its_own_pump(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """Where many pumps wait for room, another stream's end wakes none of them, or one where it makes room: else each
    end would cost as much as there are that wait, and who has waited longest would stand last."""
    woken: list[int] = []
    notify = writer._room.notify

    def note(count: int = 1) -> None:
        woken.append(count)
        notify(count)

    transport.hold()
    with threads() as started:
        started.start(writer.serve)
        for number in range(1, 6):
            started.start(send, writer, frame(DATA, number, bytes(QUEUE_BYTES)), FakeStream(number))
            if number == 1:
                transport.wait_entered(1)
            elif number == 2:
                eventually(writer.unsent_bytes)
        eventually(lambda: waiting_pumps(writer) == 3)
        [queued] = {stream for stream, _ in writer._queue}
        writer._room.notify = note  # type: ignore[method-assign]
        writer.post_last(FakeStream(9), frame(CLOSE_CONN, 9))  # type: ignore[arg-type]
        assert not woken
        [waiting, *_] = writer._waiting
        writer.post_last(waiting, frame(CLOSE_CONN, waiting.number))
        assert woken == [3]
        writer.post_last(queued, frame(CLOSE_CONN, queued.number))
        assert woken[-1] == 1
        transport.let_go()
        eventually(lambda: not waiting_pumps(writer))
        eventually(lambda: sum(kind == DATA for kind, _, _ in transport.frames()) == 3)
        writer.close("done")


def test_an_end_lets_go_of_the_streams(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """What is queued at the end is sent by nobody, and holds no stream: that would hold its session in a cycle."""
    transport.hold()
    with threads() as started:
        started.start(send, writer, frame(DATA, 1, b"held"), FakeStream(1))
        transport.wait_entered(1)
        send(writer, frame(DATA, 2, b"queued"), FakeStream(2))
        writer.close("done")
        assert not writer._queue
        transport.let_go()
    assert [number for _, number, _ in transport.frames()] == [1]


def test_after_finish_nothing_is_sent(writer: rtunnel.Writer, transport: FakeTransport) -> None:
    """TLS's answers to what still comes, credit, frames and a second end: the transport hears of none of them."""
    writer.close("over", b"bye")
    assert writer.serve() == "over"
    assert transport.finished
    writer.flush()
    writer.grant(FakeStream(), 1)  # type: ignore[arg-type]
    writer.post_last(FakeStream(), frame(CLOSE_CONN, 1))  # type: ignore[arg-type]
    writer.close("again", b"bye")
    for refused in (lambda: writer.send(FakeStream(), b"x"), lambda: writer.post(b"x")):  # type: ignore[arg-type]
        with pytest.raises(rtunnel.SessionEnded, match="over"):
            refused()
    assert transport.sends == [b"bye"]
