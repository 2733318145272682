"""The log: whatever becomes of it, the tunnel serves, and what is lost is counted."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from level1 import Peer
from support import (
    ROOT,
    Address,
    connect,
    counted,
    echo_service,
    eventually,
    free_port,
    parse_line,
    read_exactly,
)
from tunnels import Factory, closed_port, open_tunnel, visit

import rtunnel

if sys.platform != "linux":
    pytest.skip("what a log can meet is arranged as Linux has it", allow_module_level=True)

LOST = re.compile(r"WARNING log-lines-lost count=(\d+)")


@contextlib.contextmanager
def small_pipe() -> Iterator[tuple[io.FileIO, io.FileIO]]:
    """A pipe that holds 4 KiB: the end to read and the end to write. Both are closed in the end."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with open(reading, "rb", 0) as reader, open(writing, "wb", 0) as writer:
        yield reader, writer


# --- a program whose log goes nowhere ----------------------------------------------------------------------------


class Quiet:
    """A program in a process of its own whose log cannot be read, at debug level; few lines may wait."""

    def __init__(self, *arguments: str, stderr: int | None, close_it: bool = False) -> None:
        start = [sys.executable, "-c", "import rtunnel as m\nm.LOG_LINES = 50\nm.entry()", *arguments]
        if close_it:
            start = ["sh", "-c", 'exec "$@" 2>&-', "sh", *start]
        self.process = subprocess.Popen(start, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=stderr)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(5.0)


@contextlib.contextmanager
def unread_pipe() -> Iterator[int]:
    """Nobody reads it, and it is full at once."""
    with small_pipe() as (_, writing):
        yield writing.fileno()


@contextlib.contextmanager
def closed_pipe() -> Iterator[int]:
    """Whoever read it is gone."""
    with small_pipe() as (reading, writing):
        reading.close()
        yield writing.fileno()


@contextlib.contextmanager
def full_disk() -> Iterator[int]:
    """Nothing can be written."""
    with Path("/dev/full").open("wb") as file:
        yield file.fileno()


@contextlib.contextmanager
def stopped_terminal() -> Iterator[int]:
    """A terminal on which somebody has pressed ^S."""
    ours, its = os.openpty()
    try:
        termios.tcflow(its, termios.TCOOFF)
        yield its
    finally:
        os.close(its)
        os.close(ours)


@contextlib.contextmanager
def closed_descriptor() -> Iterator[None]:
    """There is no standard error at all."""
    yield None


KINDS = [unread_pipe, closed_pipe, full_disk, stopped_terminal, closed_descriptor]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("role", ["server", "client"])
def test_the_tunnel_serves(
    program: Factory, role: str, kind: Callable[[], contextlib.AbstractContextManager[int | None]]
) -> None:
    """Where the log cannot be written the program starts, serves many visitors, a server takes new clients, and
    SIGTERM ends it with status 0."""
    control, public = free_port(), free_port()
    with echo_service() as service, kind() as stderr:
        debug = ("--log-level", "debug")
        serve = ("server", f"--control-listen=127.0.0.1:{control}", "--public-bind=127.0.0.1", *debug)
        ask = ("client", f"--server=127.0.0.1:{control}", f"--forward={public}:{service.text}", "--reconnect-max=0.2")
        mute = Quiet(*(serve if role == "server" else (*ask, *debug)), stderr=stderr, close_it=stderr is None)
        try:
            program(*(ask if role == "server" else serve))
            eventually(lambda: echoes(("127.0.0.1", public)))
            for _ in range(30):  # four lines of debug each
                assert echoes(("127.0.0.1", public))
            if role == "server":
                Peer.as_client(("127.0.0.1", control)).sock.close()
                assert echoes(("127.0.0.1", public))
            if stderr is None:
                assert os.readlink(f"/proc/{mute.process.pid}/fd/2") == "/dev/null"
            assert mute.stop() == 0
        finally:
            mute.process.kill()
            mute.process.wait()


def echoes(address: Address) -> bool:
    """Whether a visitor gets its word back."""
    with contextlib.suppress(OSError, EOFError), connect(address, 5.0) as visitor:
        visitor.sendall(b"marco")
        return read_exactly(visitor, 5) == b"marco"
    return False


# --- what is lost ------------------------------------------------------------------------------------------------


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[io.TextIOBase], Callable[[], None]]]:
    """Starts the log of this process on a stream, with room for ten lines; returns what writes the rest of it."""
    before = rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate
    monkeypatch.setattr(rtunnel, "LOG_LINES", 10)

    def start(stream: io.TextIOBase) -> Callable[[], None]:
        monkeypatch.setattr(sys, "stderr", stream)
        return rtunnel.LogHandler("debug").finish

    yield start
    rtunnel.LOG.level, rtunnel.LOG.handlers[:], rtunnel.LOG.propagate = before


Log = Callable[[io.TextIOBase], Callable[[], None]]


def numbers_and_lost(lines: list[str]) -> tuple[list[int], int]:
    """The numbers of the lines that this module logs, and how many lines are told to be lost."""
    numbers = [int(found[1]) for line in lines if (found := re.search(r" INFO line number=(\d+)", line))]
    return numbers, sum(int(found[1]) for line in lines if (found := LOST.search(line)))


def told_of(lines: list[str]) -> int:
    """How many lines there have been, lost or not."""
    numbers, lost = numbers_and_lost(lines)
    return len(numbers) + lost


def test_lost_lines_are_counted(log: Log) -> None:
    """A pipe that is full and read later: who logs never waits, the first lines and the last ones are there, and
    between them a line says how many are not."""
    with small_pipe() as (reading, writing), os.fdopen(os.dup(writing.fileno()), "w", 1) as stream:
        flush = log(stream)
        for number in range(2000):
            rtunnel.log_event(rtunnel.INFO, "line", number=number)  # would wait for ever else
        lines: list[str] = []

        def read() -> None:
            with os.fdopen(os.dup(reading.fileno())) as file:
                for line in file:
                    lines.append(line)
                    if "number=2000" in line:
                        return

        reader = threading.Thread(target=read)
        reader.start()
        eventually(lambda: told_of(lines) == 2000)  # so there is room for one more
        rtunnel.log_event(rtunnel.INFO, "line", number=2000)
        reader.join(10)
        flush()
    numbers, lost = numbers_and_lost(lines)
    assert told_of(lines) == 2001
    assert lost > 1000
    assert numbers == sorted(set(numbers))
    assert (numbers[0], numbers[-1]) == (0, 2000)
    assert all(parse_line(line.rstrip("\n")) for line in lines)


class Disk(io.StringIO):
    """A file on a disk that may be full."""

    full = False
    asked_for = 0  # lines of this module that were to be written

    def write(self, text: str) -> int:
        self.asked_for += "number=" in text
        if self.full:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_lines_that_a_full_disk_loses_are_counted(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that cannot be written counts; when there is room again the next line is followed by the count."""
    monkeypatch.setattr(rtunnel, "LOG_LINES", 1000)
    disk = Disk()
    flush = log(disk)
    for number in range(1, 301):
        if number % 100 == 1:  # the first hundred fit, the second do not, the third do
            eventually(lambda number=number: disk.asked_for == number - 1)  # type: ignore[misc]
            disk.full = number == 101
        rtunnel.log_event(rtunnel.INFO, "line", number=number)
    flush()
    numbers, lost = numbers_and_lost(disk.getvalue().splitlines())
    assert numbers == [*range(1, 101), *range(201, 301)]
    assert lost == 100


def test_the_end_waits_for_the_last_lines(log: Log) -> None:
    """What has been logged is written at the end."""
    disk = Disk()
    flush = log(disk)
    for number in range(10):
        rtunnel.log_event(rtunnel.INFO, "line", number=number)
    flush()
    assert numbers_and_lost(disk.getvalue().splitlines()) == ([*range(10)], 0)


def test_the_end_does_not_wait_for_a_reader(log: Log) -> None:
    """A pipe that nobody reads keeps the end for half a second at most."""
    with small_pipe() as (reading, writing), os.fdopen(os.dup(writing.fileno()), "w", 1) as stream:
        writing.write(bytes(4096))  # it is full
        flush = log(stream)
        for number in range(2000):
            rtunnel.log_event(rtunnel.INFO, "line", number=number)
        remaining = rtunnel.deadline(5.0)
        flush()
        assert 4.0 < remaining() < 4.6
        os.set_blocking(reading.fileno(), False)

        def drained() -> bool:
            reading.read(1 << 16)
            flush()  # once more, so that its thread can end: the word for that found no room
            return not any(thread.name == "log" for thread in threading.enumerate())

        eventually(drained)


# --- lines that visitors cause -----------------------------------------------------------------------------------


def test_a_burst_is_counted(server: Factory, client: Factory) -> None:
    """Forty visitors of a local service that is down cost a few lines a second, and each of them is counted, though
    none comes after them."""
    with closed_port() as nobody:
        tunnel = open_tunnel(server, client, nobody, LOG_BURST=2)
        for _ in range(40):
            assert visit(tunnel.public) == "reset"
        eventually(lambda: counted(tunnel.client.events("dial-failed")) == 40, 5.0)
        counts = [line for line in tunnel.client.events("dial-failed") if "more_like_it" in line]
        assert counts
        assert all(set(line) == {"more_like_it"} for line in counts)
        assert len(tunnel.client.events("dial-failed")) <= 20
