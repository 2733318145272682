"""Whatever bytes come, each parser answers, or refuses with an error of its own; and what it answers holds.

`python tests/long/fuzz.py --seconds 600` runs a coverage-guided fuzzer (atheris, the `fuzz` extra) on each of
TARGETS for its share of the time, from the corpus in tests/corpus/. test_fuzz.py runs the same targets on
hypothesis's bytes.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from longrun import main, require

import rtunnel
from rtunnel import Address, ConfigError, Decoder, Frame, Init, ProtocolError, Refused, Welcome

CORPUS = Path(__file__).resolve().parents[1] / "corpus"


def text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def decoded(pieces: list[bytes]) -> tuple[list[Frame], str]:
    """All frames, DATA joined again, and the error that ended it."""
    decoder, frames, data = Decoder(), list[Frame](), bytearray()
    try:
        for piece in pieces:
            for event in decoder.feed(piece):
                if isinstance(event, Frame):
                    if event.type in rtunnel.KNOWN:
                        frames.append(event)
                    continue
                data += event.part
                if not event.remaining:
                    frames.append(Frame(rtunnel.DATA, event.stream, bytes(data)))
                    data.clear()
    except ProtocolError as error:
        return frames, str(error)
    return frames, ""


def decoder(raw: bytes) -> None:
    """Any split gives the same frames and the same error; what is known encodes to the bytes that came."""
    cut = raw[0] if raw else 0
    whole = decoded([raw])
    assert decoded([raw[:cut], raw[cut:]]) == whole
    assert decoded([raw[at : at + 1] for at in range(len(raw))]) == whole
    for frame in whole[0]:
        encoded = rtunnel.encode(*frame)
        assert encoded in raw
        for level, role in ((0, "server"), (0, "client"), (1, "server"), (1, "client")):
            try:
                rtunnel.check(frame, level=level, role=role)
            except ProtocolError:
                continue


def init(raw: bytes) -> None:
    """An INIT that is taken asks for a port that there is, by an instance of 128 bits at level 1."""
    try:
        asked = Init.parse(raw)
    except (ProtocolError, Refused):
        return
    assert 0 <= asked.port <= 65535
    assert asked.version == 0 or re.fullmatch("[0-9a-f]{32}", asked.instance)
    assert 1 <= asked.window <= rtunnel.MAX_CREDIT_BYTES
    if asked.local.isascii():
        again = Init.parse(asked.payload())
        assert (again.port, again.local, again.version) == (asked.port, asked.local, asked.version)


def welcome(raw: bytes) -> None:
    """A WELCOME that is taken reads back from what it says; a refusal's sentence is bounded."""
    refused = None
    try:
        got = Welcome.parse(raw)
        assert Welcome.parse(got.payload()) == got
    except Refused as refusal:
        refused = refusal
    except ProtocolError:
        return
    assert refused is None or len(refused.message) <= rtunnel.MAX_MESSAGE_CHARACTERS


def address(raw: bytes) -> None:
    """An address that is taken reads back from how it is shown."""
    for listen in (False, True):
        try:
            parsed = Address.parse(text(raw), listen=listen)
        except ConfigError:
            continue
        assert 0 <= parsed.port <= 65535
        assert Address.parse(str(parsed), listen=True).port == parsed.port
        assert rtunnel.quoted(parsed).isascii()


def rules(raw: bytes) -> None:
    """A rule that is taken allows its identity its ports, and nobody else any."""
    try:
        name, ports = rtunnel.PortRules.parse(text(raw))
        asked = rtunnel.PortRules([(name, ports)])
    except ConfigError:
        return
    allowed = {port for span in ports for port in (span[0], span[-1])}
    assert all(asked.allow(name, port) for port in allowed)
    assert allowed <= set(range(65536))
    assert name == "*" or not any(asked.allow(name + "x", port) for port in allowed)


def networks(raw: bytes) -> None:
    """A list of networks that is taken admits their addresses."""
    try:
        asked = rtunnel.parse_networks(text(raw))
    except ConfigError:
        return
    server = rtunnel.Server(rtunnel.Settings(visitors=asked), None)
    for network in asked:
        if "%" not in str(network) and getattr(network[0], "ipv4_mapped", None) is None:
            assert server.admit_visitor(Address(str(network[0]), 1))


def http_proxy(raw: bytes) -> None:
    """Whatever an HTTP proxy answers, the server's bytes are all there behind its header, or it is refused by name."""
    near, far = socket.socketpair()
    with near, far, mock.patch("rtunnel.dial", return_value=near):
        far.sendall(raw)
        far.shutdown(socket.SHUT_WR)
        refused = None
        try:
            rtunnel.HttpProxy(Address("h", 1), b"").dial(Address("s", 1), 5.0)
            rest = b"".join(iter(lambda: near.recv(4096), b""))
        except OSError as error:
            refused = rtunnel.reason_of(error)
    assert refused is None or refused.startswith("proxy h:1: ")
    if refused is None and rest:  # else the proxy has closed, perhaps in its header
        assert raw.endswith(rest)
        assert re.search(rb"\n\r?\n$", raw.removesuffix(rest))


def proxy(raw: bytes) -> None:
    """What NEW_CONN says of a visitor is an address or refused, and makes a PROXY line of at most 107 bytes."""
    try:
        visitor = rtunnel.parse_visitor(raw)
    except ProtocolError:
        return
    for host in ("203.0.113.1", "2001:db8::1"):
        line = rtunnel.proxy_line(visitor, Address(host, 8080))
        family, *hosts = re.fullmatch(rb"PROXY TCP([46]) (\S+) (\S+) [0-9]{1,5} 8080\r\n", line).groups()  # type: ignore[union-attr]
        assert len(line) <= 107
        assert {ipaddress.ip_address(each.decode()).version for each in hosts} == {int(family)}


def log(raw: bytes) -> None:
    """Whatever is logged is one word of printable ASCII, from which the value reads back."""
    value = text(raw)
    shown = rtunnel.quoted(value)
    assert re.fullmatch(r"[ -~]+", shown)
    assert (json.loads(shown) if shown.startswith('"') else shown) == value


TARGETS: dict[str, Callable[[bytes], None]] = {
    each.__name__: each for each in (decoder, init, welcome, address, rules, networks, http_proxy, proxy, log)
}


def fuzz(seconds: float) -> None:
    """Each target in a process of its own; its findings stop the run, and show the bytes."""
    share = max(1, round(seconds / len(TARGETS)))
    for name in TARGETS:
        with tempfile.TemporaryDirectory() as found:
            limits = [f"-max_total_time={share}", "-max_len=600", "-print_final_stats=1", f"-artifact_prefix={found}/"]
            command = [sys.executable, __file__, "--target", name, *limits, found, str(CORPUS / name)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            runs = re.search(r"number_of_executed_units: *([0-9]+)", done.stdout)
            if done.returncode or runs is None:
                print(done.stdout[-4000:])
                findings = {each.name: each.read_bytes() for each in Path(found).glob("crash-*")}
                require(False, f"{name}: status {done.returncode}, {findings}")
            else:
                print(f"{name}: {runs[1]} executions in {share} s, no finding", flush=True)


def target(name: str, arguments: list[str]) -> None:
    """One target, under the fuzzer, which ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("the fuzzer is not installed: pip install -e .[fuzz]")
    for each in (rtunnel.Decoder, rtunnel.Init, rtunnel.Welcome, rtunnel.Address, rtunnel.PortRules, rtunnel.Server):
        instrument(each, atheris.instrument_func)
    instrument(rtunnel, atheris.instrument_func)
    atheris.Setup([sys.argv[0], *arguments], TARGETS[name])
    atheris.Fuzz()


def instrument(owner: Any, instrument_func: Callable[[Any], Any]) -> None:
    """Make the fuzzer see which branches are taken: in each function of a class, or of the module."""
    for key, value in list(vars(owner).items()):
        inner = getattr(value, "__func__", value)
        if getattr(inner, "__module__", "") == "rtunnel" and hasattr(inner, "__code__"):
            instrumented = instrument_func(inner)
            setattr(owner, key, instrumented if inner is value else type(value)(instrumented))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--target"]:
        target(sys.argv[2], sys.argv[3:])
    else:
        main(fuzz, 600.0)
