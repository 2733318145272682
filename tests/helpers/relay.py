"""A TCP relay that plays the network between a client and its server: distance, stalls, silence, cuts.

Also a program of its own, for measurements: `python relay.py HOST:PORT ONE_WAY_SECONDS [PORT]` prints its address and
relays until its standard input ends; where it is told a port, until it is interrupted.
"""

from __future__ import annotations

import collections
import contextlib
import queue
import selectors
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable

Address = tuple[str, int]

READ_BYTES = 256 * 1024
QUEUE_BYTES = 1 << 20  # of each direction; with a distance it must hold what is on its way


def _reset_at_close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class Direction:
    """One way of one connection: what was read of `source`, and when it is due at `sink`."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.chunks: collections.deque[tuple[float, memoryview]] = collections.deque()  # an empty one is FIN
        self.queued = 0
        self.stalled = False  # nothing is read of `source`: its sender meets a full window
        self.ended = False  # `source` has sent FIN


class Link:
    """A relayed connection: "up" is from who dialled the relay to the target, "down" the way back."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.up, self.down = Direction(near, far), Direction(far, near)
        self.silent = False  # whatever comes is dropped, and no end is told to the other side


class Relay:
    """Relays connections to one target. A context manager; its end closes all.

    Threads: one relays; the test's thread gives orders, each of which has been done when its method returns.
    Locking: none. Orders are run by the relaying thread, which owns all links.
    """

    def __init__(self, target: Address, one_way_s: float = 0.0, queue_bytes: int = QUEUE_BYTES, port: int = 0) -> None:
        self._target = target
        self._one_way_s = one_way_s
        self._queue_bytes = queue_bytes
        self._selector = selectors.DefaultSelector()
        self._orders: queue.SimpleQueue[tuple[Callable[[], object], threading.Event]] = queue.SimpleQueue()
        self._wake, self._woken = socket.socketpair()
        self._listener = socket.create_server(("127.0.0.1", port), backlog=128)
        self.address: Address = self._listener.getsockname()
        self.links: list[Link] = []  # that are not cut, silent ones too; the relaying thread's
        self.accepted = 0  # connections so far
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"relay {self.address[1]}")
        self._thread.start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._order(self._close)
        self._thread.join()

    # -- orders

    def stall(self, up: bool = True, down: bool = True) -> None:
        """Of all links that there are, take no byte more in these directions."""

        def do() -> None:
            for link in self.links:
                link.up.stalled, link.down.stalled = up, down
                self._watch(link)

        self._order(do)

    def resume(self) -> None:
        """End the stall."""
        self.stall(False, False)

    def silence(self) -> None:
        """From now on drop all that comes on the links that there are: no byte, FIN or RST reaches anybody."""

        def do() -> None:
            for link in self.links:
                link.silent = True
                self._watch(link)

        self._order(do)

    def cut(self, near: bool = True, far: bool = True, fin: bool = False) -> None:
        """End the links that there are with RST, or with `fin` FIN; a side that is left out hears nothing of it."""

        def do() -> None:
            for link in [link for link in self.links if not link.silent]:
                link.silent = True
                for sock, wanted in ((link.near, near), (link.far, far)):
                    if wanted:
                        if not fin:
                            _reset_at_close(sock)
                        self._forget(sock)
                        sock.close()
                if near and far:
                    self.links.remove(link)
                self._watch(link)

        self._order(do)

    def _order(self, action: Callable[[], object]) -> None:
        done = threading.Event()
        self._orders.put((action, done))
        with contextlib.suppress(OSError):  # it has closed, as ordered, before it was woken
            self._wake.send(b"x")
        done.wait()

    # -- the relaying thread

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        while not self._closing:
            for key, events in self._selector.select(self._watch_all()):
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                elif key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj.fileno() >= 0 and key.fileobj in self._selector.get_map():  # type: ignore[union-attr]
                    self._on_ready(key.data, key.fileobj, events)  # type: ignore[arg-type]
            while not self._orders.empty():
                action, done = self._orders.get()
                action()
                done.set()

    def _watch_all(self) -> float | None:
        """With a distance: ask the selector to write what has arrived; returns the seconds until more arrives."""
        if not self._one_way_s:
            return None
        now = time.monotonic()  # one for both: what arrives in between would be forgotten
        for link in self.links:
            self._watch(link, now)
        due = [way.chunks[0][0] for link in self.links for way in (link.up, link.down) if way.chunks]
        return min((at - now for at in due if at > now), default=None)

    def _accept(self) -> None:
        near, _ = self._listener.accept()
        try:
            far = socket.create_connection(self._target, 5)
        except OSError:
            _reset_at_close(near)
            near.close()
            return
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.accepted += 1
        self.links.append(Link(near, far))
        self._watch(self.links[-1])

    def _watch(self, link: Link, now: float = float("inf")) -> None:
        """Ask the selector for what this link can do now."""
        for source, sink in ((link.up, link.down), (link.down, link.up)):
            sock = source.source
            if sock.fileno() < 0:
                continue
            events = 0
            if link.silent:
                events = 0 if source.ended else selectors.EVENT_READ
            else:
                if not source.stalled and not source.ended and source.queued < self._queue_bytes:
                    events |= selectors.EVENT_READ
                if sink.chunks and sink.chunks[0][0] <= now:
                    events |= selectors.EVENT_WRITE
            self._ask(sock, events, link)

    def _ask(self, sock: socket.socket, events: int, link: Link) -> None:
        if not events:
            self._forget(sock)
        elif sock not in self._selector.get_map():
            self._selector.register(sock, events, link)
        elif self._selector.get_key(sock).events != events:
            self._selector.modify(sock, events, link)

    def _forget(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0 and sock in self._selector.get_map():
            self._selector.unregister(sock)

    def _on_ready(self, link: Link, sock: socket.socket, events: int) -> None:
        way, back = (link.up, link.down) if sock is link.near else (link.down, link.up)
        try:
            if events & selectors.EVENT_READ:
                self._read(link, way)
            if events & selectors.EVENT_WRITE:
                self._write(back)
        except BlockingIOError:
            pass
        except OSError:  # a reset goes on to the other side
            if link.silent:
                way.ended = True
            else:
                self._drop(link)
                return
        if way.ended and back.ended and not way.chunks and not back.chunks and not link.silent:
            self._drop(link, reset=False)
            return
        self._watch(link)

    def _read(self, link: Link, way: Direction) -> None:
        part = way.source.recv(READ_BYTES)
        way.ended = not part
        if not link.silent:
            way.chunks.append((time.monotonic() + self._one_way_s, memoryview(part)))
            way.queued += len(part)
            if not self._one_way_s:
                self._write(way)

    def _write(self, way: Direction) -> None:
        now = time.monotonic()
        while way.chunks and way.chunks[0][0] <= now:
            due, part = way.chunks[0]
            if not part:
                way.sink.shutdown(socket.SHUT_WR)
                way.chunks.popleft()
                continue
            sent = way.sink.send(part)
            way.queued -= sent
            if sent < len(part):
                way.chunks[0] = (due, part[sent:])
                return
            way.chunks.popleft()

    def _drop(self, link: Link, reset: bool = True) -> None:
        self.links.remove(link)
        for sock in (link.near, link.far):
            self._forget(sock)
            if reset:
                _reset_at_close(sock)
            sock.close()

    def _close(self) -> None:
        self._closing = True
        for link in list(self.links):
            self._drop(link)
        self._selector.close()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    listen = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with (
        Relay((host, int(port)), float(sys.argv[2]), 256 << 20, listen) as relay,
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(f"{relay.address[0]}:{relay.address[1]}", flush=True)
        if listen:
            threading.Event().wait()
        sys.stdin.read()


if __name__ == "__main__":
    main()
