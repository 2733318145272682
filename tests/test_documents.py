"""What the documents say to type works, in its order; their options, events and links are those that there are.

helpers/documents.py says how a document is read.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from documents import Reader
from support import ROOT

README = (ROOT / "README.md").read_text("utf-8")


def test_readme(tmp_path: Path) -> None:
    """A stranger with README.md alone installs rtunnel, has a tunnel on one machine, one on two machines with a second
    client, and cuts a client off: each command does what it says."""
    with Reader(tmp_path, installed=False) as reader:
        reader.read(README)
