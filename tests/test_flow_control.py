"""Flow control: a stream that nobody reads costs its window and nothing else, and no other stream a moment."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from level1 import (
    Ends,
    Peer,
    PeerServer,
    in_threads,
    mapping,
    pretend_ping,
    queued_bytes,
    receive_window,
    window_and_queue,
)
from support import Address, Program, Service, connect, eventually, read_exactly, running
from tunnels import fill, text

import rtunnel
from rtunnel import MAX_CREDIT_BYTES, MAX_WINDOW_BYTES, WINDOW_BYTES, Budget, FrameType, ReceiveWindow, add_credit

KIB = 1024


# --- the arithmetic alone ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "granted"),
    [(0, 0), (5, 0), (1, MAX_CREDIT_BYTES), (MAX_CREDIT_BYTES, 1), (WINDOW_BYTES, 2**32 - 1)],
)
def test_a_grant_that_is_none_or_too_much(held: int, granted: int) -> None:
    """[W-3]: a WINDOW of 0, and one that takes the credit past 2^31 - 1, is a protocol error."""
    with pytest.raises(rtunnel.ProtocolError, match=str(MAX_CREDIT_BYTES)):
        add_credit(held, granted)


def test_the_largest_credit_is_legal() -> None:
    """[W-3]: a WINDOW may take the credit to exactly 2^31 - 1."""
    assert add_credit(1, MAX_CREDIT_BYTES - 1) == MAX_CREDIT_BYTES


def test_data_beyond_the_credit() -> None:
    """[W-2]: one byte of DATA past the credit is a protocol error."""
    window = ReceiveWindow(WINDOW_BYTES)
    window.receive(WINDOW_BYTES)
    with pytest.raises(rtunnel.ProtocolError, match="credit was 0"):
        window.receive(1)


def test_credit_returns_at_half_a_window() -> None:
    """[W-4]: what has left for the socket is granted again when it is half a window, all at once."""
    window = ReceiveWindow(WINDOW_BYTES)
    window.receive(WINDOW_BYTES)
    assert window.drain(WINDOW_BYTES // 2 - 1) == (0, 0)
    assert window.drain(1) == (WINDOW_BYTES // 2, 0)
    assert window.credit == WINDOW_BYTES // 2


def test_a_window_grows_to_its_double_and_no_further_than_16_mib() -> None:
    """[W-6]: each growth doubles the window, up to 16 MiB, and grants it at once with all that was owed."""
    window = ReceiveWindow(WINDOW_BYTES)
    window.receive(WINDOW_BYTES)
    window.drain(1000)
    assert window.grow(window.growth()) == WINDOW_BYTES + 1000
    sizes = [window.size]
    while count := window.growth():
        window.grow(count)
        sizes.append(window.size)
    assert sizes == [2**n * WINDOW_BYTES for n in range(1, 9)]
    assert sizes[-1] == MAX_WINDOW_BYTES == 16 * 1024 * KIB


def test_a_growth_that_is_taken_back_is_a_debt() -> None:
    """[W-7]: after the growth is taken back nothing is granted until what leaves has paid for it, and nothing
    grows."""
    window = ReceiveWindow(WINDOW_BYTES)
    window.grow(3 * WINDOW_BYTES)
    window.receive(4 * WINDOW_BYTES)
    window.shrink()
    assert (window.size, window.debt, window.growth()) == (WINDOW_BYTES, 3 * WINDOW_BYTES, 0)
    assert window.drain(WINDOW_BYTES) == (0, WINDOW_BYTES)
    assert window.drain(2 * WINDOW_BYTES + 10) == (0, 2 * WINDOW_BYTES)
    assert (window.grown, window.owed) == (0, 10)
    assert window.drain(WINDOW_BYTES - 10) == (WINDOW_BYTES, 0)
    assert window.growth() == WINDOW_BYTES


STEPS = st.lists(st.tuples(st.sampled_from(["receive", "drain", "grow", "shrink"]), st.integers(0, 2**22)), max_size=60)


@given(steps=STEPS)
@settings(max_examples=300, deadline=None)
def test_the_invariant_of_a_window(steps: list[tuple[str, int]]) -> None:
    """[W-4]: bytes queued + credit + owed == size + debt, after any steps; the sender holds exactly the receiver's
    credit, what is queued never exceeds size + debt, and the growth that it costs the budget is paid back to the
    byte."""
    receiver, credit, queued, growth = ReceiveWindow(WINDOW_BYTES), WINDOW_BYTES, 0, 0
    for step, amount in steps:
        granted = 0
        if step == "receive":
            count = min(amount, receiver.credit)
            credit -= count
            receiver.receive(count)
            queued += count
        elif step == "drain":
            count = min(amount, queued)
            queued -= count
            granted, paid = receiver.drain(count)
            growth -= paid
        elif step == "grow":
            count = min(amount, receiver.growth())
            if count:
                granted = receiver.grow(count)
                growth += count
        else:
            receiver.shrink()
        if granted:
            credit = add_credit(credit, granted)
        assert queued + receiver.credit + receiver.owed == receiver.size + receiver.debt
        assert credit == receiver.credit >= 0
        assert queued <= receiver.size + receiver.debt
        assert receiver.grown == growth >= 0
        assert WINDOW_BYTES <= receiver.size <= MAX_WINDOW_BYTES
        assert receiver.owed >= 0 <= receiver.debt


@given(steps=STEPS)
@settings(max_examples=100, deadline=None)
def test_a_sender_is_never_left_without_credit_for_ever(steps: list[tuple[str, int]]) -> None:
    """[W-4]: whatever has happened, when all that is queued has left the sender holds over half a window."""
    window, queued = ReceiveWindow(WINDOW_BYTES), 0
    for step, amount in steps:
        if step == "receive":
            count = min(amount, window.credit)
            window.receive(count)
            queued += count
        elif step == "grow":
            window.grow(min(amount, window.growth()))
        elif step == "shrink":
            window.shrink()
        else:
            count = min(amount, queued)
            window.drain(count)
            queued -= count
    window.drain(queued)
    assert 2 * window.credit > window.size


def test_a_budget_gives_no_more_than_it_has() -> None:
    """[W-8]: of a budget each window gets a quarter of what is left, with what it has already, and at most what is
    asked; what comes back can be had again."""
    budget = Budget(100)
    assert [budget.take(60, 0), budget.take(60, 0), budget.take(1, 0)] == [25, 18, 1]
    assert budget.left == 56
    assert budget.take(60, 18) == 0  # (56 + 18) / 4: it has its share
    budget.give(40)
    assert budget.take(60, 18) == 10


def test_idle_streams_do_not_keep_the_budget() -> None:
    """[W-8]: of 64 MiB five windows that grow as far as they can, and keep it, get 16, 12, 9, 7 and 5 MiB; a sixth
    still gets 4, and a tenth more than 1."""
    budget, grown = Budget(rtunnel.SESSION_BUDGET_BYTES), []
    for _ in range(10):
        window = ReceiveWindow(WINDOW_BYTES)
        while count := budget.take(window.growth(), window.grown):
            window.grow(count)
        grown.append(window.grown)
    assert [round(count / (1 << 20)) for count in grown[:6]] == [16, 12, 9, 7, 5, 4]
    assert min(grown) > 1 << 20
    assert sum(grown) + budget.left == rtunnel.SESSION_BUDGET_BYTES


@given(amounts=st.lists(st.integers(0, 50), min_size=8, max_size=8))
@settings(max_examples=20, deadline=None)
def test_a_budget_that_many_threads_draw_on(amounts: list[int]) -> None:
    """However many draw at once, they never hold more than the budget, and all of it is there in the end."""
    budget = Budget(100)
    taken = [0] * len(amounts)

    def draw(at: int) -> None:
        taken[at] = budget.take(amounts[at], 0)

    in_threads([lambda at=at: draw(at) for at in range(len(amounts))])  # type: ignore[misc]
    assert sum(taken) + budget.left == 100
    assert all(count <= min(amount, 25) for count, amount in zip(taken, amounts, strict=True))
    in_threads([lambda count=count: budget.give(count) for count in taken])  # type: ignore[misc]
    assert budget.left == 100


# --- one stream, frame by frame, both roles ------------------------------------------------------------------------


class Rig:
    """A real end in this process, the peer that the test plays, and the socket at the far side of stream 1.

    The sockets between the tunnel and `app` are as small as the system allows, so that what waits, waits in the queue.
    """

    def __init__(self, ends: Ends, peer: Peer, app: socket.socket, session: rtunnel.Session) -> None:
        self.ends = ends
        self.peer = peer
        self.app = app
        self.session = session

    @property
    def stream(self) -> rtunnel.Stream:
        return next(stream for stream in self.session.streams() if stream.number == 1)

    @property
    def window(self) -> ReceiveWindow:
        return receive_window(self.stream)

    def budget_left(self) -> int:
        return self.session.budget.left

    def grow(self, size: int) -> None:
        """Say BLOCKED on an empty queue until the window has this size; all credit is held by the peer then."""
        while (before := self.window.size) < size:
            count = self.peer.credit[1]
            self.peer.send_data(1, bytes(count))
            read_exactly(self.app, count)
            self.peer.send_frame(FrameType.BLOCKED, 1)
            eventually(lambda before=before: self.window.size > before)  # type: ignore[misc]
            while self.peer.credit[1] < self.window.credit:
                self.peer.hear(FrameType.WINDOW)


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ends in this process, stopped after the test."""
    with Ends() as made:
        yield made


@pytest.fixture
def small_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tunnel's stream sockets hold as little as the system allows."""
    tune = rtunnel.tune

    def small(sock: socket.socket, **control: int) -> None:
        tune(sock, **control)
        if not control:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    monkeypatch.setattr(rtunnel, "tune", small)


def small_listener() -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.settimeout(10)
    return listener


def small_visitor(address: Address) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.settimeout(10)
    sock.connect(address)
    return sock


@pytest.fixture(params=["server", "client"])
def rig(
    request: pytest.FixtureRequest, ends: Ends, small_sockets: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Rig]:
    """A server or a client with one stream."""
    monkeypatch.setattr(rtunnel, "STALL_S", 0.2)
    with contextlib.ExitStack() as stack:
        if request.param == "server":
            peer = stack.enter_context(Peer.as_client(ends.open_server()))
            app = stack.enter_context(small_visitor(peer.public))
            peer.hear(FrameType.NEW_CONN)
            [session] = ends.sessions()
            yield Rig(ends, peer, app, session)
        else:
            server = stack.enter_context(PeerServer())
            listener = stack.enter_context(small_listener())
            ends.open_client(server.address, mapping(listener.getsockname()))
            peer = server.accept()
            peer.send_frame(FrameType.NEW_CONN, 1, b"203.0.113.7:51234")
            peer.credit[1] = WINDOW_BYTES
            app, _ = listener.accept()
            stack.enter_context(app)
            app.settimeout(10)
            yield Rig(ends, peer, app, ends.client_sessions()[0])


def test_a_sender_stops_at_exactly_its_credit(rig: Rig) -> None:
    """[W-2], [W-5]: an end with no credit left sends not one byte more, says BLOCKED, and goes on by exactly what is
    granted."""

    def pour() -> None:
        with contextlib.suppress(OSError):
            while True:
                rig.app.sendall(bytes(100_000))

    with running(pour, lambda: rig.peer.sock.shutdown(socket.SHUT_RDWR)):
        received, credit = 0, WINDOW_BYTES
        for granted in (1, 1000, 300_000, 0):
            blocked = False
            while not blocked or received < credit:
                kind, _, payload = rig.peer.hear(FrameType.DATA, FrameType.BLOCKED)
                assert kind == FrameType.DATA or not blocked, "BLOCKED comes once"
                blocked = blocked or kind == FrameType.BLOCKED
                received += len(payload)
            assert received == credit
            if granted:
                rig.peer.send_frame(FrameType.WINDOW, 1, granted.to_bytes(4, "big"))
                credit += granted


def test_one_byte_beyond_the_credit_ends_the_session(rig: Rig) -> None:
    """[W-2]: DATA past the credit is a protocol error, with what the socket has not taken still queued."""
    while rig.window.credit or rig.peer.credit[1]:
        rig.peer.send_data(1, bytes(rig.peer.credit[1]))
        rig.peer.take()
    rig.peer.send_frame(FrameType.DATA, 1, b"x")
    rig.ends.log.wait_for("session-closed", level=1, reason="1 bytes of DATA, the credit was 0")


def test_blocked_on_an_empty_queue_doubles_the_window(rig: Rig) -> None:
    """[W-6], [W-8]: BLOCKED that finds nothing queued doubles the window, and a WINDOW comes back at once; the budget
    pays."""
    before = rig.budget_left()
    rig.grow(16 * WINDOW_BYTES)
    assert rig.budget_left() == before - 15 * WINDOW_BYTES
    assert rig.window.credit + rig.window.owed == 16 * WINDOW_BYTES


@pytest.mark.parametrize(
    ("rtt_s", "limit"),
    [(None, 16 * KIB * KIB), (0.0, KIB * KIB), (0.001, KIB * KIB), (0.004, 4_000_000), (0.1, 16 * KIB * KIB)],
)
def test_the_limit_of_a_window(rtt_s: float | None, limit: int) -> None:
    """[W-6]: a window grows to what 1 GB/s brings in a round trip, to 1 MiB at least, to 16 MiB at most."""
    window = ReceiveWindow(WINDOW_BYTES)
    while count := window.growth(rtt_s):
        window.grow(count)
    assert window.size == limit


def test_a_near_peers_window(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """[W-6]: the shortest round trip of its session so far limits a stream's window."""
    asked: list[float | None] = []

    def growth(window: ReceiveWindow, rtt_s: float | None) -> int:
        asked.append(rtt_s)
        return min(window.size, max(0, 200_000 - window.size))

    monkeypatch.setattr(ReceiveWindow, "growth", growth)
    rig.grow(200_000)
    rig.peer.send_frame(FrameType.BLOCKED, 1)
    rig.peer.send_frame(FrameType.PING, 0, b"no more?")
    assert rig.peer.hear(FrameType.PONG, FrameType.WINDOW)[0] == FrameType.PONG
    measured = [rtt_s for rtt_s in asked if rtt_s is not None]
    for rtt_s in (0.3, 0.1, 0.2):
        before = rig.session.rtt_s
        pretend_ping(rig.session, b"distance", rtt_s)
        rig.peer.send_frame(FrameType.PONG, 0, b"distance")
        eventually(lambda before=before: rig.session.rtt_s != before)  # type: ignore[misc]
        measured.append(rig.session.rtt_s)
    assert rig.session.shortest_rtt_s == min(measured)
    rig.peer.send_frame(FrameType.BLOCKED, 1)
    eventually(lambda: asked[-1] == min(measured))


def test_blocked_on_a_queue_is_ignored(rig: Rig) -> None:
    """[W-6]: BLOCKED while bytes are queued says that the socket is the brake: nothing grows."""
    rig.peer.send_data(1, bytes(WINDOW_BYTES))
    eventually(lambda: queued_bytes(rig.stream))
    for _ in range(10):
        rig.peer.send_frame(FrameType.BLOCKED, 1)
    rig.peer.send_frame(FrameType.PING, 0, b"are done")
    while rig.peer.hear(FrameType.PONG, FrameType.WINDOW)[0] != FrameType.PONG:
        pass
    assert rig.window.size == WINDOW_BYTES


def test_blocked_brings_back_what_is_owed(ends: Ends) -> None:
    """[W-6]: BLOCKED on an empty queue returns the credit that is owed, less than half a window as it may be, also
    where nothing can grow: who sends in bursts would reach half its speed with the other half of its window."""
    with Peer.as_client(ends.open_server(session_budget=0)) as peer, connect(peer.public) as visitor:
        peer.hear(FrameType.NEW_CONN)
        peer.send_data(1, bytes(20_000))
        read_exactly(visitor, 20_000)
        for answer in (20_000, None):
            peer.send_frame(FrameType.BLOCKED, 1)
            if answer:
                assert peer.hear(FrameType.WINDOW) == (FrameType.WINDOW, 1, answer.to_bytes(4, "big"))
        peer.send_frame(FrameType.PING, 0, b"no more?")
        assert peer.hear()[0] == FrameType.PONG, "with nothing owed there is no WINDOW"
        [session] = ends.sessions()
        assert receive_window(session.streams()[0]).size == WINDOW_BYTES


def test_a_stalled_stream_gives_its_growth_back(rig: Rig) -> None:
    """[W-7]: a queue that has not moved for STALL_S takes its window back to 64 KiB; nothing is granted until the
    debt is paid; then the stream goes on with 64 KiB, the budget is whole again, and no byte is lost."""
    whole = rig.budget_left()
    rig.grow(16 * WINDOW_BYTES)
    size = rig.window.size
    sent = bytes(range(256)) * (size // 256)
    rig.peer.send_data(1, sent[: rig.peer.credit[1]])
    eventually(lambda: rig.window.size == WINDOW_BYTES, what="the window is 64 KiB again")
    assert rig.window.debt >= size - WINDOW_BYTES - rig.window.owed
    assert rig.window.grown > 0, "the budget is not given back before the debt is paid"
    assert rig.peer.credit[1] == 0

    received = bytearray()
    with running(lambda: received.extend(read_exactly(rig.app, size))):
        while rig.peer.credit[1] <= WINDOW_BYTES // 2:
            rig.peer.hear(FrameType.WINDOW)
            assert rig.window.debt == 0, "granted before the debt was paid"
    assert received == sent
    assert WINDOW_BYTES // 2 < rig.peer.credit[1] <= WINDOW_BYTES
    assert (rig.window.size, rig.window.grown, rig.budget_left()) == (WINDOW_BYTES, 0, whole)
    rig.grow(2 * WINDOW_BYTES)  # and may grow again


def test_a_stream_that_ends_gives_its_growth_back(rig: Rig) -> None:
    """[W-7]: the end of a stream gives back all that its window has grown by, also in debt."""
    whole = rig.budget_left()
    rig.grow(4 * WINDOW_BYTES)
    rig.peer.send_data(1, bytes(rig.peer.credit[1]))
    eventually(lambda: rig.window.debt)
    rig.peer.send_frame(FrameType.CLOSE_CONN, 1, b"reset")
    eventually(lambda: rig.budget_left() == whole)


def test_a_budget_that_many_streams_share(ends: Ends, small_sockets: None) -> None:
    """[W-4], [W-8]: a session queues at most streams x 64 KiB + budget, whatever its peer sends and its visitors do
    not read; none has more than a quarter of the budget."""
    streams, budget = 20, 1024 * KIB
    bound = streams * WINDOW_BYTES + budget
    with contextlib.ExitStack() as stack:
        peer = stack.enter_context(Peer.as_client(ends.open_server(session_budget=budget)))
        [session] = ends.sessions()
        for _ in range(streams):
            stack.enter_context(small_visitor(peer.public))
            peer.hear(FrameType.NEW_CONN)
        for _ in range(4):  # 15 x 64 KiB for each would be 19 MB
            for number in range(1, streams + 1):
                peer.send_frame(FrameType.BLOCKED, number)
        peer.send_frame(FrameType.PING, 0, b"that was")
        while peer.hear(FrameType.WINDOW, FrameType.PONG)[0] != FrameType.PONG:
            pass
        peer.take()
        windows = [receive_window(stream) for stream in session.streams()]
        assert sum(window.size for window in windows) == bound - session.budget.left
        assert session.budget.left < budget / 4
        assert max(window.grown for window in windows) <= budget / 4

        while any(window.credit for window in windows):
            assert sum(map(queued_bytes, session.streams())) <= bound
            for number, credit in peer.credit.items():
                if credit:
                    peer.send_data(number, bytes(credit))
            peer.take()
        for stream in session.streams():
            there, allowed = window_and_queue(stream)
            assert there == allowed
        assert 0 < sum(map(queued_bytes, session.streams())) <= bound


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory as Linux tells it")
@pytest.mark.parametrize(("streams", "budget_mib"), [(4, 64), (12, 32)])
def test_the_memory_of_stalled_streams(server: Factory, streams: int, budget_mib: int) -> None:
    """[W-4], [W-8]: what a server's memory grows by when a client fills all windows of many streams, and fills them
    again as their visitors read a little, stays within the formula: streams x 64 KiB + budget, 25 kB for each stream,
    1.5 MiB for the client."""
    near = {"NEAR_WINDOW_BYTES": MAX_WINDOW_BYTES}  # this client is near, and may have windows as one far away
    serving = server("--session-budget", str(budget_mib), "--log-level", "info", limits=near)
    with Peer.as_client(serving.control_address) as peer, contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(small_visitor(peer.public)) for _ in range(streams)]
        for _ in visitors:
            peer.hear(FrameType.NEW_CONN)
        base = serving.memory_bytes()
        for number in range(1, streams + 1):
            grown = -1
            while grown != peer.credit[number]:
                grown = peer.credit[number]
                peer.send_frame(FrameType.BLOCKED, number)
                for _ in range(2):  # the first answer may stand ahead of the WINDOW, in one batch with it
                    peer.send_frame(FrameType.PING, 0, b"that was")
                    while peer.hear()[0] != FrameType.PONG:
                        pass
        allowed = sum(peer.credit.values())
        assert allowed > 0.6 * (budget_mib << 20)

        def fill() -> None:
            for number in range(1, streams + 1):
                peer.send_data(number, bytes(peer.credit[number]))
            peer.take()

        def filled() -> int:
            """What is queued without credit left; 0 while the kernel takes megabytes, for which credit comes back."""
            peer.take()
            while any(peer.credit.values()):
                fill()
                peer.send_frame(FrameType.PING, 0, b"that was")  # all before it has been queued
                while peer.hear()[0] != FrameType.PONG:
                    pass
            told = len(serving.events("state-stream"))
            serving.send_signal(signal.SIGUSR1)
            serving.wait_for_count(told + streams, "state-stream")
            count = sum(int(each["queued"]) for each in serving.events("state-stream")[told:])
            return count if count > 0.6 * allowed else 0

        queued = eventually(filled)
        most = serving.memory_bytes() - base
        for step in range(80):
            taken = visitors[step % streams]
            read_exactly(taken, 1 << 19)
            fill()
            most = max(most, serving.memory_bytes() - base)
        formula = allowed + streams * 25_000 + (3 << 19)  # all windows: a little less than 64 KiB each and the budget
        print(f"queued {queued / (1 << 20):.1f} MiB, grown {most / (1 << 20):.1f}, formula {formula / (1 << 20):.1f}")
        assert queued < most <= formula


# --- others beside it, through whole tunnels --------------------------------------------------------------------


def echo_or_pour(sock: socket.socket) -> None:
    """A service that echoes; to a connection that begins with `pour` it sends without end, from `hang` it reads
    nothing more."""
    first = sock.recv(4)
    if first == b"pour":
        while True:
            sock.sendall(bytes(1 << 18))
    if first == b"hang":
        end = select.poll()
        end.register(sock, 0)
        end.poll()  # until it is reset, or shut down by the service's own end
        return
    while first:
        sock.sendall(first)
        first = sock.recv(1 << 16)


def echo_times_s(address: Address, count: int = 100) -> list[float]:
    """So many round trips of 64 bytes, one after the other on one connection."""
    times = []
    with connect(address) as visitor:
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for number in range(count):
            word = b"%063d" % number + b"\n"
            begun = time.monotonic()
            visitor.sendall(word)
            assert read_exactly(visitor, 64) == word
            times.append(time.monotonic() - begun)
    return times


def rests(end: Program) -> bool:
    """It has used no processor time for a tenth of a second."""
    before = end.cpu_seconds()
    time.sleep(0.1)
    return end.cpu_seconds() == before


Factory = Callable[..., Program]


@pytest.mark.parametrize("stalled", [1, 100])
@pytest.mark.parametrize("asked", [b"pour", b"hang"])
def test_defect_11_visitors_that_never_read(
    server: Factory, client: Factory, capsys: pytest.CaptureFixture[str], stalled: int, asked: bytes
) -> None:
    """Beside visitors that never read, and beside local services that hang, others are served as without them, and
    the memory of both ends stays within streams x 64 KiB + budget."""
    budget_mib, bound = 8, stalled * WINDOW_BYTES + (8 << 20)
    with Service(echo_or_pour) as service, contextlib.ExitStack() as stack:
        serving = server("--session-budget", str(budget_mib), limits={"STALL_S": 0.5})
        asking = client(
            *("--server", text(serving.control_address), "--local", service.text, "--session-budget", str(budget_mib)),
            limits={"STALL_S": 0.5},
        )  # fmt: skip
        public = serving.lease_address()
        alone = echo_times_s(public)
        before = serving.memory_bytes(), asking.memory_bytes()
        for _ in range(stalled):
            visitor = stack.enter_context(connect(public))
            visitor.sendall(asked)
            if asked == b"hang":
                visitor.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while visitor.send(bytes(1 << 20)):
                        pass
        eventually(lambda: rests(serving) and rests(asking), what="nothing moves any more")
        beside = echo_times_s(public)
        grown = [end.memory_bytes() - first for end, first in zip((serving, asking), before, strict=True)]
        ratio = statistics.median(beside) / statistics.median(alone)
        with capsys.disabled():
            print(
                f"\n  echo beside {stalled:3} x {asked.decode()}: median {1000 * statistics.median(beside):.3f} ms, "
                f"ratio {ratio:.2f}; memory +{grown[0] >> 20} / +{grown[1] >> 20} MiB, bound {bound >> 20} MiB",
            )
        # Beside what is queued each stream costs two threads and their buffers.
        assert max(grown) < bound + stalled * 512 * KIB + (16 << 20)
        assert not asking.events("session-closed")


def test_defect_11_a_dial_that_hangs(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[S-3]: while the client dials a local service that does not answer, its other streams go on."""
    monkeypatch.setattr(rtunnel, "DIAL_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        public = ends.open_tunnel(listener.getsockname())
        visitor = stack.enter_context(connect(public))
        local = stack.enter_context(listener.accept()[0])
        for sock in fill(listener.getsockname()):
            stack.enter_context(sock)
        waiting = [stack.enter_context(connect(public)) for _ in range(10)]
        ends.log.wait_for("stream-opened", 22)
        for number in range(100):
            visitor.sendall(b"%04d" % number)
            assert read_exactly(local, 4) == b"%04d" % number
        assert not ends.log.events("dial-failed"), "they still dial"
        for sock in waiting:
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
