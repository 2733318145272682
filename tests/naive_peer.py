"""A peer of the tunnel that is written from PROTOCOL.md alone and imports nothing of the program.

`NaivePeer` says and hears single frames. `OriginalClient` and `OriginalServer` behave as the original's two
programs do, as simply as can be: one thread, one loop, blocking writes.
"""

from __future__ import annotations

import selectors
import socket
import struct

NEW_CONN, DATA, CLOSE_CONN, INIT = 1, 2, 3, 4
READ_BYTES = 4096  # the original reads its sockets so many bytes at a time

Address = tuple[str, int]


def frame(type: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame's bytes."""
    return struct.pack(">BII", type, stream, len(payload)) + payload


class NaivePeer:
    """One end of a control connection, frame by frame. Every wait is bounded by `timeout` seconds."""

    def __init__(self, sock: socket.socket, timeout: float = 10.0) -> None:
        self.sock = sock
        self.timeout = timeout
        self.sock.settimeout(timeout)

    @classmethod
    def connect(cls, address: Address) -> NaivePeer:
        return cls(socket.create_connection(address, 10.0))

    def __enter__(self) -> NaivePeer:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, raw: bytes) -> None:
        """Any bytes."""
        self.sock.sendall(raw)

    def send_frame(self, type: int, stream: int, payload: bytes = b"") -> None:
        self.sock.sendall(frame(type, stream, payload))

    def send_init(self, payload: bytes) -> None:
        self.send_frame(INIT, 0, payload)

    def _exactly(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = self.sock.recv(count - len(received))
            if not part:
                raise EOFError(f"end of the control connection after {bytes(received)!r}")
            received += part
        return bytes(received)

    def read_frame(self) -> tuple[int, int, bytes]:
        """Type, stream and payload. EOFError at the connection's end, TimeoutError where none comes."""
        type, stream, length = struct.unpack(">BII", self._exactly(9))
        return type, stream, self._exactly(length)

    def expect(self, type: int, stream: int, payload: bytes = b"") -> None:
        """The next frame is this one."""
        got = self.read_frame()
        assert got == (type, stream, payload), f"{got} instead of {(type, stream, payload)}"

    def expect_bytes(self, expected: bytes) -> None:
        """The next bytes are these."""
        got = self._exactly(len(expected))
        assert got == expected, f"{got.hex(' ')} instead of {expected.hex(' ')}"

    def expect_data(self, stream: int, expected: bytes) -> None:
        """The next frames are DATA of this stream that hold these bytes, in any number of frames."""
        received = b""
        while len(received) < len(expected):
            type, got_stream, payload = self.read_frame()
            assert (type, got_stream) == (DATA, stream), f"{(type, got_stream, payload)} amid DATA of {stream}"
            assert 1 <= len(payload) <= 65536, f"a DATA frame of {len(payload)} bytes"
            received += payload
        assert received == expected

    def read_close(self, stream: int) -> bytes:
        """The next frame is this stream's CLOSE_CONN: the reason in it."""
        type, got_stream, payload = self.read_frame()
        assert (type, got_stream) == (CLOSE_CONN, stream), f"{(type, got_stream, payload)}"
        assert len(payload) <= 64
        assert all(0x20 <= byte < 0x7F for byte in payload)
        return payload

    def expect_silence(self, seconds: float) -> None:
        """Nothing comes for so long, and the connection stays open."""
        self.sock.settimeout(seconds)
        try:
            got = self.sock.recv(4096)
        except TimeoutError:
            return
        finally:
            self.sock.settimeout(self.timeout)
        raise AssertionError(f"instead of silence: {got!r}")

    def expect_end(self, timeout: float | None = None) -> None:
        """The other end closes the control connection, without another frame."""
        self.sock.settimeout(timeout or self.timeout)
        try:
            got = self.sock.recv(4096)
        except ConnectionError:
            return  # closed with bytes of ours unread
        finally:
            self.sock.settimeout(self.timeout)
        assert got == b"", f"instead of the end: {got!r}"


class _Loop:
    """What both original programs share: frames, sockets, CLOSE_CONN as a full close of both directions."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._streams: dict[int, socket.socket] = {}
        self._control: socket.socket | None = None
        self._buffer = bytearray()

    def _send(self, type: int, stream: int, payload: bytes = b"") -> None:
        try:
            if self._control is not None:
                self._control.sendall(frame(type, stream, payload))
        except OSError:
            return  # the control connection has ended: the next read says so

    def _add(self, stream: int, sock: socket.socket) -> None:
        self._streams[stream] = sock
        self._selector.register(sock, selectors.EVENT_READ, stream)

    def _remove(self, stream: int) -> bool:
        sock = self._streams.pop(stream, None)
        if sock is None:
            return False
        self._selector.unregister(sock)
        sock.close()
        return True

    def _on_socket(self, stream: int) -> None:
        try:
            got = self._streams[stream].recv(READ_BYTES)
        except OSError:
            got = b""
        if got:
            self._send(DATA, stream, got)
        else:
            self._remove(stream)
            self._send(CLOSE_CONN, stream)

    def _on_control(self) -> bool:
        """Handle what has come; false at the control connection's end."""
        assert self._control is not None
        try:
            got = self._control.recv(READ_BYTES)
        except OSError:
            got = b""
        self._buffer += got
        while len(self._buffer) >= 9:
            type, stream, length = struct.unpack_from(">BII", self._buffer)
            if len(self._buffer) < 9 + length:
                break
            payload = bytes(self._buffer[9 : 9 + length])
            del self._buffer[: 9 + length]
            self._on_frame(type, stream, payload)
        return bool(got)

    def _on_frame(self, type: int, stream: int, payload: bytes) -> None:
        if type == DATA and stream in self._streams:
            try:
                self._streams[stream].sendall(payload)
            except OSError:
                self._remove(stream)
                self._send(CLOSE_CONN, stream)

    def _close(self) -> None:
        for stream in list(self._streams):
            self._remove(stream)
        if self._control is not None:
            self._control.close()
        self._selector.close()


class OriginalClient(_Loop):
    """The original's client: INIT only for a port other than 0; CLOSE_CONN is answered by CLOSE_CONN."""

    def __init__(self, server: Address, remote_port: int, local: Address) -> None:
        super().__init__()
        self._local = local
        self._control = socket.create_connection(server, 10.0)
        self._control.settimeout(None)
        self._selector.register(self._control, selectors.EVENT_READ, 0)
        if remote_port > 0:
            self._send(INIT, 0, f"{remote_port}:{local[0]}:{local[1]}".encode())

    def run(self) -> None:
        """Serve until the control connection ends."""
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.data == 0:
                        if not self._on_control():
                            return
                    elif key.data in self._streams:
                        self._on_socket(key.data)
        finally:
            self._close()

    def stop(self) -> None:
        """From any thread: end the control connection, and so run()."""
        try:
            if self._control is not None:
                self._control.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def _on_frame(self, type: int, stream: int, payload: bytes) -> None:
        if type == NEW_CONN:
            try:
                self._add(stream, socket.create_connection(self._local, 5.0))
            except OSError:
                self._send(CLOSE_CONN, stream)
        elif type == CLOSE_CONN:
            if self._remove(stream):
                self._send(CLOSE_CONN, stream)
        else:
            super()._on_frame(type, stream, payload)


class OriginalServer(_Loop):
    """The original's server for one client at a time, with a global port. It does not answer CLOSE_CONN."""

    def __init__(self) -> None:
        super().__init__()
        self._control_listener = socket.create_server(("127.0.0.1", 0))
        self._public_listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._wake, self._woken = socket.socketpair()
        self.control_address: Address = self._control_listener.getsockname()
        self.public_address: Address = self._public_listener.getsockname()
        self.inits: list[bytes] = []
        self._next_stream = 1

    def run(self) -> None:
        """Serve one client after the other, until stop()."""
        self._selector.register(self._woken, selectors.EVENT_READ, "stop")
        self._selector.register(self._control_listener, selectors.EVENT_READ, "control listener")
        self._selector.register(self._public_listener, selectors.EVENT_READ, "public listener")
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.data == "stop":
                        return
                    self._on_ready(key.data)
        finally:
            self._close()
            for sock in (self._control_listener, self._public_listener, self._wake, self._woken):
                sock.close()

    def stop(self) -> None:
        """From any thread: end run()."""
        self._wake.send(b"x")

    def _on_ready(self, what: object) -> None:
        if what == "control listener":
            accepted, _ = self._control_listener.accept()
            if self._control is not None:
                accepted.close()
                return
            self._control = accepted
            self._selector.register(accepted, selectors.EVENT_READ, "control")
        elif what == "public listener":
            visitor, _ = self._public_listener.accept()
            if self._control is None:
                visitor.close()
                return
            self._send(NEW_CONN, self._next_stream)
            self._add(self._next_stream, visitor)
            self._next_stream += 1
        elif what == "control":
            if not self._on_control():
                self._drop_client()
        elif isinstance(what, int) and what in self._streams:
            self._on_socket(what)

    def _drop_client(self) -> None:
        assert self._control is not None
        for stream in list(self._streams):
            self._remove(stream)
        self._selector.unregister(self._control)
        self._control.close()
        self._control = None
        self._buffer.clear()
        self._next_stream = 1

    def _on_frame(self, type: int, stream: int, payload: bytes) -> None:
        if type == INIT:
            self.inits.append(payload)
        elif type == CLOSE_CONN:
            self._remove(stream)
        else:
            super()._on_frame(type, stream, payload)
