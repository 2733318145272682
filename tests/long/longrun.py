"""What the long runs share: a tunnel under TLS in processes of its own, its cost, and how a run is started."""

from __future__ import annotations

import argparse
import contextlib
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from load import HEADER, Answers, answering, pattern
from support import ROOT, Address, Program, Service, free_port

sys.path.insert(0, str(ROOT))  # rtunnel, where it is not installed

from tls_peers import House
from tunnels import text

import rtunnel_tls


class Failed(Exception):
    """What the run was to show does not hold."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise Failed(what)


class Stage:
    """A server and a client under TLS on loopback, each of which may be killed and started again, and a local service.

    The public port and the control port stay the same, so visitors and clients come back.
    """

    def __init__(self, folder: Path, service: Service, answers: Answers) -> None:
        self.house = House(folder / "pki")
        rtunnel_tls.issue(self.house.folder, "mallory", hosts=None)
        self.service, self.answers = service, answers
        self.control: Address = ("127.0.0.1", free_port())
        self.public: Address = ("127.0.0.1", free_port())
        self.second: Address = ("127.0.0.1", free_port())
        self.killable: Address = ("127.0.0.1", free_port())  # of a local service that is no part of this process
        self.dialled = self.control  # by the client: a relay's address stands for the network between
        self.programs: list[Program] = []
        self.server: Program
        self.client: Program

    def start_server(self, *flags: str) -> Program:
        where = (f"--control-listen=127.0.0.1:{self.control[1]}", "--public-bind=127.0.0.1")
        files = self.house.flags("server", crl=self.house.crl)
        self.server = self._start("server", *files, *where, *flags)
        self.server.wait_for("listening")
        return self.server

    def start_client(self, *flags: str) -> Program:
        """A client of `service`, and of what may answer at `killable`."""
        forwards = (
            f"--forward={self.public[1]}:{self.service.text}",
            f"--forward={self.second[1]}:{text(self.killable)}",
        )
        where = (f"--server=127.0.0.1:{self.dialled[1]}", *forwards)
        self.client = self._start("client", *self.house.flags("client"), *where, "--reconnect-max=1", *flags)
        return self.client

    def _start(self, *arguments: str) -> Program:
        self.programs.append(Program(*arguments))
        return self.programs[-1]

    def serves(self, address: Address | None = None) -> bool:
        """Whether a visitor gets its answer."""
        with contextlib.suppress(OSError), socket.create_connection(address or self.public, 5.0) as sock:
            sock.sendall(HEADER.pack(1, 0, 1))
            sock.shutdown(socket.SHUT_WR)
            return sock.recv(1) == pattern(2, 1)
        return False

    def cost(self) -> str:
        return "; ".join(f"{name} {cost(each)}" for name, each in (("server", self.server), ("client", self.client)))


def cost(program: Program) -> str:
    """Its memory, threads and descriptors, for a line of the report."""
    memory = program.memory_bytes() / 1e6
    return f"{memory:.0f} MB, {program.threads()} threads, {program.descriptors()} descriptors"


@contextlib.contextmanager
def ending(programs: list[Program]) -> Iterator[None]:
    """Whatever is in the list is ended with the block, and a failure shows the logs' ends."""
    try:
        yield
    except BaseException:
        for program in programs:
            print(f"--- {program.arguments[0]}", *program.lines[-40:], sep="\n", file=sys.stderr)
        raise
    finally:
        for program in programs:
            program.kill()


@contextlib.contextmanager
def stage() -> Iterator[Stage]:
    """A stage without its programs; whatever it starts is ended with it, and a failure shows the logs' ends."""
    with tempfile.TemporaryDirectory() as folder, answering() as (service, answers):
        here = Stage(Path(folder), service, answers)
        with ending(here.programs):
            yield here
    for program in here.programs:
        broken = program.events("internal-error")
        require(not broken, f"internal error: {broken}")


def main(run: Callable[[float], None], seconds: float) -> None:
    """Run it for `--seconds`; the exit status says whether all held."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--seconds", type=float, default=seconds, help=f"how long (default: {seconds:.0f})")
    try:
        run(parser.parse_args().seconds)
    except Failed as failed:
        sys.exit(f"FAILED: {failed}")
