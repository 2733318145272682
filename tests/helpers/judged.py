"""Each test's sessions are judged as it ends: a rule of PROTOCOL.md that our own end has broken fails the test.

conftest.py takes over what is here. The programs that a test starts, and the ends in its own process, are tapped
(tap.py). What a test's peer breaks is no failure: many do so on purpose.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tap
from judge import ENDS, Judge, judge, read_recording


class Counts:
    """What has been judged in this run of the tests."""

    def __init__(self) -> None:
        self.sessions = {0: 0, 1: 0, None: 0}  # by level; None: it ended before the server's first frame
        self.frames = 0
        self.peers_broken: dict[str, int] = {}  # rules that the tests' peers broke, and how often

    def add(self, done: Judge, own: int) -> None:
        self.sessions[done.session.level] += 1
        self.frames += done.frames
        for each in done.findings:
            if each.broken.by != own:
                self.peers_broken[each.broken.rule] = self.peers_broken.get(each.broken.rule, 0) + 1


COUNTS = Counts()


def judge_all(folder: Path, growth: int) -> list[str]:
    """What our own ends have broken in all recordings of a folder."""
    found = []
    for file in sorted(folder.iterdir()):
        for recording in read_recording(file.read_text()):
            done = judge(recording.frames, growth)
            assert recording.recorded_at is not None
            COUNTS.add(done, recording.recorded_at)
            found += [f"{recording.name}: {each}" for each in done.findings if each.broken.by == recording.recorded_at]
    return found


@pytest.fixture(autouse=True)
def judged(request: pytest.FixtureRequest) -> Iterator[Path]:
    """All sessions of our ends in a test, from its beginning to its end; the folder of the recordings.

    A test that changes what the rules say is marked: `unjudged(reason)`. A larger budget than the usual 64 MiB:
    `session_budget(bytes)`.
    """
    folder = Path(tempfile.mkdtemp(prefix="judged-"))
    budget = request.node.get_closest_marker("session_budget")
    os.environ[tap.VARIABLE] = str(folder / "tap")
    try:
        yield folder
        found = judge_all(folder, budget.args[0] if budget else 1 << 26)
    finally:
        del os.environ[tap.VARIABLE]
        shutil.rmtree(folder)
    if request.node.get_closest_marker("unjudged") is None and found:
        pytest.fail("broken by our own end:\n" + "\n".join(found[:20]))


def summary(reporter: Any) -> None:
    """For the end of a run: how much was judged."""
    counts = COUNTS.sessions
    if total := sum(counts.values()):
        broken = ", ".join(f"{rule} {count}" for rule, count in sorted(COUNTS.peers_broken.items()))
        reporter.write_line(
            f"judged: {total} sessions ({counts[1]} of level 1, {counts[0]} of level 0), {COUNTS.frames} frames; "
            f"rules that the tests' {ENDS[0]}s and {ENDS[1]}s broke: {broken or 'none'}"
        )
