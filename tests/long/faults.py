"""Faults, each with full recovery, no wrong byte, and no truncation that looks like success.

`python tests/long/faults.py --seconds 450`. All on loopback; every process that is killed
is one that this program started.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import load
from load import Load, answering
from longrun import Stage, main, require, stage
from relay import Relay
from support import Program, eventually

VISITORS = 50
RECOVERY_S = 15.0  # three lost heartbeats, a reconnect, and room for a busy machine


def network(relay: Relay, dice: random.Random) -> None:
    """Something happens to the network between client and server."""
    kind = dice.choice(["cut", "truncate", "half cut", "delay", "silence"])
    if kind == "delay":
        relay.stall(up=dice.random() < 0.7, down=dice.random() < 0.7)
        time.sleep(dice.uniform(0.05, 0.5))  # the fault itself is a time
        relay.resume()
    elif kind == "silence":
        relay.silence()
    else:
        relay.cut(near=kind != "half cut" or dice.random() < 0.5, fin=kind == "truncate")


def kill_server(here: Stage) -> None:
    here.server.kill()
    here.start_server("--heartbeat=0.5")


def kill_client(here: Stage) -> None:
    here.client.kill()
    here.start_client("--heartbeat=0.5")


class LocalService:
    """A local service in a process of its own, which may be killed and started again on the same port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, load.__file__, str(self._port)], stdin=subprocess.PIPE)

    def kill(self) -> None:
        if self._process is not None:
            require(self._process.poll() is None, "the local service has found wrong bytes")
            self._process.kill()
            self._process.communicate()

    def restart(self, here: Stage) -> None:
        self.kill()
        self.start()

    def __enter__(self) -> LocalService:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextlib.contextmanager
def phase(here: Stage, name: str, *, second: bool = False) -> Iterator[Load]:
    """Visitors while faults happen, which may be cut but never wrong; then all must be served again, each at once."""
    address = here.second if second else here.public
    eventually(lambda: here.serves(address), RECOVERY_S, f"{name}: it serves")
    with Load(address, VISITORS, up=200_000, down=200_000, pause_s=0.05) as load:
        yield load
    began = time.monotonic()
    eventually(lambda: here.serves(address), RECOVERY_S, f"{name}: it serves again")
    recovered_s = time.monotonic() - began
    with Load(address, 8) as healed:
        healed.wait_for(20)
    wrong = load.wrong + healed.wrong + here.answers.wrong
    print(
        f"{name}: {len(load.seconds)} answered whole, {sum(load.failed.values())} cut {dict(load.failed)}, "
        f"{len(wrong)} wrong; serves again after {recovered_s:.1f} s, then {len(healed.seconds)} of "
        f"{len(healed.seconds) + sum(healed.failed.values())}"
    )
    require(not wrong, f"{name}: {wrong}")
    require(not healed.failed, f"{name}: not healed, {dict(healed.failed)}")


def repeat(seconds: float, pause_s: float, act: Callable[[], object]) -> int:
    """Do it again and again for so long, with pauses around `pause_s`; how often it was done."""
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        time.sleep(random.uniform(0.5, 1.5) * pause_s)  # the rhythm of the faults; nothing is ordered by it
        act()
        count += 1
    return count


@contextlib.contextmanager
def behind_a_relay() -> Iterator[tuple[Stage, Relay]]:
    """A tunnel whose control connections cross a relay."""
    with stage() as here, Relay(here.control) as relay:
        here.dialled = relay.address
        here.start_server("--heartbeat=0.5")
        here.start_client("--heartbeat=0.5")
        yield here, relay


def network_faults(seconds: float) -> None:
    """The network between client and server is cut, truncated, delayed, stalled and silenced at random."""
    dice = random.Random(0)
    with behind_a_relay() as (here, relay), phase(here, "network"):
        count = repeat(seconds, 0.5, lambda: network(relay, dice))
    print(f"network: {count} faults")


def kills(seconds: float) -> None:
    """The server, the client and the local service are killed and started again, in turn."""
    with behind_a_relay() as (here, _), LocalService(here.killable[1]) as local:
        for name, kill in (("server", kill_server), ("client", kill_client), ("local service", local.restart)):
            with phase(here, f"{name} killed", second=name == "local service"):
                count = repeat(seconds / 3, min(1.0, seconds), lambda kill=kill: kill(here))  # type: ignore[misc]
            print(f"{name} killed: {count} times; {here.cost()}")


def in_a_namespace() -> str:
    """Run `link_fault` in network namespaces of its own, which vanish with it; why it could not be, else empty."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return "there is no unshare, or no ip, here"
    if subprocess.run(["unshare", "--net", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        return "network namespaces cannot be made here"
    command = ["unshare", "--net", sys.executable, __file__, "--link"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    require(done.returncode == 0, f"link: {done.stdout}{done.stderr}")
    print(done.stdout, end="")
    return ""


def link_fault() -> None:
    """The server in one namespace, the client in another, the link between them down and up again."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    ip("link", "set", "lo", "up")
    server = Program("server", "--control-listen=:7000", "--heartbeat=0.5")
    server.wait_for("listening")
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET: this process leaves the server's
        raise OSError(ctypes.get_errno(), "unshare")
    there = ("nsenter", f"--target={server.pid}", "--net", "ip")
    ip("link", "set", "lo", "up")
    ip("link", "add", "near", "type", "veth", "peer", "name", "far", "netns", str(server.pid))
    ip("address", "add", "10.0.0.1/24", "dev", "near")
    ip("link", "set", "near", "up")
    subprocess.run([*there, "address", "add", "10.0.0.2/24", "dev", "far"], check=True)
    subprocess.run([*there, "link", "set", "far", "up"], check=True)
    with answering() as (service, answers):
        flags = ("--heartbeat=0.5", "--reconnect-max=0.5", "--log-level=debug")
        client = Program("client", "--server=10.0.0.2:7000", f"--forward=8080:{service.text}", *flags)
        try:
            for number in range(3):
                client.wait_for("session-opened", 20.0)
                with Load(("10.0.0.2", 8080), 8, patient=True) as load:
                    load.wait_for(50)
                require(not load.wrong + answers.wrong, f"link: {load.wrong + answers.wrong}")
                if number < 2:
                    ip("link", "set", "near", "down")
                    client.wait_for("session-closed", 20.0)
                    ip("link", "set", "near", "up")
            print("link: down and up, twice; served again")
        finally:
            client.kill()
            server.kill()


def faults(seconds: float) -> None:
    """Two thirds of the time for the network, the rest for what is killed."""
    network_faults(seconds * 2 / 3)
    kills(seconds / 3)
    if why := in_a_namespace():
        print(f"link: not done, for {why}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--link"]:
        link_fault()
    else:
        main(faults, 450.0)
