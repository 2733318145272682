"""The open connection: order, threads, ends, and what a peer can do to it."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tls_peers import (
    Forger,
    House,
    Pair,
    SocketCarrier,
    Task,
    Watched,
    raw_context,
    receive,
    session,
    shake,
    tcp_pair,
    within,
)

import rtunnel_tls
from rtunnel_tls import TlsTransport, TransportError

MIB = 1 << 20


@contextlib.contextmanager
def forged(house: House, role: str = "client") -> Iterator[tuple[TlsTransport, Forger]]:
    """An open connection of ours whose peer, in `role`, makes its records by hand."""
    files = house.files(role)
    pair = Pair.__new__(Pair)
    pair.cert, pair.key = files["cert"], files["key"]
    context = raw_context(pair, house.ca, groups="X25519MLKEM768")
    with tcp_pair() as (near, far):
        ours = Task(shake, near, house.context("server" if role == "client" else "client"))
        forger = Forger(context, far, role)
        far.settimeout(10)
        transport = ours.result()
        if role == "client":  # the two tickets of OpenSSL's server
            assert [forger.receive()[0] for _ in range(2)] == [Forger.HANDSHAKE] * 2
        yield transport, forger


def view(size: int = 65536) -> memoryview:
    return memoryview(bytearray(size))


# --- bytes and records --------------------------------------------------------------------------------------


def test_bytes_arrive_as_they_were_sent(house: House) -> None:
    """Any sizes on either side, views of one byte and views of a megabyte: the same bytes in the same order."""
    sizes = [0, 1, 2, 9, 4096, 16383, 16384, 16385, 65545, 300_000, 3 * MIB]
    data = random.Random(1).randbytes(sum(sizes))
    with session(house.server(), house.client()) as (server, client):

        def send() -> None:
            at = 0
            for size in sizes:
                server.send(memoryview(data)[at : at + size])
                at += size
            server.finish()

        task = Task(send)
        got = bytearray()
        for size in [1, 5, 100, 16384, 7] * 20:
            buffer = view(size)
            got += buffer[: client.receive_into(buffer)]
        buffer = view(MIB)
        while count := client.receive_into(buffer):
            got += buffer[:count]
        task.result()
        assert bytes(got) == data


def test_many_frames_share_one_record_and_one_send(house: House) -> None:
    """What is sent in one call leaves in one call to the carrier, and small frames in one record."""
    with forged(house) as (transport, forger):
        carrier: Any = transport._carrier
        before = carrier.sends
        transport.send(b"".join(b"%09d" % number for number in range(1000)))
        assert carrier.sends == before + 1
        kind, content = forger.receive()
        assert (kind, len(content)) == (Forger.APPLICATION_DATA, 9000)


def test_a_batch_of_any_size_leaves_nothing_behind(house: House) -> None:
    """Also a batch that is larger than the transport's buffer is taken whole from OpenSSL."""
    with session(house.server(), house.client()) as (server, client):
        task = Task(receive, client, 5 * MIB)
        server.send(bytes(5 * MIB))
        assert server._ssl.unsent() == 0
        assert len(task.result()) == 5 * MIB


def test_a_slow_reader_loses_nothing(house: House) -> None:
    """Under back-pressure, with small socket buffers and smaller reads, every byte arrives (defect 4)."""
    data = random.Random(2).randbytes(2 * MIB)
    with session(house.server(), house.client()) as (server, client):
        for end, option in ((server, socket.SO_SNDBUF), (client, socket.SO_RCVBUF)):
            end._carrier.sock.setsockopt(socket.SOL_SOCKET, option, 32768)  # type: ignore[attr-defined]
        task = Task(lambda: (server.send(data), server.finish()))
        got = bytearray()
        buffer = view(700)
        while count := client.receive_into(buffer):
            got += buffer[:count]
        task.result()
        assert bytes(got) == data


def test_an_idle_connection_uses_no_processor_time(house: House) -> None:
    """A reader that waits, and a handshake that waits, do not run (defect 3)."""

    def refused(sock: socket.socket) -> str:
        with pytest.raises(rtunnel_tls.HandshakeError) as error:
            shake(sock, house.server(), 0.5)
        return error.value.rule

    with session(house.server(), house.client()) as (server, client), tcp_pair() as (near, _far):
        reader = Task(server.receive_into, view())
        waiting = Task(refused, near)
        used = time.process_time()
        assert waiting.result() == "deadline"
        assert time.process_time() - used < 0.1
        client.finish()
        assert reader.result() == 0


def test_empty_and_padded_records_are_no_end(house: House) -> None:
    """An empty record is not taken for an end, and padding is not taken for data."""
    with forged(house) as (transport, forger):
        data = Forger.APPLICATION_DATA
        forger.sock.sendall(forger.record(data, b"") + forger.record(data, b"x", 1000) + forger.record(data, b"yz"))
        assert receive(transport, 3) == b"xyz"


# --- ends ---------------------------------------------------------------------------------------------------


def test_a_clean_end_is_close_notify(house: House) -> None:
    """`finish` sends what tells the peer that nothing is missing; the other direction stays open."""
    with session(house.server(), house.client()) as (server, client):
        server.send(b"last")
        server.finish()
        assert receive(client, 100) == b"last"
        assert client.receive_into(view()) == 0, "and again"
        client.send(b"still here")
        assert receive(server, 10) == b"still here"


def test_an_end_without_close_notify_is_truncation(house: House) -> None:
    """A cut connection never looks like a clean end; what came before is handed out before."""
    with session(house.server(), house.client()) as (server, client):
        server.send(b"half a ")
        server._carrier.finish()
        assert client.receive_into(view()) == 7
        with pytest.raises(TransportError, match="truncated"):
            client.receive_into(view())


def test_an_end_in_the_middle_of_a_record_is_truncation(house: House) -> None:
    """The bytes of a record that was cut are not handed out."""
    with forged(house) as (transport, forger):
        forger.sock.sendall(forger.record(Forger.APPLICATION_DATA, b"whole"))
        forger.sock.sendall(forger.record(Forger.APPLICATION_DATA, b"cut")[:-1])
        forger.sock.shutdown(socket.SHUT_WR)
        assert receive(transport, 5) == b"whole"
        with pytest.raises(TransportError, match="truncated"):
            transport.receive_into(view())


def test_an_end_before_any_data_says_when(house: House) -> None:
    """A peer that closes right after the handshake may have refused us, and the error says that much."""
    with session(house.server(), house.client()) as (server, client):
        server._carrier.finish()
        with pytest.raises(TransportError, match="closed by peer after the handshake"):
            client.receive_into(view())


@pytest.mark.parametrize(
    ("code", "name"),
    [
        (116, "certificate required"),
        (42, "bad certificate"),
        (48, "unknown ca"),
        (45, "certificate expired"),
        (44, "certificate revoked"),
        (20, "bad record mac"),
        (40, "handshake failure"),
        (80, "internal error"),
    ],
)
def test_an_alert_is_told_by_its_name(house: House, code: int, name: str) -> None:
    """A fatal alert of the peer ends the connection with the alert's name, once and again."""
    with forged(house) as (transport, forger):
        forger.sock.sendall(
            forger.record(Forger.APPLICATION_DATA, b"x") + forger.record(Forger.ALERT, bytes([2, code]))
        )
        assert receive(transport, 1) == b"x"
        for _ in range(2):
            with pytest.raises(TransportError, match=f"^alert from the peer: {name}$"):
                transport.receive_into(view())
        with pytest.raises(rtunnel_tls.TransportError):
            transport.send(b"too late")


def test_a_forged_record_ends_the_connection(house: House) -> None:
    """A record that was changed on the way is refused, our alert goes out, and no close_notify blesses the rest."""
    with forged(house) as (transport, forger):
        flushes: list[int] = []
        transport.wants_flush = lambda: flushes.append(1)
        sealed = bytearray(forger.record(Forger.APPLICATION_DATA, b"money"))
        sealed[-1] ^= 1
        forger.sock.sendall(sealed)
        with pytest.raises(TransportError, match="bad record mac"):
            transport.receive_into(view())
        assert flushes, "the reader asks for the alert to be sent"
        transport.finish()
        assert forger.receive() == (Forger.ALERT, bytes([2, 20]))
        with pytest.raises(EOFError):
            forger.receive()


@pytest.mark.parametrize("junk", [b"\x17\x03\x03\x48\x01" + bytes(100), b"GET / HTTP/1.1\r\n\r\n", bytes(64)])
def test_bytes_that_are_no_record_end_the_connection(house: House, junk: bytes) -> None:
    """A record longer than TLS admits, and bytes that are no record at all."""
    with forged(house) as (transport, forger):
        forger.sock.sendall(junk)
        with pytest.raises(TransportError):
            transport.receive_into(view())


@pytest.mark.parametrize("message", [b"\x01\x00\x00\x00", b"\x0d\x00\x00\x00", b"\x00\x00\x00\x00"])
def test_a_handshake_message_out_of_place_ends_the_connection(house: House, message: bytes) -> None:
    """No renegotiation, no second certificate request, no message of the past: TLS 1.3 has none."""
    with forged(house) as (transport, forger):
        forger.send(Forger.HANDSHAKE, message)
        with pytest.raises(TransportError):
            transport.receive_into(view())


def test_the_carriers_errors_pass_through(house: House) -> None:
    """A reset of the connection below is the carrier's OSError, to the reader and to the writer."""
    with session(house.server(), house.client()) as (server, client):
        sock: socket.socket = server._carrier.sock  # type: ignore[attr-defined]
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0" + bytes(4))
        sock.close()
        with pytest.raises(ConnectionResetError):
            client.receive_into(view())
        with pytest.raises(OSError, match=r"."):
            client.send(b"x")


# --- what TLS itself sends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["client", "server"])
def test_key_updates_are_answered_and_followed(house: House, role: str) -> None:
    """KeyUpdates that ask for an answer get one each, by whoever has the turn, and data goes on both ways."""
    with forged(house, role) as (transport, forger):
        flushes: list[int] = []
        transport.wants_flush = lambda: flushes.append(1)
        for _ in range(40):
            forger.sock.sendall(forger.key_update(request=True))
        forger.send(Forger.APPLICATION_DATA, b"after")
        assert receive(transport, 5) == b"after"
        assert flushes
        assert transport._ssl.unsent() > 1000
        transport.send(b"")
        assert transport._ssl.unsent() == 0
        transport.send(b"under the last key")
        kinds = []
        while (got := forger.receive())[0] == Forger.HANDSHAKE:
            kinds.append(got)
        assert kinds == [(Forger.HANDSHAKE, bytes([24, 0, 0, 1, 0]))] * 40
        assert got == (Forger.APPLICATION_DATA, b"under the last key")


def test_key_updates_that_ask_for_nothing_cause_nothing(house: House) -> None:
    """A KeyUpdate alone is followed and not answered."""
    with forged(house) as (transport, forger):
        forger.sock.sendall(forger.key_update(request=False) + forger.record(Forger.APPLICATION_DATA, b"x"))
        assert receive(transport, 1) == b"x"
        assert transport._ssl.unsent() == 0


def test_a_flood_of_key_updates_ends_the_connection(house: House) -> None:
    """A peer that makes us answer and does not read cannot make the answers pile up."""
    with forged(house) as (transport, forger):
        data = Forger.APPLICATION_DATA  # in between, so that each read has something to hand out
        answer = lambda: forger.key_update(request=True) + forger.record(data, b"x")  # noqa: E731
        flood = Task(lambda: [forger.sock.sendall(answer()) for _ in range(4000)])
        with pytest.raises(TransportError, match="answer"):
            read_until_it_fails(transport)
        assert transport._ssl.unsent() < 2 * rtunnel_tls.MAX_UNSENT_BYTES + 8000
        transport.shutdown()
        with contextlib.suppress(OSError):
            flood.result()


def test_half_a_handshake_message_does_not_hold_up_the_writer(house: House) -> None:
    """A peer that sends the first part of a KeyUpdate and stops ends the connection at the next write."""
    with forged(house) as (transport, forger):
        forger.send(Forger.APPLICATION_DATA, b"x")
        forger.send(Forger.HANDSHAKE, bytes([24, 0, 0, 1]))
        assert receive(transport, 1) == b"x"
        reader = Task(transport.receive_into, view())
        with pytest.raises(TransportError, match="first part"):
            send_until_it_fails(transport)
        transport.finish()
        kinds = set()
        with contextlib.suppress(EOFError):
            while True:
                kinds.add(forger.receive()[0])
        assert kinds <= {Forger.APPLICATION_DATA}, "no close_notify vouches for what was cut"
        transport.shutdown()
        with pytest.raises(TransportError, match="truncated"):
            reader.result()


def read_until_it_fails(transport: TlsTransport) -> None:
    while True:
        transport.receive_into(view(100))


def send_until_it_fails(transport: TlsTransport) -> None:
    while True:
        transport.send(b"y")


# --- threads ------------------------------------------------------------------------------------------------


def load(house: House, seconds: float) -> tuple[list[Watched], int]:
    """Full load both ways: on each end a reader, three writers that take turns, and one that flushes."""
    with session(house.server(), house.client()) as ends:
        watched = []
        for end in ends:
            stand_in = Watched(end._ssl)
            end._ssl = stand_in  # type: ignore[assignment]
            watched.append(stand_in)
        stop = time.monotonic() + seconds
        read = [0, 0]

        def write(end: TlsTransport, turn: threading.Lock, size: int) -> None:
            block = bytes(size)
            while time.monotonic() < stop:
                with turn:
                    end.send(block)

        def flush(end: TlsTransport, turn: threading.Lock) -> None:
            while time.monotonic() < stop:
                with turn:
                    end.send(b"")

        def drain(number: int) -> None:
            buffer = view(65536)
            while count := ends[number].receive_into(buffer):
                read[number] += count

        tasks = [Task(drain, number) for number in (0, 1)]
        writers = []
        for end in ends:
            turn = threading.Lock()
            writers += [Task(write, end, turn, size) for size in (9, 1000, 65545)] + [Task(flush, end, turn)]
        for writer in writers:
            writer.result(60)
        for end in ends:
            end.finish()
        for task in tasks:
            task.result()
        return watched, sum(read)


def test_never_two_threads_in_one_ssl_object(house: House) -> None:
    """Under full load in both directions no two threads are ever inside the same SSL object."""
    watched, read = load(house, float(os.environ.get("RTUNNEL_LOAD_SECONDS", "1")))
    assert [stand_in.most for stand_in in watched] == [1, 1]
    assert all(stand_in.calls > 1000 for stand_in in watched)
    assert read > MIB


def test_the_watch_sees_a_lock_that_is_not_held(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lock a writer does get into the SSL object beside the reader, so the test above can fail."""
    inside, leave = threading.Event(), threading.Event()

    class Slow(Watched):
        """Keeps the reader at the door, where OpenSSL is not yet called."""

        def feed(self, records: memoryview) -> None:
            def pause(_: memoryview) -> None:
                inside.set()
                leave.wait(10)

            self._call(pause, records)
            self._watched.feed(records)

    with session(house.server(), house.client()) as (server, client):
        slow = Slow(server._ssl)
        monkeypatch.setattr(server, "_ssl", slow)
        monkeypatch.setattr(server, "_lock", NoLock())
        reader = Task(server.receive_into, view())
        client.send(b"x")
        assert inside.wait(10)
        server.send(b"")
        assert slow.most == 2
        leave.set()
        assert reader.result() == 1


class NoLock:
    """A lock that locks nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def locked(self) -> bool:
        return True


def test_no_lock_is_held_while_anything_waits(house: House) -> None:
    """While the reader waits for bytes and a writer for room, the lock is free."""
    with session(house.server(), house.client()) as (server, client):
        reader = Task(server.receive_into, view())
        stuck = Task(lambda: server.send(bytes(64 * MIB)))  # nobody reads: more than sockets hold
        for _ in range(3):
            assert server._lock.acquire(timeout=5)
            server._lock.release()
        assert stuck.thread.is_alive()
        client.finish()
        assert reader.result() == 0
        server.shutdown()
        with pytest.raises(OSError, match=r"."):
            stuck.result()


def test_fifty_silent_connections_do_not_delay_a_good_one(house: House) -> None:
    """Each handshake has its own thread and its own SSL object: silent peers delay nobody (defect 5)."""
    context = house.server()
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(tcp_pair()) for _ in range(50)]
        tasks = [Task(lambda near=near: shake(near, context, 5)) for near, _ in silent]  # type: ignore[misc]
        start = time.monotonic()
        with session(context, house.client()) as (server, client):
            client.send(b"x")
            assert receive(server, 1) == b"x"
            assert time.monotonic() - start < 1
        for _, far in silent:
            far.close()
        for task in tasks:
            with pytest.raises(rtunnel_tls.HandshakeError):
                task.result()


def test_handshake_bytes_stay_within_the_first_flight_of_tcp(house: House, big_house: House) -> None:
    """Before the client is authenticated a server sends at most 10.4 kB, and 14.1 kB with the largest algorithms."""
    for home, profile, most in ((house, "default", 10_400), (big_house, "cnsa2", 14_100)):
        at_receive: list[int] = []

        class Noting(SocketCarrier):
            def receive_into(self, buffer: memoryview, noted: list[int] = at_receive) -> int:
                noted.append(self.sent)
                return super().receive_into(buffer)

        with tcp_pair() as (near, far):
            task = Task(shake, near, home.client(profile))
            TlsTransport.handshake(Noting(far), home.server(profile), within(5))
            task.result()
        assert 0 < max(at_receive) <= most, profile


def test_an_open_connection_has_no_timeout(house: House) -> None:
    """The handshake's deadline does not outlive it."""
    with session(house.server(), house.client()) as ends:
        assert [end._carrier.sock.gettimeout() for end in ends] == [None, None]  # type: ignore[attr-defined]


def test_no_secret_is_in_an_error_or_a_receipt(house: House) -> None:
    """What may be logged, receipts, contexts and errors, holds no key and no payload."""
    key = house.files("server")["key"].read_text().splitlines()[1]
    context = house.server()
    with session(context, house.client()) as (server, _client):
        shown = f"{server.receipt!r} {context!r} {server!r}"
    assert key not in shown
    assert "PRIVATE" not in shown


# --- finish, beside a reader --------------------------------------------------------------------------------


def test_finish_beside_a_reader(house: House) -> None:
    """`finish` while the reader waits: the peer gets close_notify, and the reader still gets what comes after."""
    for ours_first in (True, False):
        with session(house.server(), house.client()) as pair:
            ours, theirs = pair if ours_first else pair[::-1]
            reader = Task(receive, ours, 5)
            ours.finish()
            assert theirs.receive_into(view(1)) == 0
            theirs.send(b"later")
            theirs.finish()
            assert reader.result() == b"later"
            assert ours.receive_into(view(1)) == 0


def test_nothing_is_sent_after_finish(house: House) -> None:
    """What the reader causes then, answers to KeyUpdates, stays: the writer calls no more (`test_writer`)."""
    with forged(house) as (transport, forger):
        asked: list[int] = []
        transport.wants_flush = lambda: asked.append(1)
        transport.finish()
        assert forger.receive()[0] == Forger.ALERT
        updates = [forger.key_update(request=True) for _ in range(2)]  # OpenSSL answers one when the next has come
        forger.sock.sendall(b"".join(updates) + forger.record(Forger.APPLICATION_DATA, b"x"))
        assert receive(transport, 1) == b"x"
        assert transport._ssl.unsent()
        assert asked
        with pytest.raises(EOFError):
            forger.receive()
        with pytest.raises(TransportError):
            transport.send(b"frame")


def test_finish_after_a_failure_sends_the_alert_and_no_close_notify(house: House) -> None:
    """A close_notify would vouch for a stream that was cut."""
    with forged(house) as (transport, forger):
        forger.sock.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(TransportError, match="bad record mac"):
            receive(transport, 1)
        transport.finish()
        kind, content = forger.receive()
        assert (kind, content) == (Forger.ALERT, b"\x02\x14")
        with pytest.raises(EOFError):
            forger.receive()


def test_a_flood_of_key_updates_after_finish_ends_the_connection(house: House) -> None:
    """The answers that wait for nobody are bounded too."""
    with forged(house) as (transport, forger):
        transport.finish()
        task = Task(lambda: [forger.sock.sendall(forger.key_update(request=True)) for _ in range(20_000)])
        with pytest.raises((TransportError, OSError)):
            receive(transport, 1)
        assert transport._ssl.unsent() < rtunnel_tls.MAX_UNSENT_BYTES + rtunnel_tls.INCOMING_BYTES
        transport.shutdown()
        with contextlib.suppress(OSError):
            task.result()
