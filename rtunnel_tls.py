"""Post-quantum mutual TLS for rtunnel, and the certificates for it.

What this module promises
    A peer gets past `TlsTransport.handshake` only if it spoke TLS 1.3, agreed on the keys with ML-KEM (FIPS 203), and
    proved with an ML-DSA key (FIPS 204) that it is who a certificate says: one that an authority of the operator's
    choice has signed, for the role that the peer plays. No option turns a check off, none admits a classical group,
    signature or version. OpenSSL makes the checks during the handshake; afterwards `check_peer` makes them again on
    what was really negotiated. There is no cryptography of our own: OpenSSL, in the wheel of `cryptography`, does it.

OpenSSL's threading rule
    Two threads must never be inside one SSL object at once, not even one that reads and one that writes. pyOpenSSL has
    no lock and lets the GIL go in each call: an SSL object that is shared unlocked passes every test, and corrupts
    memory one day. So structure guards it. `_Ssl` alone touches an SSL object, `TlsTransport` alone holds an `_Ssl`,
    and once a second thread knows the transport, it is called under the one lock only. An `_Ssl` reads and writes
    memory (two BIOs, no socket): the lock is held while OpenSSL computes, never while anything waits.

    Records must leave in the order in which they were made, so only the holder of the writer's turn (which the session
    hands out) takes them and sends them: `send`, `flush`, `finish`. The reader can cause records as well, an alert or
    the answer to a KeyUpdate. It leaves them there and calls `wants_flush`; the session has somebody `flush` then.

Errors
    TlsError
      TlsConfigError    a file, an option or this OpenSSL is not fit, for `pki` too: one sentence, exit status 2
      HandshakeError    no session with this peer; `rule` names what refused it, or is alert, closed, deadline, tls
      TransportError    an open connection has failed
        PeerAlert         the peer says why; in TLS 1.3 it is also how a client learns that it was refused
        TruncatedError    an end of file without close_notify: bytes may be missing
        RecordError       what came is no record of this connection, or breaks the protocol
    A carrier's OSError passes through, but becomes a HandshakeError in the handshake.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import ipaddress
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA87PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from OpenSSL import SSL, crypto
from OpenSSL._util import ffi, lib  # private: only the `_set_…` functions and `_Ssl` use it, and say why

Role = Literal["server", "client"]
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Readable = bytes | bytearray | memoryview
PathLike = str | os.PathLike[str]

# ---- profiles ---------------------------------------------------------------------------------------------------


class Profile(NamedTuple):
    """What a `--tls-profile` admits, most wanted first, in OpenSSL's names."""

    name: str
    groups: tuple[str, ...]  # a client's key share is of the first; a server that lacks it costs a round trip
    signatures: tuple[str, ...]  # of the handshake, and of every key and signature in the certificate chain
    ciphers: tuple[str, ...]


_HYBRID = ("X25519MLKEM768", "SecP384r1MLKEM1024")  # hold as long as one of their halves does
_PURE = ("MLKEM768", "MLKEM1024")  # MLKEM512 has the least margin, and every peer can do better
_CIPHERS = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")

PROFILES: Final = {
    profile.name: profile
    for profile in (
        Profile("default", _HYBRID + _PURE, ("mldsa65", "mldsa87"), _CIPHERS),
        Profile("hybrid", _HYBRID, ("mldsa65", "mldsa87"), _CIPHERS),
        Profile("pure", _PURE, ("mldsa65", "mldsa87", "mldsa44"), _CIPHERS),  # meets the original program
        Profile("cnsa2", ("MLKEM1024",), ("mldsa87",), ("TLS_AES_256_GCM_SHA384",)),  # the NSA's CNSA 2.0
    )
}

# RFC 9881, 2: the same identifier names a kind of key and its signatures, and there are no parameters to compare.
_MLDSA: Final = {
    "2.16.840.1.101.3.4.3.17": "mldsa44",
    "2.16.840.1.101.3.4.3.18": "mldsa65",
    "2.16.840.1.101.3.4.3.19": "mldsa87",
}
_PURPOSES: Final[dict[Role, ObjectIdentifier]] = {
    "server": ExtendedKeyUsageOID.SERVER_AUTH,
    "client": ExtendedKeyUsageOID.CLIENT_AUTH,
}

# ---- limits -----------------------------------------------------------------------------------------------------

VERIFY_DEPTH = 2  # authorities between root and leaf: our own pki has none, a large house has two
MAX_IDENTITY_CHARS = 64  # X.520's bound for a common name; it becomes a key of tables and a word of log lines
WARN_DAYS = 30  # a certificate with so few days left is warned of: time for a month's holiday
ALERT_LINGER_S = 1.0  # after an alert we read on for so long: a close with unread input sends RST and swallows it
HANDSHAKE_BYTES = 16 * 1024  # what an unknown peer costs here; OpenSSL adds its own, up to 130 KiB for a message
INCOMING_BYTES = 256 * 1024  # ciphertext of one receive: 16 records; more gains nothing and leaves the cache
OUTGOING_BYTES = 128 * 1024  # ciphertext of one send; a larger batch gets a buffer of its own
MAX_UNSENT_BYTES = 64 * 1024  # what a peer can make us answer unread: 2,400 KeyUpdates, where 1 is plenty
CLOCK_SKEW = datetime.timedelta(hours=1)  # certificates begin so long before now, for peers whose clock is behind
LEAF_DAYS = 397  # a year and a month to be late; what browsers allowed until 2026
LIST_DAYS = 3650  # an expired revocation list shuts everybody out, and here nobody publishes one every week

# ---- errors -----------------------------------------------------------------------------------------------------


class TlsError(Exception):
    """The root of this module's errors; the tree is in its docstring."""


class TlsConfigError(TlsError):
    """A file, an option or this OpenSSL is not fit for what was asked. The text is one sentence."""


class HandshakeError(TlsError):
    """No session with this peer: `rule: detail`. What of it the peer can influence is not escaped."""

    def __init__(self, rule: str, detail: str) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule = rule


class TransportError(TlsError):
    """An open connection has failed."""


class PeerAlert(TransportError):
    """The peer ended the connection by an alert: `certificate required`, `bad record mac` (RFC 8446, 6.2)."""


class TruncatedError(TransportError):
    """An end of file without close_notify; anybody on the path can cause it."""


class RecordError(TransportError):
    """What came is no record of this connection, or breaks the protocol."""


# What `cryptography` raises for files and certificates that break a standard, or lack what we look for.
_BROKEN: Final = (x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType, x509.ExtensionNotFound)
_UNFIT: Final = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, *_BROKEN)


def _reasons(error: SSL.Error) -> list[str]:
    """OpenSSL's reasons, the first cause first."""
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    return [str(reason) for *_, reason in entries] or [type(error).__name__]


def _alert(error: SSL.Error) -> str | None:
    """The alert that the peer sent, as `unknown ca` in OpenSSL's `tlsv1 alert unknown ca`; None if it sent none."""
    found = (re.fullmatch(r"(?:tls|ssl)\S* alert (.+)", reason) for reason in _reasons(error))
    return next((match[1] for match in found if match), None)


def _failure(error: SSL.Error) -> TransportError:
    if alert := _alert(error):
        return PeerAlert(f"alert from the peer: {alert}")
    if isinstance(error, SSL.WantReadError):  # from a write only
        return RecordError("the peer has sent the first part of a handshake message, and OpenSSL waits for the rest")
    return RecordError("; ".join(_reasons(error)))


# ---- contexts ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TlsContext:
    """The settings of all connections of one role. To reload means to make another: a store only ever adds.

    Threads: any; nothing changes after `make_context`.
    """

    role: Role
    profile: Profile
    peer_name: str | Address | None  # what the server's certificate must name; None in a server's context
    expiries: tuple[tuple[str, datetime.datetime], ...]  # each of our files, and when the first in it ends
    keylog: str | None  # the file that SSLKEYLOGFILE makes us write secrets to: worth a warning
    ssl_context: SSL.Context = dataclasses.field(repr=False)
    revocations: tuple[x509.CertificateRevocationList, ...] = dataclasses.field(repr=False)

    def expiring(self) -> list[tuple[str, datetime.datetime, int]]:
        """File, end and days left of whatever has WARN_DAYS or fewer."""
        return [(file, end, _days_left(end)) for file, end in self.expiries if _days_left(end) <= WARN_DAYS]

    def days_left(self) -> dict[str, int]:
        """Of each of our files."""
        return {file: _days_left(end) for file, end in self.expiries}

    def revokes(self, receipt: Receipt) -> bool:
        """Whether an open session's certificate is revoked here: by issuer and serial, for a name lives on renewed."""
        return any(
            crl.issuer.rfc4514_string() == receipt.issuer
            and crl.get_revoked_certificate_by_serial_number(receipt.serial) is not None
            for crl in self.revocations
        )


def make_context(
    role: Role,
    profile_name: str,
    *,
    cert: PathLike,
    key: PathLike,
    ca: PathLike,
    crl: PathLike | None = None,
    verify_name: str | None = None,
) -> TlsContext:
    """Load and check all that a role needs, so that what can be wrong is told at start. Raises TlsConfigError.

    `cert` holds our certificate and then any authorities below the root, `ca` the roots that a peer's chain may end in,
    `crl` a revocation list of every authority in a chain. `verify_name` is the host or address that the server's
    certificate must name: a client has one, a server None.
    """
    if (role == "client") != (verify_name is not None):
        raise ValueError("a client verifies the server's name, and only a client does")
    if profile_name not in PROFILES:
        raise TlsConfigError(f"--tls-profile {profile_name}: choose one of {', '.join(PROFILES)}")
    profile = PROFILES[profile_name]
    context = _bare_context(profile)
    store = context.get_cert_store()
    assert store is not None, "a context is born with a store"
    peer_name = None
    if verify_name is not None:
        with _told("the server's name"):
            peer_name = parse_name(verify_name)
            _set_peer_name(context, peer_name)
    with _told(f"--tls-ca {ca}", "make an authority by: rtunnel.py pki init"):
        roots = _load_certificates(Path(ca))
        _check_chain(roots, profile)
        for root in roots:
            if not _is_authority(root):
                raise ValueError(f"{root.subject.rfc4514_string()} is no authority")
            store.add_cert(crypto.X509.from_cryptography(root))
    with _told(f"--tls-cert {cert}", f"get another by: rtunnel.py pki issue NAME --{role}"):
        chain = _load_certificates(Path(cert))
        _check_leaf(chain[0], role, profile)  # by the peer's rules, so that what it would refuse is told here
        _check_chain(chain, profile)
        context.use_certificate(chain[0])
        for authority in chain[1:]:
            context.add_extra_chain_cert(authority)
    with _told(f"--tls-key {key}"):
        if _load_key(Path(key)).public_key() != chain[0].public_key():
            raise ValueError(f"it is not the key of --tls-cert {cert}")
        # From its file: pyOpenSSL takes no ML-DSA key from memory. Who could swap the file now could have read it.
        context.use_privatekey_file(str(key))
        context.check_privatekey()
    ends = [(str(file), each.not_valid_after_utc) for file, held in ((cert, chain), (ca, roots)) for each in held]
    revocations: list[x509.CertificateRevocationList] = []
    if crl is not None:
        with _told(f"--tls-crl {crl}", "write a new one by: rtunnel.py pki revoke NAME"):
            revocations = _load_revocations(Path(crl), profile)
            for each in revocations:
                store.add_crl(each)
                ends.append((str(crl), _end(each)))
            store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
    keylog = os.environ.get("SSLKEYLOGFILE") or None
    if keylog is not None:
        _log_secrets(context, keylog)
    expiries = tuple(dict(sorted(ends, reverse=True)).items())  # a file's last counts: of its ends the first
    return TlsContext(role, profile, peer_name, expiries, keylog, context, tuple(revocations))


_MODE_ENABLE_PARTIAL_WRITE, _MODE_NO_AUTO_CHAIN = 0x1, 0x8  # ssl.h; pyOpenSSL has no names for them


def _bare_context(profile: Profile) -> SSL.Context:
    """A context that can do what the profile admits and nothing else, and verifies the peer, whichever role it has."""
    context = SSL.Context(SSL.TLS_METHOD)
    with _told(f"--tls-profile {profile.name}", "it needs: pip install 'cryptography>=49' 'pyOpenSSL>=26.4'"):
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        _set_list(context, "set_groups", "SSL_CTX_set1_curves_list", profile.groups)
        _set_list(context, "set_sigalgs", "SSL_CTX_set1_sigalgs_list", profile.signatures)
        context.set_tls13_ciphersuites(":".join(profile.ciphers).encode())
    # No resumption: each session proves both keys afresh. The option makes tickets stateful, and without a cache they
    # lead nowhere; two small ones still go out, once the client is authenticated.
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # OpenSSL would add the root, which the peer has, and send its 5 to 7 kB to anybody who connects.
    context.set_mode(_MODE_NO_AUTO_CHAIN)
    context.clear_mode(_MODE_ENABLE_PARTIAL_WRITE)  # with it, SSL_write stops after the first of many records
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_verify_depth(VERIFY_DEPTH)
    return context


def _set_list(context: SSL.Context, setter: str, binding: str, names: Sequence[str]) -> None:
    """Admit these groups, or these signature algorithms of the peer and of our own, only: all of them, or SSL.Error.

    pyOpenSSL 26.4 lacks the setters, so OpenSSL's are called. Raises AttributeError where that binding is gone, too.
    """
    own = getattr(context, setter, None)
    wanted = ":".join(names).encode()
    applied = own(wanted) if own else getattr(lib, binding)(context._context, wanted)
    if applied not in (1, None):  # OpenSSL's setters return 1, pyOpenSSL's None, and else raise
        lib.ERR_clear_error()
        version = SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()
        raise SSL.Error([("", "", f"{version} lacks one of {', '.join(names)}")])


def _set_peer_name(context: SSL.Context, name: str | Address) -> None:
    """Hold the peer's subjectAltName, and nothing else, to this name; pyOpenSSL 26.4 cannot. Raises SSL.Error."""
    wanted = lib.SSL_CTX_get0_param(context._context)
    if isinstance(name, str):
        flags = lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
        lib.X509_VERIFY_PARAM_set_hostflags(wanted, flags)
        applied = lib.X509_VERIFY_PARAM_set1_host(wanted, name.encode(), len(name))
    else:
        applied = lib.X509_VERIFY_PARAM_set1_ip(wanted, name.packed, len(name.packed))
    if applied != 1:
        lib.ERR_clear_error()
        raise SSL.Error([("", "", "OpenSSL cannot verify such a name")])


def _load_revocations(file: Path, profile: Profile) -> list[x509.CertificateRevocationList]:
    """OpenSSL checks their signatures in each handshake, and refuses everybody with an expired one."""
    found = re.findall(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", file.read_bytes(), re.DOTALL)
    revocations = [_parse_revocations(pem) for pem in found]
    if not revocations:
        raise ValueError("it holds no revocation list (X509 CRL)")
    for each in revocations:
        _admit("signature", _algorithm(each.signature_algorithm_oid), profile.signatures, profile)
        if _end(each) <= _now():
            raise ValueError(f"it expired on {_iso(_end(each))}, and nobody would be let in")
    return revocations


def _log_secrets(context: SSL.Context, file: str) -> None:
    """Append each connection's secrets to SSLKEYLOGFILE (RFC 9850), with which Wireshark opens a capture."""
    lock = threading.Lock()  # keeps lines whole where appending is two steps (Windows)
    private = functools.partial(os.open, mode=0o600)

    def append(_: SSL.Connection, line: bytes) -> None:
        # OpenSSL calls in the handshake and in KeyUpdates: here alone a file is waited for under a connection's lock.
        # A full disk is no reason to end a session.
        with contextlib.suppress(OSError), lock, open(file, "ab", opener=private) as log:
            log.write(line + b"\n")

    with _told(f"SSLKEYLOGFILE {file}"):
        open(file, "ab", opener=private).close()
    context.set_keylog_callback(append)


@contextlib.contextmanager
def _told(subject: str = "", remedy: str = "") -> Iterator[None]:
    """Whatever is wrong with a file or a setting becomes one sentence: its name, the fault, the remedy."""
    try:
        yield
    except OSError as error:
        detail = f"{error.strerror}" if subject else f"{error.filename}: {error.strerror}"
    except SSL.Error as error:
        detail = _reasons(error)[0]
    except (HandshakeError, AttributeError, *_UNFIT) as error:
        detail = str(error) or type(error).__name__
    else:
        return
    raise TlsConfigError("; ".join(filter(None, (": ".join(filter(None, (subject, detail))), remedy))))


# ---- small readers of names, files and certificates


def parse_name(name: str) -> str | Address:
    """A host or address in the one form that is compared and sent: ASCII, lower case, without a dot at the end.

    Raises ValueError. An IPv4-mapped address becomes IPv4; a zone (`%eth0`) is of this machine only, and goes.
    """
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    host = name.removesuffix(".").encode("idna").decode().lower()  # UnicodeError is a ValueError
    if len(host) > 253 or not re.fullmatch(r"(?!-)[a-z0-9_-]{1,63}(\.(?!-)[a-z0-9_-]{1,63})*", host):
        raise ValueError(f"{name!r} is neither a host name nor an address")
    return host


def _load_certificates(file: Path) -> list[x509.Certificate]:
    """One certificate or more. Raises OSError, ValueError."""
    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except ValueError:
        raise ValueError(f"{file} holds no certificate (PEM), or a broken one") from None


def _parse_revocations(pem: bytes) -> x509.CertificateRevocationList:
    """Raises ValueError."""
    try:
        return x509.load_pem_x509_crl(pem)
    except ValueError:
        raise ValueError("it holds no revocation list (X509 CRL), or a broken one") from None


def _load_key(file: Path) -> Any:
    """A private key that nobody but its owner can read. Raises OSError, ValueError."""
    pem = file.read_bytes()
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ValueError(f"others can read this key; run: chmod 600 {file}")
    if b"ENCRYPTED" in pem:  # OpenSSL would ask for the password on the terminal, and wait
        raise ValueError("the key is encrypted, and rtunnel cannot ask for a password")
    try:
        return serialization.load_pem_private_key(pem, None)
    except ValueError:
        raise ValueError(f"{file} holds no private key (PEM), or a broken one") from None


def _algorithm(identifier: ObjectIdentifier) -> str:
    return _MLDSA.get(identifier.dotted_string, identifier._name)


def _is_authority(certificate: x509.Certificate) -> bool:
    with contextlib.suppress(x509.ExtensionNotFound):
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    return False


def _purposes(certificate: x509.Certificate) -> list[ObjectIdentifier]:
    with contextlib.suppress(x509.ExtensionNotFound):
        return list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    return []


def _names(certificate: x509.Certificate) -> list[str | Address]:
    """Hosts and addresses in subjectAltName; other kinds of names are not for us."""
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = [name for name in names.get_values_for_type(x509.IPAddress) if isinstance(name, Address)]
        return [*(name.lower() for name in names.get_values_for_type(x509.DNSName)), *addresses]
    return []


def _end(revocations: x509.CertificateRevocationList) -> datetime.datetime:
    """When a list ends; one that names no end has ended, for nobody could tell when it grew stale."""
    return revocations.next_update_utc or revocations.last_update_utc


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _iso(moment: datetime.datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _days_left(end: datetime.datetime) -> int:
    """Whole days, rounded down: negative once it is past."""
    return (end - _now()).days


# ---- peer check and receipt -------------------------------------------------------------------------------------


class Receipt(NamedTuple):
    """What is known of a session's peer, and how: a line of the log, and facts for the rest of the program."""

    version: str
    group: str
    cipher: str
    signature: str  # by which the peer proved its key
    identity: str
    issuer: str
    serial: int
    sha256: str  # of the certificate, in hex
    expiry: datetime.datetime

    @property
    def days_left(self) -> int:
        return _days_left(self.expiry)

    def pairs(self) -> dict[str, str]:
        """Keys and values of the log line."""
        shown = {"serial": f"{self.serial:x}", "expiry": _iso(self.expiry), "days_left": str(self.days_left)}
        return self._asdict() | shown


def check_peer(context: TlsContext, version: str, group: str, cipher: str, chain: list[x509.Certificate]) -> Receipt:
    """Judge what a finished handshake came to. The first rule that fails refuses the peer. Raises HandshakeError.

    `chain` is what OpenSSL verified, the peer's certificate first, the root last. Two of the rules are not OpenSSL's:
    it lets a certificate without extended key usage play any role; and it holds only the handshake's own signature to
    the profile, so that an RSA authority in between, which a quantum computer forges, could vouch for an ML-DSA key.
    The others are OpenSSL's too, and stand here so that they do not hang on one call of a private binding.
    """
    profile = context.profile
    _admit("version", version, ["TLSv1.3"], profile)
    _admit("group", group, profile.groups, profile)
    _admit("cipher", cipher, profile.ciphers, profile)
    if not chain:
        raise HandshakeError("certificate", "the peer has shown none")
    leaf = chain[0]
    identity = _check_leaf(leaf, "client" if context.role == "server" else "server", profile)
    _check_chain(chain, profile)
    if context.peer_name is not None and not any(_matches(name, context.peer_name) for name in _names(leaf)):
        raise HandshakeError("name", f"the certificate does not name {context.peer_name}")
    signature = _algorithm(leaf.public_key_algorithm_oid)  # an ML-DSA key signs in one way
    issuer, serial, sha256 = leaf.issuer.rfc4514_string(), leaf.serial_number, leaf.fingerprint(hashes.SHA256()).hex()
    return Receipt(version, group, cipher, signature, identity, issuer, serial, sha256, leaf.not_valid_after_utc)


def _admit(rule: str, value: str, admitted: Sequence[str], profile: Profile) -> None:
    if value.casefold() not in (name.casefold() for name in admitted):
        raise HandshakeError(rule, f"{value} is not in profile {profile.name}")


def _check_leaf(leaf: x509.Certificate, role: Role, profile: Profile) -> str:
    """The identity that a certificate gives to who plays `role`. Raises HandshakeError."""
    _admit("key", _algorithm(leaf.public_key_algorithm_oid), profile.signatures, profile)
    if _PURPOSES[role] not in _purposes(leaf):  # `any purpose` is none: nothing says that a client may be a server
        raise HandshakeError("purpose", f"the certificate is not for a {role}")
    names = [str(name.value) for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or not re.fullmatch(rf"[ -~]{{1,{MAX_IDENTITY_CHARS}}}", names[0]):
        raise HandshakeError("identity", f"not one common name of 1 to {MAX_IDENTITY_CHARS} printable ASCII characters")
    return names[0]


def _check_chain(chain: Sequence[x509.Certificate], profile: Profile) -> None:
    """Hold every signature to the profile, and every certificate to the time. Raises HandshakeError."""
    for certificate in chain:  # the root's of itself proves nothing, but tells the kind of key that made the next
        _admit("signature", _algorithm(certificate.signature_algorithm_oid), profile.signatures, profile)
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if not begin <= _now() <= end:
            name = certificate.subject.rfc4514_string()
            raise HandshakeError("validity", f"{name} is valid from {_iso(begin)} to {_iso(end)} only")


def _matches(pattern: str | Address, name: str | Address) -> bool:
    """RFC 9525, 6.3: the same name, or `*` for the first label of a name that has at least three."""
    if isinstance(pattern, str) and isinstance(name, str) and pattern.startswith("*."):
        return name.partition(".")[2] == pattern[2:] and "." in pattern[2:]
    return pattern == name


# Words in what OpenSSL says when it ends a handshake, and the rule behind them; the first that fits is told.
_RULES: Final = {
    "validity": ("expired", "not yet valid"),
    "name": ("name mismatch", "address mismatch"),
    "purpose": ("purpose",),
    "revoked": ("revoked",),
    "authority": ("issuer certificate", "self-signed"),
    "tls": ("wrong version number",),  # of a record: this is no TLS at all
    "version": ("protocol", "version"),
    "group": ("key share", "group"),
    "signature": ("signature",),
    "certificate": ("certificate",),
}


def _refusal(error: SSL.Error, objection: str) -> HandshakeError:
    """Why OpenSSL ended a handshake, by the rule's name: for messages only, nothing is decided by it."""
    if alert := _alert(error):
        return HandshakeError("alert", f"refused by the peer: {alert}")
    detail = objection or "; ".join(_reasons(error))
    rules = (rule for rule, words in _RULES.items() if any(word in detail for word in words))
    return HandshakeError(next(rules, "certificate" if objection else "tls"), detail)


# ---- TLS transport ----------------------------------------------------------------------------------------------


class Carrier(Protocol):
    """The plain transport below. All but `set_timeout` raise OSError when the connection has failed."""

    @property
    def peer(self) -> str: ...  # `203.0.113.7:51234`, for messages
    def receive_into(self, buffer: memoryview) -> int: ...  # waits; 0 at the end of file
    def send(self, data: Readable) -> None: ...  # all of it; waits
    def set_timeout(self, seconds: float | None) -> None: ...  # of each wait: TimeoutError. In the handshake only
    def limit_write(self, seconds: float) -> None: ...  # a `send` that makes no progress for so long fails
    def finish(self) -> None: ...  # no more comes: SHUT_WR
    def shutdown(self) -> None: ...  # both directions end, and whoever waits wakes
    def close(self) -> None: ...


class _Ssl:
    """An SSL object between two memory BIOs. Nothing here waits.

    Threads: one at a time, which the caller sees to.
    The calls that move bytes go to OpenSSL directly, because pyOpenSSL's own allocate, copy and raise once or twice for
    each record and take 2.2 times as long. The length that each is given is that of the buffer that it is given.
    """

    def __init__(self, context: TlsContext) -> None:
        self._connection = SSL.Connection(context.ssl_context, None)
        if context.role == "server":
            self._connection.set_accept_state()
            return
        self._connection.set_connect_state()
        if isinstance(context.peer_name, str):  # RFC 6066, 3: an address is no server name
            self._connection.set_tlsext_host_name(context.peer_name.encode())

    def handshake(self) -> bool:
        """True when it is done, False where OpenSSL needs more from the peer. Raises SSL.Error."""
        try:
            self._connection.do_handshake()
        except SSL.WantReadError:
            return False
        return True

    def negotiated(self) -> tuple[str, str, str, list[x509.Certificate]]:
        """Version, group, cipher and verified chain, as `check_peer` takes them."""
        version, group = self._connection.get_protocol_version_name(), self._connection.get_group_name()
        chain = self._connection.get_verified_chain(as_cryptography=True)
        return version, group or "none", self._connection.get_cipher_name() or "none", chain or []

    def objection(self) -> str:
        """What OpenSSL has against the peer's certificate, or nothing: for messages, pyOpenSSL 26.4 has no getter."""
        code = lib.SSL_get_verify_result(self._connection._ssl)
        return ffi.string(lib.X509_verify_cert_error_string(code)).decode() if code else ""

    def feed(self, records: memoryview) -> None:
        """Take bytes from the peer, all of them."""
        if lib.BIO_write(self._connection._into_ssl, ffi.from_buffer(records), len(records)) != len(records):
            raise MemoryError("OpenSSL could not take the peer's bytes")

    def read_into(self, view: memoryview) -> int:
        """Plaintext of one record at most; 0 where OpenSSL needs more from the peer. Raises SSL.Error."""
        ssl = self._connection._ssl
        count: int = lib.SSL_read(ssl, ffi.from_buffer(view, require_writable=True), len(view))
        if count > 0:
            return count
        if lib.SSL_get_error(ssl, count) == lib.SSL_ERROR_WANT_READ:
            return 0
        self._connection._raise_ssl_error(ssl, count)
        raise SSL.Error([("", "", "SSL_read failed")])

    def write(self, plaintext: Readable) -> None:
        """Encrypt all of it. Raises SSL.Error, WantReadError too: the peer has sent a part of a handshake message
        (RFC 8446, 4.6), and OpenSSL will not write before the rest is there. No honest peer stops in between."""
        ssl = self._connection._ssl
        count = lib.SSL_write(ssl, ffi.from_buffer(plaintext), len(plaintext))
        if count != len(plaintext):
            self._connection._raise_ssl_error(ssl, count)
            raise SSL.Error([("", "", "SSL_write was cut short")])

    def close_notify(self) -> None:
        """Make the alert that says that no more comes. Raises SSL.Error after a failure."""
        self._connection.shutdown()

    def unsent(self) -> int:
        """Bytes of records that wait to be taken."""
        waiting: int = lib.BIO_get_mem_data(self._connection._from_ssl, ffi.NULL)
        return waiting

    def take(self, spare: memoryview) -> memoryview:
        """All records that wait; in `spare` where they fit, so valid until that is used again."""
        count = self.unsent()
        buffer = spare if count <= len(spare) else memoryview(bytearray(count))
        if count and lib.BIO_read(self._connection._from_ssl, ffi.from_buffer(buffer), count) != count:
            raise MemoryError("OpenSSL could not give its records")
        return buffer[:count]


class TlsTransport:
    """What a session reads and writes: an open TLS connection whose peer has passed.

    Threads: `receive_into` from the session reader; `send`, `flush` and `finish` from the holder of the writer's turn;
    `shutdown` from any; `close` from the reader, after all others have left.
    Locking: `_lock` guards `_ssl`; it is held while OpenSSL computes, never while anything waits.
    Invariant: where the lock is free, the records that wait in `_ssl` are such as reading has caused, for a writer
    takes all in the step that makes them; and it sends them before anybody takes more, for it has the turn.
    """

    def __init__(self, carrier: Carrier, ssl: _Ssl, receipt: Receipt) -> None:
        """By `handshake` only."""
        self.peer = carrier.peer
        self.receipt = receipt
        self.identity = receipt.identity
        self.wants_flush: Callable[[], None] = lambda: None  # the session's; the reader calls it, without the lock
        self._carrier = carrier
        # the reader's
        self._incoming = memoryview(bytearray(INCOMING_BYTES))
        self._silent = True  # no plaintext has come yet
        self._drained = False  # OpenSSL has said that it needs more from the peer
        self._closed = False  # close_notify has come
        self._failed: TransportError | None = None
        # the turn's holder's
        self._outgoing = memoryview(bytearray(OUTGOING_BYTES))
        self._lock = threading.Lock()
        # guarded by _lock
        self._ssl = ssl

    @classmethod
    def handshake(cls, carrier: Carrier, context: TlsContext, remaining: Callable[[], float]) -> TlsTransport:
        """Shake hands and check the peer, in the connection's own thread. `remaining` tells the seconds left.

        Raises HandshakeError, once the peer could read our alert. The caller closes the carrier.
        """
        ssl = _Ssl(context)
        try:
            _exchange(carrier, ssl, remaining)
            # Our last flight is still in `ssl`: a client shows its certificate to no server that does not pass.
            try:
                receipt = check_peer(context, *ssl.negotiated())
            except _UNFIT as error:
                raise HandshakeError("certificate", f"it cannot be read: {error}") from error
            transport = cls(carrier, ssl, receipt)
            _limit_waits(carrier, remaining())
            transport.flush()
            carrier.set_timeout(None)
            return transport
        except SSL.Error as error:
            _leave(carrier, ssl.take(memoryview(b"")))
            raise _refusal(error, ssl.objection()) from error
        except HandshakeError:
            _leave(carrier, b"")
            raise
        except TimeoutError:
            raise HandshakeError("deadline", "the peer took too long") from None
        except OSError as error:
            raise HandshakeError("closed", f"the connection failed: {error.strerror or error}") from error

    def receive_into(self, view: memoryview) -> int:
        """Wait for plaintext and put all that is there into `view`, which must have room for some.

        Returns 0 when the peer has said that no more comes. Raises TransportError or the carrier's OSError, once all
        that came before has been handed out.
        """
        received = 0
        while True:
            count = unsent = 0
            if received or not self._drained:
                with self._lock:
                    if received:
                        self._ssl.feed(self._incoming[:received])
                    count = self._read_locked(view)
                    unsent = self._ssl.unsent()
            if unsent:
                self.wants_flush()
            if unsent > MAX_UNSENT_BYTES and not self._failed:
                self._failed = RecordError("the peer makes us answer, and faster than it takes the answers")
            if count:
                self._silent = False
                return count
            if self._closed:
                return 0
            if self._failed:
                raise self._failed
            received = self._carrier.receive_into(self._incoming)
            if not received:
                why = "closed by peer after the handshake" if self._silent else "truncated: ended without close_notify"
                raise TruncatedError(why)

    def _read_locked(self, view: memoryview) -> int:
        """Decrypt until `view` is full or OpenSSL needs more; what ends the connection is kept for later."""
        assert self._lock.locked()
        count = 0
        self._drained = False
        try:
            while count < len(view) and not self._closed and not self._failed:
                got = self._ssl.read_into(view[count:])
                if not got:
                    self._drained = True
                    break
                count += got
        except SSL.ZeroReturnError:
            self._closed = True
        except SSL.Error as error:
            self._failed = _failure(error)
        return count

    def send(self, frames: Readable) -> None:
        """Encrypt and send all. Raises TransportError or the carrier's OSError; nothing can be sent after that."""
        try:
            with self._lock:
                if frames:
                    self._ssl.write(frames)
                records = self._ssl.take(self._outgoing)
        except SSL.Error as error:
            raise _failure(error) from error
        if records:
            self._carrier.send(records)

    def flush(self) -> None:
        """Send what TLS itself has to say, if anything. Raises the carrier's OSError."""
        self.send(b"")

    def finish(self) -> None:
        """Say that no more comes: close_notify, then SHUT_WR. Raises the carrier's OSError."""
        with self._lock:
            # After a failure OpenSSL makes none, which would vouch for a stream that was cut; an alert goes out.
            with contextlib.suppress(SSL.Error):
                self._ssl.close_notify()
            records = self._ssl.take(self._outgoing)
        if records:
            self._carrier.send(records)
        self._carrier.finish()

    def limit_write(self, seconds: float) -> None:
        self._carrier.limit_write(seconds)

    def shutdown(self) -> None:
        self._carrier.shutdown()

    def close(self) -> None:
        self._carrier.close()


def _exchange(carrier: Carrier, ssl: _Ssl, remaining: Callable[[], float]) -> None:
    """Carry the flights of a handshake but our last one. Raises SSL.Error, HandshakeError, OSError."""
    buffer = memoryview(bytearray(HANDSHAKE_BYTES))
    while not ssl.handshake():
        _limit_waits(carrier, remaining())
        if records := ssl.take(buffer):
            carrier.send(records)
        _limit_waits(carrier, remaining())
        count = carrier.receive_into(buffer)
        if not count:
            raise HandshakeError("closed", "the peer closed the connection in the handshake")
        ssl.feed(buffer[:count])


def _limit_waits(carrier: Carrier, seconds: float) -> None:
    """Raises TimeoutError where no time is left, for a timeout of 0 would mean not to wait."""
    if seconds <= 0:
        raise TimeoutError
    carrier.set_timeout(seconds)


def _leave(carrier: Carrier, alert: Readable) -> None:
    """Send our alert and give the peer time to read it. Where `check_peer` refused there is none, only a close."""
    end = time.monotonic() + ALERT_LINGER_S
    discarded = memoryview(bytearray(HANDSHAKE_BYTES))
    with contextlib.suppress(OSError):  # the peer may be gone; we leave anyway
        carrier.set_timeout(ALERT_LINGER_S)
        if alert:
            carrier.send(alert)
        carrier.finish()
        while (left := end - time.monotonic()) > 0:
            carrier.set_timeout(left)
            if not carrier.receive_into(discarded):
                break


# ---- certificate authority --------------------------------------------------------------------------------------
#
# A folder with ca.crt, ca.key, crl.pem and, for each NAME, NAME.crt and NAME.key. Who has ca.key can be anybody: the
# folder stays on one machine, and the others get ca.crt, crl.pem and their own pair.

ALGORITHMS: Final = {"mldsa65": MLDSA65PrivateKey.generate, "mldsa87": MLDSA87PrivateKey.generate}
_NAME_IN_PATH = r"(?!(?i:ca)$)[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # it stays in the folder, and is never the authority's
_RESTORE = "put a copy of the list back, for a new one would pardon whoever was on it"


@_told()
def init_authority(
    folder: PathLike, *, algorithm: str = "mldsa65", name: str = "rtunnel CA", years: int = 10, force: bool = False
) -> Path:
    """Make an authority and its empty revocation list; returns ca.crt. Raises TlsConfigError.

    With `force` it replaces another, whose certificates are void from then on.
    """
    where = Path(folder)
    most = datetime.MAXYEAR - _now().year
    if not 1 <= years <= most:
        raise ValueError(f"--years: 1 to {most}, for no certificate can end after the year {datetime.MAXYEAR}")
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    if os.name == "posix" and stat.S_IMODE(where.stat().st_mode) & 0o022:
        raise ValueError(f"others can write to {where}, and swap what is in it; run: chmod 700 {where}")
    _refuse_overwrite(where, ("ca.crt", "ca.key", "crl.pem"), force)
    key, subject = _generate(algorithm), _common_name(name)
    builder = _builder(subject, subject, key, 365 * years)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(for_authority=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    _write_pair(where, "ca", key, builder.sign(key, None))
    _write_revocations(where / "crl.pem", subject, key, 1, ())
    return where / "ca.crt"


@_told()
def issue(
    folder: PathLike,
    name: str,
    *,
    hosts: Sequence[str] | None,
    days: int = LEAF_DAYS,
    algorithm: str | None = None,
    force: bool = False,
) -> Path:
    """Issue NAME.crt and NAME.key: for a server that is dialled by one of `hosts`, or for a client (None).

    Returns NAME.crt. The algorithm is the authority's where none is given. With `force` a new pair replaces the old
    one, which stays valid until it ends: revoke it first if it has leaked. Raises TlsConfigError.
    """
    where = Path(folder)
    _check_name(name)
    _refuse_overwrite(where, (f"{name}.crt", f"{name}.key"), force)
    authority, authority_key = _load_authority(where)
    longest = _days_left(authority.not_valid_after_utc)
    if not 1 <= days <= longest:
        raise ValueError(f"--days: 1 to {longest}, for then the authority itself ends")
    key = _generate(algorithm or _algorithm(authority.public_key_algorithm_oid))
    purpose = _PURPOSES["client" if hosts is None else "server"]
    issuer_id = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id)
    # Nothing that no peer looks at: a server sends this to whoever connects, and all that it sends before it knows
    # the client should fit into the ten segments that TCP starts with.
    builder = _builder(_common_name(name), authority.subject, key, days)
    builder = builder.add_extension(_key_usage(for_authority=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
    builder = builder.add_extension(issuer, critical=False)
    if hosts is not None:
        if not hosts:
            raise ValueError("--server: name the hosts or addresses that clients dial")
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    _write_pair(where, name, key, builder.sign(authority_key, None))
    return where / f"{name}.crt"


@_told()
def revoke(folder: PathLike, name: str) -> Path:
    """Add NAME.crt to crl.pem, which is then valid for another LIST_DAYS; returns it. Raises TlsConfigError."""
    where, file = Path(folder), Path(folder, "crl.pem")
    _check_name(name)
    certificate = _load_certificates(where / f"{name}.crt")[0]
    authority, authority_key = _load_authority(where)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature):
        raise ValueError(f"{name}.crt is of another authority, which alone can revoke it") from None
    with _told(str(file), _RESTORE):
        revocations = _parse_revocations(file.read_bytes())
        number = revocations.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    entries = list(revocations)
    if revocations.get_revoked_certificate_by_serial_number(certificate.serial_number) is None:
        entries.append(x509.RevokedCertificateBuilder(certificate.serial_number, _now()).build())
    _write_revocations(file, authority.subject, authority_key, number + 1, entries)
    return file


@_told()
def show(target: PathLike) -> list[str]:
    """Lines about each certificate in a folder or a file, by the revocation list beside it. Raises TlsConfigError."""
    path = Path(target)
    files = sorted(path.glob("*.crt")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no certificate (*.crt); make an authority by: rtunnel.py pki init")
    listed = files[0].with_name("crl.pem")
    with _told(str(listed), _RESTORE):
        revocations = _parse_revocations(listed.read_bytes()) if listed.exists() else None
    return [line for file in files for line in _lines(file, revocations)]


def _lines(file: Path, revocations: x509.CertificateRevocationList | None) -> list[str]:
    certificate = _load_certificates(file)[0]
    roles = [role for role, purpose in _PURPOSES.items() if purpose in _purposes(certificate)]
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    revoked = "unknown, for there is no list of its issuer"
    if revocations is not None and revocations.issuer == certificate.issuer:
        entry = revocations.get_revoked_certificate_by_serial_number(certificate.serial_number)
        revoked = f"YES, on {_iso(entry.revocation_date_utc)}" if entry else "no"
    facts = {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "role": " and ".join(roles) or ("authority" if _is_authority(certificate) else "none"),
        "names": ", ".join(map(str, _names(certificate))) or "none",
        "algorithm": _algorithm(certificate.public_key_algorithm_oid),
        "signed by": _algorithm(certificate.signature_algorithm_oid),
        "valid": f"{_iso(begin)} to {_iso(end)}, {_days_left(end)} days left",
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
        "revoked": revoked,
    }
    return [str(file), *(f"  {key:<11}{value}" for key, value in facts.items())]


def _load_authority(folder: Path) -> tuple[x509.Certificate, Any]:
    certificate = _load_certificates(folder / "ca.crt")[0]
    key = _load_key(folder / "ca.key")
    if key.public_key() != certificate.public_key():
        raise ValueError(f"{folder / 'ca.key'} is not the key of {folder / 'ca.crt'}")
    return certificate, key


def _check_name(name: str) -> None:
    if not re.fullmatch(_NAME_IN_PATH, name):
        raise ValueError(f"{name!r} cannot be a certificate's name: letters, digits and . _ - only, and not ca")


def _refuse_overwrite(folder: Path, names: Iterable[str], force: bool) -> None:
    for name in names:
        if not force and (folder / name).exists():
            raise ValueError(f"{folder / name} exists; --force replaces it")


def _generate(algorithm: str) -> Any:
    if algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {algorithm}: choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm]()


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    """A subjectAltName; `*.` may stand for one label. Raises ValueError."""
    wildcard = "*." if host.startswith("*.") else ""
    name = parse_name(host.removeprefix("*."))
    if isinstance(name, str):
        return x509.DNSName(wildcard + name)
    if wildcard:
        raise ValueError(f"{host!r}: no wildcard can stand in an address; name each address by itself")
    return x509.IPAddress(name)


def _key_usage(*, for_authority: bool) -> x509.KeyUsage:
    """An authority's key signs certificates and revocation lists; any other signs handshakes."""
    others = (False, False, False, False)
    return x509.KeyUsage(not for_authority, *others, for_authority, for_authority, False, False)


def _builder(subject: x509.Name, issuer: x509.Name, key: Any, days: int) -> x509.CertificateBuilder:
    begin, end, serial = _now() - CLOCK_SKEW, _now() + datetime.timedelta(days=days), x509.random_serial_number()
    return x509.CertificateBuilder(issuer, subject, key.public_key(), serial, begin, end)


def _write_pair(folder: Path, name: str, key: Any, certificate: x509.Certificate) -> None:
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    _write(folder / f"{name}.key", pem, 0o600)
    _write(folder / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _write_revocations(
    file: Path, issuer: x509.Name, key: Any, number: int, entries: Iterable[x509.RevokedCertificate]
) -> None:
    begin, end = _now() - CLOCK_SKEW, _now() + datetime.timedelta(days=LIST_DAYS)
    builder = x509.CertificateRevocationListBuilder(issuer, begin, end, revoked_certificates=list(entries))
    revocations = builder.add_extension(x509.CRLNumber(number), critical=False).sign(key, None)
    _write(file, revocations.public_bytes(serialization.Encoding.PEM), 0o644)


def _write(file: Path, content: bytes, mode: int) -> None:
    """Write a whole file or none: into a new one beside it, to the disk, then renamed over what was there."""
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    try:  # the mode holds from the first byte; Windows has none, and there the folder's own rights protect a key
        with open(temporary, "xb", opener=functools.partial(os.open, mode=mode)) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
