"""The whole tunnel on one machine, told step by step. `make demo` runs it.

    visitor (urllib) -> public port | server <= post-quantum TLS => client | -> local service

The server and the client are processes of their own, started from conf/server.ini and conf/client.ini; flags
override the files only where a port is taken. They run in a temporary folder, so that conf/pki, the certificates
and keys, is there and not in the checkout; all that is written goes with it, all that is started is stopped.
Exit status: 0, or 1 where a step failed (then the ends of the logs are shown).
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
SERVER_NAMES = ["localhost", "127.0.0.1", "::1"]
RECEIPT = {  # what is shown, of the client's `handshake` line
    "version": "{version}",
    "key exchange": "{group}",
    "cipher": "{cipher}",
    "signature": "{signature}",
    "peer": "{identity}, by {issuer}",
    "certificate": "SHA-256 {sha256}",
    "expiry": "{expiry}, {days_left} days left",
}
WAIT_S = 20.0  # for each step that depends on another process
# Windows: to stop is asked with Ctrl+Break, which goes to a whole group, so each gets its own.
INTERRUPT = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM)
OWN_GROUP = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)


class Failed(Exception):
    """A step did not end as it should; the message says how."""


def environment() -> dict[str, str]:
    """This process's, without what would change the demo or leave files in the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RTUNNEL_")}
    return {**kept, "PYTHONDONTWRITEBYTECODE": "1"}


class Program:
    """`rtunnel.py ROLE -c conf/ROLE.ini FLAGS...` as a process in a folder, and all that it has logged."""

    def __init__(self, folder: Path, role: str, flags: list[str]) -> None:
        self.role, self.log = role, list[str]()
        self.command = " ".join(["python rtunnel.py", role, "-c", f"conf/{role}.ini", *flags])
        self._unread: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "rtunnel.py", role, "-c", ROOT / "conf" / f"{role}.ini", *flags],
            cwd=folder, env=environment(), creationflags=OWN_GROUP, stderr=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            self._unread.put(line)
        self._unread.put("")

    def wait_for(self, event: str) -> dict[str, str]:
        """The `key=value` pairs of the next log line that tells this event."""
        try:
            while line := self._unread.get(timeout=WAIT_S):
                if f" {event} " in line:
                    return {key: value.strip('"') for key, value in re.findall(r' (\w+)=("[^"]*"|\S+)', line)}
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


def pki(folder: Path, *arguments: str) -> str:
    """Runs `rtunnel.py pki ARGUMENTS` in that folder; returns the command."""
    command = [sys.executable, str(ROOT / "rtunnel.py"), "pki", *arguments]
    subprocess.run(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL, check=True, timeout=WAIT_S)
    return " ".join(["python rtunnel.py pki", *arguments])


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
    site = folder / "site"
    site.mkdir()
    content = os.urandom(FILE_BYTES)
    (site / "index.html").write_bytes(PAGE)
    (site / "file").write_bytes(content)
    port = port_of(client_file["local"])
    handler = partial(QuietHandler, directory=str(site))
    service = ThreadingHTTPServer(("127.0.0.1", port if is_free(port) else 0), handler)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    local = f"127.0.0.1:{service.server_port}"
    print(f"1. Local service: http://{local} serves a page and a file of {FILE_BYTES / 1e6:.0f} MB.")

    print(f"2. Certificates, in conf/pki of {folder} for as long as the demo lasts:")
    for arguments in (["init"], ["issue", "server", "--server", *SERVER_NAMES], ["issue", "client", "--client"]):
        print(f"   {pki(folder, *arguments)}")

    taken = not is_free(port_of(server_file["control-listen"]))
    server = Program(folder, "server", ["--control-listen=127.0.0.1:0"] if taken else [])
    programs.append(server)
    control = server.wait_for("listening")["address"]
    print(f"3. Server: {server.command}\n   It waits for clients at its control port, {control}.")

    wanted = {
        "server": f"127.0.0.1:{port_of(control)}",
        "local": local,
        "remote-port": client_file["remote-port"],
    }
    if not is_free(int(wanted["remote-port"])):
        wanted["remote-port"] = "0"  # the server takes a free one
    flags = [f"--{key}={value}" for key, value in wanted.items() if value != client_file[key]]
    client = Program(folder, "client", flags)
    programs.append(client)
    receipt = client.wait_for("handshake")
    public = client.wait_for("session-opened")["public"]
    print(f"4. Client: {client.command}\n   The receipt of its handshake:")
    for title, value in RECEIPT.items():
        print(f"     {title:<14}{value.format_map(receipt)}")
    if "MLKEM" not in receipt["group"] or not receipt["signature"].startswith("mldsa"):
        raise Failed("the handshake was not post-quantum")

    print(f"5. Tunnel: the server has opened port {port_of(public)} for the client.")
    if (page := fetch(f"http://{public}/")) != PAGE:
        raise Failed(f"through the tunnel came another page than the one that is served: {page[:80]!r}")
    print(f"   http://{public}/ brings {PAGE.decode()}")

    start = time.monotonic()
    received = fetch(f"http://{public}/file")
    seconds = time.monotonic() - start
    digest = hashlib.sha256(received).hexdigest()
    if digest != hashlib.sha256(content).hexdigest():
        raise Failed(f"the file arrived changed: {len(received)} bytes with SHA-256 {digest}")
    print(f"   http://{public}/file brings {FILE_BYTES / 1e6:.0f} MB in {seconds:.2f} s", end=" ")
    print(f"= {FILE_BYTES / 1e6 / seconds:.0f} MB/s;\n   its SHA-256 is that of the file served, {digest}.")

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
        except (Failed, OSError, http.client.HTTPException, subprocess.SubprocessError) as error:
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
