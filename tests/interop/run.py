"""Unrelated TLS stacks at the other end of our programs: `make interop`; the table goes to tests/interop/results.md.

Each stack's program is called in one of three ways, and prints lines:

    PROGRAM version                                       its version
    PROGRAM client ADDRESS FOLDER NAME GROUP TIMES        `handshake MS`, TIMES - 1 times; then INIT is said:
                                                          `welcome PORT`, and it sends back what one visitor says:
                                                          `echo BYTES`
    PROGRAM server FOLDER NAME GROUP                      `listening PORT`, `handshake MS`, `init`, and its own bytes
                                                          have come back from our client's local service: `echo BYTES`

FOLDER holds ca.crt, NAME.crt and NAME.key; NAME is `-` where no certificate is shown. On a failure it prints
`failed WHY`, or `unsupported GROUP`, and ends with status 1.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import queue
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers"), str(HERE.parents[1])]

from support import Program, Service, connect, echo_service, read_all, running  # noqa: E402
from tls_peers import House  # noqa: E402

TOTAL = 1 << 20
TIMES = 21  # handshakes of a client; the first ten warm its stack up
WAIT_S = 60.0


class Stack(NamedTuple):
    """A TLS stack: how its program is built, in its folder, and called."""

    name: str
    tool: str  # without which it is not installed
    folder: str
    build: tuple[tuple[str, ...], ...]
    command: tuple[str, ...]
    env: Mapping[str, str] = MappingProxyType({})


STACKS = [
    Stack("Go crypto/tls", "go", "go", (("go", "build", "-o", "build/interop", "."),), ("build/interop",),
          {"GOTOOLCHAIN": "go1.27.0+auto"}),
    Stack("rustls, aws-lc-rs", "cargo", "rust", (("cargo", "build", "--release", "--quiet", "--locked"),),
          ("target/release/interop",)),
    Stack("BouncyCastle bctls", "mvn", "java", (("mvn", "-q", "-B", "compile", "dependency:copy-dependencies"),),
          ("java", "-cp", "target/classes:target/dependency/*", "Interop")),
    Stack("OpenSSL's tools", "openssl", ".", (), (sys.executable, "openssl.py")),
]  # fmt: skip


class Case(NamedTuple):
    """What the other stack does, and how our end refuses it: the rule's name; empty: it does not."""

    name: str
    role: str  # the other stack's
    group: str
    pair: str
    refusals: tuple[str, ...] = ()


CASES = [
    Case("client, X25519MLKEM768", "client", "X25519MLKEM768", "client"),
    Case("client, SecP384r1MLKEM1024", "client", "SecP384r1MLKEM1024", "client"),
    Case("client, a classical group only", "client", "X25519", "client", ("group: ",)),
    Case("client, no certificate", "client", "X25519MLKEM768", "-", ("certificate: ",)),
    Case("client, a server's certificate", "client", "X25519MLKEM768", "server", ("purpose: ",)),
    Case("server, X25519MLKEM768", "server", "X25519MLKEM768", "server"),
    Case("server, SecP384r1MLKEM1024 (it asks again)", "server", "SecP384r1MLKEM1024", "server"),
    # What our client offers leaves nothing to such a server, so it is the server that says no, by an alert.
    Case("server, a classical group only", "server", "X25519", "server", ("alert: ", "closed: ")),
    Case("server, a client's certificate", "server", "X25519MLKEM768", "client", ("purpose: ",)),
]


class Failed(Exception):
    """The other program, or ours, did not do as it should."""


class Other:
    """The other stack's program, and the lines that it prints."""

    def __init__(self, stack: Stack, *arguments: str) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.handshakes_ms: list[float] = []
        self._process = subprocess.Popen(
            [*stack.command, *arguments], cwd=HERE / stack.folder, env={**os.environ, **stack.env},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
            start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name="lines of the other program")
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                self._lines.put(line.strip())
        self._lines.put(None)

    def wait_for(self, word: str) -> str:
        """What stands behind the next such word. Raises Failed with what came instead."""
        while True:
            try:
                line = self._lines.get(timeout=WAIT_S)
            except queue.Empty:
                raise Failed(f"no {word} within {WAIT_S:g} s") from None
            if line is None:
                raise Failed(f"it ended without {word}")
            first, _, rest = line.partition(" ")
            if first == "handshake":
                self.handshakes_ms.append(float(rest))
            elif first == word:
                return rest
            elif first in ("failed", "unsupported"):
                raise Failed(line)

    def __enter__(self) -> Other:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started
        self._process.wait()
        self._reader.join()


@contextlib.contextmanager
def ours(*arguments: str) -> Iterator[Program]:
    program = Program(*arguments)
    try:
        yield program
    finally:
        program.kill()


def be_client(stack: Stack, case: Case, house: House) -> tuple[str, list[float]]:
    """The other stack is a client of our server."""
    flags = ("--control-listen=127.0.0.1:0", "--public-bind=127.0.0.1", *house.flags("server"))
    with ours("server", *flags) as serving:
        address = "{}:{}".format(*serving.control_address)
        times = "1" if case.refusals else str(TIMES)
        with Other(stack, "client", address, str(house.folder), case.pair, case.group, times) as other:
            if case.refusals:
                return refused(other, lambda: serving.wait_for("refused", WAIT_S)["reason"], "welcome", case)
            port = int(other.wait_for("welcome"))
            said = os.urandom(TOTAL)

            def say() -> None:
                visitor.sendall(said)
                visitor.shutdown(socket.SHUT_WR)

            with connect(("127.0.0.1", port), WAIT_S) as visitor, running(say):
                heard = read_all(visitor)
            if heard != said or int(other.wait_for("echo")) != TOTAL:
                raise Failed(f"{len(heard)} of {TOTAL} bytes came back")
            return "done", other.handshakes_ms[(TIMES - 1) // 2 :]


def be_server(stack: Stack, case: Case, house: House, service: Service) -> tuple[str, list[float]]:
    """The other stack is a server of our client."""
    with Other(stack, "server", str(house.folder), case.pair, case.group) as other:
        address = f"127.0.0.1:{other.wait_for('listening')}"
        with ours("client", "--server", address, "--local", service.text, *house.flags("client")) as asking:
            if case.refusals:
                return refused(other, lambda: asking.wait_for("connect-failed", WAIT_S)["reason"], "init", case)
            other.wait_for("init")
            if int(other.wait_for("echo")) != TOTAL:
                raise Failed("not all came back")
            return "done", other.handshakes_ms


def refused(other: Other, reason: Callable[[], str], word: str, case: Case) -> tuple[str, list[float]]:
    """Our end's log tells the rule, and the other end gets nowhere."""
    try:
        other.wait_for(word)
    except Failed as failed:
        if str(failed).startswith("unsupported "):
            raise
    else:
        raise Failed("our end has taken it")
    told = reason()
    if not told.startswith(case.refusals):
        raise Failed(f"refused, but: {told}")
    return "refused, as it should be", []


def run(stack: Stack, case: Case, house: House, service: Service) -> tuple[str, list[float]]:
    try:
        if case.role == "client":
            return be_client(stack, case, house)
        return be_server(stack, case, house, service)
    except (Failed, AssertionError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if first.startswith("unsupported "):
            return "not supported by it", []
        return f"FAILED: {first[:120]}", []


def build(stack: Stack) -> str:
    """Its version; empty where it is not installed. Raises CalledProcessError where it cannot be built."""
    if shutil.which(stack.tool) is None:
        return ""
    env = {**os.environ, **stack.env}
    for command in stack.build:
        subprocess.run(command, cwd=HERE / stack.folder, env=env, check=True)
    told = subprocess.run(
        [*stack.command, "version"], cwd=HERE / stack.folder, env=env, check=True, capture_output=True, text=True
    )
    return told.stdout.strip()


def table(stacks: Sequence[tuple[str, dict[str, str]]], costs: Sequence[str]) -> str:
    """The results as Markdown."""
    rows = [
        "| case | " + " | ".join(name for name, _ in stacks) + " |",
        "|---" * (1 + len(stacks)) + "|",
        *(f"| {case.name} | " + " | ".join(results[case.name] for _, results in stacks) + " |" for case in CASES),
    ]
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"""# Unrelated TLS stacks at the other end

Made by `make interop` on {today}. Each stack's program (`tests/interop/`) shakes hands with ours, says or takes INIT
and WELCOME, and carries one stream whose 1 MiB comes back; or it does what our end must refuse, by the rule that the
log names. tlslite-ng does the same in `make test` (`tests/test_interop_tlslite.py`).

""" + "\n".join([*rows, "", *costs, ""])


def main() -> int:
    columns: list[tuple[str, dict[str, str]]] = []
    costs = [
        "What a handshake costs, in ms on loopback, as the other stack measures it. As a client: the median of ten,",
        "with a stack that is warm; as a server: the first one.",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder, echo_service() as service:
        house = House(Path(folder) / "pki")
        for stack in STACKS:
            version = build(stack)
            name = f"{stack.name} ({version or 'not installed'})"
            results: dict[str, str] = {}
            for case in CASES:
                results[case.name], handshakes_ms = (
                    run(stack, case, house, service) if version else ("not installed", [])
                )
                print(f"{name}: {case.name}: {results[case.name]}", flush=True)
                if handshakes_ms:
                    costs.append(f"- {stack.name}, {case.name}: {statistics.median(handshakes_ms):.1f}")
            columns.append((name, results))
    (HERE / "results.md").write_text(table(columns, costs))
    return any(result.startswith("FAILED") for _, results in columns for result in results.values())


if __name__ == "__main__":
    sys.exit(main())
