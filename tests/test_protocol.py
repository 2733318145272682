"""PROTOCOL.md held to the program, and the program to its rules: streams, ends, errors, limits."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import Factory
from naive_peer import CLOSE_CONN, DATA, EOF, INIT, NEW_CONN, NaivePeer, frame
from support import (
    ROOT,
    Service,
    Sink,
    connect,
    echo_service,
    ends_with,
    eventually,
    read_all,
    read_exactly,
    running,
)
from test_interop_level0 import ControlPort, check_echo, check_serves, leased, name_of, read_init
from vector_files import SESSIONS

import rtunnel

DOCUMENT = (ROOT / "PROTOCOL.md").read_text()

# --- the document ------------------------------------------------------------------------------------------


def test_every_rule_is_named_by_a_test() -> None:
    """Each rule of PROTOCOL.md has a test whose docstring names it, or a session's vector, each of which is played to
    an end; and none names a rule that is not there."""
    rules = re.findall(r"^- \*\*\[([A-Z]-\d+)\]\*\*", DOCUMENT, re.M)
    assert len(rules) == len(set(rules))
    named: set[str] = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        for docstring in re.findall(r'^    """(.*?)"""', path.read_text(), re.M | re.S):
            named.update(re.findall(r"\[([A-Z]-\d+)\]", docstring))
    named.update(rule for case in SESSIONS for rule in case.rules)
    assert named == set(rules)


def test_the_documents_references_exist() -> None:
    """Each rule that PROTOCOL.md refers to is one of its rules."""
    rules = set(re.findall(r"^- \*\*\[([A-Z]-\d+)\]\*\*", DOCUMENT, re.M))
    assert set(re.findall(r"\[([A-Z]-\d+)\]", DOCUMENT)) <= rules
    assert set(re.findall(r"\| ([A-Z]-\d+) \|", DOCUMENT)) <= rules


CONSTANTS = {
    "payload of any frame but DATA": rtunnel.MAX_CONTROL_PAYLOAD_BYTES,
    "payload of DATA, accepted": rtunnel.MAX_DATA_PAYLOAD_BYTES,
    "DATA frame, sent, header included": rtunnel.FRAME_SENT_BYTES,
    "unknown frames before INIT": rtunnel.MAX_UNKNOWN_FRAMES_BEFORE_INIT,
    "from accept to session": rtunnel.HELLO_TIMEOUT_S,
    "silence that makes a client of the global port": rtunnel.SILENT_CLIENT_S,
    "message of a refusal": rtunnel.MAX_MESSAGE_CHARACTERS,
    "dialling the local service": rtunnel.DIAL_TIMEOUT_S,
    "queue of a stream, level 0": rtunnel.LEVEL_0_QUEUE_BYTES,
    "waiting for a full queue, level 0": rtunnel.LEVEL_0_WAIT_S,
    "highest id": rtunnel.MAX_STREAM_ID,
    "reason": rtunnel.MAX_REASON_BYTES,
    "from our FIN to the socket's own end, level 0": rtunnel.LINGER_S,
    "credit": rtunnel.MAX_CREDIT_BYTES,
    "window, at the start": rtunnel.WINDOW_BYTES,
    "window, at most": rtunnel.MAX_WINDOW_BYTES,
    "window, at most, near": rtunnel.NEAR_WINDOW_BYTES,
    "window, at most, for each second of round trip": rtunnel.LINK_BYTES_PER_S,
    "growth of all windows of a session": rtunnel.SESSION_BUDGET_BYTES,
    "queue that does not move": rtunnel.STALL_S,
    "heartbeat": rtunnel.HEARTBEAT_S,
    "heartbeats without a byte": rtunnel.HEARTBEATS_TO_DEATH,
    "PINGs that are remembered": rtunnel.MAX_PINGS,
    "transport that takes no byte": rtunnel.WRITE_TIMEOUT_S,
    "unsent control frames": rtunnel.MAX_UNSENT_BYTES,
    "sessions of a client beyond its mappings": rtunnel.MAX_RETIRED,
    "after `replaced`": rtunnel.REPLACED_RETRY_S,
    "half-ended stream that does not move": rtunnel.STUCK_S,
    "lease without a session": rtunnel.LEASE_LINGER_S,
    "first wait of a client": rtunnel.FIRST_RETRY_S,
    "the same, connection refused, at most": rtunnel.REFUSED_RETRY_S,
    "session is open without a frame": rtunnel.LIVED_S,
    "after a last frame": rtunnel.FAREWELL_S,
}


def test_the_documents_limits_are_the_programs() -> None:
    """The table of limits has the program's constants."""
    section = DOCUMENT.partition("## 12.")[2].partition("## 13.")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d,]+)(?: bytes| s)? \| [A-Z]-\d+(?:, [A-Z]-\d+)* \|$", section, re.M)
    assert {name: float(value.replace(",", "")) for name, value in rows} == CONSTANTS


# --- streams -------------------------------------------------------------------------------------------------


def test_frames_are_at_most_64_kib(server: Factory) -> None:
    """[F-2]: however fast a visitor sends, no DATA frame is empty or longer than 64 KiB."""
    with leased(server()) as (peer, public), connect(public) as visitor:
        peer.expect(NEW_CONN, 1)
        sent = bytes(range(256)) * 16384  # 4 MiB
        with running(lambda: visitor.sendall(sent)):
            peer.expect_data(1, sent)


def test_the_client_with_the_fewest_streams(server: Factory) -> None:
    """[O-8]: visitors of the global port spread evenly over its clients, and an end makes room."""
    program = server("--public-listen", "127.0.0.1:0")
    with ExitStack() as stack:
        peers = [stack.enter_context(NaivePeer.connect(program.control_address)) for _ in range(3)]
        for peer in peers:
            peer.send_init(b"0:h:1")
            program.wait_for("session-opened", peer=name_of(peer.sock))
        for count in range(1, 10):
            stack.enter_context(connect(program.public_address))
            program.wait_for_count(count, "stream-opened")
        for peer in peers:
            for stream in (1, 2, 3):
                peer.expect(NEW_CONN, stream)
        peers[1].send_frame(CLOSE_CONN, 2, b"reset")
        peers[1].expect(CLOSE_CONN, 2)
        program.wait_for("stream-closed", stream=2)
        while not program.state()["visitors"].startswith("8/"):
            continue
        stack.enter_context(connect(program.public_address))
        peers[1].expect(NEW_CONN, 4)


def in_syn_sent(port: int) -> bool:
    """True while somebody dials this port on loopback and has no answer. Linux only."""
    wanted = f":{port:04X} 02 "
    return any(wanted in line for line in Path("/proc/net/tcp").read_text().splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="fills a listen queue, which only Linux tells of")
def test_defect_11_dialling_blocks_no_other_stream(client: Factory) -> None:
    """[S-3], defect 11: while one stream dials, others are served; its DATA waits and arrives in order."""
    with socket.socket() as listener, ExitStack() as stack, ControlPort() as port:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        stack.enter_context(connect(listener.getsockname()))  # fills the queue: the next has no answer
        client("--server", port.text, "--local", name_of(listener))
        peer = stack.enter_context(port.accept())
        read_init(peer, name_of(listener))
        peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"one ") + frame(DATA, 1, b"two ") * 1000)
        eventually(lambda: in_syn_sent(listener.getsockname()[1]))
        listener.listen(16)
        stack.enter_context(listener.accept()[0])
        peer.send(frame(NEW_CONN, 2) + frame(DATA, 2, b"ping"))
        second = stack.enter_context(listener.accept()[0])  # the first asks again a second after its first try
        assert read_exactly(second, 4) == b"ping"
        second.sendall(b"pong")
        peer.expect(DATA, 2, b"pong")
        first = stack.enter_context(listener.accept()[0])
        assert read_exactly(first, 4004) == b"one " + b"two " * 1000


@pytest.mark.skipif(sys.platform != "linux", reason="fills a listen queue, which only Linux tells of")
def test_a_local_service_that_does_not_answer(client: Factory) -> None:
    """[S-3], [E-6]: dialling has a limit, and its end has a reason."""
    with socket.socket() as listener, ControlPort() as port:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with connect(listener.getsockname()):
            client("--server", port.text, "--local", name_of(listener), limits={"DIAL_TIMEOUT_S": 0.2})
            with port.accept() as peer:
                read_init(peer, name_of(listener))
                peer.send_frame(NEW_CONN, 1)
                assert peer.read_close(1)


def test_a_second_close_conn_prolongs_nothing(server: Factory) -> None:
    """[E-7]: a socket that does not answer our FIN is closed after LINGER_S, also where CLOSE_CONN came twice before
    all was written."""
    program = server(limits={"LINGER_S": 0.1})
    with leased(program) as (peer, public), connect_small(public) as visitor:
        peer.expect(NEW_CONN, 1)

        def send_all() -> None:
            for _ in range(256):  # more than the kernel takes
                peer.send_frame(DATA, 1, bytes(1 << 15))
            peer.send(2 * frame(CLOSE_CONN, 1))

        with running(send_all):
            received = 0
            while part := visitor.recv(1 << 18):  # slowly: something is queued when the end comes
                received += len(part)
                time.sleep(0.002)
        assert received == 1 << 23
        program.wait_for("stream-closed")


def test_a_slow_visitor_is_not_cut_short(server: Factory) -> None:
    """[S-4], [E-4]: what is queued when CLOSE_CONN comes reaches a visitor that reads later, then a clean end."""
    program = server(limits={"LINGER_S": 0.1})
    sent = bytes(range(251)) * 33000  # 8 MB: more than all buffers between
    answered = threading.Event()
    with leased(program) as (peer, public), connect_small(public) as visitor:
        peer.expect(NEW_CONN, 1)

        def send_all() -> None:
            for at in range(0, len(sent), 65536):
                peer.send_frame(DATA, 1, sent[at : at + 65536])
            peer.send_frame(CLOSE_CONN, 1)
            peer.expect(CLOSE_CONN, 1)
            answered.set()

        with running(send_all):
            received = bytearray()
            while not answered.wait(0.001) and len(received) < len(sent):
                received += visitor.recv(1 << 16)
            assert not threading.Event().wait(0.5)  # the visitor pauses for five times LINGER_S
            received += read_all(visitor)
        assert received == sent


def connect_small(address: tuple[str, int]) -> socket.socket:
    """A connection with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    sock.settimeout(10.0)
    sock.connect(address)
    return sock


def test_a_visitor_that_never_reads(server: Factory) -> None:
    """[S-6]: a full queue is waited for, then its stream alone ends with `stalled`, and memory stays bounded."""
    program = server(limits={"LEVEL_0_WAIT_S": 0.3})
    with leased(program) as (peer, public), ExitStack() as stack:
        stuck = stack.enter_context(connect_small(public))
        peer.expect(NEW_CONN, 1)
        other = stack.enter_context(connect(public))
        peer.expect(NEW_CONN, 2)
        before = program.memory_bytes() if sys.platform == "linux" else 0
        for _ in range(400):
            peer.send_frame(DATA, 1, bytes(65536))  # 25 MiB; blocks while the server waits
        assert peer.read_close(1) == b"stalled"
        peer.send_frame(DATA, 2, b"still here")
        assert read_exactly(other, 10) == b"still here"
        assert ends_with(stuck) == "reset"
        if sys.platform == "linux":
            assert program.memory_bytes() - before < 8 << 20


def test_an_end_without_the_others_answer(server: Factory) -> None:
    """[E-7]: a stream is gone whether or not its CLOSE_CONN is answered, and whether or not the visitor leaves."""
    program = server(limits={"LINGER_S": 0.1})
    with leased(program) as (peer, public):
        with connect(public):
            peer.expect(NEW_CONN, 1)
        peer.expect(CLOSE_CONN, 1)
        program.wait_for("stream-closed", stream=1)  # the peer never answers
        with connect(public) as visitor:
            peer.expect(NEW_CONN, 2)
            peer.send(frame(DATA, 2, b"bye") + frame(CLOSE_CONN, 2))
            assert read_all(visitor) == b"bye"
            peer.expect(CLOSE_CONN, 2)
            program.wait_for("stream-closed", stream=2)  # the visitor never leaves


def test_no_frame_behind_close_conn(server: Factory) -> None:
    """[E-1]: of a stream whose visitor goes on sending, nothing follows the CLOSE_CONN that answers the peer's."""
    pieces = [50, 400, 3000, 10_000, 40_000, 200_000]  # small frames are queued, large ones wait for their turn
    stop = threading.Event()

    def flood(sock: socket.socket, piece: bytes) -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                sock.sendall(piece)

    with leased(server()) as (peer, public), ExitStack() as stack:
        visitors = [stack.enter_context(connect(public)) for _ in pieces]
        for number, visitor in enumerate(visitors, 1):
            peer.expect(NEW_CONN, number)
            visitor.settimeout(0.5)
        for visitor, size in zip(visitors, pieces, strict=True):
            stack.enter_context(running(functools.partial(flood, visitor, bytes(size)), stop.set))
        closed: set[int] = set()
        asked = count = 0
        while len(closed) < len(pieces):
            if count % 100 == 0 and asked < len(pieces):
                asked += 1
                peer.send(frame(DATA, asked, b"x") + frame(CLOSE_CONN, asked))
            type, stream, payload = peer.read_frame()
            assert stream not in closed, f"frame of type {type} behind the CLOSE_CONN of stream {stream}"
            if type == CLOSE_CONN:
                assert payload == b""
                closed.add(stream)
            count += 1
        peer.expect_silence(0.1)


def test_the_end_of_a_half_closed_request(server: Factory) -> None:
    """[E-2]: a visitor's end of file is a bare CLOSE_CONN behind all that it sent."""
    with leased(server()) as (peer, public), connect(public) as visitor:
        peer.expect(NEW_CONN, 1)
        visitor.sendall(b"x" * 300_000)
        visitor.shutdown(socket.SHUT_WR)
        peer.expect_data(1, b"x" * 300_000)
        peer.expect(CLOSE_CONN, 1)


# --- protocol errors -----------------------------------------------------------------------------------------

TOO_LONG = {
    "an INIT of 4,097 bytes": bytes.fromhex("04 00000000 00001001"),
    "DATA of 1 MiB and a byte": bytes.fromhex("02 00000001 00100001"),
    "an unknown frame of 4 GiB": bytes.fromhex("7f 00000001 ffffffff"),
    "an HTTP request": b"GET / HTTP/1.1\r\n\r\n",
}


def test_protocol_errors_end_the_session_on_the_server(server: Factory) -> None:
    """[O-9], [X-1], [X-2]: each error closes its control connection, resets its visitors and is one line."""
    errors = {
        "a second INIT": frame(INIT, 0, b"0:h:1"),
        "the server's frame": frame(NEW_CONN, 2),
        "a frame of level 1": frame(EOF, 1),
        **TOO_LONG,
    }
    program = server(limits={"FAREWELL_S": 0.1})
    with leased(program) as (neighbour, neighbours_port):
        for number, (name, said) in enumerate(errors.items(), 1):
            with leased(program) as (peer, public), connect(public) as visitor:
                peer.expect(NEW_CONN, 1)
                peer.send_frame(DATA, 1, b"x")
                assert read_exactly(visitor, 1) == b"x"
                peer.send(said)
                peer.expect_end()
                assert ends_with(visitor) == "reset", name
                assert program.wait_for("session-closed", peer=name_of(peer.sock))["reason"]
            check_serves(neighbour, neighbours_port, number)
        assert len(program.events("session-closed")) == len(errors)
        assert not program.events("refused")
        assert not [record for record in program.records if record.level == "ERROR"]


def test_protocol_errors_end_the_session_on_the_client(client: Factory) -> None:
    """[O-9], [S-2], [X-1], [X-3]: each error closes the control connection, and the client comes again."""
    errors = {
        "INIT": frame(INIT, 0, b"0:h:1"),
        "NEW_CONN for id 0": frame(NEW_CONN, 0),
        "NEW_CONN for an open stream": frame(NEW_CONN, 1),
        "a frame of level 1": frame(EOF, 1),
        **TOO_LONG,
    }
    sinks: list[Sink] = []

    def handle(sock: socket.socket) -> None:
        sinks.append(Sink())
        sock.sendall(b"x")
        sinks[-1](sock)

    with Service(handle) as service, ControlPort() as port:
        program = client(
            "--server", port.text, "--local", service.text, limits={"FIRST_RETRY_S": 0.01, "FAREWELL_S": 0.1}
        )
        for name, said in errors.items():
            with port.accept() as peer:
                read_init(peer, service.text)
                peer.send_frame(NEW_CONN, 1)
                peer.expect(DATA, 1, b"x")
                peer.send(said)
                peer.expect_end()
                assert sinks[-1].ended.wait(10)
                assert sinks[-1].end == "reset", name
                assert program.wait_for("session-closed")["reason"]


def test_the_client_comes_again(client: Factory) -> None:
    """[X-3]: the wait doubles with each attempt, has a maximum, and begins again after a session that lived."""
    with echo_service() as service, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10.0)
        limits = {"FIRST_RETRY_S": 0.1}
        program = client(
            "--server", name_of(listener), "--local", service.text, "--reconnect-max", "0.3", limits=limits
        )
        waits = []
        for _ in range(4):
            listener.accept()[0].close()
            waits.append(float(program.wait_for("session-closed")["retry_s"]))
        for wait, highest in zip(waits, (0.1, 0.2, 0.3, 0.3), strict=True):
            assert 0.7 * highest <= wait <= highest
        with NaivePeer(listener.accept()[0]) as peer:
            read_init(peer, service.text)
            check_echo(peer, 1)
        assert float(program.wait_for("session-closed")["retry_s"]) <= 0.1


def test_the_client_of_a_server_that_restarts(client: Factory) -> None:
    """[X-3]: where the connection is refused, the wait has a lower maximum."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = name_of(listener)
    limits = {"FIRST_RETRY_S": 0.05, "REFUSED_RETRY_S": 0.1}
    program = client("--server", address, "--local", "127.0.0.1:9", limits=limits)
    waits = [float(program.wait_for("connect-failed")["retry_s"]) for _ in range(5)]
    assert waits[0] <= 0.05
    assert 0.07 <= waits[-1] <= 0.1


def test_no_peer_forges_a_log_line(server: Factory) -> None:
    """[E-3]: what a peer sends is escaped in the log, whatever it is."""
    evil = b'x" level=0\r\n2026-11-22T16:17:10.123Z ERROR forged peer="\x1b[2J\xff\x00\\'
    program = server()
    with leased(program, b"0:" + evil) as (peer, public):
        for stream, reason in enumerate((b"\n" + evil, evil * 9), 1):
            with connect(public) as visitor:
                peer.expect(NEW_CONN, stream)
                peer.send_frame(CLOSE_CONN, stream, reason)
                assert ends_with(visitor) == "reset"
                peer.expect(CLOSE_CONN, stream)
    with NaivePeer.connect(program.control_address) as stranger:
        stranger.send_init(evil)
        stranger.expect_end()
        program.wait_for("refused")
    program.wait_for("session-closed")
    assert program.stop() == 0
    assert len(program.records) == len(program.lines), "a line that is no event"
    assert not program.events("forged")
    assert "\x1b" not in "".join(program.lines)


def test_idle_ends_use_no_processor(server: Factory, client: Factory) -> None:
    """An idle tunnel with an idle stream uses no processor time."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    with echo_service() as service:
        listening = server()
        host, port = listening.control_address
        dialling = client("--server", f"{host}:{port}", "--local", service.text)
        with connect(listening.lease_address()) as visitor:
            visitor.sendall(b"x")
            assert read_exactly(visitor, 1) == b"x"
            before = [p.cpu_seconds() for p in (listening, dialling)]
            threading.Event().wait(1.0)
            after = [p.cpu_seconds() for p in (listening, dialling)]
        assert [b - a <= 0.03 for a, b in zip(before, after, strict=True)] == [True, True]
