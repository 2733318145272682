"""The client: its mappings, its local service, and how it comes back."""

from __future__ import annotations

import socket
import sys
import threading
from contextlib import ExitStack

import pytest
from conftest import Factory
from naive_peer import NEW_CONN, NaivePeer
from support import Program, Service, connect, echo_service, eventually, free_port, read_exactly
from tls_peers import House
from tunnels import MODES, closed_port, open_tunnel, text, visit

import rtunnel

FIRST_RETRY_S = rtunnel.FIRST_RETRY_S

# --- mappings -----------------------------------------------------------------------------------------------


def greeter(word: bytes) -> Service:
    """A service that says one word."""
    return Service(lambda sock: sock.sendall(word))


def test_several_mappings(server: Factory, client: Factory) -> None:
    """Each --forward has a control connection and a public port of its own, which leads to its own local service."""
    with greeter(b"one") as one, greeter(b"two") as two:
        serving = server()
        wanted = free_port()
        flags = ("--forward", f"{wanted}:{one.text}", "--forward", f"0:{two.text}")
        asking = client("--server", text(serving.control_address), *flags)
        asking.wait_for("session-opened", local=one.text)
        asking.wait_for("session-opened", local=two.text)
        serving.wait_for_count(2, "session-opened")
        ports = {fields["local"]: int(fields["port"]) for fields in serving.events("session-opened")}
        assert ports[one.text] == wanted
        for service, word in ((one, b"one"), (two, b"two")):
            with connect(("127.0.0.1", ports[service.text])) as visitor:
                assert read_exactly(visitor, 3) == word


def test_one_mapping_that_fails_leaves_the_others(server: Factory, client: Factory) -> None:
    """Where one mapping's port is taken, the others serve, and it is tried again until it is free."""
    with greeter(b"one") as one, greeter(b"two") as two:
        serving = server()
        with socket.create_server(("127.0.0.1", 0)) as holder:
            wanted = holder.getsockname()[1]
            flags = ("--forward", f"{wanted}:{one.text}", "--forward", f"0:{two.text}")
            client("--server", text(serving.control_address), *flags, limits={"FIRST_RETRY_S": 0.05})
            with connect(serving.lease_address()) as visitor:
                assert read_exactly(visitor, 3) == b"two"
            serving.wait_for("lease-failed")
            serving.wait_for("lease-failed")
        assert serving.lease_address() == ("127.0.0.1", wanted)
        with connect(("127.0.0.1", wanted)) as visitor:
            assert read_exactly(visitor, 3) == b"one"


# --- the local service --------------------------------------------------------------------------------------


def test_a_local_service_that_comes_later(server: Factory, client: Factory) -> None:
    """While the local service refuses, visitors are reset and the session stays; when it is there, it is served."""
    with closed_port() as address:
        tunnel = open_tunnel(server, client, address)
        for _ in range(3):
            assert visit(tunnel.public, b"anybody?") == "reset"
            failed = tunnel.client.wait_for("dial-failed")
            assert (failed["local"], failed["reason"]) == (text(address), "Connection refused")
    with Service(lambda sock: sock.sendall(b"here"), port=address[1]), tunnel.connect() as visitor:
        assert read_exactly(visitor, 4) == b"here"
    assert len(tunnel.client.events("session-opened")) == 1


UNRESOLVABLE = "[fe80::1%none]"  # by an interface that does not exist: needs no name server to fail


def test_a_local_name_that_does_not_resolve(server: Factory, client: Factory) -> None:
    """A local name that does not resolve gives the visitor a reset, and the log a reason; the session stays."""
    serving = server()
    asking = client("--server", text(serving.control_address), "--local", f"{UNRESOLVABLE}:80")
    public = serving.lease_address()
    for _ in range(2):
        assert visit(public) == "reset"
        assert asking.wait_for("dial-failed")["reason"]
    assert not serving.events("session-closed")
    assert not asking.events("internal-error")


def test_a_client_out_of_descriptors(server: Factory, client: Factory) -> None:
    """A client that is out of descriptors resets the visitors that it cannot serve, and serves again afterwards."""
    if sys.platform != "linux":
        pytest.skip("no prlimit")
    import resource

    with echo_service() as service, ExitStack() as stack:
        tunnel = open_tunnel(server, client, service)
        limit = tunnel.client.descriptors() + 5
        resource.prlimit(tunnel.client.pid, resource.RLIMIT_NOFILE, (limit, limit))
        visitors = [stack.enter_context(tunnel.connect()) for _ in range(10)]
        tunnel.client.wait_for_count(5, "dial-failed")
        for visitor in visitors:
            visitor.close()
        eventually(lambda: tunnel.client.descriptors() < limit - 3)
        tunnel.check_echo()
        assert not tunnel.client.events("session-closed")


# --- reconnecting -------------------------------------------------------------------------------------------


def test_a_killed_server_that_returns_is_found_again(server: Factory, client: Factory) -> None:
    """While the server is away the client tries again at least every 2 s, and it serves again when it has returned."""
    control, public = f"127.0.0.1:{free_port()}", free_port()
    with echo_service() as service:
        first = server("--control-listen", control)
        assert first.control_address
        flags = ("--server", control, "--local", service.text, "--remote-port", str(public))
        asking = client(*flags, limits={"FIRST_RETRY_S": FIRST_RETRY_S})
        first.lease_address()
        with connect(("127.0.0.1", public)) as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            first.kill()
        asking.wait_for("session-closed")
        asking.wait_for("connect-failed")
        second = server("--control-listen", control)
        assert second.control_address
        address = second.lease_address()
        with connect(address) as visitor:
            visitor.sendall(b"again")
            assert read_exactly(visitor, 5) == b"again"
        assert address[1] == public
        assert max(float(failed["retry_s"]) for failed in asking.events("connect-failed")) <= 2.0


def test_a_server_that_closes_at_once_is_not_stormed(client: Factory) -> None:
    """Where each session ends before it has carried anything, the waits grow; after one that has, they start again."""
    with socket.create_server(("127.0.0.1", 0)) as control:
        control.settimeout(10)
        asking = client(
            "--server", text(control.getsockname()), "--local", "127.0.0.1:1", limits={"FIRST_RETRY_S": 0.02}
        )
        for _ in range(4):
            control.accept()[0].close()
        peer = NaivePeer(control.accept()[0])
        with peer:
            peer.read_frame()
            peer.send_frame(NEW_CONN, 1)
            peer.read_close(1)
        control.accept()[0].close()
        asking.wait_for_count(6, "session-closed")
        waits = [float(fields["retry_s"]) for fields in asking.events("session-closed")]
        for number, wait in enumerate([0.02, 0.04, 0.08, 0.16, 0.02, 0.04]):
            assert 0.7 * wait <= waits[number] <= wait + 0.001, waits


def test_8_connections_at_a_time(client: Factory, house: House) -> None:
    """Of twenty mappings eight at a time connect to the server and shake hands: it has only so many places for those
    that it does not know yet. When one has got through, or has failed, the next one comes."""
    assert rtunnel.MAX_OPENING == 8
    mappings = [f"--forward={port}:127.0.0.1:9" for port in range(8001, 8021)]
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        listener.settimeout(10.0)
        client(*house.flags("client"), "--server", text(listener.getsockname()), *mappings, "--reconnect-max=60")
        opening = [stack.enter_context(listener.accept()[0]) for _ in range(8)]
        for _ in range(12):
            listener.settimeout(0.05)
            with pytest.raises(TimeoutError):
                listener.accept()
            opening.pop(0).close()
            listener.settimeout(10.0)
            opening.append(stack.enter_context(listener.accept()[0]))


def test_reconnect_max(client: Factory) -> None:
    """No wait is longer than --reconnect-max."""
    with closed_port() as address:
        asking = client("--server", text(address), "--local", "127.0.0.1:1", "--reconnect-max", "0.05")
        asking.wait_for_count(6, "connect-failed")
        assert all(float(fields["retry_s"]) <= 0.05 for fields in asking.events("connect-failed"))


def test_a_server_name_that_does_not_resolve(client: Factory) -> None:
    """A server whose name does not resolve is tried again, as one that does not answer."""
    address = f"{UNRESOLVABLE}:7000"
    asking = client("--server", address, "--local", "127.0.0.1:1", limits={"FIRST_RETRY_S": 0.02})
    for _ in range(2):
        assert asking.wait_for("connect-failed", server="[fe80::1]:7000")["reason"]


# --- the backoff --------------------------------------------------------------------------------------------


@pytest.fixture
def usual_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program's own, in place of the tests'."""
    monkeypatch.setattr(rtunnel, "FIRST_RETRY_S", FIRST_RETRY_S)


def test_backoff_doubles_up_to_its_maximum(usual_times: None) -> None:
    """The waits are 1 s, doubled up to the maximum, each less a random part of at most a quarter."""
    seen: list[list[float]] = []
    for _ in range(200):
        backoff = rtunnel.Backoff(30.0)
        seen.append([backoff.next_s(refused=False) for _ in range(8)])
    for wanted, waits in zip([1, 2, 4, 8, 16, 30, 30, 30], zip(*seen, strict=True), strict=True):
        assert 0.75 * wanted <= min(waits) < max(waits) <= wanted
        assert max(waits) - min(waits) > 0.1 * wanted, "all clients of a restarted server would come at once"


def test_backoff_starts_again(usual_times: None) -> None:
    """After a session that lived the first wait is 1 s again."""
    backoff = rtunnel.Backoff(30.0)
    for _ in range(5):
        backoff.next_s(refused=False)
    backoff.reset()
    assert backoff.next_s(refused=False) <= 1.0


def test_backoff_where_the_connection_was_refused(usual_times: None) -> None:
    """Where the host answers and only its port is closed, no wait is over 2 s."""
    backoff = rtunnel.Backoff(30.0)
    waits = [backoff.next_s(refused=True) for _ in range(20)]
    assert waits[0] <= 1.0
    assert max(waits) <= 2.0


def test_backoff_with_a_small_maximum() -> None:
    """The maximum holds from the first wait on."""
    backoff = rtunnel.Backoff(0.5)
    assert all(backoff.next_s(refused=refused) <= 0.5 for refused in (False, True, False, True))


# --- idle ---------------------------------------------------------------------------------------------------


def test_an_idle_tunnel_uses_no_processor_time(server: Factory, client: Factory) -> None:
    """With a client and ten idle streams neither end uses processor time, whichever way it waits."""
    with echo_service() as service, ExitStack() as stack:
        ends: list[Program] = []
        for mode in ("plain", "polled"):
            tunnel = open_tunnel(server, client, service, mode=MODES[mode])
            ends += tunnel[:2]
            for _ in range(10):
                visitor = stack.enter_context(tunnel.connect())
                visitor.sendall(b"x")
                read_exactly(visitor, 1)
        before = [each.cpu_seconds() for each in ends]
        threading.Event().wait(1.0)  # a time in which nothing happens
        used = [each.cpu_seconds() - old for each, old in zip(ends, before, strict=True)]
        assert max(used) <= 0.1, used
