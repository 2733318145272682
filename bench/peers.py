"""What the bench compares: no tunnel, rtunnel, `ssh -R` through an sshd of its own, and other programs (NOTES.md says
how to install them).

Each measurement gets processes of its own, on free ports of 127.0.0.1; whatever is started here is ended here.
"""

from __future__ import annotations

import atexit
import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
READY_S = 20.0  # for a program to listen, or a tunnel to answer
STOP_S = 5.0  # for a program to end when it is asked
TICKS = os.sysconf("SC_CLK_TCK")
MODULES = ("rtunnel.py", "rtunnel_tls.py")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rtunnel-bench"
PROGRAMS = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin", str(CACHE / "cargo/bin")])
BORE_PORT = 7835  # its server's, which cannot be set


class Failed(Exception):
    """Something did not start or did not end as it should; the message says what."""


def eventually(condition: Callable[[], object], what: str, seconds: float = READY_S) -> None:
    """Poll until it holds. Raises Failed."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server((HOST, 0)) as sock:
        return int(sock.getsockname()[1])


def is_listening(port: int) -> bool:
    """Without connecting, which would count as a visitor."""
    tables = [Path(f"/proc/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6")]
    ends = [line.split()[1:4:2] for table in tables for line in table]
    return any(state == "0A" and int(local.rpartition(":")[2], 16) == port for local, state in ends)


class Processes:
    """The programs of one tunnel; a context manager whose end ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def start(self, arguments: Sequence[object], *, is_read: bool = False) -> subprocess.Popen[str]:
        """Start it. What it writes goes to a file, but its stdout where that is read: an unread pipe would stop it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RTUNNEL_")}
        environment["RUST_LOG"] = "warn"  # rathole and bore would write lines for each visitor
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                [str(word) for word in arguments], cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if is_read else log, stderr=log,
            )  # fmt: skip
        self.started.append(process)
        return process

    def pids(self) -> list[int]:
        """Of all that run, their children too."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = [process.pid for process in self.started if process.poll() is None]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.started):
            process.terminate()
        for process in self.started:
            with process:
                try:
                    process.communicate(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


Relay = Callable[[int], contextlib.AbstractContextManager[int]]  # from a port to the one that leads there


class Tunnel:
    """An open tunnel: its public port, and what its processes use."""

    def __init__(self, port: int, processes: Processes | None) -> None:
        self.port = port
        self.processes = processes

    def cpu_s(self) -> dict[int, float]:
        """Processor seconds so far, by process."""
        used = {}
        for pid in self.processes.pids() if self.processes else []:
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                used[pid] = (int(fields[11]) + int(fields[12])) / TICKS
        return used

    def cpu_s_since(self, before: dict[int, float]) -> float:
        return sum(seconds - before.get(pid, 0) for pid, seconds in self.cpu_s().items())

    def resident_kb(self) -> float:
        total = 0
        for pid in self.processes.pids() if self.processes else []:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        return total


class Peer:
    """One column of the table. `_start` starts both ends; the client is to dial `dialled(control port)`."""

    sockets_per_visitor = 1  # of each end

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str | None:
        """Why it cannot be measured here."""
        return None

    def version(self) -> str | None:
        """Of a program that is not of this repository."""
        return None

    @contextlib.contextmanager
    def open(self, folder: Path, local: int, probe: bytes, relay: Relay | None = None) -> Iterator[Tunnel]:
        """A tunnel to a local port, ready for visitors: it answers `probe`. A relay stands between its ends."""
        place = folder / f"{self.name}-{time.monotonic_ns()}".replace(" ", "-")
        place.mkdir()
        with contextlib.ExitStack() as stack:
            processes = stack.enter_context(Processes(place))

            def dialled(port: int) -> int:
                eventually(lambda: is_listening(port), f"{self.name}'s server does not listen")
                return stack.enter_context(relay(port)) if relay else port

            try:
                port = self._start(processes, local, dialled)
                eventually(lambda: answers(port, probe), f"{self.name} does not answer")
            except (Failed, OSError, ValueError) as error:
                log = (place / "log").read_text() if (place / "log").exists() else ""
                raise Failed(" | ".join([str(error), *log.splitlines()[-3:]])) from error
            yield Tunnel(port, processes)

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        raise NotImplementedError


def answers(port: int, probe: bytes) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), 2) as sock:
        sock.settimeout(2)
        sock.sendall(probe)
        return bool(sock.recv(1))
    return False


class Direct(Peer):
    """No tunnel: what the load and the kernel can do."""

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        return dialled(local)


class Ours(Peer):
    """rtunnel: plain, or over TLS with a profile, and certificates that are made once."""

    def __init__(self, name: str, profile: str, folder: Path, program: Path = ROOT / "rtunnel.py") -> None:
        super().__init__(name)
        self.program = program
        self._profile = profile
        self._pki = folder / f"pki-{profile}"

    def _make_certificates(self) -> None:
        pki = [sys.executable, str(ROOT / "rtunnel.py"), "pki"]
        for words in (
            ["init", "--algorithm", "mldsa87" if self._profile == "cnsa2" else "mldsa65"],
            ["issue", "server", "--server", HOST],
            ["issue", "client", "--client"],
        ):
            subprocess.run([*pki, *words, "--dir", str(self._pki)], check=True, capture_output=True)

    def flags(self, role: str) -> list[object]:
        """The TLS flags of one end."""
        if self._profile == "plain":
            return []
        if not self._pki.exists():
            self._make_certificates()
        files = {"cert": f"{role}.crt", "key": f"{role}.key", "ca": "ca.crt"}
        paths = [word for key, file in files.items() for word in (f"--tls-{key}", self._pki / file)]
        return ["--tls", "--tls-profile", self._profile, *paths]

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        control, public = free_port(), free_port()
        server = ["--control-listen", f"{HOST}:{control}", "--public-bind", HOST]
        processes.start([sys.executable, self.program, "server", *server, *self.flags("server")])
        client = ["--server", f"{HOST}:{dialled(control)}", "--local", f"{HOST}:{local}", "--remote-port", public]
        processes.start([sys.executable, self.program, "client", *client, *self.flags("client")])
        return public


def other_version(what: str, folder: Path) -> Path:
    """The program of `--also`: a file, a folder that holds both modules, or a git revision, which is unpacked."""
    path = Path(what)
    if not path.exists():
        path = Path(tempfile.mkdtemp(dir=folder))
        for module in MODULES:
            shown = subprocess.run(["git", "show", f"{what}:{module}"], cwd=ROOT, capture_output=True, check=False)
            if shown.returncode:
                raise Failed(f"{what!r} is no file, no folder, and no git revision that has {module}")
            (path / module).write_bytes(shown.stdout)
    program = path / MODULES[0] if path.is_dir() else path
    for file in (program, program.with_name(MODULES[1])):  # else Python would take this checkout's
        if not file.is_file():
            raise Failed(f"{what!r} has no {file.name}")
    return program.resolve()


class Ssh(Peer):
    """`ssh -R` to an sshd on a high port with keys of its own; both of a root of their own (chroot) where one is given.

    A session runs beside the forwarding: before OpenSSH 10, sshd turns Nagle's algorithm off only where one starts.
    With `-N` alone a small packet waits up to 40 ms for an acknowledgement (NOTES.md).
    """

    def __init__(
        self, name: str, folder: Path, *, root: Path | None = None, options: str = "", command: str = "cat"
    ) -> None:
        super().__init__(name)
        self._root = root
        self._options = options.split()
        self._session = command.split()
        self._folder = root / "tmp" if root else folder
        self._keys = Path()

    def missing(self) -> str | None:
        if self._root is None:
            found = shutil.which("sshd", path=PROGRAMS) and shutil.which("ssh")
            return None if found else "OpenSSH is not installed (Debian: apt install openssh-server)"
        if not (self._root / "usr/sbin/sshd").exists():
            return "there is no root with another OpenSSH (--ssh-root; bench/NOTES.md)"
        return "chroot wants to be root" if os.geteuid() else None

    def version(self) -> str | None:
        done = subprocess.run([*self._command("ssh"), "-V"], capture_output=True, text=True, check=False)
        return done.stderr.strip()

    def _command(self, program: str) -> list[str]:
        if self._root:
            return ["chroot", str(self._root), {"sshd": "/usr/sbin/sshd"}.get(program, f"/usr/bin/{program}")]
        return [shutil.which(program, path=PROGRAMS) or program]

    def _inside(self, path: Path) -> Path:
        """As its processes see it."""
        return Path("/") / path.relative_to(self._root) if self._root else path

    def _make_keys(self) -> None:
        self._keys = Path(tempfile.mkdtemp(prefix="rtunnel-bench-", dir=self._folder))
        atexit.register(shutil.rmtree, self._keys, ignore_errors=True)
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._keys / name)]
            subprocess.run(command, check=True)
        if os.geteuid() == 0:  # sshd wants its empty folder, which its service would make
            ((self._root or Path("/")) / "run/sshd").mkdir(exist_ok=True)

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        if not self._keys.name:
            self._make_keys()
        keys = self._inside(self._keys)
        control, public = free_port(), free_port()
        server = {
            "ListenAddress": HOST, "Port": control, "HostKey": keys / "host", "PidFile": "none",
            "AuthorizedKeysFile": keys / "user.pub", "StrictModes": "no", "UsePAM": "no",
            "PermitRootLogin": "prohibit-password",
        }  # fmt: skip
        options = [word for key, value in server.items() for word in ("-o", f"{key}={value}")]
        processes.start([*self._command("sshd"), "-D", "-e", "-f", "/dev/null", *options])
        client = {
            "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "BatchMode": "yes",
            "IdentityFile": keys / "user", "IdentitiesOnly": "yes", "ExitOnForwardFailure": "yes",
        }  # fmt: skip
        options = [word for key, value in client.items() for word in ("-o", f"{key}={value}")]
        words = ["-F", "none", "-R", f"{HOST}:{public}:{HOST}:{local}", "-p", dialled(control), *options]
        user, session = f"{getpass.getuser()}@{HOST}", [] if "-N" in self._options else ["cat"]
        processes.start([*self._command("ssh"), *words, *self._options, user, *session])
        return public


class Program(Peer):
    """Another program, by its name on the PATH or in CACHE. Its arguments and files may name {folder}, {control},
    {dialled}, {public} and {local}: the last four are ports."""

    sockets_per_visitor = 2  # those that are here have no multiplexer

    def __init__(
        self, name: str, file: str, server: str, client: str, files: Mapping[str, str], control: int | None = None
    ) -> None:
        super().__init__(name)
        self.file = shutil.which(file, path=PROGRAMS)
        self._arguments = server, client
        self._files = files
        self._control = control  # its server's port where that cannot be set

    def missing(self) -> str | None:
        return None if self.file else "it is not installed (bench/NOTES.md)"

    def version(self) -> str | None:
        said = subprocess.run([str(self.file), "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"\d+\.\d+\.\d+$", said, re.MULTILINE)
        return found[0] if found else None

    def _start(self, processes: Processes, local: int, dialled: Callable[[int], int]) -> int:
        ports = {"control": self._control or free_port(), "public": free_port(), "local": local}
        words = {"folder": processes.folder, **ports}
        for end, arguments in enumerate(self._arguments):
            if end:
                words["dialled"] = dialled(ports["control"])
                if self._control not in (None, words["dialled"]):
                    raise Failed("its control port is fixed, so that nothing can stand in between")
            for name, text in self._files.items():
                (processes.folder / name).write_text(text.format_map({"dialled": 0, **words}))
            processes.start([self.file, *arguments.format_map(words).split()])
        return ports["public"]


RATHOLE = {
    "server.toml": """
[server]
bind_addr = "127.0.0.1:{control}"
default_token = "bench"
[server.services.bench]
bind_addr = "127.0.0.1:{public}"
""",
    "client.toml": """
[client]
remote_addr = "127.0.0.1:{dialled}"
default_token = "bench"
[client.services.bench]
local_addr = "127.0.0.1:{local}"
""",
}
NOISE = {
    "server.toml": '[server.transport]\ntype = "noise"\n[server.transport.noise]\nlocal_private_key = "KEY"\n',
    "client.toml": '[client.transport]\ntype = "noise"\n[client.transport.noise]\nremote_public_key = "KEY"\n',
}


def rathole(name: str, *, noise: bool = False) -> Program:
    """A TCP connection for each visitor: as it is, or encrypted by Noise with a key that the client knows."""
    files = dict(RATHOLE)
    peer = Program(name, "rathole", "--server {folder}/server.toml", "--client {folder}/client.toml", files)
    if noise and peer.file:
        said = subprocess.run([peer.file, "--genkey"], capture_output=True, text=True, check=True).stdout
        for (end, text), key in zip(NOISE.items(), re.findall(r"Key:\s*(\S+)", said), strict=True):  # private, public
            files[end] += text.replace("KEY", key)
    return peer


def bore(name: str) -> Program:
    """A TCP connection for each visitor, not encrypted."""
    client = "local {local} --local-host 127.0.0.1 --to 127.0.0.1 --port {public}"
    return Program(name, "bore", "server --bind-addr 127.0.0.1", client, {}, BORE_PORT)
