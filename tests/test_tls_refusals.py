"""Who gets past the handshake and who does not; each bad case has a good one that differs in one thing.

The bad peers are second stacks with settings of their own: Python's `ssl` for what is classical, raw pyOpenSSL for
the rest. Each row is played against our server and against our client.
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from OpenSSL import SSL
from OpenSSL._util import lib
from support import connect, parse_line
from tls_peers import (
    CLIENT_AUTH,
    HOUR,
    KEYS,
    SERVER_AUTH,
    House,
    Pair,
    Signer,
    SocketCarrier,
    Task,
    meet,
    python_peer,
    raw_context,
    raw_peer,
    session,
    shake,
    tcp_pair,
    within,
)
from tunnels import Factory

import rtunnel_tls
from rtunnel_tls import HandshakeError, Receipt, TlsContext, TlsTransport

Peer = Callable[[socket.socket], Any]
OUR_GROUPS = "X25519MLKEM768:MLKEM768"  # of the peer, where the group is not what it is refused for
ANY_SIGNATURE = "mldsa65:mldsa44:mldsa87:rsa_pss_rsae_sha256:ecdsa_secp256r1_sha256:ed25519"
PURPOSE = {"server": SERVER_AUTH, "client": CLIENT_AUTH}
OTHER = {"server": "client", "client": "server"}
ANY_PURPOSE = x509.ObjectIdentifier("2.5.29.37.0")


class World:
    """One root, which our contexts trust, and what peers can be made of. Made once for the module."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        self.root = Signer()
        self.ca = self.root.save(folder)
        self.stranger = Signer(name="stranger")
        self.pairs = {role: self.pair(role) for role in ("server", "client")}
        self.classical = {
            kind: Signer(kind, name=f"classical {kind}").issue(folder, f"classical-{kind}", [], algorithm=kind)
            for kind in ("rsa", "ecdsa")
        }

    def pair(self, role: str, by: Signer | None = None, purposes: Any = None, hosts: Any = None, **kwargs: Any) -> Pair:
        self.count += 1
        names = ["localhost", "127.0.0.1"] if hosts is None else hosts
        extended = [PURPOSE[role]] if purposes is None else purposes
        return (by or self.root).issue(self.folder, f"pair-{self.count}", extended, names, **kwargs)

    def ours(self, role: str, profile: str = "default", name: str = "localhost") -> TlsContext:
        pair = self.pairs[role]
        verify = {"verify_name": name} if role == "client" else {}
        return rtunnel_tls.TlsContext(profile, cert=pair.cert, key=pair.key, ca=self.ca, **verify)

    def raw(self, role: str, pair: Pair | None, groups: str = OUR_GROUPS, signatures: str = ANY_SIGNATURE) -> Peer:
        return raw_peer(raw_context(pair, self.ca, groups=groups, signatures=signatures), role)

    def smaller(self, role: str) -> Peer:
        """A good peer, but that its key of the record layer would have 128 bits."""
        context = raw_context(self.pairs[role], self.ca, groups=OUR_GROUPS, signatures=ANY_SIGNATURE)
        context.set_tls13_ciphersuites(b"TLS_AES_128_GCM_SHA256")
        return raw_peer(context, role)

    def python(self, role: str, kind: str = "rsa", curve: str = "", tls12: bool = False) -> Peer:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if role == "client" else ssl.PROTOCOL_TLS_SERVER)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.load_cert_chain(self.classical[kind].cert, self.classical[kind].key)
        if curve:
            context.set_ecdh_curve(curve)
        if tls12:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
        return python_peer(context, role)

    def below(self, kind: str) -> Signer:
        return Signer(kind, name=f"between {kind}", by=self.root)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


# What differs from a good peer, and the rules that our server and our client name. A server that has no common ground
# with our client says so itself, and the client's rule is `alert`.
NO_GROUP = ("group", "alert")
ROWS: dict[str, tuple[Callable[[World, str], Peer], tuple[str, str]]] = {
    "TLS 1.2": (lambda w, r: w.python(r, tls12=True), ("version", "alert")),
    "P-256, other stack": (lambda w, r: w.python(r, curve="prime256v1"), NO_GROUP),
    "P-384, other stack": (lambda w, r: w.python(r, "ecdsa", "secp384r1"), NO_GROUP),
    "X25519": (lambda w, r: w.raw(r, w.pairs[r], "X25519"), NO_GROUP),
    "P-256": (lambda w, r: w.raw(r, w.pairs[r], "P-256"), NO_GROUP),
    "MLKEM512": (lambda w, r: w.raw(r, w.pairs[r], "MLKEM512"), NO_GROUP),
    "AES-128": (lambda w, r: w.smaller(r), ("cipher", "alert")),
    "RSA leaf": (lambda w, r: w.raw(r, w.pair(r, algorithm="rsa")), ("certificate", "alert")),
    "ECDSA leaf": (lambda w, r: w.raw(r, w.pair(r, algorithm="ecdsa")), ("certificate", "alert")),
    "Ed25519 leaf": (lambda w, r: w.raw(r, w.pair(r, algorithm="ed25519")), ("certificate", "alert")),
    "ML-DSA-44 leaf": (lambda w, r: w.raw(r, w.pair(r, algorithm="mldsa44")), ("certificate", "alert")),
    "RSA authority between": (lambda w, r: w.raw(r, w.pair(r, w.below("rsa"))), ("signature", "signature")),
    "ECDSA authority between": (lambda w, r: w.raw(r, w.pair(r, w.below("ecdsa"))), ("signature", "signature")),
    "Ed25519 authority between": (lambda w, r: w.raw(r, w.pair(r, w.below("ed25519"))), ("signature", "signature")),
    "no certificate": (lambda w, r: w.raw(r, None), ("certificate", "alert")),
    "another authority": (lambda w, r: w.raw(r, w.pair(r, w.stranger)), ("authority", "authority")),
    "expired": (lambda w, r: w.raw(r, w.pair(r, before=3 * HOUR, after=-HOUR)), ("validity", "validity")),
    "not yet valid": (lambda w, r: w.raw(r, w.pair(r, before=-HOUR)), ("validity", "validity")),
    "the other role's": (lambda w, r: w.raw(r, w.pair(OTHER[r])), ("purpose", "purpose")),
    "no extended key usage": (lambda w, r: w.raw(r, w.pair(r, purposes=[])), ("purpose", "purpose")),
    "any extended key usage": (lambda w, r: w.raw(r, w.pair(r, purposes=[ANY_PURPOSE])), ("purpose", "purpose")),
    "no common name": (lambda w, r: w.raw(r, w.pair(r, subject=None)), ("identity", "identity")),
    "common name with a newline": (lambda w, r: w.raw(r, w.pair(r, subject="a\nb")), ("identity", "identity")),
    "common name anonymous": (lambda w, r: w.raw(r, w.pair(r, subject="anonymous")), ("identity", "identity")),
    "common name beyond ASCII": (lambda w, r: w.raw(r, w.pair(r, subject="zoë")), ("identity", "identity")),
    "the root itself": (
        lambda w, r: w.raw(r, Pair(w.folder, "root-as-leaf", w.root.certificate, w.root.key)),
        ("purpose", "purpose"),
    ),
}
TOLD = ("alert", "eof", "reset")  # how a refused peer learns of it: the alert, or a connection that is closed


@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize("case", ROWS)
def test_a_bad_peer_is_refused_by_name(world: World, case: str, ours: str) -> None:
    """A peer that breaks one rule is refused within the deadline, under that rule's name, and is told."""
    peer, rules = ROWS[case]
    start = time.monotonic()
    refused, told = meet(world.ours(ours), peer(world, OTHER[ours]))
    assert isinstance(refused, HandshakeError), refused
    assert refused.rule == rules[ours == "client"], refused
    assert time.monotonic() - start < 3
    assert refused.rule == "alert" or any(word in told.lower() for word in TOLD), told


@pytest.mark.parametrize("ours", ["server", "client"])
def test_of_what_is_out_of_time_the_name_and_the_end_are_told(world: World, ours: str) -> None:
    """OpenSSL says only that something in the chain has expired."""
    refused, _ = meet(world.ours(ours), world.raw(OTHER[ours], world.pair(OTHER[ours], before=3 * HOUR, after=-HOUR)))
    assert str(refused).startswith("validity: CN=peer expired on 20")


def forged(world: World, role: str, name: str, subject: x509.Name, *extensions: tuple[str, bytes]) -> Pair:
    """A certificate that only says that our root has signed it, and of a purpose at which OpenSSL stops."""
    key, issuer = KEYS["mldsa65"](), world.root.certificate.subject
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), 5, now - HOUR, now + HOUR)
    builder = builder.add_extension(x509.ExtendedKeyUsage([PURPOSE[OTHER[role]]]), False)
    for oid, value in extensions:
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), False)
    return Pair(world.folder, name, builder.sign(key, None), key)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    COUNTRY = x509.Name([x509.NameAttribute(NameOID.COUNTRY_NAME, "Atlantis", _validate=False)])
STRANGE: dict[str, tuple[x509.Name, list[tuple[str, bytes]]]] = {
    "a number of no TLS feature": (x509.Name([]), [("1.3.6.1.5.5.7.1.24", b"\x30\x03\x02\x01\x04")]),
    "a long name": (x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "\1" * 30_000, _validate=False)]), []),
    "a country of many letters": (COUNTRY, []),
}


@pytest.mark.filterwarnings("ignore")  # cryptography's
@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize("case", STRANGE)
def test_nobody_reads_what_a_stranger_has_made(world: World, case: str, ours: str) -> None:
    """Before a signature is checked OpenSSL may refuse a certificate, and its words are then all that is said."""
    subject, extensions = STRANGE[case]
    pair = forged(world, OTHER[ours], f"strange-{ours}-{list(STRANGE).index(case)}", subject, *extensions)
    refused, _ = meet(world.ours(ours), world.raw(OTHER[ours], pair))
    assert str(refused) == "certificate: unsuitable certificate purpose"


@pytest.mark.parametrize("ours", ["server", "client"])
def test_nobody_reads_a_chain_that_ends_nowhere(world: World, ours: str) -> None:
    """A stranger's own authorities, all signatures right, but more of them than OpenSSL follows: none is told of."""
    signer = Signer(name="far")
    for number in range(6):
        signer = Signer(name=f"far {number}", by=signer)
    pair = world.pair(OTHER[ours], signer, before=3 * HOUR, after=-HOUR)
    refused, _ = meet(world.ours(ours), world.raw(OTHER[ours], pair))
    assert str(refused) == "certificate: certificate chain too long"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ours", ["server", "client"])
def test_what_cannot_be_read_is_refused(world: World, ours: str) -> None:
    """An extension that cryptography cannot read, in a certificate that our authority has signed, is a refusal too."""
    extension = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.5.5.7.1.24"), b"\x30\x03\x02\x01\x04")
    extensions = [(x509.ExtendedKeyUsage([PURPOSE[OTHER[ours]]]), False), (extension, False)]
    key = KEYS["mldsa65"]()
    leaf = world.root.sign(key, "peer", extensions=extensions)
    pair = Pair(world.folder, f"unreadable-{ours}", leaf, key)
    refused, _ = meet(world.ours(ours), world.raw(OTHER[ours], pair))
    assert isinstance(refused, HandshakeError)
    assert refused.rule == "certificate"
    with pytest.raises(rtunnel_tls.TlsConfigError, match="an extension that cannot be read"):
        rtunnel_tls.show(pair.cert)


def test_a_strange_certificate_leaves_log_lines_only(server: Factory, world: World) -> None:
    """What a library has to say of a certificate does not go past the log."""
    pair = world.pairs["server"]
    serving = server("--tls", f"--tls-cert={pair.cert}", f"--tls-key={pair.key}", f"--tls-ca={world.ca}")
    peer = world.raw("client", forged(world, "client", "strange", COUNTRY))
    with connect(serving.control_address) as sock:
        sock.settimeout(None)
        peer(sock)
    assert serving.wait_for("refused")["reason"] == "certificate: unsuitable certificate purpose"
    assert serving.stop() == 0
    assert [line for line in serving.lines if parse_line(line) is None] == []


def costly(world: World, role: str, names: int) -> Peer:
    """A peer whose certificate holds so many empty names, of which OpenSSL makes a hundred bytes each."""
    content = b"\x82\x00" * names
    value = b"\x30\x83" + len(content).to_bytes(3, "big") + content
    return world.raw(role, forged(world, role, f"costly-{role}-{names}", x509.Name([]), ("2.5.29.17", value)))


@pytest.mark.parametrize("ours", ["server", "client"])
def test_a_certificate_that_is_made_to_cost(world: World, ours: str) -> None:
    """A handshake of over 56 KiB is refused before OpenSSL looks at it."""
    refused, _ = meet(world.ours(ours), costly(world, OTHER[ours], 30_000))
    assert str(refused) == "certificate: the handshake has over 57344 bytes"


@pytest.mark.parametrize("case", ["by OpenSSL", "by its size", "by name"])
@pytest.mark.parametrize("ours", ["server", "client"])
def test_what_a_refused_one_holds_is_freed(world: World, ours: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenSSL's memory of a peer that it has refused is free before the peer is given time to read the alert."""
    made: list[weakref.ref[object]] = []
    alive: list[bool] = []
    leave = rtunnel_tls._leave

    class Watched(rtunnel_tls._Ssl):
        def __init__(self, context: TlsContext) -> None:
            super().__init__(context)
            made.append(weakref.ref(self._connection))

    def seen(*args: Any) -> None:
        alive.extend(each() is not None for each in made)
        leave(*args)

    monkeypatch.setattr(rtunnel_tls, "_Ssl", Watched)
    monkeypatch.setattr(rtunnel_tls, "_leave", seen)
    peer = world.raw(OTHER[ours], world.pair(OTHER[ours], before=3 * HOUR, after=-HOUR))  # expired
    if case != "by name":
        peer = costly(world, OTHER[ours], 10_000 if case == "by OpenSSL" else 30_000)
    refused, _ = meet(world.ours(ours), peer)
    assert isinstance(refused, HandshakeError)
    assert alive == [False]


@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize("authority", ["root", "between"])
def test_a_good_peer_passes(world: World, ours: str, authority: str) -> None:
    """A peer of a second stack with a good certificate passes, one of an ML-DSA authority below the root too."""
    by = None if authority == "root" else world.below("mldsa87")
    receipt, _ = meet(world.ours(ours), world.raw(OTHER[ours], world.pair(OTHER[ours], by)))
    assert isinstance(receipt, Receipt), receipt
    assert (receipt.facts["version"], receipt.facts["signature"], receipt.identity) == ("TLSv1.3", "mldsa65", "peer")


@pytest.mark.parametrize(
    ("hosts", "name", "rule"),
    [
        (["tunnel.example.org"], "tunnel.example.org", None),
        (["tunnel.example.org"], "TUNNEL.example.org.", None),
        (["*.example.org"], "tunnel.example.org", None),
        (["*.example.org"], "a.tunnel.example.org", "name"),
        (["*.example.org"], "example.org", "name"),
        (["tunnel.example.org"], "example.org", "name"),
        (["localhost", "192.0.2.1"], "192.0.2.1", None),
        (["localhost", "192.0.2.1"], "::ffff:192.0.2.1", None),
        (["localhost", "192.0.2.1"], "192.0.2.2", "name"),
        (["localhost", "2001:db8::1"], "2001:db8::1", None),
        (["localhost", "2001:db8::1"], "2001:db8::2", "name"),
        ([], "peer", "name"),
    ],
)
def test_the_server_is_who_was_dialled(world: World, hosts: list[str], name: str, rule: str | None) -> None:
    """The certificate names the dialled host or address in subjectAltName; its common name does not count."""
    outcome, _ = meet(world.ours("client", name=name), world.raw("server", world.pair("server", hosts=hosts)))
    assert (outcome.rule if isinstance(outcome, HandshakeError) else None) == rule
    if rule is not None:  # what was wanted, and what the certificate has
        held = ", ".join(hosts) or "no host"
        assert str(outcome) == f"name: the certificate is for {held}, not for {name}"


def test_of_very_many_names_a_few_are_told(world: World) -> None:
    """A certificate can name thousands of hosts: a log line tells of eight, and counts the rest."""
    hosts = [f"h{number}.example.org" for number in range(50)]
    outcome, _ = meet(world.ours("client"), world.raw("server", world.pair("server", hosts=hosts)))
    held = ", ".join(hosts[:8])
    assert str(outcome) == f"name: the certificate is for {held}, 42 more, not for localhost"


@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize(
    ("profile", "groups"), [("pure", "X25519MLKEM768"), ("hybrid", "MLKEM768"), ("cnsa2", "SecP384r1MLKEM1024")]
)
def test_a_group_of_another_profile_is_refused(
    world: World, big_house: House, ours: str, profile: str, groups: str
) -> None:
    """A group of another profile is no common ground."""
    context = big_house.context(ours, profile)
    refused, _ = meet(context, world.raw(OTHER[ours], world.pairs[OTHER[ours]], groups))
    assert isinstance(refused, HandshakeError)
    assert refused.rule == ("group" if ours == "server" else "alert")


@pytest.mark.parametrize("ours", ["server", "client"])
def test_the_original_is_met_by_profile_pure(world: World, ours: str) -> None:
    """The original's groups and signature algorithms, no SNI, one leaf, depth 1: an open session with `pure`."""
    original = raw_context(world.pairs[OTHER[ours]], world.ca)
    receipt, _ = meet(world.ours(ours, "pure"), raw_peer(original, OTHER[ours]))
    assert isinstance(receipt, Receipt), receipt
    assert (receipt.facts["group"], receipt.facts["signature"]) == ("MLKEM768", "mldsa65")


def test_a_revoked_client_is_refused(world: World, tmp_path: Path) -> None:
    """A certificate on the revocation list is refused under the rule `revoked`, and no other one is."""
    house = House(tmp_path / "pki")
    rtunnel_tls.issue(house.folder, "thief", hosts=None)
    rtunnel_tls.revoke(house.folder, "thief")
    server = house.server(crl=house.crl)
    outcomes = {}
    for name in ("client", "thief"):
        context = house.client(**house.files(name))
        outcomes[name], _ = meet(server, lambda sock, context=context: _told_later(sock, context))  # type: ignore[misc]
    assert isinstance(outcomes["client"], Receipt)
    assert outcomes["thief"].rule == "revoked"


def _told_later(sock: socket.socket, context: TlsContext) -> str:
    transport = TlsTransport.handshake(SocketCarrier(sock), context, within(5))
    try:
        return f"end {transport.receive_into(memoryview(bytearray(10)))}"
    except (rtunnel_tls.TransportError, OSError) as error:
        return str(error)


def test_a_refused_client_learns_it_from_its_first_read(world: World, house: House) -> None:
    """In TLS 1.3 the client's handshake ends before the server judges: the alert comes with the first read."""
    server = house.server(ca=world.ca)  # trusts another root than the client's
    client = house.client()
    refused, told = meet(server, lambda sock: _told_later(sock, client))
    assert refused.rule == "authority"
    assert told == "alert from the peer: unknown ca"


def test_a_client_that_our_own_check_refuses_sees_a_closed_connection(world: World, house: House) -> None:
    """Where OpenSSL has nothing against the client, the refusal is a connection that is closed."""
    pair = world.pair("client", purposes=[])
    carriers: list[SocketCarrier] = []
    refused, told = meet(world.ours("server"), world.raw("client", pair), carriers)
    assert refused.rule == "purpose"
    assert told == "eof"
    assert carriers[0].finishes == 1, "at once, and not only when we have read on for a second"


def test_a_refused_server_never_sees_the_clients_certificate(world: World) -> None:
    """Our client sends nothing more to a server that its own check refuses, its certificate least of all."""
    carriers: list[SocketCarrier] = []
    refused, _ = meet(world.ours("client"), world.raw("server", world.pair("server", purposes=[])), carriers)
    assert refused.rule == "purpose"
    assert carriers[0].sent < 1600, "a ClientHello, and no certificate of 5 kB"


@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize(
    ("said", "rule"),
    [
        (b"GET / HTTP/1.1\r\nHost: tunnel\r\n\r\n", "tls"),
        (bytes(range(256)), "tls"),
        (b"", "closed"),
        (b"\x16\x03\x01\x00\x05", "closed"),
        (b"\x16\x03\x01\xff\xff" + bytes(2000), "tls"),
    ],
)
def test_what_is_no_tls_is_refused(world: World, ours: str, said: bytes, rule: str) -> None:
    """Bytes that are no handshake, and an end in the middle of one, are refused at once."""

    def peer(sock: socket.socket) -> None:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    refused, _ = meet(world.ours(ours), peer)
    assert isinstance(refused, HandshakeError), refused
    assert refused.rule == rule, refused


ALERTS = {
    40: "handshake failure",
    48: "unknown ca",
    70: "protocol version",
    110: "unsupported extension",
    111: "certificate unobtainable",
    112: "unrecognized name",  # of what shares port 443 by the name in TLS, and has no such name
    113: "bad certificate status response",
    114: "bad certificate hash value",
    116: "certificate required",
}


@pytest.mark.parametrize("code", ALERTS)
def test_an_alert_is_the_peers_word(world: World, code: int) -> None:
    """Whichever answers our first flight, the rule is `alert`: the peer has refused us, and not we the peer."""

    def peer(sock: socket.socket) -> None:
        sock.recv(65536)
        sock.sendall(bytes([0x15, 3, 3, 0, 2, 2, code]))
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    refused, _ = meet(world.ours("client"), peer)
    assert (refused.rule, str(refused)) == ("alert", f"alert: refused by the peer: {ALERTS[code]}")


FRAMES = {
    "INIT of level 0": b"\x04" + bytes(7) + b"\x05" + b"0:x:1",
    "INIT of level 1": b"\x04" + bytes(7) + b"\x23" + b"8080:x:1\nversion=1\nwindow=65536\n\n\n",
    "NEW_CONN": b"\x01\0\0\0\x01\0\0\0\0",
    "PING": b"\x08" + bytes(8),
    "BLOCKED": b"\x0b\0\0\0\x07\0\0\0\x04abcd",
}


@pytest.mark.parametrize("ours", ["server", "client"])
@pytest.mark.parametrize("frame", FRAMES)
def test_a_peer_in_plain_mode_is_told_apart(world: World, ours: str, frame: str) -> None:
    """Where the first bytes are a frame, the refusal says so and which option is meant; the peer gets an alert."""

    def peer(sock: socket.socket) -> bytes:
        sock.sendall(FRAMES[frame])
        got = b""
        while more := sock.recv(65536):
            got += more
        return got

    refused, got = meet(world.ours(ours), peer)
    assert str(refused) == "tls: the peer speaks the tunnel in plain mode; start both ends with --tls"
    assert got.endswith(bytes.fromhex("15 0303 0002 02 46"))
    assert len(got) == 7 or (ours == "client" and got[0] == 22), "after the ClientHello"


@pytest.mark.parametrize("said", [b"\x04" + bytes(3), b"\x0c" + bytes(8), b"\0" * 9, b"\x04" + b"\xff" * 8])
def test_what_is_no_frame_is_not_taken_for_one(world: World, said: bytes) -> None:
    """A part of a frame, an unknown type, a length that no first frame has."""

    def peer(sock: socket.socket) -> None:
        sock.sendall(said)
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(65536):
            pass

    refused, _ = meet(world.ours("server"), peer)
    assert "plain mode" not in str(refused)


def test_a_peer_that_says_nothing_to_a_client_may_lack_tls(world: World) -> None:
    """A server in plain mode may close at our first record: the client says which option is meant."""

    def peer(sock: socket.socket) -> None:
        sock.recv(65536)

    refused, _ = meet(world.ours("client"), peer)
    assert refused.rule == "closed"
    assert "--tls" in str(refused)


def test_a_silent_peer_is_refused_at_the_deadline(world: World) -> None:
    """A peer that says nothing is refused when the time is up."""
    with tcp_pair() as (near, _far):
        start = time.monotonic()
        with pytest.raises(HandshakeError, match="deadline"):
            TlsTransport.handshake(SocketCarrier(near), world.ours("server"), within(0.2))
        assert 0.2 <= time.monotonic() - start < 2


def test_a_byte_now_and_then_does_not_prolong_the_deadline(world: World) -> None:
    """One deadline covers the whole handshake, whatever the peer drips into it."""
    clock = [1.0]
    begun = b"\x16\x03\x01\x10\x00\x01\x00\x0f\xfc" + bytes(5000)  # a ClientHello that will take its time

    class Dripping(SocketCarrier):
        def receive_into(self, buffer: memoryview) -> int:
            buffer[:1] = begun[self.received : self.received + 1]
            self.received += 1
            clock[0] -= 0.01
            return 1

    with tcp_pair() as (near, _far):
        carrier = Dripping(near)
        with pytest.raises(HandshakeError, match="deadline"):
            TlsTransport.handshake(carrier, world.ours("server"), lambda: clock[0])
        assert 98 <= carrier.received <= 102


def test_a_session_that_is_offered_is_not_resumed(world: World) -> None:
    """A client that offers an old session gets a full handshake; a server that resumes shows that it does offer it."""
    willing = raw_context(world.pairs["server"], world.ca, groups=OUR_GROUPS)
    willing.set_session_id(b"willing")
    ours = world.ours("server")

    def raw_server(sock: socket.socket) -> None:
        connection = SSL.Connection(willing, sock)
        connection.set_accept_state()
        connection.do_handshake()
        connection.send(b"hi")
        with contextlib.suppress(SSL.Error):
            connection.recv(1)

    def our_server(sock: socket.socket) -> None:
        transport = shake(sock, ours)
        transport.send(b"hi")
        assert transport.identity == "peer"
        with contextlib.suppress(OSError):
            transport.receive_into(memoryview(bytearray(1)))

    for server, resumed in ((raw_server, [0, 1]), (our_server, [0, 0])):
        context = raw_context(world.pairs["client"], world.ca, groups=OUR_GROUPS)
        context.set_session_cache_mode(SSL.SESS_CACHE_CLIENT)
        session: SSL.Session | None = None
        reused = []
        for _ in range(2):
            with tcp_pair() as (near, far):
                task = Task(server, far)
                connection = SSL.Connection(context, near)
                connection.set_connect_state()
                if session is not None:
                    connection.set_session(session)
                connection.do_handshake()
                assert connection.recv(2) == b"hi"
                session = connection.get_session()
                reused.append(lib.SSL_session_reused(connection._ssl))
                connection.shutdown()  # or OpenSSL would not offer the session again
                task.result()
        assert reused == resumed


def test_both_ends_of_ours_meet_in_every_profile(house: House, big_house: House) -> None:
    """Two ends of the same profile meet, and each receipt tells what the profile prefers."""
    for profile in rtunnel_tls.PROFILES.values():
        home = big_house if profile.name == "cnsa2" else house
        with session(home.server(profile.name), home.client(profile.name)) as (server, client):
            for receipt, identity in ((server.receipt, "client"), (client.receipt, "server")):
                assert receipt.identity == identity
                assert receipt.facts["group"] == profile.groups[0]
                assert receipt.facts["cipher"] == profile.ciphers[0]
                assert receipt.facts["signature"] in profile.signatures
                assert rtunnel_tls.days_left(receipt.end) in (396, 397)
                assert all(isinstance(value, str) for value in receipt.facts.values())
