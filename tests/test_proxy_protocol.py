"""The PROXY protocol, version 1: the local service learns who its visitor is."""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from level1 import Ends, PeerServer, mapping
from naive_peer import DATA, INIT, NEW_CONN, NaivePeer
from support import Address, Service, connect, eventually, free_port, read_all, read_exactly

import rtunnel


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Ends in this process, stopped after the test."""
    with Ends() as made:
        yield made


# --- the line ------------------------------------------------------------------------------------------------------


V4, PUBLIC_V4 = rtunnel.Address("203.0.113.7", 51234), rtunnel.Address("198.51.100.1", 443)
V6, PUBLIC_V6 = rtunnel.Address("2001:db8::1", 51234), rtunnel.Address("2001:db8:2::53", 65535)
MAPPED = rtunnel.Address("::ffff:203.0.113.7", 51234)


@pytest.mark.parametrize(
    ("visitor", "public", "line"),
    [
        (V4, PUBLIC_V4, b"PROXY TCP4 203.0.113.7 198.51.100.1 51234 443\r\n"),
        (V6, PUBLIC_V6, b"PROXY TCP6 2001:db8::1 2001:db8:2::53 51234 65535\r\n"),
        (MAPPED, PUBLIC_V4, b"PROXY TCP4 203.0.113.7 198.51.100.1 51234 443\r\n"),
        (V4, PUBLIC_V6, b"PROXY TCP6 ::ffff:cb00:7107 2001:db8:2::53 51234 65535\r\n"),
        (V6, PUBLIC_V4, b"PROXY TCP6 2001:db8::1 ::ffff:c633:6401 51234 443\r\n"),
        (rtunnel.Address("fe80::1%eth0", 1), PUBLIC_V6, b"PROXY TCP6 fe80::1 2001:db8:2::53 1 65535\r\n"),
        (None, PUBLIC_V4, b"PROXY UNKNOWN\r\n"),
    ],
    ids=["IPv4", "IPv6", "mapped", "IPv4 at IPv6", "IPv6 at IPv4", "with a zone", "unknown"],
)
def test_the_line(visitor: rtunnel.Address | None, public: rtunnel.Address, line: bytes) -> None:
    """The header is the specification's: family, both addresses in that family's one form, both ports, CRLF."""
    assert rtunnel.proxy_line(visitor, public) == line


def test_the_longest_line() -> None:
    """No header is longer than the specification's 107 bytes."""
    longest = rtunnel.Address("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 65535)
    line = rtunnel.proxy_line(longest, longest)
    assert len(line) == 104 <= 107
    assert re.fullmatch(rb"PROXY TCP6 [0-9a-f:]+ [0-9a-f:]+ [0-9]+ [0-9]+\r\n", line)


# --- through the tunnel --------------------------------------------------------------------------------------------


def heard(sock: socket.socket) -> None:
    """A service that sends back the first line it gets, then what follows."""
    line = b""
    while not line.endswith(b"\r\n"):
        line += read_exactly(sock, 1)
    sock.sendall(line + read_all(sock))


def ask(public: Address) -> tuple[bytes, Address]:
    """What such a service got from a visitor that says hello, and the visitor's own address."""
    with connect(public) as visitor:
        visitor.sendall(b"hello")
        visitor.shutdown(socket.SHUT_WR)
        return read_all(visitor), visitor.getsockname()[:2]


def test_the_local_service_learns_its_visitor(ends: Ends) -> None:
    """The header stands once, in front of all that the visitor says, with the visitor's own address and port."""
    with Service(heard) as service:
        public = ends.open_tunnel(service, proxy_protocol=True)
        for _ in range(3):
            got, visitor = ask(public)
            assert got == b"PROXY TCP4 127.0.0.1 127.0.0.1 %d %d\r\nhello" % (visitor[1], public[1])


def test_without_the_option_there_is_no_header(ends: Ends) -> None:
    """Where it is not asked for, the local service gets the visitor's bytes alone."""
    with Service(lambda sock: sock.sendall(read_all(sock))) as service:
        assert ask(ends.open_tunnel(service))[0] == b"hello"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        (b"203.0.113.7:51234", b"PROXY TCP4 203.0.113.7 127.0.0.1 51234 4711\r\n"),
        (b"[2001:db8::1]:51234", b"PROXY TCP6 2001:db8::1 ::ffff:7f00:0001 51234 4711\r\n"),
    ],
    ids=["IPv4", "IPv6"],
)
def test_what_new_conn_says_is_what_is_passed_on(ends: Ends, said: bytes, line: bytes) -> None:
    """The visitor is the one that NEW_CONN names, and the log of the client names it too."""
    with PeerServer() as server, socket.create_server(("127.0.0.1", 0)) as listener:
        ends.open_client(server.address, mapping(listener.getsockname()), proxy_protocol=True)
        server.accept().send_frame(NEW_CONN, 1, said)
        local, _ = listener.accept()
        with local:
            assert read_exactly(local, len(line)) == line
    ends.log.wait_for("stream-opened", stream=1, peer=said.decode())


def test_at_level_0_the_visitor_is_unknown(ends: Ends) -> None:
    """A server of level 0 does not say who the visitor is: UNKNOWN, and the address is not made up."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_server(("127.0.0.1", 0)) as listener,
    ):
        ends.open_client(server.getsockname(), mapping(listener.getsockname()), proxy_protocol=True)
        with NaivePeer(server.accept()[0]) as peer:
            assert peer.read_frame()[0] == INIT
            peer.send_frame(NEW_CONN, 1)
            peer.send_frame(DATA, 1, b"x")
            with listener.accept()[0] as local:
                assert read_exactly(local, 16) == b"PROXY UNKNOWN\r\nx"


# --- accepted by nginx ---------------------------------------------------------------------------------------------


CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
    log_format visitor '$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_port $request';
    access_log {folder}/access.log visitor;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        location / {{ return 200 "$proxy_protocol_addr"; }}
    }}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path) -> Iterator[Address]:
    """A real nginx that wants a PROXY header, in a folder of its own; its access log tells the visitor."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        pytest.skip("nginx is not installed; the distribution's package nginx-light has it")
    port = free_port()
    configuration = folder / "nginx.conf"
    configuration.write_text(CONFIGURATION.format(folder=folder, port=port))
    with subprocess.Popen(
        [program, "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(configuration)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        try:

            def answers() -> bool:
                assert process.poll() is None, (folder / "error.log").read_text()
                with contextlib.suppress(OSError):
                    connect(("127.0.0.1", port)).close()
                    return True
                return False

            eventually(answers, what="nginx listens")
            yield "127.0.0.1", port
        finally:
            process.terminate()


def test_nginx_accepts_it_and_logs_the_visitor(ends: Ends) -> None:
    """A real nginx takes the header, serves the request, and logs the visitor's address and port."""
    with tempfile.TemporaryDirectory() as folder, nginx(Path(folder)) as address:
        public = ends.open_tunnel(address, proxy_protocol=True)
        visitors = []
        for number in range(3):
            with connect(public) as visitor:
                visitor.sendall(b"GET /%d HTTP/1.0\r\n\r\n" % number)
                reply = read_all(visitor)
                visitors.append(visitor.getsockname()[1])
            assert reply.startswith(b"HTTP/1.1 200 OK\r\n")
            assert reply.endswith(b"\r\n\r\n127.0.0.1")
        wanted = [f"127.0.0.1 {port} {public[1]} GET /{n} HTTP/1.0" for n, port in enumerate(visitors)]
        log = Path(folder) / "access.log"
        eventually(lambda: log.read_text().count("\n") >= 3)
        assert log.read_text().splitlines() == wanted
