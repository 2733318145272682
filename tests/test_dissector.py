"""The Wireshark dissector, conf/rtunnel.lua, by tshark, on captures that are made here on loopback.

A capture needs a packet socket, so Linux and its right to it (root, or CAP_NET_RAW). Without one, or without tshark,
these tests are left out, and say so.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import judge
import pytest
from conftest import Factory
from judge import CLIENT, CLOSE_CONN, EOF, INIT, KINDS, NEW_CONN, PING, SERVER, WELCOME
from naive_peer import frame
from support import ROOT, connect, echo_service, eventually, free_port, read_all, read_exactly
from test_judge import HELLO, ROWS, VISITOR, WELCOMED, data
from tls_peers import House
from tunnels import text

DISSECTOR = ROOT / "conf" / "rtunnel.lua"
SNAP_BYTES = 1 << 18


def missing() -> str:
    """What these tests need, and is not here."""
    if shutil.which("tshark") is None:
        return "tshark is not installed: the dissector is not tested"
    try:
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
    except (AttributeError, OSError) as error:
        return f"no packet socket ({error}): the dissector is not tested"
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "all is here")


def port_filter(port: int) -> bytes:
    """The kernel's filter (classic BPF) for packets of IPv4 from or to a port, on Ethernet."""
    steps = [
        (0x28, 0, 0, 12), (0x15, 0, 6, 0x0800),  # an IPv4 packet, else the last step
        (0xB1, 0, 0, 14),  # X: the length of its header
        (0x48, 0, 0, 14), (0x15, 2, 0, port),  # its source port: the last but one
        (0x48, 0, 0, 16), (0x15, 0, 1, port),  # its destination port
        (0x06, 0, 0, SNAP_BYTES), (0x06, 0, 0, 0),
    ]  # fmt: skip
    return b"".join(struct.pack("HBBI", *step) for step in steps)


class Capture:
    """What passes on loopback from and to a port while the block lasts, as a pcap file.

    Threads: one reads packets. A last datagram to that port ends it.
    """

    LAST = b"the last packet of this capture"

    def __init__(self, file: Path, port: int) -> None:
        self.file, self._port = file, port

    def __enter__(self) -> Capture:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        steps = ctypes.create_string_buffer(port_filter(self._port))
        program = struct.pack("HP", 9, ctypes.addressof(steps))
        self._socket.setsockopt(socket.SOL_SOCKET, 26, program)  # SO_ATTACH_FILTER
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: no packet may be lost
        self._socket.bind(("lo", 0))
        self._thread = threading.Thread(target=self._run, name="capture")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(self.LAST, ("127.0.0.1", self._port))
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        with self.file.open("wb") as out:
            out.write(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, SNAP_BYTES, 1))  # Ethernet
            while True:
                packet, address = self._socket.recvfrom(SNAP_BYTES)
                if packet.endswith(self.LAST):
                    return
                if address[2] != socket.PACKET_OUTGOING:  # each passes twice
                    now = time.time()
                    out.write(struct.pack("<IIII", int(now), int(now % 1 * 1e6), len(packet), len(packet)) + packet)


def tshark(file: Path, *arguments: str, keylog: Path | None = None, follow: int | None = None) -> str:
    """What it prints of a capture, with the dissector."""
    command = ["tshark", "-X", f"lua_script:{DISSECTOR}", "-r", str(file)]
    command += ["-o", "tcp.try_heuristic_first:TRUE"]  # our ports are any, and some are other protocols' own
    if keylog is not None:
        command += ["-o", f"tls.keylog_file:{keylog}"]
    if follow is not None:
        command += ["-X", f"lua_script1:{follow}"]
    ran = subprocess.run([*command, *arguments], capture_output=True, text=True, check=True)
    assert "Lua" not in ran.stderr, ran.stderr
    return ran.stdout


FIELDS = ("tcp.stream", "rtunnel.type", "rtunnel.id", "rtunnel.length", "rtunnel.sender", "rtunnel.broken")


def frames(file: Path, keylog: Path | None = None) -> dict[int, list[tuple[str, ...]]]:
    """The frames of each TCP stream: type, id, length, sender; and then the rules that are broken in their packet."""
    flags = [word for field in FIELDS for word in ("-e", field)]
    found: dict[int, list[tuple[str, ...]]] = {}
    for line in tshark(file, "-Y", "rtunnel", "-T", "fields", *flags, keylog=keylog).splitlines():
        stream, *columns, broken = line.split("\t")
        of_packet = list(zip(*(column.split(",") for column in columns), strict=True))
        found.setdefault(int(stream), []).extend(of_packet)
        if broken:
            found[int(stream)].append(("broken", *broken.split(",")))
    return found


def judged_frames(file: Path, keylog: Path | None = None) -> list[tuple[str, ...]]:
    """The same of a capture with one session as the judge reads it, which knows nothing of the dissector."""
    (recording,) = judge.read(file, keylog)
    done = judge.judge(recording.frames)
    assert not done.findings
    assert done.frames > 10
    return [
        (KINDS[each.kind].name, str(each.stream), str(each.length), judge.ENDS[each.sender])
        for each in recording.frames
        if not each.offset
    ]


@pytest.mark.parametrize("over", ["plain", "level 0", "tls"])
def test_a_session(over: str, house: House, server: Factory, client: Factory, tmp_path: Path) -> None:
    """Each frame of a real session is shown with its type, stream, length and sender, over TLS too; none breaks a rule,
    and the streams can be followed and filtered."""
    file, keylog = tmp_path / "session.pcap", tmp_path / "keys" if over == "tls" else None
    flags = {end: house.flags(end) if keylog else () for end in ("server", "client")}
    port = free_port()
    with Capture(file, port), echo_service() as service:
        serving = server(
            f"--control-listen=127.0.0.1:{port}", *flags["server"], env={"SSLKEYLOGFILE": str(keylog)} if keylog else {}
        )
        asking = client(
            "--server", text(serving.control_address), "--local", service.text, *flags["client"], old=over == "level 0"
        )
        public = serving.lease_address()
        for word in (b"marco!", b"polo!!"):
            with connect(public) as visitor:
                visitor.sendall(word + b"x" * 99_994)
                assert read_exactly(visitor, 100_000) == word + b"x" * 99_994
                visitor.shutdown(socket.SHUT_WR)
                assert read_all(visitor) == b""
        eventually(lambda: len(asking.events("stream-closed")) == 2)
        assert serving.stop() == 0
        asking.stop()
    shown = frames(file, keylog)
    assert len(shown) == 1
    assert not any(row[0] == "broken" for rows in shown.values() for row in rows)
    # Packets of both directions may be listed in another order by the judge's way of reading: compared by sender.
    told, listed = judged_frames(file, keylog), next(iter(shown.values()))
    for end in judge.ENDS:
        assert [row for row in listed if row[3] == end] == [row for row in told if row[3] == end]
    if over == "level 0":
        return  # the rest is the same at both levels
    both = tshark(file, "-q", keylog=keylog, follow=1), tshark(file, "-q", keylog=keylog, follow=2)
    assert ("marco!" in both[0], "polo!!" in both[0]) == (True, False)
    assert ("marco!" in both[1], "polo!!" in both[1]) == (False, True)
    assert sum(len(line) for line in both[0].splitlines() if not line.startswith(("---", "rtunnel"))) == 200_000
    second = tshark(file, "-Y", 'rtunnel.id == 2 && rtunnel.type == "NEW_CONN"', "-T", "fields", "-e", "rtunnel.sender",
                    keylog=keylog)  # fmt: skip
    assert "server" in second


def converse(listener: socket.socket, said: list[tuple[int, bytes]]) -> None:
    """A connection on which the two ends say these bytes, one after the other, each in a segment of its own."""
    with connect(listener.getsockname()) as near, listener.accept()[0] as far:
        exchange(near, far, said)


def exchange(near: socket.socket, far: socket.socket, said: list[tuple[int, bytes]]) -> None:
    for end, raw in said:
        speaks, hears = (near, far) if end == CLIENT else (far, near)
        speaks.sendall(raw)
        assert read_exactly(hears, len(raw)) == raw


# What the judge knows by the clock, or by counting growth, the dissector does not.
UNKNOWN = {"H-1", "H-2", "X-1", "W-6"}
# And in a capture a session is found by its INIT.
SHOWN = [
    (rule, after, said)
    for rule, after, said in ROWS
    if rule not in UNKNOWN and all(at < 1 for *_, at in said) and (after or said[0][1].startswith(frame(INIT, 0)[:5]))
]
BEFORE = {
    "": [],
    "INIT": [(CLIENT, frame(INIT, 0, HELLO))],
    "level 1": [(CLIENT, frame(INIT, 0, HELLO)), (SERVER, frame(WELCOME, 0, WELCOMED))],
    "level 0, stream 1": [(CLIENT, frame(INIT, 0, HELLO)), (SERVER, frame(NEW_CONN, 1))],
}
BEFORE["level 1, stream 1"] = [*BEFORE["level 1"], (SERVER, frame(NEW_CONN, 1, VISITOR))]


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A capture of all rows of the judge's test, one connection each."""
    file = tmp_path_factory.mktemp("rows") / "rows.pcap"
    with socket.create_server(("127.0.0.1", 0)) as listener, Capture(file, listener.getsockname()[1]):
        for _, after, said in SHOWN:
            converse(listener, [*BEFORE[after], *((end, raw) for end, raw, _ in said)])
    return file


def test_broken_rules(broken: Path) -> None:
    """An expert info names the rule that a frame breaks, the same that the judge finds."""
    shown = frames(broken)
    rules = [[rule for row in shown[number] if row[0] == "broken" for rule in row[1:]] for number in sorted(shown)]
    wanted = [[rule] if rule else [] for rule, *_ in SHOWN]
    assert rules == wanted
    infos = tshark(broken, "-q", "-z", "expert,error")
    for rule in {rule for rule, *_ in SHOWN if rule}:
        assert f"[{rule}] broken by the " in infos


def test_the_judge_reads_captures(broken: Path) -> None:
    """`judge.py FILE.pcap` finds the same, and says so by its status."""
    ran = subprocess.run([sys.executable, judge.__file__, "--json", broken], capture_output=True, text=True)
    assert ran.returncode == 1
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    rules = [[each["rule"] for each in session["broken"]] for session in found]
    assert rules == [[rule] if rule else [] for rule, *_ in SHOWN]


def test_before_init(tmp_path: Path) -> None:
    """What comes before INIT is shown where the port is said to be rtunnel's, and which rule it breaks: DATA and
    CLOSE_CONN are dropped [O-5]. Until INIT the client is who has the higher port. The judge finds the same."""
    file = tmp_path / "before.pcap"
    said = [(CLIENT, data(1, 5)), (CLIENT, frame(CLOSE_CONN, 0)), *BEFORE["INIT"], (CLIENT, frame(PING, 0, bytes(8)))]
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        listener, near = sorted((first, second), key=lambda each: each.getsockname()[1])
        port = listener.getsockname()[1]
        listener.listen()
        with Capture(file, port):
            near.connect(listener.getsockname())
            with listener.accept()[0] as far:
                exchange(near, far, said)
    lines = tshark(file, "-d", f"tcp.port=={port},rtunnel", "-Y", "rtunnel", "-T", "fields", "-e", "rtunnel.type",
                   "-e", "rtunnel.broken").splitlines()  # fmt: skip
    wanted = [["DATA", "O-1"], ["CLOSE_CONN", "O-1"], ["INIT", ""], ["PING", "N-2"]]
    assert [line.split("\t") for line in lines] == wanted
    (recording,) = judge.read(file)
    found = {each.index: each.broken.rule for each in judge.judge(recording.frames).findings}
    assert [[KINDS[each.kind].name, found.get(at, "")] for at, each in enumerate(recording.frames, 1)] == wanted


def test_what_is_shown(tmp_path: Path) -> None:
    """The lines of INIT and WELCOME, the visitor, the reason, the credit: each field has its name."""
    file = tmp_path / "fields.pcap"
    with socket.create_server(("127.0.0.1", 0)) as listener, Capture(file, listener.getsockname()[1]):
        said = [
            *BEFORE["level 1, stream 1"],
            (CLIENT, data(1, 5) + frame(6, 1, b"\0\0\x80\0") + frame(EOF, 1) + frame(3, 1, b"refused")),
            (SERVER, frame(PING, 0, b"12345678") + frame(0x63, 7, b"what") + frame(10, 0, b"stopping")),
        ]
        converse(listener, said)
        asked = (CLIENT, frame(INIT, 0, HELLO + b"\ntakeover=no"))
        converse(listener, [asked, (SERVER, frame(WELCOME, 0, b"error=port-in-use\nmessage=it is taken"))])
    shown = tshark(file, "-V")
    for line in (
        "Type: INIT", "Public port: 8080", "Local service: 127.0.0.1:80", "Version: 1", "Window: 65536",
        f"Instance: {'ab' * 16}", "Public port: 4711", "Visitor: 203.0.113.7:51234", "Data: 7878787878",
        "More bytes: 32768", "Reason: refused", "Bytes to echo: 3132333435363738", "Type: unknown 0x63",
        "Reason: stopping", "Takeover: no", "Error: port-in-use", "Message: it is taken", "Level: 1",
    ):  # fmt: skip
        assert line in shown, f"{line!r} is not in\n{shown}"


def test_any_segments(tmp_path: Path) -> None:
    """Frames that are cut anywhere, and many in one segment, are shown as the same frames."""
    file = tmp_path / "cut.pcap"
    raw = data(1, 3000) + frame(EOF, 1)
    cuts = [(CLIENT, raw[at : at + 7]) for at in range(0, 70, 7)] + [(CLIENT, raw[70:])]
    with socket.create_server(("127.0.0.1", 0)) as listener, Capture(file, listener.getsockname()[1]):
        converse(listener, [*BEFORE["level 1, stream 1"], *cuts])
    (rows,) = frames(file).values()
    assert [row[:3] for row in rows][3:] == [("DATA", "1", "3000"), ("EOF", "1", "0")]
