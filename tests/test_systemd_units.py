"""The systemd units in conf/."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

import rtunnel

UNITS = ["rtunnel-server", "rtunnel-client"]


def service(unit: str) -> dict[str, list[str]]:
    """Keys of its [Service] section, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "conf" / f"{unit}.service").read_text().splitlines():
        if match := re.fullmatch(r"([A-Za-z]+)=(.*)", line):
            found.setdefault(match[1], []).append(match[2])
    return found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_takes_it(tmp_path: Path, unit: str) -> None:
    """`systemd-analyze verify` has nothing to say about it, once the program is where the unit says."""
    copy = tmp_path / f"{unit}.service"
    text = (ROOT / "conf" / f"{unit}.service").read_text()
    assert "/opt/rtunnel/bin/rtunnel" in text
    copy.write_text(text.replace("/opt/rtunnel/bin/rtunnel", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    if "Failed to" in done.stderr and "manager" in done.stderr:
        pytest.skip(f"systemd-analyze does not work here: {done.stderr.strip()}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_what_it_starts(unit: str) -> None:
    """It starts the command with options that there are, waits until that says READY, as long as a wrong clock keeps
    it, drains, reloads by SIGHUP, and has room for 10,000 visitors; it runs as nobody, with no right but to open low
    ports, which only the server has."""
    keys = service(unit)
    role = unit.removeprefix("rtunnel-")
    assert (keys["Type"], keys["NotifyAccess"]) == (["notify"], ["main"])
    program, command, *flags = keys["ExecStart"][0].split()
    assert (Path(program).name, command) == ("rtunnel", role)
    assert flags == ["-c", f"/etc/rtunnel/{role}.ini", "--drain", "10"]
    assert {"drain"} <= {option.name for option in rtunnel.OPTIONS[role]}
    assert keys["TimeoutStartSec"] == ["infinity"]  # READY waits for a clock that is right: run
    assert int(keys["TimeoutStopSec"][0]) > 10 + rtunnel.STOP_TIMEOUT_S
    assert "\nStartLimitIntervalSec=0\n" in (ROOT / "conf" / f"{unit}.service").read_text().partition("[Service]")[0]
    assert keys["ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert int(keys["LimitNOFILE"][0]) >= 10_000 + rtunnel.MAX_CLIENTS + rtunnel.MAX_STRANGERS
    assert int(keys["TasksMax"][0]) >= 2 * 10_000
    assert keys["DynamicUser"] == keys["NoNewPrivileges"] == keys["MemoryDenyWriteExecute"] == ["yes"]
    assert keys["CapabilityBoundingSet"] == (["CAP_NET_BIND_SERVICE"] if role == "server" else [""])
    assert keys["SystemCallFilter"][0] == "@system-service"
    assert keys["RestartPreventExitStatus"] == (["2"] if role == "server" else ["2 3"])
