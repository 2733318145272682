"""Post-quantum mutual TLS for rtunnel, and the certificates for it.

What this module promises
    A peer gets past `TlsTransport.handshake` only if it spoke TLS 1.3, agreed on the keys with
    ML-KEM (FIPS 203), and proved with an ML-DSA key (FIPS 204) that it is who a certificate says:
    one that an authority of the operator's choice has signed, for the role that the peer plays. No
    option turns a check off, none admits a classical group, signature or version. OpenSSL, in the
    wheel of `cryptography`, does all cryptography, and makes the checks in the handshake;
    `check_peer` makes them again on what was really negotiated.

OpenSSL's threading rule
    Two threads must never be inside one SSL object at once, not even one that reads and one that
    writes. pyOpenSSL has no lock and lets the GIL go in each call: an SSL object that is shared
    unlocked passes every test, and corrupts memory one day. So `_Ssl` alone touches an SSL object,
    `TlsTransport` alone holds an `_Ssl`, and calls it, after the handshake, under its one lock.

Errors
    TlsConfigError (of which NotYetValid is one), HandshakeError, TransportError. A carrier's
    OSError passes through, but becomes a HandshakeError in the handshake.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import ipaddress
import os
import re
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA87PrivateKey
from cryptography.x509 import Certificate, CertificateRevocationList
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from OpenSSL import SSL, crypto
from OpenSSL._util import ffi, lib  # private: for `_bare_context` and `_Ssl`

Name = str | ipaddress.IPv4Address | ipaddress.IPv6Address  # of a server
Readable = bytes | bytearray | memoryview
PathLike = str | os.PathLike[str]
PROGRAM = "rtunnel.py" if Path(sys.argv[0]).name == "rtunnel.py" else "rtunnel"  # what to type

# ---- profiles and limits -----------------------------------------------------------------------


class Profile(NamedTuple):
    """What a `--tls-profile` admits, most wanted first, in OpenSSL's names."""

    name: str
    groups: tuple[str, ...]  # a client's key share is of the first
    signatures: tuple[str, ...]  # of the handshake, and of all keys and signatures in the chain
    ciphers: tuple[str, ...]
    pki_option: str = ""  # without which `pki` makes what the profile does not admit

    def admit(self, rule: str, value: str, admitted: Sequence[str]) -> None:
        if value.casefold() not in (name.casefold() for name in admitted):
            raise HandshakeError(rule, f"{value} is not in profile {self.name}")


_HYBRID = ("X25519MLKEM768", "SecP384r1MLKEM1024")  # hold as long as one of their halves does
_PURE = ("MLKEM768", "MLKEM1024")  # MLKEM512 has the least margin, and every peer can do better
_CIPHERS = ("TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256")
PROFILES: Final = {
    "default": Profile("default", _HYBRID + _PURE, ("mldsa65", "mldsa87"), _CIPHERS),
    "hybrid": Profile("hybrid", _HYBRID, ("mldsa65", "mldsa87"), _CIPHERS),
    "pure": Profile("pure", _PURE, ("mldsa65", "mldsa87", "mldsa44"), _CIPHERS),  # as the original
    "cnsa2": Profile("cnsa2", ("MLKEM1024",), ("mldsa87",), _CIPHERS[:1], " --algorithm mldsa87"),
}
_PURPOSES: Final = {"server": ExtendedKeyUsageOID.SERVER_AUTH, "client": ExtendedKeyUsageOID.CLIENT_AUTH}

VERIFY_DEPTH = 4  # authorities between root and leaf: our own pki has none, a large house has two
MAX_IDENTITY_CHARS = 64  # X.520's bound for a common name; it becomes a word of log lines
NO_IDENTITY = "anonymous"  # what who has no certificate is called: no certificate may say it
MAX_NAMES_TOLD = 8  # of a certificate that names other hosts than ours: it may hold thousands
WARN_DAYS = 30  # a certificate with so few days left is warned of: time for a month's holiday
ALERT_LINGER_S = 1.0  # we read on so long after an alert: a close with unread input would lose it
HANDSHAKE_BYTES = 16 * 1024  # what an unknown peer costs here; OpenSSL adds 130 KiB to 1.4 MB
MAX_HANDSHAKE_BYTES = 56 * 1024  # of a peer: six certificates of ML-DSA-87 and the rest are 52 KiB
MAX_CHAIN_BYTES = 48 * 1024  # of that
INCOMING_BYTES = 256 * 1024  # ciphertext of one receive: 16 records; more leaves the cache
OUTGOING_BYTES = 128 * 1024  # ciphertext of one send; a larger batch gets a buffer of its own
MAX_UNSENT_BYTES = 64 * 1024  # answers that a peer makes us owe: 2,400 KeyUpdates, 1 is plenty
CLOCK_SKEW = datetime.timedelta(hours=1)  # certificates begin so early, for clocks that are behind
LEAF_DAYS = 397  # a year and a month to be late; what browsers allowed until 2026
LIST_DAYS = 3650  # an expired list shuts everybody out, and nobody here makes one every week

# ---- errors ------------------------------------------------------------------------------------


class TlsConfigError(Exception):
    """A file, an option or this OpenSSL is not fit for what was asked. The text is one sentence."""


class NotYetValid(TlsConfigError):
    """A certificate or a list begins later than now. At boot, the clock may be wrong: try again."""


class HandshakeError(Exception):
    """No session with this peer: `rule: detail`. What the peer can say in it is not escaped."""

    def __init__(self, rule: str, detail: str, *, early: bool = False) -> None:
        super().__init__(f"{rule}: {detail}")
        self.rule, self.early = rule, early  # early: the rule is `validity`, and time may mend it


class TransportError(Exception):
    """An open connection has failed; in TLS 1.3 also if the server refuses the client."""


# What `cryptography` raises for bytes that break a standard, or lack what we look for.
_UNFIT: Final = (
    ValueError, TypeError, KeyError, UnsupportedAlgorithm, InvalidSignature,
    x509.DuplicateExtension, x509.InvalidVersion, x509.UnsupportedGeneralNameType, x509.ExtensionNotFound,
)  # fmt: skip
_FROM_PEER = "alert from the peer: "


@contextlib.contextmanager
def _told(subject: str = "", remedy: str = "") -> Iterator[None]:
    """Whatever is wrong with a file or a setting is a sentence: its name, the fault, the remedy."""
    kind = TlsConfigError
    try:
        yield
        return
    except OSError as error:
        detail = f"{error.strerror}" if subject or not error.filename else f"{error.filename}: {error.strerror}"
    except (SSL.Error, crypto.Error) as error:
        detail = _reason(error).partition(";")[0]
    except (HandshakeError, AttributeError, *_UNFIT) as error:
        detail = str(error) or type(error).__name__
        if getattr(error, "early", False):
            kind, remedy = NotYetValid, ""
    sentence = f"{subject}: {detail}" if subject else detail
    raise kind(escaped(f"{sentence}; {remedy}" if remedy else sentence))


def escaped(text: str) -> str:
    """One line, without control characters and marks that turn the direction of writing."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def _reason(error: Exception) -> str:
    """OpenSSL's reasons, the first cause first; `tlsv1 unrecognized name` is the peer's alert."""
    if isinstance(error, SSL.WantReadError):  # from a write only
        return "the peer has sent the first part of a handshake message, and OpenSSL waits for the rest"
    entries = error.args[0] if error.args and isinstance(error.args[0], list) else []
    if isinstance(error, SSL.ZeroReturnError):
        return f"{_FROM_PEER}close notify"
    reasons = "; ".join(str(reason) for *_, reason in entries) or "OpenSSL has no word for it"
    return re.sub(r"^(?:(?:tls|ssl)\S* alert|tlsv1) ", _FROM_PEER, reasons)


# ---- contexts ----------------------------------------------------------------------------------


class TlsContext:
    """The settings of all connections of one role, loaded and checked.

    Threads: any; nothing changes once it is made. A reload makes another: a store only adds.
    """

    def __init__(
        self, profile: str, *,
        cert: PathLike, key: PathLike, ca: PathLike, crl: PathLike | None = None, verify_name: str | None = None,
    ) -> None:  # fmt: skip
        """What can be wrong is told here, at start: raises TlsConfigError.

        `cert` holds our certificate and then any authorities below the root, `ca` the roots that a
        peer's chain may end in, `crl` a list of every authority in a chain. `verify_name` is the
        host or address that the server's certificate must name: a client has one, a server none.
        """
        self.role, self.peer_role = ("server", "client") if verify_name is None else ("client", "server")
        self.profile = PROFILES[profile]
        self.ssl_context = _bare_context(self.profile)
        self._store = cast(crypto.X509Store, self.ssl_context.get_cert_store())
        self.peer_name: Name | None = None if verify_name is None else self.naming(verify_name).peer_name
        make = f"{PROGRAM} pki init{self.profile.pki_option}"
        with _told(f"--tls-ca {ca}", f"copy ca.crt from the authority's folder, or make an authority by: {make}"):
            roots = self.roots = _load_certificates(ca)
            for root in roots:
                _check_chain([root], "authority", self.profile)
                if not any(_has_signed(each, root) for each in roots):
                    raise ValueError(f"{root.issuer.rfc4514_string()} has signed an authority, and is missing")
                self._store.add_cert(crypto.X509.from_cryptography(root))
        chain = self._load_own(cert, key)
        self.revocations = [] if crl is None else self._load_lists(crl, [*chain[1:], *roots])
        self.keylog = os.environ.get("SSLKEYLOGFILE") or None  # for secrets: worth a warning
        if self.keylog is not None:
            with _told(f"SSLKEYLOGFILE {self.keylog}"):
                open(self.keylog, "ab", opener=_private).close()
                _refuse_readable(self.keylog)
            self.ssl_context.set_keylog_callback(partial(_log_secret, self.keylog))
        ends = [(str(file), each.not_valid_after_utc) for file, held in ((cert, chain), (ca, roots)) for each in held]
        ends += [(str(crl), each.next_update_utc) for each in self.revocations if each.next_update_utc]
        self.ends = dict(sorted(ends, reverse=True))  # of each file: when the first in it ends
        self.load_anew = partial(TlsContext, profile, cert=cert, key=key, ca=ca, crl=crl, verify_name=verify_name)

    def naming(self, name: str) -> TlsContext:
        """The same for a server of this name or address. Raises TlsConfigError."""
        named = copy.copy(self)
        with _told("--server, or --tls-server-name"):
            named.peer_name = parse_name(name)
        return named

    def revokes(self, receipt: Receipt) -> bool:
        """Whether an open session's chain holds what a list of the same authority's key revokes."""
        return any(
            each.get_revoked_certificate_by_serial_number(certificate.serial_number) and _has_signed(authority, each)
            for certificate, authority in zip(receipt.chain, receipt.chain[1:], strict=False)
            for each in self.revocations
        )

    def _load_own(self, file: PathLike, key: PathLike) -> list[Certificate]:
        """Our own chain and its key, by the peer's rules: what it would refuse is told here."""
        options = ("--server HOST" if self.role == "server" else "--client") + self.profile.pki_option
        remedy = f"the authority makes one by: {PROGRAM} pki issue NAME {options}, or by: {PROGRAM} pki renew NAME"
        with _told(f"--tls-cert {file}", remedy):
            chain = _load_certificates(file)
            _check_chain(chain, self.role, self.profile)
            if sum(each.subject != each.issuer for each in chain) > VERIFY_DEPTH + 1:
                raise ValueError(f"more than {VERIFY_DEPTH} authorities stand between it and the root")
            if sum(len(each.public_bytes(serialization.Encoding.DER)) for each in chain) > MAX_CHAIN_BYTES:
                raise ValueError(f"its certificates have over {MAX_CHAIN_BYTES} bytes")
            self.ssl_context.use_certificate(chain[0])
            for authority in chain[1:]:
                self.ssl_context.add_extra_chain_cert(authority)
        with _told(f"--tls-key {key}"):
            _refuse_unfit_key(key)
            try:
                # By name: pyOpenSSL takes no ML-DSA key from memory, cryptography none of all three
                # forms of RFC 9881. Who could swap it could read it.
                self.ssl_context.use_privatekey_file(str(key))
                self.ssl_context.check_privatekey()
            except SSL.Error as error:
                if re.search("mismatch|no certificate", _reason(error)):
                    raise ValueError(f"it is not the key of --tls-cert {file}; copy both files of the pair") from error
                raise ValueError("it holds no PRIVATE KEY (PEM), or a broken one") from error
            return chain

    def _load_lists(self, file: PathLike, authorities: list[Certificate]) -> list[CertificateRevocationList]:
        """By a list that is forged, or out of time, OpenSSL would refuse everybody."""
        remedy = f"copy crl.pem from the authority's folder, where a new one is made by: {PROGRAM} pki revoke"
        with _told(f"--tls-crl {file}", remedy):
            lists = _load_revocations(file)
            for each in lists:
                self.profile.admit("signature", _algorithm(each.signature_algorithm_oid), self.profile.signatures)
                # One that names no end has ended: nobody could tell when it grew stale.
                _check_time("the list", each.last_update_utc, each.next_update_utc or each.last_update_utc)
                critical = [extension.value for extension in each.extensions if extension.critical]
                if any(getattr(value, part, True) for value in critical for part in _PARTIAL):
                    raise ValueError("it holds a part of a list, which leaves all others without one")
                issuer = each.issuer.rfc4514_string()
                # As OpenSSL compares names.
                named = {one for one in authorities if _folded(one.subject) == _folded(each.issuer)}
                if named and not any(_has_signed(authority, each) for authority in named):
                    raise ValueError(f"the {issuer} that we trust has not signed it")
                if len(named) > 1 and _extension(each, x509.AuthorityKeyIdentifier) is None:
                    raise ValueError(f"a list does not say which {issuer} has signed it, and there are two")
                self._store.add_crl(each)
            self._store.set_flags(crypto.X509StoreFlags.CRL_CHECK | crypto.X509StoreFlags.CRL_CHECK_ALL)
            return lists


def _bare_context(profile: Profile) -> SSL.Context:
    """A context that can do what the profile admits and nothing else, and verifies the peer."""
    context = SSL.Context(SSL.TLS_METHOD)
    with _told(f"--tls-profile {profile.name}", "it needs: pip install 'cryptography>=49' 'pyOpenSSL>=26.4'"):
        context.set_min_proto_version(SSL.TLS1_3_VERSION)
        context.set_max_proto_version(SSL.TLS1_3_VERSION)
        context.set_tls13_ciphersuites(":".join(profile.ciphers).encode())
        # pyOpenSSL 26.4 has no setters for these two.
        for binding, names in (("curves_list", profile.groups), ("sigalgs_list", profile.signatures)):
            if getattr(lib, f"SSL_CTX_set1_{binding}")(context._context, ":".join(names).encode()) != 1:
                lib.ERR_clear_error()
                raise ValueError(f"{SSL.OpenSSL_version(SSL.OPENSSL_VERSION).decode()} lacks one of {', '.join(names)}")
    # No resumption: each session proves both keys afresh. The option makes tickets stateful, and
    # without a cache they lead nowhere; two small ones still go out to a client that has passed.
    context.set_options(SSL.OP_NO_TICKET)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    # pyOpenSSL has no names for these modes. OpenSSL would add the root, which the peer has, 5 to 7
    # kB for anybody who connects; and stop a write after the first of many records.
    context.set_mode(0x8)  # SSL_MODE_NO_AUTO_CHAIN
    context.clear_mode(0x1)  # SSL_MODE_ENABLE_PARTIAL_WRITE
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
    context.set_verify_depth(VERIFY_DEPTH)
    return context


def _log_secret(file: str, _: SSL.Connection, line: bytes) -> None:
    """Append a secret of a connection to SSLKEYLOGFILE (RFC 9850); Wireshark reads it."""
    # OpenSSL calls in the handshake and in KeyUpdates: here alone a file is waited for under a
    # connection's lock. A full disk is no reason to end a session.
    with contextlib.suppress(OSError), _appending, open(file, "ab", opener=_private) as log:
        log.write(line + b"\n")


# ---- names, files, certificates ----------------------------------------------------------------

_private = partial(os.open, mode=0o600)  # an opener
_appending = threading.Lock()  # keeps lines of secrets whole where it is two steps (Windows)
_now = partial(datetime.datetime.now, datetime.timezone.utc)
_iso = "{:%Y-%m-%dT%H:%M:%SZ}".format  # of a moment
# By a critical extension that has one of these, or is of another kind, a list is not for all of its
# issuer's certificates. Of one for leaves, or for one distribution point, that depends on them.
_PARTIAL = ("only_contains_ca_certs", "only_contains_attribute_certs", "indirect_crl", "only_some_reasons")


def parse_name(name: str) -> Name:
    """A host or address in the one form that is compared and sent. Raises ValueError.

    An IPv4-mapped address becomes IPv4; a zone (`%eth0`) is of this machine only, and goes.
    """
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(name.partition("%")[0])
        return getattr(address, "ipv4_mapped", None) or address
    with contextlib.suppress(UnicodeError):
        host = name.removesuffix(".").encode("idna").decode().lower()
        # A last label of digits alone is a mistyped address.
        if len(host) <= 253 and re.fullmatch(r"((?!-)[a-z0-9_-]{1,63}\.)*(?![0-9]+$)(?!-)[a-z0-9_-]{1,63}", host):
            return host
    raise ValueError(f"{name!r} is neither a host name nor an address")


def _load(label: str, parse: Callable[[bytes], Any], file: PathLike) -> list[Any]:
    """All PEM blocks of that label: whole ones, and one at least. Raises OSError, ValueError."""
    content = Path(file).read_bytes()
    blocks = re.findall(rf"-----BEGIN [^-]*{label}-----.+?-----END [^-]*{label}-----".encode(), content, re.DOTALL)
    with contextlib.suppress(*_UNFIT):
        if blocks and content.count(f"{label}-----".encode()) == 2 * len(blocks):
            return [parse(block) for block in blocks]
    raise ValueError(f"it holds no {label} (PEM), or a broken one")


_load_certificates = partial(_load, "CERTIFICATE", x509.load_pem_x509_certificate)
_load_revocations = partial(_load, "X509 CRL", x509.load_pem_x509_crl)
_load_keys = partial(_load, "PRIVATE KEY", partial(serialization.load_pem_private_key, password=None))


def _refuse_unfit_key(file: PathLike) -> None:
    if b"ENCRYPTED" in Path(file).read_bytes():  # OpenSSL would ask for the password and wait
        raise ValueError("the key is encrypted, and rtunnel cannot ask for a password")
    _refuse_readable(file)


def _refuse_readable(file: PathLike) -> None:
    """Windows has no such modes, and a device's mean nothing."""
    mode = os.stat(file).st_mode
    if os.name == "posix" and stat.S_ISREG(mode) and stat.S_IMODE(mode) & 0o077:
        raise ValueError(f"others can read it; run: chmod 600 {file}")


def _extension(source: Certificate | CertificateRevocationList, kind: type[Any]) -> Any:
    try:
        return source.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except KeyError as error:  # a number in RFC 7633's extension that cryptography does not know
        raise ValueError(f"it has an extension that cannot be read, with {error}") from error


def _folded(name: x509.Name) -> str:
    return " ".join(name.rfc4514_string().casefold().split())


def _algorithm(identifier: ObjectIdentifier) -> str:
    return identifier._name.replace("ML-DSA-", "mldsa")  # keys, signatures: RFC 9881, 2


def _has_signed(authority: Certificate, item: Certificate | CertificateRevocationList) -> bool:
    with contextlib.suppress(*_UNFIT):
        if isinstance(item, CertificateRevocationList):
            return item.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
        authority.public_key().verify(item.signature, item.tbs_certificate_bytes)  # type: ignore[union-attr,call-arg]
        return _folded(item.issuer) == _folded(authority.subject)
    return False


def _roles(certificate: Certificate) -> list[str]:
    purposes = _extension(certificate, x509.ExtendedKeyUsage) or ()
    authority = getattr(_extension(certificate, x509.BasicConstraints), "ca", False)
    return [role for role, purpose in _PURPOSES.items() if purpose in purposes] + ["authority"] * authority


def _names(certificate: Certificate) -> list[Name]:
    """Hosts and addresses in subjectAltName; other kinds of names are not for us."""
    names = [name.value for name in _extension(certificate, x509.SubjectAlternativeName) or ()
             if isinstance(name, x509.DNSName | x509.IPAddress)]  # fmt: skip
    return [name.lower() if isinstance(name, str) else name for name in names if isinstance(name, Name)]


def days_left(*ends: datetime.datetime) -> int:
    """Days until the first of these, rounded down: negative once it is past."""
    return (min(ends) - _now()).days


def _facts(certificate: Certificate) -> dict[str, str]:
    """What is shown of a certificate; a part of it is logged."""
    end = certificate.not_valid_after_utc
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "role": " and ".join(_roles(certificate)) or "none",
        "names": ", ".join(map(str, _names(certificate))) or "none",
        "algorithm": _algorithm(certificate.public_key_algorithm_oid),
        "signed by": _algorithm(certificate.signature_algorithm_oid),
        "valid": f"{_iso(certificate.not_valid_before_utc)} to {_iso(end)}, {days_left(end)} days left",
        "serial": f"{certificate.serial_number:x}",
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


# ---- peer check and receipt --------------------------------------------------------------------


class Receipt(NamedTuple):
    """What is known of a session's peer, and how."""

    identity: str
    chain: tuple[Certificate, ...]  # as it was verified, the peer's own first, the root last
    end: datetime.datetime  # of its own
    facts: dict[str, str]  # for a line of the log


def check_peer(context: TlsContext, version: str, group: str, cipher: str, chain: list[Certificate]) -> Receipt:
    """Judge what a finished handshake came to; `chain` is what OpenSSL has verified.

    Two of the rules are not OpenSSL's. It lets a certificate without extended key usage play any
    role. And it holds only the handshake's own signature to the profile, so that an RSA authority
    in between, which a quantum computer forges, could vouch for an ML-DSA key. The others stand
    here so that they do not hang on one call of a private binding. Raises HandshakeError.
    """
    profile = context.profile
    profile.admit("version", version, ["TLSv1.3"])
    profile.admit("group", group, profile.groups)
    profile.admit("cipher", cipher, profile.ciphers)
    if not chain:
        raise HandshakeError("certificate", "the peer has shown none")
    identity = _check_chain(chain, context.peer_role, profile, context.peer_name)
    own, end = _facts(chain[0]), chain[0].not_valid_after_utc
    facts = {"version": version, "group": group, "cipher": cipher}
    facts |= {"signature": own["algorithm"], "identity": identity}  # an ML-DSA key signs in one way
    facts |= {key: own[key] for key in ("issuer", "serial", "sha256")}
    return Receipt(identity, tuple(chain), end, facts | {"expiry": _iso(end), "days_left": str(days_left(end))})


def _check_chain(chain: Sequence[Certificate], role: str, profile: Profile, dialled: Name | None = None) -> str:
    """The identity that a chain gives to who plays `role`. Raises HandshakeError."""
    for each in chain:  # the root's own signature proves nothing, but tells its key
        profile.admit("signature", _algorithm(each.signature_algorithm_oid), profile.signatures)
        _check_time(each.subject.rfc4514_string(), each.not_valid_before_utc, each.not_valid_after_utc)
    leaf = chain[0]
    profile.admit("key", _algorithm(leaf.public_key_algorithm_oid), profile.signatures)
    if role not in _roles(leaf):  # `any purpose` is none: it would let a client play the server
        raise HandshakeError("purpose", f"the certificate of {leaf.subject.rfc4514_string()} is no {role}'s")
    if role == "authority":  # which may have any name
        return leaf.subject.rfc4514_string()
    names = [str(name.value) for name in leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if len(names) != 1 or not re.fullmatch(rf"[ -~]{{1,{MAX_IDENTITY_CHARS}}}", names[0]) or names == [NO_IDENTITY]:
        wanted = f"one common name, 1 to {MAX_IDENTITY_CHARS} printable ASCII characters, and not {NO_IDENTITY}"
        raise HandshakeError("identity", f"a certificate must have {wanted}")
    # RFC 9525, 6.3: `*` is one label of three or more.
    wild = "*." + dialled.partition(".")[2] if isinstance(dialled, str) and dialled.count(".") > 1 else None
    if dialled is not None and {dialled, wild}.isdisjoint(held := _names(leaf)):
        told = [str(name) for name in held[:MAX_NAMES_TOLD]] or ["no host"]
        if len(held) > MAX_NAMES_TOLD:
            told.append(f"{len(held) - MAX_NAMES_TOLD} more")
        raise HandshakeError("name", f"the certificate is for {', '.join(told)}, not for {dialled}")
    return names[0]


def _check_time(what: str, begin: datetime.datetime, end: datetime.datetime) -> None:
    if (now := _now()) < begin:
        clock = f"{what} is not valid before {_iso(begin)}, and the clock says {_iso(now)}"
        raise HandshakeError("validity", clock, early=True)
    if end < now:
        raise HandshakeError("validity", f"{what} expired on {_iso(end)}")


# ---- TLS transport -----------------------------------------------------------------------------


class Carrier(Protocol):
    """The plain transport below. All but `set_timeout` raise OSError when the connection fails."""

    peer: str  # `203.0.113.7:51234`, for messages

    def receive_into(self, buffer: memoryview) -> int: ...  # waits; 0 at the end of file
    def send(self, data: Readable) -> None: ...  # all of it; waits
    def set_timeout(self, seconds: float | None) -> None: ...  # of each wait; in the handshake only
    def limit_write(self, seconds: float) -> None: ...  # a `send` without progress so long fails
    def finish(self) -> None: ...  # no more comes: SHUT_WR
    def shutdown(self) -> None: ...  # both directions end, and whoever waits wakes
    def close(self) -> None: ...


_RULES: Final = {  # words in what OpenSSL says when it ends a handshake; the first that fits counts
    "revoked": ("revoked",),
    "authority": ("issuer certificate", "self-signed"),
    "tls": ("wrong version number",),  # of a record: this is no TLS at all
    "version": ("protocol", "version"),
    "group": ("key share", "group"),
    "cipher": ("shared cipher", "cipher returned"),
    "signature": ("signature",),
    "certificate": ("certificate",),
}


class _Ssl:
    """An SSL object between two memory BIOs. Nothing here waits.

    Threads: one at a time, which the caller sees to.
    The calls that move bytes go to OpenSSL directly: pyOpenSSL's own allocate, copy and raise once
    or twice for each record, and take 2.2 times as long.
    """

    def __init__(self, context: TlsContext) -> None:
        self._connection = SSL.Connection(context.ssl_context, None)
        self.do_handshake = self._connection.do_handshake  # WantReadError: OpenSSL needs more
        self.close_notify = self._connection.shutdown  # makes the alert; SSL.Error after a failure
        if (name := context.peer_name) is None:  # as a server has none
            self._connection.set_accept_state()
            return
        self._connection.set_connect_state()
        # The peer's subjectAltName, and nothing else, is held to the name.
        wanted = lib.SSL_get0_param(self._connection._ssl)
        if isinstance(name, str):
            self._connection.set_tlsext_host_name(name.encode())  # RFC 6066, 3: never an address
            flags = lib.X509_CHECK_FLAG_NEVER_CHECK_SUBJECT | lib.X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS
            lib.X509_VERIFY_PARAM_set_hostflags(wanted, flags)
            applied = lib.X509_VERIFY_PARAM_set1_host(wanted, name.encode(), len(name))
        else:
            applied = lib.X509_VERIFY_PARAM_set1_ip(wanted, name.packed, len(name.packed))
        if applied != 1:
            lib.ERR_clear_error()
            raise ValueError("OpenSSL cannot verify such a name")

    def negotiated(self) -> tuple[str, str, str, list[Certificate]]:
        """Version, group, cipher and verified chain, as `check_peer` takes them."""
        version, group = self._connection.get_protocol_version_name(), self._connection.get_group_name()
        chain = self._connection.get_verified_chain(as_cryptography=True)
        return version, group or "none", self._connection.get_cipher_name() or "none", chain or []

    def refusal(self, error: SSL.Error, context: TlsContext) -> HandshakeError:
        """Why OpenSSL ended the handshake, by the rule's name."""
        detail = _reason(error)
        if detail.startswith(_FROM_PEER):
            return HandshakeError("alert", detail.replace(_FROM_PEER, "refused by the peer: "))
        # What OpenSSL has against the certificate, if anything; pyOpenSSL 26.4 has no getter.
        if code := lib.SSL_get_verify_result(self._connection._ssl):
            detail = ffi.string(lib.X509_verify_cert_error_string(code)).decode()
        rules = (rule for rule, words in _RULES.items() if any(word in detail for word in words))
        rule = next(rules, "certificate" if code else "tls")
        try:
            chain = self.negotiated()[3] if code and rule == "certificate" else []
            # OpenSSL may have stopped before the signatures: we read nothing that a stranger made.
            if chain and chain[-1] in context.roots and all(map(_has_signed, chain[1:], chain)):
                _check_chain(chain, context.peer_role, context.profile, context.peer_name)
        except HandshakeError as named:  # which says of which certificate
            return named.with_traceback(None)  # it would keep this object
        except _UNFIT:
            pass
        return HandshakeError(rule, detail)

    def feed(self, records: memoryview) -> None:
        """Take bytes from the peer, all of them."""
        if lib.BIO_write(self._connection._into_ssl, ffi.from_buffer(records), len(records)) != len(records):
            raise MemoryError("OpenSSL could not take the peer's bytes")

    def read_into(self, view: memoryview) -> tuple[int, SSL.Error | None]:
        """Plaintext, until `view` is full or OpenSSL needs more, and what has ended the session."""
        ssl, count = self._connection._ssl, 0
        # Where no record is left, to hear that from SSL_read would cost as much as a record.
        while not count or (count < len(view) and lib.BIO_get_mem_data(self._connection._into_ssl, ffi.NULL)):
            got = lib.SSL_read(ssl, ffi.from_buffer(view[count:], require_writable=True), len(view) - count)
            if got <= 0:
                if lib.SSL_get_error(ssl, got) == lib.SSL_ERROR_WANT_READ:
                    break
                try:
                    self._connection._raise_ssl_error(ssl, got)
                except SSL.Error as error:  # ZeroReturnError: close_notify has come
                    return count, error.with_traceback(None)
            count += got
        return count, None

    def unsent(self) -> int:
        """Bytes of records that wait to be taken."""
        return int(lib.BIO_get_mem_data(self._connection._from_ssl, ffi.NULL))

    def take(self, spare: memoryview, plaintext: Readable = b"") -> memoryview:
        """All records that wait, and behind them those of the plaintext. Raises SSL.Error.

        They are in `spare` where they fit, so valid until that is used again. WantReadError is an
        error here: the peer has sent a part of a handshake message (RFC 8446, 4.6), and OpenSSL
        will not write before the rest is there. No honest peer stops in between.
        """
        ssl = self._connection._ssl
        # It writes all or nothing: see `_bare_context`.
        if plaintext and (written := lib.SSL_write(ssl, ffi.from_buffer(plaintext), len(plaintext))) <= 0:
            self._connection._raise_ssl_error(ssl, written)
        count = self.unsent()
        buffer = spare if count <= len(spare) else memoryview(bytearray(count))
        if count and lib.BIO_read(self._connection._from_ssl, ffi.from_buffer(buffer), count) != count:
            raise MemoryError("OpenSSL could not give its records")
        return buffer[:count]


class TlsTransport:
    """What a session reads and writes: an open TLS connection whose peer has passed.

    Threads: `receive_into` from the session reader; `send` and `finish` from the holder of the
    writer's turn; `shutdown` from any; `close` from the reader, after all others have left.
    Locking: `_lock` guards `_ssl`; it is held while OpenSSL computes, never while anything waits.
    Invariant: records leave in the order in which they were made. A writer takes all in the step
    that makes them, and sends them while it has the turn. Those that reading causes, an alert or
    the answer to a KeyUpdate, wait in `_ssl` for the next: `wants_flush` asks for one.
    """

    def __init__(self, carrier: Carrier, ssl: _Ssl, receipt: Receipt) -> None:
        self.peer, self.receipt, self.identity = carrier.peer, receipt, receipt.identity
        self.wants_flush: Callable[[], None] = lambda: None  # the session's; not under the lock
        self.limit_write, self.shutdown, self.close = carrier.limit_write, carrier.shutdown, carrier.close
        self._carrier = carrier
        # the reader's
        self._incoming = memoryview(bytearray(INCOMING_BYTES))
        self._silent = True  # no plaintext has come yet
        self._drained = False  # OpenSSL can give nothing before more has come
        self._end: SSL.Error | None = None  # nothing more comes, and why
        # the turn's holder's
        self._outgoing = memoryview(bytearray(OUTGOING_BYTES))
        self._lock = threading.Lock()
        # guarded by _lock
        self._ssl = ssl

    @classmethod
    def handshake(cls, carrier: Carrier, context: TlsContext, remaining: Callable[[], float]) -> TlsTransport:
        """Shake hands and check the peer within the seconds that `remaining` tells.

        Raises HandshakeError, once the peer could read our alert. The caller closes the carrier.
        """
        ssl, buffer, received = _Ssl(context), memoryview(bytearray(HANDSHAKE_BYTES)), 0
        try:
            while True:
                with contextlib.suppress(SSL.WantReadError):
                    ssl.do_handshake()
                    break
                _limit_waits(carrier, remaining())
                if records := ssl.take(buffer):
                    carrier.send(records)
                _limit_waits(carrier, remaining())
                if not (count := carrier.receive_into(buffer)):
                    said = "in the handshake" if received else "without a word; are both ends started with --tls?"
                    raise HandshakeError("closed", f"the peer closed the connection {said}")
                # A frame of the tunnel, no record: type, stream, length (PROTOCOL.md). The
                # alert, protocol_version, shows the peer what we speak; OpenSSL would not send it.
                if not received and count >= 9 and 1 <= buffer[0] <= 11 and not any(buffer[5:7]):
                    carrier.send(b"\x15\x03\x03\x00\x02\x02\x46")
                    raise HandshakeError("tls", "the peer speaks the tunnel in plain mode; start both ends with --tls")
                if (received := received + count) > MAX_HANDSHAKE_BYTES:
                    raise HandshakeError("certificate", f"the handshake has over {MAX_HANDSHAKE_BYTES} bytes")
                ssl.feed(buffer[:count])
            # Our last flight is still in `ssl`: who does not pass sees no client's certificate.
            try:
                transport = cls(carrier, ssl, check_peer(context, *ssl.negotiated()))
            except _UNFIT as error:
                raise HandshakeError("certificate", f"it cannot be read: {error}") from error
            _limit_waits(carrier, remaining())
            transport.send(b"")
            carrier.set_timeout(None)
            return transport
        except SSL.Error as error:
            error.__traceback__ = None  # it is the refusal's context, and would keep `ssl`
            alert, refused = ssl.take(memoryview(b"")), ssl.refusal(error, context)
        except HandshakeError as error:
            alert, refused = memoryview(b""), error
        except TimeoutError:
            raise HandshakeError("deadline", "the peer took too long") from None
        except OSError as error:
            raise HandshakeError("closed", f"the connection failed: {error.strerror or error}") from error
        del ssl  # which an exception that is being handled would keep, by its traceback
        try:
            _leave(carrier, alert)
            raise refused
        finally:
            del refused  # or it and this frame would be a cycle

    def receive_into(self, view: memoryview) -> int:
        """Wait for plaintext and put all that is there into `view`, which must have room for some.

        Returns 0 when the peer has said that no more comes. Raises TransportError or the carrier's
        OSError, once all that came before has been handed out.
        """
        while not self._end:
            received = self._carrier.receive_into(self._incoming) if self._drained else 0
            if self._drained and not received:
                why = "closed by peer after the handshake" if self._silent else "truncated: ended without close_notify"
                raise TransportError(why)
            with self._lock:
                self._ssl.feed(self._incoming[:received])
                count, self._end = self._ssl.read_into(view)
                unsent = self._ssl.unsent()
            self._drained = count < len(view)
            if unsent:
                self.wants_flush()
            if unsent > MAX_UNSENT_BYTES and not self._end:
                self._end = SSL.Error([("", "", "the peer makes us answer, and faster than it takes the answers")])
            if count:
                self._silent = False
                return count
        if isinstance(self._end, SSL.ZeroReturnError):
            return 0
        raise TransportError(_reason(self._end))

    def send(self, frames: Readable) -> None:
        """Send all, and what TLS itself has to say. After TransportError, OSError all is over."""
        try:
            with self._lock:
                records = self._ssl.take(self._outgoing, frames)
        except SSL.Error as error:
            raise TransportError(_reason(error)) from error
        if records:
            self._carrier.send(records)

    def finish(self) -> None:
        """Say that no more comes: close_notify, SHUT_WR. No send may follow. Raises OSError."""
        with self._lock:
            # After a failure OpenSSL makes none, for it would vouch for a stream that was cut.
            with contextlib.suppress(SSL.Error):
                self._ssl.close_notify()
            records = self._ssl.take(self._outgoing)
        self._carrier.send(records)
        self._carrier.finish()


def _limit_waits(carrier: Carrier, seconds: float) -> None:
    """Raises TimeoutError where no time is left, for a timeout of 0 would mean not to wait."""
    if seconds <= 0:
        raise TimeoutError
    carrier.set_timeout(seconds)


def _leave(carrier: Carrier, alert: Readable) -> None:
    """Send our alert, which may be empty, and give the peer time to read it."""
    end = time.monotonic() + ALERT_LINGER_S
    discarded = memoryview(bytearray(HANDSHAKE_BYTES))
    with contextlib.suppress(OSError):  # the peer may be gone, or talk on; we leave anyway
        carrier.set_timeout(ALERT_LINGER_S)
        carrier.send(alert)
        carrier.finish()
        while carrier.receive_into(discarded):
            _limit_waits(carrier, end - time.monotonic())


# ---- certificate authority ---------------------------------------------------------------------
#
# A folder with ca.crt, ca.key, crl.pem, issued.pem (all that was issued, the authority first) and,
# for each NAME, NAME.crt and NAME.key. Who has ca.key can be anybody: the folder stays on one
# machine, and the others get ca.crt, crl.pem and their own pair. The five commands raise
# TlsConfigError. All but `show` return the file that they have made.

ALGORITHMS: Final = {"mldsa65": MLDSA65PrivateKey.generate, "mldsa87": MLDSA87PrivateKey.generate}
_SIGNS_HANDSHAKES = x509.KeyUsage(True, False, False, False, False, False, False, False, False)
_SIGNS_CERTIFICATES = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
_issuer: Any = x509.AuthorityKeyIdentifier.from_issuer_public_key  # tells namesakes apart
_RESTORE = "put a copy of it back, for a new one would forget what was in it"


@_told()
def init_authority(
    folder: PathLike, *, algorithm: str = "mldsa65", name: str = "rtunnel CA", years: int = 10, force: bool = False
) -> Path:
    """Make an authority and its empty revocation list. What a replaced one has issued is void."""
    where, most = Path(folder), datetime.MAXYEAR - _now().year
    if not 1 <= years <= most:
        raise ValueError(f"--years: 1 to {most}, for no certificate can end after the year {datetime.MAXYEAR}")
    where.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _held(where, "ca.crt", "ca.key", "crl.pem", "issued.pem", force=force) as files:
        extensions = [x509.BasicConstraints(ca=True, path_length=0), _SIGNS_CERTIFICATES]
        authority, files["ca.key"], key = _make(name, algorithm, 365 * years, extensions)
        files["ca.crt"] = files["issued.pem"] = _pem(authority)
        files["crl.pem"] = _revocations(authority, key, 1, ())
    return where / "ca.crt"


@_told()
def issue(
    folder: PathLike, name: str, *, hosts: Sequence[str] | None,
    days: int = LEAF_DAYS, algorithm: str | None = None, force: bool = False,
) -> Path:  # fmt: skip
    """Issue NAME.crt and NAME.key, for a server that is dialled by `hosts`, or for a client."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name) or name.lower() in ("ca", NO_IDENTITY):
        rule = f"letters, digits and . _ - only, and neither ca nor {NO_IDENTITY}"
        raise ValueError(f"{name!r} cannot be a certificate's name: {rule}")
    where, (cert, key) = Path(folder), (f"{name}.crt", f"{name}.key")
    with _authority(where, cert, key, force=force) as (authority, signer, issued, files):
        longest = days_left(authority.not_valid_after_utc)
        if not 1 <= days <= longest:
            raise ValueError(f"--days: 1 to {longest}, for the authority ends on {_iso(authority.not_valid_after_utc)}")
        # Nothing more: a server sends this to whoever connects, and all that it sends before it
        # knows the client should fit into the ten segments that TCP starts with.
        purpose = x509.ExtendedKeyUsage([_PURPOSES["client" if hosts is None else "server"]])
        extensions = [_SIGNS_HANDSHAKES, purpose, _issuer(authority.public_key())]
        if hosts is not None:
            extensions.append(x509.SubjectAlternativeName([_general_name(host) for host in hosts]))
        kind = algorithm or _algorithm(authority.public_key_algorithm_oid)
        certificate, files[key], _ = _make(name, kind, days, extensions, authority, signer)
        files |= {cert: _pem(certificate), "issued.pem": _pem(authority, *issued, certificate)}
    return where / cert


@_told()
def renew(folder: PathLike, name: str) -> Path:
    """Issue another pair to NAME, with the last one's role, hosts, algorithm and days."""
    with _authority(Path(folder)) as (authority, _, issued, _):
        named = [each for each in issued if each.subject.rfc4514_string() == f"CN={name}"]
    if not named:
        raise ValueError(f"{folder} has issued nothing to {name}; use: {PROGRAM} pki issue")
    last = max(reversed(named), key=lambda each: each.not_valid_before_utc)
    hosts = [str(host) for host in _names(last)] if "server" in _roles(last) else None
    days = min(last.not_valid_after_utc - last.not_valid_before_utc, authority.not_valid_after_utc - _now()).days
    algorithm = _algorithm(last.public_key_algorithm_oid)
    return issue(folder, name, hosts=hosts, days=days, algorithm=algorithm, force=True)


@_told()
def revoke(folder: PathLike, name: PathLike | None = None, *, serial: str | None = None) -> Path:
    """Write crl.pem anew, for another LIST_DAYS, with what was on it and more.

    `name` is a NAME, of which all are revoked that are still valid, or a certificate's file;
    `serial` is in hex, as the log tells it, and need not be on record.
    """
    file = Path(folder, "crl.pem")
    if serial is not None and not re.fullmatch(r"0*(?!0)[0-9a-fA-F]{1,40}", serial := serial.replace(":", "")):
        raise ValueError(f"--serial {serial!r}: write it as the log does, in up to 40 hexadecimal digits")
    with _authority(file.parent) as (authority, key, issued, files):
        with _told(str(file), _RESTORE):
            old = _load_revocations(file)[0]
            number = old.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            if not _has_signed(authority, old):
                raise ValueError("it is another authority's")
        named = [each for each in issued if each.subject.rfc4514_string() == f"CN={name}"]
        serials = {each.serial_number for each in named if each.not_valid_after_utc > _now()}
        if name is not None and not serials:
            if named or not Path(name).exists():
                raise ValueError(f"nothing that was issued to {name} is valid, and no file has that name")
            with _told(str(name)):
                certificate, *others = _load_certificates(name)
                if not _has_signed(authority, certificate) or not all("authority" in _roles(each) for each in others):
                    raise ValueError("it is of another authority, which alone can revoke it, or it holds several")
            serials = {certificate.serial_number}
        if serial is not None:
            serials.add(int(serial, 16))
        if authority.serial_number in serials:
            raise ValueError("this is the authority itself, without which nobody is admitted")
        fresh = sorted(serials - {entry.serial_number for entry in old})
        entries = [*old, *(x509.RevokedCertificateBuilder(each, _now()).build() for each in fresh)]
        files[file.name] = _revocations(authority, key, number + 1, entries)
    return file


@_told()
def show(folder: PathLike, file: PathLike | None = None) -> str:
    """All certificates of a folder, or of a file, by the list that lies beside it."""
    path = Path(file or folder)
    files = sorted(each for each in path.iterdir() if each.suffix == ".crt") if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no certificate (*.crt); make an authority by: {PROGRAM} pki init")
    listed, root, record = files[0].with_name("crl.pem"), files[0].with_name("ca.crt"), path / "issued.pem"
    with _told(str(listed), _RESTORE):
        lists = _load_revocations(listed) if listed.exists() else []
    with _told(str(root)):
        authorities = _load_certificates(root) if root.exists() else []
    shown: dict[Certificate, list[str]] = {}
    for source in [*files, record] if record.exists() else files:
        with _told(str(source)):
            held = _load_certificates(source)
            authorities += [each for each in held if "authority" in _roles(each)]
            for certificate in held:
                issuers = [each for each in authorities if _has_signed(each, certificate)]
                own = [each for each in lists if any(_has_signed(issuer, each) for issuer in issuers)]
                found = [each.get_revoked_certificate_by_serial_number(certificate.serial_number) for each in own]
                revoked = "no" if own else "unknown, for there is no list of its issuer"
                if entry := next(filter(None, found), None):
                    revoked = f"YES, on {_iso(entry.revocation_date_utc)}"
                facts = _facts(certificate) | {"revoked": revoked}
                shown.setdefault(certificate, [str(source), *(f"  {key:10} {value}" for key, value in facts.items())])
    return "\n".join(escaped(line) for lines in shown.values() for line in lines)


@contextlib.contextmanager
def _held(folder: Path, *fresh: str, force: bool = False) -> Iterator[dict[str, bytes]]:
    """The folder, for one process at a time; `fresh` files must not be there, but for `force`.

    What the dict gets is written at the end: all of these files or none, whatever happens. They are
    made in a folder of their own, and from its renaming on they count. Who reloads meanwhile can
    meet a certificate without its key: it refuses that, and keeps what it has.
    """
    if os.name == "posix" and stat.S_IMODE(folder.stat().st_mode) & 0o022:
        raise ValueError(f"others can write to {folder}, and swap what is in it; run: chmod 700 {folder}")
    with open(folder / ".lock", "ab", opener=_private) as lock:  # the system lets go of it
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_LOCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        _settle(folder)
        for name in fresh:
            if (folder / name).exists() and not (force and (folder / name).is_file()):
                raise ValueError(f"{folder / name} exists; --force replaces it, if it is a file")
        files: dict[str, bytes] = {}
        yield files
        making = folder / ".making"
        try:
            making.mkdir(mode=0o700)
            for name, content in files.items():
                # Readable by its owner only from its first byte on.
                opener = partial(os.open, mode=0o600 if name.endswith(".key") else 0o644)
                with _told(str(folder / name)), open(making / name, "xb", opener=opener) as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
            making.rename(folder / ".ready")
        finally:
            _settle(folder)


def _settle(folder: Path) -> None:
    """Finish what `_held` writes from its renaming on, or undo it, now or after a crash."""
    shutil.rmtree(folder / ".making", ignore_errors=True)
    if (ready := folder / ".ready").exists():
        for file in sorted(ready.iterdir()):
            with _told(str(folder / file.name)):
                file.replace(folder / file.name)
        ready.rmdir()


@contextlib.contextmanager
def _authority(
    folder: Path, *fresh: str, force: bool = False
) -> Iterator[tuple[Certificate, Any, list[Certificate], dict[str, bytes]]]:
    """A folder's authority, its key, all that it has issued, and what `_held` writes at the end."""
    if not (folder / "ca.crt").exists() and not (folder / ".ready").exists():
        raise ValueError(f"{folder} holds no authority (ca.crt); make one by: {PROGRAM} pki init")
    with _held(folder, *fresh, force=force) as files:
        own, secret, record = folder / "ca.crt", folder / "ca.key", folder / "issued.pem"
        with _told(str(own)):
            authority = _load_certificates(own)[0]
        with _told(str(record), _RESTORE):
            issued = _load_certificates(record)
            # A wrong byte, here or in ca.crt: what looks like another's would be forgotten.
            if issued.pop(0) != authority or not all(_has_signed(authority, each) for each in issued):
                raise ValueError(f"it is not the record of the authority in {own}")
        with _told(str(secret)):
            _refuse_unfit_key(secret)
            if (key := _load_keys(secret)[0]).public_key() != authority.public_key():
                raise ValueError(f"it is not the key of {own}")
        yield authority, key, issued, files


def _general_name(host: str) -> x509.GeneralName:
    """A subjectAltName; `*.` may stand for one label. Raises ValueError."""
    name = parse_name(host.removeprefix("*."))
    if host.startswith("*.") and (not isinstance(name, str) or "." not in name):
        raise ValueError(f"{host!r}: a wildcard is one label of three or more, and no part of an address")
    return x509.DNSName("*." * host.startswith("*.") + name) if isinstance(name, str) else x509.IPAddress(name)


def _make(
    name: str, algorithm: str, days: int, extensions: list[Any], by: Certificate | None = None, signer: Any = None
) -> tuple[Certificate, bytes, Any]:
    """A certificate, of itself or of an authority, its key as PEM, and its key."""
    if algorithm not in ALGORITHMS:
        raise ValueError(f"--algorithm {algorithm}: choose one of {', '.join(ALGORITHMS)}")
    key: Any = ALGORITHMS[algorithm]()
    with _told(f"--name {name!r}"):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    begin, end, serial = _now() - CLOCK_SKEW, _now() + datetime.timedelta(days=days), x509.random_serial_number()
    builder = x509.CertificateBuilder(by.subject if by else subject, subject, key.public_key(), serial, begin, end)
    for extension in [*extensions, x509.SubjectKeyIdentifier.from_public_key(key.public_key())]:
        builder = builder.add_extension(extension, isinstance(extension, x509.BasicConstraints | x509.KeyUsage))
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return builder.sign(signer or key, None), pem, key


def _revocations(authority: Certificate, key: Any, number: int, entries: Iterable[x509.RevokedCertificate]) -> bytes:
    begin, end = _now() - CLOCK_SKEW, _now() + datetime.timedelta(days=LIST_DAYS)
    builder = x509.CertificateRevocationListBuilder(authority.subject, begin, end, revoked_certificates=[*entries])
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    return _pem(builder.add_extension(_issuer(authority.public_key()), critical=False).sign(key, None))


def _pem(*items: Certificate | CertificateRevocationList) -> bytes:
    return b"".join(each.public_bytes(serialization.Encoding.PEM) for each in items)
