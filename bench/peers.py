"""What the bench compares: no tunnel, rtunnel, `ssh -R` through an sshd of its own, and any program with a script.

Each measurement gets processes of its own, on free ports of 127.0.0.1; whatever is started here is ended here.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = "127.0.0.1"
READY_S = 20.0  # for a program to listen, or a tunnel to answer
STOP_S = 5.0  # for a program to end when it is asked
TICKS = os.sysconf("SC_CLK_TCK")
SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")


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
        self._foreign: list[int] = []  # started by a script

    def start(self, arguments: Sequence[object], **options: object) -> subprocess.Popen[str]:
        """Start it with its stderr in a file."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RTUNNEL_")}
        with (self.folder / "log").open("a") as log:
            process: subprocess.Popen[str] = subprocess.Popen(
                [str(word) for word in arguments], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                text=True, **{"env": environment, **options},
            )  # type: ignore[call-overload]  # fmt: skip
        self.started.append(process)
        return process

    def adopt(self, pids: Sequence[int]) -> None:
        self._foreign += pids

    def pids(self) -> list[int]:
        """Of all that run, their children too."""
        parents = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        found = [process.pid for process in self.started if process.poll() is None] + self._foreign
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.started):
            process.terminate()
        for pid in self._foreign:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        for process in self.started:
            with process:
                try:
                    process.communicate(timeout=STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
        for pid in self._foreign:
            with contextlib.suppress(Failed):
                eventually(lambda pid=pid: not Path(f"/proc/{pid}").exists(), str(pid), STOP_S)  # type: ignore[misc]
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


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

    def resident_kb(self) -> float:
        total = 0
        for pid in self.processes.pids() if self.processes else []:
            with contextlib.suppress(OSError):
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
        return total


class Peer:
    """One column of the table. `_start` starts both ends; the client is to dial `dialled(control port)`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def missing(self) -> str | None:
        """Why it cannot be measured here."""
        return None

    @contextlib.contextmanager
    def open(self, folder: Path, local: int, probe: bytes, relay: Relay | None = None) -> Iterator[Tunnel]:
        """A tunnel to a local port, ready for visitors: it answers `probe`. A relay stands between its ends."""
        place = folder / f"{self.name}-{time.monotonic_ns()}".replace(" ", "-")
        place.mkdir()
        with contextlib.ExitStack() as stack:
            processes = stack.enter_context(Processes(place))

            def dialled(port: int, *, listens: bool = True) -> int:
                if listens:
                    eventually(lambda: is_listening(port), f"{self.name}'s server does not listen")
                return stack.enter_context(relay(port)) if relay else port

            try:
                port = self._start(processes, local, dialled)
                eventually(lambda: answers(port, probe), f"{self.name} does not answer")
            except (Failed, OSError, ValueError) as error:
                log = (place / "log").read_text() if (place / "log").exists() else ""
                raise Failed(" | ".join([str(error), *log.splitlines()[-3:]])) from error
            yield Tunnel(port, processes)

    def _start(self, processes: Processes, local: int, dialled: Callable[..., int]) -> int:
        raise NotImplementedError


def answers(port: int, probe: bytes) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), 2) as sock:
        sock.settimeout(2)
        sock.sendall(probe)
        return bool(sock.recv(1))
    return False


class Direct(Peer):
    """No tunnel: what the load and the kernel can do."""

    def _start(self, processes: Processes, local: int, dialled: Callable[..., int]) -> int:
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

    def _start(self, processes: Processes, local: int, dialled: Callable[..., int]) -> int:
        control, public = free_port(), free_port()
        server = ["--control-listen", f"{HOST}:{control}", "--public-bind", HOST]
        processes.start([sys.executable, self.program, "server", *server, *self.flags("server")])
        client = ["--server", f"{HOST}:{dialled(control)}", "--local", f"{HOST}:{local}", "--remote-port", public]
        processes.start([sys.executable, self.program, "client", *client, *self.flags("client")])
        return public


class Ssh(Peer):
    """`ssh -N -R` with its defaults, to an sshd on a high port with keys of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        super().__init__(name)
        self._keys = folder / "ssh"

    def missing(self) -> str | None:
        return None if SSHD and shutil.which("ssh") else "OpenSSH is not installed (Debian: apt install openssh-server)"

    def _make_keys(self) -> None:
        self._keys.mkdir()
        for name in ("host", "user"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._keys / name)]
            subprocess.run(command, check=True)
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants its empty folder, which its service would make

    def _start(self, processes: Processes, local: int, dialled: Callable[..., int]) -> int:
        if not self._keys.exists():
            self._make_keys()
        control, public = free_port(), free_port()
        server = {
            "ListenAddress": HOST, "Port": control, "HostKey": self._keys / "host", "PidFile": "none",
            "AuthorizedKeysFile": self._keys / "user.pub", "StrictModes": "no", "UsePAM": "no",
            "PermitRootLogin": "prohibit-password",
        }  # fmt: skip
        options = [word for key, value in server.items() for word in ("-o", f"{key}={value}")]
        assert SSHD is not None
        processes.start([SSHD, "-D", "-e", "-f", "/dev/null", *options])
        client = {
            "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null", "BatchMode": "yes",
            "IdentityFile": self._keys / "user", "IdentitiesOnly": "yes", "ExitOnForwardFailure": "yes",
        }  # fmt: skip
        options = [word for key, value in client.items() for word in ("-o", f"{key}={value}")]
        forward = f"{HOST}:{public}:{HOST}:{local}"
        processes.start(
            ["ssh", "-F", "none", "-N", "-R", forward, "-p", dialled(control), *options, f"{getpass.getuser()}@{HOST}"]
        )
        return public


class Script(Peer):
    """Another program. The script starts its server on CTRL_PORT and its client, which dials SERVER_PORT (the same
    port, or a relay to it) and leads PUBLIC_PORT to LOCAL_PORT; it writes their process ids into PID_FILE and ends."""

    def __init__(self, name: str, script: Path) -> None:
        super().__init__(name)
        self._script = script.resolve()

    def missing(self) -> str | None:
        return None if os.access(self._script, os.X_OK) else f"{self._script.name} is not executable"

    def _start(self, processes: Processes, local: int, dialled: Callable[..., int]) -> int:
        control, public = free_port(), free_port()
        pids = processes.folder / "pids"
        ports = {"CTRL_PORT": control, "PUBLIC_PORT": public, "LOCAL_PORT": local}
        words = {**ports, "SERVER_PORT": dialled(control, listens=False), "PID_FILE": pids}
        environment = {**os.environ, **{name: str(word) for name, word in words.items()}}
        with (processes.folder / "log").open("a") as log:
            subprocess.run([self._script], env=environment, stdout=log, stderr=log, check=False, timeout=READY_S)
        processes.adopt([int(pid) for pid in pids.read_text().split()])
        return public
