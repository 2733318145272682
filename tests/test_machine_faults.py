"""Faults of the machine (those of the network and of processes are in long/faults.py, which test_long_runs.py runs)."""

from __future__ import annotations

import re
import subprocess
import sys
import time

import faults
import pytest
from level1 import Ends
from load import Load, answering
from support import ROOT, connect, echo_service, eventually, free_port, read_exactly
from tunnels import text


def test_the_clock_is_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's clock may jump by hours: no wait, no deadline and no backoff goes by it."""
    assert not re.search(r"time\.time\b|datetime", (ROOT / "rtunnel.py").read_text())
    with answering() as (service, answers), Ends() as ends:
        public = ends.open_tunnel(service, heartbeat=0.2)
        with Load(public, 4) as load:
            for step_s in (3600, -3600, 86400):
                real = time.time
                monkeypatch.setattr(time, "time", lambda real=real, step_s=step_s: real() + step_s)
                load.wait_for(50)
        assert not load.failed
        assert not load.wrong + answers.wrong
        assert len(ends.opened()) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /dev/full")
def test_the_logs_disk_is_full() -> None:
    """A log that can no longer be written does not stop the tunnel."""
    control, public = ("127.0.0.1", free_port()), free_port()
    with echo_service() as service, open("/dev/full", "wb") as full:
        where = (["server", f"--control-listen={text(control)}"],)
        where += (["client", f"--server={text(control)}", f"--forward={public}:{service.text}", "--reconnect-max=0.1"],)
        command = [sys.executable, str(ROOT / "rtunnel.py")]
        programs = [subprocess.Popen([*command, *flags, "--log-level=debug"], stderr=full) for flags in where]

        def serves() -> bool:
            try:
                with connect(("127.0.0.1", public)) as visitor:
                    visitor.sendall(b"marco")
                    return read_exactly(visitor, 5) == b"marco"
            except (OSError, EOFError):
                return False

        try:
            for _ in range(10):
                eventually(serves)
            for program in reversed(programs):
                program.terminate()
                assert program.wait(5) == 0
        finally:
            for program in programs:
                program.kill()
                program.wait()


def test_the_link_goes_down() -> None:
    """A link between client and server that goes down and up again: the client is back, and visitors are served."""
    if why := faults.in_a_namespace():
        pytest.skip(why)
