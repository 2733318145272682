"""The original's two programs, played by the naive peer, against ours (PROTOCOL.md, level 0)."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from conftest import Factory
from naive_peer import CLOSE_CONN, DATA, INIT, NEW_CONN, NaivePeer, OriginalClient, OriginalServer, frame
from support import (
    Address,
    Program,
    Service,
    Sink,
    connect,
    echo,
    echo_service,
    ends_with,
    eventually,
    free_port,
    read_all,
    read_exactly,
    reset,
    running,
)

LOOPBACK: Address = ("127.0.0.1", 0)


def name_of(sock: socket.socket) -> str:
    """This end's address, as the other end logs it."""
    host, port = sock.getsockname()[:2]
    return f"{host}:{port}"


@contextmanager
def leased(program: Program, init: bytes = b"0:127.0.0.1:80") -> Iterator[tuple[NaivePeer, Address]]:
    """The original's client with a lease of its own on our server, and where its visitors go."""
    with NaivePeer.connect(program.control_address) as peer:
        peer.send_init(init)
        yield peer, program.session_address(peer=name_of(peer.sock))


def check_serves(peer: NaivePeer, public: Address, stream: int) -> None:
    """A visitor's word and the answer to it cross the session; its streams were fewer than `stream` so far."""
    with connect(public) as visitor:
        peer.expect(NEW_CONN, stream)
        visitor.sendall(b"ping")
        peer.expect(DATA, stream, b"ping")
        peer.send_frame(DATA, stream, b"pong")
        assert read_exactly(visitor, 4) == b"pong"
    peer.expect(CLOSE_CONN, stream)
    peer.send_frame(CLOSE_CONN, stream)


# --- the original's client against our server ----------------------------------------------------------------


def test_a_stream_byte_for_byte(server: Factory) -> None:
    """[O-3], [S-1]: INIT opens the port that it names; a stream is the bytes of the frame table."""
    program = server()
    port = free_port()
    with NaivePeer.connect(program.control_address) as peer:
        init = f"{port}:127.0.0.1:80".encode()
        peer.send(bytes.fromhex("04 00000000") + len(init).to_bytes(4, "big") + init)
        assert program.lease_address() == ("127.0.0.1", port)
        with connect(("127.0.0.1", port)) as visitor:
            peer.expect_bytes(bytes.fromhex("01 00000001 00000000"))
            visitor.sendall(b"hi")
            peer.expect_bytes(bytes.fromhex("02 00000001 00000002 6869"))
            peer.send(bytes.fromhex("02 00000001 00000003 796573"))
            assert read_exactly(visitor, 3) == b"yes"
        peer.expect_bytes(bytes.fromhex("03 00000001 00000000"))
        peer.send(bytes.fromhex("03 00000001 00000000"))
        with connect(("127.0.0.1", port)):
            peer.expect_bytes(bytes.fromhex("01 00000002 00000000"))


@pytest.mark.parametrize(
    "init",
    [b"0:127.0.0.1:80", b"0:", b"0:[::1]:80", b"0:localhost:http", b"0:h:1\nsomething=else\n\xff", b"00:a b\r"],
)
def test_init_with_and_without_text(server: Factory, init: bytes) -> None:
    """[O-2]: what stands behind the port and its colon is opaque, and no answer comes."""
    with leased(server(), init) as (peer, public):
        check_serves(peer, public, 1)


@pytest.mark.parametrize(
    "init",
    [b"", b":127.0.0.1:80", b"8080", b"port:h:1", b"-1:h:1", b"65536:h:1", b"+80:h:1", b" 80:h:1", b"8_0:h:1",
     "\u0661:h:1".encode(), b"1" * 4096],
    ids=lambda init: repr(init[:12]),
)  # fmt: skip
def test_bad_init_is_refused(server: Factory, init: bytes) -> None:
    """[O-2]: an INIT without a port from 0 to 65535 and a colon is refused."""
    program = server()
    with NaivePeer.connect(program.control_address) as peer:
        name = name_of(peer.sock)
        peer.send_init(init)
        peer.expect_end()
    program.wait_for("refused", peer=name)
    assert not program.events("session-opened")


def test_init_in_pieces_and_on_any_stream(server: Factory) -> None:
    """[F-5], [F-6]: INIT may come byte by byte, and its stream is ignored."""
    program = server()
    with NaivePeer.connect(program.control_address) as peer:
        peer.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in frame(INIT, 7, b"0:127.0.0.1:80"):
            peer.send(bytes([byte]))
        check_serves(peer, program.lease_address(), 1)


def test_the_clients_end_is_the_visitors_end(server: Factory) -> None:
    """[E-1], [E-4]: CLOSE_CONN behind DATA gives the visitor all bytes and a clean end, and is answered."""
    with leased(server()) as (peer, public), connect(public) as visitor:
        peer.expect(NEW_CONN, 1)
        peer.send(frame(DATA, 1, b"bye") + frame(CLOSE_CONN, 1))
        assert read_all(visitor) == b"bye"
        peer.expect(CLOSE_CONN, 1)
        visitor.close()
        check_serves(peer, public, 2)  # no second CLOSE_CONN came between


def test_close_before_any_data_is_a_refusal(server: Factory) -> None:
    """[E-6]: the original says by a bare CLOSE_CONN that the local service refused: the visitor is reset."""
    with leased(server()) as (peer, public), connect(public) as visitor:
        peer.expect(NEW_CONN, 1)
        peer.send_frame(CLOSE_CONN, 1)
        assert ends_with(visitor) == "reset"
        peer.expect(CLOSE_CONN, 1)
        check_serves(peer, public, 2)


def test_a_reason_resets_the_visitor(server: Factory) -> None:
    """[E-5]: CLOSE_CONN with a payload resets the visitor, after DATA too."""
    with leased(server()) as (peer, public), connect(public) as visitor:
        peer.expect(NEW_CONN, 1)
        peer.send_frame(DATA, 1, b"half a")
        assert read_exactly(visitor, 6) == b"half a"
        peer.send_frame(CLOSE_CONN, 1, b"reset")
        assert ends_with(visitor) == "reset"
        peer.expect(CLOSE_CONN, 1)


def test_a_visitors_reset_has_a_reason(server: Factory) -> None:
    """[E-3]: a visitor that resets its connection ends the stream with a reason."""
    with leased(server()) as (peer, public):
        visitor = connect(public)
        peer.expect(NEW_CONN, 1)
        reset(visitor)
        assert peer.read_close(1) == b"reset"
        peer.send_frame(CLOSE_CONN, 1)
        check_serves(peer, public, 2)


def test_defect_10_first_bytes_of_a_server_first_protocol(server: Factory) -> None:
    """Defect 10: a banner that the client sends as fast as it can after NEW_CONN reaches every visitor."""
    with leased(server()) as (peer, public):
        for stream in range(1, 101):
            with connect(public) as visitor:
                peer.expect(NEW_CONN, stream)  # although the visitor says nothing
                peer.send_frame(DATA, stream, b"SSH-2.0-banner\r\n")
                assert read_exactly(visitor, 16) == b"SSH-2.0-banner\r\n"
            peer.expect(CLOSE_CONN, stream)
            peer.send_frame(CLOSE_CONN, stream)


def test_unknown_frames_are_skipped(server: Factory) -> None:
    """[F-3], [O-5]: up to 16 unknown frames may come before INIT, any number after it, and none does anything."""
    program = server()
    unknown = frame(0x63, 5, b"x" * 4096)
    with NaivePeer.connect(program.control_address) as peer:
        peer.send(unknown * 16 + frame(INIT, 0, b"0:h:1"))
        public = program.lease_address()
        with connect(public) as visitor:
            peer.expect(NEW_CONN, 1)
            peer.send(unknown * 40 + frame(DATA, 1, b"a") + unknown + frame(DATA, 1, b"b"))
            assert read_exactly(visitor, 2) == b"ab"


def test_an_originals_streams_of_before_a_reconnect(server: Factory) -> None:
    """[O-5], [S-5]: an original's client goes on sending for the streams of its lost connection, before INIT and
    behind it: that is dropped, meets no visitor, and the session serves."""
    program = server()
    old = b"".join(frame(DATA, stream, b"of before") + frame(CLOSE_CONN, stream) for stream in (1, 7, 2**32 - 1))
    with NaivePeer.connect(program.control_address) as peer:
        peer.send(old + frame(INIT, 0, b"0:h:1") + old)
        public = program.lease_address()
        with connect(public) as visitor:
            peer.expect(NEW_CONN, 1)
            peer.send(frame(DATA, 7, b"of before") + frame(DATA, 1, b"of now"))
            assert read_exactly(visitor, 6) == b"of now"


@pytest.mark.parametrize("at_once", [True, False])
def test_too_many_unknown_frames_before_init(server: Factory, at_once: bool) -> None:
    """[O-5], [F-5]: the 17th unknown frame before INIT is refused, in one segment with INIT or alone."""
    program = server()
    with NaivePeer.connect(program.control_address) as peer:
        name = name_of(peer.sock)
        peer.send(frame(0x63, 0) * 17 + (frame(INIT, 0, b"0:h:1") if at_once else b""))
        peer.expect_end()
    program.wait_for("refused", peer=name)
    assert not program.events("lease-opened")


def test_data_after_the_end_is_dropped(server: Factory) -> None:
    """[S-5]: what comes for a stream that has ended is dropped."""
    with leased(server()) as (peer, public):
        check_serves(peer, public, 1)
        peer.send(frame(DATA, 1, b"late") + frame(CLOSE_CONN, 1) + frame(CLOSE_CONN, 1, b"reset"))
        check_serves(peer, public, 2)


def test_two_clients_ask_for_one_port(server: Factory) -> None:
    """[O-4]: the second client that asks for a port is closed with the reason in the log, the first serves on."""
    program = server()
    with leased(program) as (peer, public):
        with NaivePeer.connect(program.control_address) as second:
            second.send_init(f"{public[1]}:127.0.0.1:80".encode())
            second.expect_end()
            assert "port-in-use" in program.wait_for("refused", peer=name_of(second.sock))["reason"]
        check_serves(peer, public, 1)


def test_a_port_is_free_when_its_client_has_gone(server: Factory) -> None:
    """[O-4], [S-7]: a lease ends with its session; the next client has the port, and ids begin at 1 again."""
    program = server()
    with leased(program) as (peer, public):
        check_serves(peer, public, 1)
    for _ in range(3):
        program.wait_for("lease-closed")
        with leased(program, f"{public[1]}:h:1".encode()) as (peer, again):
            assert again == public
            check_serves(peer, public, 1)


def test_a_session_that_ends_resets_its_visitors(server: Factory) -> None:
    """[S-7]: the end of the control connection is no clean end for its visitors."""
    program = server()
    with leased(program) as (peer, public), connect(public) as visitor:
        peer.expect(NEW_CONN, 1)
        peer.send_frame(DATA, 1, b"half a")
        assert read_exactly(visitor, 6) == b"half a"
        peer.sock.close()
        assert ends_with(visitor) == "reset"


def test_clients_of_the_global_port(server: Factory) -> None:
    """[O-7], [O-8]: no INIT makes a client after 2 s (here 0.5 s), which has visitors while no other has sent INIT."""
    program = server("--public-listen", "127.0.0.1:0", limits={"SILENT_CLIENT_S": 0.5})
    public = program.public_address
    with pytest.raises(ConnectionResetError), connect(public) as visitor:
        read_all(visitor)  # nobody is there
    with NaivePeer.connect(program.control_address) as silent:
        accepted = time.monotonic()
        program.wait_for("session-opened", peer=name_of(silent.sock))
        assert 0.4 < time.monotonic() - accepted < 3.0
        check_serves(silent, public, 1)
        with NaivePeer.connect(program.control_address) as asking:
            asking.send_init(b"8080:127.0.0.1:80")  # its port is ignored
            program.wait_for("session-opened", peer=name_of(asking.sock))
            assert not program.events("lease-opened")
            check_serves(asking, public, 1)
            with connect(public), connect(public):
                asking.expect(NEW_CONN, 2)
                asking.expect(NEW_CONN, 3)
                silent.send_init(b"8080:127.0.0.1:80")  # late: from now on it counts like the other
                program.wait_for("session-opened", peer=name_of(silent.sock))
                with connect(public), connect(public):
                    silent.expect(NEW_CONN, 2)
                    silent.expect(NEW_CONN, 3)
            assert {silent.read_frame()[:2] for _ in range(2)} == {(CLOSE_CONN, 2), (CLOSE_CONN, 3)}
            name = name_of(asking.sock)
        program.wait_for("session-closed", peer=name)
        check_serves(silent, public, 4)


def test_the_originals_client_carries_traffic(server: Factory) -> None:
    """The original's client serves 20 visitors at a time through our server, with a lease and on a global port."""
    leasing = server()
    sharing = server("--public-listen", "127.0.0.1:0", limits={"SILENT_CLIENT_S": 0.1})
    with echo_service() as service:
        asking = OriginalClient(leasing.control_address, free_port(), service.address)
        silent = OriginalClient(sharing.control_address, 0, service.address)
        with running(asking.run, asking.stop), running(silent.run, silent.stop):
            sharing.wait_for("session-opened")
            for public in (leasing.lease_address(), sharing.public_address):
                echo_many(public, 20, 50_000)


def echo_many(public: Address, visitors: int, size: int) -> None:
    """Visitors at the same time, each with bytes of its own that come back whole and in order."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(connect(public)) for _ in range(visitors)]
        payloads = [bytes([n]) * size for n in range(visitors)]
        threads = [
            threading.Thread(target=sock.sendall, args=(payload,))
            for sock, payload in zip(sockets, payloads, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            for sock, payload in zip(sockets, payloads, strict=True):
                assert read_exactly(sock, size) == payload
        finally:
            for thread in threads:
                thread.join()


# --- the original's server against our client ----------------------------------------------------------------


class ControlPort:
    """A control port where the original's server would listen; `accept` gives its next client."""

    def __init__(self) -> None:
        self._listener = socket.create_server(LOOPBACK)
        self._listener.settimeout(10.0)
        self.text = name_of(self._listener)

    def accept(self) -> NaivePeer:
        return NaivePeer(self._listener.accept()[0])

    def __enter__(self) -> ControlPort:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()


@contextmanager
def served(client: Factory, service: Service, *flags: str) -> Iterator[tuple[NaivePeer, Program]]:
    """Our client in a session with the original's server; its INIT is read."""
    with ControlPort() as port:
        program = client("--server", port.text, "--local", service.text, *flags)
        with port.accept() as peer:
            read_init(peer, service.text)
            yield peer, program


def read_init(peer: NaivePeer, local: str, port: int = 0) -> None:
    """The first frame is an INIT that asks for this port; other lines may follow the address."""
    type, stream, payload = peer.read_frame()
    assert (type, stream) == (INIT, 0)
    assert payload.split(b"\n")[0] == f"{port}:{local}".encode()


def check_echo(peer: NaivePeer, stream: int) -> None:
    """A new stream to an echo service, opened, used and closed by the server, which hears the answer."""
    peer.send(frame(NEW_CONN, stream) + frame(DATA, stream, b"ping"))
    peer.expect(DATA, stream, b"ping")
    peer.send_frame(CLOSE_CONN, stream)
    peer.expect(CLOSE_CONN, stream)


def test_our_init_byte_for_byte(client: Factory) -> None:
    """[O-1], [O-2]: our client's first bytes are the INIT that the original's server understands."""
    with ControlPort() as port:
        client("--server", port.text, "--local", "127.0.0.1:80", "--remote-port", "8080")
        with port.accept() as peer:
            header = peer._exactly(9)
            assert header[:5] == bytes.fromhex("04 00000000")
            payload = peer._exactly(int.from_bytes(header[5:], "big"))
            assert payload[:17] == bytes.fromhex("383038303a3132372e302e302e313a3830")
            assert payload[17:18] in (b"", b"\n")


def test_a_local_stream_byte_for_byte(client: Factory) -> None:
    """NEW_CONN dials the local service; its DATA and its CLOSE_CONN are the bytes of the frame table."""
    with echo_service() as service, served(client, service) as (peer, _):
        peer.send(bytes.fromhex("01 00000001 00000000"))
        peer.send(bytes.fromhex("02 00000001 00000002 6869"))
        peer.expect_bytes(bytes.fromhex("02 00000001 00000002 6869"))
        peer.send(bytes.fromhex("03 00000001 00000000"))
        peer.expect_bytes(bytes.fromhex("03 00000001 00000000"))
        check_echo(peer, 2)


def test_defect_10_banner_of_the_local_service(client: Factory) -> None:
    """Defect 10, the other end: a local service that speaks first is heard, and its clean end behind its words."""
    with Service(lambda sock: sock.sendall(b"220 ready\r\n")) as service, served(client, service) as (peer, _):
        for stream in range(1, 51):
            peer.send_frame(NEW_CONN, stream)
            peer.expect_data(stream, b"220 ready\r\n")
            peer.expect(CLOSE_CONN, stream)  # no answer comes: the original's server need not


def test_the_servers_end_is_the_local_services_end(client: Factory) -> None:
    """[E-1], [E-4]: CLOSE_CONN behind DATA gives the local service all bytes and a clean end, and is answered."""
    sink = Sink()
    with Service(sink) as service, served(client, service) as (peer, _):
        peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"all of it") + frame(CLOSE_CONN, 1))
        peer.expect(CLOSE_CONN, 1)
        assert sink.ended.wait(10)
        assert (bytes(sink.received), sink.end) == (b"all of it", "eof")


def test_a_reason_resets_the_local_service(client: Factory) -> None:
    """[E-5]: CLOSE_CONN with a payload resets the local service's connection."""
    sink = Sink()
    with Service(sink) as service, served(client, service) as (peer, _):
        peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"half a"))
        eventually(lambda: sink.received == b"half a")
        peer.send_frame(CLOSE_CONN, 1, b"reset")
        peer.expect(CLOSE_CONN, 1)
        assert sink.ended.wait(10)
        assert sink.end == "reset"


def test_a_local_service_that_refuses(client: Factory) -> None:
    """[E-6]: a refused dial ends its stream with a reason, and the session goes on."""
    with ControlPort() as port:
        nobody = free_port()
        client("--server", port.text, "--local", f"127.0.0.1:{nobody}")
        with port.accept() as peer:
            read_init(peer, f"127.0.0.1:{nobody}")
            peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"hello"))
            assert peer.read_close(1) == b"refused"
            with Service(echo, port=nobody):
                check_echo(peer, 2)


def test_a_local_reset_has_a_reason(client: Factory) -> None:
    """[E-3]: a local service that resets its connection ends the stream with a reason."""

    def break_off(sock: socket.socket) -> None:
        read_exactly(sock, 1)
        reset(sock)

    with Service(break_off) as service, served(client, service) as (peer, _):
        peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"x"))
        assert peer.read_close(1) == b"reset"


def test_what_our_client_ignores(client: Factory) -> None:
    """[F-3], [F-6], [S-5]: unknown frames, NEW_CONN's payload and frames of ended streams do nothing."""
    with echo_service() as service, served(client, service) as (peer, _):
        peer.send(frame(0x63, 1, b"x" * 4096) * 20 + frame(NEW_CONN, 1, b"203.0.113.7:51234"))
        peer.send(frame(0, 0) + frame(DATA, 1, b"a") + frame(DATA, 1) + frame(0xFF, 1, b"y"))
        peer.expect(DATA, 1, b"a")
        peer.send_frame(CLOSE_CONN, 1)
        peer.expect(CLOSE_CONN, 1)
        peer.send(frame(DATA, 1, b"late") + frame(CLOSE_CONN, 1) + frame(CLOSE_CONN, 1, b"reset"))
        check_echo(peer, 2)


def test_new_conn_frames_out_of_order(client: Factory) -> None:
    """[S-2]: a server may number two visitors before it queues their frames; both are served."""
    with echo_service() as service, served(client, service) as (peer, _):
        for stream in (2, 1, 4, 5, 3):
            peer.send(frame(NEW_CONN, stream) + frame(DATA, stream, bytes([stream])))
            peer.expect(DATA, stream, bytes([stream]))
        for stream in (1, 2, 3, 4, 5):
            peer.send_frame(DATA, stream, b"again")
            peer.expect(DATA, stream, b"again")


def test_defect_1_streams_end_with_their_session(client: Factory) -> None:
    """[S-7], defect 1: after a reconnect stream 1 is a new one; the old local connection was reset."""
    sinks: list[Sink] = []

    def handle(sock: socket.socket) -> None:
        sinks.append(Sink())
        sock.sendall(b"from the %d. connection" % len(sinks))
        sinks[-1](sock)

    with Service(handle) as service, ControlPort() as port:
        client("--server", port.text, "--local", service.text)
        with port.accept() as peer:
            read_init(peer, service.text)
            peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"old"))
            peer.expect_data(1, b"from the 1. connection")
            eventually(lambda: sinks[0].received == b"old")
        with port.accept() as peer:
            read_init(peer, service.text)
            assert sinks[0].ended.wait(10)
            assert sinks[0].end == "reset"
            peer.send(frame(NEW_CONN, 1) + frame(DATA, 1, b"new"))
            peer.expect_data(1, b"from the 2. connection")
            eventually(lambda: sinks[1].received == b"new")
            assert sinks[0].received == b"old"


def test_the_originals_server_carries_traffic(client: Factory) -> None:
    """Our client serves 20 visitors at a time of the original's server, which never answers CLOSE_CONN."""
    original = OriginalServer()
    with running(original.run, original.stop), echo_service() as service:
        host, port = original.control_address
        program = client("--server", f"{host}:{port}", "--local", service.text, "--remote-port", "8080")
        eventually(lambda: original.inits)
        assert original.inits[0].split(b"\n")[0] == f"8080:{service.text}".encode()
        echo_many(original.public_address, 20, 50_000)
        program.wait_for_count(20, "stream-closed")
        assert program.stop() == 0


# --- strangers -----------------------------------------------------------------------------------------------

STRANGERS = {
    "all ones": b"\xff" * 100,
    "an HTTP request": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",
    "an SSH client": b"SSH-2.0-OpenSSH_9.9\r\n",
    "a TLS client": bytes.fromhex("16030102000100 01fc0303") + bytes(500),
    "INIT of 4 GiB": bytes.fromhex("04 00000000 ffffffff"),
    "DATA of 4 GiB": bytes.fromhex("02 00000001 ffffffff"),
    "an unknown frame of 4 GiB": bytes.fromhex("7f 00000001 ffffffff"),
    "a part of DATA, and then nothing": bytes.fromhex("02 00000001 00100000") + b"x" * 1000,
    "the server's frame": frame(NEW_CONN, 1),
    "zeros": bytes(9 * 17),
}


@contextmanager
def beside_a_tunnel(
    server: Factory, kind: str, limits: dict[str, float] | None = None
) -> Iterator[tuple[Program, NaivePeer, Address]]:
    """A server without a global port or with one, a client of it that has sent INIT, and where its visitors go."""
    each_line = {"LOG_BURST": 100_000, "FAREWELL_S": 0.1, **(limits or {})}
    program = server(*(["--public-listen", "127.0.0.1:0"] if kind == "global" else []), limits=each_line)
    with NaivePeer.connect(program.control_address) as peer:
        peer.send_init(b"0:127.0.0.1:80")
        program.wait_for("session-opened", peer=name_of(peer.sock))
        yield program, peer, program.public_address if kind == "global" else program.lease_address()


@pytest.mark.parametrize("kind", ["lease", "global"])
def test_strangers_are_refused(server: Factory, kind: str) -> None:
    """[O-5], [X-1], [X-2]: nonsense is refused at once, with one line for each, and the tunnel serves on. DATA before
    INIT is an original's; without INIT behind it it is refused at the deadline, but where there is a global port."""
    with beside_a_tunnel(server, kind, {"HELLO_TIMEOUT_S": 1.0}) as (program, peer, public):
        strangers = {name: said for name, said in STRANGERS.items() if kind == "lease" or "DATA, and" not in name}
        for number, (name, said) in enumerate(strangers.items(), 1):
            with NaivePeer.connect(program.control_address) as stranger:
                stranger.send(said)
                stranger.expect_end()
                assert program.wait_for("refused", peer=name_of(stranger.sock))["reason"], name
            check_serves(peer, public, number)
        for event in ("refused", "session-opened"):
            expected = len(strangers) if event == "refused" else 1
            assert len(program.events(event)) == expected
        assert len(program.records) == len(program.lines), "a line that is no event"


def test_who_leaves_without_a_word_is_refused(server: Factory) -> None:
    """[O-6]: a control connection that ends before it is a session has one line in the log, too."""
    program = server()
    for leave in (socket.socket.close, reset):
        with NaivePeer.connect(program.control_address) as stranger:
            name = name_of(stranger.sock)
            leave(stranger.sock)
            program.wait_for("refused", peer=name)
    assert len(program.events("refused")) == 2


def test_silence(server: Factory) -> None:
    """[O-6], [O-7]: of 200 silent ones each is refused when its time (10 s, here 3 s) is over; with a global port they
    stay, without a visitor while another has sent INIT; who has sent half a header is refused in both. The tunnel
    serves on."""
    with ExitStack() as stack:
        times = {"HELLO_TIMEOUT_S": 3.0, "SILENT_CLIENT_S": 0.5, "MAX_STRANGERS": 1000}
        tunnels = [stack.enter_context(beside_a_tunnel(server, kind, times)) for kind in ("lease", "global")]
        started = time.monotonic()
        silent, halves = [], []
        for program, _, _ in tunnels:
            address = program.control_address
            silent.append([stack.enter_context(NaivePeer.connect(address)) for _ in range(200)])
            halves.append(stack.enter_context(NaivePeer.connect(address)))
            halves[-1].send(b"\x04\x00\x00\x00\x00")
        (leasing, peer, public), (sharing, sharing_peer, sharing_public) = tunnels
        came = time.monotonic()
        check_serves(peer, public, 1)
        check_serves(sharing_peer, sharing_public, 1)
        sharing.wait_for_count(201, "session-opened")
        check_serves(peer, public, 2)
        check_serves(sharing_peer, sharing_public, 2)
        assert not leasing.events("refused")
        for half in halves:
            half.expect_end(15.0)
        for one in silent[0]:
            one.expect_end(15.0)
        assert time.monotonic() - started > 2.9
        assert time.monotonic() - came < 6.0
        leasing.wait_for_count(201, "refused")
        sharing.wait_for_count(1, "refused")
        for one in silent[1]:
            one.expect_silence(0.001)
        check_serves(peer, public, 3)
        check_serves(sharing_peer, sharing_public, 3)
        assert len({fields["peer"] for fields in leasing.events("refused")}) == 201
        assert [len(p.events("refused")) for p, _, _ in tunnels] == [201, 1]
        assert [len(p.events("session-opened")) for p, _, _ in tunnels] == [1, 201]
