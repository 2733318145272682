"""Visitors that check every byte and every end, and the local service that they visit. Standard library only.

`python load.py PORT` is that service as a program of its own, to be killed; it ends with its standard input.
"""

from __future__ import annotations

import collections
import contextlib
import random
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType

from support import Address, Service, eventually, reset_at_close

HEADER = struct.Struct(">III")  # seed, bytes up, bytes down
BLOCK = random.Random(20261122).randbytes(1 << 20) * 2
MAX_BYTES = 1 << 20


def pattern(seed: int, count: int) -> memoryview:
    """`count` bytes that another seed has not got: bytes of another stream are wrong here."""
    start = seed % MAX_BYTES
    return memoryview(BLOCK)[start : start + count]


class Checker:
    """What was wrong, in words: whatever it holds is a defect of the tunnel."""

    def __init__(self) -> None:
        self.wrong: list[str] = []

    def read(self, sock: socket.socket, seed: int, count: int) -> None:
        """Read to the clean end, which must come behind exactly these bytes. Raises ConnectionError for a reset."""
        received = bytearray()
        while part := sock.recv(1 << 16):
            received += part
            if pattern(seed, count)[: len(received)] != received:
                self.wrong.append(f"wrong byte within {len(received)} of {count}")
                raise ConnectionAbortedError
        if len(received) < count:
            self.wrong.append(f"a clean end behind {len(received)} of {count} bytes")
            raise ConnectionAbortedError


class Answers(Checker):
    """The local service's handler: it checks what comes up to its end, and answers with what was asked for."""

    def __call__(self, sock: socket.socket) -> None:
        header = b""
        while len(header) < HEADER.size:
            part = sock.recv(HEADER.size - len(header))
            if not part:
                reset_at_close(sock, False)
                return  # a visitor that only looked in
            header += part
        seed, up, down = HEADER.unpack(header)
        reset_at_close(sock, True)  # so that whatever kills this service, it has not ended cleanly
        self.read(sock, seed, up)
        sock.sendall(pattern(seed + 1, down))
        reset_at_close(sock, False)


class Load(Checker):
    """Visitors of one address, each in a thread; a context manager, whose end waits for the last answers.

    With `patient` a visitor tries again where the connection fails, or is reset before the first byte of the answer.
    """

    def __init__(
        self, address: Address, visitors: int, *, up: int = 1000, down: int = 10000, patient: bool = False,
        pause_s: float = 0.0, timeout_s: float = 20.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._address = address
        self._bytes = up, down
        self._patient = patient
        self._pause_s = pause_s
        self._timeout_s = timeout_s
        self._stop = threading.Event()
        self._lock = threading.Lock()
        # guarded by _lock
        self.seconds: list[float] = []  # of each answered request, its retries included
        self.failed: collections.Counter[str] = collections.Counter()  # requests that were given up, by reason
        self.retried = 0
        self._threads = [
            threading.Thread(target=self._visit, args=(number,), name=f"visitor {number}") for number in range(visitors)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int) -> None:
        """Wait for so many more answered requests."""
        before = len(self.seconds)
        eventually(lambda: len(self.seconds) >= before + count, 20.0)

    def quantile_ms(self, share: float) -> float:
        """Of the answered requests' times."""
        times = sorted(self.seconds)
        return 1000 * times[min(len(times) - 1, int(share * len(times)))] if times else float("nan")

    @property
    def success_rate(self) -> float:
        return len(self.seconds) / max(1, len(self.seconds) + sum(self.failed.values()))

    def _visit(self, number: int) -> None:
        dice = random.Random(number)
        while not self._stop.is_set():
            sizes = [dice.randint(0, most) for most in self._bytes]
            failure = self._request(dice.getrandbits(31), *sizes)
            if failure:
                with self._lock:
                    self.failed[failure] += 1
            self._stop.wait(self._pause_s * dice.uniform(0.5, 1.5))

    def _request(self, seed: int, up: int, down: int) -> str:
        """Why it failed; empty where it was answered."""
        began = time.monotonic()
        while True:
            begun = False
            try:
                with socket.create_connection(self._address, self._timeout_s) as sock:
                    sock.sendall(HEADER.pack(seed, up, down))
                    sock.sendall(pattern(seed, up))
                    with contextlib.suppress(OSError):  # reset: the read will tell
                        sock.shutdown(socket.SHUT_WR)
                    begun = bool(sock.recv(1, socket.MSG_PEEK)) if down else False
                    self.read(sock, seed + 1, down)
                with self._lock:
                    self.seconds.append(time.monotonic() - began)
                return ""
            except OSError as error:
                failure = type(error).__name__
            if begun or not self._patient or time.monotonic() - began > self._timeout_s:
                return failure
            with self._lock:
                self.retried += 1
            self._stop.wait(0.02)


@contextlib.contextmanager
def answering() -> Iterator[tuple[Service, Answers]]:
    """A service that answers `Load`, and what it found wrong."""
    answers = Answers()
    with Service(answers) as service:
        yield service, answers


def main() -> None:
    answers = Answers()
    with Service(answers, port=int(sys.argv[1]), reset=True):
        sys.stdin.read()
    if answers.wrong:
        sys.exit(f"wrong: {answers.wrong}")


if __name__ == "__main__":
    main()
