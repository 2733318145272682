"""Level 1 against a peer that is written from PROTOCOL.md alone: what breaks a rule, and what keeps them all."""

from __future__ import annotations

import contextlib
import re
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from conftest import Factory
from naive_peer import (
    BLOCKED,
    CLOSE_CONN,
    DATA,
    EOF,
    GOAWAY,
    INIT,
    NEW_CONN,
    PING,
    PONG,
    WELCOME,
    WINDOW,
    Level1Peer,
    NaivePeer,
    frame,
    init_text,
    lines_of,
)
from support import (
    ROOT,
    Address,
    Program,
    Service,
    connect,
    echo_service,
    ends_with,
    eventually,
    read_all,
    read_exactly,
    reset,
    running,
)
from tunnels import closed_port, text, visit
from vector_files import FRAMES, SESSIONS, Case

KIB = 1024
WINDOW_BYTES = 64 * KIB
DOCUMENT = (ROOT / "PROTOCOL.md").read_text()


def name_of(peer: NaivePeer) -> str:
    """A peer's address, as the server logs it."""
    return text(peer.sock.getsockname())


def number(payload: bytes) -> int:
    return int.from_bytes(payload, "big")


# --- the vectors of sessions ---------------------------------------------------------------------------------


def test_each_protocol_error_has_a_vector() -> None:
    """Each rule of PROTOCOL.md that makes something a protocol error, or has it refused with a code, is shown by a
    vector that breaks it; and each vector of a session cites rules that are there."""
    rules = dict(re.findall(r"^- \*\*\[([A-Z]-\d+)\]\*\* (.*)$", DOCUMENT, re.M))
    marks = re.compile("protocol error|MUST be refused with")
    wanted = {rule for rule, said in rules.items() if marks.search(said) and not rule.startswith("X")}
    broken = {rule for case in (*FRAMES, *SESSIONS) if case.error or case.refusal for rule in case.rules}
    assert wanted <= broken
    assert all(case.rules and set(case.rules) <= set(rules) for case in SESSIONS)


def play(case: Case, peer: NaivePeer) -> None:
    """Send the bytes, and hear what comes back until the end, or until the session has shown that it goes on."""
    with contextlib.suppress(ConnectionError):  # the other end has heard enough
        peer.send(case.raw)
    hear = peer.hear if isinstance(peer, Level1Peer) else peer.read_frame
    if isinstance(peer, Level1Peer):
        peer.unanswered += [payload for type, _, payload, _ in case.events if type == PONG]
    if case.refusal:
        type, stream, payload = hear()
        assert (type, stream) == (WELCOME, 0)
        assert lines_of(payload)["error"] == case.refusal
        assert 1 <= len(lines_of(payload)["message"]) <= 256
        peer.expect_end()
        return
    for event in case.events:
        got = hear()
        while got[0] == PING:  # before WELCOME is understood a NaivePeer plays
            got = hear()
        assert (*got, 0) == event
    if case.error:
        until_end(peer)
    elif isinstance(peer, Level1Peer):
        peer.check_alive()


def until_end(peer: NaivePeer) -> None:
    """Read what still comes, until the other end closes."""
    with contextlib.suppress(EOFError, ConnectionError):
        while peer.read_frame():
            continue


class ToServer:
    """A server that is sent vectors, beside a session that must not notice."""

    def __init__(self) -> None:
        limits = {"LEASE_LINGER_S": 0.1, "LOG_BURST": 100_000}
        self.program = Program("server", "--control-listen", "127.0.0.1:0", "--public-bind", "127.0.0.1", limits=limits)
        self.neighbour = Level1Peer.as_client(self.program.control_address)
        self.visitor = connect(self.neighbour.public)
        assert self.neighbour.hear_visitor() == 1

    def close(self) -> None:
        self.visitor.close()
        self.neighbour.sock.close()
        self.program.kill()

    def play(self, case: Case) -> None:
        control = self.program.control_address
        before = self.program.skip_lines()  # of other cases, whose port a peer may have again
        with ExitStack() as stack:
            if case.after.startswith("level 1"):
                peer: NaivePeer = stack.enter_context(Level1Peer.as_client(control))
            else:
                peer = stack.enter_context(NaivePeer.connect(control))
                if case.after != "nothing":
                    peer.send_init(b"0:h:1")
            name = name_of(peer)
            if case.after.endswith("stream 1"):
                public = self.program.session_address(peer=name)
                visitor = stack.enter_context(connect_small(public))
                assert peer.read_frame()[:2] in ((NEW_CONN, 1), (PING, 0))
                if isinstance(peer, Level1Peer) and not peer.visitors:
                    peer.hear_visitor()
                if "stalled" not in case.after:
                    stack.enter_context(running(lambda: ends_with(visitor), peer.sock.close))
            play(case, peer)
        event = "refused" if case.after == "nothing" else "session-closed"
        assert case.error in self.program.wait_for(event, peer=name)["reason"]
        own = [each for each in self.program.records[before:] if each.fields.get("peer") == name]
        assert sum(each.level == "WARNING" or each.event == "session-closed" for each in own) == 1
        self.visitor.sendall(b"still here")
        assert self.neighbour.hear_data(1, 10) == b"still here"
        self.neighbour.send_data(1, b"and here")
        assert read_exactly(self.visitor, 8) == b"and here"


def connect_small(address: Address) -> socket.socket:
    """A connection with a small receive buffer."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    sock.settimeout(10.0)
    sock.connect(address)
    return sock


class ToClient:
    """A client that is sent vectors: it dials again after each."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10.0)
        self._services = {kind: Service(handle) for kind, handle in (("takes", self._take), ("stalled", self._hang))}
        server = text(self._listener.getsockname())
        forward = [f"0:{self._services['takes'].text}", f"0:{self._services['stalled'].text}"]
        flags = ("--forward", forward[0], "--forward", forward[1], "--reconnect-max", "0.05")
        self.program = Program(
            "client", "--server", server, *flags, limits={"FIRST_RETRY_S": 0.01, "REPLACED_RETRY_S": 0.01}
        )

    @classmethod
    def _take(cls, sock: socket.socket) -> None:
        """Read all, and do not end: a stream that has ended both ways drops what a vector says is wrong."""
        if ends_with(sock) == "eof":
            cls._hang(sock)

    @staticmethod
    def _hang(sock: socket.socket) -> None:
        """Read nothing, until the connection is reset."""
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        poll = select.poll()
        poll.register(sock, 0)
        poll.poll(10_000)

    def close(self) -> None:
        self.program.kill()
        self._listener.close()
        for service in self._services.values():
            service.__exit__()

    def accept(self, case: Case) -> NaivePeer:
        """The next session of the mapping that the case wants; its INIT is read."""
        wanted = self._services["stalled" if "stalled" in case.after else "takes"].text
        while True:
            accepted, _ = self._listener.accept()
            peer = Level1Peer(accepted, plays="server", window=WINDOW_BYTES)
            type, _, payload = peer.read_frame()
            assert type == INIT
            if payload.split(b"\n")[0] == f"0:{wanted}".encode():
                peer.lines = lines_of(payload)
                return peer if case.after.startswith("level 1") else NaivePeer(accepted)
            accepted.close()

    def play(self, case: Case) -> None:
        with self.accept(case) as peer:
            if isinstance(peer, Level1Peer):
                peer.send_frame(WELCOME, 0, b"version=1\nport=4711\nwindow=65536")
                if case.after.endswith("stream 1"):
                    peer.open(1)
            elif case.after.endswith("stream 1"):
                peer.send_frame(NEW_CONN, 1)
            play(case, peer)
        if case.error:
            eventually(lambda: self._closed(case.error), what=case.error)
        assert not [each for each in self.program.records if each.level == "ERROR"]

    def _closed(self, words: str) -> bool:
        """Whether the log has a line, not seen before, of a session that ended for this reason."""
        with contextlib.suppress(AssertionError):
            while words not in self.program.wait_for("session-closed", 0.0)["reason"]:
                continue
            return True
        return False


@pytest.fixture(scope="module")
def to_server() -> Iterator[ToServer]:
    tested = ToServer()
    yield tested
    tested.close()


@pytest.fixture(scope="module")
def to_client() -> Iterator[ToClient]:
    tested = ToClient()
    yield tested
    tested.close()


@pytest.mark.parametrize("case", [case for case in SESSIONS if case.to == "server"], ids=lambda case: case.name)
def test_what_a_server_is_sent(to_server: ToServer, case: Case) -> None:
    """[X-1], [X-2]: each vector has the answer that it says; an error ends its session with one line in the log, and
    a session beside it goes on."""
    to_server.play(case)


@pytest.mark.parametrize("case", [case for case in SESSIONS if case.to == "client"], ids=lambda case: case.name)
def test_what_a_client_is_sent(to_client: ToClient, case: Case) -> None:
    """[X-1], [X-3]: each vector has the answer that it says; an error ends its session with one line in the log, and
    the client comes again."""
    to_client.play(case)


# --- ends for the tests below ----------------------------------------------------------------------------------


@contextmanager
def welcomed(program: Program, port: int = 0, **options: str) -> Iterator[Level1Peer]:
    """A client of level 1 with a lease of its own."""
    with Level1Peer.as_client(program.control_address, port, **options) as peer:  # type: ignore[arg-type]
        yield peer


class ControlPort:
    """A control port of ours that a client under test dials; `accept` welcomes it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(10.0)
        self.text = text(self._listener.getsockname())

    def accept_silently(self) -> NaivePeer:
        return NaivePeer(self._listener.accept()[0])

    def accept(self, window: int = WINDOW_BYTES) -> Level1Peer:
        return Level1Peer.as_server(self._listener.accept()[0], window=window)

    def __enter__(self) -> ControlPort:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


@contextmanager
def dialled(client: Factory, local: Service | Address, *flags: str, **limits: float) -> Iterator[Level1Peer]:
    """The server's side of a session with our client at level 1."""
    address = local.address if isinstance(local, Service) else local
    with ControlPort() as port:
        client("--server", port.text, "--local", text(address), *flags, limits=limits)
        with port.accept() as peer:
            yield peer


Far = tuple[Level1Peer, socket.socket]


@pytest.fixture
def pong_delay_s(request: pytest.FixtureRequest) -> float:
    """How long the peer takes to answer a PING: its distance."""
    delay_s: float = getattr(request, "param", 0.0)
    return delay_s


@pytest.fixture(params=["server", "client"])
def far(request: pytest.FixtureRequest, server: Factory, client: Factory, pong_delay_s: float) -> Iterator[Far]:
    """Stream 1 of a session of level 1 with a server, and with a client: the peer that the test plays, and the socket
    at the other end's far side, with a small receive buffer."""
    with ExitStack() as stack:
        if request.param == "server":
            peer = stack.enter_context(welcomed(server()))
            peer.pong_delay_s = pong_delay_s
            sock = stack.enter_context(connect_small(peer.public))
            assert peer.hear_visitor() == 1
        else:
            listener = stack.enter_context(socket.socket())
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.settimeout(10.0)
            peer = stack.enter_context(dialled(client, listener.getsockname()))
            peer.pong_delay_s = pong_delay_s
            peer.open(1)
            sock = stack.enter_context(listener.accept()[0])
            sock.settimeout(10.0)
        yield peer, sock


# --- the level ---------------------------------------------------------------------------------------------------


def test_a_client_that_announces_level_1(server: Factory) -> None:
    """[N-1], [N-3], [O-1], [S-8]: WELCOME is the server's first frame, with the port; visitors come behind it, also
    those who were there before, and NEW_CONN says who they are."""
    program = server()
    with welcomed(program) as peer:
        assert set(peer.lines) == {"version", "port", "window"}
        assert (peer.lines["version"], peer.lines["window"]) == ("1", "65536")
        with connect(peer.public) as visitor:
            peer.hear_visitor()
            assert peer.visitors[1] == text(visitor.getsockname())
    assert program.wait_for("session-opened")["level"] == "1"


def test_a_visitor_by_ipv6(server: Factory) -> None:
    """[S-8]: an IPv6 visitor stands in brackets; one by IPv4 on a port for both is shown as IPv4."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 loopback")
    program = server("--public-bind", "::")
    with welcomed(program) as peer:
        with connect(("::1", peer.public[1])) as visitor:
            peer.hear_visitor()
            assert peer.visitors[1] == f"[::1]:{visitor.getsockname()[1]}"
            peer.send_frame(CLOSE_CONN, 1)
            assert ends_with(visitor) == "reset"
        with connect(peer.public) as visitor:
            peer.hear_visitor()
            assert peer.visitors[2] == text(visitor.getsockname())


def test_a_newer_client(server: Factory) -> None:
    """[N-1], [N-4]: of a version that it does not know yet, of unknown keys and of doubled ones the server takes what
    it understands."""
    program = server()
    with NaivePeer.connect(program.control_address) as peer:
        lines = b"version=7\ncolour=red\n=\n\ninstance=x\nwindow=1\nwindow=65536\ninstance=" + b"0a" * 16
        peer.send_init(b"0:h:1\n" + lines + b"\nno pair\n\xc3\xbc=\xc3\xbc\n")
        type, _, payload = peer.read_frame()
        assert (type, lines_of(payload)["version"]) == (WELCOME, "1")


def test_a_client_of_level_0_gets_no_answer(server: Factory) -> None:
    """[N-1], [F-9]: after an INIT without `version` the server says nothing but the frames of level 0."""
    program = server("--heartbeat", "0.05")
    with NaivePeer.connect(program.control_address) as peer:
        peer.send_init(b"0:h:1\ncolour=red")
        public = program.session_address(level=0)
        with connect(public):
            peer.expect(NEW_CONN, 1)
            peer.expect_silence(0.2)


def test_a_late_init(server: Factory) -> None:
    """[N-1], [O-7]: a client of the global port that has had no visitor yet announces level 1 late, and gets it; one
    that has had NEW_CONN stays at level 0: no WELCOME, no PING, and its streams go on."""
    program = server("--public-listen", "127.0.0.1:0", "--heartbeat", "0.1", limits={"SILENT_CLIENT_S": 0.1})
    public = program.public_address
    with NaivePeer.connect(program.control_address) as old:
        program.wait_for("session-opened", peer=name_of(old), level=0)
        with connect(public) as visitor:
            old.expect(NEW_CONN, 1)
            old.send_init(init_text())
            program.wait_for("session-opened", peer=name_of(old), level=0, local="127.0.0.1:80")
            old.send_frame(DATA, 1, b"hello")
            assert read_exactly(visitor, 5) == b"hello"
            with connect(public):
                old.expect(NEW_CONN, 2)
            old.expect(CLOSE_CONN, 2)
            old.expect_silence(0.2)
        old.expect(CLOSE_CONN, 1)
    with Level1Peer(connect(program.control_address), plays="client", window=WINDOW_BYTES) as late:
        program.wait_for("session-opened", peer=name_of(late), level=0)
        late.send_init(init_text())
        late.hear_welcome()
        program.wait_for("session-opened", peer=name_of(late), level=1)
        with connect(public) as visitor:
            late.hear_visitor()
            late.send_data(1, b"hello")
            assert read_exactly(visitor, 5) == b"hello"
            late.check_alive()


def test_an_init_that_races_with_a_visitor(server: Factory) -> None:
    """[N-1], [N-3]: whichever comes first, INIT or the visitor of a client that was silent, both ends have one level:
    WELCOME is the server's first frame, or never comes."""
    program = server("--public-listen", "127.0.0.1:0", limits={"SILENT_CLIENT_S": 0.02})
    seen = set()
    for attempt in range(30):
        with Level1Peer(connect(program.control_address), plays="client", window=WINDOW_BYTES) as peer:
            program.wait_for("session-opened", peer=name_of(peer))
            with ExitStack() as stack:
                if attempt % 2:
                    stack.enter_context(connect(program.public_address))
                peer.send_init(init_text())
                stack.enter_context(connect(program.public_address))
                first = NaivePeer.read_frame(peer)
                seen.add(first[0])
                if first[0] == WELCOME:
                    peer.lines = lines_of(first[2])
                    while peer.hear()[0] != NEW_CONN:  # which judges each
                        continue
                else:
                    assert first == (NEW_CONN, 1, b"")
                    peer.sock.settimeout(0.02)
                    with contextlib.suppress(TimeoutError):
                        while (got := NaivePeer.read_frame(peer))[2] == b"":
                            assert got[0] in (NEW_CONN, CLOSE_CONN)
        program.wait_for("session-closed", peer=name_of_closed(program))
    assert seen == {WELCOME, NEW_CONN}


def name_of_closed(program: Program) -> str:
    """Of the session that was opened last."""
    return program.events("session-opened")[-1]["peer"]


def test_the_servers_first_frame_fixes_the_clients_level(client: Factory) -> None:
    """[N-2], [E-2]: a client that gets NEW_CONN first is at level 0: it sends no frame of level 1, needs no credit,
    and its local service's end closes both directions."""
    size = 3 * WINDOW_BYTES

    def answer(sock: socket.socket) -> None:
        sock.sendall(bytes(size))

    with Service(answer) as service, ControlPort() as port:
        program = client("--server", port.text, "--local", service.text, "--heartbeat", "0.05")
        with port.accept_silently() as peer:
            assert peer.read_frame()[0] == INIT
            peer.expect_silence(0.2)  # [N-2]: no PING before the level is known
            peer.send_frame(NEW_CONN, 1)
            peer.expect_data(1, bytes(size))
            assert peer.read_close(1) == b""
            peer.expect_silence(0.1)
    assert program.wait_for("session-opened")["level"] == "0"


def test_the_client_says_its_public_address(client: Factory) -> None:
    """[N-2], [O-1]: the client's INIT announces level 1, its window and its instance; after WELCOME its log has the
    public address; and over its reconnects it keeps the instance, which no log shows."""
    with echo_service() as service, ControlPort() as port:
        program = client("--server", port.text, "--local", service.text, limits={"FIRST_RETRY_S": 0.01})
        instances = set()
        for _ in range(2):
            with port.accept() as peer:
                assert (peer.lines["version"], peer.lines["window"]) == ("1", "65536")
                assert re.fullmatch("[0-9a-f]{32}", peer.lines["instance"])
                instances.add(peer.lines["instance"])
                opened = program.wait_for("session-opened")
                assert (opened["public"], opened["level"]) == ("127.0.0.1:4711", "1")
        assert len(instances) == 1
        program.wait_for("session-closed")
        assert not any(instance in line for instance in instances for line in program.lines)


def test_no_log_shows_an_instance(server: Factory) -> None:
    """[N-8]: whatever becomes of a session, the server's log at debug level does not hold its instance."""
    program = server(limits={"FAREWELL_S": 0.1})
    instance = "5ca1ab1e" * 4
    with welcomed(program, instance=instance) as first, connect(first.public):
        first.hear_visitor()
        with welcomed(program, first.public[1], instance=instance):
            program.wait_for("session-closed", peer=name_of(first))
        with NaivePeer.connect(program.control_address) as bad:
            bad.send_init(init_text(instance=instance + "0"))
            assert b"bad-request" in bad.read_frame()[2]
            program.wait_for("refused", peer=name_of(bad))
    assert program.stop() == 0
    assert not [line for line in program.lines if "5ca1ab1e" in line]


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_refusal_says_why_and_ends_cleanly(server: Factory) -> None:
    """[N-6], [X-4], [L-3], [O-4]: WELCOME with code and sentence is the only frame, and a clean end follows, also to a
    client that goes on sending; at level 0 the connection just closes."""
    program = server(limits={"FAREWELL_S": 0.3})
    with welcomed(program) as holder:
        taken = holder.public[1]
        with NaivePeer.connect(program.control_address) as peer:
            peer.send_init(init_text(taken))
            peer.send(frame(99, 0, bytes(4096)) * 100)
            type, stream, payload = peer.read_frame()
            assert (type, stream) == (WELCOME, 0)
            assert lines_of(payload)["error"] == "port-in-use"
            assert str(taken) in lines_of(payload)["message"]
            assert peer.sock.recv(1) == b""  # FIN, and no reset
            assert "port-in-use" in program.wait_for("refused", peer=name_of(peer))["reason"]
        with NaivePeer.connect(program.control_address) as peer:
            peer.send_init(b"%d:h:1" % taken)
            peer.expect_end()
            assert "port-in-use" in program.wait_for("refused", peer=name_of(peer))["reason"]
        holder.check_alive()
    with NaivePeer.connect(program.control_address) as peer:  # the server's own: it cannot be bound
        peer.send_init(init_text(program.control_address[1]))
        assert lines_of(peer.read_frame()[2])["error"] == "port-in-use"
        program.wait_for("lease-failed", peer=name_of(peer))


@pytest.mark.parametrize("code", ["bad-request", "port-denied", "port-in-use", "too-many-clients", "what-is-this"])
def test_what_a_client_makes_of_a_refusal(client: Factory, code: str) -> None:
    """[X-5], [E-3], [N-2]: a client ends with status 3 and the server's message, or comes again, by the code; no
    message forges a line."""
    with ControlPort() as port:
        program = client("--server", port.text, "--local", "127.0.0.1:9", limits={"FIRST_RETRY_S": 0.01})
        final = code in ("bad-request", "port-denied")
        for _ in range(1 if final else 2):
            with port.accept_silently() as peer:
                assert peer.read_frame()[0] == INIT
                message = "because\r2026-01-01T00:00:00.000Z ERROR forged" + "x" * 3000
                peer.send_frame(WELCOME, 0, f"error={code}\nmessage={message}".encode())
                peer.expect_end()
        if final:
            assert program.wait() == 3
            assert "because" in program.wait_for("refused")["reason"]
        else:
            closed = program.wait_for("session-closed")
            assert "because" in closed["reason"]
            assert closed["level"] == "1"  # [N-2]: WELCOME has said so
        assert len(program.lines) == len(program.records)
        assert max(map(len, program.lines)) < 800
        assert not program.events("forged")


# --- flow control --------------------------------------------------------------------------------------------------


def hear_until_blocked(peer: Level1Peer, count: int) -> None:
    """So many bytes of stream 1, and one BLOCKED, which goes ahead of DATA that still waits; then nothing."""
    received = blocked = 0
    while received < count or not blocked:
        type, stream, payload = peer.hear()
        assert (type, stream) in ((DATA, 1), (BLOCKED, 1))
        received += len(payload)
        blocked += type == BLOCKED
    assert (received, blocked) == (count, 1)
    peer.check_quiet()


def test_a_sender_stops_at_its_credit(far: Far) -> None:
    """[W-1], [W-2], [W-5], [S-4]: DATA comes at once, stops at exactly the credit, then BLOCKED says so, once; each
    WINDOW is spent to the byte."""
    peer, sock = far
    sock.sendall(b"x")
    assert peer.hear_data(1, 1) == b"x"
    with running(lambda: sock.sendall(bytes(WINDOW_BYTES * 3))):
        hear_until_blocked(peer, WINDOW_BYTES - 1)
        for count in (1, 1000, WINDOW_BYTES - 1000):
            peer.grant(1, count)
            hear_until_blocked(peer, count)
        peer.grant(1, WINDOW_BYTES)
        assert peer.hear_data(1, WINDOW_BYTES) == bytes(WINDOW_BYTES)
    peer.check_alive()


def test_credit_comes_back(far: Far) -> None:
    """[W-4]: a sender that spends credit as it comes back sends on for ever, and never needs BLOCKED: 2 MiB arrive."""
    peer, sock = far
    payload = bytes(range(256)) * 32 * 256  # 2 MiB

    def push() -> None:
        at = 0
        while at < len(payload):
            count = min(peer.streams[1].credit, 30_000, len(payload) - at)
            if count:
                peer.send_data(1, payload[at : at + count])
                at += count
            else:
                assert peer.hear()[0] == WINDOW

    with running(push):
        assert read_exactly(sock, len(payload)) == payload


@pytest.mark.parametrize("pong_delay_s", [0.02], indirect=True)
def test_windows_grow_where_they_are_the_brake(far: Far) -> None:
    """[W-6]: each BLOCKED on an empty queue doubles the window, with a WINDOW at once; at 16 MiB it grows no more."""
    peer, _ = far
    size = WINDOW_BYTES
    while size < 16 * KIB * KIB:
        peer.send_frame(BLOCKED, 1)
        peer.expect(WINDOW, 1, size.to_bytes(4, "big"))
        size *= 2
    peer.send_frame(BLOCKED, 1)
    for marker in (b"PONG and", b"WINDOW??"):  # in one step the second would come behind the first
        peer.ping(marker)
        peer.expect(PONG, 0, marker)


def test_windows_grow_within_the_budget(server: Factory) -> None:
    """[W-8]: of the session's budget of 1 MiB a stream gets a quarter, a second one a quarter of what is left; what
    one gives back at its end counts for the other."""
    with welcomed(server("--session-budget", "1")) as peer, ExitStack() as stack:
        peer.pong_delay_s = 0.02  # a window of one that is near stays below the budget
        grown = dict[int, int]()
        first = stack.enter_context(connect(peer.public))
        grown[peer.hear_visitor()] = 0
        stack.enter_context(connect(peer.public))
        grown[peer.hear_visitor()] = 0

        def grow(stream: int) -> None:
            before = -1
            while before != grown[stream]:
                before = grown[stream]
                peer.send_frame(BLOCKED, stream)
                for marker in (b"PONG and", b"WINDOW.."):  # in one step the second may come behind the first
                    peer.ping(marker)
                    while (got := peer.hear()) != (PONG, 0, marker):
                        assert got[:2] == (WINDOW, stream)
                        grown[stream] += number(got[2])

        grow(1)
        grow(2)
        assert grown == {1: 256 << 10, 2: 192 << 10}
        reset(first)
        assert peer.hear()[:2] == (CLOSE_CONN, 1)
        eventually(lambda: (grow(2), grown[2])[1] > 192 << 10)
        assert grown[2] == 256 << 10


def test_a_window_as_small_as_one_byte(server: Factory) -> None:
    """[W-1]: a client may announce a window of a single byte: its streams start with that."""
    with Level1Peer.as_client(server().control_address, window=1) as peer, connect(peer.public) as visitor:
        peer.hear_visitor()
        visitor.sendall(b"abc")
        for letter in (b"a", b"b", b"c"):
            assert peer.hear_data(1, 1) == letter
            peer.grant(1, 1)


def test_credit_spent_in_frames_of_one_byte(client: Factory) -> None:
    """[W-8], [F-4]: 64 KiB of credit on each of four streams, spent in frames of 1 byte, costs the receiver the bytes
    and no more; then they arrive in order."""
    with socket.socket() as listener, ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        stack.enter_context(connect(listener.getsockname()))  # fills the queue: who dials now waits
        with ControlPort() as port:
            program = client("--server", port.text, "--local", text(listener.getsockname()))
            peer = stack.enter_context(port.accept())
        payload = bytes(range(256)) * 256
        for stream in range(1, 5):
            peer.open(stream)
        peer.check_alive()
        before = program.memory_bytes()
        for stream in range(1, 5):
            peer.send_data(stream, payload, size=1)
        peer.check_alive()
        assert program.memory_bytes() - before < 4 * WINDOW_BYTES + 1024 * KIB
        listener.listen(16)
        listener.settimeout(10.0)
        stack.enter_context(listener.accept()[0])
        for _ in range(4):
            local = stack.enter_context(listener.accept()[0])
            local.settimeout(10.0)
            assert read_exactly(local, len(payload)) == payload


# --- ends ----------------------------------------------------------------------------------------------------------


def test_half_close_both_ways(far: Far) -> None:
    """[T-1], [T-3]: an end of file at either side is EOF behind the DATA, and leaves the other direction as it was."""
    peer, sock = far
    peer.send_data(1, b"the last word")
    peer.send_frame(EOF, 1)
    assert read_all(sock) == b"the last word"
    for word in (b"but", b"not mine"):
        sock.sendall(word)
        assert peer.hear_data(1, len(word)) == word
    sock.sendall(bytes(40_000))
    sock.shutdown(socket.SHUT_WR)
    assert peer.hear_data(1, 40_000) == bytes(40_000)
    peer.expect(EOF, 1)
    peer.send(frame(DATA, 1, b"dropped") + frame(WINDOW, 1, bytes(4)) + frame(EOF, 1))  # the stream has ended
    peer.check_alive()


def test_the_sockets_end_first(far: Far) -> None:
    """[T-1]: after its socket's end an end still takes DATA, grants credit, and ends the socket with the peer's EOF."""
    peer, sock = far
    sock.sendall(b"question")
    sock.shutdown(socket.SHUT_WR)
    assert peer.hear_data(1, 8) == b"question"
    peer.expect(EOF, 1)
    for _ in range(2):
        peer.send_data(1, bytes(40_000))
        assert read_exactly(sock, 40_000) == bytes(40_000)
        assert peer.hear()[0] == WINDOW
    peer.send_frame(EOF, 1)
    assert read_all(sock) == b""
    peer.check_alive()


def test_close_conn_is_a_reset_and_not_answered(far: Far) -> None:
    """[T-4]: a CLOSE_CONN, bare too, resets the socket whatever is queued for it, and has no answer."""
    peer, sock = far
    peer.send_data(1, bytes(WINDOW_BYTES))
    peer.send_frame(CLOSE_CONN, 1)
    assert ends_with(sock) == "reset"
    peer.ping(b"answer??")
    while (got := peer.hear()) != (PONG, 0, b"answer??"):
        assert got[0] == WINDOW, got


def test_a_sockets_reset_is_close_conn(far: Far) -> None:
    """[T-4], [T-5]: a socket's reset is CLOSE_CONN with a reason, also behind an end of file, and nothing follows."""
    peer, sock = far
    sock.sendall(b"half a")
    assert peer.hear_data(1, 6) == b"half a"
    sock.shutdown(socket.SHUT_WR)
    peer.expect(EOF, 1)
    reset(sock)
    peer.send_data(1, b"to nobody")  # a reset behind an end shows when something is sent, or within a second
    peer.expect(CLOSE_CONN, 1, b"reset")
    peer.check_alive()


def test_a_local_service_that_refuses(client: Factory) -> None:
    """[E-6], [T-4]: a local service that refuses is CLOSE_CONN with a reason, and the session goes on."""
    with closed_port() as nowhere, dialled(client, nowhere) as peer:
        peer.open(1)
        peer.expect(CLOSE_CONN, 1, b"refused")
        peer.check_alive()


def test_the_end_of_a_session_resets_its_streams(far: Far) -> None:
    """[T-5], [S-7]: the end of the control connection is no clean end for the socket of a stream."""
    peer, sock = far
    peer.send_data(1, b"half")
    assert read_exactly(sock, 4) == b"half"
    peer.sock.close()
    assert ends_with(sock) == "reset"


def test_ids_never_wrap(server: Factory) -> None:
    """[S-9], [G-1]: when its ids are used up the server says GOAWAY and opens no stream more on that session, and those
    that are open go on; at level 0 it just opens none."""
    program = server(limits={"MAX_STREAM_ID": 2, "LEASE_LINGER_S": 0.2})
    with welcomed(program) as peer, connect(peer.public) as visitor:
        assert peer.hear()[:2] == (NEW_CONN, 1)
        with connect(peer.public):
            assert sorted(peer.hear()[:2] for _ in range(2)) == [(NEW_CONN, 2), (GOAWAY, 0)]
        assert visit(peer.public) in ("reset", "refused")
        peer.send_data(1, b"goes on")
        assert read_exactly(visitor, 7) == b"goes on"
        peer.check_alive()


# --- heartbeat and GOAWAY --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plays", ["client", "server"])
def test_pings_that_nobody_reads(server: Factory, client: Factory, plays: str) -> None:
    """[H-6], [X-2]: a peer that sends PINGs and reads no PONG ends its session, and costs no memory; another session
    of the same server goes on."""
    with ExitStack() as stack, socket.socket() as listener:
        sock = socket.socket()
        for each in (listener, sock):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            each.settimeout(10.0)
        if plays == "client":
            program = server()
            neighbour = stack.enter_context(welcomed(program))
            sock.connect(program.control_address)
            peer = stack.enter_context(Level1Peer(sock, plays="client", window=WINDOW_BYTES))
            peer.send_init(init_text())
            peer.hear_welcome()
        else:
            sock.close()
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            program = client("--server", text(listener.getsockname()), "--local", "127.0.0.1:9")
            peer = stack.enter_context(Level1Peer.as_server(listener.accept()[0]))
        before = program.memory_bytes()
        with contextlib.suppress(ConnectionError):
            for _ in range(1000):
                peer.send(frame(PING, 0, b"flooding") * 4000)
        assert "over 262144 bytes" in program.wait_for("session-closed")["reason"]
        assert program.memory_bytes() - before < 2048 * KIB
        assert len(program.events("session-closed")) == 1
        if plays == "client":
            neighbour.check_alive()


@pytest.mark.parametrize("plays", ["client", "server"])
def test_pings_and_their_answers(server: Factory, client: Factory, plays: str) -> None:
    """[H-1], [H-2], [H-3]: PING comes at the start and every heartbeat, as each is answered; PINGs of ours, 64 at a
    time, have their answers in order; a second answer to one PING is a protocol error."""
    with ExitStack() as stack:
        if plays == "client":
            program = server("--heartbeat", "0.05")
            peer = stack.enter_context(welcomed(program))
        else:
            port = stack.enter_context(ControlPort())
            program = client("--server", port.text, "--local", "127.0.0.1:9", "--heartbeat", "0.05")
            peer = stack.enter_context(port.accept())
        for start in range(0, 640, 64):
            burst = [b"%08d" % count for count in range(start, start + 64)]
            for payload in burst:
                peer.ping(payload)
            for payload in burst:
                peer.expect(PONG, 0, payload)
        while len(peer.pings) < 4:
            type, _, payload = peer.read_frame()
            assert type == PING
            peer.send_frame(PONG, 0, payload)
        assert len(set(peer.pings)) == len(peer.pings)
        peer.send_frame(PONG, 0, peer.pings[-1])
        until_end(peer)
        assert "PONG" in program.wait_for("session-closed")["reason"]


def test_a_clients_sessions_are_apart(client: Factory) -> None:
    """[X-2], [S-7]: what breaks a rule on the session of one mapping resets its streams, and does not disturb that of
    another mapping of the same client."""
    with echo_service() as one, echo_service() as two, ControlPort() as port:
        program = client("--server", port.text, "--forward", f"0:{one.text}", "--forward", f"0:{two.text}")
        with port.accept() as broken, port.accept() as whole:
            for peer in (broken, whole):
                peer.open(1)
                peer.send_data(1, b"hello")
                assert peer.hear_data(1, 5) == b"hello"
            broken.send_frame(PONG, 0, bytes(8))
            until_end(broken)
            program.wait_for("session-closed")
            whole.send_data(1, b"still")
            assert whole.hear_data(1, 5) == b"still"
            whole.check_alive()


def test_goaway_of_a_server(client: Factory) -> None:
    """[G-1], [G-4]: at GOAWAY the client dials a new session at once, one for however many; its streams go on."""
    with echo_service() as service, ControlPort() as port:
        program = client("--server", port.text, "--local", service.text, limits={"FIRST_RETRY_S": 0.5})
        with port.accept() as peer:
            peer.open(1)
            peer.send(frame(GOAWAY, 0, b"maintenance") * 50)
            with port.accept() as second:
                assert second.lines["instance"] == peer.lines["instance"]
                peer.send_data(1, b"still")
                assert peer.hear_data(1, 5) == b"still"
                second.open(1)
                second.send_data(1, b"new")
                assert second.hear_data(1, 3) == b"new"
                assert len(program.events("goaway", reason="maintenance")) == 1
                assert len(program.events("session-opened")) == 2
                peer.sock.close()
                program.wait_for("session-closed")
                second.check_alive()


def test_goaway_replaced(client: Factory) -> None:
    """[G-2]: a client that is replaced dials no new session while the old one lasts, and then waits 30 s."""
    with echo_service() as service, ControlPort() as port:
        program = client("--server", port.text, "--local", service.text, limits={"FIRST_RETRY_S": 0.01})
        with port.accept() as peer:
            peer.send_frame(GOAWAY, 0, b"replaced")
            peer.open(1)
            peer.send_data(1, b"still")
            assert peer.hear_data(1, 5) == b"still"
        assert float(program.wait_for("session-closed")["retry_s"]) == 30.0
        assert len(program.events("connecting")) == 1


def test_goaway_of_a_client(server: Factory) -> None:
    """[G-3], [L-4]: after a client's GOAWAY its port is free at once for anybody, and its streams go on."""
    program = server()
    with welcomed(program) as peer, connect(peer.public) as visitor:
        peer.hear_visitor()
        peer.send_frame(GOAWAY, 0, b"stopping")
        program.wait_for("lease-closed")
        with welcomed(program, peer.public[1]) as other, connect(other.public):
            other.hear_visitor()
            peer.send_data(1, b"goes on")
            assert read_exactly(visitor, 7) == b"goes on"
            peer.send_frame(GOAWAY, 0)
            peer.check_alive()
            other.check_alive()


def test_an_end_that_is_stopped_says_so(server: Factory, client: Factory) -> None:
    """[G-5], [X-4]: a server, and a client, that is stopped says GOAWAY `stopping` and ends cleanly."""
    limits = {"FAREWELL_S": 0.3}
    program = server(limits=limits)
    with welcomed(program) as peer, connect(peer.public) as visitor:
        peer.hear_visitor()
        with running(program.stop):
            peer.expect(GOAWAY, 0, b"stopping")
            assert peer.sock.recv(1) == b""
            assert ends_with(visitor) == "reset"
    with echo_service() as service, ControlPort() as port:
        stopped = client("--server", port.text, "--local", service.text, limits=limits)
        with port.accept() as peer:
            peer.check_alive()
            with running(stopped.stop):
                peer.expect(GOAWAY, 0, b"stopping")
                assert peer.sock.recv(1) == b""


def test_a_drain_ends_with_a_second_goaway(server: Factory, client: Factory) -> None:
    """[G-4], [G-5]: an end that drains has said GOAWAY, its streams go on; when it is stopped it says GOAWAY
    `stopping` once more, and resets them."""
    limits = {"FAREWELL_S": 0.3}
    program = server("--drain=60", limits=limits)
    with welcomed(program) as peer, connect(peer.public) as visitor:
        peer.hear_visitor()
        program.send_signal(signal.SIGTERM)
        peer.expect(GOAWAY, 0, b"stopping")
        peer.send_data(1, b"goes on")
        assert read_exactly(visitor, 7) == b"goes on"
        program.send_signal(signal.SIGTERM)
        peer.expect(GOAWAY, 0, b"stopping")
        assert peer.sock.recv(1) == b""
        assert ends_with(visitor) == "reset"
    with echo_service() as service, ControlPort() as port:
        stopped = client("--server", port.text, "--local", service.text, "--drain=60", limits=limits)
        with port.accept() as peer:
            peer.check_alive()
            peer.open(1)
            peer.send_data(1, b"hello")
            assert peer.hear_data(1, 5) == b"hello"
            stopped.send_signal(signal.SIGTERM)
            peer.expect(GOAWAY, 0, b"stopping")
            peer.check_alive()
            stopped.send_signal(signal.SIGTERM)
            peer.expect(GOAWAY, 0, b"stopping")
            assert peer.sock.recv(1) == b""


# --- leases ----------------------------------------------------------------------------------------------------------


def test_the_newest_session_of_a_holder_wins(server: Factory) -> None:
    """[L-1], [L-2]: a session with the instance of another takes its port over at once: the old one gets GOAWAY
    `replaced` and its end, its visitors a reset."""
    program = server()
    with welcomed(program, instance="1" * 32) as old, connect(old.public) as visitor:
        old.hear_visitor()
        with welcomed(program, old.public[1], instance="1" * 32) as new:
            assert new.public == old.public
            old.expect(GOAWAY, 0, b"replaced")
            assert old.sock.recv(1) == b""
            assert ends_with(visitor) == "reset"
            with connect(new.public):
                new.hear_visitor()
            new.check_alive()
    assert len(program.events("lease-opened")) == 1


def test_a_lease_waits_for_its_holder(server: Factory) -> None:
    """[L-5], [L-6], [L-3]: a session that ends without GOAWAY leaves its port to its holder for a while: visitors wait
    for it, strangers are refused; the holder has the port again by asking for 0."""
    program = server(limits={"LEASE_LINGER_S": 2.0})
    with welcomed(program, instance="2" * 32) as first:
        public = first.public
    program.wait_for("session-closed")
    with connect(public) as visitor:
        with NaivePeer.connect(program.control_address) as stranger:
            stranger.send_init(init_text(public[1]))
            assert lines_of(stranger.read_frame()[2])["error"] == "port-in-use"
        with welcomed(program, instance="2" * 32) as again:
            assert again.public == public
            again.hear_visitor()
            again.send_data(1, b"hello")
            assert read_exactly(visitor, 5) == b"hello"
    assert not program.events("lease-closed")


def test_sessions_of_the_global_port(server: Factory) -> None:
    """[L-1], [O-8]: all sessions share the global port; one of the same instance replaces only its like."""
    program = server("--public-listen", "127.0.0.1:0")
    with welcomed(program, instance="3" * 32) as old, welcomed(program, instance="4" * 32) as other:
        assert old.public == other.public == program.public_address
        with welcomed(program, instance="3" * 32) as new:
            old.expect(GOAWAY, 0, b"replaced")
            with connect(new.public), connect(new.public):
                assert {new.hear_visitor(), other.hear_visitor()} == {1}


def test_the_time_of_an_idle_session(server: Factory) -> None:
    """[H-4], [X-1]: a peer that says nothing for three heartbeats is dead; one that only answers PINGs is not."""
    program = server("--heartbeat", "0.1")
    with welcomed(program) as dead, welcomed(program) as alive:
        since = time.monotonic()
        with running(lambda: until_end(dead)):
            while time.monotonic() - since < 0.6:
                assert alive.read_frame()[0] == PING
                alive.send_frame(PONG, 0, alive.pings[-1])
        assert "dead" in program.wait_for("session-closed", peer=name_of(dead))["reason"]
        assert len(program.events("session-closed")) == 1


def test_many_sinks_at_level_1(server: Factory) -> None:
    """[S-4], [S-1]: visitors at once, each with bytes of its own, cross the session whole and in order."""
    with welcomed(server()) as peer, ExitStack() as stack:
        visitors = [stack.enter_context(connect(peer.public)) for _ in range(20)]
        for visitor in visitors:
            stack.enter_context(
                running(lambda v=visitor: (v.sendall(b"%05d" % v.getsockname()[1] * 40_000), v.shutdown(1)))
            )
        received: dict[int, bytearray] = {}
        ended = 0
        while ended < len(visitors):
            type, stream, payload = peer.hear()
            if type == DATA:
                received.setdefault(stream, bytearray()).extend(payload)
                peer.grant(stream, len(payload))
            ended += type == EOF
        for stream, got in received.items():
            assert got == b"%05d" % int(peer.visitors[stream].rpartition(":")[2]) * 40_000
