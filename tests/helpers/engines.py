"""Programs of others that stand around a tunnel: HAProxy, nginx. Each test says which of them it wants."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support import ROOT, Address, connect, eventually, free_port

PATH = os.environ.get("PATH", "") + ":/usr/sbin"  # where Debian has them
PACKAGES = {"haproxy": "haproxy", "nginx": "nginx-light", "tinyproxy": "tinyproxy", "promtool": "prometheus"}


def found(name: str) -> str | None:
    return shutil.which(name, path=PATH)


def wanted(*names: str) -> pytest.MarkDecorator:
    """Leaves a test out where one of them is missing, and says so."""
    missing = [name for name in names if not found(name)]
    packages = " ".join(PACKAGES[name] for name in missing)
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed (Debian: {packages})")


@contextlib.contextmanager
def engine(name: str, *arguments: object, ports: tuple[int, ...], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """It runs, and listens at these ports of 127.0.0.1; what it says stands in a file, shown where it fails."""
    program, said = found(name), folder / f"{name}.log"
    assert program is not None
    with said.open("wb") as output:
        process = subprocess.Popen(
            [program, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        eventually(lambda: all(listens(("127.0.0.1", port)) for port in ports), what=f"{name} listens")
        yield process
    except BaseException:
        print(f"--- {name}\n{said.read_text(errors='replace')}")
        raise
    finally:
        process.terminate()
        process.wait()


def listens(address: Address) -> bool:
    with contextlib.suppress(ConnectionRefusedError), connect(address):
        return True
    return False


def shipped_haproxy(ports: Mapping[int, int]) -> str:
    """conf/haproxy.cfg with other ports, each of which it must have; it binds to loopback only."""
    text = (ROOT / "conf" / "haproxy.cfg").read_text()
    for old, new in ports.items():
        text, count = re.subn(rf"^(    (?:bind |server .*)\S*):{old}\b", rf"\g<1>:{new}", text, flags=re.MULTILINE)
        assert count, f"conf/haproxy.cfg has no port {old}"
    return text.replace("bind :", "bind 127.0.0.1:")


@contextlib.contextmanager
def haproxy(text: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """HAProxy with this configuration."""
    config = folder / "haproxy.cfg"
    config.write_text(text)
    ports = tuple(int(port) for port in re.findall(r"bind 127\.0\.0\.1:(\d+)", text))
    with engine("haproxy", "-db", "-f", config, ports=ports, folder=folder) as process:
        yield process


NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  log_format seen '$remote_addr $proxy_protocol_addr $request_uri'; access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  {servers}
}}
"""


@contextlib.contextmanager
def nginx(folder: Path, *servers: str) -> Iterator[list[int]]:
    """nginx with these `server` blocks, in which PORT stands for a free port; its ports, in their order."""
    ports = [free_port() for _ in servers]
    blocks = [block.replace("PORT", f"127.0.0.1:{port}") for block, port in zip(servers, ports, strict=True)]
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, servers="\n".join(blocks)))
    with engine("nginx", "-c", config, "-p", folder, ports=tuple(ports), folder=folder):
        yield ports
