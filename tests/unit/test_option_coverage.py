"""No option without a test that sets it: to a value other than its default, and not only to see it refused.

Options are found as the configuration declares them; what tests set, in their syntax: `{"section": {"option":
value}}`, `section={"option": value}`, `Section(option=value)`, `"section.option=value"`, and lines of TOML.
What a method declares itself must be set for that method: `a_method("grpo", option=value)`.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_rapo.config import RunConfig
from megatron_rapo.config.options import sections_of
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.options import Options
from megatron_rapo.section import Section
from tests.papers import PAPERS

TESTS = Path(__file__).parents[1]
# They ask what is refused, whatever the option does.
OF_CONFIGURATION = ("test_configuration.py", "test_option_coverage.py", "test_preflight.py")
COMPUTED = object()  # a value that only the running test knows: it is not the default's literal
SETTING = re.compile(r"((?:\w+\.)+\w+)\s*=\s*(\S.*)", re.ASCII)


def options(section: type[Section] = RunConfig, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Section's name, option's name and default of all plain options; a mixture's sources are `data`."""
    own = set(vars(section).get("__annotations__", {})) if issubclass(section, Options) else set()
    for name, field in section.model_fields.items():
        if name == "method":
            continue
        if name in own:
            method = section.model_fields["method"].default
            yield f"{prefix}:{method}", name, field.get_default()
            continue
        tables = sections_of(field.annotation)
        for table in tables:
            yield from options(table, "data" if name == "sources" else name)
        if prefix and not tables and name not in ("source", "kind"):
            yield prefix, name, field.get_default(call_default_factory=True)


class Settings(ast.NodeVisitor):
    """Collects what a file sets: the table as far as it is known, else None, the name, and the value."""

    def __init__(self) -> None:
        self.found: defaultdict[str, list[tuple[str | None, Any]]] = defaultdict(list)
        self._table: str | None = None

    def _take(self, table: str | None, name: str, node: ast.expr) -> None:
        self.found[name].append((table, _literal(node)))
        outer, self._table = self._table, "data" if name == "sources" else name
        self.visit(node)
        self._table = outer

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                self._take(self._table, key.value, value)
                table, _, name = key.value.replace(".", "__").rpartition("__")
                if table:
                    self._take(table.rpartition("__")[2], name, value)
            else:
                self.visit(value)

    def visit_Call(self, node: ast.Call) -> None:
        self.visit(node.func)
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        for argument in node.args:
            self.visit(argument)
        for keyword in node.keywords:
            table, _, name = (keyword.arg or "").rpartition("__")
            self._take(table or _table_of(called, node), name, keyword.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        if not isinstance(node.value, str):
            return
        for table, name, value in _of_text(node.value):
            self.found[name].append((table, value))


# Models of sections, and helpers of tests that take a section's options.
_TABLES = {
    "in_loss": "algorithm",
    "EnvironmentOptions": "environment",
    "Setting": "settings",
    "Rollout": "rollout",
    "FileData": "data",
    "file_data": "data",
    "FunctionData": "data",
    "ReasoningGymData": "data",
    "gym_data": "data",
    "function_data": "data",
    "CountdownData": "data",
    "ArithmeticData": "data",
    "Reward": "reward",
    "RewardFunction": "functions",
    "Optimizer": "optimizer",
    "Model": "model",
    "Parallel": "parallel",
    "TeacherOptions": "teacher",
    "SGLangOptions": "engine",
    "EmbeddedOptions": "engine",
    "with_slurm": "slurm",
}


def _table_of(called: str, call: ast.Call) -> str | None:
    """The table whose options are a call's keywords; of a method its own."""
    if called != "a_method":
        return _TABLES.get(called)
    name = _literal(call.args[0]) if call.args else "rapo"
    return f"algorithm:{name}" if isinstance(name, str) else None


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return COMPUTED


def _of_text(text: str) -> Iterator[tuple[str | None, str, Any]]:
    """`section.option=value`, or the tables of a piece of TOML."""
    if setting := SETTING.fullmatch(text):
        table, _, name = setting[1].rpartition(".")
        yield table.rpartition(".")[2], name, setting[2]
    elif "\n" in text and "=" in text:
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            return
        for table, inner in values.items():
            if isinstance(inner, dict):
                yield from ((table, name, value) for name, value in inner.items())


def all_settings() -> dict[str, list[tuple[str | None, Any]]]:
    settings = Settings()
    for file in sorted(TESTS.rglob("*.py")):
        if file.name not in OF_CONFIGURATION:
            settings.visit(ast.parse(file.read_text(encoding="utf-8")))
    for method, paper in PAPERS.items():
        for options in (paper.base, *paper.options):
            for name, value in options.items():
                settings.found[name].append((f"algorithm:{method}", value))
    return settings.found


def is_set(section: str, name: str, default: Any, found: list[tuple[str | None, Any]], alone: bool) -> bool:
    """Whether a test gives the option another value. A name alone (no table) counts where it is unique."""
    tables = [section]
    if section == "algorithm":
        tables += [f"algorithm:{method}" for method in METHODS]
    return any(
        (table in tables or (table is None and alone)) and _as_text(value) != _as_text(default)
        for table, value in found
    )


def _as_text(value: Any) -> str:
    """The same for a value and for how it is written in TOML."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip('"')


def test_every_option_is_set_by_a_test() -> None:
    found, declared = all_settings(), list(dict.fromkeys((s, n) for s, n, _ in options()))
    names = [name for _, name in declared]
    missing = {
        f"{section}.{name}": None
        for section, name, default in options()
        if not is_set(section, name, default, found[name], alone=names.count(name) == 1)
    }
    assert not missing, f"no test sets {', '.join(missing)}; write one that fails without the option"
