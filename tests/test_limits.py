"""The budget for strangers and the other limits (SECURITY.md)."""

from __future__ import annotations

import contextlib
import errno
import gc
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from level1 import (
    Ends,
    Log,
    Peer,
    PeerServer,
    Unwelcome,
    connect_small,
    ended_by,
    init,
    is_in_a_send,
    knows_no_instance,
    leases,
    mapping,
    new_instance,
    small_control_sockets,
    writer_in_use,
)
from relay import Relay
from support import Address, Program, Service, connect, counted, echo_service, ends_with, eventually, read_exactly
from tls_peers import Forger, House, raw_context
from tunnels import Factory, open_tunnel, text, visit

import rtunnel
import rtunnel_tls


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ends in this process, stopped after the test."""
    with Ends() as made:
        yield made


def stranger(server: Address, source: str = "127.0.0.1") -> socket.socket:
    """A connection to the control port that says nothing."""
    return socket.create_connection(server, 10.0, (source, 0))


def is_open(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def is_served(public: Address) -> bool:
    """Whether a visitor is answered, within 2 s."""
    with contextlib.suppress(OSError, EOFError), connect(public, 2.0) as visitor:
        visitor.sendall(b"polo")
        return read_exactly(visitor, 4) == b"polo"
    return False


def served(public: Address) -> socket.socket:
    """A visitor that has been answered, and stays."""
    visitor = connect(public)
    visitor.sendall(b"marco")
    assert read_exactly(visitor, 5) == b"marco"
    return visitor


def count_open(socks: list[socket.socket]) -> int:
    return sum(is_open(sock) for sock in socks)


# --- strangers ----------------------------------------------------------------------------------------------


def test_one_site_cannot_drive_out_others(server: Factory) -> None:
    """256 connections may be no client yet, here 16; the next one makes the oldest go of the site that has most.
    Others stay, however old."""
    assert rtunnel.MAX_STRANGERS == 256
    serving = server(limits={"MAX_STRANGERS": 16})
    with contextlib.ExitStack() as stack:
        others = [stack.enter_context(stranger(serving.control_address, f"127.0.0.{n}")) for n in (2, 2, 3)]
        # Those that come in the same moment are taken in by several threads, in any order.
        socks = [stack.enter_context(stranger(serving.control_address)) for _ in range(13)]
        eventually(lambda: serving.state()["strangers"] == "16/16")
        for _ in range(7):
            socks.append(stack.enter_context(stranger(serving.control_address)))
            eventually(lambda: count_open(socks) == 13)
        assert count_open(socks) == 13
        assert all(is_open(sock) for sock in socks[13:])
        assert count_open(others) == 3
        told = serving.wait_for("refused")
        assert "no clients yet" in told["reason"]
        Peer.as_client(serving.control_address).sock.close()  # who speaks gets in beside them


def test_many_sites_share_the_places(server: Factory) -> None:
    """Whichever site the next one is of, the oldest of the largest site goes: in the end all have as many."""
    serving = server(limits={"MAX_STRANGERS": 64})
    with contextlib.ExitStack() as stack:
        socks = []
        for number in range(160):
            source = f"127.0.1.{number // 20 + 1}"
            socks.append(stack.enter_context(stranger(serving.control_address, source)))
            eventually(lambda: count_open(socks) == min(len(socks), 64))
        sites = [socks[at : at + 20] for at in range(0, 160, 20)]
        assert [count_open(site) for site in sites] == [8] * 8
        # The first 64 come in one moment, and are taken in by several threads, in any order.
        for site in sites[4:]:
            assert [is_open(sock) for sock in site] == [False] * 12 + [True] * 8
        assert serving.threads() < 64 * 2 + 20


@pytest.mark.parametrize(
    ("address", "site"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_sites(address: str, site: str) -> None:
    """Of IPv6 a whole /64 counts as one: whoever has one address there has them all."""
    assert rtunnel.Address(address, 1).site == site


@pytest.mark.parametrize("tls", [False, True])
def test_the_silent_do_not_lock_others_out(server: Factory, client: Factory, house: House, tls: bool) -> None:
    """With all places taken by the silent of five addresses a client connects at once; in TLS they are in the
    middle of their handshake."""
    flags = {role: house.flags(role) if tls else () for role in ("server", "client")}
    serving = server(*flags["server"], limits={"MAX_STRANGERS": 64})
    with contextlib.ExitStack() as stack:
        for number in range(80):
            stack.enter_context(stranger(serving.control_address, f"127.0.1.{number % 5 + 1}"))
        started = time.monotonic()
        asking = client(*flags["client"], "--server", text(serving.control_address), "--local=127.0.0.1:1")
        asking.wait_for("session-opened")
        assert time.monotonic() - started < 5.0


def test_one_deadline_for_all(server: Factory, house: House) -> None:
    """From accept to INIT there is one deadline, for TLS and INIT together; a byte now and then does not move it."""
    serving = server(*house.flags("server"), limits={"HELLO_TIMEOUT_S": 1.0})
    with connect(serving.control_address) as slow:
        started = time.monotonic()
        with contextlib.suppress(OSError):
            for byte in b"\x16\x03\x01\x02\x00" + bytes(100):
                slow.send(bytes([byte]))
                if not is_open(slow):
                    break
                time.sleep(0.05)
        assert 0.5 < time.monotonic() - started < 2.5
    assert serving.wait_for("refused")["reason"].startswith("deadline")


def test_lines_about_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one event a few lines a second are written; those beyond are counted, and the count is told when the second
    is over, though no more come. Other events have their own few. Then it begins anew."""
    assert (rtunnel.LOG_EVERY_S, rtunnel.LOG_BURST) == (1.0, 2)
    monkeypatch.setattr(rtunnel, "LOG_EVERY_S", 0.2)
    log_limit = rtunnel.LimitLog()
    rtunnel.CLOCK.start()
    with Log() as log, monkeypatch.context() as patch:
        patch.setattr(rtunnel, "LOG_BURST", 10)
        for number in range(25):
            log_limit("full", number=number)
        for number in range(10):
            log_limit("other", number=number)
        assert log.wait_for("full", 11) == {"more_like_it": "15"}
        for number in range(25, 28):
            log_limit("full", number=number)
        for number in range(12):
            log_limit("last", number=number)
        assert log.wait_for("last", 11) == {"more_like_it": "2"}
    numbers = [line.get("number") for line in log.events("full")]
    assert numbers == [*map(str, range(10)), None, "25", "26", "27"]
    assert [line["number"] for line in log.events("other")] == [*map(str, range(10))]


# --- clients, leases, streams -------------------------------------------------------------------------------


def codes(server: Address, count: int, port: int = 0) -> tuple[list[Peer], list[str]]:
    """Up to `count` clients, and the codes of those that were refused."""
    peers, refused = [], []
    for _ in range(count):
        try:
            peers.append(Peer.as_client(server, port))
        except Unwelcome as unwelcome:
            refused.append(str(unwelcome.args[0]))
    return peers, refused


GLOBAL_PORT = ("--public-listen", "127.0.0.1:0")


@pytest.mark.parametrize(
    ("limit", "public"), [("MAX_CLIENTS", ()), ("MAX_CLIENTS", GLOBAL_PORT), ("MAX_LEASES", ())]
)  # fmt: skip
def test_clients_and_leases(server: Factory, limit: str, public: tuple[str, ...]) -> None:
    """So many clients there may be, and so many leases of one identity; the next is told to try again later, and a
    place is free when one has left."""
    serving = server(*public, limits={limit: 3, "LEASE_LINGER_S": 0.1})
    peers, refused = codes(serving.control_address, 5)
    assert refused == ["too-many-clients"] * 2
    peers.pop().sock.close()
    serving.wait_for("session-closed")

    def again() -> list[Peer]:
        return codes(serving.control_address, 1)[0]

    peers += eventually(again)
    for peer in peers:
        peer.sock.close()


@pytest.mark.parametrize("flags", [(), ("--public-listen=127.0.0.1:0",)], ids=["own", "global"])
def test_a_client_that_comes_back_needs_no_place(server: Factory, flags: tuple[str, ...]) -> None:
    """Who replaces a session of its own is no further client and no further lease."""
    serving = server(*flags, limits={"MAX_CLIENTS": 1, "MAX_LEASES": 1})
    with contextlib.ExitStack() as stack:
        for _ in range(3):
            peer = Peer.as_client(serving.control_address, instance="ab" * 16)
            stack.enter_context(peer.sock)
            serving.wait_for("session-opened")
        assert len(serving.events("lease-opened")) == (not flags)


def test_streams_of_the_server(server: Factory, client: Factory) -> None:
    """So many visitors the server serves; the next one is reset, those that are there stay, and places come back."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        serving = server(limits={"MAX_STREAMS": 3})
        client("--server", text(serving.control_address), "--local", service.text)
        public = serving.lease_address()
        visitors = [stack.enter_context(served(public)) for _ in range(3)]
        for _ in range(3):
            assert visit(public) == "reset"
        assert "too many" in serving.wait_for("visitor-refused")["reason"]
        visitors.pop().close()
        eventually(lambda: is_served(public))


def test_streams_of_a_session(server: Factory, client: Factory) -> None:
    """One client has so many visitors; the next one is reset, and finds a place when one has left. Another client has
    room."""
    with echo_service() as service, echo_service() as other, contextlib.ExitStack() as stack:
        serving = server(limits={"MAX_SESSION_STREAMS": 2})
        mappings = (f"--forward=0:{service.text}", f"--forward=0:{other.text}")
        client("--server", text(serving.control_address), *mappings)
        full = serving.lease_address()
        visitor, _ = [stack.enter_context(served(full)) for _ in range(2)]
        assert visit(full) == "reset"
        assert "none takes more" in serving.wait_for("visitor-refused")["reason"]
        assert is_served(serving.lease_address())
        visitor.close()
        eventually(lambda: is_served(full))


def test_streams_of_the_client(server: Factory, client: Factory) -> None:
    """A client does not open more streams than that, whatever its server asks for: they are reset."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        serving = server()
        asking = client(
            "--server", text(serving.control_address), "--local", service.text, limits={"MAX_STREAMS": 2}
        )  # fmt: skip
        public = serving.lease_address()
        for _ in range(2):
            stack.enter_context(served(public))
        assert visit(public) == "reset"
        assert "2 streams are open" in asking.wait_for("stream-refused")["reason"]


# --- descriptors and threads --------------------------------------------------------------------------------


@pytest.fixture
def limited(program: Factory) -> Callable[..., Program]:
    """Starts a program that may have 64 descriptors."""
    if not hasattr(pytest.importorskip("resource"), "prlimit"):
        pytest.skip("this system has no prlimit")

    def start(*arguments: str) -> Program:
        import resource

        started = program(*arguments)
        resource.prlimit(started.pid, resource.RLIMIT_NOFILE, (64, 64))
        return started

    return start


def test_out_of_descriptors(limited: Callable[..., Program], client: Factory) -> None:
    """A server that is out of descriptors stops accepting, serves on without spinning, and recovers."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        serving = limited("server", "--control-listen", "127.0.0.1:0", "--public-bind", "127.0.0.1")
        client("--server", text(serving.control_address), "--local", service.text)
        public = serving.lease_address()
        first = stack.enter_context(connect(public))
        first.sendall(b"marco")
        assert read_exactly(first, 5) == b"marco"
        began = time.monotonic()
        others = [stack.enter_context(connect(public)) for _ in range(100)]
        assert serving.wait_for("accept-failed")["reason"] == "Too many open files"
        cpu, started = serving.cpu_seconds(), time.monotonic()
        for _ in range(10):
            first.sendall(b"still")
            assert read_exactly(first, 5) == b"still"
            time.sleep(0.05)
        assert serving.cpu_seconds() - cpu < 0.5 * (time.monotonic() - started)
        assert len(serving.events("accept-failed")) <= 1 + (time.monotonic() - began) / rtunnel.ACCEPT_PAUSE_S
        for each in others:
            each.close()
        eventually(lambda: is_served(public))


def test_a_client_without_descriptors(limited: Callable[..., Program], server: Factory) -> None:
    """A client that is out of descriptors resets the visitors that it cannot serve, serves on, and recovers."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        serving = server()
        asking = limited("client", "--server", text(serving.control_address), "--local", service.text)
        public = serving.lease_address()
        first = stack.enter_context(connect(public))
        others = [stack.enter_context(connect(public)) for _ in range(80)]
        asking.wait_for("dial-failed")
        first.sendall(b"marco")
        assert read_exactly(first, 5) == b"marco"
        for each in others:
            each.close()
        eventually(lambda: is_served(public))


def test_out_of_threads() -> None:
    """A listener that can start no thread closes the connection, waits before it takes another, and recovers."""

    class Poor(rtunnel.Pool):
        rich = True

        def run(self, task: rtunnel.Task) -> None:
            if not self.rich:
                raise rtunnel.NoThread("can't start new thread")
            super().run(task)

    pool = Poor()
    rtunnel.CLOCK.start()
    with Log() as log:
        loopback = rtunnel.Address("127.0.0.1", 0)
        listener = rtunnel.Listener(loopback, pool, lambda sock, peer: sock.sendall(b"hello"))
        pool.rich, started = False, time.monotonic()
        for _ in range(3):
            with connect(listener.address) as sock:
                assert ends_with(sock) in ("eof", "reset")
        assert time.monotonic() - started >= 2 * rtunnel.ACCEPT_PAUSE_S - 0.05
        eventually(lambda: counted(log.events("connection-dropped")) == 3)
        pool.rich = True
        with connect(listener.address) as sock:
            assert read_exactly(sock, 5) == b"hello"
        listener.stop()
    pool.close()


def test_visitors_for_whom_there_is_no_thread(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A visitor for whom the server has no thread is reset, which is no clean end; those that are there go on, and the
    next one is served when there are threads again."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        public = ends.open_tunnel(service)
        first = stack.enter_context(served(public))
        with monkeypatch.context() as patch:
            patch.setattr(ends.server.pool, "run", no_thread)
            assert [visit(public, b"x") for _ in range(3)] == ["reset"] * 3
            first.sendall(b"still")
            assert read_exactly(first, 5) == b"still"
        eventually(lambda: counted(ends.log.events("connection-dropped")) == 3)
        assert is_served(public)


def no_thread(task: rtunnel.Task) -> None:
    """What a pool does where the system gives no thread."""
    raise rtunnel.NoThread("can't start new thread")


def test_a_burst_at_the_clients_thread_limit(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that can start no more threads, and gets 120 visitors at once, resets each of them with a reason; its
    session and the visitors that it has go on."""
    with echo_service() as service, PeerServer() as server:
        client = ends.open_client(server.address, mapping(service.address))
        peer = server.accept()
        peer.send_frame(rtunnel.FrameType.NEW_CONN, 1, b"192.0.2.1:1")
        peer.send_frame(rtunnel.FrameType.DATA, 1, b"marco")
        assert peer.hear(rtunnel.FrameType.DATA) == (rtunnel.FrameType.DATA, 1, b"marco")
        with monkeypatch.context() as patch:
            patch.setattr(client.pool, "run", no_thread)
            new_conn = rtunnel.FrameType.NEW_CONN
            peer.send(b"".join(rtunnel.encode(new_conn, n, b"192.0.2.1:%d" % n) for n in range(2, 122)))
            closed = [peer.hear(rtunnel.FrameType.CLOSE_CONN) for _ in range(120)]
        assert [(stream, reason) for _, stream, reason in closed] == [
            (stream, b"can't start new thread") for stream in range(2, 122)
        ]
        peer.send_frame(rtunnel.FrameType.DATA, 1, b"polo")
        assert peer.hear(rtunnel.FrameType.DATA) == (rtunnel.FrameType.DATA, 1, b"polo")
        peer.send_frame(new_conn, 122, b"192.0.2.1:9")
        peer.send_frame(rtunnel.FrameType.DATA, 122, b"next")
        assert peer.hear(rtunnel.FrameType.DATA) == (rtunnel.FrameType.DATA, 122, b"next")
        assert not ends.log.events("session-closed")


# --- stuck --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["visitor", "local service"])
def test_a_stuck_stream(server: Factory, client: Factory, side: str) -> None:
    """[T-6]: a stream whose other direction has ended lives on while bytes come; without one it is reset after a time.
    Streams that are open both ways stay, however idle."""
    limits = {"STUCK_S": 1.0, "STALL_S": 0.1}
    ended, go_on = threading.Event(), threading.Event()

    def half(sock: socket.socket) -> None:
        word = sock.recv(5)
        if word == b"close":
            sock.shutdown(socket.SHUT_WR)
        elif word == b"marco":
            sock.sendall(word)
        while sock.recv(100):
            continue
        ended.set()
        go_on.wait(10)

    with Service(half) as service, contextlib.ExitStack() as stack:
        stack.callback(go_on.set)
        tunnel = open_tunnel(server, client, service, **limits)
        idle = stack.enter_context(tunnel.connect())
        idle.sendall(b"marco")
        assert read_exactly(idle, 5) == b"marco"
        visitor = stack.enter_context(tunnel.connect())
        started = time.monotonic()
        if side == "visitor":
            visitor.sendall(b"stays")
            visitor.shutdown(socket.SHUT_WR)
            ended.wait(10)
        else:
            visitor.sendall(b"close")
            assert visitor.recv(1) == b""
            for _ in range(5):  # each byte is life
                time.sleep(0.3)
                visitor.sendall(b"x")
            started += 1.5
        tunnel.server.wait_for("stream-closed", stream=2)
        assert time.monotonic() - started > 0.8
        assert "stuck" in tunnel.server.events("stream-closed", stream=2)[0]["reason"]
        idle.sendall(b"alive")
        eventually(lambda: is_open(idle))
        assert not tunnel.server.events("stream-closed", stream=1)


# --- garbage ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_what_has_ended_is_gone(house: House, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    """A session that has ended, its streams and its buffers are gone at once, without waiting for a collection of
    garbage: reconnects do not grow."""
    made: list[weakref.ref[object]] = []

    def watch(kind: type) -> None:
        start = kind.__init__

        def watched(self: object, *args: object, **options: object) -> None:
            made.append(weakref.ref(self))
            start(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", watched)

    for kind in (rtunnel.Session, rtunnel.Stream, rtunnel.Writer, rtunnel_tls.TlsTransport, rtunnel_tls._Ssl):
        watch(kind)
    watch(rtunnel_tls.HandshakeError)
    with echo_service() as service, Ends(house if tls else None) as ends, Relay(ends.open_server()) as relay:
        ends.open_client(relay.address, mapping(service.address))
        gc.disable()
        try:
            for number in range(1, 4):
                with connect(ends.public(number)) as visitor:
                    visitor.sendall(b"marco")
                    assert read_exactly(visitor, 5) == b"marco"
                relay.cut()
            ends.public(4)
            with socket.create_connection(relay.address) as broken:
                broken.sendall(b"neither TLS nor INIT")
                assert ends_with(broken) in ("eof", "reset")
            eventually(lambda: len([each for each in made if each() is not None]) == (8 if tls else 4))
        finally:
            gc.enable()


# --- what a client, or a server, could make grow ------------------------------------------------------------


def test_a_session_that_ends_as_it_is_welcomed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that ends between its INIT and its WELCOME leaves no port behind."""
    monkeypatch.setattr(rtunnel, "LEASE_LINGER_S", 0.1)
    post = rtunnel.Writer.post

    def ended(writer: rtunnel.Writer, frame: bytes, **options: bool) -> None:
        if frame[0] == rtunnel.FrameType.WELCOME:
            writer.close("the deadline has come")
        post(writer, frame, **options)

    control = ends.open_server()
    with monkeypatch.context() as patch:
        patch.setattr(rtunnel.Writer, "post", ended)
        with connect(control) as sock:
            sock.sendall(rtunnel.encode(rtunnel.FrameType.INIT, 0, init(0, new_instance())))
            assert ends_with(sock) in ("eof", "reset")
        ends.log.wait_for("lease-closed")
    with Peer.as_client(control):
        assert len(leases(ends.server)) == 1


def test_a_port_for_which_there_is_no_descriptor(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is out of descriptors sends a client away for now, not for good."""
    bind, failures = socket.socket.bind, [OSError(errno.EMFILE, "Too many open files")]

    def fail_once(sock: socket.socket, address: tuple[str, int]) -> None:
        if failures:
            raise failures.pop()
        bind(sock, address)

    control = ends.open_server()
    monkeypatch.setattr(socket.socket, "bind", fail_once)
    monkeypatch.setattr(rtunnel, "log_limit", rtunnel.LimitLog())
    ends.open_client(control, mapping(("127.0.0.1", 1)))
    assert ends.log.wait_for("lease-failed")["reason"] == "Too many open files"
    assert "too-many-clients" in ends.log.wait_for("refused")["reason"]
    ends.public()


def test_a_port_for_which_there_is_no_thread(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is out of threads closes the port again and refuses the client, which comes back and gets one."""
    control = ends.open_server()
    run = rtunnel.Pool.run
    failures, closed = [rtunnel.NoThread("can't start new thread")], []

    def fail_once(pool: rtunnel.Pool, task: rtunnel.Task) -> None:
        listener = getattr(task, "__self__", None)  # of an acceptor
        if isinstance(listener, rtunnel.Listener) and str(listener.address) != text(control) and failures:
            closed.append(listener.socket)
            raise failures.pop()
        run(pool, task)

    monkeypatch.setattr(rtunnel.Pool, "run", fail_once)
    ends.open_client(control, mapping(("127.0.0.1", 1)))
    ends.log.wait_for("session-closed", reason="unavailable: port 0 cannot be opened: can't start new thread")
    ends.public()
    assert [sock.fileno() for sock in closed] == [-1]
    assert len(leases(ends.server)) == 1


def test_a_stream_that_is_slow_to_close_holds_up_no_other(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams of a lost client do not wait for one that is slow to close."""
    close, go_on = rtunnel.PumpedStream.pump_left, threading.Event()

    def slow_close(stream: rtunnel.PumpedStream) -> None:
        if stream.number <= 4:
            go_on.wait(30)
        close(stream)

    monkeypatch.setattr(rtunnel.PumpedStream, "pump_left", slow_close)
    with Peer.as_client(ends.open_server()) as peer, contextlib.ExitStack() as stack:
        visitors = []
        for _ in range(12):  # the streams are numbered in this order
            visitors.append(stack.enter_context(connect(peer.public)))
            peer.hear(rtunnel.FrameType.NEW_CONN)
        peer.sock.close()
        assert [ends_with(visitor) for visitor in visitors[4:]] == ["reset"] * 8
        go_on.set()
        assert [ends_with(visitor) for visitor in visitors[:4]] == ["reset"] * 4


def test_visitors_of_a_client_that_does_not_read(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[S-11]: visitors that come and go leave frames behind for a client that does not read them: over a limit its
    visitors are refused, so what waits for it does not grow."""
    monkeypatch.setattr(rtunnel, "MAX_UNSENT_BYTES", 500)
    with Peer.as_client(ends.open_server(), window=1 << 30) as peer, connect(peer.public) as pouring:
        pouring.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                pouring.sendall(bytes(1 << 20))
        [session] = ends.sessions()
        poured = session.writer.unsent_bytes()  # where the control sender was caught in a send, a full queue of DATA
        for _ in range(100):
            with contextlib.suppress(ConnectionResetError):  # refused before `connect` has returned
                connect(peer.public).close()
        ends.log.wait_for("visitor-refused")
        assert session.writer.unsent_bytes() - poured < 100 * rtunnel.HEADER_BYTES + 25 * 64


def test_a_cancelled_stream_leaves_nothing(ends: Ends) -> None:
    """[T-3], [T-4]: behind a CLOSE_CONN nothing of the stream is sent, neither what is queued nor what its pump waits
    with: nobody is left to take it, and others would wait behind it."""
    with Peer.as_client(ends.open_server(), window=1 << 30) as peer, connect(peer.public) as pouring:
        peer.hear(rtunnel.FrameType.NEW_CONN)
        [session] = ends.sessions()
        pouring.settimeout(0.3)
        with writer_in_use(session.writer):  # so all frames of the test wait
            with contextlib.suppress(TimeoutError):
                while True:
                    pouring.sendall(bytes(1 << 20))
            eventually(lambda: session.writer._waiting)
            peer.send_frame(rtunnel.FrameType.CLOSE_CONN, 1)
            eventually(lambda: not session.writer._waiting and not session.writer.unsent_bytes())
        assert ends_with(pouring) == "reset"
        peer.send_frame(rtunnel.FrameType.PING, 0, b"and then")
        assert peer.hear() == (rtunnel.FrameType.PONG, 0, b"and then")


def test_streams_of_a_server_that_does_not_read(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[S-11]: a server that opens streams, and does not read what becomes of them, is no server: its session ends."""
    monkeypatch.setattr(rtunnel, "MAX_UNSENT_BYTES", 0)
    with PeerServer() as server:
        ends.open_client(server.address, mapping(("127.0.0.1", 1)))
        peer = server.accept()
        ends.log.wait_for("session-opened")
        [session] = ends.client_sessions()
        with writer_in_use(session.writer):  # so the frame of the test waits
            session.writer.post(rtunnel.encode(0xEE, 0))
            peer.send_frame(rtunnel.FrameType.NEW_CONN, 1, b"203.0.113.7:51234")
            eventually(lambda: ended_by(session))
        assert "has not read" in ends.log.wait_for("session-closed")["reason"]


@pytest.mark.parametrize("kind", [int(rtunnel.FrameType.BLOCKED), 0xEE])
def test_tiny_frames_keep_nobody_waiting(ends: Ends, monkeypatch: pytest.MonkeyPatch, kind: int) -> None:
    """[X-2]: a reader to whom tiny frames come without end, unknown ones too, lets other threads run between them."""
    let_run: list[None] = []
    monkeypatch.setattr(rtunnel, "let_others_run", lambda: let_run.append(None))
    with Peer.as_client(ends.open_server()) as peer, connect(peer.public):
        peer.hear(rtunnel.FrameType.NEW_CONN)
        peer.send(102_400 * rtunnel.encode(kind, 1))
        eventually(lambda: len(let_run) >= 102_400 // rtunnel.READER_FRAMES // 2)


def test_clients_that_say_goaway_count(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has said GOAWAY, and stays, still is a client: the limit holds for it, too."""
    monkeypatch.setattr(rtunnel, "MAX_CLIENTS", 2)
    control = ends.open_server()
    with Peer.as_client(control) as first, Peer.as_client(control):
        first.send_frame(rtunnel.FrameType.GOAWAY, 0, b"later")
        ends.log.wait_for("lease-closed")
        with pytest.raises(Unwelcome, match="too-many-clients"):
            Peer.as_client(control)
    eventually(lambda: ends.server.figures()["limit_used", "clients"] == 0)


def test_silent_clients_count(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of the global port that never send INIT count among the clients: beyond the limit a silent one becomes
    none and goes at the deadline, and one that sends INIT is refused."""
    monkeypatch.setattr(rtunnel, "MAX_CLIENTS", 2)
    monkeypatch.setattr(rtunnel, "SILENT_CLIENT_S", 0.1)
    monkeypatch.setattr(rtunnel, "HELLO_TIMEOUT_S", 1.0)
    control = ends.open_server(public=rtunnel.Address("127.0.0.1", 0))
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(2):
            silent.append(stack.enter_context(connect(control)))
            ends.log.wait_for("session-opened", len(silent))
        assert ends.server.figures()["limit_used", "clients"] == 2
        third = stack.enter_context(connect(control))
        with pytest.raises(Unwelcome, match="too-many-clients"):
            Peer.as_client(control)
        assert ends_with(third) == "eof"
        assert "no INIT" in ends.log.wait_for("refused", peer=text(third.getsockname()))["reason"]
        assert count_open(silent) == 2
        silent.pop().close()
        eventually(lambda: ends.server.figures()["limit_used", "clients"] == 1)
        Peer.as_client(control).sock.close()


def test_a_silent_client_gets_the_next_place(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[O-7]: a silent client for whom there is no place is one as soon as there is, before its deadline."""
    for name, value in {"MAX_CLIENTS": 1, "SILENT_CLIENT_S": 0.1, "WATCH_S": 0.1}.items():
        monkeypatch.setattr(rtunnel, name, value)
    control = ends.open_server(public=rtunnel.Address("127.0.0.1", 0))
    with connect(control) as first:
        ends.log.wait_for("session-opened")
        with connect(control) as second:
            eventually(lambda: ends.server.figures()["sessions", ""] == 2)
            first.close()
            ends.log.wait_for("session-opened", peer=text(second.getsockname()))


def test_the_init_of_a_silent_client_needs_no_place(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[O-7]: who counts as a client already may still send INIT, also where all places are taken."""
    monkeypatch.setattr(rtunnel, "MAX_CLIENTS", 1)
    monkeypatch.setattr(rtunnel, "SILENT_CLIENT_S", 0.1)
    with Peer.connect(ends.open_server(public=rtunnel.Address("127.0.0.1", 0))) as peer:
        ends.log.wait_for("session-opened")
        peer.send_init(init(0, new_instance()))
        kind, _, payload = peer.read_frame()
        assert (kind, payload[:9]) == (rtunnel.FrameType.WELCOME, b"version=1")


def test_the_init_of_a_client_that_is_about_to_be_silent(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[O-7], [H-1]: an INIT that comes while the clock makes a client of the silent one starts the heartbeat once."""
    monkeypatch.setattr(rtunnel, "SILENT_CLIENT_S", 0.1)
    joined, may_go_on, log_event = threading.Event(), threading.Event(), rtunnel.log_event
    started: list[rtunnel.Session] = []

    def hold_the_clock(level: int, event: str, /, **pairs: object) -> None:
        if event == "session-opened" and not joined.is_set():
            joined.set()
            assert may_go_on.wait(10)
        log_event(level, event, **pairs)

    monkeypatch.setattr(rtunnel, "log_event", hold_the_clock)
    monkeypatch.setattr(rtunnel.Session, "start_timers", lambda session: started.append(session))
    with Peer.connect(ends.open_server(public=rtunnel.Address("127.0.0.1", 0))) as peer:
        assert joined.wait(10)
        peer.send_init(init(0, new_instance()))
        assert peer.hear(rtunnel.FrameType.WELCOME)
        eventually(lambda: started)
        clock_is_done = threading.Event()
        rtunnel.CLOCK.after(0, clock_is_done.set)
        may_go_on.set()
        assert clock_is_done.wait(10)
        assert len(started) == 1


@pytest.mark.parametrize("tls", [False, True])
def test_a_stranger_that_reads_nothing(house: House, monkeypatch: pytest.MonkeyPatch, tls: bool) -> None:
    """Who sends no INIT goes at the deadline, whatever it sends otherwise and does not read: in TLS KeyUpdates, whose
    answers keep the control sender in a send."""
    monkeypatch.setattr(rtunnel, "HELLO_TIMEOUT_S", 1.0)
    with small_control_sockets(), Ends(house if tls else None) as ends, contextlib.ExitStack() as stack:
        control = ends.open_server()
        sock = stack.enter_context(connect_small(control))
        started = time.monotonic()
        if tls:
            pair = SimpleNamespace(**house.files("client"))
            context = raw_context(pair, house.ca, groups="X25519MLKEM768")  # type: ignore[arg-type]
            forger = Forger(context, sock, "client")
            [session] = eventually(ends.server.sessions)
            monkeypatch.setattr(rtunnel_tls, "MAX_UNSENT_BYTES", 1 << 30)  # which ends another flood
            while not is_in_a_send(session.writer):
                sock.sendall(b"".join(forger.key_update(request=True) for _ in range(300)))
        assert "no INIT within 1 s" in ends.log.wait_for("refused", deadline=5.0)["reason"]
        assert time.monotonic() - started < 1.0 + rtunnel.FAREWELL_S + 1.0


def test_refusals_are_counted(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is refused, and comes again and again, costs a few lines a second; each refusal is counted."""
    monkeypatch.setattr(rtunnel, "MAX_CLIENTS", 0)
    monkeypatch.setattr(rtunnel, "LOG_EVERY_S", 0.5)
    monkeypatch.setattr(rtunnel, "LOG_BURST", 5)
    monkeypatch.setattr(rtunnel, "log_limit", rtunnel.LimitLog())
    control, started = ends.open_server(), time.monotonic()
    for _ in range(40):
        with pytest.raises(Unwelcome, match="too-many-clients"):
            Peer.as_client(control)

    eventually(lambda: counted(ends.log.events("refused")) == 40)
    seconds = 1 + (time.monotonic() - started) / rtunnel.LOG_EVERY_S
    assert len([line for line in ends.log.events("refused") if "reason" in line]) <= rtunnel.LOG_BURST * seconds


def test_what_a_client_names_is_cut_in_the_log(ends: Ends) -> None:
    """The local service as a client names it is shortened in the log, and a level-0 client's instance is not kept."""
    with connect(ends.open_server()) as sock:
        payload = b"0:" + 3000 * b"x" + b":80\ninstance=" + 500 * b"y"
        sock.sendall(rtunnel.encode(rtunnel.FrameType.INIT, 0, payload))
        assert len(ends.log.wait_for("session-opened")["local"]) == rtunnel.MAX_MESSAGE_CHARACTERS
        assert knows_no_instance(ends.server)
    assert rtunnel.Init.parse(payload).instance == ""


def test_only_what_the_peer_provokes_is_its_fault() -> None:
    """Behind too many answers that the peer has not read, this side's own frames are no protocol error."""
    unused: Any = None
    writer = rtunnel.Writer(unused)
    for _ in range(rtunnel.MAX_UNSENT_BYTES // 16 + 1):
        writer.post(b"16 bytes of pong", provoked=True)
    assert writer.is_behind()
    with pytest.raises(rtunnel.ProtocolError):
        writer.post(b"pong", provoked=True)
    writer.post(b"ping")
