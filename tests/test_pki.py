"""The certificate authority: what it writes, and that nothing is lost or left readable."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID
from tls_peers import House, session

import rtunnel_tls
from rtunnel_tls import TlsConfigError, init_authority, issue, revoke, show

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
    with pytest.raises(rtunnel_tls.TlsError), session(house.server(crl=house.crl), house.client(crl=house.crl)):
        pytest.fail("a revoked client came in")
    assert "revoked    YES, on 2" in "\n".join(show(house.folder / "client.crt"))


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
            assert mode(file) == (0o600 if file.suffix == ".key" else 0o644), file
    assert sorted(file.name for file in (folder.parent / "lax").iterdir()) == [
        "ca.crt",
        "ca.key",
        "crl.pem",
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
    assert len(list(extensions)) == 4
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
    refuse("certificate's name", revoke, folder, name)
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
    ],
)
def test_what_cannot_be_issued_is_one_sentence(folder: Path, words: str, given: dict[str, object]) -> None:
    """A wrong validity, algorithm, host or wildcard is told in one sentence, and nothing is written."""
    before = sorted(folder.iterdir())
    refuse(words, issue, folder, "x", **given)
    assert sorted(folder.iterdir()) == before


def test_a_server_needs_a_name(folder: Path) -> None:
    """A server's certificate without a host could be dialled by nobody."""
    refuse("host", issue, folder, "x", hosts=[])


def test_an_authority_is_needed(tmp_path: Path) -> None:
    """Without one, the missing file is named."""
    for function, kwargs in ((issue, {"hosts": None}), (revoke, {})):
        refuse("No such file", function, tmp_path, "x", **kwargs)
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
    longest = rtunnel_tls._days_left(authority.not_valid_after_utc)
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
    assert rtunnel_tls._days_left(rtunnel_tls._end(crl)) >= 3649


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
    unnumbered = builder.sign(rtunnel_tls._load_key(folder / "ca.key"), None).public_bytes(serialization.Encoding.PEM)
    half = file.read_bytes()[:1000] + b"\n-----END X509 CRL-----\n"
    content = {"nothing": b"", "half": half, "text": b"x", "unnumbered": unnumbered}[broken]
    file.write_bytes(content)
    refuse(f"{file}: |copy", revoke, folder, "a")
    if broken != "unnumbered":  # which tells who is revoked, but not where to count on
        refuse(f"{file}: it holds no|copy", show, folder)
    assert file.read_bytes() == content


def test_a_certificate_of_another_authority_cannot_be_revoked(folder: Path, tmp_path: Path) -> None:
    """Its own authority has to do it."""
    init_authority(tmp_path / "other")
    issue(tmp_path / "other", "x", hosts=None)
    shutil.copy(tmp_path / "other" / "x.crt", folder / "x.crt")
    refuse("authority", revoke, folder, "x")


def test_show_tells_what_an_operator_asks(folder: Path) -> None:
    """Subject, role, names, algorithm, validity, days left, SHA-256, revoked or not, for a folder and for a file."""
    issue(folder, "gate", hosts=["tunnel.example.org", "192.0.2.1"])
    issue(folder, "laptop", hosts=None)
    revoke(folder, "laptop")
    lines = show(folder)
    assert [line for line in lines if not line.startswith(" ")] == [
        str(folder / f"{n}.crt") for n in ("ca", "gate", "laptop")
    ]
    gate = dict(line.strip().split(maxsplit=1) for line in show(folder / "gate.crt")[1:] if "signed by" not in line)
    assert gate["subject"] == "CN=gate"
    assert gate["role"] == "server"
    assert gate["names"] == "tunnel.example.org, 192.0.2.1"
    assert gate["algorithm"] == "mldsa65"
    assert gate["valid"].endswith("396 days left")
    assert gate["sha256"] == load(folder / "gate.crt").fingerprint(hashes.SHA256()).hex()
    assert gate["revoked"] == "no"
    assert "  revoked    YES" in "\n".join(show(folder / "laptop.crt"))
    assert "  role       authority" in show(folder / "ca.crt")
    (folder / "crl.pem").unlink()
    assert any("unknown" in line for line in show(folder / "gate.crt"))


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
