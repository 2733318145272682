"""The bytes of one direction of a control connection to frames, and frames to lines of a recording.

Apart from judge.py, because each program under test loads it (tap.py): it imports next to nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

DATA = 2
MAX_CONTROL_BYTES = 4096
MAX_DATA_BYTES = 1_048_576
HEADER = struct.Struct(">BII")

# type, id, announced length, payload (empty for DATA, and over the limit), and of DATA the part's offset and bytes
Scanned = tuple[int, int, int, bytes, int, int]


class Scanner:
    """Any cut gives the same frames. After a length over its limit, which is told, no more is looked at."""

    def __init__(self) -> None:
        self._held = bytearray()  # of a frame that is not DATA, or of a header
        self._data: tuple[int, int, int] | None = None  # stream, length and offset of the DATA frame that is open
        self._is_dead = False

    def feed(self, raw: bytes | bytearray | memoryview) -> Iterator[Scanned]:
        view = memoryview(raw)
        position, end = 0, len(view)
        while position < end and not self._is_dead:
            if self._data is not None:
                stream, length, offset = self._data
                count = min(length - offset, end - position)
                self._data = (stream, length, offset + count) if offset + count < length else None
                position += count
                yield DATA, stream, length, b"", offset, count
                continue
            wanted = 9 if len(self._held) < 9 else 9 + HEADER.unpack_from(self._held)[2]
            part = view[position : position + wanted - len(self._held)]
            self._held += part
            position += len(part)
            if len(self._held) >= 9 and (frame := self._take_held()):
                yield frame

    def _take_held(self) -> Scanned | None:
        """The frame that is held, where it is whole. DATA is told with the first bytes of its payload."""
        kind, stream, length = HEADER.unpack_from(self._held)
        if length > (MAX_DATA_BYTES if kind == DATA else MAX_CONTROL_BYTES):
            self._is_dead = True
            return kind, stream, length, b"", 0, 0
        if kind == DATA:
            self._held.clear()
            if length:
                self._data = (stream, length, 0)
                return None
            return DATA, stream, 0, b"", 0, 0
        if len(self._held) < 9 + length:
            return None
        payload = bytes(self._held[9:])
        self._held.clear()
        return kind, stream, length, payload, 0, 0


def to_line(at: float, connection: int, is_sent: bool, frame: Scanned) -> str:
    """A frame as a line: seconds, connection, direction, type, id, length; then offset and count, or the payload in
    hexadecimal."""
    kind, stream, length, payload, offset, count = frame
    rest = f"{offset} {count}" if kind == DATA else payload.hex() or "-"
    return f"{at:.6f} {connection} {'out' if is_sent else 'in'} {kind} {stream} {length} {rest}\n"
