"""What a session is made of: streams, the threads they run in, the ports they come from, and the safety nets."""

from __future__ import annotations

import _thread
import contextlib
import errno
import random
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from level1 import Log, control_address, idle_threads, leases, open_stream, stop, writer_in_use
from naive_peer import CLOSE_CONN, DATA, EOF, NEW_CONN, PING, PONG, WINDOW, NaivePeer, frame
from support import (
    connect,
    echo_service,
    ends_with,
    eventually,
    read_all,
    read_exactly,
    reset,
    running,
    threads,
)
from tunnels import tcp_pair, text, visit

import rtunnel

LOOPBACK = rtunnel.Address("127.0.0.1", 0)
BIG = random.Random(1).randbytes(600_000)  # more than the small sockets of these tests hold, less than a queue


class AnyLog(Log):
    """What the program logs in this process; the tests here cause internal errors."""

    def check(self) -> None:
        """All is well."""


@pytest.fixture
def log() -> Iterator[Log]:
    with AnyLog() as log:
        yield log


@pytest.fixture(params=["direct", "polled"])
def both_paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With MSG_DONTWAIT, and the way of systems that have none."""
    if request.param == "polled":
        monkeypatch.setattr(rtunnel, "DONT_WAIT", None)


@pytest.fixture
def pool() -> Iterator[rtunnel.Pool]:
    """A pool that is closed after the test, with no thread left."""
    made = rtunnel.Pool()
    yield made
    made.close()


@pytest.fixture
def program() -> Iterator[rtunnel.Program]:
    """What server and client share, and neither of them; no thread of it is left after the test."""
    made = rtunnel.Program(rtunnel.Settings(), None)
    made.start()
    yield made
    stop(made)


class Bench:
    """A session whose peer, and whose streams' visitors, the test plays."""

    def __init__(self, program: rtunnel.Program) -> None:
        near, far = tcp_pair()
        self.peer = NaivePeer(far)
        self.session = rtunnel.Session(rtunnel.PlainTransport(near), program)
        self.started: list[rtunnel.Task] = []
        start = self.session.start_thread

        def noting(task: rtunnel.Task) -> None:
            self.started.append(task)
            start(task)

        self.session.start_thread = noting  # type: ignore[method-assign]

    def drainers(self) -> int:
        """How many drainers have been started."""
        return sum("_start_drainer" in getattr(task, "__qualname__", "") for task in self.started)

    def open(self, sock: socket.socket | None, dial: Callable[[], socket.socket] | None = None) -> rtunnel.Stream:
        """A stream with its pump at work: of an accepted socket, or of one that it dials."""
        stream = open_stream(self.session, sock, LOOPBACK)
        self.session.program.pool.run(lambda: stream.run(dial))
        return stream


@pytest.fixture
def bench(program: rtunnel.Program) -> Iterator[Bench]:
    """A session of level 0 at work; ended after the test."""
    made = Bench(program)
    with running(made.session.run, lambda: made.session.end("the test is over")):
        yield made
    made.peer.sock.close()


@pytest.fixture
def visitor() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The two ends of a visitor's connection, both with small buffers: the tunnel's, and the visitor's own."""
    near, far = tcp_pair(receive_buffer=8192)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    yield near, far
    far.close()


Ends = tuple[socket.socket, socket.socket]


def test_a_short_answer_is_one_record_with_its_end(
    bench: Bench, visitor: Ends, both_paths: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dialled socket whose first bytes are all that it has is told of in one send: DATA, and the end behind it."""
    sent: list[bytes] = []
    send = rtunnel.PlainTransport.send

    def noted(transport: rtunnel.PlainTransport, frames: bytes) -> None:
        sent.append(bytes(frames))
        send(transport, frames)

    monkeypatch.setattr(rtunnel.PlainTransport, "send", noted)
    near, far = visitor
    far.sendall(b"answer")
    far.shutdown(socket.SHUT_WR)
    bench.open(None, lambda: near)
    bench.peer.expect(DATA, 1, b"answer")
    assert bench.peer.read_close(1) == b""
    assert rtunnel.encode(DATA, 1, b"answer") + rtunnel.encode(CLOSE_CONN, 1) in sent


def level_1(bench: Bench) -> None:
    """Its streams are of level 1 from now on."""
    bench.session.stream_kind, bench.session.peer_window = rtunnel.PumpedStream, 1_000_000


def test_who_ends_last_closes(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """A pump whose socket has no more leaves at once; what the tunnel brings still goes to the socket, and the end of
    that, in the reader's thread, closes it."""
    near, far = visitor
    level_1(bench)
    watched, pool = WatchedSocket(near), bench.session.program.pool
    idle = idle_threads(pool)
    bench.open(watched)
    far.shutdown(socket.SHUT_WR)
    bench.peer.expect(EOF, 1)
    eventually(lambda: idle_threads(pool) == idle + 1)
    bench.peer.send_frame(DATA, 1, b"the answer")
    assert read_exactly(far, 10) == b"the answer"
    assert (bench.session.stream_count(), watched.closed) == (1, 0)
    bench.peer.send_frame(EOF, 1)
    assert read_all(far) == b""
    eventually(lambda: bench.session.stream_count() == 0)
    assert (watched.closed, watched.closed_under) == (1, 0)
    assert idle_threads(pool) == idle + 1


def test_an_answer_that_is_queued_when_its_socket_is_reset(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """[T-4]: what a pump that has left had read goes ahead of CLOSE_CONN, whoever finds the reset."""
    near, far = visitor
    level_1(bench)
    idle = idle_threads(bench.session.program.pool)
    with writer_in_use(bench.session.writer):
        bench.open(near)
        far.sendall(b"why")
        far.shutdown(socket.SHUT_WR)
        eventually(lambda: idle_threads(bench.session.program.pool) == idle + 1)
        reset(far)
        eventually(lambda: bench.session.stream_count() == 0)
    bench.peer.expect(DATA, 1, b"why")
    bench.peer.expect(EOF, 1)
    bench.peer.expect(CLOSE_CONN, 1, b"reset")


def test_a_stream_that_has_ended_is_still_written(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """[T-3]: behind both ends' EOF a CLOSE_CONN is dropped, and what is queued is written."""
    far = ended_with_a_queue(bench, visitor)
    bench.peer.send_frame(CLOSE_CONN, 1, b"late")
    assert read_all(far) == BIG[:60_000]


def test_nothing_is_said_where_a_stream_has_ended(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """[T-3]: nor does this end say CLOSE_CONN there, where the socket is reset with bytes in the queue."""
    far = ended_with_a_queue(bench, visitor)
    answered(bench)
    reset(far)
    eventually(lambda: bench.session.stream_count() == 0)
    answered(bench)


def ended_with_a_queue(bench: Bench, visitor: Ends) -> socket.socket:
    """Both ends have sent EOF, and this one has yet to write 60,000 bytes; returns the socket that they are for."""
    near, far = visitor
    level_1(bench)
    bench.open(near)
    far.shutdown(socket.SHUT_WR)
    bench.peer.expect(EOF, 1)
    bench.peer.send_frame(DATA, 1, BIG[:60_000])
    bench.peer.send_frame(EOF, 1)
    return far


def answered(bench: Bench) -> None:
    """A PING is answered, and until then nothing comes but WINDOW: all that was sent before has been dealt with."""
    bench.peer.send_frame(PING, 0, b"12345678")
    while (got := bench.peer.read_frame()) != (PONG, 0, b"12345678"):
        assert got[0] == WINDOW, got


# --- a stream: from the tunnel to the socket ----------------------------------------------------------------


def test_what_the_socket_takes_needs_no_drainer(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """Where nothing is queued, the reader itself gives DATA to the socket."""
    near, far = visitor
    bench.open(near)
    for number in range(50):
        bench.peer.send_frame(DATA, 1, b"%04d" % number)
        assert read_exactly(far, 4) == b"%04d" % number
    assert bench.drainers() == 0


def test_a_slow_socket_has_a_drainer(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """What the socket does not take is queued, one drainer writes it in order, and later DATA goes behind it."""
    near, far = visitor
    bench.open(near)
    for start in range(0, len(BIG), 50_000):
        bench.peer.send_frame(DATA, 1, BIG[start : start + 50_000])
    eventually(bench.drainers)
    assert read_exactly(far, len(BIG)) == BIG
    bench.peer.send_frame(DATA, 1, b"behind")
    assert read_exactly(far, 6) == b"behind"
    assert bench.drainers() < 10


def test_the_drainers_handover_loses_nothing(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """Drainers that end while DATA arrives, thousands of times over: no byte is lost, doubled or out of order."""
    near, far = visitor
    bench.open(near)
    source = random.Random(2)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    digits = b"".join(b"%06d" % number for number in range(200_000))
    try:

        def feed() -> None:
            at = 0
            while at < len(digits):
                count = source.randint(1, 6000)
                bench.peer.send_frame(DATA, 1, digits[at : at + count])
                at += count

        with running(feed):
            assert read_exactly(far, len(digits)) == digits
    finally:
        sys.setswitchinterval(interval)


def test_the_end_goes_behind_what_is_queued(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """A bare CLOSE_CONN is a clean end behind all DATA before it, and is answered by one bare CLOSE_CONN."""
    near, far = visitor
    bench.open(near)
    bench.peer.send_frame(DATA, 1, BIG)
    bench.peer.send_frame(CLOSE_CONN, 1)
    assert bench.peer.read_close(1) == b""
    assert read_all(far) == BIG
    far.shutdown(socket.SHUT_WR)
    eventually(lambda: bench.session.stream_count() == 0)
    bench.peer.expect_silence(0.05)


def test_a_reason_resets_at_once(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """A CLOSE_CONN with a reason resets the socket, whatever is queued for it."""
    near, far = visitor
    bench.open(near)
    bench.peer.send_frame(DATA, 1, BIG)
    eventually(bench.drainers)
    bench.peer.send_frame(CLOSE_CONN, 1, b"reset")
    eventually(lambda: bench.session.stream_count() == 0)
    assert ends_with(far) == "reset"


def test_an_abort_ends_both_directions(bench: Bench, visitor: Ends, log: Log, both_paths: None) -> None:
    """An abort resets the socket also under a drainer at work, tells the peer the first cause, and logs that."""
    near, far = visitor
    stream = bench.open(near)
    bench.peer.send_frame(DATA, 1, BIG)
    eventually(bench.drainers)
    stream.abort("the first cause")
    stream.abort("another")
    assert bench.peer.read_close(1) == b"the first cause"
    eventually(lambda: bench.session.stream_count() == 0)
    assert ends_with(far) == "reset"
    (closed,) = log.events("stream-closed")
    assert closed["reason"] == "the first cause"
    bench.peer.send_frame(DATA, 1, b"dropped")
    bench.peer.send_frame(CLOSE_CONN, 1)
    bench.peer.expect_silence(0.05)


def test_a_full_queue_is_one_mebibyte_and_no_more(
    bench: Bench, visitor: Ends, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At level 0 a stream queues 1 MiB; then its feeder waits, at most for the limit, and the stream is reset."""
    monkeypatch.setattr(rtunnel, "LEVEL_0_WAIT_S", 0.2)
    assert rtunnel.LEVEL_0_QUEUE_BYTES == 1 << 20
    near, far = visitor
    stream = bench.open(near)
    fed = 0
    part = memoryview(bytes(16 * 1024))
    while bench.session.stream_count() and fed < 8 << 20:
        before = time.monotonic()
        stream.feed(part)
        if time.monotonic() - before > 0.15:
            break
        fed += len(part)
    assert 1 << 20 <= fed <= (1 << 20) + (512 << 10)  # and what the two small sockets hold
    assert bench.peer.read_close(1) == b"stalled"
    assert ends_with(far) == "reset"


def test_room_is_given_back(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """A feeder that waits for room goes on as soon as the socket has taken some: 4 MB pass through one stream."""
    near, far = visitor
    stream = bench.open(near)
    with running(lambda: [stream.feed(memoryview(BIG)) for _ in range(7)]):
        assert read_exactly(far, 7 * len(BIG)) == BIG * 7


# --- a stream: its pump -------------------------------------------------------------------------------------


def test_the_pump_sends_what_it_reads(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """What the socket says leaves as DATA, its end of file as one bare CLOSE_CONN behind it."""
    near, far = visitor
    bench.open(near)
    with running(lambda: (far.sendall(BIG), far.shutdown(socket.SHUT_WR))):
        bench.peer.expect_data(1, BIG)
        assert bench.peer.read_close(1) == b""
    assert ends_with(far) == "eof"


def test_a_reset_is_told_with_its_reason(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """A socket's reset leaves as CLOSE_CONN with the reason "reset"."""
    near, far = visitor
    bench.open(near)
    reset(far)
    assert bench.peer.read_close(1) == b"reset"


def test_nothing_is_said_after_the_peers_end(bench: Bench, visitor: Ends) -> None:
    """What a socket still says after the peer's CLOSE_CONN is discarded, so that its own end stays clean."""
    near, far = visitor
    bench.open(near)
    bench.peer.send_frame(DATA, 1, b"bye")
    bench.peer.send_frame(CLOSE_CONN, 1)
    assert bench.peer.read_close(1) == b""
    assert read_all(far) == b"bye"
    far.sendall(BIG)
    far.shutdown(socket.SHUT_WR)
    eventually(lambda: bench.session.stream_count() == 0)
    bench.peer.expect_silence(0.05)


def test_a_socket_that_stays_is_left(bench: Bench, visitor: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that does not answer our end with its own is closed after the limit, without a reset."""
    monkeypatch.setattr(rtunnel, "LINGER_S", 0.1)
    near, far = visitor
    bench.open(near)
    bench.peer.send_frame(DATA, 1, b"bye")
    bench.peer.send_frame(CLOSE_CONN, 1)
    eventually(lambda: bench.session.stream_count() == 0)
    assert read_all(far) == b"bye"


def test_a_socket_that_pushes_on_is_left(bench: Bench, visitor: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that goes on sending after our end keep its stream beyond the limit."""
    monkeypatch.setattr(rtunnel, "LINGER_S", 0.1)
    near, far = visitor
    bench.open(near)

    def push() -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                far.sendall(BIG)

    bench.peer.send_frame(DATA, 1, b"bye")
    bench.peer.send_frame(CLOSE_CONN, 1)
    assert bench.peer.read_close(1) == b""
    with running(push):
        eventually(lambda: bench.session.stream_count() == 0)


def test_the_sessions_end_resets_its_streams(bench: Bench, visitor: Ends, both_paths: None) -> None:
    """When a session ends, each of its streams is reset and closed."""
    near, far = visitor
    bench.open(near)
    bench.peer.send_frame(DATA, 1, b"half")
    assert read_exactly(far, 4) == b"half"
    bench.session.end("any cause")
    eventually(lambda: bench.session.stream_count() == 0)
    assert ends_with(far) == "reset"


def test_no_stream_on_a_session_that_has_ended(bench: Bench) -> None:
    """A session that has ended takes no stream."""
    bench.session.end("the cause")
    with pytest.raises(rtunnel.SessionEnded, match="the cause"):
        bench.open(None)


class WatchedSocket(socket.socket):
    """Notes who closes it, and whether a call was at work on it then."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(fileno=sock.detach())
        self.at_work = 0
        self.closed = 0
        self.closed_under = 0
        self.tell_error_late = threading.Event()  # a failing send waits for it, at most 0.3 s
        self.failed = threading.Event()  # a send has met an error
        self.receive_last = False  # a receive that meets an end lets a send meet it first

    def send(self, *args: Any) -> int:
        self.at_work += 1
        try:
            return super().send(*args)
        except BlockingIOError:
            raise
        except OSError:
            self.failed.set()
            self.tell_error_late.wait(0.3)
            raise
        finally:
            self.at_work -= 1

    def recv_into(self, *args: Any) -> int:
        if self.receive_last:
            poll = select.poll()
            poll.register(self, select.POLLIN)
            poll.poll(10_000)
            self.failed.wait(10)
        self.at_work += 1
        try:
            return super().recv_into(*args)
        finally:
            self.at_work -= 1

    def close(self) -> None:
        if self.fileno() >= 0:
            self.closed += 1
            self.closed_under += self.at_work
        super().close()


@pytest.mark.parametrize("end", ["abort", "session", "visitor", "peer"])
def test_nobody_closes_the_socket_under_a_call(bench: Bench, visitor: Ends, end: str, both_paths: None) -> None:
    """However a stream ends, with a drainer at work: its socket is closed once, and under no other call."""
    near, far = visitor
    watched = WatchedSocket(near)
    stream = bench.open(watched)
    bench.peer.send_frame(DATA, 1, BIG)
    eventually(bench.drainers)
    if end == "abort":
        stream.abort("because")
    elif end == "session":
        bench.session.end("because")
    elif end == "visitor":
        reset(far)
    else:
        bench.peer.send_frame(CLOSE_CONN, 1, b"reset")
    eventually(lambda: watched.closed)
    eventually(lambda: bench.session.stream_count() == 0)
    assert (watched.closed, watched.closed_under) == (1, 0)


def test_a_reset_that_the_drainer_meets_first(bench: Bench, visitor: Ends) -> None:
    """A reset that the drainer's send has met, so that the pump's receive sees a mere end, is told as a reset."""
    near, far = visitor
    watched = WatchedSocket(near)
    watched.receive_last = True
    bench.open(watched)
    bench.peer.send_frame(DATA, 1, BIG)
    eventually(bench.drainers)
    reset(far)
    assert bench.peer.read_close(1) == b"reset"
    watched.tell_error_late.set()


# --- a stream that dials ------------------------------------------------------------------------------------


class Dial:
    """A dial that ends when the test says so."""

    def __init__(self, result: socket.socket | OSError) -> None:
        self.answer = threading.Event()
        self._result = result

    def __call__(self) -> socket.socket:
        self.answer.wait(10)
        if isinstance(self._result, OSError):
            raise self._result
        return self._result


@pytest.mark.parametrize("size", [5, len(BIG)])
@pytest.mark.parametrize("closes", [False, True])
def test_what_comes_while_it_dials_waits(
    bench: Bench, visitor: Ends, size: int, closes: bool, both_paths: None
) -> None:
    """DATA, and a clean end, that come before the local service has answered reach it afterwards, in order."""
    near, far = visitor
    dial = Dial(near)
    bench.open(None, dial)
    bench.peer.send_frame(DATA, 1, BIG[:size])
    if closes:
        bench.peer.send_frame(CLOSE_CONN, 1)
        assert bench.peer.read_close(1) == b""
    dial.answer.set()
    assert read_exactly(far, size) == BIG[:size]
    if not closes:
        bench.peer.send_frame(CLOSE_CONN, 1)
    assert ends_with(far) == "eof"


def test_an_abort_while_it_dials(bench: Bench, visitor: Ends) -> None:
    """A stream that is aborted while it dials resets the connection that it gets."""
    near, far = visitor
    dial = Dial(near)
    bench.open(None, dial)
    bench.peer.send_frame(DATA, 1, b"x")
    bench.peer.send_frame(CLOSE_CONN, 1, b"reset")
    bench.peer.read_close(1)
    dial.answer.set()
    assert ends_with(far) == "reset"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), b"refused"),
        (TimeoutError("timed out"), b"time"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), b"Name or service not known"),
    ],
)
def test_a_dial_that_fails(bench: Bench, error: OSError, reason: bytes) -> None:
    """A dial that fails leaves as one CLOSE_CONN with the reason, and the stream is gone."""
    dial = Dial(error)
    bench.open(None, dial)
    dial.answer.set()
    assert bench.peer.read_close(1).startswith(reason)
    eventually(lambda: bench.session.stream_count() == 0)


# --- where there is no thread -------------------------------------------------------------------------------


def no_thread(*task: object) -> None:
    """What a pool does where the system gives no thread."""
    raise rtunnel.NoThread("can't start new thread")


def test_no_thread_for_a_drainer(bench: Bench, visitor: Ends) -> None:
    """Where no drainer can be started, that stream alone is reset."""
    near, far = visitor
    bench.open(near)
    start = bench.session.start_thread
    bench.session.start_thread = no_thread  # type: ignore[method-assign]
    bench.peer.send_frame(DATA, 1, BIG)
    assert b"thread" in bench.peer.read_close(1)
    assert ends_with(far) == "reset"
    bench.session.start_thread = start  # type: ignore[method-assign]
    with running_stream(bench) as other:
        bench.peer.send_frame(DATA, 2, b"fine")
        assert read_exactly(other, 4) == b"fine"


@contextlib.contextmanager
def running_stream(bench: Bench) -> Iterator[socket.socket]:
    """One more stream of the bench: its visitor's end."""
    near, far = tcp_pair()
    with far:
        bench.open(near)
        yield far


def test_no_thread_for_a_local_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a client can start no thread for a stream, that stream alone ends, with a reason."""
    near, far = tcp_pair()
    with echo_service() as service, NaivePeer(far) as peer:
        mapping = rtunnel.Mapping(0, rtunnel.Address(*service.address))
        client = rtunnel.Client([mapping], rtunnel.Settings(), None)
        rtunnel.CLOCK.start()
        session = rtunnel.ClientSession(rtunnel.PlainTransport(near), client, mapping)
        with running(session.run, lambda: stop(client)):
            peer.read_frame()
            with monkeypatch.context() as patch:
                patch.setattr(session, "start_thread", no_thread)
                peer.send_frame(NEW_CONN, 1)
                assert b"thread" in peer.read_close(1)
            peer.send_frame(NEW_CONN, 2)
            peer.send_frame(DATA, 2, b"fine")
            peer.expect_data(2, b"fine")


def test_no_thread_for_a_session(program: rtunnel.Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a session gets no control sender it ends, with the reason, and its connection is closed."""
    near, far = tcp_pair()
    with NaivePeer(far) as peer:
        session = rtunnel.Session(rtunnel.PlainTransport(near), program)
        monkeypatch.setattr(session, "start_thread", no_thread)
        assert "thread" in session.run()
        peer.expect_end()


# --- sockets -----------------------------------------------------------------------------------


def test_dead_peers_are_found(visitor: Ends) -> None:
    """TCP keepalive finds a dead peer in 60 s, where nothing is on its way to it; small messages leave at once.

    A control connection has a short queue in the kernel besides.
    """
    assert rtunnel.KEEPALIVE_IDLE_S + rtunnel.KEEPALIVE_PROBES * rtunnel.KEEPALIVE_INTERVAL_S == 60
    near, _ = visitor
    with near:
        rtunnel.PlainTransport(near)
        assert near.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        if sys.platform == "linux":
            assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == rtunnel.KEEPALIVE_IDLE_S
            assert near.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == rtunnel.UNSENT_BYTES


@pytest.mark.parametrize("with_poll", [True, False])
def test_waiting_for_a_socket(visitor: Ends, monkeypatch: pytest.MonkeyPatch, with_poll: bool) -> None:
    """A wait tells whether the socket can be read or written, where the system has poll and where it has not."""
    if not with_poll:
        monkeypatch.delattr(select, "poll")
    near, far = visitor
    with near:
        assert rtunnel.ready([near], writing=True, seconds=1) == [near]
        assert rtunnel.ready([near], writing=False, seconds=0.01) == []
        far.sendall(b"x")
        assert rtunnel.ready([near], writing=False, seconds=1) == [near]
        assert rtunnel.ready([near, far], writing=False, seconds=1) == [near]


# --- the pool -----------------------------------------------------------------------------------------------


def test_idle_threads_are_used_again(pool: rtunnel.Pool) -> None:
    """A task that finds an idle thread runs in it."""
    seen: list[int] = []
    for _ in range(20):
        done = threading.Event()

        def task(done: threading.Event = done) -> None:
            seen.append(threading.get_ident())
            done.set()

        pool.run(task)
        assert done.wait(10)
        eventually(lambda: idle_threads(pool))
    assert len(seen) == 20
    assert len({*seen}) == 1


def test_tasks_run_at_the_same_time(pool: rtunnel.Pool) -> None:
    """No task waits for another's thread."""
    together = threading.Barrier(30)
    for _ in range(30):
        pool.run(lambda: together.wait(10))
    eventually(lambda: idle_threads(pool) == 30)
    assert not together.broken


def test_a_task_that_fails_costs_no_thread(pool: rtunnel.Pool, log: Log) -> None:
    """An error that escapes a task is logged with its traceback, and the thread works on."""
    pool.run(lambda: 1 // 0)
    eventually(lambda: idle_threads(pool))
    (record,) = log.events("internal-error")
    assert "ZeroDivisionError" in record["traceback"]


def test_idle_threads_end(pool: rtunnel.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that has had no work for a time ends."""
    monkeypatch.setattr(rtunnel, "POOL_IDLE_S", 0.01)
    pool.run(lambda: None)
    eventually(lambda: not tasks())


def test_the_idle_threads_of_a_crowd_do_not_end_at_once(pool: rtunnel.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands that wake at one time would keep all others waiting for the interpreter's lock."""
    monkeypatch.setattr(rtunnel, "POOL_IDLE_S", 0.5)
    together = threading.Barrier(50)
    for _ in range(50):
        pool.run(lambda: together.wait(10))
    eventually(lambda: idle_threads(pool) == 50)
    eventually(lambda: idle_threads(pool) < 50)
    began = time.monotonic()
    eventually(lambda: not tasks())
    assert time.monotonic() - began > 0.1


def test_a_task_is_never_lost_to_a_thread_that_ends(pool: rtunnel.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task given in the moment in which an idle thread gives up still runs."""
    monkeypatch.setattr(rtunnel, "POOL_IDLE_S", 0.0005)
    source = random.Random(3)
    for _ in range(300):
        done = threading.Event()
        pool.run(done.set)
        assert done.wait(10)
        threading.Event().wait(source.random() / 1000)


def test_closing_while_threads_go_idle(log: Log) -> None:
    """Closing takes no more work, and no thread is left that is about to go idle."""
    for _ in range(200):
        pool = rtunnel.Pool()
        for _ in range(3):
            pool.run(lambda: None)
        pool.close()
        with pytest.raises(rtunnel.NoThread, match="stopping"):
            pool.run(lambda: None)
    eventually(lambda: not tasks())
    assert not log.events("internal-error")


def test_closing_lets_all_idle_threads_go(log: Log) -> None:
    """However many are idle, each ends: one that leaves wakes the next."""
    pool, together = rtunnel.Pool(), threading.Barrier(50)
    for _ in range(50):
        pool.run(lambda: together.wait(10))
    eventually(lambda: idle_threads(pool) == 50)
    pool.close()
    eventually(lambda: not tasks(), 5.0)


def test_closing_never_waits(log: Log) -> None:
    """A thread that does not end is not waited for; it leaves when its task is done."""
    pool, leave, left = rtunnel.Pool(), threading.Event(), threading.Event()
    pool.run(lambda: (leave.wait(10), left.set()))
    pool.close()
    assert not left.is_set()
    leave.set()
    assert left.wait(10)
    eventually(lambda: not tasks())


def tasks() -> int:
    """How many threads of pools there are."""
    return threads()["of a pool"]


def test_a_thread_that_cannot_be_started(pool: rtunnel.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no thread the caller is told, and the pool can be used on and closed."""

    def fail(work: Callable[..., None], arguments: tuple[rtunnel.Inbox]) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(_thread, "start_new_thread", fail)
        with pytest.raises(rtunnel.NoThread, match="can't start"):
            pool.run(lambda: None)
    done = threading.Event()
    pool.run(done.set)
    assert done.wait(10)


def test_closing_while_a_thread_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is closed while a thread is being started still runs its task, and lets the thread go."""
    pool, starting, go_on, ran = rtunnel.Pool(), threading.Event(), threading.Event(), threading.Event()
    start = _thread.start_new_thread

    def slowly(work: Callable[..., None], arguments: tuple[rtunnel.Inbox]) -> None:
        starting.set()
        assert go_on.wait(10)
        start(work, arguments)

    monkeypatch.setattr(_thread, "start_new_thread", slowly)
    with running(lambda: pool.run(ran.set)):
        assert starting.wait(10)
        pool.close()
        go_on.set()
    assert ran.wait(10)
    eventually(lambda: not tasks())


# --- the listener -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(pool: rtunnel.Pool, handle: Callable[..., None]) -> Iterator[rtunnel.Listener]:
    """A listener on a free port, at work; after its stop no acceptor waits, and the last one has closed it."""
    listener = rtunnel.Listener(LOOPBACK, pool, handle)
    try:
        yield listener
    finally:
        listener.stop()
        eventually(lambda: not listener._waiting and listener.socket.fileno() < 0)


def test_a_listener_serves_and_closes(pool: rtunnel.Pool) -> None:
    """Each connection is given to the handler with its peer's address; its return closes the connection."""
    peers: list[rtunnel.Address] = []

    def handle(sock: socket.socket, peer: rtunnel.Address) -> None:
        peers.append(peer)
        sock.sendall(b"hello")

    with listening(pool, handle) as listener:
        assert listener.address.port
        for _ in range(10):
            with connect(listener.address) as visitor:
                assert read_all(visitor) == b"hello"
                assert peers[-1] == visitor.getsockname()


def test_what_is_accepted_is_tuned(pool: rtunnel.Pool) -> None:
    """A connection has its listener's options from its first moment: keepalive, no delay, and the reset at close."""
    seen: list[tuple[bool, ...]] = []

    def handle(sock: socket.socket, peer: rtunnel.Address) -> None:
        options = ((socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_NODELAY))
        seen.append(tuple(bool(sock.getsockopt(*option)) for option in options))

    for resets, end in ((True, "reset"), (False, "eof")):
        listener = rtunnel.Listener(LOOPBACK, pool, handle, reset=resets)
        assert visit(listener.address) == end
        listener.stop()
    assert seen == [(True, True)] * 2


def test_who_serves_has_a_successor(pool: rtunnel.Pool) -> None:
    """However many connections are served at once, the next one is taken; few threads wait when all have ended."""
    leave, count = threading.Event(), 3 * rtunnel.ACCEPTORS

    def handle(sock: socket.socket, peer: rtunnel.Address) -> None:
        sock.sendall(b"x")
        leave.wait(10)

    with listening(pool, handle) as listener, contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(connect(listener.address)) for _ in range(count)]
        assert [read_exactly(each, 1) for each in visitors] == [b"x"] * count
        leave.set()
        assert [read_all(each) for each in visitors] == [b""] * count
        eventually(lambda: listener._waiting == rtunnel.ACCEPTORS and idle_threads(pool) >= count - rtunnel.ACCEPTORS)


def test_a_listener_where_a_stop_wakes_nobody(pool: rtunnel.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere than on Linux acceptors wait in steps, and look for the stop; what they take waits as long as it has
    to."""
    limits: list[float | None] = []

    def handle(sock: socket.socket, peer: rtunnel.Address) -> None:
        limits.append(sock.gettimeout())

    with monkeypatch.context() as patch:
        patch.setattr(rtunnel, "STEP_S", 0.02)
        patch.setattr(sys, "platform", "another")
        listener = rtunnel.Listener(LOOPBACK, pool, handle)
    assert listener.socket.gettimeout() == 0.02
    for _ in range(2 * rtunnel.ACCEPTORS):
        assert visit(listener.address) == "eof"
    assert limits == [None] * 2 * rtunnel.ACCEPTORS
    listener._asked_to_stop.set()  # nothing else
    eventually(lambda: not listener._waiting and listener.socket.fileno() < 0)


def test_a_listener_keeps_a_reset(pool: rtunnel.Pool) -> None:
    """A handler that asks for a reset gets it: nothing sends FIN before."""
    with listening(pool, lambda sock, peer: rtunnel.reset_at_close(sock)) as listener:
        for _ in range(10):
            assert visit(listener.address) == "reset"


def test_a_handler_that_fails(pool: rtunnel.Pool, log: Log) -> None:
    """An error that escapes a handler is logged with its traceback and closes its connection alone."""

    def handle(sock: socket.socket, peer: rtunnel.Address) -> None:
        if sock.recv(1) == b"0":
            raise ZeroDivisionError("this one")
        sock.sendall(b"fine")

    with listening(pool, handle) as listener:
        for word, answer in ((b"0", b""), (b"1", b"fine")):
            with connect(listener.address) as visitor:
                visitor.sendall(word)
                assert read_all(visitor) == answer
    (record,) = log.events("internal-error")
    assert "ZeroDivisionError: this one" in record["traceback"]


def test_an_admission_that_fails(pool: rtunnel.Pool, log: Log) -> None:
    """An error that escapes the admission is logged and closes its connection alone; the port goes on."""
    answers = iter([ZeroDivisionError("this one"), True, True])

    def admit(peer: rtunnel.Address) -> bool:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer is True

    listener = rtunnel.Listener(LOOPBACK, pool, lambda sock, peer: sock.sendall(b"fine"), admit)
    for expected in (b"", b"fine", b"fine"):
        with connect(listener.address) as visitor:
            assert read_all(visitor) == expected
    listener.stop()
    (record,) = log.events("internal-error")
    assert "ZeroDivisionError: this one" in record["traceback"]


def test_connections_that_cannot_be_accepted(pool: rtunnel.Pool, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for which there is no memory, and one that on macOS has no address any more, count nowhere, and the port
    goes on."""
    monkeypatch.setattr(rtunnel, "ACCEPT_PAUSE_S", 0.01)
    accept, faults, admitted, left = socketserver.TCPServer.get_request, ["memory", "address"], [], []

    def fail(listener: Any) -> Any:
        sock, address = accept(listener)
        fault = faults.pop(0) if faults else ""
        if fault:
            sock.close()
        if fault == "memory":
            raise MemoryError
        return sock, None if fault else address

    monkeypatch.setattr(socketserver.TCPServer, "get_request", fail)
    options: Any = {"admit": lambda peer: admitted.append(peer) or True, "left": lambda: left.append(1)}
    listener = rtunnel.Listener(LOOPBACK, pool, lambda sock, peer: sock.sendall(b"fine"), **options)
    for expected in (b"", b"", b"fine"):
        with connect(listener.address) as visitor:
            assert read_all(visitor) == expected
    listener.stop()
    eventually(lambda: len(left) == 1)
    assert len(admitted) == 1
    assert not log.events("internal-error")


def test_a_stopped_listener_frees_its_port(pool: rtunnel.Pool) -> None:
    """Stopping never waits; the port is free at once, also with connections open and others waiting."""
    leave = threading.Event()
    try:
        first = rtunnel.Listener(LOOPBACK, pool, lambda sock, peer: leave.wait(10) and None)
        with connect(first.address), connect(first.address):
            asked = time.monotonic()
            first.stop()
            first.stop()  # a second time: nothing

            def again() -> rtunnel.Listener | None:
                with contextlib.suppress(OSError):
                    return rtunnel.Listener(first.address, pool, lambda sock, peer: None)
                return None

            second = again() if sys.platform == "linux" else eventually(again, 2.0)
            assert second is not None
            assert time.monotonic() - asked < 0.4 or sys.platform != "linux", "it waited for its poll interval"
            second.stop()
    finally:
        leave.set()


def test_a_listener_drops_what_no_thread_can_serve(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection for which there is no thread is closed, with a line in the log, and the next one is served."""
    pool = rtunnel.Pool()
    run = pool.run
    failures = [rtunnel.NoThread("can't start new thread")]

    def fail_once(*task: Any) -> None:
        if failures:
            raise failures.pop()
        run(*task)

    with listening(pool, lambda sock, peer: sock.sendall(b"hello")) as listener:
        monkeypatch.setattr(pool, "run", fail_once)
        with connect(listener.address) as visitor:
            assert read_all(visitor) == b""
        with connect(listener.address) as visitor:
            assert read_all(visitor) == b"hello"
    pool.close()
    (record,) = log.events("connection-dropped")
    assert "thread" in record["reason"]


# --- the safety nets ----------------------------------------------------------------------------------------


class Boom(Exception):
    """An error that nobody foresaw."""


class Pair:
    """A server in this process with two clients, played by the test, and their public ports."""

    def __init__(self, serving: rtunnel.Server, log: Log, stack: contextlib.ExitStack) -> None:
        control = control_address(serving)
        self.peers: list[NaivePeer] = []
        self.sessions: list[rtunnel.ServerSession] = []
        self.publics: list[tuple[str, int]] = []
        for count in (1, 2):
            self.peers.append(stack.enter_context(NaivePeer.connect(control)))
            self.peers[-1].send_init(b"0:127.0.0.1:80")
            eventually(lambda count=count: len(log.events("session-opened")) == count)  # type: ignore[misc]
            port = int(log.events("session-opened")[-1]["port"])
            (lease,) = [each for each in leases(serving) if each.address.port == port]
            self.sessions.extend(lease.sessions)
            self.publics.append(("127.0.0.1", port))

    def check_only_the_first_ended(self, log: Log) -> None:
        """The first client's session has ended with one line and a traceback; the second's serves."""
        while True:
            try:
                if not self.peers[0].sock.recv(1 << 16):
                    break
            except ConnectionError:
                break
        eventually(lambda: log.events("session-closed"))
        (closed,) = log.events("session-closed")
        assert closed["reason"] == "internal error"
        eventually(lambda: log.events("internal-error"))
        (record,) = log.events("internal-error")
        assert "Boom" in record["traceback"]
        with connect(self.publics[1]) as visitor:
            self.peers[1].expect(NEW_CONN, 1)
            self.peers[1].send_frame(DATA, 1, b"fine")
            assert read_exactly(visitor, 4) == b"fine"
        (lease,) = log.events("lease-closed")
        assert lease["address"] == text(self.publics[0])


@pytest.fixture
def pair(log: Log) -> Iterator[Pair]:
    serving = rtunnel.Server(rtunnel.Settings(control_listen=LOOPBACK, public_bind="127.0.0.1"), None)
    with contextlib.ExitStack() as stack:
        serving.start()
        stack.callback(stop, serving)
        yield Pair(serving, log, stack)


def test_an_internal_error_of_a_drainer_behind_the_end(pair: Pair, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its session has ended already, a drainer that fails still closes what it was the last to use."""
    waits, leave, ready = threading.Event(), threading.Event(), rtunnel.ready

    def fail(socks: Any, *, writing: bool, seconds: float) -> list[socket.socket]:
        if not writing:
            return ready(socks, writing=writing, seconds=seconds)
        waits.set()
        assert leave.wait(10)
        raise Boom

    monkeypatch.setattr(rtunnel, "ready", fail)
    [peer, _], [session, _] = pair.peers, pair.sessions
    with connect(pair.publics[0]) as visitor:
        peer.expect(NEW_CONN, 1)
        while not waits.is_set():
            peer.send_frame(DATA, 1, bytes(1 << 14))
        session.end("for the test")
        log.wait_for("session-closed")
        leave.set()
        eventually(lambda: not session.stream_count())
        eventually(lambda: not session._server._visitors)
        assert ends_with(visitor) == "reset"
    assert "Boom" in eventually(lambda: log.events("internal-error"))[0]["traceback"]


def test_an_internal_error_of_the_reader(pair: Pair, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw in a session's reader is logged with its traceback and ends that session only."""

    def fail(frame: object) -> None:
        raise Boom

    monkeypatch.setattr(pair.sessions[0], "on_frame", fail)
    pair.peers[0].send_frame(CLOSE_CONN, 1)
    pair.check_only_the_first_ended(log)


def test_an_internal_error_of_the_sender(pair: Pair, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in its control sender."""

    def fail(frames: bytes) -> None:
        raise Boom

    monkeypatch.setattr(pair.sessions[0].transport, "send", fail)
    pair.sessions[0].writer.post(frame(CLOSE_CONN, 1))
    pair.check_only_the_first_ended(log)


def test_an_internal_error_of_the_clock(log: Log) -> None:
    """An action of the clock that fails is logged with its traceback, and what comes behind it is still called."""
    rtunnel.CLOCK.start()
    called = threading.Event()

    def fail() -> None:
        raise Boom

    rtunnel.CLOCK.after(0, fail)
    rtunnel.CLOCK.after(0.01, called.set)
    assert called.wait(10)
    (record,) = log.events("internal-error")
    assert "Boom" in record["traceback"]


def test_the_clock(log: Log) -> None:
    """Actions are called in the order of their times, whoever enters them and when, from no thread that waits; one
    that is cancelled is not, and cancelling one that has been called does nothing."""
    rtunnel.CLOCK.start()
    called: list[int] = []
    done = threading.Event()
    late = rtunnel.CLOCK.after(60, lambda: called.append(60))  # the clock waits for this one at first
    events = [rtunnel.CLOCK.after(number / 100, lambda n=number: called.append(n)) for number in (5, 3, 4, 1)]  # type: ignore[misc]
    rtunnel.CLOCK.cancel(events[2])
    rtunnel.CLOCK.after(0.08, done.set)
    assert done.wait(10)
    for event in [late, *events]:
        rtunnel.CLOCK.cancel(event)
    assert called == [1, 3, 5]


def test_an_internal_error_of_a_pump(pair: Pair, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a stream's pump; its visitor sees a reset."""
    send = rtunnel.Writer.send

    def fail(self: rtunnel.Writer, stream: rtunnel.Stream, frame: bytes | memoryview = b"") -> None:
        if b"boom" in bytes(frame):
            raise Boom
        send(self, stream, frame)

    monkeypatch.setattr(rtunnel.Writer, "send", fail)
    with connect(pair.publics[0]) as visitor:
        visitor.sendall(b"boom")
        assert ends_with(visitor) == "reset"
    pair.check_only_the_first_ended(log)


def test_an_internal_error_of_a_drainer(pair: Pair, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a stream's drainer; its visitor sees a reset."""
    booms, ready = [Boom()], rtunnel.ready  # one: until the session has ended the reader may start another drainer

    def fail(*args: Any, **options: Any) -> list[socket.socket]:
        if booms:
            raise booms.pop()
        return ready(*args, **options)

    with socket.socket() as visitor:
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        visitor.connect(pair.publics[0])
        visitor.settimeout(10)
        pair.peers[0].expect(NEW_CONN, 1)
        monkeypatch.setattr(rtunnel, "ready", fail)
        pair.peers[0].sock.settimeout(0.5)  # who only sends may not notice the end: the window is closed, too
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(16):  # more than any socket buffer takes
                pair.peers[0].send(frame(DATA, 1, bytes(1 << 20)))
        pair.peers[0].sock.settimeout(10)
        assert ends_with(visitor) == "reset"
    pair.check_only_the_first_ended(log)


def test_an_internal_error_of_a_client(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw in a client's session is logged and ends that session: the client connects
    again."""
    monkeypatch.setattr(rtunnel, "FIRST_RETRY_S", 0.01)
    with echo_service() as service, socket.create_server(("127.0.0.1", 0)) as control:
        control.settimeout(5)
        where = rtunnel.Address(*control.getsockname())
        mapping = rtunnel.Mapping(0, rtunnel.Address(*service.address), where)
        asking = rtunnel.Client([mapping], rtunnel.Settings(), None)
        on_frame = rtunnel.ClientSession.on_frame
        failures = [Boom()]

        def fail_once(self: rtunnel.ClientSession, event: rtunnel.Frame) -> None:
            if failures:
                raise failures.pop()
            on_frame(self, event)

        monkeypatch.setattr(rtunnel.ClientSession, "on_frame", fail_once)
        asking.start()
        try:
            for _ in range(2):
                with NaivePeer(control.accept()[0]) as peer:
                    peer.read_frame()
                    peer.send_frame(NEW_CONN, 1)
                    peer.send_frame(DATA, 1, b"hello")
                    with contextlib.suppress(EOFError, ConnectionError):
                        peer.expect_data(1, b"hello")
        finally:
            stop(asking)
    (record,) = log.events("internal-error")
    assert "Boom" in record["traceback"]
