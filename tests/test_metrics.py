"""The figures of --metrics: what they count, who sees them, and that Prometheus's own tool takes them."""

from __future__ import annotations

import ast
import contextlib
import errno
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Factory
from engines import wanted
from level1 import PeerServer
from naive_peer import NaivePeer
from support import (
    ROOT,
    Address,
    Program,
    Service,
    connect,
    echo_service,
    ends_with,
    eventually,
    free_port,
    read_all,
    read_exactly,
)
from tls_peers import House
from tunnels import closed_port, open_tunnel, text, visit

import rtunnel

pytest.importorskip("prometheus_client")
PORT = "--metrics=127.0.0.1:0"
Figures = dict[str, float]


def asked(address: Address, accept: str = "") -> str:
    """What a scrape gets."""
    connection = http.client.HTTPConnection(*address, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics", headers={"Accept": accept})
        response = connection.getresponse()
        assert response.status == 200
        return response.read().decode()


def figures(program: Program) -> Figures:
    """Each sample, by its name and labels as they are written."""
    lines = (line.rpartition(" ") for line in asked(program.metrics_address).splitlines() if line[0] != "#")
    return {name: float(value) for name, _, value in lines}


def shows(program: Program, sample: str, value: float) -> None:
    """Wait until it does."""
    eventually(lambda: figures(program)[sample] == value, what=f"{sample} {value}, {figures(program).get(sample)}")


def refusals(rule: str) -> str:
    return f'rtunnel_refusals_total{{rule="{rule}"}}'


def carried(program: Program) -> tuple[float, float]:
    """Bytes from the tunnel and to it."""
    found = figures(program)
    name = 'rtunnel_stream_bytes_total{direction="%s"}'
    return found[name % "from_tunnel"], found[name % "to_tunnel"]


def test_traffic_is_counted(server: Factory, client: Factory) -> None:
    """Bytes each way and streams, now and in all, are what was sent, at both ends; they outlive streams and
    sessions, and never fall."""

    def answer(sock: socket.socket) -> None:
        read_exactly(sock, 1000)
        sock.sendall(bytes(30_000))
        sock.recv(1)

    with Service(answer) as service:
        serving = server(PORT)
        flags = ("--server", text(serving.control_address), "--local", service.text, PORT)
        asking = client(*flags, limits={"FIRST_RETRY_S": 0.05})
        public = serving.lease_address()
        for round_ in (1, 2, 3):
            with connect(public) as visitor:
                visitor.sendall(bytes(1000))
                read_exactly(visitor, 30_000)
                assert carried(serving) == (30_000 * round_, 1000 * round_)
                assert carried(asking) == (1000 * round_, 30_000 * round_)
                for each in (serving, asking):
                    found = figures(each)
                    assert (found["rtunnel_streams"], found["rtunnel_streams_total"]) == (1, round_)
                    assert found['rtunnel_limit_used{limit="streams"}'] == 1
            for each in (serving, asking):
                shows(each, "rtunnel_streams", 0)
                shows(each, "rtunnel_streams_total", round_)
        asking.stop()
        shows(serving, "rtunnel_sessions", 0)
        assert carried(serving) == (90_000, 3000)


def test_what_serves(server: Factory, client: Factory) -> None:
    """A client is ready when each mapping is open at one server at least; a server from its start, not in a drain;
    sessions and mappings are counted at both ends."""
    with echo_service() as service, closed_port() as nowhere:
        serving, wanted = server("--drain=30", PORT), free_port()
        shows(serving, "rtunnel_ready", 1)
        with socket.create_server(("127.0.0.1", wanted)):
            both = (f"--server={text(serving.control_address)}", f"--server={text(nowhere)}")
            mappings = (f"--forward=0:{service.text}", f"--forward={wanted}:{service.text}")
            asking = client(*both, *mappings, PORT, limits={"FIRST_RETRY_S": 0.05})
            shows(asking, "rtunnel_mappings_open", 1)
            assert figures(asking)["rtunnel_ready"] == 0
        shows(asking, "rtunnel_ready", 1)
        for each in (serving, asking):
            shows(each, "rtunnel_mappings_open", 2)
            assert figures(each)["rtunnel_sessions"] == 2
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            serving.send_signal(signal.SIGTERM)
            shows(serving, "rtunnel_ready", 0)
            shows(asking, "rtunnel_ready", 0)


def test_a_client_that_drains_is_not_ready(server: Factory, client: Factory) -> None:
    """It takes no new visitors: whoever looks at `ready` sends them elsewhere."""
    with echo_service() as service:
        serving = server()
        asking = client(f"--server={text(serving.control_address)}", f"--local={service.text}", "--drain=30", PORT)
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(b"x")
            read_exactly(visitor, 1)
            shows(asking, "rtunnel_ready", 1)
            asking.send_signal(signal.SIGTERM)
            shows(asking, "rtunnel_ready", 0)
            assert figures(asking)["rtunnel_mappings_open"] == 0
        assert asking.wait() == 0


def test_refusals_by_rule(server: Factory, client: Factory, house: House) -> None:
    """Who is refused is counted by the rule: a stranger without TLS, one that says nothing, a broken frame, a port
    that is denied, a visitor of another network, one without a client."""
    serving = server(*house.flags("server"), "--allow=*=1", PORT, limits={"HELLO_TIMEOUT_S": 0.5})
    visit(serving.control_address, b"GET / HTTP/1.0\r\n\r\n")
    shows(serving, refusals("tls"), 1)
    with connect(serving.control_address):
        shows(serving, refusals("deadline"), 1)
    asking = client(*house.flags("client"), "--server", text(serving.control_address), "--local=127.0.0.1:9")
    assert asking.wait() == 3
    shows(serving, refusals("port-denied"), 1)
    shows(serving, "rtunnel_handshakes_total", 1)
    plain = server("--public-listen=127.0.0.1:0", "--visitors=192.0.2.0/24", PORT, limits={"HELLO_TIMEOUT_S": 0.5})
    with NaivePeer.connect(plain.control_address) as peer:
        peer.sock.sendall(b"\xff" * 9)
        shows(plain, refusals("protocol"), 1)
    with connect(plain.control_address) as silent:
        silent.sendall(b"\x07")
        shows(plain, refusals("silent"), 1)
    visit(plain.public_address)
    shows(plain, refusals("visitors"), 1)
    lonely = server("--public-listen=127.0.0.1:0", PORT)
    visit(lonely.public_address)
    shows(lonely, refusals("no-client"), 1)


def test_a_server_cannot_make_up_rules(client: Factory) -> None:
    """A code that a server makes up is counted as `other`: no peer adds a label."""
    with PeerServer() as peers:
        asking = client("--server", text(peers.address), "--local=127.0.0.1:9", PORT, "--reconnect-max=0.05")
        for number in range(3):
            peers.accept(b"error=made-up-%d\nmessage=No." % number).sock.close()
        shows(asking, refusals("other"), 3)
        assert "made-up" not in asked(asking.metrics_address)


def test_dials_that_failed(server: Factory, client: Factory) -> None:
    """A server, and a local service, that could not be reached are counted."""
    with closed_port() as nobody:
        tunnel = open_tunnel(server, client, nobody)
        flags = ("--server", text(tunnel.server.control_address), "--server", text(nobody), "--local", text(nobody))
        asking = client(*flags, PORT, "--reconnect-max=60")
        visit(("127.0.0.1", int(tunnel.server.lease_address()[1])))
        shows(asking, 'rtunnel_failed_dials_total{to="service"}', 1)
        shows(asking, 'rtunnel_failed_dials_total{to="server"}', len(asking.events("connect-failed")))


def test_a_server_that_turns_a_client_away(client: Factory) -> None:
    """A connection that comes to no session has failed, whatever its server said before."""
    with PeerServer() as peers:
        asking = client("--server", text(peers.address), "--local=127.0.0.1:9", PORT, "--reconnect-max=0.05")
        for _ in range(2):
            peers.accept(b"").sock.close()
        asking.wait_for_count(2, "session-closed")
        before = len(asking.events("session-closed"))
        found = figures(asking)['rtunnel_failed_dials_total{to="server"}']
        assert before <= found <= before + 2


def test_a_file_of_any_name(house: House, tmp_path: Path) -> None:
    """A file's name that is no text takes no figure away."""
    name = tmp_path / os.fsdecode(b"\xff.crt")
    name.write_bytes((house.folder / "server.crt").read_bytes())
    program = rtunnel.Server(rtunnel.Settings(), house.server(cert=name))
    labels = [label for metric, label in program.figures() if metric == "certificate_expiry_timestamp_seconds"]
    assert any(label.endswith("\\udcff.crt") for label in labels)
    assert all(label.isascii() for label in labels)


def test_limits_certificates_and_the_log(server: Factory, house: House) -> None:
    """Limits stand there with what is used of them, each certificate's file with its days, and the log's losses."""
    serving = server(*house.flags("server"), PORT)
    found = figures(serving)
    for name, limit in (("streams", 16384), ("visitors", 16384), ("clients", 256), ("strangers", 256)):
        assert (found[f'rtunnel_limit_used{{limit="{name}"}}'], found[f'rtunnel_limit{{limit="{name}"}}']) == (0, limit)
    with connect(serving.control_address):
        shows(serving, 'rtunnel_limit_used{limit="strangers"}', 1)
    own = found[f'rtunnel_certificate_expiry_timestamp_seconds{{file="{house.folder}/server.crt"}}']
    assert 396 <= (own - time.time()) / 86400 <= 397
    assert found["rtunnel_log_lines_lost_total"] == 0
    assert found["process_resident_memory_bytes"] > 1_000_000


def test_lines_that_were_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the log could not write is counted: where nobody reads it, and where a write fails."""
    taken, writes = threading.Event(), threading.Event()

    def write(line: str) -> None:
        taken.set()
        writes.wait()
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(rtunnel, "LOG_LINES", 1)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=write))
    before = rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate
    flush = rtunnel.LogHandler("info").finish
    try:
        rtunnel.log_event(logging.INFO, "being-written")
        assert taken.wait(10.0)
        for _ in range(4):  # the first of them waits
            rtunnel.log_event(logging.INFO, "behind-it")
        program = rtunnel.Program(rtunnel.Settings(), None)
        assert program.figures()["log_lines_lost_total", ""] == 3
        writes.set()
        eventually(lambda: program.figures()["log_lines_lost_total", ""] == 5)
    finally:
        writes.set()
        flush()
        rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate = before


def test_a_scrape_among_visitors_that_come_and_go(server: Factory, client: Factory) -> None:
    """Scrapes beside traffic never see a counter fall."""
    with echo_service() as service:
        serving = server(PORT)
        asking = client("--server", text(serving.control_address), "--local", service.text)
        public, last = serving.lease_address(), (0.0, 0.0)
        for _ in range(40):
            with connect(public) as visitor:
                visitor.sendall(b"marco")
                now = carried(serving)
                assert now >= last
                assert now[1] >= last[1]
                read_exactly(visitor, 5)
                last = now
        all_there = (200.0, 200.0)
        eventually(lambda: carried(serving) == all_there)
        assert asking.process.poll() is None


def test_scrapers_that_say_nothing(server: Factory) -> None:
    """Eight connections are served at a time; those that say nothing are closed, and then others are served."""
    serving = server(PORT, limits={"SCRAPE_S": 1.0})
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(serving.metrics_address)) for _ in range(rtunnel.MAX_SCRAPES)]
        for _ in range(3):
            assert visit(serving.metrics_address, b"GET / HTTP/1.0\r\n\r\n") in ("eof", "reset")
        assert [ends_with(each) for each in silent] == ["eof"] * len(silent)
        assert "rtunnel_ready 1" in asked(serving.metrics_address)
    with connect(serving.metrics_address) as strange:
        strange.sendall(b"POST / HTTP/1.0\r\n\r\n")
        assert b"501" in read_all(strange)
    assert not serving.events("internal-error")


ACCEPTS = [
    "application/openmetrics-text; version=x; escaping=y",
    "text/plain;version=1.0.0;escaping",
    ";=;,;",
    "\xff",
    "%s",
]


@pytest.mark.parametrize("accept", ACCEPTS)
def test_strange_scrapers(server: Factory, accept: str) -> None:
    """What a scraper asks for is no error of ours, and takes nobody's place."""
    serving = server(PORT)
    for _ in range(rtunnel.MAX_SCRAPES + 1):
        with connect(serving.metrics_address) as sock:
            sock.sendall(f"GET /?name[]=a&name[]= HTTP/1.1\r\nAccept: {accept}\r\n\r\n".encode("latin-1"))
            assert ends_with(sock) == "eof"
    assert "rtunnel_ready 1" in asked(serving.metrics_address)
    assert not serving.events("internal-error")


@wanted("promtool")
@pytest.mark.parametrize("role", ["server", "client"])
def test_promtool(server: Factory, client: Factory, house: House, role: str) -> None:
    """`promtool check metrics` has nothing to say about either role's figures; OpenMetrics is spoken too."""
    serving = server(*house.flags("server"), PORT)
    asking = client(*house.flags("client"), "--server", text(serving.control_address), "--local=127.0.0.1:9", PORT)
    asking.wait_for("session-opened")
    address = {"server": serving, "client": asking}[role].metrics_address
    assert asked(address, "application/openmetrics-text").endswith("# EOF\n")
    ended = subprocess.run(["promtool", "check", "metrics"], input=asked(address), text=True, capture_output=True)
    assert (ended.returncode, ended.stdout + ended.stderr) == (0, "")


def test_a_port_in_use(server: Factory, program: Factory) -> None:
    """A port that is taken is one sentence, and status 1, as for the others."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        address = text(holder.getsockname())
        for flags in (("server", "--control-listen=127.0.0.1:0"), ("client", "--server=127.0.0.1:1", "--local=h:1")):
            refused = program(*flags, f"--metrics={address}")
            assert refused.wait() == 1
            assert refused.wait_for("failed")["reason"] == f"--metrics {address}: Address already in use"


def test_without_the_package(program: Factory) -> None:
    """Without prometheus-client the option is one sentence, and status 2."""
    lacking = "import sys; sys.modules['prometheus_client'] = None"
    refused = program("server", "--control-listen=127.0.0.1:0", PORT, before=lacking)
    assert refused.wait() == 2
    expected = "rtunnel server: --metrics needs prometheus-client: pip install prometheus-client"
    assert refused.lines == [expected]


@pytest.mark.parametrize(("address", "warned"), [("127.0.0.1:0", 0), (":0", 1)])
def test_who_can_reach_them(server: Factory, address: str, warned: int) -> None:
    """An address that others reach is worth a warning."""
    serving = server(f"--metrics={address}")
    serving.wait_for("listening", kind="control")
    assert len(serving.events("metrics-open")) == warned


def test_each_rule_is_in_the_list() -> None:
    """Each rule by which the source refuses has its name in REFUSALS, and none is there without a cause."""
    words: set[object] = set(rtunnel.rtunnel_tls._RULES)
    for file in ("rtunnel.py", "rtunnel_tls.py"):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                counts = name == "count" and ast.unparse(node.args[0]) == "'refusals_total'"
                if rules := node.args[1:] if counts else node.args[:1] if name in MAKERS else []:
                    words |= {each.value for each in ast.walk(rules[0]) if isinstance(each, ast.Constant)}
    made_up_here = {"code"}  # an attribute's name
    assert {each for each in words if isinstance(each, str)} - made_up_here - {"error"} <= set(rtunnel.REFUSALS)
    # A code that is chosen by the kind of an error is no argument.
    assert set(rtunnel.REFUSALS) - words == {"other", "port-in-use", "unavailable", "too-many-clients"} - words


MAKERS = {"Refused", "HandshakeError", "admit"}
