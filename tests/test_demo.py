"""`make demo`: what the README shows first works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo() -> None:
    """The demo carries a page and a file over post-quantum TLS, shows the handshake's receipt, and exits with 0."""
    done = subprocess.run(
        [sys.executable, "tests/demo.py"], cwd=ROOT, capture_output=True, text=True, timeout=55, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "X25519MLKEM768" in done.stdout
    assert "All is well." in done.stdout
