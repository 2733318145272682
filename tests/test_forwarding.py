"""Real traffic through a server and a client: whole, in order, and with its ends as they were."""

from __future__ import annotations

import hashlib
import http.server
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from conftest import Factory
from support import (
    Address,
    EchoCrowd,
    Service,
    Sink,
    connect,
    echo,
    echo_service,
    ends_with,
    eventually,
    read_all,
    read_exactly,
    reset,
    running,
)
from tunnels import (
    BLOCK,
    MODES,
    Mode,
    Tunnel,
    all_streams_closed,
    closed_port,
    fill,
    open_tunnel,
    raise_descriptor_limit,
    until_full,
    visit,
)

HUNDRED_MB = 100 * len(BLOCK)

both_paths = pytest.mark.parametrize("mode", ["plain", "polled", "tls"], indirect=True)
Opened = Callable[..., Tunnel]


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> Mode:
    """What the tunnel runs on; plain TCP where a test does not say."""
    name = getattr(request, "param", "plain")
    if name == "tls":
        house = request.getfixturevalue("house")
        return Mode(house.flags("server"), house.flags("client"))
    return MODES[name]


@pytest.fixture
def tunnel(server: Factory, client: Factory, mode: Mode) -> Opened:
    """Opens a tunnel to a local service."""

    def opened(local: Service | Address, **limits: object) -> Tunnel:
        return open_tunnel(server, client, local, mode=mode, **limits)

    return opened


def download(sock: socket.socket, count: int) -> str:
    """The digest of what the other end sends until its clean end, which must be `count` bytes."""
    digest = hashlib.sha256()
    received = 0
    while part := sock.recv(1 << 18):
        digest.update(part)
        received += len(part)
    assert received == count
    return digest.hexdigest()


def digest_of(blocks: int) -> str:
    """The digest of so many blocks."""
    digest = hashlib.sha256()
    for _ in range(blocks):
        digest.update(BLOCK)
    return digest.hexdigest()


def sender(blocks: int) -> Callable[[socket.socket], None]:
    """A handler that sends so many blocks, waits for the visitor's end and closes."""

    def send(sock: socket.socket) -> None:
        for _ in range(blocks):
            sock.sendall(BLOCK)
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)

    return send


# --- volume -------------------------------------------------------------------------------------------------


class _Files(http.server.BaseHTTPRequestHandler):
    """GET sends 100 blocks, PUT answers with the digest of what it got."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(HUNDRED_MB))
        self.end_headers()
        for _ in range(100):
            self.wfile.write(BLOCK)

    def do_PUT(self) -> None:
        digest = hashlib.sha256()
        left = int(self.headers["Content-Length"])
        while left and (part := self.rfile.read1(min(left, 1 << 18))):
            digest.update(part)
            left -= len(part)
        answer = digest.hexdigest().encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def files() -> Iterator[Address]:
    """The HTTP service of those two."""

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = False

    with (
        Server(("127.0.0.1", 0), _Files) as service,
        running(lambda: service.serve_forever(0.01), service.shutdown),
    ):
        yield ("127.0.0.1", service.server_port)


def curl(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["curl", "-sS", "--max-time", "50", *arguments], stdout=subprocess.PIPE)


@pytest.mark.skipif(not shutil.which("curl"), reason="no curl")
def test_100_mb_each_way_with_curl(tunnel: Opened, tmp_path: Path) -> None:
    """100 MB down and 100 MB up through curl arrive whole: the digests are equal."""
    expected = digest_of(100)
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.writelines([BLOCK] * 100)
    with files() as address:
        opened = tunnel(address)
        url = f"http://127.0.0.1:{opened.public[1]}/"
        with curl(url) as down:
            assert down.stdout
            assert hashlib.sha256(down.stdout.read()).hexdigest() == expected
        with curl("-H", "Expect:", "-T", str(source), url) as up:
            assert up.stdout
            assert up.stdout.read().decode() == expected
    source.unlink()
    assert (down.returncode, up.returncode) == (0, 0)


@pytest.mark.parametrize("mode", ["plain", "polled", "level 0"], indirect=True)  # over TLS: test_tls_program.py
def test_100_mb_each_way_with_sockets(tunnel: Opened, mode: Mode) -> None:
    """100 MB down, and 100 MB up into a sink at the same time, arrive whole: the digests are equal."""
    digest = hashlib.sha256()
    whole = threading.Event()

    def both(sock: socket.socket) -> None:
        with running(lambda: [sock.sendall(BLOCK) for _ in range(100)]):
            left = HUNDRED_MB
            while left and (part := sock.recv(1 << 18)):
                digest.update(part)
                left -= len(part)
            whole.set()
        sock.shutdown(socket.SHUT_WR)
        read_all(sock)

    expected = digest_of(100)
    with Service(both) as service, tunnel(service).connect() as visitor:
        with running(lambda: [visitor.sendall(BLOCK) for _ in range(100)]):
            assert download(visitor, HUNDRED_MB) == expected
        assert whole.wait(10)
    assert digest.hexdigest() == expected


@pytest.mark.parametrize("mode", ["plain", "tls"], indirect=True)
def test_50_downloads_at_a_time(tunnel: Opened, mode: Mode) -> None:
    """50 downloads of 1 MB at the same time all arrive whole."""
    with Service(sender(1)) as service, ExitStack() as stack:
        opened = tunnel(service)
        visitors = [stack.enter_context(opened.connect()) for _ in range(50)]
        got: list[str] = []
        threads = [threading.Thread(target=lambda v=v: got.append(download(v, len(BLOCK)))) for v in visitors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [digest_of(1)] * 50


@pytest.mark.parametrize("mode", ["plain", "tls"], indirect=True)
def test_1000_echo_connections(tunnel: Opened, mode: Mode) -> None:
    """1,000 connections are open at the same time, and each gets its own words back."""
    raise_descriptor_limit(8192)
    with EchoCrowd() as service, ExitStack() as stack:
        opened = tunnel(service)
        visitors = [stack.enter_context(opened.connect()) for _ in range(1000)]
        for number, visitor in enumerate(visitors):
            visitor.sendall(b"%06d" % number)
        for number, visitor in enumerate(visitors):
            assert read_exactly(visitor, 6) == b"%06d" % number
        assert opened.client.descriptors() > 1000
        for visitor in visitors:
            visitor.shutdown(socket.SHUT_WR)
        for visitor in visitors:
            assert ends_with(visitor) == "eof"
        all_streams_closed(opened.server, opened.client)


def test_streams_leave_nothing_behind(tunnel: Opened) -> None:
    """Streams that have ended, cleanly or not, hold no descriptor at either end."""
    with echo_service() as service:
        opened = tunnel(service)
        before = [each.descriptors() for each in opened[:2]]
        for number in range(60):
            visitor = opened.connect()
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            (reset if number % 2 else socket.socket.close)(visitor)
        opened.server.wait_for_count(60, "stream-closed")
        opened.client.wait_for_count(60, "stream-closed")
        assert [each.descriptors() for each in opened[:2]] == before


# --- ends ---------------------------------------------------------------------------------------------------


@both_paths
def test_urgent_bytes_are_bytes(tunnel: Opened, mode: Mode) -> None:
    """[S-4]: what TCP calls urgent, as Telnet's marks are, crosses the tunnel in its place, in both directions."""
    heard: list[bytes] = []

    def answer(sock: socket.socket) -> None:
        heard.append(read_exactly(sock, 7))
        for part, flags in ((b"DEF", 0), (b"?", socket.MSG_OOB), (b"abc", 0)):
            sock.send(part, flags)

    with Service(answer) as service, tunnel(service).connect() as visitor:
        visitor.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        for part, flags in ((b"abc", 0), (b"!", socket.MSG_OOB), (b"def", 0)):
            visitor.send(part, flags)
        assert read_exactly(visitor, 7) == b"DEF?abc"
    assert heard == [b"abc!def"]


@both_paths
def test_a_refusing_local_service_is_a_reset(tunnel: Opened, mode: Mode) -> None:
    """A local service that refuses gives the visitor a reset, whether or not it has sent something."""
    with closed_port() as address:
        opened = tunnel(address)
        for said in (b"", b"hello"):
            assert visit(opened.public, said) == "reset"
        opened.client.wait_for_count(2, "dial-failed", reason="Connection refused")


@both_paths
def test_a_visitors_reset_is_a_reset(tunnel: Opened, mode: Mode) -> None:
    """A visitor's reset is a reset at the local service, which has got all before it."""
    sink = Sink()
    with Service(sink) as service:
        visitor = tunnel(service).connect()
        visitor.sendall(b"half a request")
        eventually(lambda: sink.received == b"half a request")
        reset(visitor)
        assert sink.ended.wait(10)
        assert sink.end == "reset"


@both_paths
def test_a_local_services_reset_is_a_reset(tunnel: Opened, mode: Mode) -> None:
    """The local service's reset is a reset at the visitor, also amid an answer."""

    def half_an_answer(sock: socket.socket) -> None:
        read_exactly(sock, 1)
        sock.sendall(b"half an answer")
        read_exactly(sock, 1)
        reset(sock)

    with Service(half_an_answer) as service, tunnel(service).connect() as visitor:
        visitor.sendall(b"x")
        assert read_exactly(visitor, 14) == b"half an answer"
        visitor.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            visitor.recv(1)


@both_paths
def test_a_visitors_clean_end_is_clean(tunnel: Opened, mode: Mode) -> None:
    """A visitor's clean end is a clean end at the local service, behind all bytes."""
    sink = Sink()
    with Service(sink) as service:
        with tunnel(service).connect() as visitor:
            visitor.sendall(BLOCK)
        assert sink.ended.wait(10)
        assert (sink.end, sink.received == BLOCK) == ("eof", True)


@both_paths
def test_a_local_services_clean_end_is_clean(tunnel: Opened, mode: Mode) -> None:
    """The local service's clean end is a clean end at the visitor, behind all bytes."""
    with Service(lambda sock: sock.sendall(BLOCK)) as service, tunnel(service).connect() as visitor:
        assert read_all(visitor) == BLOCK


@both_paths
def test_truncation_is_a_reset(tunnel: Opened, mode: Mode) -> None:
    """A download that the local service breaks off is a reset at a visitor that is slow to read it, too."""
    failing = threading.Event()

    def break_off(sock: socket.socket) -> None:
        until_full(sock)  # all queues on the way
        reset(sock)
        failing.set()

    with Service(break_off) as service, tunnel(service).connect() as visitor:
        assert failing.wait(10)
        assert ends_with(visitor) == "reset"


@pytest.mark.parametrize("killed", ["server", "client"])
def test_a_killed_end_is_a_reset(tunnel: Opened, killed: str) -> None:
    """When one end of the tunnel is killed, visitors and local service see a reset, never an end that looks whole."""
    sink = Sink()

    def answer(sock: socket.socket) -> None:
        sock.sendall(b"half")
        sink(sock)

    with Service(answer) as service:
        opened = tunnel(service)
        with opened.connect() as visitor:
            visitor.sendall(b"half")
            assert read_exactly(visitor, 4) == b"half"
            eventually(lambda: sink.received == b"half")
            getattr(opened, killed).kill()
            assert ends_with(visitor) == "reset"
            assert sink.ended.wait(10)
            assert sink.end == "reset"


# --- slow and silent ones -----------------------------------------------------------------------------------


@both_paths
def test_a_slow_reader_gets_every_byte(tunnel: Opened, mode: Mode) -> None:
    """A visitor that reads slowly gets every byte and a clean end, long after the local service has closed."""
    closed = threading.Event()

    def answer(sock: socket.socket) -> None:
        for _ in range(6):
            sock.sendall(BLOCK)
        closed.set()

    with Service(answer) as service:
        opened = tunnel(service, LINGER_S=0.05)
        with socket.socket() as visitor:
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            visitor.settimeout(10)
            visitor.connect(opened.public)
            received = bytearray()
            pace = threading.Event()
            while part := visitor.recv(256 * 1024):
                received += part
                pace.wait(0.002)
            assert closed.is_set()
            assert len(received) == 6 * len(BLOCK)
            assert received == BLOCK * 6


@both_paths
def test_a_stream_that_hangs_holds_up_no_other(tunnel: Opened, mode: Mode) -> None:
    """Beside a visitor that reads nothing and a local connection that reads nothing, others are served."""
    leave = threading.Event()

    def hang_or_echo(sock: socket.socket) -> None:
        if read_exactly(sock, 1) == b"e":
            return echo(sock)
        sock.sendall(BLOCK[: 512 * 1024])
        leave.wait(10)
        read_all(sock)
        return None

    with Service(hang_or_echo) as service:
        opened = tunnel(service)
        with opened.connect() as hung:
            hung.sendall(b"h" + BLOCK[: 512 * 1024])
            for _ in range(20):
                with opened.connect() as visitor:
                    visitor.sendall(b"ehello")
                    assert read_exactly(visitor, 5) == b"hello"
            leave.set()
            assert read_exactly(hung, 512 * 1024) == BLOCK[: 512 * 1024]


def test_a_local_service_that_never_answers_the_dial(tunnel: Opened) -> None:
    """A local service that does not answer the dial in time gives the visitor a reset."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as stack:
        address = listener.getsockname()
        for sock in fill(address):
            stack.enter_context(sock)
        opened = tunnel(address, DIAL_TIMEOUT_S=0.3)
        assert visit(opened.public) == "reset"
        assert opened.client.wait_for("dial-failed")["reason"] == "timed out"


@pytest.mark.parametrize("mode", ["level 0"], indirect=True)
def test_a_stalled_stream_is_reset(tunnel: Opened, mode: Mode) -> None:
    """A visitor that takes nothing while its queue is full is reset at the limit of level 0; others go on."""

    def endless_or_echo(sock: socket.socket) -> None:
        if read_exactly(sock, 1) == b"e":
            return echo(sock)
        while True:
            sock.sendall(BLOCK)

    with Service(endless_or_echo) as service:
        opened = tunnel(service, LEVEL_0_WAIT_S=0.3)
        with opened.connect() as stalled, opened.connect() as visitor:
            stalled.sendall(b"d")
            closed = opened.server.wait_for("stream-closed")
            assert closed["reason"] == "stalled"
            visitor.sendall(b"ehello")
            assert read_exactly(visitor, 5) == b"hello"
            assert ends_with(stalled) == "reset"
            assert [each.events("session-closed") for each in opened[:2]] == [[], []]


def test_back_pressure_is_bounded_downwards(tunnel: Opened) -> None:
    """A visitor that reads nothing stops the local service; both ends hold a bounded number of bytes for it,
    and it gets every byte when it reads again."""
    full = threading.Event()
    sent: list[int] = []

    def push(sock: socket.socket) -> None:
        sent.append(until_full(sock))
        full.set()

    with Service(push) as service:
        opened = tunnel(service)
        before = [each.memory_bytes() for each in opened[:2]]
        with socket.socket() as visitor:
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            visitor.connect(opened.public)
            visitor.settimeout(10)
            assert full.wait(20)
            grown = [each.memory_bytes() - old for each, old in zip(opened[:2], before, strict=True)]
            assert max(grown) < 8 << 20, grown
            received = read_all(visitor)
            assert len(received) == sent[-1]
            assert received == (BLOCK * 65)[: len(received)]


def test_back_pressure_is_bounded_upwards(tunnel: Opened) -> None:
    """A local service that reads nothing stops its visitor; both ends hold a bounded number of bytes for it,
    and it gets every byte when it reads again."""
    read_on = threading.Event()
    received = bytearray()

    def read_late(sock: socket.socket) -> None:
        read_on.wait(30)
        received.extend(read_all(sock))

    with Service(read_late) as service:
        opened = tunnel(service)
        before = [each.memory_bytes() for each in opened[:2]]
        with opened.connect() as visitor:
            sent = until_full(visitor)
            grown = [each.memory_bytes() - old for each, old in zip(opened[:2], before, strict=True)]
            assert max(grown) < 8 << 20, grown
            read_on.set()
        opened.client.wait_for("stream-closed")
        eventually(lambda: len(received) == sent)
        assert received == (BLOCK * 65)[:sent]


def test_ipv6_local_service(server: Factory, client: Factory) -> None:
    """A local service and a control port on IPv6 serve like others."""
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    try:
        service = echo_service("::1")
    except OSError:
        pytest.skip("no IPv6 loopback")
    with service:
        serving = server("--control-listen", "[::1]:0", "--public-bind", "::1")
        control = serving.wait_for("listening", kind="control")["address"]
        client("--server", control, "--local", service.text)
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(b"six")
            assert read_exactly(visitor, 3) == b"six"
