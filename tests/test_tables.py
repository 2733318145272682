"""The thread table and the lock table in rtunnel.py's docstring are true.

Programs run under recorder.py, both roles, both levels, plain and over TLS, while they are visited,
cut, stalled, replaced, reloaded and stopped. What they did is compared with the tables: a wait or a
nesting of locks that a table lacks is a fault, and so is one that it has and nobody saw. recorder.py
says what counts as a wait; tables.py how fields that a lock guards are found in the source.
"""

from __future__ import annotations

import contextlib
import functools
import graphlib
import json
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tables
from naive_peer import PONG, Level1Peer, NaivePeer, init_text
from support import (
    DEADLINE_S,
    HELPERS,
    Address,
    Program,
    connect,
    counted,
    echo_service,
    ends_with,
    eventually,
    free_port,
    read_exactly,
    reset,
    running,
)  # fmt: skip
from tables import Tables, complaints, parse
from tls_peers import Forger, House, raw_context
from tunnels import BLOCK, closed_port, http_proxy, text, visit

import rtunnel

if sys.platform != "linux":
    pytest.skip("signals, and sends that do not wait, as Linux has them", allow_module_level=True)

# Shorter waits, so that what they end is seen in this run.
LIMITS: dict[str, Any] = {
    "SILENT_CLIENT_S": 0.1,
    "FIRST_RETRY_S": 0.05,
    "REPLACED_RETRY_S": 0.05,
    "LEASE_LINGER_S": 0.3,
    "LINGER_S": 0.1,
    "STALL_S": 0.1,
    "WATCH_S": 0.1,
    "POOL_IDLE_S": 0.5,
    "EXPIRY_CHECK_S": 0.2,
    "LOG_EVERY_S": 0.2,
    "MAX_STRANGERS": 8,
}
POLLED = LIMITS | {"DONT_WAIT": None}  # the way of systems that lack MSG_DONTWAIT


class Stage:
    """Programs under the recorder, ended together.

    Threads: the test's only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._programs: list[Program] = []
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
        for each in self._programs:
            each.kill()
            print(f"--- {' '.join(each.arguments)}\n" + "\n".join(each.lines))

    def start(self, *arguments: str, limits: dict[str, Any] = LIMITS, **options: Any) -> Program:
        file = self._folder / f"{len(self._programs)}.json"
        before = f"import sys; sys.path.insert(0, {str(HELPERS)!r})\nimport recorder; recorder.install({str(file)!r})"
        program = Program(*arguments, "--log-level", "debug", limits=limits, before=before, **options)
        self._programs.append(program)
        return program

    def server(self, *flags: str, listen: str = "127.0.0.1:0", **options: Any) -> Program:
        return self.start("server", f"--control-listen={listen}", "--public-bind=127.0.0.1", *flags, **options)

    def client(self, server: Program, *flags: str, **options: Any) -> Program:
        where = f"--server=localhost:{server.control_address[1]}"
        return self.start("client", where, "--reconnect-max=0.1", "--heartbeat=0.5", *flags, **options)

    def records(self) -> list[dict[str, Any]]:
        """What the programs did, which must have ended."""
        found = []
        for number, each in enumerate(self._programs):
            file = self._folder / f"{number}.json"
            assert file.exists(), f"{' '.join(each.arguments)} left no record:\n" + "\n".join(each.lines)
            found.append(json.loads(file.read_text()))
        return found


def reader_of_little(address: Address, receive_buffer: int = 16 * 1024) -> socket.socket:
    """A connection whose kernel keeps little for us."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.settimeout(DEADLINE_S)
    sock.connect(address)
    return sock


def say_until(
    server: Program, event: str, field: str, least: int, peer: socket.socket, *visitors: socket.socket
) -> None:
    """Have visitors say what is taken, until the server tells of so many bytes queued for a peer."""
    name = text(peer.getsockname())

    def told() -> bool:
        for each in visitors:
            with contextlib.suppress(BlockingIOError):
                each.sendall(BLOCK)
        server.state()
        return any(int(fields[field]) >= least for fields in server.events(event, peer=name))

    for each in visitors:
        each.setblocking(False)
    eventually(told, 2 * DEADLINE_S, f"{event} {field}={least}")


def fill_queue(server: Program, visitor: socket.socket) -> None:
    """The server's queue for who does not read its echo is full.

    A drainer is at work, and the client's pump waits for credit, or at level 0 the server's reader.
    """
    level = server.events("session-opened")[0]["level"]
    say_until(server, "state-stream", "queued", 32_000 if level == "1" else 980_000, visitor, visitor)


def use(server: Program, public: Address, refused: Address | None) -> None:
    """What visitors of an echo service do; `refused` leads to a closed port."""
    with connect(public) as visitor:
        visitor.sendall(b"marco")
        heard = b""
        while not heard.endswith(b"marco"):  # behind a PROXY line, where there is one
            heard += read_exactly(visitor, 1)
        visitor.shutdown(socket.SHUT_WR)
        assert ends_with(visitor) == "eof"
    with reader_of_little(public) as slow, reader_of_little(public) as gone:
        fill_queue(server, gone)
        reset(gone)
        fill_queue(server, slow)
        slow.settimeout(DEADLINE_S)
        read_exactly(slow, len(BLOCK))
    if refused is not None:
        assert visit(refused, b"x") in ("reset", "eof")


def stalled_peer(server: Program) -> None:
    """A client of level 1 that gives much credit and reads nothing: pumps wait for the writer."""
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(reader_of_little(server.control_address))
        peer = Level1Peer(sock, plays="client", window=2**30)
        peer.send_init(init_text(window=2**30))
        peer.hear_welcome()
        visitors = [stack.enter_context(connect(peer.public)) for _ in range(3)]
        say_until(server, "state-session", "unsent", 192_000, sock, *visitors)


def ended_session(server: Program) -> None:
    """A session has ended and not left its lease yet: a visitor waits for its client's return."""
    with Level1Peer.as_client(server.control_address) as peer:
        peer.send_frame(PONG, 0, b"unasked!")
        with contextlib.suppress(EOFError):  # its last word; the connection stays until ours
            while peer.read_frame():
                continue
        assert visit(peer.public) in ("reset", "refused")


def replaced(server: Program) -> None:
    """One instance twice; then it leaves, and its lease lingers."""
    address, instance = server.control_address, "a" * 32
    with Level1Peer.as_client(address, instance=instance), Level1Peer.as_client(address, instance=instance):
        server.wait_for("session-replaced")
    server.wait_for("lease-closed", reason="its client did not come back")


def strangers(server: Program) -> None:
    """Many more than may stay, and they say nothing. One whose thread comes late may still make another go."""
    count, before = 6 * LIMITS["MAX_STRANGERS"], counted(server.events("refused"))
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(server.control_address))
        server.wait_for("refused")
    eventually(lambda: counted(server.events("refused")) >= before + count)


def key_update(server: Program, house: House) -> None:
    """A peer that asks for new keys: OpenSSL logs their secrets while it reads, and answers."""
    context = raw_context(SimpleNamespace(**house.files("client")), house.ca, groups="X25519MLKEM768")
    with connect(server.control_address) as sock:
        forger = Forger(context, sock, "client")
        assert [forger.receive()[0] for _ in range(2)] == [Forger.HANDSHAKE] * 2  # tickets
        for _ in range(2):  # OpenSSL answers the last one with its next data only
            sock.sendall(forger.key_update(request=True))
        assert forger.receive()[0] == Forger.HANDSHAKE


def silent_client(server: Program) -> None:
    """The original's way to join a global port: no INIT."""
    with NaivePeer.connect(server.control_address):
        server.wait_for_count(2, "session-opened")


def scrape(server: Program) -> None:
    """Prometheus asks."""
    with connect(server.metrics_address) as sock:
        sock.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert ends_with(sock) == "eof"


def drain(server: Program, client: Program, public: Address) -> None:
    """The open stream goes on, a reload is refused, the state is told; a second signal ends it."""
    with connect(public) as visitor:
        read_exactly(visitor, 5)  # PROXY
        server.send_signal(signal.SIGTERM)
        client.wait_for("goaway")
        server.state()
        server.send_signal(signal.SIGHUP)
        server.wait_for("reload-refused")
        server.stop()


def play(stage: Stage, folder: Path, house: House) -> None:
    """The whole scenario: a server and a client for each level, plain and over TLS."""
    enter, own = stage.stack.enter_context, house.flags("client")
    echo, nobody = enter(echo_service()), text(enter(closed_port()))
    config, notify = folder / "server.conf", folder / "notify"
    config.write_text("allow = *=0,1024-65535\n")
    systemd = enter(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    systemd.bind(str(notify))
    plain = stage.server(f"--config={config}", listen="localhost:0", env={"NOTIFY_SOCKET": str(notify)})
    secure = stage.server(
        *house.flags("server"), "--drain=5", "--metrics=127.0.0.1:0", env={"SSLKEYLOGFILE": str(folder / "secrets")}
    )
    plain_0 = stage.server("--public-listen=127.0.0.1:0")
    secure_0 = stage.server(*house.flags("server"), limits=POLLED)
    ports = [free_port() for _ in range(6)]
    services = [f"--forward={port}:{where}" for port, where in zip(ports, 3 * [echo.text, nobody], strict=True)]
    clients = [
        stage.client(plain, *services[:2]),
        stage.client(secure, *own, *services[2:4], "--proxy-protocol"),
        stage.client(plain_0, f"--local={echo.text}", old=True),
        stage.client(secure_0, *own, *services[4:], old=True, limits=POLLED),
        stage.client(plain, f"--local={echo.text}", f"--proxy=http://{enter(http_proxy()).text}"),
    ]
    for server, count in ((plain, 3), (secure, 2), (plain_0, 1), (secure_0, 2)):
        server.wait_for_count(count, "session-opened")
    local = [("127.0.0.1", port) for port in ports]
    with contextlib.ExitStack() as at_once:
        for at, each in enumerate((plain, secure, secure_0)):
            at_once.enter_context(running(functools.partial(use, each, local[2 * at], local[2 * at + 1])))
        use(plain_0, plain_0.public_address, None)
        ended_session(plain)
        replaced(plain)
        silent_client(plain_0)
        visit(secure.control_address, b"GET / HTTP/1.0\r\n\r\n")
        key_update(secure, house)
        strangers(plain)
    stalled_peer(plain)
    for each in (plain, secure, *clients):
        each.send_signal(signal.SIGHUP)
        each.wait_for("reloaded")
        each.state()
    scrape(secure)
    for _ in range(3):  # pumps find drainers at work when they are aborted
        fill_queue(plain, enter(reader_of_little(local[0])))
    config.write_text("allow = *=1\n")
    plain.send_signal(signal.SIGHUP)
    plain.wait_for("expelled")
    drain(secure, clients[1], local[2])
    for each in (plain, plain_0, secure_0, *clients):
        each.stop(signal.SIGINT)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, house: House) -> list[dict[str, Any]]:
    """What was seen in the whole scenario, which runs once."""
    folder = tmp_path_factory.mktemp("records")
    with Stage(folder) as stage:
        play(stage, folder, house)
        return stage.records()


@pytest.fixture(scope="module")
def written() -> Tables:
    """The tables as they stand in rtunnel.py."""
    return parse(rtunnel.__doc__ or "")


def test_the_tables_say_what_was_seen(written: Tables, records: list[dict[str, Any]]) -> None:
    """Each wait and nesting of locks stands in the tables, and all that stands there was seen."""
    found = complaints(written, records)
    assert not found, "\n".join(found)


def without(tables: Tables, thread: str, wait: str) -> Tables:
    """The tables where one thread's row lacks one wait."""
    kept = [
        row._replace(waits={name: rare for name, rare in row.waits.items() if (row.name, name) != (thread, wait)})
        for row in tables.threads
    ]
    return tables._replace(threads=kept)


def test_a_wait_that_is_not_written_is_found(written: Tables, records: list[dict[str, Any]]) -> None:
    """Each wait that was seen, taken out of the table, is missed there."""
    for row in written.threads:
        for wait in (name for name, rare in row.waits.items() if not rare):
            found = complaints(without(written, row.name, wait), records)
            expected = f"threads: the row of `{row.name}` does not say that it waits in {wait} ("
            assert [each.startswith(expected) for each in found].count(True) >= 1, (wait, found)


def test_a_nesting_that_is_not_written_is_found(written: Tables, records: list[dict[str, Any]]) -> None:
    """Each nesting, taken out of the table, is missed there; a wait under a lock too."""
    for outer, under in written.locks.items():
        for inner in under:
            fewer = written.locks | {outer: [each for each in under if each != inner]}
            found = complaints(written._replace(locks=fewer), records)
            assert found, (outer, inner)
            assert all(outer in each and inner in each for each in found), found


def test_the_order_of_the_locks_has_no_circle(written: Tables) -> None:
    """Two threads never take two locks in opposite orders: the lock table has an order."""
    graphlib.TopologicalSorter(written.locks).prepare()  # raises CycleError, which names the circle


def test_names_of_nothing_are_found(written: Tables, records: list[dict[str, Any]]) -> None:
    """A place, a lock and a beginning that the code does not have are found in the tables."""
    row = written.threads[0]
    strange = row._replace(begins_in=[*row.begins_in, "Turn.take"], waits=row.waits | {"Writer.turn": True})
    tables = Tables([strange, *written.threads[1:]], written.locks | {"Turn._lock": [], "Pool._lock": ["Pool._door"]})
    assert complaints(tables, records) == [
        "locks: Pool._door was never taken under Pool._lock",
        "locks: the row of Pool._lock names Pool._door, and nobody makes such a lock",
        "locks: the row of Turn._lock names Turn._lock, and nobody makes such a lock",
        "threads: the row of `main` names Turn.take, and there is no such function",
        "threads: the row of `main` names Writer.turn, and there is no such function",
    ]


def test_a_wait_under_a_lock_is_found(written: Tables, tmp_path: Path) -> None:
    """Without MSG_DONTWAIT the reader's direct send would wait while it holds its stream's lock."""
    with Stage(tmp_path) as stage, echo_service() as echo:
        server = stage.server("--public-listen=127.0.0.1:0", limits=LIMITS | {"DONT_WAIT": 0})
        client = stage.client(server, f"--local={echo.text}")
        server.wait_for("session-opened")
        with connect(server.public_address) as visitor:
            visitor.sendall(b"marco")
            read_exactly(visitor, 5)
        client.stop()
        server.stop()
        found = complaints(written, stage.records())
    assert any("waits in Stream._deliver_locked while it holds Stream._lock" in each for each in found)


def test_guarded_fields_are_used_under_their_lock() -> None:
    """What a lock guards is read and written under it, and a `_locked` method is called under it; a
    read without it says so in the code."""
    assert not tables.unlocked(), "\n".join(map(str, tables.unlocked()))


CARELESS = """
class Careless:
    def __init__(self):
        self._lock = threading.Lock()
        self.free = 0
        # guarded by _lock
        self._count = 0

    def right(self):
        with self._lock:
            self._count += 1
        return self.free

    def right_locked(self):
        return self._count

    def marked(self):
        # Read without the lock: a number is whole.
        return self._count

    def right_call(self):
        with self._lock:
            self.right_locked()

    def wrong(self):
        return self._count

    def wrong_call(self):
        return self.right_locked()

    def wrong_write(self):
        self._count = 1  # without the lock

    def wrong_later(self):
        with self._lock:
            return lambda: self._count

def other(careless):
    with careless._lock:
        careless._count = 2
        careless.right_locked()
    careless.right_locked()
    return careless._count
"""


def test_a_use_without_the_lock_is_found() -> None:
    """The look at the source finds reads, writes, calls, what runs later, and what others do."""
    found = [(each.function, each.writes) for each in tables.unlocked({"careless.py": CARELESS})]
    assert found == [
        ("Careless.wrong", False), ("Careless.wrong_call", False), ("Careless.wrong_write", True),
        ("Careless.wrong_later", False), ("other", False), ("other", False),
    ]  # fmt: skip
