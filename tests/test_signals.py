"""What each signal does in each phase: start, serving, drain, stop; and what systemd is told."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from level1 import Peer, PeerServer
from support import ROOT, Program, connect, echo_service, ends_with, eventually, free_port, read_exactly
from tunnels import Factory, open_tunnel, text

if sys.platform == "win32":
    pytest.skip("signals and systemd are not of Windows", allow_module_level=True)

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FLAGS = {"server": ("--control-listen=127.0.0.1:0",), "client": ("--server=127.0.0.1:9", "--local=127.0.0.1:9")}


def test_it_runs_until_a_signal() -> None:
    """However long that is: on Windows no wait of Python may be longer than threading.TIMEOUT_MAX, 50 days."""
    script = (
        "import sys, threading; threading.TIMEOUT_MAX = 0.3; sys.argv[0] = 'rtunnel'; import rtunnel; rtunnel.entry()"
    )
    command = [sys.executable, "-c", script, "server", *FLAGS["server"]]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "listening" in process.stderr.readline()
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.0)
            process.terminate()
            assert "stopping signal=SIGTERM" in process.stderr.read()
            assert process.wait(10) == 0
        finally:
            process.kill()


# --- the start ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_back(role: str) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """`python rtunnel.py ROLE`, and its log, in the moment in which it has begun to hold signals back."""
    command = [sys.executable, "rtunnel.py", role, *FLAGS[role]]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            eventually(lambda: blocked(process.pid, signal.SIGTERM), 10.0)
            assert process.stderr is not None
            yield process, process.stderr
        finally:
            process.kill()


def blocked(pid: int, number: signal.Signals) -> bool:
    """Whether the process's main thread holds the signal back."""
    mask = re.search(r"SigBlk:\s+([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    assert mask is not None
    return bool(int(mask[1], 16) >> (number - 1) & 1)


@linux_only
@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_it_starts(role: str, number: signal.Signals) -> None:
    """A signal that comes before the program's modules are imported stops it as soon as it has started, with status
    0."""
    with held_back(role) as (process, log):
        process.send_signal(number)
        said = log.read()
        assert process.wait(5.0) == 0
    assert f"INFO stopping signal={number.name}" in said
    assert "INFO stopped status=0" in said


@linux_only
@pytest.mark.parametrize(("number", "event"), [(signal.SIGHUP, "reloaded"), (signal.SIGUSR1, "state")])
def test_other_signals_while_it_starts(number: signal.Signals, event: str) -> None:
    """SIGHUP and SIGUSR1 do not kill it in that moment: they are done when it serves."""
    with held_back("server") as (process, log):
        process.send_signal(number)
        said = []
        for line in log:
            said.append(line.split()[2])
            if said[-1] == event:
                break
        assert said[0] == "listening"
        process.send_signal(signal.SIGTERM)
        assert "stopped" in log.read()
        assert process.wait(5.0) == 0


# --- serving -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["server", "client"])
def test_a_burst_of_signals(server: Factory, client: Factory, role: str) -> None:
    """Reloads and states that are asked for faster than they are done lose no visitor, and the stop comes behind
    them."""
    with echo_service() as service:
        tunnel = open_tunnel(server, client, service)
        tested = tunnel.server if role == "server" else tunnel.client
        with tunnel.connect() as visitor:
            for _ in range(50):
                tested.send_signal(signal.SIGHUP)
                tested.send_signal(signal.SIGUSR1)
                visitor.sendall(b"x")
                assert read_exactly(visitor, 1) == b"x"
            assert tested.stop() == 0
        assert tested.events("reloaded")
        assert tested.events("state")
        assert tested.records[-1].event == "stopped"


# --- the drain ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["server", "client"])
def test_in_the_drain(server: Factory, client: Factory, role: str) -> None:
    """In the drain SIGUSR1 logs the state, SIGHUP is refused with a line, and neither ends it: the open stream goes on
    and may finish. (SIGTERM and SIGINT end it: test_drain.)"""
    with echo_service() as service:
        serving = server("--drain=20")
        asking = client("--drain=20", "--server", text(serving.control_address), "--local", service.text)
        tested = serving if role == "server" else asking
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(b"x")
            assert read_exactly(visitor, 1) == b"x"
            tested.send_signal(signal.SIGTERM)
            tested.wait_for("stopping")
            tested.send_signal(signal.SIGUSR1)
            assert tested.wait_for("state")["streams"].startswith("1/")
            tested.send_signal(signal.SIGHUP)
            assert "stopping" in tested.wait_for("reload-refused")["reason"]
            visitor.sendall(b"still on")
            assert read_exactly(visitor, 8) == b"still on"
            visitor.shutdown(socket.SHUT_WR)
            assert ends_with(visitor) == "eof"
        assert tested.wait() == 0
        assert not tested.events("reloaded")


# --- the stop ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_the_stop(server: Factory, client: Factory, role: str, seconds: float) -> Iterator[Program]:
    """A program that has been asked to stop, and waits so long for a peer that keeps its connection open."""
    limits = {"FAREWELL_S": seconds, "STOP_TIMEOUT_S": seconds + 2.0}
    with PeerServer() as peer_server, contextlib.ExitStack() as stack:
        if role == "server":
            tested = server(limits=limits)
            stack.enter_context(Peer.as_client(tested.control_address))
        else:
            tested = client("--server", text(peer_server.address), "--local=127.0.0.1:9", limits=limits)
            peer_server.accept()
        tested.wait_for("session-opened")
        tested.send_signal(signal.SIGTERM)
        tested.wait_for("stopping")
        yield tested


@pytest.mark.parametrize("role", ["server", "client"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(server: Factory, client: Factory, role: str, number: signal.Signals) -> None:
    """While the stop waits for something, a second signal ends the program at once, with status 1."""
    with in_the_stop(server, client, role, 60.0) as tested:
        assert tested.process.poll() is None
        asked = time.monotonic()
        assert tested.stop(number) == 1
        assert time.monotonic() - asked < 3.0
        assert not tested.events("stopped")


@pytest.mark.parametrize("role", ["server", "client"])
def test_other_signals_in_the_stop(server: Factory, client: Factory, role: str) -> None:
    """SIGHUP and SIGUSR1 do nothing in the stop, which ends as it would: with status 0."""
    with in_the_stop(server, client, role, 0.5) as tested:
        for _ in range(5):
            tested.send_signal(signal.SIGHUP)
            tested.send_signal(signal.SIGUSR1)
        assert tested.wait() == 0
        assert tested.records[-1] == ("INFO", "stopped", {"status": "0"})
        assert not tested.events("reloaded") + tested.events("state") + tested.events("reload-failed")


# --- systemd -----------------------------------------------------------------------------------------------------


class Notified:
    """The socket on which systemd listens, by a path or by an abstract name."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + address[1:] if address[0] == "@" else address)
        self.sock.settimeout(10.0)

    def hear(self) -> dict[str, str]:
        """The next word."""
        return dict(line.split("=", 1) for line in self.sock.recv(4096).decode().split("\n"))


@pytest.fixture(params=["path", "abstract"])
def notified(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Notified]:
    """Where a unit of Type=notify is told."""
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("abstract names are of Linux")
    address = str(tmp_path / "notify@1") if request.param == "path" else f"@rtunnel-test-{os.getpid()}"
    made = Notified(address)
    with made.sock:
        yield made


def test_what_systemd_is_told(server: Factory, notified: Notified, tmp_path: Path) -> None:
    """READY when the ports are open; RELOADING with the time, and READY again, also where the reload fails; STOPPING
    when the stop begins."""
    config = tmp_path / "server.ini"
    config.write_text("log-level = info\n")
    port = free_port()
    flags = ("-c", str(config), f"--control-listen=127.0.0.1:{port}")
    serving = server(*flags, env={"NOTIFY_SOCKET": notified.address})
    assert notified.hear() == {"READY": "1"}
    connect(("127.0.0.1", port)).close()
    for text_, event in (("log-level = info\n", "reloaded"), ("no-such-key = 1\n", "reload-failed")):
        config.write_text(text_)
        before = time.monotonic_ns() // 1000
        serving.send_signal(signal.SIGHUP)
        reloading = notified.hear()
        assert reloading["RELOADING"] == "1"
        assert before <= int(reloading["MONOTONIC_USEC"]) <= time.monotonic_ns() // 1000
        assert notified.hear() == {"READY": "1"}
        serving.wait_for(event)
    serving.send_signal(signal.SIGTERM)
    assert notified.hear() == {"STOPPING": "1"}
    assert serving.wait() == 0


def test_systemd_is_told_before_the_drain(server: Factory, client: Factory, notified: Notified) -> None:
    """The drain belongs to the stop. A client, whose server may be away for long, is ready at once."""
    with echo_service() as service:
        serving = server()
        asking = client(
            *("--drain=20", "--server", text(serving.control_address), "--local", service.text),
            env={"NOTIFY_SOCKET": notified.address},
        )
        assert notified.hear() == {"READY": "1"}
        with connect(serving.lease_address()) as visitor:
            visitor.sendall(b"x")
            assert read_exactly(visitor, 1) == b"x"
            asking.send_signal(signal.SIGTERM)
            assert notified.hear() == {"STOPPING": "1"}
            visitor.sendall(b"y")
            assert read_exactly(visitor, 1) == b"y"
        assert asking.wait() == 0


@pytest.mark.parametrize("address", ["/nowhere/at/all", "@nobody-listens", "", "@", "x" * 200])
def test_a_socket_that_is_not_there(server: Factory, address: str) -> None:
    """Where nobody listens, or the name is none, the program runs all the same."""
    serving = server(env={"NOTIFY_SOCKET": address})
    assert serving.control_address
    assert serving.stop() == 0
    assert not serving.events("internal-error")
