"""What `make bench` writes, and what README.md shows of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from support import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import peers
import report

FIGURES: report.Figures = {
    "down_1": {"direct": [3000.0], "plain": [1500.0, 1600.0, 1400.0], "default": [1100, 1200, 1300], "ssh -R": [600.0]},
    "close": {"default": [2000.0]},
}
RESULTS = report.Results({"cpu": "2 x one"}, 3, 5.0, list(FIGURES["down_1"]), FIGURES, {"http, ssh -R": "it failed"})


def test_the_table() -> None:
    """A row has each peer's median and spread, and the ratios of ours to `ssh -R`; what is missing is told."""
    table = report.markdown(RESULTS)
    assert "| 3,000 | 1,500 (1,400 to 1,600) | 1,200 (1,100 to 1,300) | 600 | 2.00 | 2.50 |" in table
    assert "| - | - | 2,000 | - | - | - |" in table
    assert "- not measured: http, ssh -R: it failed" in table


def test_another_version_is_compared_round_by_round() -> None:
    """The ratio to it is the median of the rounds' ratios, so that a slow minute meets both of its sides."""
    figures = {"close": {"plain": [100.0, 50.0, 90.0], "before plain": [50.0, 50.0, 60.0]}}
    table = report.markdown(report.Results({}, 3, 1.0, ["plain", "before plain"], figures, {}))
    assert "| plain / before plain |" in table
    assert "| 1.50 (1.00 to 2.00) |" in table


def test_the_best_rival_is_the_one_to_compare_with() -> None:
    """Where OpenSSH 10 was measured, the ratios are to it and not to the machine's own."""
    figures = {"close": {"default": [100.0], "ssh -R": [50.0], "ssh 10": [200.0]}}
    table = report.markdown(report.Results({}, 1, 1.0, list(figures["close"]), figures, {}))
    assert "| default / ssh 10 |" in table
    assert "default / ssh -R" not in table
    assert "| 100 | 50 | 200 | 0.50 |" in table


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--rows", "keepalive,nothing"], "there is no row 'nothing'"),
        (["--peers", ""], "there is no peer ''"),
        (["--runs", "0"], "'0'"),
        (["--seconds", "nan"], "'nan'"),
        (["--also", "0000000"], "'0000000' is no file, no folder, and no git revision"),
        (["--also", str(ROOT), "--also", str(ROOT)], "a name of its own"),
        (["--output", str(ROOT / "README.md")], "File exists"),
    ],
)
def test_what_is_wrong_is_told_before_the_run(arguments: list[str], what: str) -> None:
    """A whole run takes an hour: no mistake waits for its end."""
    command = [sys.executable, str(ROOT / "bench/run.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2
    assert what in done.stderr
    assert not done.stdout


def test_another_version_needs_both_modules(tmp_path: Path) -> None:
    """Else it would run with a module of this checkout."""
    (tmp_path / "rtunnel.py").touch()
    with pytest.raises(peers.Failed, match=r"has no rtunnel_tls\.py"):
        peers.other_version(str(tmp_path), tmp_path)
    (tmp_path / "rtunnel_tls.py").touch()
    assert peers.other_version(str(tmp_path), tmp_path) == tmp_path / "rtunnel.py"


def test_the_chart() -> None:
    """The chart is well-formed, with a panel for each measure and a bar for each peer that was measured."""
    chart = ElementTree.fromstring(report.chart(RESULTS))
    titles = [text.text for text in chart.iter("{http://www.w3.org/2000/svg}text") if text.get("font-weight")]
    assert titles == ["Download, 1 stream", "HTTP close, 32 at a time"]
    assert len(chart.findall(".//{http://www.w3.org/2000/svg}g/{http://www.w3.org/2000/svg}rect")) == 4


def test_what_the_readme_says_of_it() -> None:
    """Three sentences, each figure with its ratio to the best rival; what was not measured is told."""
    text = " ".join(report.sentences(RESULTS).split())
    assert "beside" in text
    assert "of what `ssh -R` does: one stream downloads 1,200 MB/s (2.00), eight (not measured)" in text
    assert text.count(". ") == 2


def test_the_readme_shows_what_was_measured() -> None:
    """README.md shows the chart and says what bench/report.py says of it; table and chart are of the same run."""
    written = report.Results(**json.loads((ROOT / "bench/results.json").read_text()))
    readme = (ROOT / "README.md").read_text()
    assert report.markdown(written) == (ROOT / "bench/results.md").read_text()
    assert report.chart(written) == (ROOT / "bench/results.svg").read_text()
    assert report.sentences(written) in readme, "put what `python bench/report.py` prints below README.md's chart"
    assert "](bench/results.svg)" in readme
