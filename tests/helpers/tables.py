"""Reads the thread table and the lock table of rtunnel.py, and finds where they are not true.

`parse` takes them from the docstring, `complaints` compares them with what recorder.py has seen,
`unlocked` looks at the source: at fields that a lock guards, and at calls of `_locked` methods.
Each fault is one sentence.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from recorder import MODULES, ROOT, functions

SOURCES = {file: (ROOT / file).read_text() for file in MODULES}
# Who calls these waits, they do so in nobody's name: the tables name the caller.
ON_BEHALF = {"ready", "PumpedStream._wait_locked", "connect"}
CARRIERS = "Pool._work", "Listener.serve_forever"  # whose threads are called by what they do


class Thread(NamedTuple):
    """A row of the thread table."""

    name: str
    begins_in: list[str]
    waits: dict[str, bool]  # function: whether it is marked as rare


class Tables(NamedTuple):
    threads: list[Thread]
    locks: dict[str, list[str]]  # lock: locks that may be taken under it, functions that may wait


# --- the tables as text --------------------------------------------------------------------------


def rows(text: str, *header: str) -> Iterator[list[str]]:
    """The rows of the table with these columns, which begin where the header's words do.

    A line goes on with the row above where its first cell is empty, or the one above ends with a
    comma. An empty line ends the table.
    """
    lines = text.splitlines()
    at = next((i for i, line in enumerate(lines) if re.split(r"\s{2,}", line.strip()) == list(header)), None)
    assert at is not None, f"there is no table with the columns {', '.join(header)}"
    starts = [lines[at].index(word) for word in header]
    row: list[str] = []
    for line in lines[at + 1 :]:
        if not line.strip():
            break
        assert not any(line[start - 2 : start].strip() for start in starts), f"a cell is too wide: {line}"
        cells = [line[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0].strip() and not (row and row[0].endswith(",")):
            if row:
                yield row
            row = [cell.strip() for cell in cells]
        else:
            row = [f"{above} {cell.strip()}".strip() for above, cell in zip(row, cells, strict=True)]
    if row:
        yield row


def names(cell: str) -> list[str]:
    """`A.b, c.d*`; a dash is nothing."""
    return [name.strip() for name in cell.split(",") if name.strip() not in ("", "-")]


def parse(text: str) -> Tables:
    """Both tables of a module's docstring."""
    threads = []
    for name, _, does, waits in rows(text, "thread", "how many", "does (begins in)", "may wait in"):
        begins = names(re.findall(r"\(([^)]*)\)", does)[-1])
        threads.append(Thread(name, begins, {wait.rstrip("*"): wait.endswith("*") for wait in names(waits)}))
    locks = {}
    for several, _, under in rows(text, "lock", "guards", "under it may be taken"):
        for lock in names(several):
            locks[lock] = names(under)
    return Tables(threads, locks)


@functools.cache
def known_functions() -> frozenset[str]:
    return frozenset(functions().values())


# --- the tables and what was seen ----------------------------------------------------------------


def place(stack: Sequence[str]) -> str:
    """The function in whose name somebody waits."""
    return next((name for name in reversed(stack) if name not in ON_BEHALF), "?")


def complaints(tables: Tables, records: Iterable[dict[str, Any]]) -> list[str]:
    """Where the tables and the records differ."""
    several = list(records)
    return sorted({*_of_threads(tables, several), *_of_locks(tables, several)})


def _of_threads(tables: Tables, records: list[dict[str, Any]]) -> Iterator[str]:
    known = known_functions()
    library = {stack[0] for record in records for stack, _ in record["waits"] if stack} - known
    kinds = {begin: thread for thread in tables.threads for begin in thread.begins_in}
    seen: set[tuple[str, str]] = set()
    for thread in tables.threads:
        for name in [*thread.begins_in, *thread.waits]:
            if name not in known | library:
                yield f"threads: the row of `{thread.name}` names {name}, and there is no such function"
    for record in records:
        for stack, held in record["waits"]:
            begins = [name for name in stack if name in kinds]
            while begins[1:] and begins[0] in CARRIERS:
                del begins[0]
            where, thread = place(stack), kinds[begins[0]] if begins else None
            path = " > ".join(stack)
            if thread is None:
                yield f"threads: no row has the thread that waits in {where} ({path})"
                continue
            seen.add((thread.name, where))
            if where not in thread.waits:
                yield f"threads: the row of `{thread.name}` does not say that it waits in {where} ({path})"
            for lock in held:
                if where not in tables.locks.get(lock, []):
                    yield f"locks: `{thread.name}` waits in {where} while it holds {lock} ({path})"
    for thread in tables.threads:
        for wait, rare in thread.waits.items():
            if not rare and (thread.name, wait) not in seen:
                yield f"threads: `{thread.name}` was never seen to wait in {wait}: mark it with * where that is rare"


def _of_locks(tables: Tables, records: list[dict[str, Any]]) -> Iterator[str]:
    made = {lock for record in records for lock in record["locks"]}
    nested = {(outer, inner): stack for record in records for outer, inner, stack in record["nestings"]}
    waited = {(lock, place(stack)) for record in records for stack, held in record["waits"] for lock in held}
    for lock in locks_of_ours():
        if lock not in tables.locks:
            yield f"locks: {lock} has no row"
    for lock, under in tables.locks.items():
        for name in [lock, *under]:
            if name not in made and name not in known_functions():
                yield f"locks: the row of {lock} names {name}, and nobody makes such a lock"
        for inner in under:
            if (lock, inner) not in nested and (lock, inner) not in waited:
                yield f"locks: {inner} was never taken under {lock}"
    for (outer, inner), stack in nested.items():
        if not _is_internal(outer, stack) and inner not in tables.locks.get(outer, []):
            yield f"locks: the row of {outer} does not say that {inner} is taken under it ({' > '.join(stack)})"


def _is_internal(outer: str, stack: Sequence[str]) -> bool:
    """What the standard library does under a lock of its own, without us."""
    return not stack and outer not in locks_of_ours()


@functools.cache
def locks_of_ours() -> frozenset[str]:
    """Each lock that our modules make: `Class._attribute`, `function.variable`, or `module.name`."""
    found: set[str] = set()
    for file, source in SOURCES.items():
        for owner in ast.parse(source).body:
            for node in ast.walk(owner):
                if isinstance(node, ast.Assign) and re.fullmatch(r"threading\.R?Lock\(\)", ast.unparse(node.value)):
                    maker = getattr(owner, "name", file.removesuffix(".py"))
                    found |= {f"{maker}.{name}" for name in _targets(node)}
    return frozenset(found)


# --- the source: fields that a lock guards -------------------------------------------------------

MARK = "without the lock"  # in a comment at the statement or above, or in the function's docstring
_GUARDED_BY = re.compile(r"# guarded by ((?:\w+\.)?_\w+)\b")
_WHOLE_CLASS = re.compile(r"(?:Guarded by|Called with) ((?:\w+\.)?_\w+|its lock)")


def _classes(source: str) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]


class Source:
    """One module: its classes, which lock guards which field, and its comments."""

    def __init__(self, file: str, source: str) -> None:
        self.file = file
        self.tree = ast.parse(source)
        self.classes = {each.name: each for each in _classes(source)}
        self.lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        self.comments = {each.start[0]: each.string for each in tokens if each.type == tokenize.COMMENT}
        self.locks = locks_of_ours()
        self.guards = {name: self._guarded(each) for name, each in self.classes.items()}

    def ancestry(self, name: str) -> list[str]:
        """A class of this module and those that it inherits."""
        bases = [ast.unparse(base) for base in self.classes[name].bases]
        return [name, *(each for base in bases if base in self.classes for each in self.ancestry(base))]

    def maker(self, name: str) -> str:
        """Of a class and those that it inherits, the one that makes the lock."""
        return next((each for each in self.ancestry(name) if f"{each}._lock" in self.locks), name)

    def related(self, one: str, other: str) -> bool:
        return one in self.ancestry(other) or (one in self.classes and other in self.ancestry(one))

    def _guarded(self, owner: ast.ClassDef) -> dict[str, str]:
        """Field: the class whose lock guards it.

        A marker counts up to the next, in its function or class body.
        Where the class's docstring says it and no marker does, all fields are meant.
        """
        found: dict[str, str] = {}
        whole = re.search(_WHOLE_CLASS, ast.get_docstring(owner) or "")
        default = (whole[1].rpartition(".")[0] or owner.name) if whole else ""
        if any(_GUARDED_BY.search(self.comments.get(line, "")) for line in range(owner.lineno, owner.end_lineno or 0)):
            default = ""
        init = [each for each in owner.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        for body in [owner.body, *(each.body for each in init)]:
            guard = default
            begin = owner.lineno if body is owner.body else init[0].lineno
            for node in body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                    continue
                for line in range(begin, node.lineno + 1):
                    if match := _GUARDED_BY.search(self.comments.get(line, "")):
                        guard = match[1].rpartition(".")[0] or self.maker(owner.name)
                begin = node.lineno + 1
                if guard:
                    found |= dict.fromkeys(_targets(node), guard)
        return found

    def guard(self, owner: str, field: str) -> str | None:
        """Whose lock guards the field of a class or of those that it inherits."""
        guards = (self.guards[each].get(field) for each in self.ancestry(owner))
        return next((guard for guard in guards if guard), None)

    def is_marked(self, statement: ast.stmt, line: int, function: ast.FunctionDef) -> bool:
        """Whether the code says that it reads without the lock."""
        above = statement.lineno - 1
        texts = [self.comments.get(line, ""), ast.get_docstring(function) or ""]
        while self.lines[above - 1].lstrip().startswith("#"):
            texts.append(self.lines[above - 1])
            above -= 1
        return any(MARK in re.sub(r"\s*\n?\s*#?\s+", " ", text).lower() for text in texts)


def _targets(node: ast.stmt) -> Iterator[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    for target in targets:
        for each in target.elts if isinstance(target, ast.Tuple) else [target]:
            yield ast.unparse(each).removeprefix("self.")


def _members(owner: ast.ClassDef) -> Iterator[str]:
    """Methods and fields of a class."""
    for node in ast.walk(owner):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            yield from _targets(node)


class Access(NamedTuple):
    """A guarded field or a `_locked` method, used where the source does not show the lock held."""

    file: str
    line: int
    function: str
    expression: str
    guard: str
    writes: bool

    def __str__(self) -> str:
        what = "calls" if self.expression.endswith("_locked") else "writes" if self.writes else "reads"
        return f"{self.file}:{self.line}: {self.function} {what} {self.expression}, which {self.guard}._lock guards"


def unlocked(sources: dict[str, str] = SOURCES) -> list[Access]:
    """Guarded fields and `_locked` methods used outside `with ..._lock`, `_locked` methods, `__init__`.

    A read that is meant is marked by the words of MARK; a write never is.
    """
    return [each for file, text in sources.items() for each in _Accesses(Source(file, text)).found]


class _Accesses:
    """Walks a module, and knows at each expression which locks the code around it holds."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Access] = []
        self.fields: dict[str, set[str]] = {}  # field: the classes that have it guarded
        for owner, guards in source.guards.items():
            for field in guards:
                self.fields.setdefault(field, set()).add(owner)
        # Names that classes without a guard have, too.
        self.elsewhere = {
            name for owner in source.classes.values() for name in _members(owner)
            if name not in source.guards[owner.name]
        }  # fmt: skip
        for owner in source.classes.values():
            whole = bool(_WHOLE_CLASS.search(ast.get_docstring(owner) or ""))
            for function in owner.body:
                if isinstance(function, ast.FunctionDef):
                    self._function(function, owner.name, whole)
        for function in source.tree.body:
            if isinstance(function, ast.FunctionDef):
                self._function(function, "", False)

    def _function(self, function: ast.FunctionDef, owner: str, exempt: bool) -> None:
        exempt = exempt or bool(_WHOLE_CLASS.search(ast.get_docstring(function) or ""))
        held = {"self._lock"} if function.name.endswith("_locked") else set()
        for statement in function.body:
            self._visit(statement, statement, held, function, owner, exempt)

    def _visit(self, node: ast.AST, statement: ast.stmt, held: set[str], function: ast.FunctionDef, owner: str,
               exempt: bool) -> None:  # fmt: skip
        if isinstance(node, ast.stmt):
            statement = node
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            held = set()  # it runs later
        if isinstance(node, ast.With):
            held = held | {ast.unparse(item.context_expr) for item in node.items}
        if isinstance(node, ast.Attribute):
            self._look_at(node, statement, held, function, owner, exempt)
        for child in ast.iter_child_nodes(node):
            self._visit(child, statement, held, function, owner, exempt)

    def _look_at(self, node: ast.Attribute, statement: ast.stmt, held: set[str], function: ast.FunctionDef, owner: str,
                 exempt: bool) -> None:  # fmt: skip
        source, receiver = self.source, ast.unparse(node.value).replace("super()", "self")
        if node.attr.endswith("_locked"):
            guard = source.maker(owner) if owner and receiver == "self" else receiver
        elif receiver == "self":
            guard = source.guard(owner, node.attr) if owner else None
            if guard is None or function.name == "__init__":
                return
        else:
            guard = self._guard_of_other(receiver.rpartition(".")[2].strip("_").lower(), node.attr)
            if guard is None:
                return
        own = bool(owner) and guard in source.classes and source.related(guard, owner)
        writes = not isinstance(node.ctx, ast.Load)
        if exempt or f"{receiver}._lock" in held or (own and "self._lock" in held):
            return
        if not writes and source.is_marked(statement, node.lineno, function):
            return
        name = f"{owner}.{function.name}" if owner else function.name
        self.found.append(Access(source.file, node.lineno, name, f"{receiver}.{node.attr}", guard, writes))

    def _guard_of_other(self, receiver: str, field: str) -> str | None:
        """Whose lock guards a field of another object; the variable's name tells its class."""
        having = self.fields.get(field, set())
        if field.startswith("_") or field not in self.elsewhere:
            guards = {self.source.guards[each][field] for each in having if receiver != "connection"}  # OpenSSL's
        else:
            guards = {self.source.guards[each][field] for each in having if receiver in each.lower()}
        return guards.pop() if len(guards) == 1 else None
