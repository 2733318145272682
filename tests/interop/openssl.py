"""One end of the tunnel over OpenSSL's own tools, `openssl s_client` and `s_server`, whose pipes carry the frames.

tests/interop/run.py says how it is called and what it prints. ML-KEM and ML-DSA need OpenSSL 3.5 or newer.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from naive_peer import BLOCKED, DATA, EOF, INIT, NEW_CONN, PING, PONG, WELCOME, WINDOW, frame, init_text, lines_of
from support import free_port

TOTAL = 1 << 20
OWN_WINDOW = 2 * TOTAL  # so nothing has to be granted


class Link:
    """Frames over the pipes of one of OpenSSL's tools.

    Threads: one reads frames, for a tool that cannot write does not read either; one reads what the tool complains of.
    """

    def __init__(self, *arguments: str) -> None:
        command = ["openssl", *arguments, "-quiet", "-tls1_3", "-sigalgs", "mldsa65:mldsa87"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._complaint: list[bytes] = []
        self._frames: queue.SimpleQueue[tuple[int, int, bytes] | None] = queue.SimpleQueue()
        assert self.process.stderr is not None
        self._errors = threading.Thread(target=self._complaint.extend, args=(self.process.stderr,), daemon=True)
        self._errors.start()
        threading.Thread(target=self._read_all, daemon=True).start()

    def _read_all(self) -> None:
        assert self.process.stdout is not None
        while len(header := self.process.stdout.read(9)) == 9:
            payload = self.process.stdout.read(int.from_bytes(header[5:], "big"))
            self._frames.put((header[0], int.from_bytes(header[1:5], "big"), payload))
        self._frames.put(None)

    def send(self, kind: int, stream: int, payload: bytes = b"") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(frame(kind, stream, payload))
        self.process.stdin.flush()

    def read(self) -> tuple[int, int, bytes]:
        got = self._frames.get()
        if got is None:
            self._errors.join()
            raise EOFError(b"".join(self._complaint).decode("utf-8", "replace").strip().replace("\n", "; "))
        return got

    def end(self) -> None:
        """All that was sent has arrived; then the tool ends."""
        self.send(PING, 0, b"the last")
        while self.read() != (PONG, 0, b"the last"):
            continue
        self.process.kill()

    def echo(self, own: bytes | None) -> None:
        """Carry one stream: what comes goes back, or `own` goes out and comes back."""
        pending, got, credit = bytearray(own or b""), bytearray(), 65536
        said, ended, sent_eof, got_eof = False, own is not None, False, False
        while not (sent_eof and got_eof):
            while pending and credit:
                part = bytes(pending[: min(credit, 65527)])
                self.send(DATA, 1, part)
                del pending[: len(part)]
                credit, said = credit - len(part), False
            if pending and not said:
                self.send(BLOCKED, 1)
                said = True
            if not pending and ended and not sent_eof:
                self.send(EOF, 1)
                sent_eof = True
                continue
            kind, _, payload = self.read()
            if kind == PING:
                self.send(PONG, 0, payload)
            elif kind == WINDOW:
                credit += int.from_bytes(payload, "big")
            elif kind == DATA:
                got += payload
                pending += payload if own is None else b""
            elif kind == EOF:
                got_eof = ended = True
            elif kind not in (PONG, BLOCKED):
                raise ValueError(f"frame {kind}")
        if len(got) != TOTAL or (own is not None and got != own):
            raise ValueError(f"{len(got)} bytes came back")
        print("echo", len(got), flush=True)


def knows(group: str) -> bool:
    """Whether this OpenSSL has the group, and ML-DSA."""
    tool = ["openssl", "s_client", "-connect", "127.0.0.1:1", "-groups", group, "-sigalgs", "mldsa65"]
    ran = subprocess.run(tool, capture_output=True, stdin=subprocess.DEVNULL)
    return b"refused" in ran.stderr  # it has taken both, and dialled


def client(address: str, folder: str, name: str, group: str, times: str) -> None:
    pair = [] if name == "-" else ["-cert", f"{folder}/{name}.crt", "-key", f"{folder}/{name}.key"]
    checks = ["-CAfile", f"{folder}/ca.crt", "-verify_return_error", "-verify_hostname", "localhost"]
    link = Link("s_client", "-connect", address, "-groups", group, *checks, *pair)
    link.send(INIT, 0, init_text(0, os.urandom(16).hex(), OWN_WINDOW))
    link.send(PING, 0, b"12345678")
    while True:
        kind, _, payload = link.read()
        if kind == WELCOME:
            print("welcome", lines_of(payload)["port"], flush=True)
        elif kind == PING:
            link.send(PONG, 0, payload)
        elif kind == NEW_CONN:
            break
    link.echo(None)
    link.end()


def server(folder: str, name: str, group: str) -> None:
    port = free_port()
    pair = ["-cert", f"{folder}/{name}.crt", "-key", f"{folder}/{name}.key"]
    checks = ["-CAfile", f"{folder}/ca.crt", "-Verify", "1", "-verify_return_error", "-naccept", "1"]
    link = Link("s_server", "-accept", f"127.0.0.1:{port}", "-groups", group, *checks, *pair)
    print("listening", port, flush=True)  # soon: s_server does not say when, and our client comes again
    if link.read()[0] != INIT:
        raise ValueError("no INIT")
    print("init", flush=True)
    link.send(WELCOME, 0, f"version=1\nport=4711\nwindow={OWN_WINDOW}".encode())
    link.send(PING, 0, b"12345678")
    link.send(NEW_CONN, 1, b"203.0.113.7:51234")
    link.echo(b"0123456789abcdef" * (TOTAL // 16))
    link.end()


def main(words: Sequence[str]) -> int:
    try:
        if words[0] == "version":
            print(subprocess.run(["openssl", "version"], capture_output=True, text=True).stdout.split(" (")[0].strip())
            return 0
        role, group = words[0], words[4 if words[0] == "client" else 3]
        if not knows(group):
            print("unsupported", group)
            return 1
        {"client": client, "server": server}[role](*words[1:])
    except (EOFError, ValueError, OSError) as error:
        print("failed", error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
