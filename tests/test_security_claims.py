"""SECURITY.md says how each claim is tested."""

from __future__ import annotations

import re

import pytest
from support import ROOT

import rtunnel
import rtunnel_tls

TEXT = (ROOT / "SECURITY.md").read_text()


def test_the_tests_that_it_names() -> None:
    """Each test that SECURITY.md names exists."""
    named = re.findall(r"`([a-z_0-9]+)::([a-z_0-9]+)(?:\[[a-z]+\])?`", TEXT)
    assert len(named) > 30
    for file, test in named:
        assert f"\ndef test_{test}(" in (ROOT / "tests" / f"test_{file}.py").read_text(), f"{file}::{test}"
    for table in re.findall(r"^\|[^\n]* test \|\n(.*?)\n\n", TEXT, re.M | re.S):
        for row in table.splitlines():
            for file in re.findall(r"`([a-z_0-9]+)`", row.split("|")[-2]):  # one whose tests all show it
                assert (ROOT / "tests" / f"test_{file}.py").is_file(), file


@pytest.mark.parametrize("name", ["MAX_STRANGERS", "MAX_CLIENTS", "MAX_LEASES", "MAX_STREAMS", "MAX_SESSION_STREAMS"])
def test_the_limits_that_it_names(name: str) -> None:
    """A limit has the value that SECURITY.md says."""
    value = f"{getattr(rtunnel, name):,}"
    assert re.search(rf"`{name}` \| {value} \|", TEXT)


def test_the_profiles() -> None:
    """SECURITY.md has each profile, with its groups and signature algorithms in order."""
    rows = re.findall(r"^\| `(\w+)` \| ([\w, ]*MLKEM[\w, ]+) \| (ML-DSA[^|(]+)", TEXT, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(rtunnel_tls.PROFILES)
    for name, groups, signatures in rows:
        profile = rtunnel_tls.PROFILES[name]
        assert groups.split(", ") == list(profile.groups), name
        assert ["mldsa" + number for number in re.findall(r"-(\d+)", signatures)] == list(profile.signatures), name


def test_the_rules_of_a_refusal() -> None:
    """SECURITY.md has each rule that a refusal in the log can begin with, and no other."""
    source = (ROOT / "rtunnel_tls.py").read_text()
    code = set(re.findall(r'(?:HandshakeError|admit)\("(\w+)"', source)) | set(rtunnel_tls._RULES)
    table = TEXT.partition("| rule | the peer is refused where |")[2].partition("\n\n")[0]
    named = {rule for line in table.splitlines()[2:] for rule in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert named == code
