"""The whole tunnel on one machine, told step by step. `make demo` runs it.

    visitor (urllib) -> public port | server <= control connection => client | -> local service

The server and the client are processes of their own, started from conf/server.ini and conf/client.ini; flags
override the files only where a port is taken or an address is not this machine's. All that is written goes to
a temporary folder, all that is started is stopped. Exit status: 0, or 1 where a step failed (then the ends of
the logs are shown).
"""

import hashlib
import http.client
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = b"<h1>Hello from behind the tunnel</h1>"
FILE_BYTES = 50_000_000
WAIT_S = 20.0  # for each step that depends on another process
# Windows: to stop is asked with Ctrl+Break, which goes to a whole group, so each gets its own.
INTERRUPT = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class Failed(Exception):
    """A step did not end as it should; the message says how."""


class Program:
    """`rtunnel.py ROLE -c conf/ROLE.ini FLAGS...` as a process, and all that it has logged."""

    def __init__(self, role: str, flags: list[str]) -> None:
        arguments = ["rtunnel.py", role, "-c", f"conf/{role}.ini", *flags]
        self.role, self.command, self.log = role, " ".join(["python", *arguments]), list[str]()
        self._unread: queue.SimpleQueue[str] = queue.SimpleQueue()
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RTUNNEL_")}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, creationflags=OWN_GROUP,
            stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            self._unread.put(line)
        self._unread.put("")

    def wait_for(self, event: str, key: str) -> str:
        """The value of `key` in the next log line that tells this event."""
        try:
            while line := self._unread.get(timeout=WAIT_S):
                if match := re.search(rf" {event} (?:.* )?{key}=(\S+)", line):
                    return match[1]
                if " ERROR " in line:
                    raise Failed(f"the {self.role} logged an error: {line.rstrip()}")
        except queue.Empty:
            raise Failed(f"the {self.role} logged nothing more for {WAIT_S:.0f} s, and not '{event}'") from None
        raise Failed(f"the {self.role} ended before it logged '{event}'")

    def stop(self) -> None:
        self.process.send_signal(INTERRUPT)
        if status := self.process.wait(timeout=5.0):
            raise Failed(f"the {self.role} stopped with status {status} instead of 0")


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """No line on stderr for each request."""


def settings(role: str) -> dict[str, str]:
    """The `key = value` lines of the role's file."""
    lines = (ROOT / "conf" / f"{role}.ini").read_text("utf-8").splitlines()
    pairs = (line.partition("=") for line in lines if "=" in line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def is_free(port: int) -> bool:
    both = socket.has_dualstack_ipv6()
    try:
        socket.create_server(
            ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both
        ).close()
    except OSError:
        return False
    return True


def fetch(url: str) -> bytes:
    """What a GET brings, past any proxy that the environment names."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=WAIT_S) as response:
        return bytes(response.read())


def demonstrate(folder: Path, programs: list[Program]) -> None:
    """All steps. Each program is put into `programs` as it starts."""
    server_file, client_file = settings("server"), settings("client")

    content = os.urandom(FILE_BYTES)
    (folder / "index.html").write_bytes(PAGE)
    (folder / "file").write_bytes(content)
    port = port_of(client_file["local"])
    handler = partial(QuietHandler, directory=str(folder))
    service = ThreadingHTTPServer(("127.0.0.1", port if is_free(port) else 0), handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    local = f"127.0.0.1:{service.server_port}"
    print(f"1. Local service: http://{local} serves a page and a file of {FILE_BYTES / 1e6:.0f} MB.")

    taken = not is_free(port_of(server_file["control-listen"]))
    server = Program("server", ["--control-listen", "127.0.0.1:0"] if taken else [])
    programs.append(server)
    control = server.wait_for("listening kind=control", "address")
    print(f"2. Server: {server.command}\n   It waits for clients at its control port, {control}.")

    wanted = {
        "server": f"127.0.0.1:{port_of(control)}",
        "local": local,
        "remote-port": client_file["remote-port"],
    }
    if not is_free(int(wanted["remote-port"])):
        wanted["remote-port"] = "0"  # the server takes a free one
    flags = [f"--{key}={value}" for key, value in wanted.items() if value != client_file[key]]
    client = Program("client", flags)
    programs.append(client)
    client.wait_for("session-opened", "server")
    lease = server.wait_for("lease-opened", "address")
    print(f"3. Client: {client.command}\n   It is connected, and the server has opened {lease} for it.")

    public = f"http://127.0.0.1:{port_of(lease)}"
    if (page := fetch(f"{public}/")) != PAGE:
        raise Failed(f"through the tunnel came another page than the one that is served: {page[:80]!r}")
    print(f"4. Page: {public}/ brings {PAGE.decode()}")

    start = time.monotonic()
    received = fetch(f"{public}/file")
    seconds = time.monotonic() - start
    digest = hashlib.sha256(received).hexdigest()
    if digest != hashlib.sha256(content).hexdigest():
        raise Failed(f"the file arrived changed: {len(received)} bytes with SHA-256 {digest}")
    print(f"5. File: {FILE_BYTES / 1e6:.0f} MB in {seconds:.2f} s = {FILE_BYTES / 1e6 / seconds:.0f} MB/s;")
    print(f"   the SHA-256 is that of the file served, {digest}.")

    client.stop()
    server.stop()
    service.shutdown()
    service.server_close()
    print("6. Client, server and local service have stopped. All is well.")


def main() -> int:
    programs: list[Program] = []
    with tempfile.TemporaryDirectory(prefix="rtunnel-demo-") as folder:
        try:
            demonstrate(Path(folder), programs)
        except (Failed, OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
            print(f"FAILED: {error}", file=sys.stderr)
            for program in programs:
                print(f"\nThe {program.role}'s last lines:", *program.log[-20:], sep="\n  ", file=sys.stderr)
            return 1
        finally:
            for program in programs:
                program.process.kill()  # nothing happens to those that have ended
                program.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
