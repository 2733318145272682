"""Revocation and rotation without a restart (OPERATIONS.md, "How it behaves")."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from level1 import Peer, PeerServer, Unwelcome, stop
from support import Program, Service, connect, echo_service, ends_with, eventually, free_port, read_exactly, running
from tls_peers import House
from tunnels import Factory, text

import rtunnel
import rtunnel_tls


@pytest.fixture
def own(tmp_path: Path) -> House:
    """Certificates that a test may revoke and replace: server, client (of alice and bob), and a revocation list."""
    house = House(tmp_path / "pki")
    for name in ("alice", "bob"):
        rtunnel_tls.issue(house.folder, name, hosts=None)
    return house


class Guarded:
    """A server with certificates and a revocation list, and its clients, each with a name and a port of its own."""

    def __init__(self, server: Factory, client: Factory, house: House, service: Service) -> None:
        self.house, self._client, self._service = house, client, service
        self.server = server(*house.flags("server", crl=house.crl))
        self.ports: dict[str, int] = {}

    def open(self, name: str, *flags: str) -> Program:
        """A client with that name, connected."""
        program = self.start(name, *flags)
        program.wait_for("session-opened")
        return program

    def start(self, name: str, *flags: str, port: int = 0) -> Program:
        files = {"cert": self.house.folder / f"{name}.crt", "key": self.house.folder / f"{name}.key"}
        self.ports[name] = port or self.ports.get(name) or free_port()
        where = ("--server", text(self.server.control_address), f"--forward={self.ports[name]}:{self._service.text}")
        return self._client(*self.house.flags("client", **files), *where, "--reconnect-max=0.1", *flags)

    def reload(self) -> None:
        self.server.send_signal(signal.SIGHUP)

    def visit(self, name: str) -> socket.socket:
        """A visitor that has been answered."""
        sock = connect(("127.0.0.1", self.ports[name]))
        check_echo(sock)
        return sock


def says(program: Program, words: str) -> None:
    """Wait until its log has these words."""
    eventually(lambda: any(words in line for line in program.lines), what=words)


def check_echo(sock: socket.socket) -> None:
    sock.sendall(b"marco")
    assert read_exactly(sock, 5) == b"marco"


@pytest.fixture
def guarded(server: Factory, client: Factory, own: House) -> Iterator[Guarded]:
    with echo_service() as service:
        yield Guarded(server, client, own, service)


def test_a_revoked_certificate(guarded: Guarded) -> None:
    """A connected client whose certificate is revoked is cut within a second of the reload, and refused afterwards;
    its port is free; others keep their streams. A renewed certificate of that name is admitted, without a restart."""
    alice, bob = guarded.open("alice"), guarded.open("bob")
    with guarded.visit("alice") as hers, guarded.visit("bob") as his:
        rtunnel_tls.revoke(guarded.house.folder, "alice")
        check_echo(hers)  # until the reload
        guarded.reload()
        hers.settimeout(1.0)
        assert ends_with(hers) == "reset"
        check_echo(his)
        assert guarded.server.wait_for("expelled")["identity"] == "alice"
        says(alice, "alert from the peer: certificate revoked")
        assert "revoked" in guarded.server.wait_for("refused")["reason"]
        with socket.socket() as other:
            other.bind(("127.0.0.1", guarded.ports["alice"]))  # raises where the port is taken
        assert len(bob.events("session-opened")) == 1
        rtunnel_tls.issue(guarded.house.folder, "alice", hosts=None, force=True)
        alice.wait_for("session-opened")
        guarded.visit("alice").close()
        check_echo(his)


def test_a_new_server_certificate_under_load(guarded: Guarded) -> None:
    """The server's certificate is replaced under load: no stream is lost, and new handshakes show the new one."""
    alice = guarded.open("alice")
    old = alice.wait_for("handshake")["sha256"]
    done, rounds = threading.Event(), [0] * 8
    with contextlib.ExitStack() as stack:
        for number in range(len(rounds)):

            def load(number: int = number) -> None:
                with guarded.visit("alice") as visitor:
                    while not done.is_set():
                        check_echo(visitor)
                        rounds[number] += 1

            stack.enter_context(running(load))
        stack.callback(done.set)
        for _ in range(3):
            eventually(lambda: min(rounds) > 10)
            rtunnel_tls.issue(guarded.house.folder, "server", hosts=["127.0.0.1"], force=True)
            guarded.reload()
            guarded.server.wait_for("reloaded")
            rounds[:] = [0] * len(rounds)
        bob = guarded.open("bob")
        eventually(lambda: min(rounds) > 10)
    assert bob.wait_for("handshake")["sha256"] != old
    assert len(alice.events("session-opened")) == 1


def test_a_new_authority(guarded: Guarded, tmp_path: Path) -> None:
    """With another authority new handshakes are judged by the new one; live sessions stay."""
    alice = guarded.open("alice")
    other = House(tmp_path / "other")
    with guarded.visit("alice") as visitor:
        for name in ("ca.crt", "server.crt", "server.key", "crl.pem"):
            (other.folder / name).replace(guarded.house.folder / name)
        guarded.reload()
        guarded.server.wait_for("reloaded")
        says(guarded.start("bob"), "unknown ca")
        check_echo(visitor)
    assert len(alice.events("session-opened")) == 1


BREAK: dict[str, Any] = {
    "certificate": lambda house: (house.folder / "server.crt").write_text("-----BEGIN"),
    "no certificate": lambda house: (house.folder / "server.crt").unlink(),
    "another's key": lambda house: (house.folder / "alice.key").replace(house.folder / "server.key"),
    "authority": lambda house: house.ca.write_bytes(b"\x00"),
    "no list": lambda house: house.crl.write_text(""),
    "lost list": lambda house: house.crl.unlink(),
}


@pytest.mark.parametrize("what", BREAK)
def test_a_broken_file(guarded: Guarded, what: str) -> None:
    """A broken new file is refused with one log line, and the old one stays in use."""
    guarded.server.wait_for("listening")
    BREAK[what](guarded.house)
    lines = len(guarded.server.lines)
    guarded.reload()
    assert guarded.server.wait_for("reload-failed")["reason"].startswith("--tls-")
    assert len(guarded.server.lines) == lines + 1
    if what not in ("authority", "another's key"):  # which the client needs, too
        guarded.open("alice")


@pytest.mark.parametrize(
    "lines",
    [
        ["control-listen = 127.0.0.1:0", "tsl = true"],
        ["control-listen = 127.0.0.1:0", "allow = anonymous=x"],
        ["control-listen = 127.0.0.1:0", "visitors = x"],
        ["control-listen = 127.0.0.1:0", "tls = [true]"],
        ["control-listen = [127.0.0.1:0, 127.0.0.1:1]"],
        ["control-listen = nowhere"],
        None,
    ],
)
def test_a_broken_configuration(program: Factory, tmp_path: Path, lines: list[str] | None) -> None:
    """A configuration file that has become wrong, or is gone, is refused as a whole with one log line; what counted
    before goes on."""
    config = tmp_path / "server.ini"
    config.write_text("control-listen = 127.0.0.1:0\nallow = anonymous=1\n")
    serving = program("server", "-c", str(config))
    serving.wait_for("listening")
    config.unlink()
    if lines is not None:
        config.write_text("\n".join(lines))
    before = len(serving.lines)
    serving.send_signal(signal.SIGHUP)
    serving.wait_for("reload-failed")
    assert len(serving.lines) == before + 1
    with pytest.raises(Unwelcome, match="port-denied"):
        Peer.as_client(serving.control_address)
    assert serving.stop() == 0


@pytest.mark.parametrize(
    ("line", "ignored"),
    [
        ("tls = true", "tls"),
        ("control-listen =", "control-listen"),
        ("control-listen = 127.0.0.1:1", "control-listen"),
        ("public-listen = 127.0.0.1:0", "public-listen"),
        ("log-level = error", "log-level"),
    ],
)
def test_what_wants_a_restart(program: Factory, tmp_path: Path, line: str, ignored: str) -> None:
    """What a reload cannot change stays as it was, and a line names it; the rest of the file counts."""
    config = tmp_path / "server.ini"
    config.write_text("control-listen = 127.0.0.1:0\npublic-bind = 127.0.0.1\n")
    serving = program("server", "-c", str(config))
    control = serving.control_address
    kept = "" if ignored == "control-listen" else "control-listen = 127.0.0.1:0\n"
    config.write_text(f"public-bind = 127.0.0.1\n{kept}{line}\nallow = nobody=1\n")
    serving.send_signal(signal.SIGHUP)
    assert serving.wait_for("reload-ignored")["settings"] == ignored
    serving.wait_for("reloaded")
    with pytest.raises(Unwelcome, match="port-denied"):
        Peer.as_client(control)


def without_tls(own: House) -> str:
    """The lines of a server's configuration that has all of TLS but the switch and a list."""
    files = own.files("server").items()
    return "control-listen = 127.0.0.1:0\n" + "".join(f"tls-{option} = {file}\n" for option, file in files)


def started(program: Factory, config: Path, lines: str) -> Program:
    """A server that serves by these lines."""
    config.write_text(lines)
    serving: Program = program("server", "-c", str(config))
    serving.wait_for("listening")
    return serving


def test_revocation_is_not_turned_off(program: Factory, own: House, tmp_path: Path) -> None:
    """A file that was emptied, as on a full disk, does not let those in again who are revoked."""
    rtunnel_tls.revoke(own.folder, "alice")
    config, lines = tmp_path / "server.ini", without_tls(own) + "tls = true\n"
    serving = started(program, config, f"{lines}tls-crl = {own.crl}\n")
    config.write_text(lines)
    serving.send_signal(signal.SIGHUP)
    assert serving.wait_for("reload-ignored")["settings"] == "tls-crl"
    serving.wait_for("reloaded")
    files = {"cert": own.folder / "alice.crt", "key": own.folder / "alice.key"}
    where = (f"--server={text(serving.control_address)}", "--local=127.0.0.1:9")
    asking = program("client", *own.flags("client", **files), *where)
    says(asking, "alert from the peer: certificate revoked")


def test_a_list_that_came_by_a_reload_stays(program: Factory, own: House, tmp_path: Path) -> None:
    """It is the last list that counts, not the one of the start."""
    config, lines = tmp_path / "server.ini", without_tls(own) + "tls = true\n"
    serving = started(program, config, lines)
    for text_, count in ((f"{lines}tls-crl = {own.crl}\n", 0), (lines, 1)):
        config.write_text(text_)
        before = len(serving.events("reloaded"))
        serving.send_signal(signal.SIGHUP)
        serving.wait_for_count(before + 1, "reloaded")
        assert len(serving.events("reload-ignored", settings="tls-crl")) == count


def test_tls_is_not_turned_off(program: Factory, own: House, tmp_path: Path) -> None:
    """A file in which `tls` has been lost does not make the server serve everybody."""
    config, lines = tmp_path / "server.ini", without_tls(own)
    serving = started(program, config, f"{lines}tls = true\n")
    config.write_text(lines)
    serving.send_signal(signal.SIGHUP)
    assert serving.wait_for("reload-ignored")["settings"] == "tls"
    serving.wait_for("reloaded")
    with connect(serving.control_address) as stranger:
        stranger.sendall(b"\x04\0\0\0\0\0\0\0\x050:x:1")
        assert ends_with(stranger) in ("eof", "reset")
    assert "tls" in serving.wait_for("refused")["reason"]


def test_a_handshake_beside_the_reload(own: House) -> None:
    """A session whose handshake began by the old list, and ended after the reload, is cut all the same."""
    chain = [rtunnel_tls._load_certificates(own.folder / f"{name}.crt")[0] for name in ("alice", "ca")]
    receipt = SimpleNamespace(chain=chain, identity="alice")
    rtunnel_tls.revoke(own.folder, "alice")
    program = rtunnel.Program(rtunnel.Settings(), own.server())
    fresh = rtunnel.Program(rtunnel.Settings(), own.server(crl=own.crl))
    program.start()
    with socket.create_server(("127.0.0.1", 0)) as listener, connect(listener.getsockname()) as sock:
        transport: Any = rtunnel.PlainTransport(sock)
        transport.receipt = receipt
        program.reload(fresh)  # nothing is registered yet
        session = rtunnel.Session(transport, program)
        with program.registered(session):
            assert session.run() == "its certificate is revoked"
    stop(program)


def test_a_renewal_beside_the_reload(house: House) -> None:
    """A client that has begun to load its certificate when it is reloaded does not bring the old one back: here the
    reload, of one without TLS, counts."""
    loading, reloaded = threading.Event(), threading.Event()

    def load() -> rtunnel_tls.TlsContext:
        loading.set()
        assert reloaded.wait(10.0)
        return house.client(name="127.0.0.1")

    with PeerServer() as server, contextlib.ExitStack() as stack:
        where = rtunnel.Mapping(0, rtunnel.Address("127.0.0.1", 9), rtunnel.Address(*server.address))
        context: Any = house.client(name="127.0.0.1")
        context.load_anew = load
        asking = rtunnel.Client([where], rtunnel.Settings(), context)
        stack.callback(stop, asking)
        asking.start()
        assert loading.wait(10.0)
        asking.reload(rtunnel.Program(rtunnel.Settings(), None))
        reloaded.set()
        server.accept()


def test_the_clients_reload(guarded: Guarded) -> None:
    """A client, too, reloads its files: a server whose certificate is revoked now is left, and not met again."""
    alice = guarded.open("alice", f"--tls-crl={guarded.house.crl}")
    with guarded.visit("alice") as visitor:
        rtunnel_tls.revoke(guarded.house.folder, "server")
        alice.send_signal(signal.SIGHUP)
        assert "revoked" in alice.wait_for("session-closed", timeout=1.5)["reason"]
        assert ends_with(visitor) == "reset"
        says(alice, "revoked: certificate revoked")


def test_a_client_with_a_broken_certificate(guarded: Guarded) -> None:
    """A client loads its certificate at each connection; while that is broken it uses the one of before."""
    alice = guarded.open("alice")
    (guarded.house.folder / "alice.crt").write_text("")
    guarded.server.kill()
    alice.wait_for("reload-failed")
    alice.wait_for("connect-failed")
