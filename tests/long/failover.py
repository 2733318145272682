"""Two servers behind HAProxy and one client: what falls over, and what visitors see of it.

`python tests/long/failover.py --seconds 60`. While browsers ask for pages, one server is killed
and comes back, the other is restarted with a drain, and then the client is restarted. No request may
fail. All on loopback; every process that is ended is one that this program started.
"""

from __future__ import annotations

import collections
import contextlib
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from engines import found, haproxy, nginx, shipped_haproxy
from longrun import ending, main, require
from support import Address, Program, free_port
from tls_peers import House

HOSTS = ("127.0.0.2", "127.0.0.3")  # as in conf/haproxy.cfg: one server each
BROWSERS = 8
PAUSES_S = (0.0, 0.1, 0.3, 1.0, 3.0)  # before a request is sent again
PAGE = "x" * 600  # which crosses in one frame: of a longer one a kill may cut what has begun
PAGES = f'server {{ listen PORT backlog=1024; location / {{ return 200 "$request_uri {PAGE}"; }} }}'


class Request(NamedTuple):
    """What became of one page."""

    began: float
    seconds: float
    attempts: int
    fault: str  # empty: it came whole


class Browsers:
    """Visitors that ask for page after page, each over a connection of its own.

    A request of which no byte of an answer has come is sent again, as browsers do. One that has begun
    to be answered never is, and an answer that is not whole is a failure.
    """

    def __init__(self, address: Address, count: int) -> None:
        self._address = address
        self._stop = threading.Event()
        self.requests: collections.deque[Request] = collections.deque()
        self._threads = [threading.Thread(target=self._browse, args=(number,)) for number in range(count)]

    def __enter__(self) -> Browsers:
        for each in self._threads:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for each in self._threads:
            each.join()

    def _browse(self, number: int) -> None:
        page = 0
        while not self._stop.is_set():
            page += 1
            began = time.monotonic()
            for attempts, pause_s in enumerate(PAUSES_S, 1):  # noqa: B007  # the last one is used
                time.sleep(pause_s)  # the browser's own pause; nothing is ordered by it
                fault, begun = self._ask(f"/{number}/{page}")
                if begun or not fault:
                    break
            self.requests.append(Request(began, time.monotonic() - began, attempts, fault))

    def _ask(self, path: str) -> tuple[str, bool]:
        """What went wrong, if anything, and whether a byte of an answer had come."""
        answer = b""
        try:
            with socket.create_connection(self._address, 20) as sock:
                sock.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                while part := sock.recv(1 << 16):
                    answer += part
        except OSError as error:
            return str(error) or type(error).__name__, bool(answer)
        body = answer.partition(b"\r\n\r\n")[2]
        if body != f"{path} {PAGE}".encode():
            return f"{len(body)} bytes of an answer came, then its end", bool(answer)
        return "", True


class Farm:
    """Two servers, a client of both, and HAProxy in front, with the shipped configuration."""

    def __init__(self, folder: Path, page_port: int, flags: dict[str, tuple[str, ...]]) -> None:
        self._flags = flags
        self._forward = f"--forward={{}}:127.0.0.1:{page_port}"
        self.ports = {old: free_port() for old in (80, 443, 81, 8080, 9443, 9444, 8081)}
        self.public: Address = ("127.0.0.1", self.ports[80])
        self._controls = [free_port() for _ in HOSTS]
        self.programs: list[Program] = []
        self.servers = [self.start_server(number) for number in range(len(HOSTS))]
        for each in self.servers:
            each.wait_for("listening", kind="control")
        self.client = self.start_client()
        self._folder = folder

    def _start(self, *arguments: str) -> Program:
        self.programs.append(Program(*arguments))
        return self.programs[-1]

    def start_server(self, number: int) -> Program:
        where = (f"--control-listen=127.0.0.1:{self._controls[number]}", f"--public-bind={HOSTS[number]}")
        return self._start("server", *self._flags["server"], *where, "--drain=10", "--cpu=any")

    def start_client(self) -> Program:
        servers = (f"--server=127.0.0.1:{port}" for port in self._controls)
        forward = self._forward.format(self.ports[8080])
        client = self._start("client", *self._flags["client"], *servers, forward, "--drain=10")
        client.wait_for_count(len(HOSTS), "session-opened")
        return client

    def joined(self, number: int) -> None:
        """Wait until the client has joined that server."""
        self.client.wait_for("session-opened", server=f"127.0.0.1:{self._controls[number]}")

    @contextlib.contextmanager
    def balanced(self) -> Iterator[None]:
        with haproxy(shipped_haproxy(self.ports), self._folder):
            yield


@contextlib.contextmanager
def farm(folder: Path) -> Iterator[Farm]:
    """A farm over TLS whose pages nginx serves."""
    house = House(folder / "pki")
    with nginx(folder, PAGES) as (page_port,):
        here = Farm(folder, page_port, {role: house.flags(role) for role in ("server", "client")})
        with ending(here.programs), here.balanced():
            yield here


def failover(seconds: float) -> None:
    """Everything once, evenly over so many seconds."""
    if missing := [name for name in ("haproxy", "nginx") if not found(name)]:
        print(f"failover: left out, {' and '.join(missing)} not installed")
        return
    with tempfile.TemporaryDirectory() as folder, farm(Path(folder)) as here, Browsers(here.public, BROWSERS) as load:
        report: list[tuple[float, str]] = []

        def rest() -> None:
            time.sleep(seconds / 6)  # the rhythm of the faults; nothing is ordered by it

        def note(what: str) -> None:
            report.append((time.monotonic(), what))

        for number in range(len(HOSTS)):  # the sessions of the start
            here.joined(number)
        rest()
        note("one server killed (SIGKILL)")
        here.servers[0].kill()
        rest()
        note("it is started again")
        began = time.monotonic()
        here.servers[0] = here.start_server(0)
        here.joined(0)
        print(f"failover: a server that is back has its client after {time.monotonic() - began:.2f} s")
        rest()
        note("the other is stopped (SIGTERM, --drain=10) and started again")
        began = time.monotonic()
        require(here.servers[1].stop(timeout=15) == 0, "the drain did not end well")
        print(f"failover: a drained server has ended after {time.monotonic() - began:.2f} s")
        here.servers[1] = here.start_server(1)
        here.joined(1)
        print(f"failover: its successor has its client after {time.monotonic() - began:.2f} s")
        rest()
        note("the client is stopped (SIGTERM, --drain=10) and started again")
        began = time.monotonic()
        here.client.send_signal(signal.SIGTERM)
        require(here.client.wait(15) == 0, "the client did not end well")
        here.client = here.start_client()
        print(f"failover: a restarted client serves at both servers after {time.monotonic() - began:.2f} s")
        rest()
        rest()
    tell(list(load.requests), report)


def tell(requests: list[Request], report: list[tuple[float, str]]) -> None:
    """How visitors fared behind each event. Raises Failed where a request failed."""
    print(f"failover: {len(requests)} requests, {sum(bool(each.fault) for each in requests)} failed")
    for at, (began, what) in enumerate(report):
        end = report[at + 1][0] if at + 1 < len(report) else float("inf")
        here = [each for each in requests if began <= each.began + each.seconds and each.began < end]
        again = [each for each in here if each.attempts > 1]
        last = max((each.began + each.seconds - began for each in again), default=0.0)
        slowest = max((each.seconds for each in here), default=0.0)
        print(
            f"  {what}: {len(again)} of {len(here)} sent again, the last of them answered after {last:.2f} s;", end=" "
        )
        print(f"the slowest of all took {slowest:.2f} s, at most {max(each.attempts for each in here)} attempts")
    failed = [each for each in requests if each.fault]
    require(not failed, f"{len(failed)} requests failed, as {failed[:3]}")
    require(len(requests) > 100, f"only {len(requests)} requests were made")


if __name__ == "__main__":
    main(failover, 60.0)
