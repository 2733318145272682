"""Both programs over post-quantum TLS: the main job, who is refused and how both logs tell it, and what never leaks."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import secrets
import shutil
import signal
import socket
import ssl
import stat
import struct
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import Factory
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from level1 import control_address, leases, stop
from naive_peer import CLOSE_CONN, DATA, INIT, NEW_CONN, NaivePeer
from OpenSSL import SSL
from support import (
    Address,
    Program,
    Service,
    connect,
    echo_service,
    ends_with,
    eventually,
    read_all,
    read_exactly,
    running,
)
from tls_peers import House, Pair, RawSocket, Watched, raw_context, shake
from tunnels import BLOCK, Mode, Tunnel, open_tunnel, text

import rtunnel
import rtunnel_tls

PROFILES = pytest.mark.parametrize("profile", list(rtunnel_tls.PROFILES))
GROUPS = {"default": "X25519MLKEM768", "hybrid": "X25519MLKEM768", "pure": "MLKEM768", "cnsa2": "MLKEM1024"}
SOON = {"FIRST_RETRY_S": 0.05, "REFUSED_RETRY_S": 0.05}  # limits of a client that comes back at once
ONCE = {"FIRST_RETRY_S": 60.0, "REFUSED_RETRY_S": 60.0}  # of one whose second attempt no test sees
Opened = Callable[..., Tunnel]


@pytest.fixture
def tunnel(server: Factory, client: Factory, house: House, big_house: House) -> Opened:
    """Opens a tunnel over TLS to a local service."""

    def opened(local: Service, profile: str = "default", **limits: Any) -> Tunnel:
        which = big_house if profile == "cnsa2" else house
        mode = Mode(which.flags("server", profile), which.flags("client", profile))
        return open_tunnel(server, client, local, mode=mode, **limits)

    return opened


# --- the main job -------------------------------------------------------------------------------------------


def push(sock: socket.socket, megabytes: int) -> None:
    for _ in range(megabytes):
        sock.sendall(BLOCK)


def pull(sock: socket.socket, megabytes: int) -> None:
    """So much comes, and is what `push` sends."""
    expected, got = memoryview(BLOCK), memoryview(bytearray(len(BLOCK)))
    for _ in range(megabytes):
        count = 0
        while count < len(got):
            more = sock.recv_into(got[count:])
            assert more, "it ends too early"
            count += more
        assert got == expected


@PROFILES
def test_100_mb_both_ways_at_once(tunnel: Opened, profile: str) -> None:
    """100 MB in each direction at the same time arrive whole, over the group and the signature of the profile: so many
    over the usual one, of the others, whose handshake alone is another, 10 MB."""
    megabytes = 100 if profile == "default" else 10

    def both(sock: socket.socket) -> None:
        with running(lambda: push(sock, megabytes)):
            pull(sock, megabytes)

    with Service(both) as service:
        opened = tunnel(service, profile)
        with opened.connect() as visitor:
            with running(lambda: push(visitor, megabytes)):
                pull(visitor, megabytes)
            assert read_all(visitor) == b""
        for end in opened[:2]:
            receipt = end.wait_for("handshake")
            assert (receipt["version"], receipt["group"]) == ("TLSv1.3", GROUPS[profile])
            assert receipt["signature"] == ("mldsa87" if profile == "cnsa2" else "mldsa65")
            assert not any(record.level in ("WARNING", "ERROR") for record in end.records)


@PROFILES
def test_killed_ends_come_back_and_stop_cleanly(
    server: Factory, client: Factory, house: House, big_house: House, profile: str
) -> None:
    """A server that is killed, and then a client, serve again when they are back; both stop with status 0."""
    which = big_house if profile == "cnsa2" else house
    with echo_service() as service:
        first = server(*which.flags("server", profile))
        address = text(first.control_address)
        flags = ("--server", address, "--local", service.text, *which.flags("client", profile))
        asking = client(*flags, limits=SOON)
        public = first.lease_address()
        with connect(public) as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            first.kill()
            assert ends_with(visitor) == "reset"
        second = server("--control-listen", address, *which.flags("server", profile))
        Tunnel(second, asking, second.lease_address()).check_echo()
        asking.kill()
        second.wait_for("session-closed")
        again = client(*flags, "--remote-port", str(public[1]))
        Tunnel(second, again, second.lease_address()).check_echo()
        assert [again.stop(signal.SIGINT), second.stop(signal.SIGTERM)] == [0, 0]
        assert "client: stopping" in second.wait_for("lease-closed", address=text(public))["reason"]


# --- who is refused -----------------------------------------------------------------------------------------


def meet(
    server: Factory, client: Factory, server_flags: tuple[str, ...], client_flags: tuple[str, ...]
) -> tuple[str, str]:
    """What a server and a client that do not get on say about it, each in its one line above `info`."""
    serving = server(*server_flags)
    address = text(serving.control_address)
    asking = client("--server", address, "--local", "127.0.0.1:1", *client_flags, limits=ONCE)

    def warnings(end: Program) -> list[str]:
        return [record.fields["reason"] for record in end.records if record.level in ("WARNING", "ERROR")]

    for end in (serving, asking):
        eventually(lambda end=end: warnings(end), what="a warning")  # type: ignore[misc]
        assert not end.events("session-opened")
    serving.stop()
    asking.stop()
    (told_by_server,), (told_by_client,) = warnings(serving), warnings(asking)
    return told_by_server, told_by_client


@pytest.fixture(scope="module")
def other_house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The certificates of somebody else."""
    return House(tmp_path_factory.mktemp("other") / "pki")


def test_a_client_of_another_authority(server: Factory, client: Factory, house: House, other_house: House) -> None:
    """The server names the rule; the client, which trusted the server, learns of it by the alert."""
    files = other_house.files("client") | {"ca": house.ca}
    assert meet(server, client, house.flags("server"), house.flags("client", **files)) == (
        "authority: unable to get local issuer certificate",
        "alert from the peer: unknown ca",
    )


def test_a_server_of_another_authority(server: Factory, client: Factory, house: House, other_house: House) -> None:
    """The client names the rule, the server the alert."""
    assert meet(server, client, other_house.flags("server"), house.flags("client", ca=house.ca)) == (
        "alert: refused by the peer: unknown ca",
        "authority: unable to get local issuer certificate",
    )


@pytest.mark.parametrize("name", ["tunnel.example.org", "192.0.2.1"])
def test_a_server_with_another_name(server: Factory, client: Factory, house: House, name: str) -> None:
    """A server whose certificate does not name what --tls-server-name demands is refused by the client (defect 2)."""
    flags = (*house.flags("client"), "--tls-server-name", name)
    by_server, by_client = meet(server, client, house.flags("server"), flags)
    assert by_server == "alert: refused by the peer: bad certificate"
    assert re.fullmatch(r"name: the certificate is for .+, not for \S+", by_client)


def test_the_name_that_counts_is_the_one_that_was_dialled(server: Factory, client: Factory, tmp_path: Path) -> None:
    """Without --tls-server-name the certificate must name the host of --server; with it, another address will do."""
    house = House(tmp_path / "pki", hosts=["tunnel.example.org"])
    by_name = "name: the certificate is for tunnel.example.org, not for 127.0.0.1"
    by_server, by_client = meet(server, client, house.flags("server"), house.flags("client"))
    assert (by_server, by_client) == ("alert: refused by the peer: bad certificate", by_name)
    named = Mode(house.flags("server"), (*house.flags("client"), "--tls-server-name", "tunnel.example.org"))
    with echo_service() as service:
        open_tunnel(server, client, service, mode=named).check_echo()


@pytest.mark.parametrize(("ours", "theirs"), [("pure", "hybrid"), ("hybrid", "pure"), ("cnsa2", "pure")])
def test_profiles_that_have_nothing_in_common(
    server: Factory, client: Factory, house: House, big_house: House, ours: str, theirs: str
) -> None:
    """The server names the group or the certificate that is missing, the client the alert."""
    weak = {"cert": house.files("client")["cert"], "key": house.files("client")["key"]} if ours == "cnsa2" else {}
    flags = big_house.flags("client", theirs, **weak)
    told = meet(server, client, big_house.flags("server", ours), flags)
    assert told in (
        ("group: no suitable key share", "alert: refused by the peer: handshake failure"),
        ("certificate: peer did not return a certificate", "alert from the peer: certificate required"),
    )
    assert told[0].startswith("certificate" if weak else "group")


def test_a_plain_client_of_a_tls_server(server: Factory, client: Factory, house: House) -> None:
    """Each says what it has seen: the client an alert, where it waits for a frame."""
    assert meet(server, client, house.flags("server"), ("--no-tls",)) == (
        "tls: the peer speaks the tunnel in plain mode; start both ends with --tls",
        "the peer speaks TLS and this end does not: start both with --tls, or both without",
    )


def test_a_tls_client_of_a_plain_server(server: Factory, client: Factory, house: House) -> None:
    """The server knows a ClientHello, and the client says that it was closed."""
    by_server, by_client = meet(server, client, ("--no-tls",), house.flags("client"))
    assert by_server == "the peer speaks TLS and this end does not: start both with --tls, or both without"
    assert by_client.startswith("closed: ")


def test_a_client_without_a_certificate(server: Factory, house: House) -> None:
    """A peer that shows no certificate is refused and told, and the next one that does is served."""
    serving = server(*house.flags("server"))
    with contextlib.closing(connect(serving.control_address)) as sock:
        stranger = RawSocket(sock, raw_context(None, house.ca, groups="X25519MLKEM768"), "client")
        with pytest.raises(SSL.Error, match="certificate required"):
            stranger.recv(1)
    assert serving.wait_for("refused")["reason"] == "certificate: peer did not return a certificate"
    with contextlib.closing(connect(serving.control_address)) as sock:
        shake(sock, house.client(name="127.0.0.1"))
        assert serving.wait_for("handshake")["identity"] == "client"


def test_a_clients_certificate_on_a_server(server: Factory, client: Factory, house: House) -> None:
    """A client of the same authority cannot play the server: our client refuses it (defect 2), and so does, at its
    start, our server."""
    files = house.files("client")
    starting = server(*house.flags("server", cert=files["cert"], key=files["key"]))
    assert starting.wait() == 2
    assert "purpose: the certificate of CN=client is no server's" in "\n".join(starting.lines)
    assert "pki issue" in "\n".join(starting.lines)
    pair = Pair.__new__(Pair)
    pair.cert, pair.key = files["cert"], files["key"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        flags = ("--server", text(listener.getsockname()), "--local", "127.0.0.1:1", *house.flags("client", "pure"))
        asking = client(*flags, limits=ONCE)
        listener.settimeout(10)
        with listener.accept()[0] as sock, pytest.raises(SSL.Error):
            RawSocket(sock, raw_context(pair, house.ca), "server")
        assert asking.wait_for("connect-failed")["reason"].startswith("purpose: ")


def test_an_end_without_close_notify_is_told(server: Factory, house: House) -> None:
    """A client whose connection is cut is one whose session was truncated; one that says goodbye was not."""
    serving = server(*house.flags("server"))
    for notify, told in ((True, "closed by the peer"), (False, "truncated: ended without close_notify")):
        with contextlib.closing(connect(serving.control_address)) as sock:
            transport = shake(sock, house.client(name="127.0.0.1"))
            transport.send(struct.pack(">BII", INIT, 0, 6) + b"0:h:1\n")
            serving.wait_for("session-opened")
            transport.finish() if notify else sock.shutdown(socket.SHUT_WR)
            assert serving.wait_for("session-closed")["reason"] == told


# --- defects of the original --------------------------------------------------------------------------------


def test_defect_05_silent_connections_delay_nobody(server: Factory, house: House) -> None:
    """50 connections to the control port that say nothing do not delay a good client by more than a second."""
    serving = server(*house.flags("server"))
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(connect(serving.control_address))
        begun = time.monotonic()
        transport = shake(stack.enter_context(connect(serving.control_address)), house.client(name="127.0.0.1"))
        transport.send(struct.pack(">BII", INIT, 0, 6) + b"0:h:1\n")
        serving.wait_for("session-opened")
        assert time.monotonic() - begun < 1.0


def test_defect_03_what_is_idle_uses_no_processor_time(tunnel: Opened) -> None:
    """An open tunnel with idle visitors, and a connection that is silent in its handshake, use no processor time."""
    with echo_service() as service, ExitStack() as stack:
        opened = tunnel(service)
        for _ in range(5):
            visitor = stack.enter_context(opened.connect())
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
        stack.enter_context(connect(opened.server.control_address))
        used = [end.cpu_seconds() for end in opened[:2]]
        threading.Event().wait(0.5)  # a time in which nothing must happen
        assert [end.cpu_seconds() - before <= 0.05 for end, before in zip(opened[:2], used, strict=True)] == [True] * 2


def test_defect_04_a_slow_visitor_loses_nothing(tunnel: Opened) -> None:
    """A visitor that reads slowly, through small buffers, gets each of 8 MB."""
    with Service(lambda sock: push(sock, 8)) as service:
        opened = tunnel(service)
        with socket.socket() as visitor:
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32768)
            visitor.settimeout(10)
            visitor.connect(opened.public)
            pace, digest, count = threading.Event(), hashlib.sha256(), 0
            while part := visitor.recv(1 << 18):
                digest.update(part)
                count += len(part)
                pace.wait(0.002)
        assert count == 8 * len(BLOCK)
        assert digest.digest() == hashlib.sha256(BLOCK * 8).digest()


def test_defect_04_a_slow_peer_loses_nothing(server: Factory, house: House) -> None:
    """A peer that takes its records slowly, so that TLS itself has to wait, gets each of 4 MB: no frame vanishes."""
    serving = server(*house.flags("server", "pure"))
    with original_client(serving, house, receive_buffer=8192) as peer:
        peer.send_init(b"0:127.0.0.1:80")
        with connect(serving.lease_address()) as visitor:
            peer.expect(NEW_CONN, 1)
            with running(lambda: (push(visitor, 4), visitor.shutdown(socket.SHUT_WR))):
                pace, received = threading.Event(), bytearray()
                while (heard := peer.read_frame())[0] == DATA:
                    received += heard[2]
                    pace.wait(0.001)
            assert heard[:2] == (CLOSE_CONN, 1)
            assert received == BLOCK * 4


# --- the original's settings --------------------------------------------------------------------------------


def original_pair(house: House, role: str) -> Pair:
    pair = Pair.__new__(Pair)
    pair.cert, pair.key = house.files(role)["cert"], house.files(role)["key"]
    return pair


@contextlib.contextmanager
def original_client(serving: Program, house: House, *, receive_buffer: int = 0) -> Iterator[NaivePeer]:
    """A peer of level 0 with the original's TLS: its groups and signatures, no SNI, one leaf, depth 1."""
    with socket.socket() as sock:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.connect(serving.control_address)
        tls = RawSocket(sock, raw_context(original_pair(house, "client"), house.ca), "client")
        assert "MLKEM" in (tls.group() or "")
        with NaivePeer(tls) as peer:  # type: ignore[arg-type]
            yield peer


def test_the_originals_client_is_served(server: Factory, house: House) -> None:
    """The original's client gets the port that it asks for, and its visitors, from a server with profile `pure`."""
    serving = server(*house.flags("server", "pure"))
    with original_client(serving, house) as peer:
        peer.send_init(b"0:127.0.0.1:80")
        opened = serving.wait_for("session-opened")
        assert (opened["level"], opened["identity"]) == ("0", "client")
        assert serving.wait_for("handshake")["group"] == "MLKEM768"
        public = serving.lease_address()
        for stream in (1, 2):
            with connect(public) as visitor:
                peer.expect(NEW_CONN, stream)
                visitor.sendall(b"GET")
                peer.expect(DATA, stream, b"GET")
                for at in range(0, 1 << 18, 4096):  # the original reads its sockets so
                    peer.send_frame(DATA, stream, BLOCK[at : at + 4096])
                peer.send_frame(CLOSE_CONN, stream)
                assert read_all(visitor) == BLOCK[: 1 << 18]
                peer.expect(CLOSE_CONN, stream)
    assert serving.wait_for("session-closed")["level"] == "0"


def test_the_originals_server_serves(client: Factory, house: House) -> None:
    """Our client with profile `pure` serves the visitors of the original's server, at level 0."""
    with socket.create_server(("127.0.0.1", 0)) as listener, echo_service() as service:
        flags = ("--server", text(listener.getsockname()), "--local", service.text, "--remote-port", "8080")
        asking = client(*flags, *house.flags("client", "pure"), limits=ONCE)
        listener.settimeout(10)
        with listener.accept()[0] as sock:
            tls = RawSocket(sock, raw_context(original_pair(house, "server"), house.ca), "server")
            with NaivePeer(tls) as peer:  # type: ignore[arg-type]
                kind, stream, payload = peer.read_frame()
                assert (kind, stream) == (INIT, 0)
                assert payload.startswith(f"8080:{service.text}".encode())
                for stream in (1, 2):
                    peer.send_frame(NEW_CONN, stream)
                    peer.send_frame(DATA, stream, b"hello")
                    peer.expect_data(stream, b"hello")
                    peer.send_frame(CLOSE_CONN, stream)
                    peer.expect(CLOSE_CONN, stream)
        assert asking.wait_for("handshake")["group"] == "MLKEM768"
        assert asking.wait_for("session-opened")["level"] == "0"
        asking.wait_for("session-closed")


# --- what is secret -----------------------------------------------------------------------------------------


def forbidden(house: House, *words: bytes) -> list[str]:
    """Words in each form that a log could show them in; and the keys of a house: their lines, bytes and seeds."""
    shown = [*words]
    for role in ("ca", "server", "client"):
        pem = (house.folder / f"{role}.key").read_bytes()
        key = serialization.load_pem_private_key(pem, None)
        shown += [*pem.splitlines()[1:-1], key.private_bytes_raw()]  # type: ignore[union-attr]
    forms = [form for each in shown for form in (each.decode("latin-1"), each.hex(), base64.b64encode(each).decode())]
    return [*forms, "PRIVATE KEY"]


def test_nothing_secret_is_in_any_log(server: Factory, client: Factory, house: House, tmp_path: Path) -> None:
    """Neither payload, key, instance nor traffic secret is in what both ends log at debug level, on good days and on
    bad ones; where SSLKEYLOGFILE asks for the secrets, a warning says so, and nobody else can read the file."""
    marker, instance = secrets.token_hex(16).encode(), secrets.token_hex(16).encode()
    keylog = tmp_path / "keys.log"
    serving = server(*house.flags("server"), env={"SSLKEYLOGFILE": str(keylog)})
    with echo_service() as service:
        flags = ("--server", text(serving.control_address), "--local", service.text, *house.flags("client"))
        asking = client(*flags, limits=ONCE)
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(marker)
            assert read_exactly(visitor, len(marker)) == marker
    with contextlib.closing(connect(serving.control_address)) as sock:  # a client whose instance is known, then garbage
        transport = shake(sock, house.client(name="127.0.0.1"))
        init = b"0:127.0.0.1:80\nversion=1\nwindow=65536\ninstance=" + instance
        transport.send(struct.pack(">BII", INIT, 0, len(init)) + init)
        peer = sock.getsockname()
        serving.wait_for("session-opened", peer=text(peer))
        transport.send(struct.pack(">BII", DATA, 99, len(marker)) + marker)
        serving.wait_for("session-closed", peer=text(peer))
    with contextlib.closing(connect(serving.control_address)) as sock:
        sock.sendall(marker)
        serving.wait_for("refused")
    traffic = [bytes.fromhex(line.split()[2]) for line in keylog.read_text().splitlines()]
    assert "CLIENT_TRAFFIC_SECRET_0" in keylog.read_text()
    assert stat.S_IMODE(keylog.stat().st_mode) == 0o600
    assert serving.wait_for("secrets-logged")["file"] == str(keylog)
    assert not asking.events("secrets-logged")
    asking.stop()
    serving.stop()
    log = "\n".join([*serving.lines, *asking.lines])
    assert len(log) > 2000
    for secret in forbidden(house, marker, instance, *traffic):
        assert secret not in log


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_key_that_others_can_read(program: Factory, house: House, tmp_path: Path, role: str) -> None:
    """Neither program starts with a key that others can read; the sentence names the file and the command."""
    key = tmp_path / "some.key"
    shutil.copy(house.files(role)["key"], key)
    key.chmod(0o640)
    needed = ("--server", "127.0.0.1:1", "--local", "127.0.0.1:1") if role == "client" else ()
    starting = program(role, *needed, *house.flags(role, key=key))
    assert starting.wait() == 2
    assert starting.lines == [
        f"rtunnel {role}: --tls-key {key}: others can read it; run: chmod 600 {key}",
    ]


# --- plain mode, and warnings -------------------------------------------------------------------------------


def test_plain_mode_says_what_it_means(server: Factory, client: Factory) -> None:
    """Without TLS, one warning says what that means where the address is not a loopback one, and none where it is."""
    opened = server("--control-listen", ":0")
    assert "anybody may connect" in opened.wait_for("plain-mode", address=":0")["meaning"]
    asking = client("--server", "192.0.2.1:7000", "--local", "127.0.0.1:1", "--no-tls")
    assert "nothing is encrypted" in asking.wait_for("plain-mode", address="192.0.2.1:7000")["meaning"]
    local = server()
    nearby = client("--server", text(local.control_address), "--local", "127.0.0.1:1")
    local.wait_for("session-opened")
    assert [end.events("plain-mode") for end in (local, nearby)] == [[], []]


def test_the_shipped_files_ask_for_tls(program: Factory, tmp_path: Path) -> None:
    """`-c conf/server.ini` and `-c conf/client.ini` want certificates: without any they tell how to make them."""
    for role in ("server", "client"):
        nothing = [f"--tls-{what}={tmp_path / 'none'}" for what in ("cert", "key", "ca")]
        starting = program(role, "-c", f"conf/{role}.ini", *nothing)
        assert starting.wait() == 2
        assert "pki init" in starting.lines[0]


def test_certificates_that_end_soon_are_warned_of(server: Factory, client: Factory, tmp_path: Path) -> None:
    """With 30 days or fewer left, its owner's start and the receipt at the other end give a warning; with 31 none."""
    house = House(tmp_path / "pki")
    rtunnel_tls.issue(house.folder, "client", hosts=None, days=31, force=True)
    rtunnel_tls.issue(house.folder, "server", hosts=["localhost", "127.0.0.1"], days=32, force=True)
    with echo_service() as service:
        opened = open_tunnel(server, client, service, mode=Mode(house.flags("server"), house.flags("client")))
        assert opened.client.wait_for("certificate-expires")["certificate"] == str(house.files("client")["cert"])
        assert opened.server.wait_for("certificate-expires", certificate="client")["days_left"] == "30"
        assert len(opened.client.events("certificate-expires")) == len(opened.server.events("certificate-expires")) == 1


def test_certificates_are_looked_at_daily(server: Factory, tmp_path: Path) -> None:
    """Nobody restarts a tunnel that works: the warning comes again, each day, here each tenth of a second; a reload
    changes what is warned of."""
    house = House(tmp_path / "pki")
    rtunnel_tls.issue(house.folder, "server", hosts=["localhost"], days=20, force=True)
    serving = server(*house.flags("server"), limits={"EXPIRY_CHECK_S": 0.1})
    serving.wait_for_count(3, "certificate-expires", certificate=house.files("server")["cert"])
    rtunnel_tls.issue(house.folder, "server", hosts=["localhost"], force=True)
    serving.send_signal(signal.SIGHUP)
    serving.wait_for("reloaded")
    warned = len(serving.events("certificate-expires"))
    rtunnel_tls.issue(house.folder, "server", hosts=["localhost"], days=10, force=True)
    serving.send_signal(signal.SIGHUP)
    serving.wait_for("certificate-expires", days_left="9")
    assert len(serving.events("certificate-expires", days_left="19")) <= warned


# --- pki ----------------------------------------------------------------------------------------------------


def test_pki_by_the_command_line(
    program: Factory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In a fresh folder: init, issue, revoke and show make files with the right modes that other programs read, and
    with which a tunnel's ends start."""
    monkeypatch.chdir(tmp_path)

    def pki(*arguments: str) -> str:
        assert rtunnel.main(["pki", *arguments]) == 0
        return capsys.readouterr().out

    assert pki("init").splitlines()[0] == str(Path("conf/pki/ca.crt"))
    pki("issue", "server", "--server", "localhost", "127.0.0.1")
    pki("issue", "laptop", "--client")
    pki("issue", "thief", "--client", "--days", "30")
    assert pki("revoke", "thief").splitlines()[0] == str(Path("conf/pki/crl.pem"))
    folder = tmp_path / "conf" / "pki"
    modes = {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in folder.iterdir()}
    certificates = ["ca.crt", "server.crt", "laptop.crt", "thief.crt", "crl.pem", "issued.pem"]
    keys = [".lock", "ca.key", "server.key", "laptop.key", "thief.key"]
    assert modes == dict.fromkeys(certificates, "0o644") | dict.fromkeys(keys, "0o600")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700

    shown = pki("show")
    assert re.findall(r"  revoked +(\w+)", shown) == ["no", "no", "no", "YES"]  # ca, laptop, server, thief
    assert "localhost, 127.0.0.1" in pki("show", "conf/pki/server.crt")
    laptop = x509.load_pem_x509_certificate((folder / "laptop.crt").read_bytes())
    assert laptop.subject.rfc4514_string() == "CN=laptop"
    assert ssl.PEM_cert_to_DER_cert((folder / "laptop.crt").read_text()) == laptop.public_bytes(
        serialization.Encoding.DER
    )

    assert rtunnel.main(["pki", "issue", "laptop", "--client"]) == 2
    assert "conf/pki/laptop.crt exists; --force replaces it" in capsys.readouterr().err
    before = (folder / "laptop.key").read_bytes()
    pki("issue", "laptop", "--client", "--force")
    assert (folder / "laptop.key").read_bytes() != before

    files = {role: [f"--tls-cert={folder / name}.crt", f"--tls-key={folder / name}.key", f"--tls-ca={folder}/ca.crt"]
             for role, name in (("server", "server"), ("client", "laptop"))}  # fmt: skip
    files["server"].append(f"--tls-crl={folder}/crl.pem")
    serving = program("server", "-c", "conf/server.ini", "--control-listen", "127.0.0.1:0", *files["server"])
    address = text(serving.control_address)
    asking = program("client", "--tls", "--server", address, "--local", "127.0.0.1:1", *files["client"])
    assert serving.wait_for("session-opened")["identity"] == "laptop"
    assert asking.wait_for("handshake")["identity"] == "server"


# --- threads ------------------------------------------------------------------------------------------------


def test_sessions_never_put_two_threads_into_one_ssl_object(monkeypatch: pytest.MonkeyPatch, house: House) -> None:
    """With visitors that load a tunnel in both directions, and others that come and go all the time, no two threads are
    ever inside the same SSL object, while readers, pumps and control senders all get into it."""
    watched: list[Watched] = []

    def watch(context: rtunnel_tls.TlsContext) -> Watched:
        watched.append(ByThread(ssl_object(context)))
        return watched[-1]

    ssl_object = rtunnel_tls._Ssl
    monkeypatch.setattr(rtunnel_tls, "_Ssl", watch)
    loopback = rtunnel.Address("127.0.0.1", 0)
    settings = rtunnel.Settings(control_listen=loopback, public_listen=loopback)
    serving = rtunnel.Server(settings, house.server())
    over, threads = time.monotonic() + 1.0, 4

    def both(sock: socket.socket) -> None:
        def push_on() -> None:
            while time.monotonic() < over:
                sock.sendall(BLOCK)
            sock.shutdown(socket.SHUT_WR)

        with running(push_on):
            while sock.recv(1 << 18):
                pass

    def come_and_go() -> None:
        while time.monotonic() < over:
            with connect(public) as visitor:
                visitor.recv(64)

    with Service(both) as service, ExitStack() as stack:
        stack.callback(stop, serving)
        serving.start()
        asking = rtunnel.Client(
            [rtunnel.Mapping(0, rtunnel.Address(*service.address), rtunnel.Address(*control_address(serving)))],
            rtunnel.Settings(reconnect_max=1.0),
            house.client(name="127.0.0.1"),
        )
        stack.callback(stop, asking)
        asking.start()
        public = public_address(serving)
        for _ in range(threads):
            visitor = stack.enter_context(connect(public))
            stack.enter_context(running(lambda visitor=visitor: both(visitor)))  # type: ignore[misc]
        for _ in range(threads):
            stack.enter_context(running(come_and_go))
    assert len(watched) == 2
    for each in watched:
        assert isinstance(each, ByThread)
        assert each.most == 1
        assert each.calls > 1000
        assert "_send_control" in each.functions
        assert len(each.threads) >= 1 + threads


class ByThread(Watched):
    """Notes the threads, and the functions that they are in, too."""

    def __init__(self, ssl: rtunnel_tls._Ssl) -> None:
        super().__init__(ssl)
        self.threads: set[int] = set()
        self.functions: set[str] = set()

    def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        self.threads.add(threading.get_ident())
        self.functions |= {frame.f_code.co_name for frame, _ in traceback.walk_stack(None)}
        return super()._call(method, *args)


def public_address(serving: rtunnel.Server) -> Address:
    """Where visitors of the global port go, as soon as there is a client."""

    def found() -> list[rtunnel.Lease]:
        return [lease for lease in leases(serving) if lease.sessions]

    address = eventually(found)[0].address
    return "127.0.0.1", address.port
