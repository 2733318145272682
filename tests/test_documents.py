"""What the documents say to type works, in its order; their options, events, limits and links are those that there are.

helpers/documents.py says how a document is read.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import Reader, blocks
from support import ROOT
from test_dissector import missing as nothing_to_capture_with

import rtunnel

NAMES = ("README", "OPERATIONS", "LAB", "CONTRIBUTING", "README.zh")
README, OPERATIONS, LAB, CONTRIBUTING, CHINESE = ((ROOT / f"{name}.md").read_text("utf-8") for name in NAMES)
DOCUMENTS = sorted([*ROOT.glob("*.md"), ROOT / "bench/NOTES.md"])
LONG = pytest.mark.timeout(240)  # one test types a whole document
# Options that are no row of the table behind the others.
ALSO = {"config", "print-config", "example-config"}


@LONG
def test_readme(tmp_path: Path) -> None:
    """A stranger with README.md alone installs rtunnel, has a tunnel on one machine, one on two machines with a second
    client, and cuts a client off: each command does what it says."""
    with Reader(tmp_path, installed=False) as reader:
        reader.read(README)


@LONG
def test_operations(tmp_path: Path) -> None:
    """OPERATIONS.md's server is installed as a service, renewed, reloaded and upgraded; its examples are right."""
    with Reader(tmp_path) as reader:
        reader.read(OPERATIONS)


@LONG
def test_contributing(tmp_path: Path) -> None:
    """What CONTRIBUTING.md says to type works, and what it shows of our code is our code."""
    with Reader(tmp_path) as reader:
        reader.read(CONTRIBUTING)
    shown = [block.text for block in blocks(CONTRIBUTING) if block.language == "python"]
    assert shown
    assert all(text in (ROOT / "rtunnel.py").read_text() for text in shown)


FIRST, *EXPERIMENTS = dict.fromkeys(block.chapters[0] for block in blocks(LAB))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader of LAB.md who has done what comes before the first experiment."""
    with Reader(tmp_path_factory.mktemp("lab")) as reader:
        reader.read(LAB, FIRST)
        yield reader


def missing(chapter: str) -> str:
    """What this machine lacks for an experiment."""
    typed = "".join(block.text for block in blocks(LAB) if chapter in block.chapters)
    if "tshark" in typed and (reason := nothing_to_capture_with()):
        return reason
    return next((f"there is no {tool}" for tool in ("openssl", "curl") if tool in typed and not shutil.which(tool)), "")


@LONG
@pytest.mark.parametrize("chapter", EXPERIMENTS)
def test_lab(lab: Reader, chapter: str) -> None:
    """Each experiment of LAB.md, typed by itself, shows what it says."""
    if reason := missing(chapter):
        pytest.skip(reason)
    try:
        lab.read(LAB, chapter)
    except BaseException:
        lab.give_up()
        raise


def test_lab_has_ten_experiments() -> None:
    """They are numbered, and each says why."""
    assert [name.partition(".")[0] for name in EXPERIMENTS] == [str(number) for number in range(1, 11)]
    assert LAB.count("**Why.**") == 10


# --- options, events, limits --------------------------------------------------------------------------------


def rows(document: str, *heads: str) -> list[list[str]]:
    """The cells of the tables whose first cell is one of these."""
    found: list[list[str]] = []
    wanted = False
    for before, line in zip(["", *document.splitlines()], document.splitlines(), strict=False):
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not before.startswith("|"):
            wanted = bool(cells) and cells[0] in heads
        elif wanted and line.startswith("| "):
            found.append(cells)
    return found


@pytest.mark.parametrize("role", ["server", "client"])
def test_options(role: str) -> None:
    """README.md's tables have each option of the command, once, with its default."""
    of_role = [row for row in rows(README, "option") if row[1] in (role, "both")]
    documented = {name: row for row in of_role for name in re.findall(r"`--([a-z-]+)`", row[0])}
    options = {option.name: option for option in rtunnel.OPTIONS[role]}
    assert set(documented) == set(options) | ALSO
    for name, option in options.items():
        if option.default and isinstance(option.default, str):
            default = option.default.replace(f"/{role}.", "/ROLE.")
            assert default in documented[name][2] or default.endswith(".key"), name


def commands(document: str) -> list[str]:
    """What its blocks say to type, without comments, one command a string."""
    typed = "".join(re.sub(r" *#.*", "", block.text) for block in blocks(document) if block.language == "sh")
    return [" ".join(line.split()) for line in typed.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_chinese_readme() -> None:
    """README.zh.md has commands of README.md alone, in its order, and the same options with the same defaults."""
    left = iter(commands(README))
    for command in commands(CHINESE):
        assert command in left, f"not in README.md, or not in this order: {command}"  # takes from the iterator

    def options(document: str, head: str) -> dict[str, list[str]]:
        return {name: row[1:3] for row in rows(document, head) for name in re.findall(r"`--([a-z-]+)`", row[0])}

    english, chinese = options(README, "option"), options(CHINESE, "选项")
    assert list(english) == list(chinese)
    of = {"server": "服务器", "client": "客户端", "both": "两端"}
    for name, (who, default) in english.items():
        assert chinese[name][0] == of[who], name
        if re.fullmatch(r"`[^`]*`", default):
            assert chinese[name][1] == default, name


def events() -> set[str]:
    """What the program can log."""
    found: set[str] = set()
    for module in ("rtunnel.py", "rtunnel_tls.py"):
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                at = {"log_event": 1, "log_limit": 0}.get(node.func.id)
                if at is not None and isinstance(name := node.args[at], ast.Constant):
                    found.add(name.value)
    return found | {"log-lines-lost"}  # the log's own, which goes past them


def test_events() -> None:
    """OPERATIONS.md says of each event that the program can log what it means, and of no other."""
    named = {event for row in rows(OPERATIONS, "event") for event in re.findall(r"`([a-z-]+)`", row[0])}
    assert len(named) > 30
    assert named == events()


def test_metrics() -> None:
    """OPERATIONS.md has each figure that --metrics serves, with its label."""
    table = {name: row[1] for row in rows(OPERATIONS, "metric") for name in re.findall(r"`rtunnel_(\w+)`", row[0])}
    assert table == {name: f"`{label}`" if label else "" for name, (_, label, _) in rtunnel.METRICS.items()}


def test_statuses_and_signals() -> None:
    """OPERATIONS.md has the exit statuses of rtunnel.py's docstring, and each signal that it handles."""
    assert rtunnel.__doc__ is not None
    told = re.search(r"Exit status: ([^.]*)\.", rtunnel.__doc__)
    assert told is not None
    statuses = re.findall(r"(\d) ", told[1])
    assert [row[0] for row in rows(OPERATIONS, "exit status")] == statuses
    signals = " ".join(row[0] for row in rows(OPERATIONS, "signal")).replace("Ctrl+Break", "SIGBREAK")
    assert set(re.findall(r"SIG[A-Z0-9]+", signals)) == set(rtunnel.SIGNALS)


def test_the_container() -> None:
    """The recipe runs as nobody special, and starts a command with options that there are."""
    (recipe,) = [block.text for block in blocks(OPERATIONS) if block.language == "dockerfile"]
    steps = [line.split(" ", 1) for line in recipe.splitlines()]
    assert [step for step, _ in steps] == ["FROM", "COPY", "RUN", "USER", "WORKDIR", "ENTRYPOINT"]
    command = ast.literal_eval(steps[-1][1])
    assert command[:3] == ["rtunnel", "server", "-c"]
    assert command[4].removeprefix("--") in {option.name for option in rtunnel.OPTIONS["server"]}


# --- the documents themselves -------------------------------------------------------------------------------


def anchors(document: str) -> set[str]:
    """Of its headings, as web pages of repositories make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", document, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links(file: Path) -> None:
    """A link into the repository leads to a file that there is, and to a heading that it has."""
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", file.read_text("utf-8"), flags=re.DOTALL)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (file.parent / name).resolve() if name else file
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text("utf-8")), target


@pytest.mark.parametrize(("name", "most"), [("README.md", 260), ("README.zh.md", 160)])
def test_length(name: str, most: int) -> None:
    """The first document of each reader can be read in one sitting."""
    assert (ROOT / name).read_text("utf-8").count("\n") <= most
