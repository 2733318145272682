"""The sdist is whole, the wheel works where there is no clone, and what both say of themselves is complete."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from documents import copy_of_the_sources
from support import ROOT

import rtunnel

NAME = f"rtunnel-{rtunnel.__version__}"


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """What it prints; it must end well."""
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel that is made of it, and the sources that both come from."""
    folder = tmp_path_factory.mktemp("built")
    copy_of_the_sources(folder / "sources")
    # A key and compiled code must not get into either, though they are there.
    (folder / "sources/conf/pki").mkdir()
    (folder / "sources/conf/pki/ca.key").touch()
    (folder / "sources/tests/helpers/old.pyc").touch()
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, folder / "sources", cwd=folder)
    return folder


def test_the_sdist_is_whole(built: Path) -> None:
    """It has all files that are kept, and nothing that was made beside them but its own metadata."""
    copy_of_the_sources(built / "kept")
    kept = {str(file.relative_to(built / "kept")) for file in (built / "kept").rglob("*") if file.is_file()}
    with tarfile.open(built / f"{NAME}.tar.gz") as sdist:
        packed = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    made = {name for name in packed if name.startswith("rtunnel.egg-info/")} | {"PKG-INFO", "setup.cfg"}
    assert packed - kept <= made
    assert kept <= packed


def test_the_wheel_has_the_two_modules_alone(built: Path) -> None:
    """And its metadata."""
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if ".dist-info/" not in name} == {"rtunnel.py", "rtunnel_tls.py"}
    assert f"{NAME}.dist-info/licenses/LICENSE" in names


def test_the_metadata_is_complete(built: Path) -> None:
    """`twine check --strict` has nothing to say: what an index would show can be shown."""
    pytest.importorskip("twine", reason="twine is not installed: make check has it")
    files = sorted(str(file) for file in built.glob("rtunnel-*"))
    assert len(files) == 2
    assert run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=ROOT).count("PASSED") == 2
