"""Real engines around a tunnel: HAProxy with the shipped conf/haproxy.cfg in front of two servers, nginx behind."""

from __future__ import annotations

import socket
import ssl
from contextlib import ExitStack, suppress
from pathlib import Path

import failover
import pytest
from conftest import Factory
from engines import engine, haproxy, nginx, shipped_haproxy, wanted
from support import Program, Service, connect, echo_service, ends_with, eventually, free_port, read_exactly
from tls_peers import Signer
from tunnels import text

HOSTS = failover.HOSTS
PORTS = (80, 443, 81, 8080, 9443, 9444, 8081)


@pytest.fixture
def ports() -> dict[int, int]:
    """For each port of the shipped file a free one."""
    return {old: free_port() for old in PORTS}


def two_servers(server: Factory) -> list[Program]:
    return [server(f"--public-bind={host}") for host in HOSTS]


def join(client: Factory, servers: list[Program], *forwards: str) -> Program:
    """A client of both, with these mappings."""
    where = [f"--server={text(each.control_address)}" for each in servers]
    asking = client(*where, *(f"--forward={each}" for each in forwards))
    asking.wait_for_count(len(servers) * len(forwards), "session-opened")
    return asking


@wanted("haproxy", "nginx")
def test_failover() -> None:
    """One server killed and back, the other drained and restarted, the client restarted: no request fails."""
    failover.failover(1.5)


@wanted("haproxy")
def test_an_open_stream_whose_server_is_killed(
    server: Factory, client: Factory, ports: dict[int, int], tmp_path: Path
) -> None:
    """A visitor of the server itself is reset. HAProxy makes an end of file of it: an answer that says its own length
    is seen to be cut short, one that does not would look whole. The other server's streams go on."""
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + bytes(5000)

    def begin(sock: socket.socket) -> None:
        sock.recv(1)
        sock.sendall(answer)
        sock.recv(1)
        sock.sendall(b"still here")

    with Service(begin) as service, ExitStack() as stack:
        servers = two_servers(server)
        join(client, servers, f"{ports[8080]}:{service.text}")
        stack.enter_context(haproxy(shipped_haproxy(ports), tmp_path))
        direct = [stack.enter_context(connect((host, ports[8080]))) for host in HOSTS]
        balanced = [stack.enter_context(connect(("127.0.0.1", ports[80]))) for _ in range(8)]
        for each in (*direct, *balanced):
            each.sendall(b"G")
            read_exactly(each, len(answer))
        servers[0].kill()
        assert ends_with(direct[0]) == "reset"
        said = [after(each) for each in balanced]
        assert set(said) == {b"", b"still here"}, "each server had some"
        assert after(direct[1]) == b"still here"


def after(visitor: socket.socket) -> bytes:
    """What a visitor hears who goes on; nothing is an end of file."""
    with suppress(ConnectionError):  # where he speaks to one that is gone
        visitor.sendall(b"?")
        return visitor.recv(100)
    return b""


@wanted("haproxy")
def test_a_server_without_a_client(client: Factory, server: Factory, ports: dict[int, int], tmp_path: Path) -> None:
    """A server whose port refuses costs no visitor anything: each of twenty is served by the other one."""
    with echo_service() as service:
        servers = two_servers(server)
        join(client, servers[1:], f"{ports[8080]}:{service.text}")
        with haproxy(shipped_haproxy(ports), tmp_path):
            for _ in range(20):
                with connect(("127.0.0.1", ports[80])) as visitor:
                    visitor.sendall(b"marco")
                    assert read_exactly(visitor, 5) == b"marco"


@wanted("haproxy")
def test_port_443_by_name(client: Factory, server: Factory, ports: dict[int, int], tmp_path: Path) -> None:
    """The name in a visitor's TLS leads to the client whose service has it, end to end: the certificate that he sees
    is the service's own. Another name, and what is no TLS, is closed."""
    root = Signer("ecdsa")
    authority = root.save(tmp_path)
    contexts: dict[str, ssl.SSLContext] = {}
    for name in ("alice", "bob"):
        pair = root.issue(tmp_path, name, [], [f"{name}.example.org"], algorithm="ecdsa")
        contexts[name] = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        contexts[name].load_cert_chain(pair.cert, pair.key)

    def greeter(name: str) -> Service:
        def greet(sock: socket.socket) -> None:
            with contexts[name].wrap_socket(sock, server_side=True) as secure:
                secure.sendall(name.encode())

        return Service(greet)

    visitors = ssl.create_default_context(cafile=str(authority))
    with greeter("alice") as alice, greeter("bob") as bob, ExitStack() as stack:
        servers = two_servers(server)
        join(client, servers, f"{ports[9443]}:{alice.text}")
        join(client, servers, f"{ports[9444]}:{bob.text}")
        stack.enter_context(haproxy(shipped_haproxy(ports), tmp_path))
        for name in ("alice", "bob", "alice"):
            with (
                connect(("127.0.0.1", ports[443])) as sock,
                visitors.wrap_socket(sock, server_hostname=f"{name}.example.org") as secure,
            ):
                assert secure.recv(100) == name.encode()
        with connect(("127.0.0.1", ports[443])) as sock, pytest.raises((ssl.SSLError, OSError)):
            visitors.wrap_socket(sock, server_hostname="mallory.example.org")
        with connect(("127.0.0.1", ports[443])) as sock:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert ends_with(sock) in ("eof", "reset")


SEEN = """server { listen PORT proxy_protocol; set_real_ip_from 127.0.0.1; real_ip_header proxy_protocol;
  location / { access_log SEEN/access.log seen; return 200 "$remote_addr"; } }"""


@wanted("haproxy", "nginx")
def test_the_visitors_address_in_nginx(client: Factory, server: Factory, ports: dict[int, int], tmp_path: Path) -> None:
    """With send-proxy nginx behind the tunnel knows and logs the visitor's own address, in IPv4 here, from whichever
    of this machine's he comes."""
    with nginx(tmp_path, SEEN.replace("SEEN", str(tmp_path))) as (page_port,), ExitStack() as stack:
        servers = two_servers(server)
        join(client, servers, f"{ports[8081]}:127.0.0.1:{page_port}")
        stack.enter_context(haproxy(shipped_haproxy(ports), tmp_path))
        for visitor in ("127.0.0.7", "127.0.0.8"):
            with socket.create_connection(("127.0.0.1", ports[81]), 10, (visitor, 0)) as sock:
                sock.sendall(f"GET /{visitor} HTTP/1.0\r\n\r\n".encode())
                answer = b"".join(iter(lambda sock=sock: sock.recv(4096), b""))  # type: ignore[misc]
            assert answer.endswith(visitor.encode())
        log = tmp_path / "access.log"
        expected = "".join(f"{each} {each} /{each}\n" for each in ("127.0.0.7", "127.0.0.8"))
        eventually(lambda: log.read_text() == expected, what=log.read_text())


@wanted("haproxy")
def test_the_shipped_file(tmp_path: Path, ports: dict[int, int]) -> None:
    """HAProxy itself takes the shipped file, and has no warning about it."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(shipped_haproxy({}))
    with engine("haproxy", "-c", "-f", config, ports=(), folder=tmp_path) as process:
        assert process.wait(10) == 0
    said = (tmp_path / "haproxy.log").read_text()
    assert "WARNING" not in said
    assert "ALERT" not in said
