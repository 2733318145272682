"""Forks the programs under test from a process that has imported rtunnel: most of a start is its imports.

The starter is a process without threads, so that a fork copies no lock that somebody holds. Beside each program stays
its parent, which waits for it and tells its status. Linux and other systems that have fork and pass descriptors.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]


class Forked:
    """A program that has been forked: as much of a Popen as the tests need."""

    def __init__(self, pid: int, status: socket.socket, stderr: int) -> None:
        self.pid, self._status = pid, status
        self.stderr = open(stderr, errors="backslashreplace")  # noqa: SIM115 - whoever reads it closes it
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._status.settimeout(timeout)
            try:
                self.returncode = int(self._status.recv(32))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0) from None
            self._status.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Starter:
    """The starter's process, from the side of the tests."""

    def __init__(self) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )

    def start(self, code: str, arguments: Sequence[str], env: Mapping[str, str]) -> Forked:
        """What `python -c CODE ARGUMENTS` does, with its standard error in a pipe."""
        stderr, write_end = os.pipe()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([code, list(arguments), dict(env)])
        socket.send_fds(self._requests, [request.encode()], [write_end, far.fileno()])
        os.close(write_end)
        far.close()
        return Forked(int(near.recv(32)), near, stderr)

    def close(self) -> None:
        self._requests.close()
        self._process.wait()


# --- in the starter's process --------------------------------------------------------------------------------


def serve(requests: socket.socket) -> None:
    """Start what is asked for, until the tests have ended."""
    sys.path[:] = [str(ROOT), *sys.path[1:], str(HELPERS)]
    import tap  # noqa: F401

    import rtunnel  # noqa: F401

    parents: set[int] = set()
    while True:
        request, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 2)
        if not request:
            return None
        parent = os.fork()
        if not parent:
            return be_parent(*json.loads(request), *descriptors)
        parents.add(parent)
        parents -= {each for each in parents if os.waitpid(each, os.WNOHANG)[0]}
        for each in descriptors:
            os.close(each)


def be_parent(code: str, arguments: list[str], env: dict[str, str], stderr: int, status: int) -> None:
    """Start one program, and tell its process id, and how it has ended."""
    program = os.fork()
    if not program:
        return be_program(code, arguments, env, stderr)
    os.dup2(status, 0)
    os.closerange(1, 1 << 16)  # standard error's pipe too, which ends when the program does
    os.write(0, str(program).encode())
    os.write(0, str(os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])).encode())
    os._exit(0)


def be_program(code: str, arguments: list[str], env: dict[str, str], stderr: int) -> None:
    os.dup2(stderr, 2)
    os.closerange(3, 1 << 16)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = ["-c", *arguments]
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(code, scope)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
