"""Records what the transports of a program under test send and receive, frame by frame, for judge.py.

A program that support.py starts is tapped where the environment says so: `TUNNEL_TAP=FILE`. Payloads of DATA are
not kept. They are written to the file's end before they are sent and after they are received: so
nothing is lost when the program is killed, and an answer never stands before its question.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

from scanner import Scanner, to_line

VARIABLE = "TUNNEL_TAP"
LINES_AT_ONCE = 64  # tests measure the memory of the programs that are tapped
MOST_FRAMES = 5_000  # of a connection; both its directions end there, so that a flood takes no minutes to judge


@dataclasses.dataclass
class Recorded:
    """A connection, and how many of its frames have been recorded: about so many, for two threads count."""

    number: int
    sent: Scanner = dataclasses.field(default_factory=Scanner)
    received: Scanner = dataclasses.field(default_factory=Scanner)
    frames: int = 0


class Tap:
    """Stands between the sessions of this process and their transports.

    Threads: any. Locking: `_lock` guards the connections; each one's two scanners have one thread each.
    """

    def __init__(self, file: str) -> None:
        self._descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()
        self._connections: weakref.WeakKeyDictionary[Any, Recorded] = weakref.WeakKeyDictionary()
        self._carriers: weakref.WeakSet[Any] = weakref.WeakSet()  # that carry TLS: their bytes are no frames
        self._count = 0
        self._restore: list[tuple[type, str, Any]] = []

    def start(self, role: str = "") -> None:
        """Tap all transports that are made from now on."""
        import rtunnel
        import rtunnel_tls

        os.write(self._descriptor, f"recorded {role}\n".encode())
        for transport in (rtunnel.PlainTransport, rtunnel_tls.TlsTransport):
            self._replace(transport, "send", self._send)
            self._replace(transport, "receive_into", self._receive_into)
        self._replace_handshake(rtunnel_tls.TlsTransport)

    def stop(self) -> None:
        """Leave the transports as they were."""
        for owner, name, original in reversed(self._restore):
            setattr(owner, name, original)
        os.close(self._descriptor)

    def _replace(self, owner: type, name: str, wrapper: Any) -> None:
        original = vars(owner)[name]
        self._restore.append((owner, name, original))
        setattr(owner, name, lambda transport, *args: wrapper(original, transport, *args))

    def _replace_handshake(self, owner: type) -> None:
        original = vars(owner)["handshake"]
        self._restore.append((owner, "handshake", original))

        def handshake(cls: type, carrier: Any, *args: Any, **options: Any) -> Any:
            with self._lock:
                self._carriers.add(carrier)
            return original.__func__(cls, carrier, *args, **options)

        owner.handshake = classmethod(handshake)  # type: ignore[attr-defined]

    def _send(self, original: Any, transport: Any, frames: Any) -> Any:
        self._note(transport, frames, is_sent=True)
        return original(transport, frames)

    def _receive_into(self, original: Any, transport: Any, buffer: Any) -> Any:
        count = original(transport, buffer)
        self._note(transport, memoryview(buffer)[:count], is_sent=False)
        return count

    def _note(self, transport: Any, raw: Any, *, is_sent: bool) -> None:
        if not raw:
            return
        with self._lock:
            if transport in self._carriers:
                return
            known = self._connections.get(transport)
            if known is None:
                self._count += 1
                known = self._connections[transport] = Recorded(self._count)
        at = time.monotonic()
        frames = (known.sent if is_sent else known.received).feed(raw)
        while known.frames < MOST_FRAMES:
            lines = [to_line(at, known.number, is_sent, each) for each in itertools.islice(frames, LINES_AT_ONCE)]
            if not lines:
                return
            known.frames += len(lines)
            os.write(self._descriptor, "".join(lines).encode())


def start_in_program(role: str) -> None:
    """What a program under test does at its start."""
    Tap(f"{os.environ[VARIABLE]}.{os.getpid()}").start(role)


@contextlib.contextmanager
def tapped() -> Iterator[None]:
    """Tap the ends in this process while the block lasts, where the environment says so."""
    if VARIABLE not in os.environ:
        yield
        return
    tap = Tap(f"{os.environ[VARIABLE]}.{os.getpid()}")
    tap.start()
    try:
        yield
    finally:
        tap.stop()
