"""Fixtures of all tests: the watch for leaks, and the programs under test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from judged import judged as judged  # each test's sessions
from judged import summary
from level1 import forget_timers
from starter import Starter
from support import Program, eventually, threads
from tls_peers import House

import rtunnel

Factory = Callable[..., Program]

# The program's times in all tests, where a test does not set its own: what it does then it does sooner.
TIMES = {"FAREWELL_S": 0.2, "FIRST_RETRY_S": 0.1, "STEP_S": 0.1, "DRAIN_STEP_S": 0.1, "WATCH_S": 0.2}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unjudged(reason): the test changes what PROTOCOL.md says of our end")
    config.addinivalue_line("markers", "session_budget(bytes): what the test's ends have, where it is not 64 MiB")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    summary(terminalreporter)


def _descriptors() -> dict[int, str]:
    """Open descriptors of this process and what each is; empty where the system does not tell."""
    found: dict[int, str] = {}
    try:
        numbers = os.listdir("/proc/self/fd")
    except OSError:
        return found
    for number in numbers:
        try:
            found[int(number)] = os.readlink(f"/proc/self/fd/{number}")
        except OSError:  # the one that the listing itself used
            continue
    return found


def _processors() -> set[int]:
    """Where this thread may run; empty where the system does not tell."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _children() -> set[str]:
    """Processes that this one has started and not yet waited for; empty where the system does not tell."""
    found: set[str] = set()
    for thread in Path("/proc/self/task").glob("*/children"):
        try:
            found.update(thread.read_text().split())
        except OSError:  # the thread has ended meanwhile
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def starter() -> Iterator[None]:
    """Where the system has what it needs, programs under test are forked: a start costs 10 ms, and not 170."""
    if sys.platform == "linux":
        Program.starter = Starter()
    yield
    if Program.starter:
        Program.starter.close()


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No test leaves a thread, a descriptor or a child process behind; a failure names it."""
    before, descriptors, children = threads(), _descriptors(), _children()
    processors = _processors()
    yield
    assert _processors() == processors, "the test has left the others fewer processors"

    def left() -> list[str]:
        return [
            *(f"{count} threads {name}" for name, count in (threads() - before).items()),
            *(f"descriptor {n} {what}" for n, what in _descriptors().items() if descriptors.get(n) != what),
            *(f"process {pid}" for pid in _children() - children),
        ]

    try:
        eventually(lambda: not left(), deadline=5.0)
    except AssertionError:
        pytest.fail("left behind: " + ", ".join(left()))


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The times of what runs in this process, whose clock is empty afterwards; `program` sets those of the others."""
    for name, seconds in TIMES.items():
        monkeypatch.setattr(rtunnel, name, seconds)
    yield
    forget_timers()


@pytest.fixture
def program(no_leaks: None) -> Iterator[Factory]:
    """Starts `rtunnel.py ARGUMENTS`; all are ended after the test, and their logs shown where it failed.

    No line of the log is held back, unless `limits` says so."""
    started: list[Program] = []

    def start(*arguments: str, limits: Mapping[str, Any] | None = None, **options: Any) -> Program:
        started.append(Program(*arguments, limits={"LOG_BURST": 1_000_000, **TIMES, **(limits or {})}, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()
        print(f"--- {' '.join(each.arguments)}\n" + "\n".join(each.lines))


@pytest.fixture
def server(program: Factory) -> Factory:
    """Starts a server on a free loopback port, its client-chosen ports on loopback too, at debug level."""

    def start(*flags: str, **options: object) -> Program:
        standard = ("--control-listen", "127.0.0.1:0", "--public-bind", "127.0.0.1", "--log-level", "debug")
        return program("server", *standard, *flags, **options)

    return start


@pytest.fixture
def client(program: Factory) -> Factory:
    """Starts a client at debug level."""

    def start(*flags: str, **options: object) -> Program:
        return program("client", "--log-level", "debug", *flags, **options)

    return start


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The usual certificates: ML-DSA-65, for every profile but cnsa2."""
    return House(tmp_path_factory.mktemp("house") / "pki")


@pytest.fixture(scope="session")
def big_house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The same with ML-DSA-87, for every profile."""
    return House(tmp_path_factory.mktemp("big") / "pki", "mldsa87", ("localhost", "127.0.0.1", "::1"))
