"""Records, inside a program under test, which lock is taken under which, and who waits where.

`install` replaces the locks, the waits and the sockets of the standard library, before rtunnel.py
is imported; when the process ends the record is written as JSON. test_tables.py compares it with
the tables of rtunnel.py.

What counts as a wait: a receive, send, connect or accept on a socket that blocks; a poll or select
with a timeout; the wait of a condition, event or semaphore; a get from a queue; the start of a
threading.Thread (it waits until the thread runs) and its join; a sleep; a name's resolution; a write to
stderr. Each is noted where it is called, whether or not it had to wait this time.
What does not: a `with lock` (a lock is held for a few statements only, which is what the record
proves); calls on files; the resolution of a numeric address.

A lock is a mutex where it is taken by `with`. A bare `acquire` in our modules waits for a signal
that another thread gives by `release`, so it is a wait, and nobody holds that lock.
"""

from __future__ import annotations

import ipaddress
import json
import linecache
import os
import queue
import re
import select
import selectors
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

MODULES = ("rtunnel.py", "rtunnel_tls.py")
ROOT = Path(__file__).resolve().parents[2]
Key = tuple[str, int, str]


def functions() -> dict[Key, str]:
    """All functions of our modules: file, first line and name, and the name that the tables use.

    That is `function`, or `Class.method`; a function inside another goes by the outer one's name.
    """
    found: dict[Key, str] = {}

    def add(code: types.CodeType, file: str, prefix: str, owner: str) -> None:
        for inner in code.co_consts:
            if not isinstance(inner, types.CodeType):
                continue
            if not inner.co_flags & 0x2:  # CO_NEWLOCALS: only a function has it, a class has not
                add(inner, file, f"{inner.co_name}.", owner)
                continue
            name = owner or prefix + inner.co_name
            found[file, inner.co_firstlineno, inner.co_name] = name
            add(inner, file, prefix, name)

    for file in MODULES:
        add(compile((ROOT / file).read_text(), file, "exec"), file, "", "")
    return found


class Record:
    """What one process does.

    Threads: any. Each set and dict is changed by single operations only; each thread has its own
    list of the locks that it holds.
    """

    def __init__(self) -> None:
        self._functions = functions()
        self._own = threading.local()
        self.locks: set[str] = set()
        self.nestings: dict[tuple[str, str], list[str]] = {}  # outer and inner lock: a stack
        # The functions of ours on the stack, the outermost first, and the locks that are held.
        self.waits: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()

    @property
    def held(self) -> list[Lock]:
        if not hasattr(self._own, "held"):
            self._own.held = []
        held: list[Lock] = self._own.held
        return held

    def stack(self) -> list[str]:
        """The functions of ours that run, the outermost first; before them what a thread began."""
        found: list[str] = []
        frame: types.FrameType | None = sys._getframe(1)
        before = None
        while frame is not None:
            code = frame.f_code
            if name := self._functions.get((Path(code.co_filename).name, code.co_firstlineno, code.co_name)):
                found.append(name)
            elif code is threading.Thread.run.__code__ and before and not self.is_ours(before):
                found.append(f"{type(before.f_locals.get('self')).__name__}.{before.f_code.co_name}")
            before, frame = frame, frame.f_back
        return found[::-1]

    def is_ours(self, frame: types.FrameType) -> bool:
        code = frame.f_code
        return (Path(code.co_filename).name, code.co_firstlineno, code.co_name) in self._functions

    def wait(self, own: object = None) -> None:
        """The caller is about to wait, or may have to; `own` is the lock that the wait lets go."""
        held = tuple(lock.name for lock in self.held if lock is not own)
        self.waits.add((tuple(self.stack()), held))

    def take(self, lock: Lock) -> None:
        held = self.held
        if held and lock not in held:
            for outer in held:
                if (outer.name, lock.name) not in self.nestings:
                    self.nestings[outer.name, lock.name] = self.stack()
        held.append(lock)

    def leave(self, lock: Lock) -> None:
        held = self.held
        for at in range(len(held) - 1, -1, -1):
            if held[at] is lock:
                del held[at]
                return

    def save(self, file: str) -> None:
        nestings = [[outer, inner, stack] for (outer, inner), stack in self.nestings.copy().items()]
        record = {"locks": sorted(self.locks.copy()), "nestings": nestings, "waits": sorted(self.waits.copy())}
        Path(file).write_text(json.dumps(record))


RECORD: Record
_ATTRIBUTE = re.compile(r"\s*(?:self\.)?(\w+)(?:\s*:[^=]+)?\s*=[^=]")


def _name_of_new_lock() -> str:
    """`Class._attribute`, by the class that makes the lock, or by ours that inherits it."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code is threading.Condition.__init__.__code__:
        frame = frame.f_back
    assert frame is not None
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    found = _ATTRIBUTE.match(line)
    attribute = found[1] if found else f"line {frame.f_lineno}"
    owner = frame.f_locals.get("self")
    if owner is None or not line.lstrip().startswith("self."):
        outer = frame.f_globals["__name__"] if frame.f_code.co_name == "<module>" else frame.f_code.co_name
        return f"{outer}.{attribute}"
    classes = type(owner).__mro__
    makers = [each for each in classes if frame.f_code in _codes(each)]
    maker = makers[0] if makers else classes[0]
    if maker.__module__ not in ("rtunnel", "rtunnel_tls"):
        maker = next((each for each in classes if each.__module__ in ("rtunnel", "rtunnel_tls")), maker)
    return f"{maker.__name__}.{attribute}"


def _codes(owner: type) -> Iterator[types.CodeType]:
    for each in vars(owner).values():
        if isinstance(each, types.FunctionType):
            yield each.__code__


class Lock:
    """A lock that tells the record of it."""

    make: Callable[[], Any] = staticmethod(threading.Lock)

    def __init__(self) -> None:
        self._lock = self.make()
        self.name = _name_of_new_lock()
        RECORD.locks.add(self.name)

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if RECORD.is_ours(sys._getframe(1)):
            if self._lock.acquire(False):
                return True
            if blocking:
                RECORD.wait()
            return bool(self._lock.acquire(blocking, timeout))
        taken = bool(self._lock.acquire(blocking, timeout))
        if taken:
            RECORD.take(self)
        return taken

    def release(self) -> None:
        RECORD.leave(self)
        self._lock.release()

    def __enter__(self) -> bool:
        self._lock.acquire()
        RECORD.take(self)
        return True

    def __exit__(self, *_: object) -> None:
        self.release()

    def locked(self) -> bool:
        return bool(self._lock.locked())

    # What threading.Condition asks of its lock.

    def _is_owned(self) -> bool:
        return self in RECORD.held

    def _release_save(self) -> object:
        RECORD.leave(self)
        return self._lock.release()

    def _acquire_restore(self, state: object) -> None:
        self._lock.acquire()
        RECORD.take(self)

    def _at_fork_reinit(self) -> None:
        self._lock._at_fork_reinit()


class RLock(Lock):
    """The same of a lock that its holder may take again."""

    make = staticmethod(threading.RLock)

    def locked(self) -> bool:
        raise AssertionError("a plain lock tells that, this one only from Python 3.14 on")

    def _release_save(self) -> object:
        RECORD.leave(self)
        return self._lock._release_save()

    def _acquire_restore(self, state: object) -> None:
        self._lock._acquire_restore(state)
        RECORD.take(self)


class SimpleQueue(queue.SimpleQueue):  # type: ignore[type-arg]
    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if block and timeout != 0:
            RECORD.wait()
        return super().get(block, timeout)


class Poll:
    """What select.poll makes."""

    make: Callable[[], Any]

    def __init__(self) -> None:
        self._poll = self.make()

    def poll(self, timeout: float | None = None) -> Any:
        if timeout != 0:
            RECORD.wait()
        return self._poll.poll(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._poll, name)


class Output:
    """A stream of text whose reader may be slow."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        RECORD.wait()
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_numeric(host: str | bytes | None) -> bool:
    if not host:
        return True
    try:
        ipaddress.ip_address(host if isinstance(host, str) else host.decode())
    except ValueError:
        return False
    return True


def _noted(owner: Any, name: str, waits: Callable[..., bool], own: Callable[..., object] = lambda *_: None) -> None:
    """Replace owner.name by the same that notes a wait, where this call `waits`."""
    function = getattr(owner, name)

    def noted(*arguments: Any, **named: Any) -> Any:
        if waits(*arguments, **named):
            RECORD.wait(own(*arguments))
        return function(*arguments, **named)

    setattr(owner, name, noted)


def _blocks(sock: socket.socket, *arguments: Any) -> bool:
    """The flags of a call on a socket stand last; who asks not to wait does not."""
    dont_wait = isinstance(arguments[-1], int) and arguments[-1] & socket.MSG_DONTWAIT if arguments else False
    return sock.gettimeout() != 0 and not dont_wait


def _has_time(_: object, timeout: float | None = None) -> bool:
    return timeout is None or timeout > 0


def install(file: str) -> None:
    """Record from now on; write to `file` at the end. Before any module with locks is imported."""
    global RECORD
    RECORD = Record()
    Poll.make = staticmethod(select.poll)
    for name in ("recv", "recv_into", "send", "sendall", "sendto", "connect", "connect_ex", "accept"):
        _noted(socket.socket, name, _blocks)
    _noted(socket, "getaddrinfo", lambda host, *_, **how: not _is_numeric(host) and not how.get("flags"))
    _noted(select, "select", lambda *arguments: arguments[3:] != (0,))
    _noted(time, "sleep", lambda _: True)
    _noted(threading.Thread, "start", lambda _: True)
    _noted(threading.Thread, "join", _has_time)
    _noted(threading.Condition, "wait", _has_time, lambda condition, *_: condition._lock)
    _noted(threading.Event, "wait", _has_time)
    _noted(threading.Semaphore, "acquire", lambda _, blocking=True, timeout=None: blocking)
    threading.Semaphore.__enter__ = threading.Semaphore.acquire  # type: ignore[method-assign]
    threading.Lock, threading.RLock = Lock, RLock  # type: ignore[misc, assignment]
    select.poll = selectors.PollSelector._selector_cls = Poll  # type: ignore[assignment, attr-defined]
    queue.SimpleQueue = SimpleQueue  # type: ignore[misc]
    sys.stderr = Output(sys.stderr)
    import logging  # whose own work at the end is not recorded: `save` is done before it

    assert isinstance(logging._lock, Lock), "imported before the locks were replaced"  # type: ignore[attr-defined]
    leave = os._exit

    def save_and_leave(status: int) -> None:
        RECORD.save(file)
        leave(status)

    os._exit = save_and_leave  # how the program ends
