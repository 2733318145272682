"""Configuration and log: what each setting is, where it comes from, and what a line looks like."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Factory
from hypothesis import given
from hypothesis import strategies as st
from naive_peer import CLOSE_CONN, NEW_CONN, NaivePeer
from support import ROOT, connect, echo_service, eventually, free_port, parse_line, reset
from tunnels import closed_port, open_tunnel, text, visit

import rtunnel

LINE = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) [a-z]+(-[a-z]+)*"
    r'( [a-z_0-9]+=([!#-<>-\[\]-~]+|"([ !#-\[\]-~]|\\["\\/bfnrt]|\\u[0-9a-f]{4})*"))*'
)
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No setting comes from the environment, no program runs in this process, and all is left as it was."""
    monkeypatch.setattr(rtunnel, "run", lambda make: make() and 99)
    monkeypatch.setattr(rtunnel, "stay_on_cpu", lambda *_: None)  # the tests use them all
    for name in [name for name in os.environ if name.startswith("RTUNNEL_")]:
        monkeypatch.delenv(name)
    log = rtunnel.LOG
    before = log.level, log.handlers[:], log.propagate, logging.raiseExceptions
    stack = threading.stack_size()
    yield
    threading.stack_size(stack)
    log.level, log.handlers[:], log.propagate, logging.raiseExceptions = before


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = rtunnel.main(arguments)
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return run


class Ran(Exception):
    """Raised in place of running."""


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, command: Command) -> Callable[..., dict[str, Any]]:
    """What a server or a client would be made of."""
    found: dict[str, Any] = {}

    def note(*arguments: Any) -> None:
        found["made"] = arguments
        raise Ran

    def note_log(level: str) -> SimpleNamespace:
        found["level"] = level
        return SimpleNamespace(finish=lambda: None)

    monkeypatch.setattr(rtunnel, "Server", note)
    monkeypatch.setattr(rtunnel, "Client", note)
    monkeypatch.setattr(rtunnel, "LogHandler", note_log)
    monkeypatch.setattr(rtunnel, "raise_descriptor_limit", lambda: None)

    def run(*arguments: str) -> dict[str, Any]:
        found.clear()
        with pytest.raises(Ran):
            command(*arguments)
        return found

    return run


def write(folder: Path, *lines: str) -> str:
    """A configuration file of these lines."""
    file = folder / "some.ini"
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


CLIENT = ("client", "--server", "192.0.2.1:7000", "--local", "127.0.0.1:80")


# --- where settings come from -------------------------------------------------------------------------------


def test_flags_win_over_environment_over_file(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A flag wins over the environment, the environment over the file, the file over the default."""
    file = write(tmp_path, "log-level = debug")
    assert settings("server")["level"] == "info"
    assert settings("server", "-c", file)["level"] == "debug"
    monkeypatch.setenv("RTUNNEL_LOG_LEVEL", "warning")
    assert settings("server", "-c", file)["level"] == "warning"
    assert settings("server", "-c", file, "--log-level", "error")["level"] == "error"


MAPPINGS = [
    rtunnel.Mapping(8080, rtunnel.Address("127.0.0.1", 80), rtunnel.Address("192.0.2.1", 7000)),
    rtunnel.Mapping(0, rtunnel.Address("::1", 22), rtunnel.Address("192.0.2.1", 7000)),
]


@pytest.mark.parametrize("source", ["flags", "environment", "file"])
def test_lists(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    """Several mappings are a repeated flag, or a list in the environment or in the file."""
    flags = ["client", "--server", "192.0.2.1:7000"]
    if source == "flags":
        flags += ["--forward", "8080:127.0.0.1:80", "--forward", "0:[::1]:22"]
    elif source == "environment":
        monkeypatch.setenv("RTUNNEL_FORWARD", "[8080:127.0.0.1:80, 0:[::1]:22]")
    else:
        flags += ["-c", write(tmp_path, "forward = [8080:127.0.0.1:80, 0:[::1]:22]")]
    assert settings(*flags)["made"][0] == MAPPINGS


def test_one_mapping_in_a_file_needs_no_list(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """A single mapping may be written without brackets."""
    file = write(tmp_path, "server = 192.0.2.1:7000", "forward = 8080:127.0.0.1:80")
    assert settings("client", "-c", file)["made"][0] == MAPPINGS[:1]


def test_a_home_in_a_files_name(
    settings: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`~` is the home in whatever names a file, also where no shell expands it: behind a `=`, and in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    write(tmp_path, "tls-cert = ~/a.crt", "tls-crl = ~/crl.pem")
    asked = settings("server", "-c", "~/some.ini", "--tls-key=~/a.key", "--tls-ca=~/ca.crt")["made"][0]
    names = [asked.tls_cert, asked.tls_key, asked.tls_ca, asked.tls_crl]
    assert [Path(name) for name in names] == [tmp_path / name for name in ("a.crt", "a.key", "ca.crt", "crl.pem")]


def test_local_and_remote_port_are_one_mapping(settings: Callable[..., dict[str, Any]]) -> None:
    """--local is one mapping, to remote port 0 where --remote-port says no other."""
    assert settings(*CLIENT)["made"][0] == [
        rtunnel.Mapping(0, rtunnel.Address("127.0.0.1", 80), rtunnel.Address("192.0.2.1", 7000))
    ]
    assert settings(*CLIENT, "--remote-port", "8080")["made"][0] == MAPPINGS[:1]


def test_print_config(command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """--print-config shows each effective setting under where it comes from, and exits with 0."""
    file = write(tmp_path, "public-bind = 127.0.0.1", "log-level = debug", "control-listen = :1")
    monkeypatch.setenv("RTUNNEL_LOG_LEVEL", "warning")
    status, out, err = command("server", "-c", file, "--control-listen", ":2", "--print-config")
    assert (status, err) == (0, "")
    sections = re.split(r"^(\S.*?):", out, flags=re.MULTILINE)[1:]
    found = dict(zip(sections[::2], sections[1::2], strict=True))
    assert "--control-listen :2" in found["Command Line Args"]
    assert re.search(r"RTUNNEL_LOG_LEVEL:\s+warning", found["Environment Variables"])
    assert re.search(r"public-bind:\s+127\.0\.0\.1\s*\Z", found[f"Config File ({file})"])
    assert re.search(r"--public-listen:", found["Defaults"])
    assert ":1" not in out
    assert "debug" not in out


GOOD = {
    "192.0.2.1:80": ("192.0.2.1", 80),
    "example.com:1": ("example.com", 1),
    "example.com.:65535": ("example.com.", 65535),
    "[2001:db8::1]:80": ("2001:db8::1", 80),
    "[fe80::1%eth0]:80": ("fe80::1%eth0", 80),
}


@pytest.mark.parametrize("text", GOOD)
def test_addresses(text: str) -> None:
    """Names, IPv4 and bracketed IPv6 are addresses, and are shown as they are written, but for a zone."""
    address = rtunnel.Address.parse(text)
    assert address == GOOD[text]
    assert str(address) == text.replace("%eth0", "")
    assert rtunnel.Address.parse(text, listen=True) == address


def test_listening_addresses() -> None:
    """A listening address may leave the host away, and may ask for any free port; IPv4-mapped is shown as IPv4."""
    assert rtunnel.Address.parse(":7000", listen=True) == ("", 7000)
    assert rtunnel.Address.parse("[::]:0", listen=True) == ("::", 0)
    assert str(rtunnel.Address("::ffff:192.0.2.1", 80)) == "192.0.2.1:80"
    assert str(rtunnel.Address("", 80)) == ":80"


# --- wrong settings -----------------------------------------------------------------------------------------

ADDRESSES = [
    "nowhere",
    "a b:1",
    "a..b:1",
    "a:b:1",
    "[::1]",
    "[zz]:1",
    "::1:1",
    "h:",
    "h:x",
    "h:-1",
    "h:65536",
    "ü:1",
    "*:1",
    "9400",
]
WRONG = [
    *[("server", "--control-listen", address) for address in (*ADDRESSES, "", ":abc:1", ":", "[]:1")],
    *[("server", "--public-listen", address) for address in ADDRESSES],
    *[("client", "--local", "h:1", "--server", address) for address in (*ADDRESSES, "", ":1", "h:0")],
    *[("client", "--server", "h:1", "--local", address) for address in (*ADDRESSES, "", ":1", "h:0")],
    *[(*CLIENT, "--remote-port", port) for port in ("65536", "-1", "x", "", "1.5", "999999999999", "٣")],
    *[("client", "--server", "h:1", "--forward", mapping) for mapping in ("", "80", "80:h", "x:h:1", "65536:h:1")],
    *[(*CLIENT, "--reconnect-max", time) for time in ("0", "-1", "x", "", "nan", "inf", "1e9", "9" * 400)],
    *[(*CLIENT, "--log-level", level) for level in ("loud", "", "INFO ")],
    ("client", "--local", "h:1"),
    ("client", "--server", "h:1"),
    (*CLIENT, "--forward", "1:h:1"),
    ("client", "--server", "h:1", "--forward", "1:h:1", "--remote-port", "2"),
    ("server", "--public-bind", "a b"),
    ("server", "--public-bind", "localhost"),
    ("server", "--cpu", "first"),
    ("server", "--log-lev", "info"),
    ("server", "--no-such-flag"),
    ("server", "extra"),
    ("server", "-c", "no-such-file.ini"),
    ("server", "-c", "."),
    ("neither",),
    (),
    ("client", "--server", "h:1", "--local", "a" * 64 + ":80"),
    ("client", "--server", "h:1", "--local", "a" * 60 + " :80"),
    ("server", "--control-listen", "\x1b[2J:1"),
    ("server", "\x1b[2J"),
    ("server", "--log-level", "a\nb"),
    ("server", "-c", ""),
    ("server", "--config="),
    ("server", "--heartbeat", "1000000"),
    ("server", "--heartbeat", "0.0"),
    ("server", "--drain", "1000000"),
    ("server", "--allow", "alice=8080, bob=9090"),
    ("server", "--tls-profile", "classic"),
    ("client", "--server", "h:1", "--local", "h:2", "--tls", "--tls-server-name", "a..b"),
    ("client", "--server", "a/b:1", "--local", "h:2", "--tls"),
]


def shown(arguments: tuple[str, ...]) -> str:
    """A test's name."""
    return " ".join(arguments).encode("unicode-escape").decode()[:70]


@pytest.mark.parametrize("arguments", WRONG, ids=shown)
def test_wrong_usage(command: Command, arguments: tuple[str, ...]) -> None:
    """A bad address, port, time or level, or a wrong combination, is one printable sentence on standard error and
    status 2."""
    status, out, err = command(*arguments)
    assert (status, out) == (2, "")
    assert re.fullmatch(r"rtunnel[^\n]*: [^\n]+\n", err)
    assert err[:-1].isprintable()


FILES = {
    b"colour = red\n": "colour",
    b"log_level = debug\n": "log_level",
    b"remote-port = 80\n": "remote-port",  # the client's
    b"print-config = true\n": "print-config",
    b"log-level = loud\n": "loud",
    b"tls-profile = classic\n": "'classic' is no profile: write default, hybrid, pure, cnsa2",
    b"log-level\n": "log-level",
    b"log-level = [info, debug]\n": "log-level",
    b"tls = [true]\n": "tls takes one value",
    b"public-bind = [::1]\n": "public-bind takes one value, without []",
    b"allow = []\n": "allow takes a list that is not empty",
    b"control-listen = nowhere\n": "nowhere",
    b"tls-crl = # none\n": "tls-crl would be a comment",
    b"public-listen: ; none\n": "public-listen would be a comment",
    b"\x1b[2J = 1\n": "unknown",
    b"\xff\xfe\x00\n": "",
}


@pytest.mark.parametrize("content", FILES, ids=lambda content: content.decode("latin-1").strip())
def test_wrong_files(command: Command, tmp_path: Path, content: bytes) -> None:
    """A file with an unknown key, a bad value or no text is one printable sentence that says what, and status 2."""
    file = tmp_path / "some.ini"
    file.write_bytes(content)
    status, out, err = command("server", "-c", str(file))
    assert (status, out) == (2, "")
    assert re.fullmatch(r"rtunnel[^\n]*: [^\n]+\n", err)
    assert err[:-1].isprintable()
    assert FILES[content] in err
    if "unknown" in err:
        assert str(file) in err


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="no /dev/fd")
def test_a_file_that_is_a_pipe(command: Command) -> None:
    """What a pipe says can be read once, and so would be lost at the first reload: it is refused."""
    reading, writing = os.pipe()
    os.write(writing, b"tls-crl = crl.pem\n")
    os.close(writing)
    status, out, err = command("server", "-c", f"/dev/fd/{reading}")
    os.close(reading)
    assert (status, out) == (2, "")
    assert f"/dev/fd/{reading}: this is no file" in err


def test_a_drain_of_nothing(settings: Callable[..., dict[str, Any]]) -> None:
    """Nought is no drain, however it is written."""
    for text_ in ("0", "0.0", "000"):
        assert settings("server", "--drain", text_)["made"][0].drain == 0.0


def test_systems_without_descriptor_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no such limit to raise, nothing is raised."""
    monkeypatch.setitem(sys.modules, "resource", None)
    rtunnel.raise_descriptor_limit()


@pytest.mark.parametrize(("most", "soft"), [(245_760, 65_536), (30_000, 10_240), (2**63, 2**63 - 1)])
def test_an_unlimited_hard_limit(monkeypatch: pytest.MonkeyPatch, most: int, soft: int) -> None:
    """Where the hard limit is "unlimited", and the kernel refuses that and what it has not (macOS), more than the 256
    descriptors of a login are had all the same, and the hard limit stays."""
    resource = pytest.importorskip("resource")
    unlimited = 2**63 - 1
    limits = (256, unlimited)

    def set_limits(_: int, wanted: tuple[int, int]) -> None:
        nonlocal limits
        if wanted[0] > most:
            raise ValueError("current limit exceeds maximum limit")
        limits = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(resource, "setrlimit", set_limits)
    rtunnel.raise_descriptor_limit()
    assert limits == (soft, unlimited)


def test_no_traceback_from_the_program_itself() -> None:
    """The real command says the same: one sentence, status 2."""
    ended = subprocess.run(
        [sys.executable, "rtunnel.py", "client", "--server", "h:99999"], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1


def ended(*arguments: str, before: str = "", **options: Any) -> tuple[int, str]:
    """The real command in a process of its own: status, standard error."""
    shell = f'{before} exec "$0" "$@"'
    command = ["sh", "-c", shell, sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=30, **options)
    return done.returncode, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there is no sh")
def test_standard_output_that_is_none() -> None:
    """Closed, full, or of another alphabet: no traceback, and where something was lost, a sentence and status 1."""
    example = ("rtunnel.py", "server", "--example-config")
    assert ended("rtunnel.py", "pki", "show", "--dir", "/nowhere", before="exec >&-;")[0] == 2
    assert ended(*example, before="exec >&-;") == (0, "")
    if os.path.exists("/dev/full"):
        assert ended(*example, before="exec >/dev/full;") == (1, "rtunnel: No space left on device\n")
    latin = {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = ("rtunnel.py", "server", "--tls-cert=\u00e9.crt", "--print-config")
    assert ended(*arguments, env=latin, stdout=subprocess.DEVNULL) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty")
def test_a_terminal_that_has_gone(tmp_path: Path) -> None:
    """Whose window is closed stops by a signal as ever, with status 0."""
    import pty

    log = tmp_path / "log"
    own, theirs = pty.openpty()
    command = [sys.executable, "rtunnel.py", "server", "--control-listen=127.0.0.1:0"]
    with log.open("w") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=stderr)
    os.close(theirs)
    eventually(lambda: "listening" in log.read_text())
    os.close(own)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0


@pytest.mark.parametrize("name", ["RTUNNEL_PRINT_CONFIG", "RTUNNEL_EXAMPLE_CONFIG"])
def test_what_is_shown_is_asked_for_by_a_flag(command: Command, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A variable that would make a service print something, and end, is refused as any that no option has."""
    monkeypatch.setenv(name, "true")
    status, out, err = command("server")
    assert (status, out) == (2, "")
    assert name in err


def test_what_is_asked_for_is_shown(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else the environment has: a variable that no option has is refused by what runs."""
    monkeypatch.setenv("RTUNNEL_ELSEWHERE", "true")
    for flag in ("--print-config", "--example-config"):
        status, out, err = command("server", flag)
        assert (status, err) == (0, "")
        assert "control-listen" in out
    status, out, err = command("server")
    assert (status, out) == (2, "")
    assert "RTUNNEL_ELSEWHERE" in err


@pytest.mark.skipif(sys.platform == "win32", reason="there is no sh")
def test_packages_that_are_missing() -> None:
    """Outside its environment the program says what it needs."""
    status, said = ended("-S", "-E", "rtunnel.py", "--version")
    assert status == 1
    assert re.fullmatch(r"rtunnel: No module named '\w+'; install it by [^\n]+\n", said)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no sh")
def test_a_start_without_threads() -> None:
    """Where the system has no thread for the log or the clock, that is one sentence, and status 1."""
    full = "import sys, threading\ndef start(self): raise RuntimeError('no thread')\nthreading.Thread.start = start\n"
    begin = "sys.argv = ['rtunnel', 'server', '--control-listen=127.0.0.1:0']\nimport rtunnel\nrtunnel.entry()"
    assert ended("-c", full + begin) == (1, "rtunnel: no thread\n")


# --- what the program says of itself ------------------------------------------------------------------------


def test_version(command: Command) -> None:
    """--version names the program and its version."""
    assert command("--version") == (0, f"rtunnel {rtunnel.__version__}\n", "")


@pytest.mark.parametrize("name", ["server", "client"])
def test_help(command: Command, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """--help shows all options in their groups, each with its default, and how the environment names them."""
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = command(name, "--help")
    assert status == 0
    for option in rtunnel.OPTIONS[name]:
        assert f"\n{option.group}:\n" in out
        block = out[out.index(f"\n  --{option.name}") + 1 :]
        assert f"(default: {option.default})" in re.split(r"\n  -|\n\n", block)[0]
    assert "RTUNNEL_" in out


@pytest.mark.parametrize("name", ["server", "client"])
def test_conf_files_are_printed(command: Command, name: str) -> None:
    """conf/NAME.ini is what `--example-config` prints."""
    assert command(name, "--example-config") == (0, (ROOT / "conf" / f"{name}.ini").read_text(), "")


@pytest.mark.parametrize("name", ["server", "client"])
def test_conf_files_and_options(command: Command, tmp_path: Path, name: str) -> None:
    """conf/NAME.ini has each option once, and a comment before it; those commented out show the default; it is
    accepted as it is, and with each commented line alone made active."""
    shipped = ROOT / "conf" / f"{name}.ini"
    lines = shipped.read_text().splitlines()
    keys: dict[str, tuple[str, bool]] = {}
    for before, line in zip(["", *lines], lines, strict=False):
        found = re.fullmatch(r"(# )?([a-z-]+) =(?: (.*))?", line)
        if found:
            assert found[2] not in keys, f"{found[2]} stands there twice"
            keys[found[2]] = (found[3] or "", bool(found[1]))
            assert before.startswith("#") or re.match(r"[a-z-]+ =", before), f"no comment before {line}"
    options = {option.name: option for option in rtunnel.OPTIONS[name]}
    assert list(keys) == list(options), "each option, in the order of --help"
    for key, (value, commented) in keys.items():
        if commented and options[key].action != "append":
            assert value in (str(options[key].default), str(options[key].default).lower()), key
    assert command(name, "-c", str(shipped), "--print-config")[0] == 0
    for key, (value, _) in keys.items():
        file = write(tmp_path, f"{key} = {value}")
        status, out, _ = command(name, "-c", file, "--print-config")
        assert status == 0
        assert file in out


# --- the log ------------------------------------------------------------------------------------------------

NASTY = [
    b"a\r\n2026-01-01T00:00:00.000Z INFO forged",
    b"\x1b[2J\x1b]0;x\x07",
    b"\x00\x7f\x80\xff\x85",
    "\u2028\u2029\u0085\u202e".encode(),
    b'" level=9 "',
    b"x forged=1",
    b"\\",
    b"",
]


def check_lines(lines: list[str]) -> None:
    """Each line has the log's form, and reads back."""
    for line in lines:
        assert LINE.fullmatch(line), line
        assert parse_line(line), line


def test_every_line_has_the_same_form(server: Factory, client: Factory) -> None:
    """UTC time, level, event, key=value pairs: every line of a tunnel's life, at debug level, at both ends."""
    with echo_service() as service, closed_port() as closed:
        tunnel = open_tunnel(server, client, service)
        tunnel.check_echo()
        reset(tunnel.connect())
        other = open_tunnel(lambda *_, **__: tunnel.server, client, closed)
        assert visit(other.public) == "reset"
        with NaivePeer.connect(tunnel.server.control_address) as stranger:
            stranger.send(b"GET / HTTP/1.1\r\n\r\n")
            stranger.expect_end()
        with NaivePeer.connect(tunnel.server.control_address) as late:
            late.send_init(b"%d:h:1" % tunnel.server.control_address[1])  # the server's own, so it cannot be bound
            late.expect_end()
        assert [each.stop() for each in (tunnel.server, tunnel.client, other.client)] == [0, 0, 0]
    for each in (tunnel.server, tunnel.client, other.client):
        check_lines(each.lines)
    events = {record.event for record in tunnel.server.records}
    assert events >= {"listening", "session-opened", "session-closed", "lease-opened", "lease-closed", "lease-failed"}
    assert events >= {"stream-opened", "stream-closed", "refused", "stopping", "stopped"}
    closed_streams = tunnel.server.events("stream-closed")
    assert all({"received", "sent", "seconds", "reason"} <= set(fields) for fields in closed_streams)


def answers(address: tuple[str, int]) -> bool:
    """Whether something listens there."""
    with socket.socket() as sock:
        return sock.connect_ex(address) == 0


def test_the_log_level(program: Factory) -> None:
    """A level hides what is below it."""
    port = free_port()
    quiet = program("server", "--control-listen", f"127.0.0.1:{port}", "--log-level", "error")
    heard = program("server", "--control-listen", "127.0.0.1:0", "--log-level", "info")
    assert heard.control_address
    eventually(lambda: answers(("127.0.0.1", port)))  # it cannot say that it listens
    assert [heard.stop(), quiet.stop()] == [0, 0]
    assert quiet.lines == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_log_that_cannot_be_written() -> None:
    """A log on a full disk stops nothing: the server serves, and stops as asked."""
    address = ("127.0.0.1", free_port())
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(
            [sys.executable, "rtunnel.py", "server", "--control-listen", text(address), "--log-level", "debug"],
            cwd=ROOT,
            stderr=full,
        ) as started,
    ):
        try:
            eventually(lambda: visit(address, b"nonsense" * 9) != "refused")
            assert started.poll() is None
            started.terminate()
            assert started.wait(10) == 0
        finally:
            started.kill()


def test_a_client_cannot_forge_a_line(server: Factory) -> None:
    """Whatever a client puts into INIT or a reason, each event is one line, and control characters are escaped."""
    serving = server()
    for said in NASTY:
        with NaivePeer.connect(serving.control_address) as peer:
            peer.send_init(b"0:" + said)
            with connect(serving.lease_address()):
                peer.expect(NEW_CONN, 1)
                peer.send_frame(CLOSE_CONN, 1, said)
                serving.wait_for("stream-closed")
        serving.wait_for("session-closed")
    for said in (b"x\nforged", b"\x1b[2J", b"99999:\n", b"8080"):
        with NaivePeer.connect(serving.control_address) as peer:
            peer.send_init(said)
            peer.expect_end()
        serving.wait_for("refused")
    assert serving.stop() == 0
    check_lines(serving.lines)
    assert not serving.events("forged")
    assert len(serving.events("session-opened")) == len(NASTY)


def test_a_server_cannot_forge_a_line(client: Factory) -> None:
    """Whatever a server puts into a reason, each event of the client is one line."""
    with echo_service() as service, socket.create_server(("127.0.0.1", 0)) as control:
        control.settimeout(10)
        asking = client("--server", text(control.getsockname()), "--local", service.text)
        with NaivePeer(control.accept()[0]) as peer:
            peer.read_frame()
            for stream, said in enumerate(NASTY, 1):
                peer.send_frame(NEW_CONN, stream, said)
                peer.send_frame(CLOSE_CONN, stream, said)
            asking.wait_for_count(len(NASTY), "stream-closed")
        asking.wait_for("session-closed")
        assert asking.stop() == 0
    check_lines(asking.lines)
    assert len(asking.events("stream-closed")) == len(NASTY)


@given(st.dictionaries(st.text(string.ascii_lowercase, min_size=1), st.text(), max_size=4))
def test_any_value_reads_back(pairs: dict[str, str]) -> None:
    """Any text at all as a value makes one printable ASCII line, from which it can be read again."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"2026-01-01T00:00:00.000Z {record.levelname} {record.getMessage()}")

    handlers, rtunnel.LOG.handlers[:] = rtunnel.LOG.handlers[:], [Keep()]
    propagate, rtunnel.LOG.propagate = rtunnel.LOG.propagate, False
    try:
        rtunnel.log_event(logging.ERROR, "some-event", **pairs)
    finally:
        rtunnel.LOG.handlers[:] = handlers
        rtunnel.LOG.propagate = propagate
    (line,) = lines
    assert line.isascii()
    assert line.isprintable()
    assert LINE.fullmatch(line)
    record = parse_line(line)
    assert record
    assert record.fields == {key: json.loads(json.dumps(value)) for key, value in pairs.items()}
