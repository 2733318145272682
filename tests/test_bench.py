"""What `make bench` writes, and what README.md shows of it."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

from support import ROOT

sys.path.insert(0, str(ROOT / "bench"))
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


def test_the_chart() -> None:
    """The chart is well-formed, with a panel for each measure and a bar for each peer that was measured."""
    chart = ElementTree.fromstring(report.chart(RESULTS))
    titles = [text.text for text in chart.iter("{http://www.w3.org/2000/svg}text") if text.get("font-weight")]
    assert titles == ["Download, 1 stream", "HTTP close, 32 at a time"]
    assert len(chart.findall(".//{http://www.w3.org/2000/svg}g/{http://www.w3.org/2000/svg}rect")) == 4


def test_the_readme_shows_what_was_measured() -> None:
    """README.md has the table that the bench wrote, whole, and shows the chart; both are of the same run."""
    written = report.Results(**json.loads((ROOT / "bench/results.json").read_text()))
    table, readme = (ROOT / "bench/results.md").read_text(), (ROOT / "README.md").read_text()
    assert report.markdown(written) == table
    assert report.chart(written) == (ROOT / "bench/results.svg").read_text()
    assert table in readme
    assert "](bench/results.svg)" in readme
