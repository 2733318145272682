"""What is told at start: files, options, profiles; and the few functions around private bindings."""

from __future__ import annotations

import base64
import contextlib
import datetime
import functools
import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from OpenSSL import SSL
from OpenSSL._util import ffi, lib
from tls_peers import CLIENT_AUTH, HOUR, SERVER_AUTH, House, Pair, Signer, meet, raw_context, raw_peer, session, shake

import rtunnel_tls
from rtunnel_tls import (
    PROFILES,
    HandshakeError,
    NotYetValid,
    Receipt,
    TlsConfigError,
    TlsContext,
    check_peer,
)

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")


@pytest.fixture(scope="module")
def root() -> Signer:
    return Signer()


def refuse(words: str, profile: str = "default", **settings: Any) -> None:
    """TlsContext refuses, in one line that holds all the words."""
    with pytest.raises(TlsConfigError) as refused:
        TlsContext(profile, **settings)
    text = str(refused.value)
    assert "\n" not in text
    assert all(word in text for word in words.split("|")), text


def test_profiles_are_what_the_design_says() -> None:
    """The four profiles, in names and order; none holds anything classical, and none MLKEM512."""
    table = {name: (p.groups, p.signatures, p.ciphers) for name, p in PROFILES.items()}
    both = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
    hybrid, pure = ("X25519MLKEM768", "SecP384r1MLKEM1024"), ("MLKEM768", "MLKEM1024")
    assert table == {
        "default": (hybrid + pure, ("mldsa65", "mldsa87"), both),
        "hybrid": (hybrid, ("mldsa65", "mldsa87"), both),
        "pure": (pure, ("mldsa65", "mldsa87", "mldsa44"), both),
        "cnsa2": (("MLKEM1024",), ("mldsa87",), both[:1]),
    }


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["cert", "key", "ca", "crl"])
def test_a_missing_file_is_named(house: House, tmp_path: Path, option: str) -> None:
    """A file that is not there is one sentence with the option and the path."""
    missing = tmp_path / "missing.pem"
    refuse(f"--tls-{option} {missing}: No such file", **(house.files("server") | {option: missing}))


@pytest.mark.parametrize("option", ["cert", "key", "ca", "crl"])
def test_a_file_of_something_else_is_named(house: House, tmp_path: Path, option: str) -> None:
    """A file that holds no PEM, or PEM of another kind, is one sentence too."""
    file = tmp_path / "other.pem"
    for content in (b"", b"not PEM", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", bytes(100)):
        file.write_bytes(content)
        file.chmod(0o600)
        refuse(f"--tls-{option} {file}", **(house.files("server") | {option: file}))


@POSIX
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644])
def test_a_key_that_others_can_read_is_refused(house: House, tmp_path: Path, mode: int) -> None:
    """The sentence names the file and the command that mends it; after that command it is accepted."""
    key = tmp_path / "server.key"
    key.write_bytes(house.files("server")["key"].read_bytes())
    key.chmod(mode)
    refuse(f"--tls-key {key}|chmod 600 {key}", **(house.files("server") | {"key": key}))
    key.chmod(0o600)
    house.server(key=key)


def test_a_key_of_another_certificate_is_refused(house: House, tmp_path: Path) -> None:
    """A certificate and a key that do not belong together never get as far as a handshake."""
    refuse("--tls-key|not the key of", **(house.files("server") | {"key": house.files("client")["key"]}))


def test_an_encrypted_key_is_refused_and_nobody_is_asked(house: House, tmp_path: Path) -> None:
    """No password is ever asked for: OpenSSL would wait at a terminal."""
    key = tmp_path / "locked.key"
    key.touch(0o600)
    secret: Any = serialization.load_pem_private_key(house.files("server")["key"].read_bytes(), None)
    locked = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(secret.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locked))
    refuse("--tls-key|encrypted", **(house.files("server") | {"key": key}))


@pytest.mark.parametrize(
    ("words", "made"),
    [
        ("--tls-cert|purpose|server", {"purposes": [CLIENT_AUTH]}),
        ("--tls-cert|purpose|server", {"purposes": []}),
        ("--tls-cert|validity", {"before": 3 * HOUR, "after": -HOUR}),
        ("--tls-cert|validity", {"before": -HOUR}),
        ("--tls-cert|key: rsaEncryption", {"algorithm": "rsa"}),
        ("--tls-cert|key: mldsa44", {"algorithm": "mldsa44"}),
        ("--tls-cert|identity", {"subject": None}),
        ("--tls-cert|identity|anonymous", {"subject": "anonymous"}),
    ],
)
def test_a_certificate_that_peers_would_refuse_is_told_at_start(
    root: Signer, tmp_path: Path, words: str, made: dict[str, Any]
) -> None:
    """Our own certificate is held to the peer's rules when it is loaded."""
    pair = root.issue(tmp_path, "own", **({"purposes": [SERVER_AUTH], "hosts": ["localhost"]} | made))
    refuse(words, cert=pair.cert, key=pair.key, ca=root.save(tmp_path))


@pytest.mark.parametrize("kind", ["rsa", "ecdsa", "ed25519", "mldsa44"])
def test_an_authority_outside_the_profile_is_refused(house: House, tmp_path: Path, kind: str) -> None:
    """No root with a classical key is ever trusted, with an ML-DSA leaf below it or not."""
    refuse("--tls-ca|signature", **(house.files("server") | {"ca": Signer(kind).save(tmp_path)}))


def test_a_leaf_is_no_authority(house: House) -> None:
    """A leaf named as the authority is told at start."""
    refuse("--tls-ca", **(house.files("server") | {"ca": house.files("client")["cert"]}))


def test_a_leaf_of_a_classical_authority_is_refused(tmp_path: Path, house: House) -> None:
    """An ML-DSA leaf that an RSA authority has signed is refused when it is loaded."""
    pair = Signer("rsa").issue(tmp_path, "own", [SERVER_AUTH], ["localhost"])
    refuse("--tls-cert|signature: sha256WithRSAEncryption", cert=pair.cert, key=pair.key, ca=house.ca)


def test_a_chain_file_brings_the_authorities_below_the_root(root: Signer, tmp_path: Path, house: House) -> None:
    """A server whose file holds its leaf and an intermediate authority is accepted by who knows the root only."""
    between = Signer("mldsa87", name="between", by=root)
    pair = between.issue(tmp_path, "own", [SERVER_AUTH], ["localhost"])
    server = TlsContext("default", cert=pair.cert, key=pair.key, ca=house.ca)
    client = house.client(ca=root.save(tmp_path))
    with session(server, client) as (_, end):
        assert end.receipt.facts["issuer"] == "CN=between"
    assert len(x509.load_pem_x509_certificates(pair.cert.read_bytes())) == 2


def test_nothing_but_the_file_is_sent(house: House) -> None:
    """The root is not added to the chain that goes out: the peer has it."""
    chains: list[int] = []

    def peer(sock: Any) -> None:
        connection = SSL.Connection(raw_context(None, house.ca, groups="MLKEM768"), sock)
        connection.set_connect_state()
        connection.do_handshake()
        chains.append(len(connection.get_peer_cert_chain(as_cryptography=True) or ()))

    meet(house.server(), peer)
    assert chains == [1]


# --- whatever the bytes ------------------------------------------------------------------------------------


def _block(pem: bytes) -> tuple[bytes, bytes, bytes]:
    head, body, tail = pem.partition(b"\n")[0], pem.split(b"-----")[2], pem.rstrip().rpartition(b"\n")[2]
    return head, base64.b64decode(body), tail


def _broken(pem: bytes, stride: int) -> Iterator[bytes]:
    """The file cut short, with one character changed, and with one byte of what it encodes changed."""
    for at in range(0, len(pem), max(1, len(pem) // 25)):
        yield pem[:at]
        yield pem[:at] + bytes([pem[at] ^ 1]) + pem[at + 1 :]
    head, der, tail = _block(pem)
    for at in [*range(0, min(len(der), 280), stride), *range(280, len(der), 800)]:
        changed = der[:at] + bytes([der[at] ^ (1 << at % 8)]) + der[at + 1 :]
        yield b"\n".join((head, base64.encodebytes(changed).strip(), tail, b""))


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("option", ["ca", "cert", "key", "crl"])
def test_one_wrong_byte_is_one_sentence(house: House, tmp_path: Path, option: str) -> None:
    """Whatever is in a file: a context is made of it, or one sentence names it, and `pki show` does as well."""
    files = house.files("client") | {"crl": house.crl}
    file = tmp_path / f"x.{option}"
    file.touch(0o600)
    told = []
    for number, content in enumerate(_broken(files[option].read_bytes(), 3)):
        file.write_bytes(content)
        try:
            house.client(**(files | {option: file}))
        except TlsConfigError as error:
            told.append(str(error))
        if option in ("ca", "cert") and number % 4 == 0:
            with contextlib.suppress(TlsConfigError):
                assert all(line.isprintable() for line in rtunnel_tls.show(file).splitlines())
    assert len(told) > 50
    assert all(str(file) in text and text.isprintable() for text in told if option != "ca"), told
    assert all(text.startswith("--tls-") for text in told)
    assert lib.ERR_peek_error() == 0, "nothing is left for a later call to trip over"


@pytest.mark.parametrize(("option", "role"), [("ca", "server"), ("cert", "server"), ("ca", "client")])
def test_openssls_own_error_is_one_sentence(house: House, tmp_path: Path, option: str, role: str) -> None:
    """A name that is no UTF-8: `cryptography` passes over it, OpenSSL does not."""
    head, der, tail = _block(house.files(role)[option].read_bytes())
    at = der.index(b"rtunnel CA")
    file = tmp_path / "x.crt"
    file.write_bytes(b"\n".join((head, base64.encodebytes(der[:at] + b"\xff" + der[at + 1 :]).strip(), tail, b"")))
    name = {"verify_name": "localhost"} if role == "client" else {}
    refuse(f"--tls-{option} {file}: ", **(house.files(role) | name | {option: file}))


# --- advice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("profile", "option"), [("default", ""), ("cnsa2", " --algorithm mldsa87")])
@pytest.mark.parametrize(("role", "command"), [("server", "--server HOST"), ("client", "--client")])
def test_advice_is_for_who_reads_it(
    house: House, big_house: House, tmp_path: Path, profile: str, option: str, role: str, command: str
) -> None:
    """A ca.crt that is missing has to be copied; what the authority has to make is told with the options it needs."""
    home = big_house if option else house
    name = {"verify_name": "localhost"} if role == "client" else {}
    files: dict[str, Any] = home.files(role) | name
    missing = tmp_path / "none"
    words = f"copy ca.crt from the authority's folder|rtunnel pki init{option}"
    refuse(words, profile, **(files | {"ca": missing}))
    words = f"rtunnel pki issue NAME {command}{option}, or by: rtunnel pki renew NAME"
    refuse(words, profile, **(files | {"cert": missing}))
    refuse("copy crl.pem|pki revoke", profile, **(files | {"crl": missing}))
    if option:
        refuse(f"--tls-ca|mldsa65|init{option}", profile, **(files | {"ca": house.ca}))
        refuse(f"--tls-cert|mldsa65|{option}", profile, **(files | {"cert": house.files(role)["cert"]}))


# --- the clock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["ca", "cert", "crl"])
def test_a_file_whose_time_has_not_come_can_be_waited_for(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """It raises NotYetValid, with both times and no advice to make another; an expired one is no such case."""
    now = datetime.datetime.now(datetime.timezone.utc)
    files: dict[str, Any] = house.files("server") | {"crl": house.crl}
    monkeypatch.setattr(rtunnel_tls, "_now", lambda: now + 30 * 24 * HOUR)
    rtunnel_tls.init_authority(tmp_path)
    pair = rtunnel_tls.issue(tmp_path, "server", hosts=["localhost"])
    later = {"ca": tmp_path / "ca.crt", "cert": pair, "crl": tmp_path / "crl.pem"}
    if option == "crl":  # of the authority that is trusted
        key = rtunnel_tls._load_keys(house.folder / "ca.key")[0]
        authority = rtunnel_tls._load_certificates(house.ca)[0]
        later["crl"].write_bytes(rtunnel_tls._revocations(authority, key, 1, ()))
    monkeypatch.setattr(rtunnel_tls, "_now", lambda: now)
    with pytest.raises(NotYetValid) as early:
        TlsContext("default", **(files | {option: later[option]}))
    assert str(early.value).startswith(f"--tls-{option} {later[option]}: validity: ")
    assert "is not valid before 20" in str(early.value)
    assert rtunnel_tls._iso(now) in str(early.value)
    assert "pki" not in str(early.value).replace(str(tmp_path), "")
    monkeypatch.setattr(rtunnel_tls, "_now", lambda: now + 20 * 365 * 24 * HOUR)
    with pytest.raises(TlsConfigError, match="expired on") as late:
        TlsContext("default", **(files | {option: later[option]}))
    assert not isinstance(late.value, NotYetValid)


def test_a_clock_that_is_wrong_at_boot(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 1970 nothing is valid yet; once the clock is right the same files do."""
    with monkeypatch.context() as boot:
        boot.setattr(rtunnel_tls, "_now", lambda: datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc))
        with pytest.raises(NotYetValid):
            house.client(crl=house.crl)
    house.client(crl=house.crl)


# --- two authorities ----------------------------------------------------------------------------------------


class Rotation:
    """A server and clients with one ca.crt and one crl.pem for all, as an operator goes from authority to authority."""

    def __init__(self, folder: Path) -> None:
        self.old, self.new = House(folder / "old"), House(folder / "new")
        self.ca, self.crl = folder / "ca.crt", folder / "crl.pem"

    def trust(self, *houses: House) -> None:
        self.ca.write_bytes(b"".join(house.ca.read_bytes() for house in houses))
        self.crl.write_bytes(b"".join(house.crl.read_bytes() for house in houses))

    def meets(self, server: House, client: House, name: str = "client") -> bool:
        trusted: dict[str, Any] = {"ca": self.ca, "crl": self.crl}
        own = client.files(name) | trusted
        told = meet(server.server(**trusted), lambda sock: _quiet(sock, client.client(**own)))[0]
        return isinstance(told, Receipt)


def test_a_rotation_of_the_authority(tmp_path: Path) -> None:
    """Both authorities have one name. At each step everybody who should is admitted, and nobody who is revoked."""
    world = Rotation(tmp_path)
    old, new = world.old, world.new
    rtunnel_tls.issue(old.folder, "thief", hosts=None)
    rtunnel_tls.issue(new.folder, "thief", hosts=None)
    rtunnel_tls.revoke(old.folder, "thief")
    world.trust(old)
    assert (world.meets(old, old), world.meets(old, old, "thief")) == (True, False)
    # 1. Everybody trusts both, with both lists; all still show the old certificates.
    for order in ((old, new), (new, old)):
        world.trust(*order)
        assert (world.meets(old, old), world.meets(old, old, "thief")) == (True, False)
        # 2. One after the other shows a new one: a server first, or a client.
        for server in (old, new):
            for client in (old, new):
                assert world.meets(server, client)
        assert world.meets(old, new, "thief"), "the new list has it not"
        rtunnel_tls.revoke(new.folder, "thief")
        world.trust(*order)
        assert not world.meets(old, new, "thief")
        new.crl.write_bytes(rtunnel_tls._revocations(*_authority(new), 9, ()))
    # 3. The old one is taken out: who still shows its certificates is refused.
    world.trust(new)
    assert world.meets(new, new)
    assert not world.meets(new, old)
    assert not world.meets(old, new)


def test_a_list_that_names_no_key_cannot_stand_beside_a_namesakes(tmp_path: Path) -> None:
    """OpenSSL would take it for either's and refuse everybody. An earlier version wrote such; `pki revoke` mends it."""
    world = Rotation(tmp_path)
    authority, key = _authority(world.old)
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateRevocationListBuilder(authority.subject, now - HOUR, now + 24 * HOUR)
    builder = builder.add_extension(x509.CRLNumber(1), critical=False)
    world.old.crl.write_bytes(builder.sign(key, None).public_bytes(serialization.Encoding.PEM))
    world.trust(world.old)
    assert world.meets(world.old, world.old), "alone it is no trouble"
    whole = tmp_path / "whole.crt"  # with its root, which is no second authority
    whole.write_bytes(world.old.files("server")["cert"].read_bytes() + world.ca.read_bytes())
    world.old.server(cert=whole, ca=world.ca, crl=world.crl)
    world.trust(world.old, world.new)
    words = "--tls-crl|does not say which CN=rtunnel CA has signed it|pki revoke"
    refuse(words, **(world.old.files("server") | {"ca": world.ca, "crl": world.crl}))
    rtunnel_tls.revoke(world.old.folder)
    world.trust(world.old, world.new)
    assert world.meets(world.old, world.new)
    assert world.meets(world.new, world.old)


def _authority(house: House) -> tuple[x509.Certificate, Any]:
    key = rtunnel_tls._load_keys(house.folder / "ca.key")[0]
    return rtunnel_tls._load_certificates(house.ca)[0], key


def test_an_open_session_is_found_revoked_by_its_own_authority(tmp_path: Path) -> None:
    """Of two authorities with one name, only the list of the one that has signed counts, for serials can be equal."""
    world = Rotation(tmp_path)
    world.trust(world.old, world.new)
    with session(world.old.server(ca=world.ca), world.old.client(ca=world.ca)) as (server, _):
        serial = server.receipt.facts["serial"]
        rtunnel_tls.revoke(world.new.folder, serial=serial)
        world.trust(world.old, world.new)
        assert not world.old.server(ca=world.ca, crl=world.crl).revokes(server.receipt)
        rtunnel_tls.revoke(world.old.folder, "client")
        world.trust(world.new, world.old)
        assert world.old.server(ca=world.ca, crl=world.crl).revokes(server.receipt)


def test_a_forged_list_is_told_at_start(house: House, tmp_path: Path) -> None:
    """A list in the name of our authority that it has not signed: OpenSSL would refuse everybody."""
    head, der, tail = _block(house.crl.read_bytes())
    forged = der[:-9] + bytes([der[-9] ^ 1]) + der[-8:]
    file = tmp_path / "crl.pem"
    file.write_bytes(b"\n".join((head, base64.encodebytes(forged).strip(), tail, b"")))
    refuse(f"--tls-crl {file}|CN=rtunnel CA that we trust has not signed it", crl=file, **house.files("server"))


@pytest.mark.parametrize("between", [0, 1, 4, 5])
def test_four_authorities_may_stand_between(tmp_path: Path, between: int) -> None:
    """A chain of up to four intermediates is admitted at both ends, one of five is not."""
    root = signer = Signer()
    for number in range(between):
        signer = Signer("mldsa65" if number % 2 else "mldsa87", name=f"between {number}", by=signer)
    ca = root.save(tmp_path)
    server, client = (signer.issue(tmp_path, name, [use], ["localhost"]) for name, use in
                      (("server", SERVER_AUTH), ("client", CLIENT_AUTH)))  # fmt: skip
    files: dict[str, Any] = {"cert": client.cert, "key": client.key, "ca": ca}
    if between > 4:
        refuse("--tls-cert|more than 4 authorities", cert=server.cert, key=server.key, ca=ca)
        peer = raw_peer(raw_context(server, None, groups="X25519MLKEM768", signatures=None), "server")
        own = Signer().issue(tmp_path, "own", [CLIENT_AUTH])
        files |= {"cert": own.cert, "key": own.key}
        refused, _ = meet(TlsContext("default", verify_name="localhost", **files), peer)
        assert isinstance(refused, HandshakeError)
        assert "chain too long" in str(refused)
        return
    ours = TlsContext("default", cert=server.cert, key=server.key, ca=ca)
    with session(ours, TlsContext("default", verify_name="localhost", **files)) as (end, other):
        assert len(end.receipt.chain) == len(other.receipt.chain) == between + 2


def test_a_revoked_authority_in_between_ends_open_sessions(tmp_path: Path) -> None:
    """Not only the peer's own certificate counts: whom its authority has signed is out with it."""
    root = Signer()
    between = Signer(name="between", by=root)
    ca = root.save(tmp_path)
    server, client = (between.issue(tmp_path, name, [use], ["localhost"]) for name, use in
                      (("server", SERVER_AUTH), ("client", CLIENT_AUTH)))  # fmt: skip
    ours = TlsContext("default", cert=server.cert, key=server.key, ca=ca)
    theirs = TlsContext("default", cert=client.cert, key=client.key, ca=ca, verify_name="localhost")
    now = datetime.datetime.now(datetime.timezone.utc)
    entry = x509.RevokedCertificateBuilder(between.certificate.serial_number, now).build()
    lists = [rtunnel_tls._revocations(root.certificate, root.key, 1, entries) for entries in ((), (entry,))]
    lists = [each + rtunnel_tls._revocations(between.certificate, between.key, 1, ()) for each in lists]
    with session(ours, theirs) as (end, _):
        for content, revoked in zip(lists, (False, True), strict=True):
            (tmp_path / "crl.pem").write_bytes(content)
            fresh = TlsContext("default", cert=server.cert, key=server.key, ca=ca, crl=tmp_path / "crl.pem")
            assert fresh.revokes(end.receipt) == revoked


# --- options ------------------------------------------------------------------------------------------------


def test_cnsa2_refuses_smaller_keys(house: House) -> None:
    """A profile that admits mldsa87 only says so of an mldsa65 certificate."""
    refuse("mldsa65|cnsa2", profile="cnsa2", **house.files("server"))


@pytest.mark.parametrize(
    ("part", "value"), [("groups", ("MLKEM9999",)), ("signatures", ("mldsa99",)), ("ciphers", ("TLS_NONE",))]
)
def test_a_profile_that_this_openssl_lacks_is_refused(
    house: House, monkeypatch: pytest.MonkeyPatch, part: str, value: tuple[str, ...]
) -> None:
    """Every part of a profile is applied or the program stops with a sentence that says what to install."""
    fields = {
        "name": "default",
        "groups": ("MLKEM768",),
        "signatures": ("mldsa65",),
        "ciphers": ("TLS_AES_256_GCM_SHA384",),
    }
    monkeypatch.setitem(PROFILES, "default", rtunnel_tls.Profile(**(fields | {part: value})))  # type: ignore[arg-type]
    refuse("--tls-profile default|pip install", **house.files("server"))
    assert lib.ERR_peek_error() == 0, "nothing is left for a later call to trip over"


@pytest.mark.parametrize("binding", ["SSL_CTX_set1_curves_list", "SSL_CTX_set1_sigalgs_list"])
def test_a_binding_that_is_gone_is_refused(house: House, monkeypatch: pytest.MonkeyPatch, binding: str) -> None:
    """Where the private binding is gone, nothing starts."""

    class Without:
        def __getattr__(self, name: str) -> Any:
            if name == binding:
                raise AttributeError(name)
            return getattr(lib, name)

    monkeypatch.setattr(rtunnel_tls, "lib", Without())
    refuse(f"--tls-profile default|{binding}", **house.files("server"))


def test_the_setters_work(house: House) -> None:
    """Each setter around a private binding has its effect, one at a time."""
    files = house.files("server")
    pair = Pair.__new__(Pair)
    pair.cert, pair.key = files["cert"], files["key"]
    pure = PROFILES["pure"]
    for restricted, reason in (
        (pure._replace(groups=("MLKEM1024",)), "group"),
        (pure._replace(signatures=("mldsa87",)), "signature"),
    ):
        context = rtunnel_tls._bare_context(restricted)
        context.use_certificate_chain_file(str(pair.cert))
        context.use_privatekey_file(str(pair.key))
        context.load_verify_locations(str(house.ca))
        refused, told = meet(house.client("pure"), raw_peer(context, "server"))
        if reason == "group":
            assert isinstance(refused, Receipt), "asked for the other group, and agreed"
            assert refused.facts["group"] == "MLKEM1024"
        else:
            assert isinstance(refused, HandshakeError)
            assert reason in told


def test_openssl_alone_holds_a_server_to_its_name(
    house: House, root: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our own check too: by the subjectAltName, host or address, and never by the common name."""
    monkeypatch.setattr(rtunnel_tls, "check_peer", lambda *_: Receipt("anybody", (), rtunnel_tls._now(), {}))
    monkeypatch.setattr(rtunnel_tls, "_check_chain", lambda *_: "anybody")
    nameless = root.issue(tmp_path, "nameless", [SERVER_AUTH], subject="localhost")
    server = house.server()
    no_host = TlsContext("default", cert=nameless.cert, key=nameless.key, ca=house.ca)
    for serving, name, ca, good in (
        (server, "localhost", house.ca, True),
        (server, "127.0.0.1", house.ca, True),
        (server, "localhos", house.ca, False),
        (server, "127.0.0.2", house.ca, False),
        (server, "server", house.ca, False),  # its common name
        (no_host, "localhost", root.save(tmp_path), False),
    ):
        outcome, told = meet(house.client(name=name, ca=ca), functools.partial(_quiet, context=serving))
        assert isinstance(outcome, Receipt) == good, (name, told)
    client = house.client(name="127.0.0.1")
    client.peer_name = SimpleNamespace(packed=b"1")  # type: ignore[assignment]
    with pytest.raises(ValueError, match="cannot verify"):
        rtunnel_tls._Ssl(client)
    assert lib.ERR_peek_error() == 0, "nothing is left for a later call to trip over"


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        ("LocalHost", "localhost"),
        ("tunnel.example.org.", "tunnel.example.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("a_b.example", "a_b.example"),
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:DB8::1", "2001:db8::1"),
        ("fe80::1%eth0", "fe80::1"),
    ],
)
def test_names_have_one_form(given: str, parsed: str) -> None:
    """Hosts are compared and sent in ASCII, lower case, without a final dot; addresses as addresses."""
    assert str(rtunnel_tls.parse_name(given)) == parsed


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..b",
        "-a",
        "a b",
        "a\0b",
        "a/b",
        "*",
        "*.example.org",
        "a" * 64,
        "a." * 130,
        "192.0.2.256",
        "10.0.0.01",
        "1",
        "a.1",
    ],
)
def test_what_is_no_name_is_refused(house: House, name: str) -> None:
    """What is neither a host name nor an address is told at start."""
    refuse("--tls-server-name", verify_name=name, **house.files("client"))


def test_a_client_without_a_name_to_verify_cannot_be_made(house: House) -> None:
    """Who has no name to verify is a server, and who has one is none: by its certificate that would be told."""
    refuse("--tls-cert|purpose|no server's", **house.files("client"))
    refuse("--tls-cert|purpose|no client's", verify_name="localhost", **house.files("server"))
    assert house.client().peer_role == "server"
    assert house.server().peer_role == "client"


# --- time, lists, secrets -----------------------------------------------------------------------------------


def test_what_ends_soon_is_known(root: Signer, tmp_path: Path, house: House) -> None:
    """Of each file the end is known, and of an end how many days there are until then, rounded down."""
    day = datetime.timedelta(days=1)
    for left in (31 * day + HOUR, 30 * day + HOUR, HOUR):
        pair = root.issue(tmp_path, "soon", [SERVER_AUTH], ["localhost"], after=left)
        context = TlsContext("default", cert=pair.cert, key=pair.key, ca=house.ca)
        assert rtunnel_tls.days_left(context.ends[str(pair.cert)]) == left.days


def test_a_file_ends_with_the_first_that_it_holds(
    house: House, tmp_path: Path, root: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several roots, or lists, in one file the one that ends first counts, wherever it stands."""
    monkeypatch.setattr(rtunnel_tls, "LIST_DAYS", 6)
    (tmp_path / "short.pem").write_bytes(rtunnel_tls._revocations(root.certificate, root.key, 1, ()))
    roots, lists = [root.save(tmp_path), house.ca], [tmp_path / "short.pem", house.crl]
    for order in (1, -1):
        for name, held in (("roots", roots), ("lists", lists)):
            (tmp_path / name).write_bytes(b"".join(file.read_bytes() for file in held[::order]))
        context = house.server(ca=tmp_path / "roots", crl=tmp_path / "lists")
        days = {file: rtunnel_tls.days_left(end) for file, end in context.ends.items()}
        files = {str(tmp_path / "roots"): 0, str(tmp_path / "lists"): 5}
        assert days == files | {str(house.files("server")["cert"]): 396}


def test_an_authority_that_ends_before_its_leaf_is_known(root: Signer, tmp_path: Path, house: House) -> None:
    """A certificate file ends with the authority in it, where that ends before the leaf."""
    between = Signer("mldsa87", name="between", by=root)
    pair = between.issue(tmp_path, "own", [SERVER_AUTH], ["localhost"], after=datetime.timedelta(days=90))
    context = TlsContext("default", cert=pair.cert, key=pair.key, ca=house.ca)
    assert context.ends[str(pair.cert)] == between.certificate.not_valid_after_utc


def test_an_expired_list_is_refused(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expired revocation list would make OpenSSL refuse everybody: it is told at start."""
    key = rtunnel_tls._load_keys(house.folder / "ca.key")[0]
    authority = x509.load_pem_x509_certificate(house.ca.read_bytes())
    monkeypatch.setattr(rtunnel_tls, "LIST_DAYS", 0)
    (tmp_path / "crl.pem").write_bytes(rtunnel_tls._revocations(authority, key, 1, ()))
    refuse("--tls-crl|expired|pki revoke", crl=tmp_path / "crl.pem", **house.files("server"))


def test_a_list_of_a_classical_signature_is_refused(house: House, tmp_path: Path) -> None:
    """A forged list could pardon everybody."""
    rsa = Signer("rsa", name="rtunnel CA")
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateRevocationListBuilder(rsa.certificate.subject, now - HOUR, now + HOUR)
    (tmp_path / "crl.pem").write_bytes(builder.sign(rsa.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    refuse("--tls-crl|signature", crl=tmp_path / "crl.pem", **house.files("server"))


def test_a_list_of_another_authority_lets_nobody_in(house: House, tmp_path: Path) -> None:
    """With a list that does not cover the peer's authority, nobody is let in: a wrong file is no open door."""
    rtunnel_tls.init_authority(tmp_path / "pki", name="another")
    server = house.server(crl=tmp_path / "pki" / "crl.pem")
    refused, _ = meet(server, lambda sock: _quiet(sock, house.client()))
    assert isinstance(refused, HandshakeError)


def point(**what: Any) -> x509.IssuingDistributionPoint:
    wanted = dict.fromkeys(inspect.signature(x509.IssuingDistributionPoint).parameters, False)
    wanted |= {"full_name": None, "relative_name": None, "only_some_reasons": None} | what
    return x509.IssuingDistributionPoint(**wanted)


PARTS: dict[str, x509.ExtensionType] = {
    "changes": x509.DeltaCRLIndicator(1),
    "authorities": point(only_contains_ca_certs=True),
    "others'": point(indirect_crl=True),
    "some reasons": point(only_contains_user_certs=True, only_some_reasons=frozenset([x509.ReasonFlags.ca_compromise])),
    "unknown": x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"),
}


def listed(house: House, name: str, *extensions: x509.ExtensionType, key: Any = None) -> bytes:
    """A revocation list in that name, of our authority's key or another one."""
    now = datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = x509.CertificateRevocationListBuilder(subject, now - HOUR, now + HOUR)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=True)
    return rtunnel_tls._pem(builder.sign(key or rtunnel_tls._load_keys(house.folder / "ca.key")[0], None))


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_list_is_refused(house: House, tmp_path: Path, part: str) -> None:
    """OpenSSL would find no list for most certificates, and refuse everybody."""
    (tmp_path / "crl.pem").write_bytes(listed(house, "rtunnel CA", PARTS[part]))
    refuse("--tls-crl|a part of a list", crl=tmp_path / "crl.pem", **house.files("server"))


def test_a_list_of_leaves_is_taken(house: House, tmp_path: Path) -> None:
    """A list of leaves alone does where no authority stands below the root."""
    (tmp_path / "crl.pem").write_bytes(listed(house, "rtunnel CA", point(only_contains_user_certs=True)))
    with session(house.server(crl=tmp_path / "crl.pem"), house.client()):
        pass


def test_a_list_of_one_point_is_taken(house: House, tmp_path: Path) -> None:
    """Whether a list of one distribution point does depends on the certificates that will come."""
    where = point(full_name=[x509.UniformResourceIdentifier("http://ca.example.org/crl")])
    (tmp_path / "crl.pem").write_bytes(listed(house, "rtunnel CA", where))
    house.server(crl=tmp_path / "crl.pem")


def test_a_chain_that_no_peer_would_take(root: Signer, tmp_path: Path, house: House) -> None:
    """A certificate of so many hosts that its handshake would be too large is refused at the start."""
    hosts = [f"host-{number}.some-example.org" for number in range(2_000)]
    pair = root.issue(tmp_path, "own", [SERVER_AUTH], hosts)
    refuse("--tls-cert|over 49152 bytes", cert=pair.cert, key=pair.key, ca=house.ca)


@pytest.mark.parametrize("name", ["RTUNNEL CA", "rtunnel  CA"])
def test_names_are_compared_as_openssl_does(house: House, tmp_path: Path, name: str) -> None:
    """A list whose issuer differs from our authority's in case or blanks alone is one in its name."""
    (tmp_path / "crl.pem").write_bytes(listed(house, name, key=Signer().key))
    refuse("--tls-crl|has not signed it", crl=tmp_path / "crl.pem", **house.files("server"))


def test_an_authority_below_the_root_alone(house: House, tmp_path: Path) -> None:
    """OpenSSL wants the root as well: without it nobody's chain would end anywhere."""
    root = Signer()
    between = Signer(name="between", by=root)
    (tmp_path / "ca.crt").write_bytes(rtunnel_tls._pem(between.certificate))
    files = house.files("server") | {"ca": tmp_path / "ca.crt"}
    refuse("--tls-ca|CN=root has signed an authority, and is missing", **files)
    (tmp_path / "ca.crt").write_bytes(rtunnel_tls._pem(between.certificate, Signer().certificate))  # a namesake
    refuse("--tls-ca|CN=root has signed an authority, and is missing", **files)
    root.name = "ROOT"  # as OpenSSL compares names, that is the same
    between = Signer(name="between", by=root)
    (tmp_path / "ca.crt").write_bytes(rtunnel_tls._pem(between.certificate, root.certificate))
    TlsContext("default", **files)


def test_a_key_as_openssl_writes_it(house: House, tmp_path: Path) -> None:
    """RFC 9881 has three forms of a private key; OpenSSL's own holds the seed and what follows from it."""
    pem, file = (house.folder / "client.key").read_bytes(), tmp_path / "client.key"
    source, target = lib.BIO_new_mem_buf(ffi.from_buffer(pem), len(pem)), lib.BIO_new(lib.BIO_s_mem())
    key = lib.PEM_read_bio_PrivateKey(source, ffi.NULL, ffi.NULL, ffi.NULL)
    assert lib.PEM_write_bio_PrivateKey(target, key, ffi.NULL, ffi.NULL, 0, ffi.NULL, ffi.NULL) == 1
    start = ffi.new("char**")
    count = lib.BIO_get_mem_data(target, start)
    file.touch(0o600)
    file.write_bytes(ffi.buffer(start[0], count)[:])
    assert count > 10 * len(pem)
    with session(house.server(), house.client(key=file)):
        pass


def _quiet(sock: Any, context: TlsContext) -> str:
    try:
        return f"end {shake(sock, context).receive_into(memoryview(bytearray(1)))}"
    except (OSError, HandshakeError, rtunnel_tls.TransportError) as error:
        return str(error)


def test_an_open_session_can_be_found_revoked(tmp_path: Path) -> None:
    """A new context tells which open sessions its list revokes, by serial number and not by name."""
    house = House(tmp_path / "pki")
    with session(house.server(crl=house.crl), house.client(crl=house.crl)) as (server, _):
        assert not house.server(crl=house.crl).revokes(server.receipt)
        rtunnel_tls.revoke(house.folder, "client")
        assert house.server(crl=house.crl).revokes(server.receipt)
        rtunnel_tls.issue(house.folder, "client", hosts=None, force=True)
    with session(house.server(crl=house.crl), house.client(crl=house.crl)) as (server, _):
        assert not house.server(crl=house.crl).revokes(server.receipt)


def test_secrets_go_where_sslkeylogfile_says(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection appends the five lines that Wireshark needs to a file that only its owner can read."""
    file = tmp_path / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(file))
    server, client = house.server(), house.client()
    assert server.keylog == client.keylog == str(file)
    with session(server, client):
        pass
    lines = [line.split() for line in file.read_text().splitlines()]
    labels = {line[0] for line in lines}
    assert {"CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0", "SERVER_HANDSHAKE_TRAFFIC_SECRET"} <= labels
    assert all(len(line) == 3 for line in lines)
    if os.name == "posix":
        assert file.stat().st_mode & 0o777 == 0o600
    monkeypatch.delenv("SSLKEYLOGFILE")
    assert house.server().keylog is None


@POSIX
def test_a_keylog_that_others_can_read_is_refused(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads it reads all that passes; a device's mode says nothing."""
    file = tmp_path / "keys.log"
    file.touch()
    monkeypatch.setenv("SSLKEYLOGFILE", str(file))
    for mode in (0o644, 0o640, 0o602):
        file.chmod(mode)
        refuse(f"SSLKEYLOGFILE {file}|others can read it|chmod 600 {file}", **house.files("server"))
    file.chmod(0o600)
    assert house.server().keylog == str(file)
    monkeypatch.setenv("SSLKEYLOGFILE", os.devnull)
    assert house.server().keylog == os.devnull


def test_a_keylog_that_cannot_be_written_is_told_at_start(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the first handshake."""
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "missing" / "keys.log"))
    refuse("SSLKEYLOGFILE|No such file", **house.files("server"))


# --- the second check ---------------------------------------------------------------------------------------


def test_the_peer_check_stands_on_its_own(house: House, root: Signer, tmp_path: Path) -> None:
    """Were OpenSSL to let it pass, each broken rule would still be refused by name."""
    context = house.client()
    ca = x509.load_pem_x509_certificate(house.ca.read_bytes())
    leaf = x509.load_pem_x509_certificate(house.files("server")["cert"].read_bytes())
    good: dict[str, Any] = {
        "version": "TLSv1.3",
        "group": "X25519MLKEM768",
        "cipher": "TLS_AES_256_GCM_SHA384",
        "chain": [leaf, ca],
    }

    def other(**made: Any) -> list[x509.Certificate]:
        signer = made.pop("signer", root)
        usual: dict[str, Any] = {"purposes": [SERVER_AUTH], "hosts": ["localhost"]}
        pair = signer.issue(tmp_path, "x", **(usual | made))
        return [*x509.load_pem_x509_certificates(pair.cert.read_bytes()), ca]

    assert check_peer(context, **good).identity == "server"
    assert check_peer(context, **(good | {"chain": other()})).identity == "peer"
    for rule, change in (
        ("version", {"version": "TLSv1.2"}),
        ("group", {"group": "x25519"}),
        ("group", {"group": "MLKEM512"}),
        ("group", {"group": "none"}),
        ("cipher", {"cipher": "TLS_AES_128_GCM_SHA256"}),
        ("certificate", {"chain": []}),
        ("key", {"chain": other(algorithm="rsa")}),
        ("key", {"chain": other(algorithm="ed25519")}),
        ("signature", {"chain": other(signer=Signer("ecdsa"))}),
        ("signature", {"chain": [leaf, Signer("rsa").certificate]}),
        ("purpose", {"chain": other(purposes=[CLIENT_AUTH])}),
        ("purpose", {"chain": other(purposes=[])}),
        ("name", {"chain": other(hosts=["example.org", "127.0.0.1"])}),
        ("name", {"chain": other(hosts=[], subject="localhost")}),
        ("validity", {"chain": other(before=3 * HOUR, after=-HOUR)}),
        ("validity", {"chain": other(before=-HOUR)}),
        ("identity", {"chain": other(subject=None)}),
        ("identity", {"chain": other(subject="a\nb")}),
        ("identity", {"chain": other(subject="anonymous")}),
    ):
        with pytest.raises(HandshakeError) as refused:
            check_peer(context, **(good | change))
        assert refused.value.rule == rule, (rule, refused.value)


def test_a_name_that_cannot_be_read() -> None:
    """For a name of an unknown kind cryptography 49 raises KeyError: who bears it is not known, either."""

    class Odd:
        signature = tbs_certificate_bytes = b""

        @property
        def issuer(self) -> object:
            raise KeyError(8)

    signs_all = SimpleNamespace(public_key=lambda: SimpleNamespace(verify=lambda *_: None))
    assert not rtunnel_tls._has_signed(signs_all, Odd())  # type: ignore[arg-type]
    with pytest.raises(TlsConfigError, match="--tls-ca file: 8"), rtunnel_tls._told("--tls-ca file"):
        _ = Odd().issuer
