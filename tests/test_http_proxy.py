"""To the server through an HTTP proxy (`--proxy`): a real one, and what proxies may answer."""

from __future__ import annotations

import base64
import contextlib
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Factory
from engines import wanted
from support import (
    Service,
    connect,
    echo_service,
    eventually,
    free_port,
    read_all,
    read_exactly,
)
from test_config import Command
from test_config import command as command
from tls_peers import House
from tunnels import closed_port, http_proxy, text

import rtunnel

SECRET = "s3cret"
real = wanted("tinyproxy")


class Tinyproxy:
    """A real proxy in a process of its own, at one port whenever it runs."""

    def __init__(self, folder: Path, *lines: str) -> None:
        self.port = free_port()
        self._config = folder / f"tinyproxy-{self.port}.conf"
        standard = [f"Port {self.port}", "Listen 127.0.0.1", "Timeout 600", "MaxClients 100", "LogLevel Error"]
        self._config.write_text("".join(f"{line}\n" for line in (*standard, *lines)))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(["tinyproxy", "-d", "-c", str(self._config)], stdout=subprocess.DEVNULL)
        eventually(self._listens, what="tinyproxy listens")

    def _listens(self) -> bool:
        with contextlib.suppress(ConnectionRefusedError), connect(("127.0.0.1", self.port)):
            return True
        return False

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@pytest.fixture
def tinyproxy(tmp_path: Path) -> Iterator[Callable[..., Tinyproxy]]:
    started: list[Tinyproxy] = []

    def start(*lines: str) -> Tinyproxy:
        started.append(Tinyproxy(tmp_path, *lines))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def check_echo(port: int) -> None:
    with connect(("127.0.0.1", port)) as visitor:
        visitor.sendall(b"marco")
        assert read_exactly(visitor, 5) == b"marco"


# --- a real proxy ------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize("mode", ["plain", "tls", "level 0"])
@pytest.mark.parametrize("password", ["", SECRET])
def test_through_a_real_proxy(
    server: Factory, client: Factory, house: House, tinyproxy: Callable[..., Tinyproxy], mode: str, password: str
) -> None:
    """With and without a password, over TLS, in plain mode and at level 0: the tunnel serves, and the server sees the
    proxy's connection only. The name is looked up by the proxy, and the certificate held to it by us."""
    proxy = tinyproxy(*([f"BasicAuth alice {password}"] if password else []))
    tls = mode == "tls"
    with echo_service() as service:
        serving = server(*(house.flags("server") if tls else ()), old=mode == "level 0")
        url = f"--proxy=http://{f'alice:{password}@' if password else ''}127.0.0.1:{proxy.port}"
        where = f"--server=localhost:{serving.control_address[1]}"
        asking = client(*(house.flags("client") if tls else ()), url, where, f"--forward={free_port()}:{service.text}")
        check_echo(serving.lease_address()[1])
        if mode != "level 0":
            assert asking.wait_for("session-opened")["public"].startswith("localhost:")


@real
@pytest.mark.parametrize(
    ("credentials", "said"),
    [("", "407 .*: it wants USER:PASSWORD"), ("alice:wrong@", "401 .*: wrong user or password")],
)
def test_a_real_proxy_that_wants_a_password(
    client: Factory, tinyproxy: Callable[..., Tinyproxy], credentials: str, said: str
) -> None:
    """Its refusal is told with the proxy's address and status, and what is wrong; the client goes on asking. (To a
    wrong password tinyproxy says 401.)"""
    proxy = tinyproxy(f"BasicAuth alice {SECRET}")
    url = f"--proxy=http://{credentials}127.0.0.1:{proxy.port}"
    asking = client(url, "--server=127.0.0.1:9", "--local=127.0.0.1:9", limits={"FIRST_RETRY_S": 0.05})
    for _ in range(2):
        reason = asking.wait_for("connect-failed", server="127.0.0.1:9")["reason"]
        assert re.fullmatch(rf"proxy 127\.0\.0\.1:{proxy.port}: {said}", reason)


@real
def test_a_real_proxy_that_dies(server: Factory, client: Factory, tinyproxy: Callable[..., Tinyproxy]) -> None:
    """A proxy that is killed ends the session, is named while it is away, and is used again when it is back."""
    proxy = tinyproxy()
    with echo_service() as service:
        serving = server()
        url, where = f"--proxy=http://127.0.0.1:{proxy.port}", f"--server={text(serving.control_address)}"
        asking = client(url, where, f"--forward={free_port()}:{service.text}", limits={"FIRST_RETRY_S": 0.05})
        port = serving.lease_address()[1]
        check_echo(port)
        proxy.kill()
        asking.wait_for("session-closed")
        failed = asking.wait_for("connect-failed")
        assert failed["reason"] == f"proxy 127.0.0.1:{proxy.port}: Connection refused"
        proxy.start()
        asking.wait_for_count(2, "session-opened")
        check_echo(port)


@real
def test_a_real_proxy_whose_server_is_away(client: Factory, tinyproxy: Callable[..., Tinyproxy]) -> None:
    """What a real proxy says of a server that it cannot reach is told with its status."""
    proxy = tinyproxy()
    with closed_port() as nobody:
        asking = client(f"--proxy=http://127.0.0.1:{proxy.port}", f"--server={text(nobody)}", "--local=127.0.0.1:9")
        assert re.match(rf"proxy 127\.0\.0\.1:{proxy.port}: 5\d\d ", asking.wait_for("connect-failed")["reason"])


# --- what proxies may answer -------------------------------------------------------------------------------------


def answering(*answer: bytes) -> Service:
    """A proxy that reads a request and says that, each part in a send of its own; then it waits for our end."""

    def handle(sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        read_request(sock)
        for part in answer:
            sock.sendall(part)
        if answer:
            read_all(sock)

    return Service(handle)


def read_request(sock: socket.socket) -> list[str]:
    """A request's lines."""
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        request += read_exactly(sock, 1)
    return request.decode().split("\r\n")[:-2]


def proxy_at(service: Service) -> rtunnel.HttpProxy:
    return rtunnel.HttpProxy(rtunnel.Address(*service.address), b"")


TARGET = rtunnel.Address("tunnel.invalid", 7000)
YES = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 office\r\n\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        [YES + b"\x00first"],
        [*(bytes([letter]) for letter in YES), b"\x00first"],
        [b"HTTP/1.1 100 Continue\r\n\r\n" + YES + b"\x00first"],
        [b"HTTP/1.0 200\r\n\r\n\x00first"],
        [b"HTTP/1.1 201 Created\nContent-Length: 3\n\n\x00first"],
    ],
    ids=["at once", "byte by byte", "behind 100", "1.0", "bare line ends"],
)
def test_no_byte_of_the_server_is_lost(answer: list[bytes]) -> None:
    """What stands behind the answer's header is the server's, and all of it is read by the session, in whatever
    pieces it comes."""
    with answering(*answer) as service, proxy_at(service).dial(TARGET, 5.0) as sock:
        assert sock.gettimeout() is None
        assert read_exactly(sock, 6) == b"\x00first"


def test_the_request() -> None:
    """CONNECT names the server as it was given, IPv6 in brackets; name and password go in one line, in UTF-8."""
    requests: list[list[str]] = []

    def handle(sock: socket.socket) -> None:
        requests.append(read_request(sock))
        sock.sendall(YES)

    with Service(handle) as service:
        url = f"http://al%69ce:p%40ss:w%C3%B6rd%25%0d@{service.text}/"
        proxy = rtunnel.HttpProxy.parse(url)
        assert proxy is not None
        for server in (TARGET, rtunnel.Address("2001:db8::1", 7000)):
            proxy.dial(server, 5.0).close()
        proxy_at(service).dial(TARGET, 5.0).close()
    told = "Proxy-Authorization: Basic " + base64.b64encode("alice:p@ss:wörd%\r".encode()).decode()
    named = [[f"CONNECT {name} HTTP/1.1", f"Host: {name}"] for name in ("tunnel.invalid:7000", "[2001:db8::1]:7000")]
    assert requests == [[*named[0], told], [*named[1], told], named[0]]


ANSWERS = {
    b"SSH-2.0-OpenSSH_9.2\r\n": "it speaks no HTTP: SSH-2.0-OpenSSH_9.2",
    b"\x16\x03\x01\x00\x02\r\n": "it speaks no HTTP: .*",
    b"HTTP/1.1 OK\r\n": "it speaks no HTTP: HTTP/1.1 OK",
    b"HTTP/1.1 200 OK\r\n" + b"X: " + bytes(70_000) + b"\r\n": "it speaks no HTTP: .*",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200: "it speaks no HTTP: got more than 100 headers",
    # What email's parser of headers makes of them is no HTTPException.
    b"HTTP/1.1 200 OK\r\nContent-Type: multipart/x; boundary*=undefined''x\r\n\r\n": "it speaks no HTTP: .*",
    b"HTTP/1.1 403 Forbidden\r\n\r\n": "403 Forbidden",
    b"HTTP/1.1 502 Bad \x1b[2J\r\n\r\n": "502 Bad \x1b\\[2J",
    b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\n\r\n": "302 Found",
    b"HTTP/1.1 503 " + 5000 * b"x" + b"\r\n\r\n": "503 x{252}",
    b"": "Remote end closed connection without response|Connection reset by peer|it speaks no HTTP: .*",
}


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: repr(answer)[2:30])
def test_other_answers(answer: bytes) -> None:
    """A proxy that speaks no HTTP, refuses, or closes is one OSError, which names it and says how; no socket stays."""
    with answering(*([answer] if answer else [])) as service:
        with pytest.raises(OSError, match="proxy") as caught:
            proxy_at(service).dial(TARGET, 5.0)
        assert re.fullmatch(f"proxy {service.text}: ({ANSWERS[answer]})", rtunnel.reason_of(caught.value))


@pytest.mark.parametrize(
    ("first", "drip", "pause_s"),
    [(b"HTTP/1.1 200 ", b"", 0.05), (b"HTTP/1.1 200 ", b"x", 0.05), (b"", 99 * b"HTTP/1.1 100 Continue\r\n\r\n", 0.0)],
    ids=["silent", "dripping", "flooding"],
)
def test_the_deadline(first: bytes, drip: bytes, pause_s: float) -> None:
    """A proxy that says nothing, says a byte now and then, or asks to wait for ever is left after the seconds for the
    whole dial."""
    done = threading.Event()

    def handle(sock: socket.socket) -> None:
        read_request(sock)
        sock.sendall(first)
        with contextlib.suppress(OSError):
            while not done.wait(pause_s):
                sock.sendall(drip)

    with Service(handle) as service:
        try:
            with pytest.raises(TimeoutError, match="timed out") as caught:
                proxy_at(service).dial(TARGET, 0.5)
            assert rtunnel.reason_of(caught.value) == f"proxy {service.text}: timed out"
        finally:
            done.set()


def test_the_visitors_address_where_the_proxy_knows_the_server(server: Factory, client: Factory) -> None:
    """With --proxy-protocol a visitor's line has his address, and 0.0.0.0 for a server that only the proxy has looked
    up: where it is we do not know."""
    heard: list[bytes] = []

    def note(sock: socket.socket) -> None:
        heard.append(sock.recv(107))

    serving = server()
    with Service(note) as service, http_proxy(serving.control_address) as office:
        client(
            f"--proxy=http://{office.text}",
            "--server=tunnel.invalid:7000",
            f"--local={service.text}",
            "--proxy-protocol",
        )
        public = serving.lease_address()
        with connect(public) as visitor:
            eventually(lambda: heard)
            own = visitor.getsockname()
            assert heard == [b"PROXY TCP4 127.0.0.1 0.0.0.0 %d %d\r\n" % (own[1], public[1])]


# --- the setting -------------------------------------------------------------------------------------------------

WRONG = [
    f"http://alice:{SECRET}@",
    f"http://alice:{SECRET}@host",
    f"http://alice:{SECRET}@host:0",
    f"https://alice:{SECRET}@host:1",
    f"alice:{SECRET}@host:1",
    f"http://alice:{SECRET}",
    f"http://alice:{SECRET}@host:1/path",
    f"http://alice:{SECRET} {SECRET}@host:1",
    f"http://alice:{SECRET}\udcff@host:1",
    "http://:1",
    "socks5://host:1",
]


@pytest.mark.parametrize("url", WRONG)
def test_what_is_no_proxy(command: Command, url: str) -> None:
    """Anything else is one sentence and status 2, which does not repeat a password."""
    status, out, err = command("client", "--server=h:1", "--local=h:1", "--proxy", url)
    assert (status, out) == (2, "")
    form = "write http://HOST:PORT or http://USER:PASSWORD@HOST:PORT, other letters as %40"
    assert err == f"rtunnel client: argument --proxy: {form}\n"
    assert SECRET not in err


@pytest.mark.parametrize("scheme", ["http", "https", "socks5h"])
@pytest.mark.parametrize("option", ["--proxy={}", "--Proxy={}", "{}"])
def test_a_proxy_where_no_option_takes_it(command: Command, option: str, scheme: str) -> None:
    """An error repeats what it does not know, but no password."""
    status, out, err = command("server", option.format(f"{scheme}://alice:{SECRET}@proxy.invalid:3128"))
    assert (status, out) == (2, "")
    assert f"{scheme}://alice:***@proxy.invalid:3128" in err
    assert SECRET not in err


@pytest.mark.parametrize("user", ["alice", "alice@example.org", ""])
@pytest.mark.parametrize("source", ["flag", "environment", "file"])
def test_print_config_masks_the_password(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, user: str
) -> None:
    """--print-config shows the proxy and the user, wherever they come from, and *** in place of the password."""
    url = f"http://{user}:{SECRET}@x@proxy.invalid:3128" if user else f"http://:a:{SECRET}@proxy.invalid:3128"
    flags = ["client", "--print-config"]
    if source == "flag":
        flags += ["--proxy", url]
    elif source == "environment":
        monkeypatch.setenv("RTUNNEL_PROXY", url)
    else:
        file = tmp_path / "client.ini"
        file.write_text(f"proxy = {url}\n")
        flags += ["-c", str(file)]
    status, out, _ = command(*flags)
    assert status == 0
    assert f"http://{user}:***@proxy.invalid:3128" in out
    assert SECRET not in out


def test_a_reload_takes_another_proxy_and_no_line_has_the_password(client: Factory, tmp_path: Path) -> None:
    """SIGHUP changes the proxy for the next connection. Neither log nor state ever has the password."""
    config = tmp_path / "client.ini"
    with answering(b"HTTP/1.1 403 No\r\n\r\n") as one, answering(b"HTTP/1.1 407 No\r\n\r\n") as two:

        def write(proxy: Service) -> None:
            url = f"http://alice:{SECRET}@{proxy.text}"
            config.write_text(f"server = tunnel.invalid:7000\nlocal = 127.0.0.1:9\nproxy = {url}\n")

        write(one)
        asking = client("-c", str(config), "--reconnect-max=0.05")
        assert asking.wait_for("connect-failed")["reason"] == f"proxy {one.text}: 403 No"
        write(two)
        asking.send_signal(signal.SIGHUP)
        asking.wait_for("reloaded")
        asking.wait_for("connect-failed", reason=f"proxy {two.text}: 407 No: wrong user or password")
        asking.state()
        asking.stop()
    encoded = base64.b64encode(f"alice:{SECRET}".encode()).decode()
    assert not [line for line in asking.lines if SECRET in line or encoded in line]


def test_a_settings_value_hides_it() -> None:
    """Whoever prints the settings, in a traceback or a debugger, does not print the password."""
    proxy = rtunnel.HttpProxy.parse(f"http://alice:{SECRET}@h:1")
    assert SECRET not in f"{proxy} {proxy!r} {rtunnel.Settings(proxy=proxy)}"
