"""Who may open which port, and whose visits are served (OPERATIONS.md, "How it behaves")."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path

import pytest
from level1 import Peer, Unwelcome
from support import Program, connect, counted, echo_service, ends_with, eventually, free_port, read_exactly
from tls_peers import House
from tunnels import Factory, open_tunnel, text

import rtunnel
import rtunnel_tls
from rtunnel import Address, ConfigError, PortRules, parse_networks


def rules(*texts: str) -> PortRules:
    return PortRules([PortRules.parse(text) for text in texts])


def refused(server: Program, port: int) -> str:
    """The code with which a client of plain mode is refused that port; empty where it gets it."""
    try:
        peer = Peer.as_client(server.control_address, port)
    except Unwelcome as unwelcome:
        return str(unwelcome.args[0])
    peer.sock.close()
    return ""


@pytest.mark.parametrize(
    ("items", "identity", "allowed", "denied"),
    [
        ((), "alice", (0, 1024, 65535), (1, 80, 1023)),
        (("alice=8080,9000-9100",), "alice", (8080, 9000, 9100), (0, 8081, 8999, 9101)),
        (("rack=12=8080",), "rack=12", (8080,), (12, 0)),
        (("alice=8080",), "bob", (), (0, 8080, 65535)),  # there is no rule for others, so they may nothing
        (("alice=8080", "*=0"), "bob", (0,), (8080,)),
        (("alice=8080", "*=0-65535"), "alice", (8080,), (0, 8081)),  # her own rules stand for those of all
        (("alice=8080", "alice=9000"), "alice", (8080, 9000), (0,)),
        (("alice=8080", "9000-9100", "bob=22"), "alice", (8080, 9050), (22,)),  # how a file's list splits a rule
        (("CN=x, y=80",), "CN=x, y", (80,), (0,)),  # a name may hold whatever a common name may
        (("ALICE=80",), "alice", (), (80,)),
        (("anonymous=0",), rtunnel_tls.NO_IDENTITY, (0,), (80,)),
    ],
)
def test_rules(items: tuple[str, ...], identity: str, allowed: tuple[int, ...], denied: tuple[int, ...]) -> None:
    """An identity may open the ports of its own rules, whoever has none those of `*`; nothing else."""
    asked = rules(*items)
    assert [port for port in (*allowed, *denied) if asked.allow(identity, port)] == list(allowed)


@pytest.mark.parametrize(
    "text",
    [
        "alice",
        "=80",
        "alice=",
        "alice=x",
        "alice=80-",
        "alice=-80",
        "alice=90-80",
        "alice=65536",
        "alice=80,",
        "alice=80, bob=81",
        "alice=80 bob=81",
        "alice=80,bob=81",
    ],
)
def test_wrong_rules(text: str) -> None:
    """What is no rule is refused, an empty range too; a list cannot begin without a name."""
    with pytest.raises(ConfigError):
        rules(text)


def test_rules_and_the_global_port(server: Factory) -> None:
    """`--allow` where no client asks for a port would promise what it does not do: it is refused."""
    wrong = server("--public-listen", "127.0.0.1:0", "--allow", "alice=80")
    assert wrong.wait() == 2
    assert "--public-listen" in wrong.lines[-1]


@pytest.mark.parametrize(
    ("networks", "visitor", "admitted"),
    [
        ("", "203.0.113.7", True),
        ("203.0.113.0/24", "203.0.113.7", True),
        ("203.0.113.0/24", "203.0.114.7", False),
        ("203.0.113.0/24", "::ffff:203.0.113.7", True),  # how a socket for both families shows it
        ("203.0.113.0/24", "2001:db8::7", False),
        ("10.0.0.0/8, 2001:db8::/32", "2001:db8::7", True),
        ("fe80::/10", "fe80::1%eth0", True),
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
    ],
)
def test_networks(networks: str, visitor: str, admitted: bool) -> None:
    """A visitor is served where one of the networks has its address."""
    server = rtunnel.Server(rtunnel.Settings(visitors=parse_networks(networks)), None)
    assert server.admit_visitor(Address(visitor, 1)) == admitted


@pytest.mark.parametrize("text", ["x", "10.0.0.0/33", "10.0.0.1/8", "10.0.0.0/8,", ",", "::1/129", "1.2.3.4:5"])
def test_wrong_networks(text: str) -> None:
    """What is no network is refused."""
    with pytest.raises(ConfigError):
        parse_networks(text)


def test_a_port_that_is_not_allowed(server: Factory, client: Factory) -> None:
    """Where a port is opened, the rules are asked: our client ends with status 3 and the server's sentence."""
    port, other = free_port(), free_port()
    serving = server(f"--allow=anonymous={port}")
    asking = client("--server", text(serving.control_address), "--local=127.0.0.1:1", f"--remote-port={other}")
    assert asking.wait() == 3
    assert "may not open port" in asking.wait_for("refused")["reason"]
    assert refused(serving, other) == refused(serving, 0) == "port-denied"
    assert refused(serving, port) == ""
    assert serving.wait_for("refused", level=1)["reason"].startswith("port-denied")


def test_the_default_rules(server: Factory) -> None:
    """Without `--allow` a client gets no port below 1024."""
    assert refused(server(), 1023) == "port-denied"


def test_rules_are_by_identity(server: Factory, client: Factory, tmp_path: Path) -> None:
    """With certificates each identity has its own rules."""
    house = House(tmp_path / "pki")
    pair = {kind: house.folder / f"client.{end}" for kind, end in (("cert", "crt"), ("key", "key"))}
    with echo_service() as service:
        serving = server(*house.flags("server"), "--allow", "client=0", "--allow", "*=1024-65535")
        local = ("--server", text(serving.control_address), "--local", service.text)
        good = client(*house.flags("client", **pair), *local)
        good.wait_for("session-opened")
        bad = client(*house.flags("client", **pair), *local, f"--remote-port={free_port()}")
        assert bad.wait() == 3
        assert serving.wait_for("session-opened")["identity"] == "client"


def test_a_port_of_another_identity(server: Factory, client: Factory, tmp_path: Path) -> None:
    """With certificates a port belongs to the name that opened it, and another name is refused while it is served."""
    house = House(tmp_path / "pki")
    rtunnel_tls.issue(house.folder, "other", hosts=None)
    with echo_service() as service:
        serving, port = server(*house.flags("server")), free_port()
        where = (f"--server={text(serving.control_address)}", f"--forward={port}:{service.text}")
        client(*house.flags("client"), *where).wait_for("session-opened")
        files = {"cert": house.folder / "other.crt", "key": house.folder / "other.key"}
        closed = client(*house.flags("client", **files), *where).wait_for("session-closed")
        assert closed["reason"] == f"port-in-use: port {port} belongs to another client"
        with connect(("127.0.0.1", port)) as visitor:
            visitor.sendall(b"marco")
            assert read_exactly(visitor, 5) == b"marco"
    assert not serving.events("session-replaced")


def test_a_reload_closes_ports_that_are_no_longer_allowed(server: Factory, client: Factory, tmp_path: Path) -> None:
    """A reload applies to live leases: a port that is no longer allowed closes, with its streams, within a second;
    the other's streams go on."""
    config = tmp_path / "server.ini"
    kept, lost = free_port(), free_port()
    config.write_text(f"allow = [anonymous={kept},{lost}]\n")
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(echo_service())
        serving = server("-c", str(config))
        where = ("--server", text(serving.control_address))
        asking = client(*where, f"--forward={kept}:{service.text}")
        losing = client(*where, f"--forward={lost}:{service.text}")
        serving.wait_for_count(2, "session-opened")
        visitors = [stack.enter_context(connect(("127.0.0.1", port))) for port in (kept, lost)]
        for visitor in visitors:
            visitor.sendall(b"marco")
            assert read_exactly(visitor, 5) == b"marco"
        config.write_text(f"allow = anonymous={kept}\n")
        serving.send_signal(signal.SIGHUP)
        visitors[1].settimeout(1.0)
        assert ends_with(visitors[1]) == "reset"
        assert serving.wait_for("expelled")["identity"] == "anonymous"
        assert "port-denied" in losing.wait_for("refused")["reason"]  # when it came again
        assert losing.process.poll() is None
        with pytest.raises(ConnectionRefusedError):
            connect(("127.0.0.1", lost))
        visitors[0].sendall(b"polo")
        assert read_exactly(visitors[0], 4) == b"polo"
        assert not asking.events("session-closed")


def test_visitors_of_other_networks(server: Factory, client: Factory) -> None:
    """A visitor that is not of `--visitors` is closed before a byte of it is read, and never reaches the client."""
    with echo_service() as service:
        tunnel = open_tunnel(server, client, service, flags=("--visitors", "127.0.0.2/32,::1/128"))
        for _ in range(3):
            with contextlib.suppress(ConnectionError), tunnel.connect() as stranger:  # who says nothing
                assert ends_with(stranger) in ("eof", "reset")
        tunnel.server.wait_for("visitor-refused")
        with socket.create_connection(tunnel.public, 10.0, ("127.0.0.2", 0)) as welcome:
            welcome.sendall(b"marco")
            assert read_exactly(welcome, 5) == b"marco"
        tunnel.client.wait_for("stream-opened")
        assert len(tunnel.client.events("stream-opened")) == 1
        eventually(lambda: counted(tunnel.server.events("visitor-refused")) == 3)
