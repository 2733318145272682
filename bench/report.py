"""What the bench found, as a Markdown table and as a chart."""

from __future__ import annotations

import json
import statistics
import textwrap
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

Figures = dict[str, dict[str, list[float]]]  # figure: peer: one value for each round


class Results(NamedTuple):
    """One run of the bench."""

    machine: dict[str, Any]
    runs: int
    seconds: float  # of each measurement
    peers: list[str]
    figures: Figures
    missing: dict[str, str]  # what was not measured, and why


MORE, LESS = "more is better", "less is better"
TITLES = {
    "down_1": ("Download, 1 stream", "MB/s", MORE),
    "up_1": ("Upload, 1 stream", "MB/s", MORE),
    "down_8": ("Download, 8 streams", "MB/s", MORE),
    "up_8": ("Upload, 8 streams", "MB/s", MORE),
    "down_cpu": ("Processor time, download, both ends", "s/GB", LESS),
    "up_cpu": ("Processor time, upload, both ends", "s/GB", LESS),
    "keepalive": ("HTTP keep-alive, 64 connections", "requests/s", MORE),
    "close": ("HTTP close, 32 at a time", "connections/s", MORE),
    "keepalive_cpu": ("Processor time, keep-alive request, both ends", "µs", LESS),
    "close_cpu": ("Processor time, short connection, both ends", "µs", LESS),
    "echo_idle_p50": ("Echo of 64 bytes, idle, p50", "µs", LESS),
    "echo_idle_p99": ("Echo of 64 bytes, idle, p99", "µs", LESS),
    "echo_busy_p50": ("Echo beside a saturating stream, p50", "ms", LESS),
    "echo_busy_p99": ("Echo beside a saturating stream, p99", "ms", LESS),
    "memory_1000": ("Memory per idle visitor of 1,000, both ends", "kB", LESS),
    "memory_10000": ("Memory per idle visitor of 10,000, both ends", "kB", LESS),
    "open_1000": ("Opening 1,000 visitors", "s", LESS),
    "open_10000": ("Opening 10,000 visitors", "s", LESS),
    "distance_50": ("Download, 1 stream, 50 ms round trip", "MB/s", MORE),
    "distance_100": ("Download, 1 stream, 100 ms round trip", "MB/s", MORE),
}
OURS = ("default", "plain")
RIVALS = {"ssh 10": "`ssh -R` of OpenSSH 10", "ssh -R": "`ssh -R`"}  # the first that was measured
DIRECT = "direct"


def amount(value: float) -> str:
    """Three digits, all of a large number."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: list[float]) -> str:
    """The median, the lowest and the highest."""
    middle = amount(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({amount(min(values))} to {amount(max(values))})"


def columns_of_ratios(peers: list[str]) -> list[tuple[str, str]]:
    """Ours to the best rival, and to other versions of ours ("NAME default", "NAME plain")."""
    rival = [peer for peer in RIVALS if peer in peers][:1]
    pairs = [(ours, other) for other in rival for ours in OURS if ours in peers]
    return pairs + [(ours, other) for ours in OURS for other in peers if ours in peers and is_version(ours, other)]


def is_version(ours: str, other: str) -> bool:
    return other.endswith(f" {ours}")


def ratio(values: dict[str, list[float]], ours: str, other: str) -> str:
    """Of the medians; to another version of ours, the median of the rounds' ratios, the lowest and the highest."""
    if ours not in values or other not in values:
        return "-"
    if is_version(ours, other) and len(values[ours]) == len(values[other]):
        ratios = sorted(mine / its for mine, its in zip(values[ours], values[other], strict=True))
        return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return f"{middle(values, ours) / middle(values, other):.2f}"


def markdown(results: Results) -> str:
    """The table, the machine, what is missing."""
    ratios = columns_of_ratios(results.peers)
    lines = ["| | " + " | ".join([*results.peers, *map(" / ".join, ratios)]) + " |"]
    lines.append("|---" * (len(results.peers) + 1 + len(ratios)) + "|")
    for figure, (title, unit, better) in TITLES.items():
        if values := results.figures.get(figure):
            cells = [spread(values[peer]) if peer in values else "-" for peer in results.peers]
            cells += [ratio(values, ours, other) for ours, other in ratios]
            lines.append(f"| {title}, {unit} ({better}) | " + " | ".join(cells) + " |")
    lines += ["", f"Median of {results.runs} (lowest to highest), {results.seconds:g} s each."]
    lines += [", ".join(f"{key}: {value}" for key, value in results.machine.items()) + "."]
    lines += [f"- not measured: {what}: {why}" for what, why in results.missing.items()]
    return "\n".join(lines) + "\n"


def sentences(results: Results) -> str:
    """What README.md says below the chart: three sentences, over TLS, beside the best rival."""
    rival = next(peer for peer in RIVALS if peer in results.peers)

    def shown(figure: str) -> str:
        values = results.figures.get(figure, {})
        if OURS[0] not in values:
            return "(not measured)"
        return f"{amount(middle(values, OURS[0]))} {TITLES[figure][1]} ({ratio(values, OURS[0], rival)})"

    bulk = f"one stream downloads {shown('down_1')}, eight {shown('down_8')}"
    far = f", at 100 ms of round trip one {shown('distance_100')}" if "distance_100" in results.figures else ""
    text = (
        f"Over TLS, in brackets as a multiple of what {RIVALS[rival]} does: {bulk}{far}. "
        f"64 visitors that keep their connections get {shown('keepalive')}, and 32 that open a new one each time "
        f"{shown('close')}. "
        f"An idle visitor costs both ends together {shown('memory_1000')}; the 99th of 100 echoes beside a saturating "
        f"stream is back within {shown('echo_busy_p99')}."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False) + "\n"


def write(results: Results, folder: Path) -> None:
    """The figures, the table and the chart. README.md wants `sentences` anew, and a test says so."""
    (folder / "results.json").write_text(json.dumps(results._asdict(), indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    (folder / "results.svg").write_text(chart(results))


def middle(values: dict[str, list[float]], peer: str) -> float:
    return statistics.median(values[peer])


COLUMNS, WIDTH, TITLE_HEIGHT, BAR_HEIGHT, GAP = 3, 340, 44, 20, 16
LABEL_WIDTH, BAR_WIDTH = 84, 170
COLOURS = [
    "#4c78a8",
    "#2f9e77",
    "#8cc63f",
    "#e8833a",
    "#8e6bbf",
    "#c94f6d",
    "#7f7f7f",
    "#b39b38",
    "#3aa6b9",
    "#a0522d",
    "#5f6f3a",
]


def chart(results: Results) -> str:
    """One panel a measure, the peers side by side; without a tunnel as a number, or its bar would dwarf the others."""
    peers = [peer for peer in results.peers if peer != DIRECT]
    shown = [figure for figure in TITLES if any(peer in results.figures.get(figure, {}) for peer in peers)]
    height = TITLE_HEIGHT + BAR_HEIGHT * len(peers) + GAP
    rows = -(-len(shown) // COLUMNS)
    size = COLUMNS * WIDTH + GAP, rows * height + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for number, figure in enumerate(shown):
        x, y = GAP + number % COLUMNS * WIDTH, GAP + number // COLUMNS * height
        parts.append(f'<g transform="translate({x},{y})">{panel(figure, results.figures[figure], peers)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(figure: str, values: dict[str, list[float]], peers: list[str]) -> str:
    """Title, unit, a bar for each peer with its spread as a thin line."""
    title, unit, better = TITLES[figure]
    direct = f"; no tunnel: {amount(middle(values, DIRECT))}" if DIRECT in values else ""
    parts = [
        f'<text y="12" font-weight="bold">{escape(title)}</text>',
        f'<text y="28" fill="#666666" font-size="11">{escape(f"{unit}, {better}{direct}")}</text>',
    ]
    scale = BAR_WIDTH / max(max(values[peer]) for peer in peers if peer in values)
    for number, peer in enumerate(peers):
        y = TITLE_HEIGHT - 8 + number * BAR_HEIGHT
        parts.append(f'<text x="{LABEL_WIDTH - 6}" y="{y + 12}" text-anchor="end">{escape(peer)}</text>')
        if peer not in values:
            parts.append(f'<text x="{LABEL_WIDTH}" y="{y + 12}" fill="#999999">not measured</text>')
            continue
        length, low, high = (scale * f(values[peer]) for f in (statistics.median, min, max))
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="14" fill="{colour}"/>')
        parts.append(
            f'<path d="M{LABEL_WIDTH + low:.1f} {y + 7}H{LABEL_WIDTH + high:.1f}" stroke="#222222" stroke-width="1.5"/>'
        )
        parts.append(f'<text x="{LABEL_WIDTH + high + 5:.1f}" y="{y + 12}">{amount(middle(values, peer))}</text>')
    return "".join(parts)


if __name__ == "__main__":
    print(sentences(Results(**json.loads((Path(__file__).parent / "results.json").read_text()))), end="")
