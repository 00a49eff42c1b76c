"""Single-line faults in Python source: what a slip of the hand could make of a line."""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">")),
    ast.LtE: ("<=", ("<", ">=")),
    ast.Gt: (">", (">=", "<")),
    ast.GtE: (">=", (">", "<=")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
}
ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
}
NAMES = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "sum": "mean",
    "mean": "sum",
    "argmax": "argmin",
    "argmin": "argmax",
    "amax": "amin",
    "floor": "ceil",
    "ceil": "floor",
}
BOUNDS = {"gt": "ge", "ge": "gt", "lt": "le", "le": "lt"}  # keywords of pydantic's Field

# Words for people, and what the operating system or a library is asked for without effect on a result.
IGNORED_KEYWORDS = frozenset(
    {
        *("daemon", "description", "encoding", "exist_ok", "flush", "ignore_errors"),
        *("missing_ok", "parents", "strict", "timeout", "title"),
    }
)
IGNORED_CALLS = re.compile(
    r"(logger|logging|warnings)\.|print$|cast$|TypeVar$|(.*\.)?(sleep|Path|getLogger|add_argument)$"
)
COMMUTATIVE = re.compile(
    r"(.*\.)?(addcmul_?|allclose|array_equal|equal|gcd|isclose|is_|logaddexp|max|maximum|min|minimum|isdisjoint)$"
)
IGNORED_NAMES = re.compile(r"__\w+__$|\w*_S$")  # __all__; seconds that a wait may last
TEXT = (ast.JoinedStr, ast.List, ast.Tuple)


@dataclass(frozen=True)
class Fault:
    """One fault: `source[start:end]` (bytes) becomes `after`.

    `lines` are those of the statement (its header, where it holds others), one of which a test has to run;
    `function` those of the function that it is in; `imported`: it is in none, and run by imports.
    """

    file: str
    line: int
    lines: range
    function: range
    imported: bool
    start: int
    end: int
    text: str
    before: str
    after: str

    def plant(self, source: bytes) -> bytes | None:
        """The source with the fault; None where that is no Python."""
        planted = source[: self.start] + self.after.encode() + source[self.end :]
        try:
            ast.parse(planted)
        except SyntaxError:
            return None
        return planted

    def key(self, seed: int) -> str:
        """Orders faults at random, each by what it is: lines elsewhere do not change what is drawn."""
        text = f"{seed}\n{self.file}\n{self.text}\n{self.before}\n{self.after}"
        return hashlib.sha256(text.encode()).hexdigest()


def find_faults(file: str, source: bytes) -> list[Fault]:
    """All faults of one file, in the order of its lines."""
    finder = _Finder(file, source)
    finder.visit(ast.parse(source))
    return sorted(set(finder.found), key=lambda fault: (fault.start, fault.end, fault.after))


def shuffled(faults: Iterable[Fault], seed: int) -> list[Fault]:
    """All faults in a random order, a first one of each line before any second."""
    first: list[Fault] = []
    later: list[Fault] = []
    seen = set()
    for fault in sorted(faults, key=lambda fault: fault.key(seed)):
        (later if (fault.file, fault.line) in seen else first).append(fault)
        seen.add((fault.file, fault.line))
    return first + later


class _Finder(ast.NodeVisitor):
    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.found: list[Fault] = []
        self._lines = source.splitlines()
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._statement = self._function = range(0)

    # Statements

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, ast.stmt):
            outer, self._statement = self._statement, _own_lines(node)
            super().visit(node)
            self._statement = outer
        else:
            super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        outer, self._function = self._function, range(node.lineno, (node.end_lineno or node.lineno) + 1)
        self._statement = self._function  # where a default is wrong
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)
        self._function = outer

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self._assign(node, [node.target], node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        self._assign(node, node.targets, node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self._operator(node, node.target, node.value, suffix="=")
        self._remove(node)
        self.visit(node.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not self._is_ignored(node.value):
            self._remove(node)
        if not isinstance(node.value, ast.Constant):
            self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None:
            if not isinstance(node.value, ast.Constant):
                self._replace(node.value, "None")
            self.visit(node.value)

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace(node, "break")

    def visit_Break(self, node: ast.Break) -> None:
        self._replace(node, "continue")

    def visit_If(self, node: ast.If) -> None:
        if _text(node.test) == "TYPE_CHECKING":
            return
        self._force(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._force(node.test)
        self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        """What an error says is for people; that it is raised is its condition's business."""

    visit_Assert = visit_Import = visit_ImportFrom = visit_Raise  # type: ignore[assignment]

    # Expressions

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._force(test)
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        left = node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            word, others = COMPARISONS[type(operator)]
            for other in others:
                self._between(left, right, word, other)
            left = right
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(_is_text(side) for side in (node.left, node.right)):
            self._operator(node, node.left, node.right)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, word, other)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not | ast.USub):
            self._replace(node, _text(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self._replace(node, str(not value))
        elif isinstance(value, int):
            self._replace(node, str(value + 1))
        elif isinstance(value, float):
            self._replace(node, str(2 * value if value else 1.0))

    def visit_Call(self, node: ast.Call) -> None:
        if self._is_ignored(node):
            return
        first, second = (*node.args, None, None)[:2]
        if first is not None and second is not None:
            texts = [_text(first), _text(second)]
            starred = any(isinstance(argument, ast.Starred) for argument in (first, second))
            if texts[0] != texts[1] and not starred and not COMMUTATIVE.match(_text(node.func)):
                swapped = self._segment(second) + self._gap(first, second) + self._segment(first)
                self._add(self._offset(first)[0], self._offset(second)[1], swapped.decode(), node.lineno)
        for keyword in node.keywords:
            if keyword.arg in IGNORED_KEYWORDS:
                continue
            if keyword.arg in BOUNDS and _text(node.func) == "Field":
                start = self._offset(keyword)[0]
                self._add(start, start + len(keyword.arg), BOUNDS[keyword.arg], keyword.lineno)
            self.visit(keyword.value)
        for argument in node.args:
            self.visit(argument)
        self.visit(node.func)

    def visit_Name(self, node: ast.Name) -> None:
        if node.id in NAMES and isinstance(node.ctx, ast.Load) and node.id not in ("sum", "mean"):
            self._replace(node, NAMES[node.id])

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in NAMES and isinstance(node.ctx, ast.Load):
            end = self._offset(node)[1]
            self._add(end - len(node.attr), end, NAMES[node.attr], node.end_lineno or node.lineno)
        self.visit(node.value)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Text for people, as good as always."""

    # Planting

    def _assign(self, node: ast.stmt, targets: list[ast.expr], value: ast.expr | None) -> None:
        if value is None or any(IGNORED_NAMES.match(_text(target)) for target in targets):
            return
        if all(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
            self._remove(node)
        self.visit(value)

    def _force(self, test: ast.expr) -> None:
        for outcome in ("True", "False"):
            self._replace(test, outcome)

    def _remove(self, node: ast.stmt) -> None:
        self._replace(node, "pass")

    def _operator(
        self, node: ast.BinOp | ast.AugAssign, left: ast.AST, right: ast.AST, suffix: str = ""
    ) -> None:
        word, other = ARITHMETIC.get(type(node.op), ("", ""))
        if word:
            self._between(left, right, word + suffix, other + suffix)

    def _between(self, left: ast.AST, right: ast.AST, word: str, other: str) -> None:
        start = self._offset(left)[1]
        gap = self._gap(left, right).decode()
        found = re.search(rf"(?<![\w]){re.escape(word)}(?![\w])", gap)
        if found and "#" not in gap:
            line = (left.end_lineno or 0) + gap[: found.start()].count("\n")  # type: ignore[attr-defined]
            self._add(start + found.start(), start + found.end(), other, line)

    def _replace(self, node: ast.expr | ast.stmt, after: str) -> None:
        start, end = self._offset(node)
        if self.source[start:end].decode() != after:
            self._add(start, end, after, node.lineno)

    def _add(self, start: int, end: int, after: str, line: int) -> None:
        text = self._lines[line - 1].decode().strip()
        before = self.source[start:end].decode()
        short = " ".join(before.split())
        self.found.append(
            Fault(
                self.file,
                line,
                self._statement,
                self._function,
                not self._function,
                start,
                end,
                text,
                short,
                after,
            )
        )

    def _offset(self, node: ast.AST) -> tuple[int, int]:
        start = self._starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        return start, self._starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def _segment(self, node: ast.AST) -> bytes:
        start, end = self._offset(node)
        return self.source[start:end]

    def _gap(self, left: ast.AST, right: ast.AST) -> bytes:
        return self.source[self._offset(left)[1] : self._offset(right)[0]]

    def _is_ignored(self, node: ast.Call) -> bool:
        return IGNORED_CALLS.match(_text(node.func)) is not None


def _own_lines(node: ast.stmt) -> range:
    """The lines of a statement, without those that it holds."""
    last = node.end_lineno or node.lineno
    body = getattr(node, "body", None)
    if body:
        last = max(node.lineno, body[0].lineno - 1)
    return range(node.lineno, last + 1)


def _text(node: ast.AST) -> str:
    return ast.unparse(node)


def _is_text(node: ast.expr) -> bool:
    """Whether + or / with it is no arithmetic: another operator would fail at once, and prove nothing."""
    return isinstance(node, TEXT) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
