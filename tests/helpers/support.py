"""What several tests need: a poll, programs under test, small services. Standard library only."""

from __future__ import annotations

import _thread
import collections
import contextlib
import json
import os
import random
import re
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from starter import HELPERS, ROOT, Forked, Starter
from tap import VARIABLE

DEADLINE_S = 10.0  # what a test waits for an event that comes at once on an idle machine

Address = tuple[str, int]
Fields = dict[str, str]


def eventually(condition: Callable[[], Any], deadline: float = DEADLINE_S, what: str = "") -> Any:
    """The value of condition() as soon as it is true. The tests' only poll; fails after `deadline` s."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline} s: {what or condition}")
        time.sleep(0.005)
    return value


# --- programs under test ------------------------------------------------------------------------------------


class Record(NamedTuple):
    """One line of a program's log."""

    level: str
    event: str
    fields: Fields


_LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) (\S+)((?: .*)?)")
_PAIR = re.compile(r' ([A-Za-z0-9_-]+)=("(?:[^"\\]|\\.)*"|[^ ="\\]*)')


def parse_line(line: str) -> Record | None:
    """A log line's parts; None for a line that is no event (a traceback, a usage message)."""
    whole = _LINE.fullmatch(line)
    if whole is None:
        return None
    level, event, rest = whole.groups()
    fields: Fields = {}
    at = 0
    while at < len(rest):
        pair = _PAIR.match(rest, at)
        if pair is None:
            return None
        key, value = pair.groups()
        fields[key] = json.loads(value) if value.startswith('"') else value
        at = pair.end()
    return Record(level, event, fields)


def counted(lines: list[Fields]) -> int:
    """How many events these lines of one event stand for: those that were held back are told as a number."""
    return sum(int(line.get("more_like_it", 1)) for line in lines)


# Of INIT's text the first line alone, which is the original's, is said and understood.
OLD = r"""
said, understood = m.Init.payload, m.Init.parse
m.Init.payload = lambda init: said(init).split(b"\n")[0]
m.Init.parse = lambda raw: understood(raw.split(b"\n")[0])
"""


# Its sessions are recorded, for judged.py.
TAP = f"sys.path.append({str(HELPERS)!r})\nimport tap\ntap.start_in_program(sys.argv[1])\n"


class Program:
    """A server or a client in a process of its own, and its log.

    Threads: one reads the program's standard error; the test's thread does all else.
    Locking: `_changed` guards `lines`, `records` and `_taken`.
    """

    starter: ClassVar[Starter | None] = None  # where there is one, it forks all programs but those with a `before`
    process: Forked | subprocess.Popen[str]

    def __init__(
        self,
        *arguments: str,
        limits: Mapping[str, float] | None = None,
        old: bool = False,
        env: Mapping[str, str] | None = None,
        before: str = "",
        patch: str = "",
    ):
        """Start `rtunnel.py ARGUMENTS`. `limits` replaces constants of the module: shorter waits. An `old` program
        neither announces level 1 nor understands that its peer does. `before` is run before the import, `patch` after
        it, with the module as `m`."""
        self.arguments = arguments
        # The constants are the module's own; PROTOCOL.md's values are checked by another test. Imported, not run as a
        # script: so it is compiled once.
        assignments = "".join(f"assert hasattr(m, {n!r}); m.{n} = {v!r}\n" for n, v in (limits or {}).items())
        tap = TAP if VARIABLE in os.environ else ""
        code = f"{before}\nimport sys, rtunnel as m\n{tap}{assignments}{OLD * old}{patch}\nm.entry()"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RTUNNEL_")}
        environment = {**clean, **(env or {})}
        if self.starter and not before:
            self.process = self.starter.start(code, arguments, environment)
        else:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="backslashreplace",
            )
        self._changed = threading.Condition()
        self.lines: list[str] = []
        self.records: list[Record] = []
        self._taken: set[int] = set()
        self._ended = False
        self._reader = threading.Thread(target=self._read, name=f"log of {self.process.pid}")
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                record = parse_line(line.rstrip("\n"))
                with self._changed:
                    self.lines.append(line.rstrip("\n"))
                    if record is not None:
                        self.records.append(record)
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def pid(self) -> int:
        return self.process.pid

    def events(self, event: str, **fields: object) -> list[Fields]:
        """The fields of each line so far with this event and these fields."""
        with self._changed:
            return [r.fields for r in self.records if _matches(r, event, fields)]

    def wait_for(self, event: str, timeout: float = DEADLINE_S, **fields: object) -> Fields:
        """The fields of the first such line that no wait_for has returned before."""

        def found() -> int | None:
            for at, record in enumerate(self.records):
                if at not in self._taken and _matches(record, event, fields):
                    return at
            return None

        with self._changed:
            self._changed.wait_for(lambda: found() is not None or self._ended, timeout)
            at = found()
            if at is None:
                why = "the program has ended" if self._ended else f"not within {timeout} s"
                raise AssertionError(f"no {event} {fields or ''} ({why}) in:\n" + "\n".join(self.lines))
            self._taken.add(at)
            return self.records[at].fields

    def skip_lines(self) -> int:
        """No `wait_for` returns a line of before; how many there were."""
        with self._changed:
            self._taken.update(range(len(self.records)))
            return len(self.records)

    def wait_for_count(self, count: int, event: str, timeout: float = DEADLINE_S, **fields: object) -> None:
        """Wait until there have been `count` such lines since the program's start."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: sum(_matches(r, event, fields) for r in self.records) >= count, timeout
            )
        got = len(self.events(event, **fields))
        assert enough, f"{got} of {count} {event} {fields or ''} within {timeout} s"

    @property
    def control_address(self) -> Address:
        """A server's control address, from its log; loopback where it listens on all interfaces."""
        return self._listening("control")

    @property
    def public_address(self) -> Address:
        """A server's global port, from its log."""
        return self._listening("public")

    @property
    def metrics_address(self) -> Address:
        """Where it tells Prometheus its figures, from its log."""
        return self._listening("metrics")

    def _listening(self, kind: str) -> Address:
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or any(_matches(r, "listening", {"kind": kind}) for r in self.records),
                DEADLINE_S,
            )
        found = self.events("listening", kind=kind)
        assert found, f"does not listen for {kind}:\n" + "\n".join(self.lines)
        return reachable(found[0]["address"])

    def lease_address(self, timeout: float = DEADLINE_S, **fields: object) -> Address:
        """Where a visitor reaches the next lease that is opened."""
        return reachable(self.wait_for("lease-opened", timeout, **fields)["address"])

    def session_address(self, timeout: float = DEADLINE_S, **fields: object) -> Address:
        """Where a visitor reaches the next session that is opened, on loopback."""
        return "127.0.0.1", int(self.wait_for("session-opened", timeout, **fields)["port"])

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = DEADLINE_S) -> int:
        """The exit status, when it has ended and its log is read."""
        status = self.process.wait(timeout)
        self._reader.join(timeout)
        return status

    def stop(self, number: int = signal.SIGTERM, timeout: float = DEADLINE_S) -> int:
        """Send a signal and wait: the exit status (negative where a signal ended it)."""
        if self.process.poll() is None:
            self.send_signal(number)
        return self.wait(timeout)

    def kill(self) -> None:
        """End it whatever it does, and let go of all that the test holds of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()

    def state(self) -> Fields:
        """What it logs of itself when it is asked. POSIX only."""
        self.send_signal(signal.SIGUSR1)
        return self.wait_for("state")

    def cpu_seconds(self) -> float:
        """Processor time used so far, user and system. Linux only."""
        stat = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def threads(self) -> int:
        """How many threads it has now. Linux only."""
        return len(os.listdir(f"/proc/{self.pid}/task"))

    def descriptors(self) -> int:
        """How many descriptors it has open now. Linux only."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory_bytes(self) -> int:
        """Its resident memory now. Linux only."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _matches(record: Record, event: str, fields: Mapping[str, object]) -> bool:
    return record.event == event and all(record.fields.get(name) == str(value) for name, value in fields.items())


def threads() -> collections.Counter[str]:
    """The Python threads of this process by name; a pool's have none. The clock's lives as long as the process."""
    named = [each for each in threading.enumerate() if not isinstance(each, threading._DummyThread)]
    found = collections.Counter(each.name for each in named)
    # Not by sys._current_frames, in which Python 3.11 can stop for ever: see test_state_report.py.
    found["of a pool"] = max(0, 1 + _thread._count() - len(named))
    del found["clock"]
    return found


def reachable(address: str) -> Address:
    """`host:port` as a program logs it, as a pair to connect to: loopback for "all interfaces"."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "127.0.0.1"}.get(host, host), int(port)


# --- sockets ------------------------------------------------------------------------------------------------


# Below the ports that a system gives to whoever asks for any: no connection of another test takes one meanwhile.
PORTS = range(20000, 32768)
_ports = iter(random.sample(PORTS, len(PORTS)))


def free_port() -> int:
    """A port on which nothing listens, another one at each call; only for a test that has to name it beforehand."""
    for port in _ports:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def connect(address: Address, timeout: float = DEADLINE_S) -> socket.socket:
    """A connection whose every step is bounded by `timeout` seconds."""
    return socket.create_connection(address, timeout)


def read_exactly(sock: socket.socket, count: int) -> bytes:
    """`count` bytes; EOFError where the other end ends before."""
    received = bytearray()
    while len(received) < count:
        part = sock.recv(min(count - len(received), 1 << 16))
        if not part:
            raise EOFError(f"{len(received)} of {count} bytes, then the end")
        received += part
    return bytes(received)


def read_all(sock: socket.socket) -> bytes:
    """All bytes until a clean end; ConnectionResetError where it is a reset."""
    received = bytearray()
    while part := sock.recv(1 << 16):
        received += part
    return bytes(received)


def ends_with(sock: socket.socket) -> str:
    """How the connection ends, whatever still comes before: "eof" or "reset"."""
    try:
        read_all(sock)
    except (ConnectionResetError, ConnectionAbortedError, BrokenPipeError):
        return "reset"
    return "eof"


def reset(sock: socket.socket) -> None:
    """Close with a reset."""
    reset_at_close(sock, True)
    sock.close()


def reset_at_close(sock: socket.socket, wanted: bool) -> None:
    """Also when the kernel closes it, since its process was killed. What a listener accepts inherits it."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", wanted, 0))


# --- services -----------------------------------------------------------------------------------------------


class Service:
    """A local service: each connection is handled in a thread, and the handler's end closes it.

    `connections` holds all sockets accepted so far, in order. Leaving the `with` block ends and joins all. With `reset`
    a connection ends so from its first moment, unless the handler sees to it: whatever kills its process.
    """

    def __init__(
        self, handle: Callable[[socket.socket], None], host: str = "127.0.0.1", port: int = 0, *, reset: bool = False
    ):
        self._handle = handle
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family, backlog=1024)
        reset_at_close(self._listener, reset)
        self.address: Address = self._listener.getsockname()[:2]
        self.connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._acceptor = threading.Thread(target=self._accept, name=f"service {self.port}")
        self._acceptor.start()

    @property
    def port(self) -> int:
        return self.address[1]

    @property
    def text(self) -> str:
        """The address as a flag of the client has it."""
        host, port = self.address
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._stopping:
                sock.close()
                return
            self.connections.append(sock)
            thread = threading.Thread(target=self._serve, args=(sock,), name=f"service {self.port} connection")
            self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError, EOFError):
            self._handle(sock)

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping = True
        with contextlib.suppress(OSError):  # wakes accept on every system
            socket.create_connection(self.address, 1).close()
        self._acceptor.join()
        self._listener.close()
        for sock in self.connections:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()


def echo(sock: socket.socket) -> None:
    """Send back what comes, until its end."""
    while part := sock.recv(1 << 16):
        sock.sendall(part)


def echo_service(host: str = "127.0.0.1") -> Service:
    """A service that sends back what it gets."""
    return Service(echo, host)


class EchoCrowd(Service):
    """An echo service for a thousand connections that say a few bytes each, all in one thread.

    A thousand threads of this process that wake at once, and while another has the interpreter's lock ask for it every
    5 ms, take both processors from the programs under test, for seconds.
    """

    def __init__(self) -> None:
        super().__init__(echo)

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector, contextlib.ExitStack() as stack:
            selector.register(self._listener, selectors.EVENT_READ)
            while not self._stopping:
                for key, _ in selector.select():
                    if key.fileobj is self._listener:
                        sock = stack.enter_context(self._listener.accept()[0])
                        self.connections.append(sock)
                        selector.register(sock, selectors.EVENT_READ)
                    elif not self._answer(key.fileobj):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

    @staticmethod
    def _answer(sock: socket.socket) -> bool:
        with contextlib.suppress(OSError):
            if part := sock.recv(1 << 16):
                sock.sendall(part)
                return True
        return False


class Sink:
    """A handler that keeps what it receives, and says when a connection has ended and how."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.end = ""
        self.ended = threading.Event()

    def __call__(self, sock: socket.socket) -> None:
        try:
            while part := sock.recv(1 << 16):
                self.received += part
            self.end = "eof"
        except ConnectionError:
            self.end = "reset"
        finally:
            self.ended.set()


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def http_service(folder: Path) -> Iterator[Address]:
    """An HTTP service of a folder's files."""

    def handler(*args: Any, **kwargs: Any) -> _QuietHandler:
        return _QuietHandler(*args, directory=str(folder), **kwargs)

    class Server(ThreadingHTTPServer):
        request_queue_size = 128
        daemon_threads = False  # server_close joins them

        def handle_error(self, request: object, client_address: object) -> None:
            """A visitor that left is no event here."""

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="http service")
        thread.start()
        try:
            yield server.server_address[0], server.server_address[1]  # type: ignore[misc]
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def running(function: Callable[[], object], stop: Callable[[], object] = lambda: None) -> Iterator[threading.Thread]:
    """Run a function in a thread beside the block, then `stop` and join it. What it raises is raised then."""
    failure: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:  # handed to the test, which raises it
            failure.append(error)

    thread = threading.Thread(target=body, name=getattr(function, "__qualname__", "running"))
    thread.start()
    try:
        yield thread
    finally:
        stop()
        thread.join()
    if failure:
        raise failure[0]
