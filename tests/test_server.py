"""The server: where it listens, whom its ports lead to, and what it does when something is missing."""

from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import ExitStack

import pytest
from conftest import Factory
from level1 import control_address, leases
from naive_peer import DATA, NEW_CONN, NaivePeer, frame
from support import Program, connect, echo_service, ends_with, eventually, read_exactly
from tunnels import open_tunnel, text, visit

import rtunnel


def has_ipv6() -> bool:
    """Whether loopback speaks IPv6 here."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
FORMS = [
    (":0", "127.0.0.1"),
    pytest.param(":0", "::1", marks=needs_ipv6),
    ("127.0.0.1:0", "127.0.0.1"),
    ("localhost:0", "localhost"),
    pytest.param("[::1]:0", "::1", marks=needs_ipv6),
]


def join(serving: Program, stack: ExitStack) -> NaivePeer:
    """A client that has sent INIT with port 0."""
    peer = stack.enter_context(NaivePeer.connect(serving.control_address))
    peer.send_init(b"0:127.0.0.1:80")
    host, port = peer.sock.getsockname()[:2]
    serving.wait_for("session-opened", peer=f"{host}:{port}")
    return peer


# --- addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "host"), FORMS)
def test_listening_forms(program: Factory, client: Factory, form: str, host: str) -> None:
    """A control port and a public port, written in any form, serve on the addresses that the form stands for."""
    with echo_service() as service:
        serving = program("server", "--control-listen", form, "--public-listen", form)
        control, public = serving.control_address[1], serving.public_address[1]
        assert 0 not in (control, public)
        asking = client("--server", text((host, control)), "--local", service.text)
        asking.wait_for("session-opened")
        serving.wait_for("session-opened")
        with connect((host, public)) as visitor:
            visitor.sendall(b"hello")
            assert read_exactly(visitor, 5) == b"hello"


@pytest.mark.parametrize(
    ("bind", "host"),
    [("", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), pytest.param("::1", "::1", marks=needs_ipv6)],
)
def test_where_client_chosen_ports_are_opened(program: Factory, bind: str, host: str) -> None:
    """A client's public port is opened on the address of --public-bind, on all where it is empty."""
    serving = program(
        "server", "--control-listen", "127.0.0.1:0", "--public-bind", f"[{bind}]" if ":" in bind else bind
    )
    with ExitStack() as stack:
        peer = join(serving, stack)
        opened = serving.wait_for("lease-opened")["address"]
        assert opened.rpartition(":")[0].strip("[]") in ({bind} if bind else {"", "::", "0.0.0.0"})
        stack.enter_context(connect((host, int(opened.rpartition(":")[2]))))
        peer.expect(NEW_CONN, 1)


def test_ipv4_peers_are_shown_as_ipv4(program: Factory) -> None:
    """A peer that comes over IPv4 is logged with its IPv4 address also where the port listens on both."""
    serving = program("server", "--control-listen", ":0", "--public-bind", "127.0.0.1", "--log-level", "debug")
    with ExitStack() as stack:
        peer = stack.enter_context(NaivePeer.connect(("127.0.0.1", serving.control_address[1])))
        peer.send_init(b"0:127.0.0.1:80")
        assert serving.wait_for("session-opened")["peer"] == text(peer.sock.getsockname())


@pytest.mark.parametrize("flag", ["--control-listen", "--public-listen"])
def test_a_listening_port_that_is_taken(program: Factory, flag: str) -> None:
    """A server whose own port is taken says so in one sentence and ends with a status that is not 0."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken = text(holder.getsockname())
        started = program("server", "--control-listen", "127.0.0.1:0", flag, taken)
        assert started.wait() == 1
        assert sum(taken in line and "in use" in line for line in started.lines) == 1
        assert not any("Traceback" in line for line in started.lines)


# --- leases -------------------------------------------------------------------------------------------------


def test_each_client_has_a_port_of_its_own(server: Factory) -> None:
    """Several clients that ask for port 0 get different ports, and each its own visitors."""
    serving = server()
    with ExitStack() as stack:
        peers = [join(serving, stack) for _ in range(5)]
        publics = [serving.lease_address(peer=text(peer.sock.getsockname())) for peer in peers]
        assert len(set(publics)) == 5
        for peer, public in zip(peers, publics, strict=True):
            stack.enter_context(connect(public))
            peer.expect(NEW_CONN, 1)


def test_a_port_that_another_client_has(server: Factory) -> None:
    """A client that asks for another's port is closed, with a reason in the log; the other keeps it."""
    serving = server()
    with ExitStack() as stack:
        first = join(serving, stack)
        public = serving.lease_address()
        second = stack.enter_context(NaivePeer.connect(serving.control_address))
        second.send_init(b"%d:127.0.0.1:80" % public[1])
        second.expect_end()
        refused = serving.wait_for("refused", peer=text(second.sock.getsockname()))
        assert "port-in-use" in refused["reason"]
        stack.enter_context(connect(public))
        first.expect(NEW_CONN, 1)
        assert not serving.events("lease-closed")


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_port_is_free_when_its_client_has_gone(server: Factory, client: Factory, end: str) -> None:
    """When a client is stopped its port is free at once, when it is killed after LEASE_LINGER_S; the next one has it,
    and the visitor of the old one was reset."""
    linger = {"stopped": rtunnel.LEASE_LINGER_S, "killed": 0.1}[end]
    with echo_service() as service:
        tunnel = open_tunnel(server, client, service, LEASE_LINGER_S=linger)
        with tunnel.connect() as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            gone = time.monotonic()
            tunnel.client.stop() if end == "stopped" else tunnel.client.kill()
            assert ends_with(visitor) == "reset"
            tunnel.server.wait_for("lease-closed", address=text(tunnel.public))
            assert time.monotonic() - gone < 2.0
        port = str(tunnel.public[1])
        control = text(tunnel.server.control_address)
        client("--server", control, "--local", service.text, "--remote-port", port)
        assert tunnel.server.lease_address() == tunnel.public
        tunnel.check_echo()
        assert not tunnel.server.events("lease-failed")


# --- the global port ----------------------------------------------------------------------------------------


def test_a_visitor_goes_to_the_client_with_the_fewest_streams() -> None:
    """Each visitor of the global port goes to the client with the fewest open streams, of several such to the one
    that has waited longest for one."""
    loopback = rtunnel.Address("127.0.0.1", 0)
    serving = rtunnel.Server(rtunnel.Settings(control_listen=loopback, public_listen=loopback), None)
    with ExitStack() as stack:
        serving.start()
        stack.callback(serving.stop)
        (lease,) = leases(serving)
        public, control = lease.address, control_address(serving)
        peers: list[NaivePeer] = []
        visitors: dict[tuple[int, int], socket.socket] = {}
        opened = [0, 0, 0]

        def join() -> NaivePeer:
            peer = stack.enter_context(NaivePeer.connect(control))
            peer.send_init(b"0:127.0.0.1:80")
            eventually(lambda: len(lease.sessions) == len(peers) + 1)
            peers.append(peer)
            return peer

        def expect_at(which: int) -> None:
            visitor = stack.enter_context(connect(public))
            opened[which] += 1
            visitors[which, opened[which]] = visitor
            peers[which].expect(NEW_CONN, opened[which])

        def leave(which: int, stream: int) -> None:
            visitors.pop((which, stream)).close()
            peers[which].read_close(stream)
            eventually(lambda: sum(client.visitors for client in lease.sessions) == len(visitors))

        for _ in range(3):
            join()
        for which in (0, 1, 2, 0, 1, 2):
            expect_at(which)
        leave(1, 1)
        leave(1, 2)
        expect_at(1)  # 2, 0, 2
        expect_at(1)  # 2, 1, 2
        leave(2, 1)
        leave(0, 2)
        expect_at(0)  # 1, 2, 1: the first has waited longer
        expect_at(2)
        expect_at(1)  # all have 2: it has waited longest
        late = join()
        for stream in (1, 2):
            stack.enter_context(connect(public))
            late.expect(NEW_CONN, stream)


def test_a_client_that_leaves_gets_no_more_visitors(server: Factory) -> None:
    """When one of two clients of the global port leaves, all visitors go to the other; without any, they are reset."""
    serving = server("--public-listen", "127.0.0.1:0")
    with ExitStack() as stack:
        stays, leaves = join(serving, stack), join(serving, stack)
        leaves.sock.close()
        serving.wait_for("session-closed")
        for stream in (1, 2, 3):
            stack.enter_context(connect(serving.public_address))
            stays.expect(NEW_CONN, stream)
        stays.sock.close()
        serving.wait_for("session-closed")
        assert visit(serving.public_address) == "reset"


def test_clients_without_init_share_the_global_port(server: Factory) -> None:
    """Clients that send nothing count after 2 s, share the visitors among each other, and have none while one that
    has sent INIT is there."""
    serving = server("--public-listen", "127.0.0.1:0", limits={"SILENT_CLIENT_S": 0.1})
    with ExitStack() as stack:
        silent = []
        for _ in range(2):
            silent.append(stack.enter_context(NaivePeer.connect(serving.control_address)))
            serving.wait_for("session-opened")
        held = [stack.enter_context(connect(serving.public_address)) for _ in range(4)]
        for each in silent:
            each.expect(NEW_CONN, 1)
            each.expect(NEW_CONN, 2)
        asking = join(serving, stack)
        for stream in (1, 2, 3):
            stack.enter_context(connect(serving.public_address))
            asking.expect(NEW_CONN, stream)
        asking.sock.close()
        serving.wait_for("session-closed")
        stack.enter_context(connect(serving.public_address))
        silent[0].expect(NEW_CONN, 3)
        for each in silent:
            each.send(frame(DATA, 1, b"served") + frame(DATA, 2, b"served"))
        for visitor in held:
            assert read_exactly(visitor, 6) == b"served"


# --- out of descriptors -------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="no prlimit")
def test_out_of_descriptors(server: Factory, client: Factory) -> None:
    """A server that is out of descriptors does not spin, keeps its sessions, and serves again when some are free."""
    import resource

    with echo_service() as service, ExitStack() as stack:
        tunnel = open_tunnel(server, client, service)
        serving = tunnel.server
        with tunnel.connect() as early:
            early.sendall(b"x")
            read_exactly(early, 1)
            limit = serving.descriptors() + 5
            resource.prlimit(serving.pid, resource.RLIMIT_NOFILE, (limit, limit))
            visitors = [stack.enter_context(tunnel.connect()) for _ in range(20)]
            serving.wait_for("accept-failed")
            used, count, since = serving.cpu_seconds(), len(serving.lines), time.monotonic()
            serving.wait_for("accept-failed")
            serving.wait_for("accept-failed")
            assert time.monotonic() - since > 0.3, "it tries again at once"
            assert serving.cpu_seconds() - used < 0.2
            assert len(serving.lines) - count < 20
            early.sendall(b"y")
            assert read_exactly(early, 1) == b"y"
        for visitor in visitors:
            visitor.close()
        eventually(lambda: serving.descriptors() < limit - 4)
        tunnel.check_echo()
        assert not serving.events("session-closed")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system keeps no process on a CPU")
def test_a_process_stays_on_one_cpu(server: Factory, client: Factory) -> None:
    """All threads of a server run on the first CPU, those of a client on another; `any` is all, and a CPU that there
    is not is wrong usage."""
    allowed = sorted(os.sched_getaffinity(0))
    serving = server()
    asking = client("--server", text(serving.control_address), "--local", "127.0.0.1:9")
    asking.wait_for("session-opened")
    assert set(map(frozenset, cpus(serving))) == {frozenset(allowed[:1])}
    assert all(len(cpu) == 1 and (cpu != set(allowed[:1]) or len(allowed) == 1) for cpu in cpus(asking))
    everywhere = server("--cpu", "any")
    everywhere.wait_for("listening")
    assert all(cpu == set(allowed) for cpu in cpus(everywhere))
    with pytest.raises(rtunnel.ConfigError, match="--cpu 9999: this process may run on"):
        rtunnel.stay_on_cpu(9999, "server")


def cpus(program: Program) -> list[set[int]]:
    """Where each thread may run."""
    return [os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{program.pid}/task")]
