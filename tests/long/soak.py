"""Mixed load for a long time, with reconnects, reloads and renewed certificates: nothing grows.

`python tests/long/soak.py --seconds 1800` prints what server and client cost at the start, six times in between, and at
the end.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from load import HEADER, Load
from longrun import Stage, main, require, stage
from relay import Relay
from support import eventually

import rtunnel_tls

SAMPLES = 6
DISTURBANCES = 10  # for each sample
ROOM_BYTES = 16_000_000  # by which a process may be larger in the second half: what its allocator keeps


def disturb(here: Stage, relay: Relay, number: int) -> None:
    """The network breaks, certificates are renewed, files are loaded again: one after the other."""
    if number % 3 == 0:
        relay.cut(fin=number % 2 == 0)
    elif number % 3 == 1:
        rtunnel_tls.issue(here.house.folder, "server", hosts=["127.0.0.1", "localhost"], force=True)
        here.server.send_signal(signal.SIGHUP)
        here.server.wait_for("reloaded")  # what is half replaced would be refused
    else:
        here.client.send_signal(signal.SIGHUP)
        here.server.send_signal(signal.SIGUSR1)


def idlers(here: Stage, stack: contextlib.ExitStack) -> None:
    """Visitors that ask for much and never read it, and some that never ask."""
    for number in range(10):
        with contextlib.suppress(OSError):
            sock = stack.enter_context(socket.create_connection(here.public, 2.0))
            if number % 2:
                sock.sendall(HEADER.pack(number, 0, 1 << 20))
                sock.shutdown(socket.SHUT_WR)


def soak(seconds: float) -> None:
    step_s = seconds / (SAMPLES * DISTURBANCES)
    with stage() as here, Relay(here.control) as relay:
        here.dialled = relay.address
        here.start_server("--heartbeat=1")
        here.start_client("--heartbeat=1")
        eventually(here.serves)
        at_rest = [(each.descriptors(), each) for each in (here.server, here.client)]
        memory: list[tuple[int, int]] = []
        print(f"start: {here.cost()}")
        with (
            Load(here.public, 6, pause_s=0.02) as small,
            Load(here.public, 2, up=1 << 20, down=1 << 20, pause_s=0.1) as large,
        ):
            for sample in range(1, SAMPLES + 1):
                with contextlib.ExitStack() as stack:
                    for number in range(DISTURBANCES):
                        disturb(here, relay, number)
                        if number % 3 == 0:
                            stack.close()
                        idlers(here, stack)
                        time.sleep(step_s)  # the run's rhythm
                memory.append((here.server.memory_bytes(), here.client.memory_bytes()))
                print(f"{sample * seconds / SAMPLES:.0f} s: {here.cost()}", flush=True)
        for count, program in at_rest:
            eventually(lambda program=program, count=count: program.descriptors() <= count + 2, 20.0, "descriptors")  # type: ignore[misc]
        print(f"end: {here.cost()}")
        reloads = len(here.server.events("reloaded")), len(here.client.events("reloaded"))
        failed = here.server.events("reload-failed") + here.client.events("reload-failed")
    for name, load in (("small", small), ("large", large)):
        print(f"{name}: {len(load.seconds)} answered whole, cut {dict(load.failed)}, {len(load.wrong)} wrong")
        require(not load.wrong + here.answers.wrong, f"{load.wrong + here.answers.wrong}")
        require(len(load.seconds) > 0, "nothing was answered")
    print(f"{len(memory) * DISTURBANCES} disturbances, {reloads} reloads, {relay.accepted} control connections")
    require(not failed, f"reloads have failed: {failed}")
    for name, sizes in zip(("server", "client"), zip(*memory, strict=True), strict=True):
        first, second = max(sizes[: SAMPLES // 2]), max(sizes[SAMPLES // 2 :])
        require(second <= 1.1 * first + ROOM_BYTES, f"the {name} has grown from {first} to {second} bytes")


if __name__ == "__main__":
    main(soak, 1800.0)
