"""The certificate authority: what it writes, and that nothing is lost or left readable."""

from __future__ import annotations

import base64
import builtins
import contextlib
import datetime
import errno
import functools
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from OpenSSL._util import lib
from support import ROOT
from tls_peers import House, Signer, Task, session

import rtunnel
import rtunnel_tls
from rtunnel_tls import HandshakeError, TlsConfigError, init_authority, issue, renew, revoke, show

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no such modes")


def load(file: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(file.read_bytes())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_authority(tmp_path / "conf" / "pki")
    return tmp_path / "conf" / "pki"


def refuse(words: str, function: object, *args: object, **kwargs: object) -> None:
    with pytest.raises(TlsConfigError) as refused:
        function(*args, **kwargs)  # type: ignore[operator]
    text = str(refused.value)
    assert "\n" not in text
    assert all(word in text for word in words.split("|")), text


def test_from_nothing_to_a_session_to_a_revocation(tmp_path: Path) -> None:
    """A fresh folder, two commands, a session; after `revoke` the list shows it and the next session is refused."""
    house = House(tmp_path / "pki")
    with session(house.server(crl=house.crl), house.client(crl=house.crl)) as (server, client):
        assert (server.identity, client.identity) == ("client", "server")
    revoke(house.folder, "client")
    ours, theirs = house.server(crl=house.crl), house.client(crl=house.crl)
    with pytest.raises(HandshakeError, match="revoked"), session(ours, theirs):
        pytest.fail("a revoked client came in")
    assert "revoked    YES, on 2" in show(house.folder / "client.crt")


@POSIX
def test_keys_and_their_folder_are_their_owners(folder: Path) -> None:
    """Modes of all that is written, also under a lax umask."""
    old = os.umask(0)
    try:
        init_authority(folder.parent / "lax")
        issue(folder.parent / "lax", "one", hosts=None)
        revoke(folder.parent / "lax", "one")
    finally:
        os.umask(old)
    for where in (folder, folder.parent / "lax"):
        assert mode(where) == 0o700
        for file in where.iterdir():
            assert mode(file) == (0o600 if file.suffix == ".key" or file.name == ".lock" else 0o644), file
    assert sorted(file.name for file in (folder.parent / "lax").iterdir()) == [
        ".lock",
        "ca.crt",
        "ca.key",
        "crl.pem",
        "issued.pem",
        "one.crt",
        "one.key",
    ]


@POSIX
def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    """Whoever can write to the folder could swap the authority; the sentence says what mends it."""
    (tmp_path / "pki").mkdir()
    (tmp_path / "pki").chmod(0o777)
    refuse(f"chmod 700 {tmp_path / 'pki'}", init_authority, tmp_path / "pki")


@POSIX
@pytest.mark.parametrize(
    "command", [functools.partial(issue, name="x", hosts=None), functools.partial(renew, name="x"), revoke]
)
def test_a_folder_that_others_can_write_to_later(folder: Path, command: Callable[[Path], object]) -> None:
    """The authority's key is used nowhere that others can write."""
    issue(folder, "x", hosts=None)
    folder.chmod(0o777)
    refuse(f"chmod 700 {folder}", command, folder)


@POSIX
def test_an_authoritys_key_that_others_can_read_is_refused(folder: Path) -> None:
    """As `server` and `client` refuse theirs."""
    (folder / "ca.key").chmod(0o640)
    refuse(f"chmod 600 {folder / 'ca.key'}", issue, folder, "x", hosts=None)


def test_a_server_certificate_holds_what_peers_look_at(folder: Path) -> None:
    """One role, the names, what the key is for, 397 days, and nothing that only costs bytes."""
    certificate = load(issue(folder, "gate", hosts=["Tunnel.example.org", "*.example.net", "192.0.2.1", "2001:db8::1"]))
    extensions = certificate.extensions
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["tunnel.example.org", "*.example.net"]
    assert [str(name) for name in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.1", "2001:db8::1"]
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    key_usage = extensions.get_extension_for_class(x509.KeyUsage).value
    assert key_usage.digital_signature
    assert not key_usage.key_cert_sign
    assert len(list(extensions)) == 5
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days == 397
    assert certificate.not_valid_before_utc < rtunnel_tls._now() - rtunnel_tls.CLOCK_SKEW / 2
    certificate.verify_directly_issued_by(load(folder / "ca.crt"))


def test_a_client_certificate_is_for_a_client_only(folder: Path) -> None:
    """Its role is the client's, and it names no host."""
    extensions = load(issue(folder, "laptop", hosts=None)).extensions
    usage = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        extensions.get_extension_for_class(x509.SubjectAlternativeName)


@pytest.mark.parametrize("algorithm", ["mldsa65", "mldsa87"])
def test_the_algorithm_follows_the_authority(tmp_path: Path, algorithm: str) -> None:
    """A leaf has the authority's algorithm, or the one that was asked for."""
    init_authority(tmp_path / "pki", algorithm=algorithm, name="Ours", years=2)
    authority = load(tmp_path / "pki" / "ca.crt")
    assert rtunnel_tls._algorithm(authority.signature_algorithm_oid) == algorithm
    assert authority.subject.rfc4514_string() == "CN=Ours"
    constraints = authority.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (constraints.ca, constraints.path_length) == (True, 0)
    for name, asked in (("same", None), ("small", "mldsa65"), ("large", "mldsa87")):
        leaf = load(issue(tmp_path / "pki", name, hosts=None, algorithm=asked))
        assert rtunnel_tls._algorithm(leaf.public_key_algorithm_oid) == (asked or algorithm)
        assert rtunnel_tls._algorithm(leaf.signature_algorithm_oid) == algorithm


def test_nothing_is_overwritten_without_force(folder: Path) -> None:
    """Neither the authority nor a pair; with force both are new."""
    issue(folder, "one", hosts=None)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refuse("ca.crt|--force", init_authority, folder)
    refuse("one.crt|--force", issue, folder, "one", hosts=None)
    (folder / "one.crt").unlink()
    refuse("one.key|--force", issue, folder, "one", hosts=None)
    assert all((folder / name).read_bytes() == content for name, content in before.items() if name != "one.crt")
    issue(folder, "one", hosts=None, force=True)
    assert (folder / "one.key").read_bytes() != before["one.key"]
    assert load(folder / "one.crt").subject == x509.load_pem_x509_certificate(before["one.crt"]).subject
    init_authority(folder, force=True)
    assert (folder / "ca.key").read_bytes() != before["ca.key"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is full in the middle of a write costs nothing that was there."""
    issue(folder, "one", hosts=None)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device", "the disk")

    monkeypatch.setattr(rtunnel_tls.os, "fsync", full)
    refuse("No space left", issue, folder, "one", hosts=None, force=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", ".hidden", "-f", "ca", "CA", "a b", "a\nb", "é", "a" * 65]
)
def test_a_name_cannot_leave_the_folder(folder: Path, name: str) -> None:
    """Names are letters, digits, dot, underscore and hyphen, and never the authority's."""
    before = sorted(folder.parent.rglob("*"))
    refuse("certificate's name", issue, folder, name, hosts=None)
    refuse("", revoke, folder, name)
    refuse("has issued nothing", renew, folder, name)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "given"),
    [
        ("--days|1 to 36", {"hosts": None, "days": 0}),
        ("--days|1 to 36", {"hosts": None, "days": 4000}),
        ("--algorithm", {"hosts": None, "algorithm": "rsa"}),
        ("neither", {"hosts": ["a b"]}),
        ("neither", {"hosts": ["*.*.example.org"]}),
        ("neither", {"hosts": [""]}),
        ("'*.192.0.2.1'|wildcard", {"hosts": ["*.192.0.2.1"]}),
        ("'*.2001:db8::1'|wildcard", {"hosts": ["*.2001:db8::1"]}),
        ("'*.lan'|wildcard", {"hosts": ["*.lan"]}),
        ("'192.0.2.256' is neither", {"hosts": ["192.0.2.256"]}),
        ("'10.0.0.01' is neither", {"hosts": ["10.0.0.01"]}),
        ("'a..b' is neither", {"hosts": ["a..b"]}),
        ("is neither", {"hosts": ["a" * 64]}),
    ],
)
def test_what_cannot_be_issued_is_one_sentence(folder: Path, words: str, given: dict[str, object]) -> None:
    """A wrong validity, algorithm, host or wildcard is told in one sentence, and nothing is written."""
    before = sorted(folder.iterdir())
    refuse(words, issue, folder, "x", **given)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["init", "--algorithm", "rsa"], "--algorithm: invalid choice: 'rsa'|mldsa65|mldsa87"),
        (["issue", "x", "--client", "--algorithm", "rsa"], "--algorithm: invalid choice: 'rsa'|mldsa65|mldsa87"),
        (["issue", "x", "--client", "--server", "localhost"], "--server: not allowed with argument --client"),
        (["issue", "x"], "--server --client is required"),
        (["issue", "x", "--server"], "--server: expected at least one argument"),  # it could be dialled by nobody
    ],
)
def test_what_the_options_refuse(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    """An unknown algorithm, no role, both, or a server of no host: nothing is made."""
    before = sorted(folder.iterdir())
    assert rtunnel.main(["pki", *arguments, "--dir", str(folder)]) == 2
    told = capsys.readouterr().err
    assert all(word in told for word in words.split("|")), told
    assert sorted(folder.iterdir()) == before


def test_an_authority_is_needed(tmp_path: Path) -> None:
    """Without one, the folder is named and what makes one; nothing is left there."""
    for function, kwargs in ((issue, {"hosts": None}), (revoke, {}), (renew, {})):
        refuse(f"{tmp_path} holds no authority|pki init", function, tmp_path, "x", **kwargs)
        refuse(f"{tmp_path / 'none'} holds no authority", function, tmp_path / "none", "x", **kwargs)
    assert list(tmp_path.iterdir()) == []
    refuse("--years", init_authority, tmp_path / "pki", years=0)
    refuse("--algorithm", init_authority, tmp_path / "pki", algorithm="rsa")
    refuse("pki init", show, tmp_path)


def test_no_validity_reaches_beyond_the_calendar(tmp_path: Path) -> None:
    """Years and days that end after the year 9999 are refused with the most that can be had, and that can be had."""
    most = 9999 - rtunnel_tls._now().year
    for years in (most + 1, 9000, 10**12):
        refuse(f"--years: 1 to {most}", init_authority, tmp_path / "pki", years=years)
    authority = load(init_authority(tmp_path / "pki", years=most))
    refuse("--days: 1 to", issue, tmp_path / "pki", "x", hosts=None, days=10**12)
    longest = rtunnel_tls.days_left(authority.not_valid_after_utc)
    leaf = load(issue(tmp_path / "pki", "x", hosts=None, days=longest))
    assert leaf.not_valid_after_utc <= authority.not_valid_after_utc


def test_revocations_add_up(folder: Path) -> None:
    """Each revocation keeps the ones before; twice is once; the list's number rises and its end moves on."""
    for name in ("a", "b", "c"):
        issue(folder, name, hosts=None)
    serials = [load(folder / f"{name}.crt").serial_number for name in ("a", "b")]
    for name in ("a", "b", "b"):
        revoke(folder, name)
    crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    assert sorted(entry.serial_number for entry in crl) == sorted(serials)
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 4
    assert crl.is_signature_valid(load(folder / "ca.crt").public_key())  # type: ignore[arg-type]
    assert rtunnel_tls.days_left(crl.next_update_utc) >= 3649


def test_a_lost_list_is_not_made_afresh(folder: Path) -> None:
    """An empty list in place of a lost one would pardon whoever was on it."""
    issue(folder, "a", hosts=None)
    (folder / "crl.pem").unlink()
    refuse("crl.pem", revoke, folder, "a")


@pytest.mark.parametrize("broken", ["nothing", "half", "text", "unnumbered"])
def test_a_broken_list_is_named_and_kept(folder: Path, broken: str) -> None:
    """A list that cannot be read is named with what to do, and is not written over."""
    issue(folder, "a", hosts=None)
    file, now = folder / "crl.pem", rtunnel_tls._now()
    builder = x509.CertificateRevocationListBuilder(load(folder / "ca.crt").subject, now, now)
    unnumbered = rtunnel_tls._pem(builder.sign(rtunnel_tls._load_keys(folder / "ca.key")[0], None))
    half = file.read_bytes()[:1000] + b"\n-----END X509 CRL-----\n"
    content = {"nothing": b"", "half": half, "text": b"x", "unnumbered": unnumbered}[broken]
    file.write_bytes(content)
    refuse(f"{file}: |copy", revoke, folder, "a")
    if broken != "unnumbered":  # which tells who is revoked, but not where to count on
        refuse(f"{file}: |holds no X509 CRL|copy", show, folder)
    assert file.read_bytes() == content


def test_a_certificate_of_another_authority_cannot_be_revoked(folder: Path, tmp_path: Path) -> None:
    """Its own authority has to do it."""
    init_authority(tmp_path / "other")
    issue(tmp_path / "other", "x", hosts=None)
    shutil.copy(tmp_path / "other" / "x.crt", folder / "x.crt")
    refuse("nothing that was issued to x", revoke, folder, "x")
    refuse("x.crt: it is of another authority", revoke, folder, folder / "x.crt")
    shutil.copy(tmp_path / "other" / "crl.pem", folder / "crl.pem")
    refuse("crl.pem|another authority", revoke, folder)


@pytest.mark.parametrize("name", ["", "a" * 65])
def test_an_authority_without_a_fit_name(tmp_path: Path, name: str) -> None:
    """X.520 bounds a common name: the option is told, and nothing is made."""
    refuse(f"--name {name!r}|length", init_authority, tmp_path / "house", name=name)
    assert [each.name for each in (tmp_path / "house").iterdir()] == [".lock"]


def test_a_file_of_two_certificates_cannot_be_revoked(folder: Path, tmp_path: Path) -> None:
    """Only the first would be: each is revoked by its own file. Authorities behind one are its chain."""
    issue(folder, "a", hosts=None)
    issue(folder, "b", hosts=None)
    both, chain = tmp_path / "both.pem", tmp_path / "chain.pem"
    a, b, ca = ((folder / name).read_bytes() for name in ("a.crt", "b.crt", "ca.crt"))
    both.write_bytes(a + b)
    chain.write_bytes(a + ca)
    before = (folder / "crl.pem").read_bytes()
    refuse(f"{both}: |several", revoke, folder, both)
    assert (folder / "crl.pem").read_bytes() == before
    revoke(folder, chain)
    assert (folder / "crl.pem").read_bytes() != before


@pytest.mark.skipif(os.name != "posix", reason="there are no such modes")
def test_a_folder_that_one_may_not_read(folder: Path) -> None:
    """It is said to be that, and not to be empty."""
    folder.chmod(0)
    was_root = os.geteuid() == 0
    try:
        if was_root:
            os.seteuid(65534)
        refuse("Permission denied", show, folder)
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o700)


@pytest.mark.skipif(os.name != "posix", reason="it is locked in another way")
def test_a_folder_that_cannot_be_locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks the system's word is told, and no file that has no name."""
    error = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(TlsConfigError) as caught:
        issue(folder, "a", hosts=None)
    assert str(caught.value) == error.strerror


def test_show_tells_what_an_operator_asks(folder: Path) -> None:
    """Subject, role, names, algorithm, validity, days left, SHA-256, revoked or not, for a folder and for a file."""
    issue(folder, "gate", hosts=["tunnel.example.org", "192.0.2.1"])
    issue(folder, "laptop", hosts=None)
    revoke(folder, "laptop")
    lines = show(folder).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        str(folder / f"{n}.crt") for n in ("ca", "gate", "laptop")
    ]
    gate = dict(
        line.strip().split(maxsplit=1) for line in show(folder / "gate.crt").splitlines()[1:] if "signed by" not in line
    )
    assert gate["subject"] == "CN=gate"
    assert gate["role"] == "server"
    assert gate["names"] == "tunnel.example.org, 192.0.2.1"
    assert gate["algorithm"] == "mldsa65"
    assert gate["valid"].endswith("396 days left")
    assert gate["sha256"] == load(folder / "gate.crt").fingerprint(hashes.SHA256()).hex()
    assert gate["revoked"] == "no"
    assert "  revoked    YES" in show(folder / "laptop.crt")
    assert "  role       authority" in show(folder / "ca.crt")
    (folder / "crl.pem").unlink()
    assert any("unknown" in line for line in show(folder / "gate.crt").splitlines())


def test_openssl_reads_what_was_written(folder: Path) -> None:
    """Another program reads the certificate and the list; one that knows no ML-DSA tells the names at least."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl command here")
    certificate = issue(folder, "gate", hosts=["tunnel.example.org"])
    command = [openssl, "x509", "-noout", "-text", "-in", str(certificate)]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    assert "DNS:tunnel.example.org" in text
    assert "TLS Web Server Authentication" in text
    command = [openssl, "crl", "-noout", "-text", "-in", str(folder / "crl.pem")]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
    assert "No Revoked Certificates" in text


# --- what was issued ----------------------------------------------------------------------------------------


def revoked(folder: Path) -> set[int]:
    return {entry.serial_number for entry in x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())}


def test_a_renewed_certificate_can_be_revoked(folder: Path) -> None:
    """`revoke NAME` takes all that are valid of that name, also those whose file is gone, and no other's."""
    serials = [load(issue(folder, "alice", hosts=None)).serial_number]
    serials.append(load(issue(folder, "alice", hosts=None, force=True)).serial_number)
    serials.append(load(renew(folder, "alice")).serial_number)
    issue(folder, "bob", hosts=None)
    (folder / "alice.crt").unlink()
    revoke(folder, "alice")
    assert revoked(folder) == set(serials)
    after = load(renew(folder, "alice")).serial_number
    assert after not in revoked(folder)


def test_what_is_over_is_not_revoked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`revoke NAME` leaves the expired ones off the list; with no valid one left it says so."""
    old = load(issue(folder, "alice", hosts=None, days=1)).serial_number
    now = rtunnel_tls._now()
    monkeypatch.setattr(rtunnel_tls, "_now", lambda: now + datetime.timedelta(days=2))
    refuse("nothing that was issued to alice is valid", revoke, folder, "alice")
    new = load(renew(folder, "alice")).serial_number
    revoke(folder, "alice")
    assert revoked(folder) == {new}
    assert old != new


def test_a_file_or_a_serial_is_revoked_alone(folder: Path, tmp_path: Path) -> None:
    """A certificate's file, wherever it lies, and a serial number, on record or not, revoke that one."""
    copy = tmp_path / "copy.crt"
    shutil.copy(issue(folder, "alice", hosts=None), copy)
    kept = load(renew(folder, "alice")).serial_number
    revoke(folder, copy)
    assert revoked(folder) == {load(copy).serial_number}
    revoke(folder, serial="0A:0b")
    assert revoked(folder) == {load(copy).serial_number, 0xA0B}
    assert kept not in revoked(folder)
    bob = load(issue(folder, "bob", hosts=None)).serial_number
    revoke(folder, folder / "bob.crt", serial="c0c")
    assert {bob, 0xC0C} <= revoked(folder)
    for serial in ("", "x", "-1", "0", "f" * 41):
        refuse("--serial", revoke, folder, serial=serial)


def test_the_authority_cannot_be_revoked(folder: Path) -> None:
    """With its own serial number on the list nobody would be admitted."""
    refuse("authority itself", revoke, folder, folder / "ca.crt")
    refuse("authority itself", revoke, folder, serial=f"{load(folder / 'ca.crt').serial_number:x}")
    assert revoked(folder) == set()


def test_a_list_can_be_written_anew(folder: Path) -> None:
    """Without a target `revoke` keeps what is on the list, counts on, and moves its end."""
    issue(folder, "alice", hosts=None)
    revoke(folder, "alice")
    before = revoked(folder)
    revoke(folder)
    crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    assert revoked(folder) == before
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == 3


def test_a_renewal_keeps_all_and_asks_for_nothing(tmp_path: Path) -> None:
    """Role, names with their wildcards, algorithm and days are those of the newest of that name; the key is new."""
    init_authority(tmp_path / "pki")
    hosts = ["tunnel.example.org", "*.example.net", "192.0.2.1", "2001:db8::1"]
    issue(tmp_path / "pki", "gate", hosts=None)
    first = load(issue(tmp_path / "pki", "gate", hosts=hosts, algorithm="mldsa87", days=90, force=True))
    key = (tmp_path / "pki" / "gate.key").read_bytes()
    second = load(renew(tmp_path / "pki", "gate"))
    assert second.serial_number != first.serial_number
    assert (tmp_path / "pki" / "gate.key").read_bytes() != key
    assert [str(name) for name in rtunnel_tls._names(second)] == hosts
    assert rtunnel_tls._roles(second) == ["server"]
    assert rtunnel_tls._algorithm(second.public_key_algorithm_oid) == "mldsa87"
    assert rtunnel_tls.days_left(second.not_valid_after_utc) == 89
    assert second.subject == first.subject
    refuse("has issued nothing to nobody|pki issue", renew, tmp_path / "pki", "nobody")


def test_a_renewal_ends_no_later_than_the_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the authority has less time than the certificate had, the renewal gets what is left."""
    init_authority(tmp_path, years=1)
    issue(tmp_path, "alice", hosts=None, days=300)
    now = rtunnel_tls._now()
    monkeypatch.setattr(rtunnel_tls, "_now", lambda: now + datetime.timedelta(days=200))
    assert rtunnel_tls.days_left(load(renew(tmp_path, "alice")).not_valid_after_utc) in (163, 164)


def test_a_lost_record_is_not_made_afresh(folder: Path) -> None:
    """What has been replaced or taken away is on it alone, and could not be revoked any more: a copy mends it."""
    lost = load(issue(folder, "alice", hosts=None)).serial_number
    renewed = load(renew(folder, "alice")).serial_number
    record = folder / "issued.pem"
    copy = record.read_bytes()
    record.unlink()
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for function, kwargs in ((issue, {"hosts": None, "force": True}), (renew, {}), (revoke, {})):
        refuse(f"{record}: No such file|put a copy of it back", function, folder, "alice", **kwargs)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert "  subject    CN=alice" in show(folder)
    record.write_bytes(copy)
    revoke(folder, "alice")
    assert revoked(folder) == {lost, renewed}


def test_show_tells_of_all_that_was_issued(folder: Path) -> None:
    """Also of what has been replaced or taken away, with whether it is revoked; each certificate once."""
    old = load(issue(folder, "alice", hosts=None)).serial_number
    revoke(folder, "alice")
    new = load(renew(folder, "alice")).serial_number
    moved = load(issue(folder, "bob", hosts=None)).serial_number
    (folder / "bob.crt").unlink()
    lines = show(folder).splitlines()
    serials = [line.split()[1] for line in lines if line.startswith("  serial")]
    assert sorted(serials) == sorted(f"{each:x}" for each in (old, new, moved, load(folder / "ca.crt").serial_number))
    told = dict(zip(serials, (line.split()[1] for line in lines if line.startswith("  revoked")), strict=True))
    assert (told[f"{old:x}"], told[f"{new:x}"], told[f"{moved:x}"]) == ("YES,", "no", "no")


def test_a_broken_record_is_named_and_kept(folder: Path) -> None:
    """A record that cannot be read is not made afresh: what was on it could not be revoked any more."""
    issue(folder, "alice", hosts=None)
    record = folder / "issued.pem"
    for content in (b"", b"x", record.read_bytes()[:-100]):
        record.write_bytes(content)
        refuse(f"{record}|copy", issue, folder, "bob", hosts=None)
        refuse(f"{record}|copy", revoke, folder, "alice")
        assert record.read_bytes() == content


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("broken", ["ca.crt", "ca.key", "crl.pem", "issued.pem"])
def test_one_wrong_byte_in_the_folder_forgets_nothing(folder: Path, broken: str) -> None:
    """Whichever byte of a file is wrong: a command does its work, or is one sentence that names a file.

    What was issued stays on record, and what was revoked on the list, so that the right file mends all.
    """
    issue(folder, "gate", hosts=["localhost"])
    thief = load(issue(folder, "thief", hosts=None)).serial_number
    revoke(folder, "thief")
    good = {file.name: file.read_bytes() for file in folder.iterdir()}
    on_record = set(rtunnel_tls._load_certificates(folder / "issued.pem"))
    commands: tuple[Any, ...] = (
        functools.partial(issue, folder, "new", hosts=None),
        functools.partial(renew, folder, "gate"),
        functools.partial(revoke, folder, "gate"),
        functools.partial(revoke, folder, folder / "gate.crt"),
        functools.partial(show, folder),
    )
    told = []
    for number, content in enumerate(wrong_bytes(good[broken])):
        (folder / broken).write_bytes(content)
        command = commands[number % len(commands)]
        if sentence := refusal(command):
            told.append(sentence)
        elif command.func is not show:
            assert on_record <= set(rtunnel_tls._load_certificates(folder / "issued.pem"))
        if broken != "crl.pem":
            assert thief in revoked(folder)
        for file in folder.iterdir():
            if file.name not in good:
                file.unlink()
        for name, before in good.items():
            (folder / name).write_bytes(before)
    assert len(told) > 50
    assert all(str(folder) in sentence and sentence.isprintable() for sentence in told), told
    assert lib.ERR_peek_error() == 0, "nothing is left for a later call to trip over"


def refusal(command: Any) -> str:
    """Why the command was refused; empty where it was not."""
    try:
        command()
    except TlsConfigError as error:
        return str(error)
    return ""


def wrong_bytes(pem: bytes) -> Iterator[bytes]:
    """The file with one byte changed: of the text, and of what it encodes, densely where its fields are."""
    for at in range(0, len(pem), max(1, len(pem) // 60)):
        yield pem[:at] + bytes([pem[at] ^ 1]) + pem[at + 1 :]
    head, der, tail = (
        pem.partition(b"\n")[0],
        base64.b64decode(pem.split(b"-----")[2]),
        pem.rstrip().rpartition(b"\n")[2],
    )
    for at in [*range(0, min(len(der), 400), 3), *range(400, len(der), 500)]:
        changed = der[:at] + bytes([der[at] ^ (1 << at % 8)]) + der[at + 1 :]
        yield b"\n".join((head, base64.encodebytes(changed).strip(), tail, b""))


def test_another_authority_begins_with_an_empty_record(folder: Path) -> None:
    """`init --force` makes the old certificates void: none of them is on the new record or list."""
    issue(folder, "alice", hosts=None)
    init_authority(folder, force=True)
    refuse("nothing that was issued to alice", revoke, folder, "alice")
    assert rtunnel_tls._load_certificates(folder / "issued.pem") == [load(folder / "ca.crt")]


# --- many commands, full disks, crashes ---------------------------------------------------------------------


def test_commands_at_once_lose_nothing(folder: Path) -> None:
    """Certificates that are issued, and revoked, by many at once are all on record, and all on the list."""
    names = [f"c{number}" for number in range(8)]
    for task in [Task(functools.partial(issue, folder, name, hosts=None)) for name in names]:
        task.result()
    tasks = [Task(revoke, folder, name) for name in names[4:]]
    command = [sys.executable, str(ROOT / "rtunnel.py"), "pki", "revoke", "--dir", str(folder)]
    running = [subprocess.Popen([*command, name], stdout=subprocess.DEVNULL) for name in names[:4]]
    assert [process.wait(30) for process in running] == [0] * 4
    for task in tasks:
        task.result()
    assert revoked(folder) == {load(folder / f"{name}.crt").serial_number for name in names}
    assert len(rtunnel_tls._load_certificates(folder / "issued.pem")) == 9


def test_who_holds_the_folder_makes_the_next_wait(folder: Path) -> None:
    """A command begins when the one before has ended, and a process that dies lets the folder go."""
    script = (
        f"import rtunnel_tls, pathlib, sys\nwith rtunnel_tls._held(pathlib.Path({str(folder)!r})):\n"
        "    print('held', flush=True)\n    sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        task = Task(functools.partial(issue, folder, "alice", hosts=None))
        task.thread.join(0.3)
        assert task.thread.is_alive()
        holder.kill()
        assert task.result() == folder / "alice.crt"


def fits(folder: Path, name: str) -> bool:
    key = rtunnel_tls._load_keys(folder / f"{name}.key")[0]
    return bool(key.public_key() == load(folder / f"{name}.crt").public_key())


STEPS = ("mkdir", "open", "fsync", "rename", "replace", "rmdir")


@pytest.mark.parametrize("number", range(1, 6))
@pytest.mark.parametrize("step", STEPS)
def test_a_crash_at_any_step_leaves_a_pair_or_is_mended(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """Wherever a renewal dies, the next command finds the old pair or makes the new one whole, and nothing is left."""
    issue(folder, "gate", hosts=["localhost"])
    before = load(folder / "gate.crt").serial_number
    count = 0

    class Died(BaseException):
        """As by SIGKILL: nothing that would tidy up runs either."""

    def dying(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count >= number:
                raise Died
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        place: Any = {"open": builtins, "fsync": rtunnel_tls.os}.get(step, Path)
        patched.setattr(place, step, dying(getattr(place, step)))
        patched.setattr(rtunnel_tls.shutil, "rmtree", lambda *_, **__: None)
        with contextlib.suppress(Died):
            renew(folder, "gate")
    revoke(folder)
    assert fits(folder, "gate")
    left = {file.name for file in folder.iterdir()}
    assert left == {".lock", "ca.crt", "ca.key", "crl.pem", "gate.crt", "gate.key", "issued.pem"}
    on_record = {each.serial_number for each in rtunnel_tls._load_certificates(folder / "issued.pem")}
    assert {before, load(folder / "gate.crt").serial_number} <= on_record


@POSIX
@pytest.mark.parametrize("room", [0, 100, 5000, 6000, 12000])
def test_a_disk_that_is_full_keeps_the_old_pair(folder: Path, room: int) -> None:
    """The kernel refuses what goes beyond so many bytes of a file, which is the key, the certificate or the record."""
    issue(folder, "gate", hosts=["localhost"])
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    script = (
        "import resource, rtunnel_tls, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "try:\n"
        f"    rtunnel_tls.renew({str(folder)!r}, 'gate')\n"
        "except rtunnel_tls.TlsConfigError as error:\n"
        "    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20
    )
    assert re.fullmatch(rf"{re.escape(str(folder))}/\S+: File too large\n", done.stdout), done.stdout
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    renew(folder, "gate")
    assert fits(folder, "gate")


def test_a_folder_in_the_way_of_a_certificate(folder: Path) -> None:
    """`--force` replaces no folder: that is said before anything is written, and the next command is not hindered."""
    issue(folder, "gate", hosts=None)
    (folder / "q.crt").mkdir()
    refuse(f"{folder / 'q.crt'} exists|if it is a file", issue, folder, "q", hosts=None, force=True)
    revoke(folder, "gate")
    assert not (folder / "q.key").exists()


def test_a_file_that_cannot_be_replaced_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the way is told by the name that the user knows."""

    def refuses(file: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(file))

    monkeypatch.setattr(Path, "replace", refuses)
    refuse(f"{folder / 'crl.pem'}: Operation not permitted", revoke, folder, serial="1")


def test_an_authority_whose_making_was_cut_short_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its files were made when `init` died: the next command puts them where they belong, and goes on."""
    with monkeypatch.context() as patched:
        patched.setattr(rtunnel_tls, "_settle", lambda _: None)
        init_authority(tmp_path)
    assert not (tmp_path / "ca.crt").exists()
    issue(tmp_path, "alice", hosts=None)
    revoke(tmp_path, "alice")
    assert not (tmp_path / ".ready").exists()


def test_an_authority_that_has_ended_issues_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence says when it ended, also to `renew`, which was asked for no days."""
    end = load(issue(folder, "alice", hosts=None).with_name("ca.crt")).not_valid_after_utc
    monkeypatch.setattr(rtunnel_tls, "_now", lambda: end + datetime.timedelta(days=1))
    refuse(f"the authority ends on {end:%Y-%m-%d}", issue, folder, "bob", hosts=None)
    refuse(f"the authority ends on {end:%Y-%m-%d}", renew, folder, "alice")


def test_a_reload_between_two_files_keeps_what_it_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who loads the pair while it is replaced gets the old one, the new one, or a sentence: never a broken pair."""
    issue(folder, "gate", hosts=["localhost"])
    files = {"cert": folder / "gate.crt", "key": folder / "gate.key", "ca": folder / "ca.crt"}
    seen: list[str] = []
    real = Path.replace

    def watched(self: Path, target: Path) -> Path:
        for _ in range(2):
            try:
                rtunnel_tls.TlsContext("default", **files)  # type: ignore[arg-type]
                seen.append("a pair")
            except TlsConfigError as error:
                seen.append("told" if "copy both files" in str(error) else str(error))
            if len(seen) % 2:
                real(self, target)
        return target

    monkeypatch.setattr(Path, "replace", watched)
    renew(folder, "gate")
    assert set(seen) == {"a pair", "told"}
    assert seen[0] == seen[-1] == "a pair"


# --- what is shown ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bob\n  role       client", "\x1b[2K", "a\u202eb", "a\u2028b", "tab\tcr\r", "\x85"])
def test_show_forges_nothing(tmp_path: Path, name: str) -> None:
    """What a certificate says is escaped: no line feed, no control character, no mark of direction."""
    signer = Signer(name=name)
    file = tmp_path / "x.crt"
    file.write_bytes(signer.certificate.public_bytes(serialization.Encoding.PEM))
    lines = show(file).splitlines()
    assert len(lines) == 11
    assert all(line.isprintable() for line in lines)
    leaf = signer.issue(tmp_path, "leaf", [], subject=name).cert
    refuse("CN=|is no authority", rtunnel_tls.TlsContext, "default", cert=leaf, key=leaf, ca=leaf)


def test_show_of_a_file_with_several_tells_of_each(folder: Path, tmp_path: Path) -> None:
    """As in a ca.crt with two roots."""
    init_authority(tmp_path / "new", name="new")
    both = tmp_path / "both.crt"
    both.write_bytes((folder / "ca.crt").read_bytes() + (tmp_path / "new" / "ca.crt").read_bytes())
    assert [line.split("=")[1] for line in show(both).splitlines() if line.startswith("  subject")] == [
        "rtunnel CA",
        "new",
    ]


def test_the_list_of_a_namesake_is_not_taken(folder: Path, tmp_path: Path) -> None:
    """`show` takes the list of the authority that has signed, not of another one of its name."""
    init_authority(tmp_path / "new")
    issue(folder, "alice", hosts=None)
    revoke(folder, "alice")
    old, new = ((where / "crl.pem").read_bytes() for where in (folder, tmp_path / "new"))
    for content, told in ((old, "YES"), (new, "unknown"), (old + new, "YES"), (new + old, "YES")):
        (folder / "crl.pem").write_bytes(content)
        assert f"  revoked    {told}" in show(folder / "alice.crt")


def test_a_list_that_nobody_has_signed_tells_nothing(folder: Path) -> None:
    """One wrong byte in crl.pem, and `show` does not know who is revoked: by such a list nobody is innocent."""
    serial = load(issue(folder, "alice", hosts=None)).serial_number
    revoke(folder, "alice")
    content = (folder / "crl.pem").read_bytes()
    der = base64.b64decode(content.split(b"-----")[2])
    at = der.index(serial.to_bytes(20, "big"))
    pardoned = base64.encodebytes(der[:at] + bytes([der[at] ^ 1]) + der[at + 1 :])
    (folder / "crl.pem").write_bytes(b"-----BEGIN X509 CRL-----\n" + pardoned + b"-----END X509 CRL-----\n")
    for shown in (folder, folder / "alice.crt"):
        assert [line.split()[1] for line in show(shown).splitlines() if line.startswith("  revoked")][-1] == "unknown,"
    refuse("crl.pem|another authority", revoke, folder)


def test_of_two_lists_the_one_that_revokes_counts(folder: Path) -> None:
    """An older list of the same authority, in front or behind, pardons nobody."""
    issue(folder, "alice", hosts=None)
    old = (folder / "crl.pem").read_bytes()
    new = revoke(folder, "alice").read_bytes()
    for content in (old + new, new + old):
        (folder / "crl.pem").write_bytes(content)
        assert "  revoked    YES" in show(folder / "alice.crt")


def test_show_names_the_file_that_is_broken(folder: Path) -> None:
    """Among many, the operator is told which."""
    issue(folder, "alice", hosts=None)
    (folder / "bob.crt").write_text("no certificate")
    refuse(f"{folder / 'bob.crt'}: it holds no CERTIFICATE", show, folder)


@pytest.mark.parametrize("name", ["anonymous", "Anonymous"])
def test_nobody_is_anonymous(folder: Path, name: str) -> None:
    """Who has no certificate is called so: no certificate is issued to that name."""
    refuse("certificate's name|anonymous", issue, folder, name, hosts=None)


def test_lists_and_certificates_name_the_key(folder: Path) -> None:
    """A leaf carries its own key's identifier and the authority's, as the list does: names alone can be equal."""
    authority = load(folder / "ca.crt").extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    leaf = load(issue(folder, "alice", hosts=None))
    own = leaf.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    assert own == x509.SubjectKeyIdentifier.from_public_key(leaf.public_key())
    for _ in range(2):
        crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        for each in (leaf, crl):
            identifier = each.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
            assert identifier.key_identifier == authority
        revoke(folder, "alice")


# --- the command line ---------------------------------------------------------------------------------------


def test_each_command_says_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The path first, then which file goes where; `revoke` and `renew` name the signal."""
    monkeypatch.chdir(tmp_path)
    for command, file, words in (
        (["init"], "ca.crt", ["ca.crt and crl.pem", "--tls-ca", "ca.key must never"]),
        (["issue", "alice", "--client"], "alice.crt", ["alice.crt and alice.key", "--tls-cert"]),
        (["renew", "alice"], "alice.crt", ["alice.crt and alice.key", "SIGHUP", "serial"]),
        (["revoke", "alice"], "crl.pem", ["crl.pem", "--tls-crl", "SIGHUP"]),
        (["revoke", "--serial", "abc"], "crl.pem", ["SIGHUP"]),
        (["revoke"], "crl.pem", ["SIGHUP"]),
    ):
        assert rtunnel.main(["pki", *command]) == 0
        path, *told = capsys.readouterr().out.splitlines()
        assert path == str(Path("conf/pki", file))
        assert all(word in " ".join(told) for word in words), told
    assert rtunnel.main(["pki", "revoke", "alice", "--serial", "abc"]) == 2


def test_show_is_no_trouble_for_a_terminal_that_knows_ascii_only(tmp_path: Path) -> None:
    """A name beyond the terminal's letters is shown in an escaped form, and is no traceback."""
    file = tmp_path / "x.crt"
    file.write_bytes(Signer(name="Müller").certificate.public_bytes(serialization.Encoding.PEM))
    command = [sys.executable, str(ROOT / "rtunnel.py"), "pki", "show", str(file)]
    for encoding, shown in (("ascii", rb"CN=M\xfcller"), ("utf-8", "CN=Müller".encode())):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, env=environment, check=True, timeout=20)
        assert shown in done.stdout


@pytest.mark.parametrize("program", ["rtunnel", "rtunnel.py"])
def test_advice_names_the_program_that_was_started(tmp_path: Path, program: str) -> None:
    """The command that pip installs is `rtunnel`; a file that is run is `rtunnel.py`."""
    script = ROOT / "rtunnel.py"
    if program == "rtunnel":  # as pip makes it
        script = tmp_path / program
        script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport rtunnel\nsys.exit(rtunnel.main())\n")
    command = [sys.executable, str(script), "pki", "show", str(tmp_path / "none")]
    (tmp_path / "none").mkdir()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert done.returncode == 2
    assert f"by: {program} pki init" in done.stderr
