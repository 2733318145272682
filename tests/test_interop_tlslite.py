"""An unrelated TLS stack, tlslite-ng, which is Python alone, at the other end of our programs: in both roles.

It brings its own ML-KEM and ML-DSA (kyber-py, dilithium-py), so OpenSSL does not talk to itself here.
"""

from __future__ import annotations

import contextlib
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Factory
from naive_peer import EOF, Level1Peer, init_text
from support import DEADLINE_S, connect, echo_service, read_exactly
from tls_peers import House
from tunnels import text

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what it imports is deprecated in newer Pythons
    from tlslite.constants import GroupName
    from tlslite.errors import TLSLocalAlert, TLSRemoteAlert
    from tlslite.handshakesettings import HandshakeSettings
    from tlslite.tlsconnection import TLSConnection
    from tlslite.utils.keyfactory import parsePEMKey
    from tlslite.x509certchain import X509CertChain

# ServerHello.random of a HelloRetryRequest (RFC 8446, 4.1.3): SHA-256 of that name.
RETRY = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
HELLO = b"marco" * 1000

# groups that it knows, groups of its key shares, the group that is used, whether the server asks again
GROUPS = {
    "X25519MLKEM768": (["x25519mlkem768"], ["x25519mlkem768"], False),
    "SecP384r1MLKEM1024": (["secp384r1mlkem1024"], ["secp384r1mlkem1024"], False),
    "a HelloRetryRequest": (["secp384r1mlkem1024", "x25519mlkem768"], [], True),
}
CLASSICAL: tuple[list[str], list[str]] = (["x25519", "secp256r1"], ["x25519"])


class Overheard:
    """A socket that keeps the first bytes of both directions."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.passed = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def recv(self, count: int) -> bytes:
        got = self._sock.recv(count)
        self.passed += got[: 65536 - len(self.passed)]
        return got

    def send(self, data: bytes) -> int:
        self.passed += data[: 65536 - len(self.passed)]
        return self._sock.send(data)

    def sendall(self, data: bytes) -> None:
        self.passed += data[: 65536 - len(self.passed)]
        self._sock.sendall(data)


@contextlib.contextmanager
def other_stack(sock: socket.socket) -> Iterator[TLSConnection]:
    """An end of tlslite-ng on this socket, which is closed behind it."""
    with sock:
        sock.settimeout(DEADLINE_S)
        overheard = Overheard(sock)
        connection = TLSConnection(overheard)
        connection.overheard = overheard
        yield connection


def settings(groups: list[str], shares: list[str]) -> HandshakeSettings:
    """TLS 1.3 with these groups and no others."""
    made = HandshakeSettings()
    made.minVersion = made.maxVersion = (3, 4)
    made.eccCurves, made.keyShares, made.dhGroups = groups, shares, []
    return made


def pair(house: House, name: str) -> tuple[X509CertChain, Any]:
    """A certificate chain and its key, as the other stack has them."""
    chain = X509CertChain()
    chain.parsePemList((house.folder / f"{name}.crt").read_text())
    return chain, parsePEMKey((house.folder / f"{name}.key").read_text(), private=True)


def group_of(connection: TLSConnection) -> str:
    return {GroupName.x25519mlkem768: "X25519MLKEM768", GroupName.secp384r1mlkem1024: "SecP384r1MLKEM1024"}[
        connection.ecdhCurve
    ]


@pytest.mark.parametrize("case", GROUPS)
def test_it_is_a_client(case: str, house: House, server: Factory) -> None:
    """Handshake, INIT, WELCOME, and a visitor whose bytes it sends back; both ends tell the same group."""
    groups, shares, retries = GROUPS[case]
    serving = server(*house.flags("server"))
    with other_stack(connect(serving.control_address)) as connection:
        connection.handshakeClientCert(*pair(house, "client"), settings=settings(groups, shares))
        assert serving.wait_for("handshake")["group"] == group_of(connection)
        assert (RETRY in connection.overheard.passed) == retries
        assert retries or group_of(connection) == case
        peer = Level1Peer(connection, plays="client", window=65536)
        peer.send_init(init_text())
        peer.hear_welcome()
        with connect(peer.public) as visitor:
            stream = peer.hear_visitor()
            visitor.sendall(HELLO)
            peer.send_data(stream, peer.hear_data(stream, len(HELLO)))
            assert read_exactly(visitor, len(HELLO)) == HELLO
            visitor.shutdown(socket.SHUT_WR)
            peer.expect(EOF, stream)


@contextlib.contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE_S)
        yield listener


@pytest.mark.parametrize(("group", "retries"), [("x25519mlkem768", False), ("secp384r1mlkem1024", True)])
def test_it_is_a_server(group: str, retries: bool, house: House, client: Factory) -> None:
    """The same the other way round: our client takes its WELCOME, and its NEW_CONN to the local service. Our key share
    is of X25519MLKEM768: for the other group it has to ask again."""
    with listening() as listener, echo_service() as service:
        asking = client("--server", text(listener.getsockname()), "--local", service.text, *house.flags("client"))
        with other_stack(listener.accept()[0]) as connection:
            chain, key = pair(house, "server")
            connection.handshakeServer(certChain=chain, privateKey=key, reqCert=True, settings=settings([group], []))
            assert (RETRY in connection.overheard.passed) == retries
            peer = Level1Peer.as_server(connection)
            assert asking.wait_for("handshake")["group"] == group_of(connection)
            peer.open(1)
            peer.send_data(1, HELLO)
            assert peer.hear_data(1, len(HELLO)) == HELLO


def refused_client(house: House, server: Factory, *pair: Any, groups: tuple[list[str], list[str]]) -> tuple[str, str]:
    """How our server refuses it: the rule in our log, and what the other stack makes of the alert."""
    serving = server(*house.flags("server"))
    refusal = pytest.raises((TLSRemoteAlert, ConnectionError))
    with other_stack(connect(serving.control_address)) as connection, refusal as raised:
        connection.handshakeClientCert(*pair, settings=settings(*groups))
        connection.recv(1)  # in TLS 1.3 a client is done before the server has seen its certificate
    return serving.wait_for("refused")["reason"], str(raised.value)


def test_a_client_without_a_post_quantum_group(house: House, server: Factory) -> None:
    """A client with classical groups only: our server refuses it by the rule `group`."""
    reason, alert = refused_client(house, server, *pair(house, "client"), groups=CLASSICAL)
    assert reason == "group: no suitable key share"
    assert "handshake_failure" in alert


def test_a_client_without_a_certificate(house: House, server: Factory) -> None:
    """Our server refuses it by the rule `certificate`."""
    reason, alert = refused_client(house, server, groups=GROUPS["X25519MLKEM768"][:2])
    assert reason.startswith("certificate: ")
    assert "certificate_required" in alert


def test_a_client_with_a_servers_certificate(house: House, server: Factory) -> None:
    """Our server refuses it by the rule `purpose`."""
    reason, _ = refused_client(house, server, *pair(house, "server"), groups=GROUPS["X25519MLKEM768"][:2])
    assert reason.startswith("purpose: ")


def refused_server(house: House, client: Factory, name: str, groups: list[str]) -> str:
    """How our client refuses it: what our log says."""
    with listening() as listener:
        asking = client("--server", text(listener.getsockname()), "--local=127.0.0.1:9", *house.flags("client"))
        chain, key = pair(house, name)
        refusal = pytest.raises((TLSRemoteAlert, TLSLocalAlert, ConnectionError))
        with other_stack(listener.accept()[0]) as connection, refusal:
            connection.handshakeServer(certChain=chain, privateKey=key, reqCert=True, settings=settings(groups, []))
            connection.recv(1)
        return asking.wait_for("connect-failed")["reason"]


def test_a_server_with_a_clients_certificate(house: House, client: Factory) -> None:
    """Our client refuses it by the rule `purpose`."""
    assert refused_server(house, client, "client", ["x25519mlkem768"]).startswith("purpose: ")


def test_a_server_without_a_post_quantum_group(house: House, client: Factory) -> None:
    """A server with classical groups only finds nothing in our client's offer, and says so by an alert."""
    reason = refused_server(house, client, "server", ["x25519", "secp256r1"])
    assert reason == "alert: refused by the peer: handshake failure"
