"""What SIGUSR1 makes a server or a client log (OPERATIONS.md, "Watching it")."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys

import pytest
from support import ROOT, Fields, connect, echo_service, read_exactly
from tls_peers import House
from tunnels import Factory, text

if not hasattr(signal, "SIGUSR1"):
    pytest.skip("this system has no SIGUSR1", allow_module_level=True)


@pytest.mark.parametrize("tls", [False, True])
def test_state(server: Factory, client: Factory, house: House, tls: bool) -> None:
    """SIGUSR1 has each end log its limits, sessions and streams, the server its leases too, a line each, with bytes,
    queues, windows and the days that certificates have left; whatever owns a lease in plain mode stays unsaid."""
    flags = {role: house.flags(role) if tls else () for role in ("server", "client")}
    with echo_service() as service, contextlib.ExitStack() as stack:
        serving = server(*flags["server"])
        asking = client(*flags["client"], "--server", text(serving.control_address), "--local", service.text)
        public = serving.lease_address()
        visitors = [stack.enter_context(connect(public)) for _ in range(3)]
        for visitor in visitors:
            visitor.sendall(b"marco")
            assert read_exactly(visitor, 5) == b"marco"
        for each in (serving, asking):
            streams: list[Fields] = []
            while [line["sent"] for line in streams] != 3 * [
                "5"
            ]:  # a pump counts what it has sent: a visitor is faster
                each.send_signal(signal.SIGUSR1)
                state, session = each.wait_for("state"), each.wait_for("state-session")
                streams = [each.wait_for("state-stream") for _ in range(3)]
            assert state["streams"] == "3/16384"
            assert int(state["threads"]) > 3
            assert session["level"] == "1"
            assert session["streams"] == "3"
            assert session["budget_left"] == str(64 << 20)
            assert float(session["rtt_ms"]) < 5000
            for line in (state, session):
                assert ("certificate_days_left" in line) == tls
            for number, line in enumerate(streams, 1):
                assert (line["stream"], line["received"], line["sent"]) == (str(number), "5", "5")
                assert (line["queued"], line["window"], line["credit"]) == ("0", "65536", "65531")
                assert (line["ended"], line["outbound_ended"]) == ("False", "False")
                assert line["peer"].startswith("127.0.0.1:")
        state, lease = serving.events("state")[0], serving.wait_for("state-lease")
        assert (state["clients"], state["leases"]) == ("1/256", "1")
        assert (state["visitors"], state["strangers"]) == ("3/16384", "0/256")
        assert lease["identity"] == ("client" if tls else "anonymous")
        assert lease["sessions"] == serving.events("state-session")[0]["peer"]
        assert "instance" not in lease


# Threads that wait, threads that start and end, and garbage that lets others run while it is collected.
STATES = """
import _thread, gc, logging, threading, time
import rtunnel

class Cycle:
    def __init__(self):
        self.itself = self

    def __del__(self):
        time.sleep(0.001)

def start_others():
    while True:
        _thread.start_new_thread(int, ())
        time.sleep(0.0005)

logging.disable()
program = rtunnel.Server(rtunnel.Settings(), None)
for _ in range(200):
    program.pool.run(threading.Event().wait)
_thread.start_new_thread(start_others, ())
gc.set_threshold(70)
for _ in range(400):
    garbage = [Cycle() for _ in range(5)]
    del garbage
    program.log_state()
"""


def test_the_state_stops_nobody() -> None:
    """Whatever starts, ends or is collected meanwhile: sys._current_frames, which counted the threads once, could stop
    all of Python 3.11 for ever (github.com/python/cpython/issues/106883)."""
    assert subprocess.run([sys.executable, "-c", STATES], cwd=ROOT, timeout=30).returncode == 0
