"""The files in tests/vectors/, read by the format in PROTOCOL.md, section 14. Imports nothing of the program."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from naive_peer import NAMES, frame

FOLDER = Path(__file__).resolve().parents[1] / "vectors"
NUMBERS = {name: number for number, name in NAMES.items()}

Event = tuple[int, int, bytes, int]  # type, id, payload, bytes of a DATA frame that are still to come


class Case(NamedTuple):
    """One case of a file."""

    name: str
    rules: tuple[str, ...] = ()
    to: str = ""
    after: str = ""
    raw: bytes = b""
    events: tuple[Event, ...] = ()
    skipped: int = 0
    error: str = ""
    refusal: str = ""


def from_hex(text: str) -> bytes:
    """`01 0203` or `61*4096`; `-` is nothing."""
    raw = bytearray()
    for word in text.replace("-", "").split():
        digits, _, times = word.partition("*")
        raw += bytes.fromhex(digits) * int(times or 1)
    return bytes(raw)


def from_text(text: str) -> bytes:
    """`INIT 0 8080:h:1\\nversion=1`: a frame."""
    name, stream, payload = text.split(" ", 2)
    return frame(NUMBERS[name], int(stream), payload.replace("\\n", "\n").encode())


def read_event(text: str) -> Event:
    """`DATA 1 6869 0`: a frame, or a part of one."""
    name, stream, payload, *remaining = text.split()
    return NUMBERS[name], int(stream), from_hex(payload), int(remaining[0]) if remaining else 0


def read_file(path: Path) -> list[Case]:
    """The cases of one file. Raises ValueError for a line that the format has not."""
    cases = []
    for block in path.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if not lines:
            continue
        case = Case("")
        for line in lines:
            key, _, value = line.partition(":")
            value = value.strip()
            if key == "case":
                case = case._replace(name=f"{path.stem}: {value}")
            elif key == "rules":
                case = case._replace(rules=tuple(value.split()))
            elif key in ("bytes", "text"):
                case = case._replace(raw=case.raw + (from_hex if key == "bytes" else from_text)(value))
            elif key == "repeat":
                case = case._replace(raw=case.raw * int(value))
            elif key == "expect" and value == "skipped":
                case = case._replace(skipped=case.skipped + 1)
            elif key == "expect":
                case = case._replace(events=(*case.events, read_event(value)))
            elif key in ("to", "after", "error", "refusal"):
                case = case._replace(**{key: value})
            else:
                raise ValueError(f"{path.name}: {key!r} is no line of a case")
        cases.append(case)
    return cases


FRAMES = [case for path in sorted(FOLDER.glob("*.txt")) for case in read_file(path)]
SESSIONS = [case for path in sorted(FOLDER.glob("sessions/*.txt")) for case in read_file(path)]
