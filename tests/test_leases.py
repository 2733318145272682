"""Leases: a public port belongs to one client, comes back to it at once, and to nobody else."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from level1 import (
    LOOPBACK,
    Ends,
    Peer,
    PeerServer,
    Unwelcome,
    connect_small,
    hear_silence,
    init,
    is_in_a_send,
    leases,
    mapping,
    new_instance,
    small_control_sockets,
    stop,
    waiting_pumps,
)
from naive_peer import NaivePeer
from relay import Relay
from support import (
    Address,
    Program,
    Service,
    connect,
    echo_service,
    ends_with,
    eventually,
    free_port,
    read_all,
    read_exactly,
    running,
)
from tls_peers import House
from tunnels import text, until_full, visit

import rtunnel
from rtunnel import FrameType

Factory = Callable[..., Program]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ends in this process, stopped after the test."""
    with Ends() as made:
        yield made


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that come back at once."""
    monkeypatch.setattr(rtunnel, "FIRST_RETRY_S", 0.003)


def check_echo(public: Address, word: bytes = b"marco") -> None:
    """A visitor of an echo service gets its word back."""
    with connect(public) as visitor:
        visitor.sendall(word)
        assert read_exactly(visitor, len(word)) == word


def refused(server: Address, port: int, instance: str = "") -> str:
    """The code of the server's refusal of such a client."""
    with pytest.raises(Unwelcome) as caught:
        Peer.as_client(server, port, instance)
    return str(caught.value.args[0])


# --- back on the same port -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["chosen", "assigned"])
def test_a_network_that_goes_silent(
    ends: Ends, soon: None, port: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """[L-2]: no FIN, no RST, nothing: with its next connection the client has its port back, while the server still
    believes in the old one; whose visitors are reset then, and whose transport is shut."""
    with echo_service() as service, Relay(ends.open_server()) as relay:
        asked = free_port() if port == "chosen" else 0
        ends.open_client(relay.address, mapping(service.address, asked), heartbeat=0.2)
        public = ends.public()
        with connect(public) as old:
            old.sendall(b"marco")
            assert read_exactly(old, 5) == b"marco"
            relay.silence()
            eventually(lambda: relay.accepted == 2)
            begun = time.monotonic()
            assert ends.public(2) == public
            check_echo(public)
            took_s = time.monotonic() - begun
            assert ends_with(old) == "reset"
        ends.log.wait_for("session-replaced")
        ends.log.wait_for("session-closed", reason="replaced")
        with capsys.disabled():
            print(f"\n  back on its {port} port {1000 * took_s:.0f} ms after its next connection")


def test_a_stuffed_transport_is_not_waited_for(ends: Ends, soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """[L-2]: a session whose writer waits in a transport that takes nothing is replaced at once, and shut."""
    with echo_service() as service, Relay(ends.open_server()) as relay, contextlib.ExitStack() as stack:
        ends.open_client(relay.address, mapping(service.address), heartbeat=0.2)
        public = ends.public()
        check_echo(public)
        relay.stall()
        [session] = ends.sessions()
        for _ in range(100):  # windows in all more than the kernel holds for one connection
            visitor = stack.enter_context(connect(public))
            visitor.sendall(bytes(rtunnel.WINDOW_BYTES))
        eventually(lambda: waiting_pumps(session.writer), what="pumps wait for room")
        assert ends.public(2) == public
        check_echo(public)
        ends.log.wait_for("session-closed", reason="replaced")


@pytest.mark.parametrize("newer", ["stays", "leaves"])
def test_a_replaced_session_that_reads_a_byte_now_and_then(ends: Ends, newer: str) -> None:
    """[L-2]: a replaced session's control connection is closed after a second, though its client takes a byte now and
    then, so that no write ever fails, and also where the newer session ends before."""
    instance = new_instance()
    with small_control_sockets(), contextlib.ExitStack() as stack:
        control = ends.open_server()
        old = stack.enter_context(Peer(connect_small(control)))
        old.send_init(init(0, instance, 1 << 30))
        old.port = int(old.hear(rtunnel.FrameType.WELCOME)[2].partition(b"port=")[2].partition(b"\n")[0])
        [session] = ends.sessions()
        visitor = stack.enter_context(connect(old.public))
        until_full(visitor)
        assert is_in_a_send(session.writer)
        new = stack.enter_context(Peer.as_client(control, old.port, instance))
        replaced = time.monotonic()
        if newer == "leaves":
            new.sock.close()
        old.sock.setblocking(False)

        def is_closed() -> bool:
            with contextlib.suppress(BlockingIOError, ConnectionError):
                old.sock.recv(16)
            return bool(ends.log.events("session-closed", peer=text(old.sock.getsockname())))

        eventually(is_closed, 5.0)
        assert time.monotonic() - replaced < 2.0
        visitor.settimeout(5.0)
        assert ends_with(visitor) == "reset"


RECORD = struct.Struct(">8sQ")  # a visitor's tag, and a number that counts up


class Records:
    """A service and visitors whose every 16 bytes tell whose they are and where they belong."""

    def __init__(self) -> None:
        self.wrong: list[object] = []  # what must not be; from any thread
        self.rounds = itertools.count()
        self.rounds_done = 0
        self.stop = threading.Event()
        self._tags: set[bytes] = set()

    def serve(self, sock: socket.socket) -> None:
        """Check that one visitor's records come, from the first on, and send them back."""
        rest, tag, numbers = b"", b"", itertools.count()
        while part := sock.recv(1 << 16):
            rest += part
            whole = len(rest) - len(rest) % RECORD.size
            for got, number in RECORD.iter_unpack(rest[:whole]):
                if not tag:
                    tag = got
                    if tag in self._tags:
                        self.wrong.append(("a visitor's bytes at a second connection", got, number))
                    self._tags.add(tag)
                if (got, number) != (tag, next(numbers)):
                    self.wrong.append(("at the service", tag, got, number))
            rest = rest[whole:]
            sock.sendall(part)

    def visit(self, public: Address, seed: int) -> None:
        """One visitor after the other, each until its connection is reset."""
        choose = random.Random(seed)
        while not self.stop.is_set():
            tag, numbers = choose.randbytes(8), itertools.count()
            with contextlib.suppress(ConnectionError), connect(public) as sock:
                while not self.stop.is_set():
                    sent = b"".join(RECORD.pack(tag, next(numbers)) for _ in range(choose.choice([1, 10, 500])))
                    sock.sendall(sent)
                    try:
                        got = read_exactly(sock, len(sent))
                    except EOFError:
                        self.wrong.append("a clean end of a session that was cut")
                        break
                    if got != sent:
                        self.wrong.append(("at the visitor", tag))
                    self.rounds_done = next(self.rounds)


@pytest.mark.parametrize(("secured", "cuts"), [(False, 100), (True, 40)], ids=["plain", "TLS"])
def test_no_byte_of_an_old_stream_reaches_a_new_one(
    house: House, soon: None, monkeypatch: pytest.MonkeyPatch, secured: bool, cuts: int
) -> None:
    """[S-7]: defect 1 across cuts of every kind, at any moment: each byte reaches the connection that it was sent
    for, no cut looks like a clean end, and no visitor is turned away while the client is on its way back."""
    records, choose = Records(), random.Random(cuts)
    kinds = [dict[str, bool](), {"fin": True}, {"far": False}, {"far": False, "fin": True}]
    with (
        Ends(house if secured else None) as ends,
        Service(records.serve) as service,
        Relay(ends.open_server()) as relay,
        contextlib.ExitStack() as stack,
    ):
        ends.open_client(relay.address, mapping(service.address), heartbeat=0.1)
        public = ends.public()
        for seed in range(4):
            stack.enter_context(running(lambda seed=seed: records.visit(public, seed), records.stop.set))  # type: ignore[misc]
        for cut in range(cuts):
            accepted = relay.accepted
            goal = records.rounds_done + choose.randrange(1, 4)
            eventually(lambda goal=goal: records.rounds_done >= goal)  # type: ignore[misc]
            if cut % 100 == 20:  # the client needs its heartbeat to notice
                relay.silence()
            else:
                relay.cut(**choose.choice(kinds))
            eventually(lambda accepted=accepted: relay.accepted > accepted)  # type: ignore[misc]
        goal = records.rounds_done + 10
        eventually(lambda: records.rounds_done >= goal)
        records.stop.set()
    assert not records.wrong, records.wrong[:5]
    assert relay.accepted > cuts, "each cut has met a connection"
    assert not ends.log.events("visitor-refused"), "a visitor was lost"


# --- whose port it is ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["plain", "TLS"])
def test_a_client_that_is_killed_and_started_anew(server: Factory, client: Factory, house: House, mode: str) -> None:
    """While the server believes in the old session, a new process is a stranger in plain mode: `port-in-use`, until
    the server has found the old one dead and its linger is over. With a certificate it is the holder, and has the
    port and all visitors at once."""
    flags = {role: house.flags(role) if mode == "TLS" else () for role in ("server", "client")}
    limits = {"LEASE_LINGER_S": 0.3, "FIRST_RETRY_S": 0.05}
    heartbeat = "15" if mode == "TLS" else "0.6"
    serving = server(*flags["server"], "--heartbeat", heartbeat, limits=limits)
    with echo_service() as service, Relay(serving.control_address) as relay:

        def start(port: int) -> Program:
            remote = ("--remote-port", str(port), "--reconnect-max", "0.1")
            asked = ("--server", text(relay.address), "--local", service.text, *remote)
            return client(*flags["client"], *asked, limits=limits)

        first = start(0)
        public = serving.lease_address()
        check_echo(public)
        relay.silence()
        first.kill()
        second = start(public[1])
        if mode == "TLS":
            second.wait_for("session-opened")
            assert not second.events("session-closed")
            serving.wait_for("session-replaced")
        else:
            assert second.wait_for("session-closed")["reason"].startswith("port-in-use")
            second.wait_for("session-opened")
            reasons = [lease["reason"] for lease in serving.events("lease-closed")]
            assert reasons == ["its client did not come back"]
            assert serving.events("session-closed")[0]["reason"].startswith("the peer is dead")
        check_echo(public)


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
def test_two_clones_do_not_evict_each_other_in_a_loop(house: House, secured: bool) -> None:
    """[G-2]: of two clients with one holder the newer serves; the older is told `replaced` and waits for 30 s."""
    with Ends(house if secured else None) as ends, echo_service() as service:
        server, port, instance = ends.open_server(), free_port(), new_instance()
        for count in (1, 2):
            ends.open_client(server, mapping(service.address, port, instance if not secured else None))
            public = ends.public(count)
        ends.log.wait_for("goaway", reason="replaced")
        ends.log.wait_for("session-closed", retry_s="30.000")
        check_echo(public)
        assert len(ends.log.events("session-replaced")) == 1
        assert len(ends.opened()) == 2


def test_a_goaway_overtakes_no_welcome() -> None:
    """[G-2]: a session that is replaced before its WELCOME has left gets both, in order: it would take a GOAWAY alone
    for a broken rule, come back at once, and evict the other."""
    near, far = socket.socketpair(socket.AF_UNIX)
    with near, far:
        writer = rtunnel.Writer(SocketTransport(near))  # type: ignore[arg-type]
        writer.post(b"WELCOME ")
        writer.close("replaced", b"GOAWAY")
        writer.serve()
        assert read_all(far) == b"WELCOME GOAWAY"


class SocketTransport:
    """What a writer needs of a transport."""

    def __init__(self, sock: socket.socket) -> None:
        self.send = sock.sendall
        self.finish = lambda: sock.shutdown(socket.SHUT_WR)


def test_clones_leave_each_other_in_peace(ends: Ends, soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """[G-2], [L-2]: however short a client's backoff is, after `replaced` it waits REPLACED_RETRY_S, and then asks
    without taking over: it gets `port-in-use` while the other one lives, and the port when that has gone."""
    monkeypatch.setattr(rtunnel, "REPLACED_RETRY_S", 0.3)
    server, one = ends.open_server(), mapping(("127.0.0.1", 9))
    clones = []
    for count in (1, 2):
        clones.append(ends.open_client(server, one))
        ends.public(count)
    ends.log.wait_for("refused", 2)
    assert ends.log.events("refused")[0]["reason"].startswith("port-in-use: another session of yours")
    [replaced], refusals = ends.log.times_of("session-replaced"), ends.log.times_of("refused")
    assert refusals[0] - replaced >= 0.3
    stop(clones[1])
    ends.public(3)
    assert len(ends.log.events("session-replaced")) == 1


def test_a_clone_at_the_global_port(ends: Ends) -> None:
    """[G-2], [L-2]: who asks without taking over leaves the living session of its instance in peace there, too."""
    server, instance = ends.open_server(public=rtunnel.Address("127.0.0.1", 0)), new_instance()
    with Peer.as_client(server, 0, instance) as living:
        with Peer.connect(server) as clone:
            clone.send_init(init(0, instance) + b"\ntakeover=no")
            told = b"error=port-in-use\nmessage=another session of yours serves port %d" % living.port
            assert clone.hear(FrameType.WELCOME) == (FrameType.WELCOME, 0, told)
        living.send_frame(FrameType.PING, 0, b"in peace")
        living.hear(FrameType.PONG)


def test_a_clone_behind_a_silent_network(ends: Ends, soon: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """[G-2]: who was replaced takes over again only behind a WELCOME, not where a session was open in silence."""
    monkeypatch.setattr(rtunnel, "REPLACED_RETRY_S", 0.05)
    monkeypatch.setattr(rtunnel, "LIVED_S", 0.2)
    with PeerServer() as server:
        ends.open_client(server.address, mapping(("127.0.0.1", 9), 4711))
        welcomed = server.accept()
        welcomed.send_frame(FrameType.GOAWAY, 0, b"replaced")
        welcomed.sock.close()
        server.accept(b"")  # "no WELCOME"
        silent = server.accept(b"")
        ends.log.wait_for("session-opened", level=0)
        silent.sock.close()
        welcomed = server.accept()
        ends.log.wait_for("session-opened", 2, level=1)
        welcomed.sock.close()
        server.accept()
        assert [asked.takeover for asked in server.inits] == [True, False, False, False, True]


def test_a_stranger_cannot_take_a_port_over(ends: Ends) -> None:
    """[L-3], [L-5]: in plain mode a lease belongs to an instance: whoever has another one, or none, does not get its
    port, neither while it is served nor while it lingers."""
    server = ends.open_server()
    instance = new_instance()
    with Peer.as_client(server, 0, instance) as holder:
        port = holder.port
        assert refused(server, port) == "port-in-use"
        with NaivePeer.connect(server) as original:
            original.send_init(b"%d:127.0.0.1:80" % port)
            original.expect_end()
        with connect(holder.public):  # is still the holder's
            holder.hear(FrameType.NEW_CONN)
    ends.log.wait_for("session-closed", level=1)
    assert refused(server, port) == "port-in-use"
    with Peer.as_client(server, port, instance) as returned:
        assert returned.port == port
    assert not ends.log.events("session-replaced")


def test_at_level_0_the_newcomer_is_refused(ends: Ends) -> None:
    """[L-3], [L-4]: a port that a client of level 0 holds goes to nobody else while that session lives, and is free
    at once after it: clients of the original would evict each other in a loop."""
    server = ends.open_server()
    with NaivePeer.connect(server) as original:
        original.send_init(b"0:127.0.0.1:80")
        port = int(ends.log.wait_for("session-opened", level=0)["port"])
        assert refused(server, port) == "port-in-use"
        with NaivePeer.connect(server) as other:
            other.send_init(b"%d:127.0.0.1:80" % port)
            other.expect_end()
    ends.log.wait_for("lease-closed")
    with Peer.as_client(server, port) as newcomer:
        assert newcomer.port == port


# --- linger ----------------------------------------------------------------------------------------------------------


def test_visitors_wait_for_a_client_that_returns(ends: Ends) -> None:
    """[L-5]: visitors who come while a lease lingers wait in the listen queue, and the returning client serves
    all."""
    server, instance = ends.open_server(), new_instance()
    with Peer.as_client(server, 0, instance) as first:
        public = first.public
    ends.log.wait_for("session-closed", level=1)
    with contextlib.ExitStack() as stack:
        visitors = [stack.enter_context(connect(public)) for _ in range(20)]
        for number, visitor in enumerate(visitors):
            visitor.sendall(b"%04d" % number)
        second = stack.enter_context(Peer.as_client(server, 0, instance))
        assert second.public == public
        said = {}
        while len(said) < 20:
            kind, stream, payload = second.hear(FrameType.NEW_CONN, FrameType.DATA)
            if kind == FrameType.DATA:
                said[stream] = payload
                second.send_data(stream, payload)
        assert sorted(said.values()) == [b"%04d" % number for number in range(20)]
        for number, visitor in enumerate(visitors):
            assert read_exactly(visitor, 4) == b"%04d" % number
    assert not ends.log.events("visitor-refused")
    assert not ends.log.events("lease-closed")


def test_a_port_whose_client_does_not_return_is_closed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[L-5]: after the linger the port is closed, its waiting visitors are reset, and others may have it."""
    monkeypatch.setattr(rtunnel, "LEASE_LINGER_S", 0.2)
    server = ends.open_server()
    with Peer.as_client(server) as first:
        public = first.public
    ends.log.wait_for("session-closed", level=1)
    assert visit(public, b"hello?") in ("reset", "refused")
    ends.log.wait_for("lease-closed", reason="its client did not come back")
    with Peer.as_client(server, public[1]) as second:
        assert second.public == public


def test_a_client_that_is_stopped_frees_its_port_at_once(ends: Ends) -> None:
    """[G-5], [L-4]: a client that is stopped says GOAWAY: no linger, the port is a stranger's the moment that it
    asks."""
    server = ends.open_server()
    client = ends.open_client(server, mapping(("127.0.0.1", 9)))
    public = ends.public()
    ends.log.wait_for("session-opened", public=text(public))  # the client knows that it is level 1
    client.stop()
    ends.log.wait_for("lease-closed", reason="client: stopping")
    with Peer.as_client(server, public[1]) as stranger:
        assert stranger.public == public


def test_after_goaway_of_a_client_its_streams_go_on(ends: Ends) -> None:
    """[G-3]: GOAWAY from a client ends its lease, and no stream that is open."""
    with Peer.as_client(ends.open_server()) as peer, connect(peer.public) as visitor:
        peer.hear(FrameType.NEW_CONN)
        peer.send_frame(FrameType.GOAWAY, 0, b"stopping")
        ends.log.wait_for("lease-closed")
        assert visit(peer.public) == "refused"
        peer.send_data(1, b"still here")
        assert read_exactly(visitor, 10) == b"still here"
        visitor.sendall(b"so am I")
        assert peer.hear(FrameType.DATA) == (FrameType.DATA, 1, b"so am I")


def test_after_goaway_of_a_server_the_client_connects_anew(ends: Ends, soon: None) -> None:
    """[G-1]: GOAWAY from a server: the client asks for its port on a new session, and what is open on the old one
    goes on."""
    with PeerServer() as server, echo_service() as service:
        ends.open_client(server.address, mapping(service.address))
        old = server.accept()
        old.send_frame(FrameType.NEW_CONN, 1, b"203.0.113.7:51234")
        old.credit[1] = 65536
        old.send_data(1, b"before")
        assert old.hear(FrameType.DATA)[2] == b"before"
        old.send_frame(FrameType.GOAWAY, 0, b"full")
        new = server.accept()
        assert server.inits[0].instance == server.inits[1].instance
        old.send_data(1, b"behind")
        assert old.hear(FrameType.DATA)[2] == b"behind"
        new.send_frame(FrameType.NEW_CONN, 1, b"203.0.113.7:51235")
        new.credit[1] = 65536
        new.send_data(1, b"as well")
        assert new.hear(FrameType.DATA)[2] == b"as well"


# --- port 0, several mappings, the global port ---------------------------------------------------------------------


def test_port_0_gives_a_known_instance_the_same_port(ends: Ends) -> None:
    """[L-6]: remote port 0 with a known instance gives the same port back, also when its lease had ended; another
    instance gets another one."""
    server, instance = ends.open_server(), new_instance()
    with Peer.as_client(server, 0, instance) as first:
        first.send_frame(FrameType.GOAWAY, 0, b"stopping")
        ends.log.wait_for("lease-closed")
    with Peer.as_client(server, 0, instance) as again, Peer.as_client(server) as other:
        assert again.port == first.port != other.port


def test_port_0_that_somebody_else_has_got_meanwhile(ends: Ends) -> None:
    """[L-6]: where the port of a known instance is another's by now, the server assigns a new one."""
    server, instance = ends.open_server(), new_instance()
    with Peer.as_client(server, 0, instance) as first:
        first.send_frame(FrameType.GOAWAY, 0, b"stopping")
        ends.log.wait_for("lease-closed")
    with Peer.as_client(server, first.port) as other, Peer.as_client(server, 0, instance) as again:
        assert other.port == first.port != again.port
        with connect(again.public):
            again.hear(FrameType.NEW_CONN)


def test_many_others_of_port_0(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[L-6]: of the ports that are remembered those are forgotten first that nobody has now: others who come and go
    take no port from who is here, when he comes back."""
    monkeypatch.setattr(rtunnel, "MAX_ASSIGNED_PORTS", 2)
    server, instance = ends.open_server(), new_instance()
    with Peer.as_client(server, 0, instance) as first:
        for count in range(1, 5):
            with Peer.as_client(server) as other:
                other.send_frame(FrameType.GOAWAY, 0, b"stopping")
                ends.log.wait_for("lease-closed", count)
        first.send_frame(FrameType.GOAWAY, 0, b"stopping")
        ends.log.wait_for("lease-closed", 5)
    with Peer.as_client(server, 0, instance) as again:
        assert again.port == first.port


def known_port(ends: Ends, server: Address, any_port: rtunnel.Mapping) -> int:
    """A port that the server has chosen for this mapping, whose client has come and gone."""
    client = ends.open_client(server, any_port)
    port = ends.public()[1]
    stop(client)
    ends.log.wait_for("lease-closed")
    return port


def test_port_0_that_its_holder_has_got_meanwhile(house: House) -> None:
    """[L-6]: with certificates the port of a known instance may be its holder's by another instance: that is not
    replaced, since who asks for port 0 can have any."""
    with Ends(house) as ends, contextlib.ExitStack() as stack:
        server, service = ends.open_server(), stack.enter_context(echo_service())
        any_port = mapping(service.address)
        port = known_port(ends, server, any_port)
        ends.open_client(server, dataclasses.replace(any_port, remote_port=port, instance=new_instance()))
        ends.public(2)
        ends.open_client(server, any_port)
        assert ends.public(3)[1] != port
        with connect(("127.0.0.1", port)) as visitor:
            visitor.sendall(b"marco")
            assert read_exactly(visitor, 5) == b"marco"
        assert not ends.log.events("session-replaced")


def test_port_0_that_its_holder_will_come_back_to(house: House) -> None:
    """[L-6]: neither does who asks for port 0 get a port that waits for another instance's return."""
    with Ends(house) as ends, contextlib.ExitStack() as stack:
        server, service = ends.open_server(), stack.enter_context(echo_service())
        any_port = mapping(service.address)
        port = known_port(ends, server, any_port)
        with Relay(server) as relay:
            ends.open_client(relay.address, mapping(service.address, port))
            ends.public(2)
        eventually(lambda: [lease.sessions for lease in leases(ends.server)] == [[]])
        ends.open_client(server, any_port)
        assert ends.public(3)[1] != port


def test_why_a_lease_has_ended(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log tells the session's end, also where a visitor is the first who meets it."""
    with NaivePeer.connect(ends.open_server()) as original:
        original.send_init(b"0:127.0.0.1:80")
        public = ends.public()
        [session] = ends.sessions()
        close = session.writer.close

        def meet(*arguments: Any) -> None:
            with contextlib.suppress(ConnectionError), connect(public) as visitor:  # reset at once, perhaps
                ends_with(visitor)
            close(*arguments)

        monkeypatch.setattr(session.writer, "close", meet)
        original.sock.close()
        assert ends.log.wait_for("lease-closed")["reason"] == "closed by the peer"


def test_an_error_in_what_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose first look at the rules fails ends, and leaves nothing behind."""
    with Ends() as ends:
        monkeypatch.setattr(ends.log, "check", lambda: None)
        server = ends.open_server()

        def fail(*_: object) -> None:
            raise MemoryError

        monkeypatch.setattr(ends.server, "check_allowed", fail)
        with NaivePeer.connect(server) as peer:
            peer.expect_end()
            eventually(lambda: not ends.server.has_connections())


def test_a_lease_wakes_its_own_visitors(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """[L-5]: visitors who wait for one client are not woken by another's: after a failure all come back at once."""
    server, woken, instance = ends.open_server(), [], new_instance()
    with Peer.as_client(server) as first, Peer.as_client(server, 0, instance) as second:
        for lease in leases(ends.server):
            port, notify = lease.address.port, lease.changed.notify_all
            monkeypatch.setattr(lease.changed, "notify_all", lambda p=port, n=notify: woken.append(p) or n())
        with Peer.as_client(server, second.port, instance):
            assert woken
            assert first.port not in woken


def test_no_memory_for_what_is_discarded(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session whose reader finds no memory, not even to read on after its end, leaves its port all the same."""
    read, count = rtunnel.Session._read, itertools.count()

    def read_less(session: rtunnel.Session) -> None:
        if next(count):
            raise MemoryError
        read(session)

    server = ends.open_server()
    monkeypatch.setattr(rtunnel.Session, "_read", read_less)
    with Peer.as_client(server) as peer:
        peer.send_frame(FrameType.PONG, 0, b"unasked!")  # a protocol error
        ends.log.wait_for("session-closed")
        eventually(lambda: not any(lease.sessions for lease in leases(ends.server)))


@pytest.mark.parametrize("secured", [False, True], ids=["plain", "TLS"])
def test_the_mappings_of_a_process_do_not_disturb_each_other(house: House, soon: None, secured: bool) -> None:
    """Several mappings with port 0 have a port each, lead to their own services, and have the same ports back after a
    cut; with certificates too, where all have one identity."""
    with Ends(house if secured else None) as ends, contextlib.ExitStack() as stack:
        relay = stack.enter_context(Relay(ends.open_server()))
        services = [
            stack.enter_context(Service(lambda sock, n=n: sock.sendall(b"I am %d" % n)))  # type: ignore[misc]
            for n in range(3)
        ]
        ends.open_client(relay.address, *[mapping(service.address) for service in services])

        def ports(opened: list[dict[str, str]]) -> dict[str, int]:
            return {fields["local"]: int(fields["port"]) for fields in opened}

        ends.public(3)
        before = ports(ends.opened())
        assert len(set(before.values())) == 3
        relay.cut(far=False)
        ends.public(6)
        assert ports(ends.opened()[3:]) == before
        ends.log.wait_for("session-replaced", 3)
        for n, service in enumerate(services):
            with connect(("127.0.0.1", before[service.text])) as visitor:
                assert read_exactly(visitor, 6) == b"I am %d" % n


def test_a_global_port_serves_all(ends: Ends) -> None:
    """[L-1], [O-8]: the global port belongs to all sessions that sent INIT, whatever port they ask for: WELCOME says
    which it is, each visitor goes to the session with the fewest streams, and a session that comes back replaces only
    itself."""
    server = ends.open_server(public=rtunnel.Address("127.0.0.1", 0))
    instances = [new_instance() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer.as_client(server, 4711, instance)) for instance in instances]
        public = peers[0].public
        assert {peer.port for peer in peers} == {public[1]}
        for _ in range(6):
            stack.enter_context(connect(public))
        for peer in peers:
            assert [peer.hear(FrameType.NEW_CONN)[1] for _ in range(2)] == [1, 2]

        returned = stack.enter_context(Peer.as_client(server, 0, instances[1]))
        assert peers[1].hear(*FrameType)[0] in (FrameType.GOAWAY, FrameType.CLOSE_CONN)
        assert len(ends.log.events("session-replaced")) == 1
        with connect(public):
            assert returned.hear(FrameType.NEW_CONN)[1] == 1

        peers[0].send_frame(FrameType.GOAWAY, 0, b"stopping")
        eventually(lambda: len(ends.sessions()) == 2)
        for _ in range(4):
            stack.enter_context(connect(public))
        for peer in (returned, peers[2]):
            while peer.hear(FrameType.NEW_CONN, FrameType.EOF)[0] != FrameType.NEW_CONN:
                pass
    assert not ends.log.events("visitor-refused")


def test_a_silent_client_that_has_gone(ends: Ends) -> None:
    """[O-7]: a connection that ends in the moment in which it would become a client is none, and leaves nothing."""
    address = ends.open_server(public=LOOPBACK)
    with connect(address):
        [session] = eventually(ends.server.sessions)
    eventually(lambda: not ends.server.has_connections())
    assert isinstance(session, rtunnel.ServerSession)
    hear_silence(session)
    [lease] = leases(ends.server)
    assert (lease.sessions, session.is_client) == ([], False)


def test_a_silent_client_whose_first_frame_came_in_two(ends: Ends) -> None:
    """[O-7], [F-5]: DATA of an original's stream of before does not count, however it is cut. What has begun, and may
    be an INIT, does."""
    address = ends.open_server(public=LOOPBACK)
    with NaivePeer.connect(address) as peer:
        [session] = eventually(ends.server.sessions)
        assert isinstance(session, rtunnel.ServerSession)
        data = bytes([FrameType.DATA, 0, 0, 0, 9, 0, 0, 0, 1]) + b"x"
        peer.send(data[:5])
        eventually(session.decoder.is_inside_control)
        hear_silence(session)
        assert not session.is_client
        peer.send(data[5:])
        eventually(lambda: session.is_client)  # the clock looks again
        assert ends.log.wait_for("session-opened")["level"] == "0"


# --- what the client is told -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["port-denied", "bad-request"])
def test_a_refusal_for_good_ends_the_client(client: Factory, code: str) -> None:
    """[X-5]: `port-denied` and `bad-request` end the client with status 3, and the log has the server's sentence."""
    with PeerServer() as server:
        asking = client("--server", text(server.address), "--local", "127.0.0.1:9")
        server.accept(f"error={code}\nmessage=Not on a Sunday.".encode()).sock.close()
        assert asking.wait() == 3
        assert asking.wait_for("refused")["reason"] == f"{code}: Not on a Sunday."


def test_a_port_that_cannot_be_bound(server: Factory, client: Factory) -> None:
    """[O-4]: an address that the server's machine does not have, or not yet, is `unavailable`: the server warns of it
    at its start, and the client comes again."""
    serving = server("--public-bind", "192.0.2.1")  # documentation only (RFC 5737): nobody has it
    assert serving.wait_for("public-bind-unavailable")["address"] == "192.0.2.1"
    where = ("--server", text(serving.control_address), "--local", "127.0.0.1:9")
    asking = client(*where, limits={"FIRST_RETRY_S": 0.05})
    reason = "unavailable: port 0 cannot be opened: Cannot assign requested address"
    asking.wait_for("session-closed", reason=reason)
    asking.wait_for("session-closed", reason=reason)
    assert serving.wait_for("lease-failed")["port"] == "0"


DENIED = b"error=port-denied\nmessage=No."


def test_all_mappings_refused_for_good(client: Factory) -> None:
    """[X-5]: where no mapping was ever open, and all are refused for good, the client ends with status 3, each
    refusal told."""
    with PeerServer() as server:
        flags = ("--forward", "0:127.0.0.1:9", "--forward", "1:127.0.0.1:9")
        asking = client("--server", text(server.address), *flags)
        server.accept(DENIED).sock.close()
        asking.wait_for("refused", reason="port-denied: No.")
        assert asking.process.poll() is None
        server.accept(DENIED).sock.close()
        assert asking.wait() == 3
        assert len(asking.events("refused")) == 2


def test_one_mapping_refused_for_good(client: Factory) -> None:
    """[X-5]: a mapping that is refused for good beside another is tried again, every --reconnect-max seconds, and the
    same refusal is told once; the other one serves, and the client lives."""
    with PeerServer() as server:
        flags = ("--forward", "0:127.0.0.1:9", "--forward", "1:127.0.0.1:8", "--reconnect-max=0.5")
        asking = client("--server", text(server.address), *flags)
        served, denied = server.accept(), server.accept(DENIED)
        denied.sock.close()
        said = [time.monotonic()]
        for _ in range(2):
            server.accept(DENIED).sock.close()
            said.append(time.monotonic())
        assert all(0.4 < later - earlier < 3.0 for earlier, later in itertools.pairwise(said))
        asking.wait_for_count(2, "session-closed", reason="port-denied: No.")
        server.accept()
        asking.wait_for_count(2, "session-opened")
        assert len(asking.events("refused")) == 1
        served.send_frame(rtunnel.FrameType.PING, 0, b"still on")
        served.hear(rtunnel.FrameType.PONG)


def test_a_mapping_that_is_denied_later(ends: Ends) -> None:
    """[X-5]: a client that has served does not end where its mapping is refused for good: a restart of the server by
    a wrong file would end all its clients."""
    with PeerServer() as server:
        client = ends.open_client(server.address, mapping(("127.0.0.1", 9)))
        first = server.accept()
        ends.log.wait_for("session-opened", level=1)
        first.sock.close()
        server.accept(DENIED).sock.close()
        server.accept()
        ends.log.wait_for("session-opened", 2, level=1)
        assert "refused" not in [client.words.get() for _ in range(client.words.qsize())]


def test_other_refusals_are_tried_again(ends: Ends, soon: None) -> None:
    """[X-5]: `port-in-use`, `too-many-clients`, `shutting-down` and any code that is unknown: the client comes
    back."""
    codes = ["port-in-use", "too-many-clients", "shutting-down", "not-invented-yet"]
    with PeerServer() as server:
        ends.open_client(server.address, mapping(("127.0.0.1", 9)))
        for code in codes:
            server.accept(f"error={code}\nmessage=Later.".encode()).sock.close()
            ends.log.wait_for("session-closed", reason=f"{code}: Later.")
        server.accept()
        ends.log.wait_for("session-opened", level=1)
        assert len({init.instance for init in server.inits}) == 1


def test_the_public_address_is_the_first_that_is_said(server: Factory, program: Factory) -> None:
    """The client's first line at info level says the public address that it got, and the level."""
    serving = server()
    asking = program("client", "--server", text(serving.control_address), "--local", "127.0.0.1:9")
    public = serving.lease_address()
    asking.wait_for("session-opened", public=text(public), level=1)
    assert asking.records[0].event == "session-opened"
