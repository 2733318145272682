"""One client at several servers: each mapping is open at each of them, and none touches the others."""

from __future__ import annotations

import contextlib
import signal
import socket
from pathlib import Path

import pytest
from conftest import Factory
from level1 import Ends, Peer, PeerServer
from support import (
    DEADLINE_S,
    Program,
    connect,
    echo_service,
    eventually,
    free_port,
    read_exactly,
)
from tls_peers import House
from tunnels import fill, text

import rtunnel

DENIED = b"error=port-denied\nmessage=No."
UNRESOLVABLE = "[fe80::1%none]:7000"  # by an interface that does not exist: needs no name server to fail


def where(*servers: Program | PeerServer) -> tuple[str, ...]:
    """The flags for these servers."""
    addresses = (each.address if isinstance(each, PeerServer) else each.control_address for each in servers)
    return tuple(f"--server={text(address)}" for address in addresses)


def check_echo(port: int) -> None:
    with connect(("127.0.0.1", port)) as visitor:
        visitor.sendall(b"marco")
        assert read_exactly(visitor, 5) == b"marco"


def test_each_mapping_is_open_at_each_server(server: Factory, client: Factory) -> None:
    """Two mappings at two servers are four ports; log and state name mapping and server."""
    with echo_service() as one, echo_service() as two:
        servers = [server(), server()]
        asking = client(*where(*servers), f"--forward=0:{one.text}", f"--forward=0:{two.text}")
        asking.wait_for_count(4, "session-opened")
        for each in servers:
            told = text(each.control_address)
            assert {line["local"] for line in asking.events("session-opened", server=told)} == {one.text, two.text}
            each.wait_for_count(2, "session-opened")
            for line in each.events("session-opened"):
                check_echo(int(line["port"]))
        asking.state()
        asking.wait_for_count(4, "state-session")
        known = {(line["server"], line["local"]) for line in asking.events("state-session")}
        assert known == {(text(each.control_address), local.text) for each in servers for local in (one, two)}


def test_a_server_that_is_killed_and_comes_back(server: Factory, client: Factory) -> None:
    """While one server is away the other's streams and new visitors are served; it is joined again."""
    control = f"127.0.0.1:{free_port()}"
    with echo_service() as service:
        first, other = server("--control-listen", control), server()
        assert first.control_address
        asking = client(*where(first, other), "--local", service.text, limits={"FIRST_RETRY_S": 0.05})
        ports = [each.lease_address()[1] for each in (first, other)]
        with connect(("127.0.0.1", ports[1])) as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            first.kill()
            asking.wait_for("session-closed", server=control)
            asking.wait_for("connect-failed", server=control)
            check_echo(ports[1])
            check_echo(server("--control-listen", control).lease_address()[1])
            visitor.sendall(b"y")
            assert read_exactly(visitor, 1) == b"y"
        assert len(asking.events("session-opened", server=text(other.control_address))) == 1


def test_servers_that_never_answer_beside_one_that_works(server: Factory, client: Factory) -> None:
    """A name without an address, a port that nobody has and one that swallows packets hold up nobody: twenty
    mappings are open at the server that works. Each warning names the server that it is about."""
    with echo_service() as service, contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for each in fill(full.getsockname()):
            stack.enter_context(each)
        serving, nobody = server(), f"127.0.0.1:{free_port()}"
        others = [UNRESOLVABLE, nobody, text(full.getsockname())]
        mappings = [f"--forward={free_port()}:{service.text}" for _ in range(20)]
        asking = client(*(f"--server={each}" for each in others), *where(serving), *mappings)
        asking.wait_for_count(20, "session-opened", server=text(serving.control_address))
        asking.wait_for("connect-failed", server="[fe80::1]:7000")
        asking.wait_for("connect-failed", server=nobody)
        assert not asking.events("connect-failed", server=text(serving.control_address))


def test_a_server_that_denies_beside_one_that_serves(server: Factory, client: Factory) -> None:
    """A port that one server never gives is one line, which names that server; the other one serves."""
    with echo_service() as service:
        denying, serving = server("--allow=*=1"), server()
        asking = client(*where(denying, serving), f"--forward=0:{service.text}")
        refused = asking.wait_for("refused")
        assert refused["server"] == text(denying.control_address)
        assert (refused["local"], refused["port"]) == (service.text, "0")
        check_echo(serving.lease_address()[1])


def test_status_3_when_all_servers_deny(client: Factory) -> None:
    """The client ends with status 3 when each mapping is refused for good at each server, and not before."""
    with PeerServer() as one, PeerServer() as two:
        asking = client(*where(one, two), "--forward=0:127.0.0.1:9", "--forward=1:127.0.0.1:9")
        for each in (one, one, two):
            each.accept(DENIED).sock.close()
        asking.wait_for_count(3, "refused")
        assert asking.process.poll() is None
        two.accept(DENIED)
        assert asking.wait() == 3
        assert {line["server"] for line in asking.events("refused")} == {text(one.address), text(two.address)}


def test_no_status_3_where_one_server_was_joined(client: Factory) -> None:
    """A client that was open at one server stays when all others deny, and when that one denies later."""
    with PeerServer() as one, PeerServer() as two:
        asking = client(*where(one, two), "--local=127.0.0.1:9", "--reconnect-max=0.05")
        served = one.accept()
        asking.wait_for("session-opened")
        two.accept(DENIED).sock.close()
        asking.wait_for("refused", server=text(two.address))
        served.sock.close()
        one.accept(DENIED).sock.close()
        asking.wait_for("refused", server=text(one.address))
        one.accept()
        asking.wait_for_count(2, "session-opened")


@pytest.fixture
def named(tmp_path: Path) -> House:
    """Certificates of two servers, each for one name: `server` for an address, `other` for localhost."""
    house = House(tmp_path / "pki", hosts=("127.0.0.1",))
    rtunnel.rtunnel_tls.issue(house.folder, "other", hosts=["localhost"])
    return house


def test_each_certificate_must_name_its_server(server: Factory, client: Factory, named: House) -> None:
    """Each server is held to the host that it is dialled by: two that have exchanged their certificates are refused,
    though the client knows both names."""
    files = {"cert": named.folder / "other.crt", "key": named.folder / "other.key"}
    first, other = server(*named.flags("server")), server(*named.flags("server", **files))
    ports = [each.control_address[1] for each in (first, other)]
    own, local = named.flags("client"), "--local=127.0.0.1:9"
    right = client(*own, f"--server=127.0.0.1:{ports[0]}", f"--server=localhost:{ports[1]}", local)
    right.wait_for_count(2, "session-opened")
    assert {line["server"] for line in right.events("handshake")} == {f"127.0.0.1:{ports[0]}", f"localhost:{ports[1]}"}
    wrong = client(*own, f"--server=127.0.0.1:{ports[1]}", f"--server=localhost:{ports[0]}", local)
    for host, port in (("127.0.0.1", ports[1]), ("localhost", ports[0])):
        assert wrong.wait_for("connect-failed", server=f"{host}:{port}")["reason"].startswith("name: ")
    assert not wrong.events("session-opened")


def test_tls_server_name_is_for_all(server: Factory, client: Factory, named: House) -> None:
    """--tls-server-name holds all servers to one name, whatever host is dialled."""
    files = {"cert": named.folder / "other.crt", "key": named.folder / "other.key"}
    first, other = server(*named.flags("server")), server(*named.flags("server", **files))
    ports = [each.control_address[1] for each in (first, other)]
    where = [f"--server=localhost:{port}" for port in ports]
    asking = client(*named.flags("client"), *where, "--local=127.0.0.1:9", "--tls-server-name=127.0.0.1")
    asking.wait_for("session-opened", server=f"localhost:{ports[0]}")
    refused = asking.wait_for("connect-failed", server=f"localhost:{ports[1]}")
    assert refused["reason"].startswith("name: ")


def test_two_names_of_one_server(server: Factory, client: Factory, house: House) -> None:
    """Two addresses that lead to one server: one session has the port, the other one is refused, and nobody is
    replaced for ever."""
    with echo_service() as service:
        serving, wanted = server(*house.flags("server")), free_port()
        port = serving.control_address[1]
        flags = (f"--server=127.0.0.1:{port}", f"--server=localhost:{port}", f"--forward={wanted}:{service.text}")
        short = {"FIRST_RETRY_S": 0.05, "REPLACED_RETRY_S": 0.05}
        asking = client(*house.flags("client"), *flags, "--reconnect-max=0.1", limits=short)
        for _ in range(3):
            asking.wait_for("session-closed", reason="port-in-use: another session of yours serves port " + str(wanted))
        check_echo(wanted)
        assert len(serving.events("session-replaced")) <= 1


def test_retired_sessions_are_counted_by_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """[G-1]: a server that says GOAWAY again and again uses up its own places, and no other server's."""
    monkeypatch.setattr(rtunnel, "FIRST_RETRY_S", 0.05)
    monkeypatch.setattr(rtunnel, "MAX_RETIRED", 1)
    with PeerServer() as one, PeerServer() as two, echo_service() as service, Ends() as ends:
        mappings = [rtunnel.Mapping(0, rtunnel.Address(*service.address), rtunnel.Address(*each.address))
                    for each in (one, two)]  # fmt: skip
        client = rtunnel.Client(mappings, rtunnel.Settings(reconnect_max=0.05), None)
        client.start()
        try:
            for number in range(3):  # two that stay, and one that is ended
                retire(one.accept())
                ends.log.wait_for("goaway", number + 1, server=text(one.address))
            ends.log.wait_for("session-closed", server=text(one.address))
            retire(two.accept())
            two.accept()
            assert not ends.log.events("session-closed", server=text(two.address))
        finally:
            client.stop()
            eventually(lambda: not client.has_connections())


def retire(peer: Peer) -> None:
    """A stream is open, and no other will be."""
    peer.send_frame(rtunnel.FrameType.NEW_CONN, 1, b"203.0.113.7:51234")
    peer.send_frame(rtunnel.FrameType.GOAWAY, 0, b"stopping")


def test_a_reload_cannot_change_the_servers(client: Factory, server: Factory, tmp_path: Path) -> None:
    """Servers that a reload would add are named as what wants a restart."""
    serving, config = server(), tmp_path / "client.ini"
    first = f"server = {text(serving.control_address)}\nlocal = 127.0.0.1:9\n"
    config.write_text(first)
    asking = client("-c", str(config))
    asking.wait_for("session-opened")
    config.write_text(first.replace("= ", "= [", 1).replace("\n", ", 127.0.0.1:1]\n", 1))
    asking.send_signal(signal.SIGHUP)
    assert asking.wait_for("reload-ignored")["settings"] == "server"
    asking.wait_for("reloaded")


@pytest.mark.parametrize("second", ["localhost:7000", "LOCALHOST:7000"])
def test_the_same_server_twice(client: Factory, second: str) -> None:
    """One address twice is one sentence and status 2."""
    asking = client("--server=localhost:7000", f"--server={second}", "--local=127.0.0.1:9")
    assert asking.wait(DEADLINE_S) == 2
    assert asking.lines == ["rtunnel client: --server has localhost:7000 twice: write each once"]
