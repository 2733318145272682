"""Ends: half-close, clean end, reset and refusal cross the tunnel as what they are."""

from __future__ import annotations

import contextlib
import hashlib
import random
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from level1 import Ends, Peer, PeerServer, in_threads, mapping
from support import Address, Service, Sink, connect, ends_with, eventually, read_all, read_exactly, reset, running
from tunnels import closed_port, fill, text, visit

import rtunnel
from rtunnel import FrameType

MB = 1_000_000


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ends in this process, stopped after the test."""
    with Ends() as made:
        yield made


NOISE = random.Random(1).randbytes(4 * MB)


def pattern(seed: int, size: int) -> bytes:
    """Bytes that no other seed has, whole or shifted."""
    return NOISE[1009 * seed : 1009 * seed + size]


def digest_when_all_is_read(sock: socket.socket) -> None:
    """A service that answers only when it has read the whole request: 32 bytes and as much again as it got."""
    request = read_all(sock)
    sock.sendall(hashlib.sha256(request).digest() + request)


def all_closed(ends: Ends, streams: int) -> list[str]:
    """Wait until both ends have closed so many streams; why each was closed."""
    ends.log.wait_for("stream-closed", 2 * streams)
    return [fields["reason"] for fields in ends.log.events("stream-closed")]


# --- short connections -----------------------------------------------------------------------------------------------


def test_what_a_visitor_says_at_once_goes_with_new_conn(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is told of a visitor and of its first bytes in one send, where they are here already."""
    serve, send, sent = rtunnel.Server.serve_visitor, rtunnel.PlainTransport.send, []

    def serve_late(server: rtunnel.Server, lease: rtunnel.Lease, sock: socket.socket, visitor: rtunnel.Address) -> None:
        assert rtunnel.ready([sock], writing=False, seconds=10)
        serve(server, lease, sock, visitor)

    def noted(transport: rtunnel.PlainTransport, frames: bytes) -> None:
        sent.append(bytes(frames))
        send(transport, frames)

    with Peer.as_client(ends.open_server()) as peer, monkeypatch.context() as patch, contextlib.ExitStack() as stack:
        assert peer.read_frame()[0] == FrameType.PING  # the first; NEW_CONN could go along with it
        patch.setattr(rtunnel.Server, "serve_visitor", serve_late)
        patch.setattr(rtunnel.PlainTransport, "send", noted)
        stack.enter_context(connect(peer.public)).sendall(b"hello")
        _, number, payload = peer.hear(FrameType.NEW_CONN)
        peer.hear(FrameType.DATA)
        first, second = (FrameType.NEW_CONN, number, payload), (FrameType.DATA, number, b"hello")
        assert rtunnel.encode(*first) + rtunnel.encode(*second) in sent


@pytest.mark.parametrize("end", ["silence", "end of file", "reset"])
def test_a_visitor_who_says_nothing(ends: Ends, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    """The client is told of one who is silent, and of one who has left before he is served; then of his end."""
    serve, served = rtunnel.Server.serve_visitor, threading.Event()

    def serve_late(server: rtunnel.Server, lease: rtunnel.Lease, sock: socket.socket, visitor: rtunnel.Address) -> None:
        if end != "silence":
            assert rtunnel.ready([sock], writing=False, seconds=10)
        serve(server, lease, sock, visitor)
        served.set()

    monkeypatch.setattr(rtunnel.Server, "serve_visitor", serve_late)
    with Peer.as_client(ends.open_server()) as peer, connect(peer.public) as visitor:
        if end == "end of file":
            visitor.shutdown(socket.SHUT_WR)
        elif end == "reset":
            reset(visitor)
        _, number, _ = peer.hear(FrameType.NEW_CONN)
        if end == "end of file":
            assert peer.hear() == (FrameType.EOF, number, b"")
        elif end == "reset":
            assert peer.hear() == (FrameType.CLOSE_CONN, number, b"reset")
        peer.send_frame(FrameType.CLOSE_CONN, number)
        assert served.wait(10)


# --- half-close ----------------------------------------------------------------------------------------------------


def test_defect_12_a_half_closed_request_gets_its_reply(ends: Ends) -> None:
    """[T-1]: 100 visitors at once end their requests and wait: each gets its whole reply and a clean end."""
    with Service(digest_when_all_is_read) as service:
        public = ends.open_tunnel(service)

        def ask(seed: int) -> None:
            request = pattern(seed, 1000 + 997 * seed)
            with connect(public) as visitor:
                visitor.sendall(request)
                visitor.shutdown(socket.SHUT_WR)
                assert read_all(visitor) == hashlib.sha256(request).digest() + request

        in_threads([lambda seed=seed: ask(seed) for seed in range(100)])  # type: ignore[misc]
        assert set(all_closed(ends, 100)) == {"clean"}


def test_a_local_service_that_ends_first(ends: Ends) -> None:
    """[T-1]: 100 local services end their side first, and still get all that their visitors say."""
    received: dict[bytes, bytes] = {}

    def greet_and_end(sock: socket.socket) -> None:
        sock.sendall(b"greeting")
        sock.shutdown(socket.SHUT_WR)
        request = read_all(sock)
        received[request[:4]] = request

    with Service(greet_and_end) as service:
        public = ends.open_tunnel(service)

        def say(seed: int) -> None:
            with connect(public) as visitor:
                assert read_all(visitor) == b"greeting"
                visitor.sendall(b"%04d" % seed + pattern(seed, 100_000))

        in_threads([lambda seed=seed: say(seed) for seed in range(100)])  # type: ignore[misc]
        assert set(all_closed(ends, 100)) == {"clean"}
    assert received == {b"%04d" % seed: b"%04d" % seed + pattern(seed, 100_000) for seed in range(100)}


def test_a_conversation_after_half_close(ends: Ends) -> None:
    """[T-1]: a direction that has ended leaves the other as it was, message by message."""
    with Service(lambda sock: count_to_100(sock)) as service:
        public = ends.open_tunnel(service)
        with connect(public) as visitor:
            visitor.shutdown(socket.SHUT_WR)
            for number in range(100):
                assert read_exactly(visitor, 4) == b"%04d" % number
            assert ends_with(visitor) == "eof"


def count_to_100(sock: socket.socket) -> None:
    """Wait for the end of the request, then send 100 messages."""
    assert read_all(sock) == b""
    for number in range(100):
        sock.sendall(b"%04d" % number)


@pytest.mark.parametrize("way", ["download", "upload"])
def test_sent_and_closed_at_once(ends: Ends, way: str) -> None:
    """[S-4], [T-3]: 20 x 3 MB, each sent and its socket closed at once: not a byte is short."""
    received: dict[bytes, str] = {}
    wanted = {b"%04d" % seed: hashlib.sha256(pattern(seed, 3 * MB)).hexdigest() for seed in range(20)}

    def send(sock: socket.socket, seed: int) -> None:
        with sock:
            sock.sendall(b"%04d" % seed + pattern(seed, 3 * MB))

    def receive(sock: socket.socket) -> None:
        with sock:
            whole = read_all(sock)
        received[whole[:4]] = hashlib.sha256(whole[4:]).hexdigest()

    def serve(sock: socket.socket) -> None:
        if way == "upload":
            receive(sock)
        else:
            send(sock, int.from_bytes(read_exactly(sock, 1), "big"))

    def visit(seed: int) -> None:
        visitor = connect(public)
        if way == "upload":
            send(visitor, seed)
        else:
            visitor.sendall(seed.to_bytes(1, "big"))
            receive(visitor)

    with Service(serve) as service:
        public = ends.open_tunnel(service)
        in_threads([lambda seed=seed: visit(seed) for seed in range(20)])  # type: ignore[misc]
        assert set(all_closed(ends, 20)) == {"clean"}
        eventually(lambda: len(received) == 20)
    assert received == wanted


def test_the_last_bytes_of_a_reply_to_who_still_sends(ends: Ends) -> None:
    """A reply that ends before its request does arrives whole: the visitor goes on sending for a while."""

    def answer_early(sock: socket.socket) -> None:
        sock.sendall(pattern(1, MB))
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)

    with Service(answer_early) as service, connect(ends.open_tunnel(service)) as visitor:
        with running(lambda: visitor.sendall(pattern(2, 2 * MB))):
            assert read_all(visitor) == pattern(1, MB)
        visitor.shutdown(socket.SHUT_WR)


# --- resets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["visitor", "service"])
def test_a_reset_at_any_point(ends: Ends, who: str) -> None:
    """[T-5]: a reset at any point of a transfer in both directions reaches the other side as a reset, never as an
    end."""
    choose = random.Random(who)
    points = [choose.choice([0, 1, 100, 65536, choose.randrange(3 * MB)]) for _ in range(40)]
    fates: list[str] = []

    def reset_after(sock: socket.socket, count: int) -> None:
        """Send and read so many bytes, then reset."""
        with running(lambda: sock.sendall(bytes(count))):
            read_exactly(sock, count)
        reset(sock)

    order: list[int] = []
    fates_lock = threading.Lock()

    def serve(sock: socket.socket) -> None:
        if who == "service":
            with fates_lock:
                count = order.pop()
            reset_after(sock, count)
            return
        fate = transfer(sock)
        with fates_lock:
            fates.append(fate)

    def visit(count: int) -> None:
        with connect(public) as visitor:
            if who == "visitor":
                reset_after(visitor, count)
                return
            fate = transfer(visitor)
        with fates_lock:
            fates.append(fate)

    with Service(serve) as service:
        public = ends.open_tunnel(service)
        order.extend(points)
        for at in range(0, 40, 10):
            in_threads([lambda count=count: visit(count) for count in points[at : at + 10]])  # type: ignore[misc]
        eventually(lambda: len(fates) == 40)
        assert fates == ["reset"] * 40
        assert "clean" not in all_closed(ends, 40)


def transfer(sock: socket.socket) -> str:
    """Send without end and read to the end, in one thread, so that no other takes the error: how it ended."""
    ready = select.poll()
    ready.register(sock, select.POLLIN | select.POLLOUT)
    sock.setblocking(False)
    try:
        while True:
            [(_, events)] = ready.poll()
            if events & select.POLLERR:
                return "reset"
            if events & select.POLLIN and not sock.recv(100_000):
                return "eof"
            if events & select.POLLOUT:
                with contextlib.suppress(BlockingIOError):
                    sock.send(bytes(50_000))
    except ConnectionError:
        return "reset"


@pytest.mark.parametrize("who", ["visitor", "service"])
def test_a_reset_behind_half_close(ends: Ends, who: str) -> None:
    """[T-5]: who has ended its own direction and resets while the other still sends: the other side sees a reset."""
    sink = Sink()
    met = threading.Event()

    def end_and_reset(sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)
        met.wait(10)
        reset(sock)

    def see_end_then(sock: socket.socket) -> str:
        assert sock.recv(1) == b""
        met.set()
        try:
            while True:
                sock.sendall(bytes(1000))
        except ConnectionError:
            return "reset"

    def serve(sock: socket.socket) -> None:
        if who == "service":
            end_and_reset(sock)
        else:
            sink.end = see_end_then(sock)
            sink.ended.set()

    with Service(serve) as service, connect(ends.open_tunnel(service)) as visitor:
        if who == "visitor":
            end_and_reset(visitor)
            assert sink.ended.wait(10)
            assert sink.end == "reset"
        else:
            assert see_end_then(visitor) == "reset"


@pytest.mark.skipif(not hasattr(select, "poll"), reason="without poll a reset shows when something is sent")
@pytest.mark.parametrize("who", ["visitor", "service"])
def test_a_reset_behind_half_close_in_silence(ends: Ends, who: str) -> None:
    """[T-5]: the same where the other side sends nothing, and nobody's thread is at the socket that was reset."""
    met, seen = threading.Event(), threading.Event()

    def end_and_reset(sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_WR)
        assert met.wait(10)
        reset(sock)

    def wait_for_it(sock: socket.socket) -> None:
        assert sock.recv(1) == b""
        met.set()
        eventually(lambda: rtunnel.has_error(sock))
        seen.set()

    with (
        Service(end_and_reset if who == "service" else wait_for_it) as service,
        connect(ends.open_tunnel(service)) as visitor,
    ):
        (end_and_reset if who == "visitor" else wait_for_it)(visitor)
        assert seen.wait(10)


@pytest.mark.parametrize("side", ["server", "client"])
def test_an_abort_resets_the_socket(ends: Ends, side: str) -> None:
    """[T-4]: CLOSE_CONN of level 1 resets the socket, whatever is queued; it is not answered."""
    with contextlib.ExitStack() as stack:
        if side == "server":
            peer = stack.enter_context(Peer.as_client(ends.open_server()))
            app = stack.enter_context(connect(peer.public))
            peer.hear(FrameType.NEW_CONN)
        else:
            server = stack.enter_context(PeerServer())
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            ends.open_client(server.address, mapping(listener.getsockname()))
            peer = server.accept()
            peer.send_frame(FrameType.NEW_CONN, 1, b"203.0.113.7:51234")
            app = stack.enter_context(listener.accept()[0])
        peer.send_frame(FrameType.CLOSE_CONN, 1, b"reset")
        app.settimeout(10)
        assert ends_with(app) == "reset"
        ends.log.wait_for("stream-closed", reason="peer: reset")
        peer.send_frame(FrameType.PING, 0, b"any more")
        peer.hear(FrameType.PONG)


# --- a local service that cannot be had --------------------------------------------------------------------------


def test_a_refused_local_service_is_a_reset(ends: Ends) -> None:
    """[E-6]: a visitor of a local service that refuses meets a reset, no clean end."""
    with closed_port() as nobody:
        public = ends.open_tunnel(nobody)
        assert [visit(public, said) for said in (b"", b"GET / HTTP/1.0\r\n\r\n", b"")] == ["reset"] * 3
        assert set(all_closed(ends, 3)) == {"refused", "peer: refused"}


def test_a_local_service_that_does_not_answer_is_a_reset(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[E-6]: a visitor of a local service that does not answer meets a reset after DIAL_TIMEOUT_S."""
    monkeypatch.setattr(rtunnel, "DIAL_TIMEOUT_S", 0.3)
    with silent_service() as address:
        assert visit(ends.open_tunnel(address), b"anybody there?") == "reset"
        ends.log.wait_for("dial-failed", local=text(address))
        assert set(all_closed(ends, 1)) == {"timed out", 'peer: "timed out"'}


@contextlib.contextmanager
def silent_service() -> Iterator[Address]:
    """An address whose host answers nothing: a listener whose queue is full."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, contextlib.ExitStack() as stack:
        for sock in fill(listener.getsockname()):
            stack.enter_context(sock)
        yield listener.getsockname()


def test_a_visitor_that_leaves_during_the_dial(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A visitor that resets while the local service is dialled leaves nothing behind at either end."""
    monkeypatch.setattr(rtunnel, "DIAL_TIMEOUT_S", 0.3)
    with silent_service() as address:
        public = ends.open_tunnel(address)
        for _ in range(5):
            reset(connect(public))
        all_closed(ends, 5)
        assert [session.stream_count() for session in ends.sessions()] == [0]


def test_a_service_that_is_dialled_slowly_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """[E-7]: the 5 s in which a service may answer our FIN begin with the FIN, and not with the peer's CLOSE_CONN,
    which may come while it is dialled."""
    monkeypatch.setattr(rtunnel, "LINGER_S", 3.0)
    dial = rtunnel.dial
    with Ends() as ends, PeerServer() as server, socket.create_server(("127.0.0.1", 0)) as listener:

        def slow(address: rtunnel.Address, seconds: float) -> socket.socket:
            if address.port == listener.getsockname()[1]:
                time.sleep(3.5)
            return dial(address, seconds)

        monkeypatch.setattr(rtunnel, "dial", slow)
        ends.open_client(server.address, mapping(listener.getsockname()))
        peer = server.accept(b"")
        peer.send_frame(FrameType.NEW_CONN, 1)
        peer.send_frame(FrameType.CLOSE_CONN, 1)
        service, _ = listener.accept()
        with service:
            service.settimeout(10.0)
            assert service.recv(1) == b""
            time.sleep(1.1)  # longer than between two sweeps
            for _ in range(2):  # the first would be answered by a reset
                service.sendall(b"x")
                time.sleep(0.05)
