"""Types what a document says: its ```sh blocks, in order, each into a terminal (bash) of its own.

What a document shows as ```text must then stand in some terminal, line by line; `…` is anything.

What is typed differs from what is written only where it must:
- the ports of PORTS are free ones, a server's default too (by the environment);
- `tunnel.example.org` is `localhost`, and the folders of ELSEWHERE are in the reader's own;
- `sh on=NAME` is typed on another machine, which is a folder. `ssh`, `scp` and `pkill` are scripts
  that reach these folders and the programs that were started here, and nothing else;
- `systemctl` and `journalctl` are scripts that start, signal and restart what a unit says, without
  its restrictions;
- a new terminal says `. .venv/bin/activate` by itself, as README.md asks for;
- pip gets nothing from the network: what it would fetch is there already;
- a program that goes on (`rtunnel server`, say) is waited for until it says that it works, or what
  `sh until=WORD` says. It is stopped with Ctrl+C before the next chapter, or by
  `sh after=Ctrl+C`; a web server goes on until the end;
- `make` says what it would do. What that does, other tests do;
- `sh check` is asked, by `--print-config`, whether its options and files are right;
- `sh fails` must fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import NamedTuple

from support import ROOT, eventually, free_port

PORTS = ("7000", "7001", "8000", "8080", "8081", "8082", "9400")
ELSEWHERE = ("/opt/rtunnel", "/etc/rtunnel", "/etc/systemd/system", "/var/lib/rtunnel", "/srv/authority")
WAIT_S = 60.0  # for a step, an installation on a busy machine included
# What goes on, and what it says once it works.
GOES_ON = {
    r"rtunnel(\.py)? server\b": r" listening kind=control ",
    r"rtunnel(\.py)? client\b": r" session-opened ",
    r"-m http\.server\b": r"Serving HTTP",
    r"\btshark -i\b": r"Capturing on|Capture started",
    r"\brelay\.py\b": r"127\.0\.0\.1:",
    r"python3 count\.py": "counting",
    r"python3 whom\.py": "speaking",
    r"python3 breaks\.py": "waiting",
}
ENDS = re.compile(r"--print-config|--help|--version|--example-config|&\s*$", re.MULTILINE)
DONE = "--- done:"
# Where the tests run in the background Ctrl+C is ignored, and who inherits that cannot be stopped by it.
BASH = "import os, signal; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execvp('bash', ['bash', '--norc'])"

SCRIPTS = {
    "ssh": 'host=$1; shift; mkdir -p "$READER/$host"; cd "$READER/$host"; exec sh -c "$*"',
    "scp": 'for last; do :; done\nwhile [ $# -gt 1 ]; do cp "$1" "$READER/${last%%:*}/${last#*:}/"; shift; done',
    # pkill -SIGNAL -x NAME, by a process's name and its terminal
    "pkill": f"""exec {sys.executable} - "$@" <<'END'
import os, pathlib, signal, sys
terminals = pathlib.Path(os.environ["READER"], "terminals").read_text().split()
for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
    try:
        name, _, rest = stat.read_text().partition("(")[2].rpartition(")")
    except OSError:
        continue
    if name == sys.argv[3] and rest.split()[3] in terminals:
        os.kill(int(stat.parent.name), signal.Signals["SIG" + sys.argv[1][1:]])
END""",
    "systemctl": f"""exec {sys.executable} - "$@" <<'END'
import os, pathlib, re, signal, subprocess, sys, time
home = pathlib.Path(os.environ["READER"])
command, name = sys.argv[1], sys.argv[-1]
if command == "daemon-reload":
    sys.exit()
unit = dict(re.findall(r"^(\\w+)=(.*)$", (home / f"etc/systemd/system/{{name}}.service").read_text(), re.M))
log, service = home / f"{{name}}.log", home / "services" / name
asked = {{"reload": "HUP", "restart": "TERM", "kill": sys.argv[3] if len(sys.argv) > 3 else ""}}.get(command)
seen = log.stat().st_size if log.exists() else 0
if asked:
    os.kill(int(service.read_text()), signal.Signals["SIG" + asked])
if command == "restart":
    while b" stopped " not in log.read_bytes():
        time.sleep(0.01)
says = {{"reload": b" reloaded", "kill": b" state "}}.get(command, b" listening kind=control")
if command in ("enable", "restart"):
    folder = unit["WorkingDirectory"].replace("%S", str(home / "var/lib"))
    with log.open("ab") as file:
        started = subprocess.Popen(unit["ExecStart"].split(), cwd=folder, stdout=file, stderr=file)
    service.parent.mkdir(exist_ok=True)
    service.write_text(str(started.pid))
for _ in range(1000):
    if says in log.read_bytes()[seen:]:
        sys.exit()
    time.sleep(0.01)
sys.exit(f"{{says}} does not come: {{log.read_text()}}")
END""",
    "journalctl": 'tail -n "${!#}" "$READER/$2.log"',
}


class Block(NamedTuple):
    """A fenced block of a document."""

    line: int
    chapters: tuple[str, ...]  # the headings above it, from the second level on
    language: str
    options: dict[str, str]
    text: str


def blocks(document: str) -> list[Block]:
    """Of a Markdown text, in order."""
    found: list[Block] = []
    chapters: tuple[str, ...] = ()
    fence: re.Match[str] | None = None
    for number, line in enumerate(document.splitlines(), 1):
        if fence is None and (heading := re.match(r"(##+) (.*)", line)):
            chapters = (*chapters[: len(heading[1]) - 2], heading[2])
        elif fence is None and (fence := re.match(r"( *)```(\w*) ?(.*)", line)):
            words = [word.partition("=") for word in fence[3].split()]
            found.append(Block(number, chapters, fence[2], {key: value for key, _, value in words}, ""))
        elif fence is not None and line.strip() == "```":
            fence = None
        elif fence is not None:
            found[-1] = found[-1]._replace(text=f"{found[-1].text}{line.removeprefix(fence[1])}\n")
    return found


class Terminal:
    """A bash into which one block is typed.

    Threads: one reads what it shows; the test's thread does all else. `shown` only grows.
    """

    def __init__(self, folder: Path, environment: dict[str, str], typed: str) -> None:
        self.typed, self.shown = typed, ""
        self.process = subprocess.Popen(
            [sys.executable, "-c", BASH], cwd=folder, env=environment, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, name=f"terminal {self.process.pid}")
        self._reader.start()

    def type(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"set -eo pipefail\n{self.typed}\necho '{DONE}' $?\n".encode())
        self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout:
            while part := os.read(self.process.stdout.fileno(), 1 << 16):
                self.shown += part.decode(errors="replace")

    @property
    def goes_on(self) -> str:
        """What the program says once it works that the block ends with; "" where none goes on."""
        if "time.sleep(3600)" in self.typed:
            return "sleeping"
        last = re.sub(r"\\\n", " ", self.typed).rstrip().rpartition("\n")[2]
        if ENDS.search(last):
            return ""
        return next((says for command, says in GOES_ON.items() if re.search(command, last)), "")

    def ends(self, status: int = 0) -> None:
        """Wait for the end, which has this status."""
        self.process.wait(WAIT_S)
        self._reader.join()
        assert self.process.returncode == status, f"status {self.process.returncode} of:\n{self.typed}\n{self.shown}"

    def interrupt(self) -> None:
        """Ctrl+C: the program ends well."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(WAIT_S)
        self._reader.join()
        well = [0] if "rtunnel" in self.typed else [0, -signal.SIGINT, -signal.SIGPIPE]
        status = self.process.returncode
        assert status in well, f"status {status} of:\n{self.typed}\n{self.shown}"

    def close(self) -> None:
        """End it whatever it does."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()


class Reader:
    """A reader with a fresh clone, who types document after document. A context manager."""

    def __init__(self, folder: Path, installed: bool = True) -> None:
        """`installed`: rtunnel is there already; else the document says how to install it."""
        self.folder, self.clone = folder, folder / "clone"
        self.terminals: list[Terminal] = []
        self._ports = {port: str(free_port()) for port in PORTS}
        self._seen = 0  # terminals of earlier chapters
        copy_of_the_sources(self.clone)
        for file in [*(self.clone / "conf").glob("*.ini"), *(self.clone / "conf").glob("*.service")]:
            file.write_text(self.as_here(file.read_text()))
        scripts = dict(SCRIPTS)
        if installed:
            scripts["rtunnel"] = f"import sys\nsys.path.insert(0, {str(self.clone)!r})\nimport rtunnel\nrtunnel.entry()"
        (folder / "bin").mkdir()
        (folder / "etc/systemd/system").mkdir(parents=True)
        for name, text in scripts.items():
            with_what = sys.executable if text.startswith("import ") else "/bin/bash"
            (folder / "bin" / name).write_text(f"#!{with_what}\n{text}\n")
            (folder / "bin" / name).chmod(0o755)
        self._environment = {**environment(folder), "RTUNNEL_CONTROL_LISTEN": f":{self._ports['7000']}"}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.terminals:
            each.close()
        for service in self.folder.glob("services/*"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(service.read_text()), signal.SIGKILL)

    def as_here(self, text: str) -> str:
        """With the ports, hosts and folders of this reader."""
        text = re.sub(r"(?<![\w.])(?:" + "|".join(PORTS) + r")\b", lambda found: self._ports[found[0]], text)
        text = re.sub("|".join(f"{place}\\b" for place in ELSEWHERE), lambda found: f"{self.folder}{found[0]}", text)
        return text.replace("tunnel.example.org", "localhost")

    def read(self, document: str, chapter: str = "") -> None:
        """Do all that it says; of a `chapter` alone, where one is named."""
        before: tuple[str, ...] = ()
        typed = 0
        for block in blocks(document):
            if chapter and chapter not in block.chapters:
                continue
            if block.chapters[:1] != before[:1]:
                self.stop()
            before = block.chapters
            if block.language == "sh":
                self.type(block)
                typed += 1
            elif block.language == "text":
                self.see(block)
        assert typed, f"there is no chapter {chapter!r}, or nothing to type in it"
        self.stop()

    def type(self, block: Block) -> None:
        typed = re.sub(r"^make ", "make -n ", self.as_here(block.text), flags=re.MULTILINE)
        if "check" in block.options:
            typed = re.sub(r"^((?:.*\\\n)*.*[^\\\n])$", r"\1 --print-config", re.sub(r" *#.*", "", typed), flags=re.M)
        if "after" in block.options:
            self.interrupt()
        folder = self.clone
        if machine := block.options.get("on"):
            folder = self.folder / self.as_here(machine)
            folder.mkdir(exist_ok=True)
        activate = self.clone / ".venv/bin/activate"
        if activate.exists():
            typed = f". {activate}\n{typed}"
        terminal = Terminal(folder, {**self._environment, "HOME": str(folder)}, typed)
        self.terminals.append(terminal)
        (self.folder / "terminals").write_text("\n".join(str(each.process.pid) for each in self.terminals))
        terminal.type()
        says = block.options.get("until", "") or terminal.goes_on
        if not says:
            terminal.ends(1 if "fails" in block.options else 0)
            return
        with contextlib.suppress(AssertionError):
            eventually(lambda: re.search(says, terminal.shown) or terminal.process.poll() is not None, WAIT_S)
        assert re.search(says, terminal.shown), f"{says!r} does not come of:\n{typed}\n{self.shown}"

    def see(self, block: Block) -> None:
        """Each line of the block stands in a terminal, or will."""
        for line in filter(None, map(str.strip, self.as_here(block.text).splitlines())):
            pattern = re.compile(".*".join(map(re.escape, re.split(" ?… ?", line))))
            try:
                eventually(lambda: pattern.search(self.shown), WAIT_S)  # noqa: B023
            except AssertionError:
                raise AssertionError(f"line {block.line}: nobody has seen\n{line}\nin\n{self.shown}") from None

    @property
    def shown(self) -> str:
        """What this chapter's terminals show."""
        return "\n".join(each.shown for each in self.terminals[self._seen :])

    def interrupt(self) -> None:
        """Ctrl+C, last started first. A web server goes on."""
        for each in reversed(self.terminals):
            if "http.server" not in each.typed and each.process.poll() is None:
                if "tshark -i" in each.typed:
                    self._knock(each)
                each.interrupt()

    def _knock(self, capture: Terminal) -> None:
        """What is captured comes in order: once it shows this last connection, it has all before."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            sock.connect_ex(("127.0.0.1", int(self._ports["7000"])))
            port = str(sock.getsockname()[1])
        eventually(lambda: port in capture.shown, WAIT_S, f"tshark shows port {port}")

    def stop(self) -> None:
        """The end of a chapter."""
        self.interrupt()
        self._seen = len(self.terminals)

    def give_up(self) -> None:
        """After a failure: end all but a web server, whatever it does."""
        for each in self.terminals:
            if "http.server" not in each.typed:
                each.close()


def copy_of_the_sources(target: Path) -> None:
    """What a clone has, or an unpacked sdist: nothing that was made here."""
    if not (ROOT / ".git").exists():
        made = shutil.ignore_patterns(".[!cg]*", "build", "dist", "*.egg-info", "__pycache__", "pki", "target")
        shutil.copytree(ROOT, target, ignore=made)
        return
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def environment(folder: Path) -> dict[str, str]:
    """A reader's: `folder`/bin goes first; pip finds what rtunnel requires, and rtunnel itself is not there."""
    packages = folder / "packages"
    packages.mkdir()
    for each in Path(sysconfig.get_path("purelib")).iterdir():
        if not re.match(r"rtunnel|__editable__|pip\b|.*\.pth$", each.name):
            (packages / each.name).symlink_to(each)
    ours = re.compile("RTUNNEL_|PYTHON|PIP_|VIRTUAL|MAKE|MFLAGS|VENV")  # of the tests' own environment, and of make
    kept = {name: value for name, value in os.environ.items() if not ours.match(name)}
    return {
        **kept,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "READER": str(folder),
        "CLONE": str(folder / "clone"),
        "HOME": str(folder),
        "PYTHONPATH": str(packages),
        "PYTHONUNBUFFERED": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_COMPILE": "1",  # which takes as long as all else
        "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as the option's opposite: there is none
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "no_proxy": "*",
    }
