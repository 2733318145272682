"""What the TLS tests need: certificates good and bad, a carrier, and peers that are not ours.

The peers use two stacks: Python's own `ssl` (the system's OpenSSL, which may know nothing post-quantum) plays the
classical ones, raw pyOpenSSL with the original's settings or any others the rest. `Forger` makes single records.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mldsa, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from OpenSSL import SSL
from OpenSSL._util import lib

import rtunnel_tls
from rtunnel_tls import HandshakeError, TlsContext, TlsTransport

HOUR = datetime.timedelta(hours=1)
SERVER_AUTH, CLIENT_AUTH = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH

# --- certificates -------------------------------------------------------------------------------------------

KEYS: dict[str, Callable[[], Any]] = {
    "mldsa44": mldsa.MLDSA44PrivateKey.generate,
    "mldsa65": mldsa.MLDSA65PrivateKey.generate,
    "mldsa87": mldsa.MLDSA87PrivateKey.generate,
    "rsa": lambda: rsa.generate_private_key(65537, 2048),
    "ecdsa": lambda: ec.generate_private_key(ec.SECP256R1()),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


class Signer:
    """An authority made by hand: its name and key, and the certificates that lead from the root to it."""

    def __init__(self, algorithm: str = "mldsa65", name: str = "root", by: Signer | None = None) -> None:
        self.name, self.key = name, KEYS[algorithm]()
        self.chain: list[x509.Certificate] = []
        extensions = (
            (x509.BasicConstraints(True, None), True),
            (x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False),
        )
        self.certificate = (by or self).sign(self.key, name, extensions=extensions)
        if by is not None:
            self.chain = [self.certificate, *by.chain]

    def sign(
        self,
        key: Any,
        subject: str | None,
        *,
        extensions: Sequence[tuple[x509.ExtensionType, bool]] = (),
        before: datetime.timedelta = HOUR,
        after: datetime.timedelta = 24 * HOUR,
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.timezone.utc)
        names = [] if subject is None else [x509.NameAttribute(NameOID.COMMON_NAME, subject)]
        builder = x509.CertificateBuilder(
            issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, self.name)]),
            subject_name=x509.Name(names),
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - before,
            not_valid_after=now + after,
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical)
        digest = hashes.SHA256() if isinstance(self.key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) else None
        return builder.sign(self.key, digest)

    def issue(
        self,
        folder: Path,
        name: str,
        purposes: Sequence[x509.ObjectIdentifier],
        hosts: Sequence[str] = (),
        *,
        algorithm: str = "mldsa65",
        subject: str | None = "peer",
        **validity: datetime.timedelta,
    ) -> Pair:
        """NAME.crt with its chain, and NAME.key, in `folder`."""
        key = KEYS[algorithm]()
        extensions: list[tuple[x509.ExtensionType, bool]] = []
        if purposes:
            extensions.append((x509.ExtendedKeyUsage(purposes), False))
        if hosts:
            names = [rtunnel_tls._general_name(host) for host in hosts]
            extensions.append((x509.SubjectAlternativeName(names), False))
        leaf = self.sign(key, subject, extensions=extensions, **validity)
        return Pair(folder, name, leaf, key, self.chain)

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name}-ca.crt"
        path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        return path


class Pair:
    """A certificate file, with the rest of its chain, and its key file."""

    def __init__(
        self, folder: Path, name: str, leaf: x509.Certificate, key: Any, chain: Sequence[x509.Certificate] = ()
    ) -> None:
        self.cert, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        pem = serialization.Encoding.PEM
        self.cert.write_bytes(b"".join(each.public_bytes(pem) for each in (leaf, *chain)))
        self.key.touch(0o600)
        self.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))


class House:
    """An authority of our own `pki` with a server's and a client's pair, and contexts from them."""

    def __init__(self, folder: Path, algorithm: str = "mldsa65", hosts: Sequence[str] = ("localhost", "127.0.0.1")):
        self.folder, self.ca, self.crl = folder, folder / "ca.crt", folder / "crl.pem"
        rtunnel_tls.init_authority(folder, algorithm=algorithm)
        rtunnel_tls.issue(folder, "server", hosts=hosts)
        rtunnel_tls.issue(folder, "client", hosts=None)

    def files(self, name: str) -> dict[str, Path]:
        return {"cert": self.folder / f"{name}.crt", "key": self.folder / f"{name}.key", "ca": self.ca}

    def flags(self, role: str, profile: str = "default", **other: Path) -> tuple[str, ...]:
        """What makes `rtunnel.py ROLE` use these files, or `other` ones."""
        files = self.files(role) | other
        return ("--tls", f"--tls-profile={profile}", *(f"--tls-{option}={file}" for option, file in files.items()))

    def server(self, profile: str = "default", **settings: Any) -> TlsContext:
        return rtunnel_tls.TlsContext(profile, **(self.files("server") | settings))

    def client(self, profile: str = "default", name: str = "localhost", **settings: Any) -> TlsContext:
        return rtunnel_tls.TlsContext(profile, verify_name=name, **(self.files("client") | settings))

    def context(self, role: str, profile: str = "default", **settings: Any) -> TlsContext:
        return self.server(profile, **settings) if role == "server" else self.client(profile, **settings)


# --- carrying bytes -----------------------------------------------------------------------------------------


class SocketCarrier:
    """The plain transport in its smallest form; counts what passes."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.peer = sock, "127.0.0.1:1"
        self.sent = self.received = self.sends = self.finishes = 0

    def receive_into(self, buffer: memoryview) -> int:
        count = self.sock.recv_into(buffer)
        self.received += count
        return count

    def send(self, data: bytes | bytearray | memoryview) -> None:
        self.sock.sendall(data)
        self.sent += len(data)
        self.sends += 1

    def set_timeout(self, seconds: float | None) -> None:
        self.sock.settimeout(seconds)

    def limit_write(self, seconds: float) -> None:
        """Nobody here waits for so long."""

    def finish(self) -> None:
        self.finishes += 1
        self.sock.shutdown(socket.SHUT_WR)

    def shutdown(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


@contextlib.contextmanager
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far = listener.accept()[0]
    with near, far:
        for sock in (near, far):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield near, far


class Task:
    """A function in a thread; `result` waits for it and raises what it raised."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._outcome: list[Any] = []
        self._error: list[BaseException] = []

        def run() -> None:
            try:
                self._outcome.append(function(*args))
            except BaseException as error:
                self._error.append(error)

        self.thread = threading.Thread(target=run, name=f"task {function!r}")
        self.thread.start()

    def result(self, seconds: float = 20) -> Any:
        self.thread.join(seconds)
        assert not self.thread.is_alive(), "the task did not end"
        if self._error:
            raise self._error[0]
        return self._outcome[0]


def within(seconds: float) -> Callable[[], float]:
    end = time.monotonic() + seconds
    return lambda: end - time.monotonic()


def shake(sock: socket.socket, context: TlsContext, seconds: float = 5) -> TlsTransport:
    return TlsTransport.handshake(SocketCarrier(sock), context, within(seconds))


@contextlib.contextmanager
def session(server: TlsContext, client: TlsContext) -> Iterator[tuple[TlsTransport, TlsTransport]]:
    """An open connection between two of ours: the server's end, the client's end."""
    with tcp_pair() as (near, far):
        task = Task(shake, far, server)
        ours = shake(near, client)
        yield task.result(), ours


class Watched:
    """Stands in for the SSL object, and notes how many threads are inside it at once."""

    def __init__(self, ssl: rtunnel_tls._Ssl) -> None:
        self._watched, self._inside, self._count = ssl, 0, threading.Lock()
        self.calls = self.most = 0

    def __getattr__(self, name: str) -> Any:
        return functools.partial(self._call, getattr(self._watched, name))

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        with self._count:
            self._inside += 1
            self.calls += 1
            self.most = max(self.most, self._inside)
        try:
            return method(*args)
        finally:
            with self._count:
                self._inside -= 1


def receive(transport: TlsTransport, count: int) -> bytes:
    """Exactly so many bytes; fewer where the peer said that it has ended."""
    got = bytearray()
    view = memoryview(bytearray(65536))
    while len(got) < count and (n := transport.receive_into(view[: count - len(got)])):
        got += view[:n]
    return bytes(got)


def meet(
    ours: TlsContext, peer: Callable[[socket.socket], Any], carriers: list[SocketCarrier] | None = None
) -> tuple[Any, Any]:
    """Our end's outcome (the receipt, or the HandshakeError) and the other's (what `peer` returns)."""

    def play(sock: socket.socket) -> Any:
        with sock:
            return peer(sock)

    with tcp_pair() as (near, far):
        task = Task(play, far)
        carrier = SocketCarrier(near)
        if carriers is not None:
            carriers.append(carrier)
        try:
            outcome: Any = TlsTransport.handshake(carrier, ours, within(5)).receipt
        except HandshakeError as error:
            outcome = error
        near.close()
        return outcome, task.result()


# --- peers that are not ours --------------------------------------------------------------------------------

ORIGINAL_GROUPS = "MLKEM768:MLKEM512:MLKEM1024"
ORIGINAL_SIGNATURES = "mldsa65:mldsa44:mldsa87"


def raw_context(
    pair: Pair | None,
    ca: Path | None,
    *,
    groups: str = ORIGINAL_GROUPS,
    signatures: str | None = ORIGINAL_SIGNATURES,
) -> SSL.Context:
    """A second stack with settings of its own; those of the original where none are given. Verifies only with `ca`."""
    context = SSL.Context(SSL.TLS_METHOD)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    assert lib.SSL_CTX_set1_curves_list(context._context, groups.encode()) == 1
    if signatures is not None:
        assert lib.SSL_CTX_set1_sigalgs_list(context._context, signatures.encode()) == 1
    if pair is not None:
        context.use_certificate_chain_file(str(pair.cert))
        context.use_privatekey_file(str(pair.key))
    if ca is not None:
        context.load_verify_locations(str(ca))
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT)
        context.set_verify_depth(1)
    return context


def raw_peer(context: SSL.Context, role: str) -> Callable[[socket.socket], str]:
    """Shakes hands and reads to the end; tells `closed`, `eof`, or OpenSSL's reason."""

    def play(sock: socket.socket) -> str:
        connection = SSL.Connection(context, sock)
        connection.set_connect_state() if role == "client" else connection.set_accept_state()
        try:
            connection.do_handshake()
            connection.recv(1)
        except SSL.ZeroReturnError:
            return "closed"
        except SSL.SysCallError as error:
            return "eof" if error.args[0] == -1 else str(error)
        except SSL.Error as error:
            return "; ".join(entry[2] for entry in error.args[0])
        return "data"

    return play


class RawSocket:
    """A socket under the second stack's TLS, with the methods of one that a peer of the tunnel needs."""

    def __init__(self, sock: socket.socket, context: SSL.Context, role: str) -> None:
        self._sock, self._connection = sock, SSL.Connection(context, sock)
        self.settimeout(10)
        self._connection.set_connect_state() if role == "client" else self._connection.set_accept_state()
        self._connection.do_handshake()

    def settimeout(self, seconds: float) -> None:
        """Of each wait, by the kernel: Python's own timeout would make the socket non-blocking under OpenSSL."""
        self._sock.settimeout(None)
        whole, fraction = divmod(seconds, 1)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(whole), int(1e6 * fraction)))

    def sendall(self, data: bytes) -> None:
        self._connection.sendall(data)

    def recv(self, count: int) -> bytes:
        """Empty at close_notify. Raises TimeoutError, SSL.Error."""
        try:
            return bytes(self._connection.recv(count))
        except SSL.ZeroReturnError:
            return b""
        except SSL.WantReadError:
            raise TimeoutError from None

    def group(self) -> str | None:
        return self._connection.get_group_name()

    def close(self) -> None:
        """close_notify, then the end."""
        with contextlib.suppress(SSL.Error):
            self._connection.shutdown()
        self._sock.close()


def python_peer(context: ssl.SSLContext, role: str) -> Callable[[socket.socket], str]:
    """The same with Python's own `ssl`."""

    def play(sock: socket.socket) -> str:
        try:
            with context.wrap_socket(sock, server_side=role == "server") as wrapped:
                return "data" if wrapped.recv(1) else "closed"
        except ssl.SSLError as error:
            return error.reason or str(error)
        except OSError as error:
            return str(error)

    return play


class Forger:
    """Shakes hands with the second stack, then makes and reads single TLS 1.3 records by hand (RFC 8446, 5.2).

    So it can send what no honest stack would: KeyUpdates by the hundred, messages cut in two, an end without
    close_notify. AES-256-GCM only.
    """

    APPLICATION_DATA, ALERT, HANDSHAKE = 23, 21, 22

    def __init__(self, context: SSL.Context, sock: socket.socket, role: str) -> None:
        secrets: dict[str, bytes] = {}

        def log(_: SSL.Connection, line: bytes) -> None:
            label, _random, secret = line.decode().split()
            secrets[label] = bytes.fromhex(secret)

        context.set_keylog_callback(log)
        self.sock = sock
        connection = SSL.Connection(context, None)
        connection.set_connect_state() if role == "client" else connection.set_accept_state()
        self._shake(connection)
        mine, theirs = ("CLIENT", "SERVER") if role == "client" else ("SERVER", "CLIENT")
        self._sending = _Keys(secrets[f"{mine}_TRAFFIC_SECRET_0"])
        self._receiving = _Keys(secrets[f"{theirs}_TRAFFIC_SECRET_0"])
        self._sending.number = 2 if role == "server" else 0  # a server's stack has sent two tickets by itself

    def _shake(self, connection: SSL.Connection) -> None:
        done = False
        while True:
            try:
                connection.do_handshake()
                done = True
            except SSL.WantReadError:
                pass
            with contextlib.suppress(SSL.WantReadError):
                while True:
                    self.sock.sendall(connection.bio_read(65536))
            if done:
                return
            # Whole records only, and none beyond the handshake: those are for the hand-made layer.
            head = self._exactly(5)
            connection.bio_write(head + self._exactly(struct.unpack(">H", head[3:])[0]))

    def _exactly(self, count: int) -> bytes:
        got = b""
        while len(got) < count:
            more = self.sock.recv(count - len(got))
            if not more:
                raise EOFError
            got += more
        return got

    def record(self, kind: int, content: bytes, padding: int = 0) -> bytes:
        return self._sending.seal(content + bytes([kind]) + bytes(padding))

    def send(self, kind: int, content: bytes) -> None:
        self.sock.sendall(self.record(kind, content))

    def key_update(self, *, request: bool) -> bytes:
        """A KeyUpdate's record; what is sealed afterwards is under the next key."""
        sealed = self.record(self.HANDSHAKE, bytes([24, 0, 0, 1, request]))
        self._sending = self._sending.updated()
        return sealed

    def receive(self) -> tuple[int, bytes]:
        """Type and content of the next record; follows the peer's KeyUpdates. Raises EOFError."""
        head = self._exactly(5)
        plain = self._receiving.open(head, self._exactly(struct.unpack(">H", head[3:])[0])).rstrip(b"\0")
        kind, content = plain[-1], plain[:-1]
        if kind == self.HANDSHAKE and content[:1] == b"\x18":
            self._receiving = self._receiving.updated()
        return kind, content


class _Keys:
    """One direction's key, nonce base and record number (RFC 8446, 5.3 and 7.3)."""

    def __init__(self, secret: bytes) -> None:
        self.secret, self.number = secret, 0
        self.key, self.iv = AESGCM(self._expand("key", 32)), self._expand("iv", 12)

    def _expand(self, label: str, length: int) -> bytes:
        name = b"tls13 " + label.encode()
        info = struct.pack(">HB", length, len(name)) + name + b"\0"
        return HKDFExpand(hashes.SHA384(), length, info).derive(self.secret)

    def updated(self) -> _Keys:
        return _Keys(self._expand("traffic upd", 48))

    def _nonce(self) -> bytes:
        number = int.from_bytes(self.iv, "big") ^ self.number
        self.number += 1
        return number.to_bytes(12, "big")

    def seal(self, plain: bytes) -> bytes:
        head = struct.pack(">BHH", 23, 0x0303, len(plain) + 16)
        return head + self.key.encrypt(self._nonce(), plain, head)

    def open(self, head: bytes, sealed: bytes) -> bytes:
        return self.key.decrypt(self._nonce(), sealed, head)
