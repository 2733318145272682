"""A peer of the tunnel that is written from PROTOCOL.md alone and imports nothing of the program.

`NaivePeer` says and hears single frames, `Level1Peer` those of level 1. `OriginalClient` and `OriginalServer` behave as
the original's two programs do, as simply as can be: one thread, one loop, blocking writes.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time

NEW_CONN, DATA, CLOSE_CONN, INIT, WELCOME, WINDOW, EOF, PING, PONG, GOAWAY, BLOCKED = range(1, 12)
NAMES = {
    **{
        NEW_CONN: "NEW_CONN",
        DATA: "DATA",
        CLOSE_CONN: "CLOSE_CONN",
        INIT: "INIT",
        WELCOME: "WELCOME",
        WINDOW: "WINDOW",
    },
    **{EOF: "EOF", PING: "PING", PONG: "PONG", GOAWAY: "GOAWAY", BLOCKED: "BLOCKED"},
}
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


class StreamView:
    """What a peer of level 1 knows of one stream: credit both ways, and the ends."""

    def __init__(self, granted: int, credit: int) -> None:
        self.granted = granted  # bytes that the other end may still send
        self.credit = credit  # bytes that this end may still send
        self.eof = False  # the other end's has come
        self.closed = False  # by the other end


class Level1Peer(NaivePeer):
    """A peer of level 1 that holds each frame that comes to the rules, and answers PINGs in `hear`."""

    def __init__(self, sock: socket.socket, *, plays: str, window: int) -> None:
        super().__init__(sock)
        self.plays = plays
        self.window = window  # the credit that it gives on each stream
        self.lines: dict[str, str] = {}  # of the other end's INIT or WELCOME
        self.streams: dict[int, StreamView] = {}
        self.visitors: dict[int, str] = {}
        self.pings: list[bytes] = []  # that have come
        self.unanswered: list[bytes] = []  # its own
        self.pong_delay_s = 0.0  # as if it were far

    @classmethod
    def as_client(cls, server: Address, port: int = 0, *, instance: str = "", window: int = 65536) -> Level1Peer:
        """A client that the server has welcomed. AssertionError where it has not."""
        peer = cls(socket.create_connection(server, 10.0), plays="client", window=window)
        peer.send_init(init_text(port, instance, window))
        try:
            peer.hear_welcome()
        except BaseException:
            peer.sock.close()
            raise
        return peer

    @classmethod
    def as_server(cls, accepted: socket.socket, *, port: int = 4711, window: int = 65536) -> Level1Peer:
        """A server that has read INIT and said WELCOME."""
        peer = cls(accepted, plays="server", window=window)
        type, stream, payload = peer.read_frame()
        assert (type, stream) == (INIT, 0)
        peer.lines = lines_of(payload)
        peer.send_frame(WELCOME, 0, f"version=1\nport={port}\nwindow={window}".encode())
        return peer

    @property
    def public(self) -> Address:
        """Where the visitors of its lease connect, on loopback."""
        return "127.0.0.1", int(self.lines["port"])

    def hear_welcome(self) -> None:
        """The next frame is a WELCOME that does not refuse."""
        type, stream, payload = self.read_frame()
        assert (type, stream) == (WELCOME, 0), (NAMES.get(type), stream, payload)
        self.lines = lines_of(payload)
        assert "error" not in self.lines, self.lines

    def hear(self) -> tuple[int, int, bytes]:
        """The next frame that is no PING; PINGs are answered."""
        while True:
            type, stream, payload = self.read_frame()
            if type != PING:
                return type, stream, payload
            time.sleep(self.pong_delay_s)
            self.send_frame(PONG, 0, payload)

    def expect(self, type: int, stream: int, payload: bytes = b"") -> None:
        """The next frame that is no PING is this one."""
        got = self.hear()
        assert got == (type, stream, payload), (
            f"{NAMES[got[0]]} {got[1:]} instead of {NAMES[type]} {stream} {payload!r}"
        )

    def hear_data(self, stream: int, count: int) -> bytes:
        """So many bytes of DATA of this stream; WINDOWs and BLOCKED may come between them."""
        received = bytearray()
        while len(received) < count:
            type, got, payload = self.hear()
            if type not in (WINDOW, BLOCKED):
                assert (type, got) == (DATA, stream), f"{NAMES[type]} {got} amid DATA of {stream}"
                received += payload
        assert len(received) == count
        return bytes(received)

    def hear_visitor(self) -> int:
        """The next frame is NEW_CONN: its id."""
        type, stream, _ = self.hear()
        assert type == NEW_CONN
        return stream

    def check_alive(self) -> None:
        """A PING is answered; other frames may come before."""
        self.ping(b"alive?!?")
        while self.hear() != (PONG, 0, b"alive?!?"):
            continue

    def check_quiet(self) -> None:
        """A PING is answered, and nothing else comes before."""
        self.ping(b"quiet?!?")
        self.expect(PONG, 0, b"quiet?!?")

    def ping(self, payload: bytes) -> None:
        self.unanswered.append(payload)
        self.send_frame(PING, 0, payload)

    def open(self, stream: int, visitor: str = "203.0.113.7:51234") -> None:
        """Say NEW_CONN."""
        self.streams[stream] = StreamView(self.window, int(self.lines["window"]))
        self.send_frame(NEW_CONN, stream, visitor.encode())

    def grant(self, stream: int, count: int) -> None:
        self.streams[stream].granted += count
        self.send_frame(WINDOW, stream, struct.pack(">I", count))

    def send_data(self, stream: int, payload: bytes, size: int = 65527) -> None:
        """DATA within the credit, `size` bytes a frame."""
        self.streams[stream].credit -= len(payload)
        assert self.streams[stream].credit >= 0
        self.send(b"".join(frame(DATA, stream, payload[at : at + size]) for at in range(0, len(payload), size)))

    def read_frame(self) -> tuple[int, int, bytes]:
        type, stream, payload = super().read_frame()
        try:
            self._judge(type, stream, payload)
        except AssertionError as error:
            raise AssertionError(f"{NAMES.get(type, type)} {stream} {payload[:64]!r} breaks {error}") from error
        return type, stream, payload

    def _judge(self, type: int, stream: int, payload: bytes) -> None:
        """Each assertion names the rule."""
        assert type in NAMES, "F-3: we know all types"
        other = "server" if self.plays == "client" else "client"
        assert SENDERS.get(type, other) == other, "F-8"
        assert bool(stream) == (type in ON_STREAMS), "F-7: id"
        assert len(payload) in LENGTHS[type], "F-7: length"
        if type == NEW_CONN:
            assert stream == len(self.visitors) + 1, "S-1"
            text = payload.decode("ascii")
            host, port = text.rsplit(":", 1)
            socket.inet_pton(socket.AF_INET6 if host[0] == "[" else socket.AF_INET, host.strip("[]"))
            assert 0 < int(port) < 65536, "S-8"
            self.visitors[stream] = text
            self.streams[stream] = StreamView(self.window, int(self.lines["window"]))
        elif stream:
            self._judge_stream(type, stream, payload)
        elif type == PING:
            self.pings.append(payload)
        elif type == PONG:
            assert payload in self.unanswered, "H-3"
            self.unanswered.remove(payload)
        if type in (CLOSE_CONN, GOAWAY):
            assert all(0x20 <= byte < 0x7F for byte in payload), "E-3"

    def _judge_stream(self, type: int, stream: int, payload: bytes) -> None:
        assert stream in self.streams, "S-5"
        view = self.streams[stream]
        assert not view.closed, "T-4: nothing follows CLOSE_CONN"
        if type == DATA:
            assert not view.eof, "T-2"
            view.granted -= len(payload)
            assert view.granted >= 0, "W-2"
        elif type == WINDOW:
            view.credit += int.from_bytes(payload, "big")
            assert payload != bytes(4), "W-3"
            assert view.credit < 2**31, "W-3"
        elif type == EOF:
            assert not view.eof, "T-2"
            view.eof = True
        elif type == CLOSE_CONN:
            view.closed = True


SENDERS = {NEW_CONN: "server", WELCOME: "server", INIT: "client"}
ON_STREAMS = {NEW_CONN, DATA, CLOSE_CONN, WINDOW, EOF, BLOCKED}
LENGTHS = {
    **{NEW_CONN: range(1, 65), DATA: range(1, 65528), CLOSE_CONN: range(65), INIT: range(4097), WELCOME: range(4097)},
    **{WINDOW: range(4, 5), EOF: range(1), PING: range(8, 9), PONG: range(8, 9), GOAWAY: range(65), BLOCKED: range(1)},
}


def init_text(port: int = 0, instance: str = "", window: int = 65536) -> bytes:
    """An INIT of level 1; its instance is a new one unless it is given."""
    return f"{port}:127.0.0.1:80\nversion=1\nwindow={window}\ninstance={instance or os.urandom(16).hex()}".encode()


def lines_of(payload: bytes) -> dict[str, str]:
    """The lines `key=value` of an INIT or a WELCOME."""
    return dict(line.split("=", 1) for line in payload.decode().split("\n") if "=" in line)


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
