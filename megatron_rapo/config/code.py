"""Code of the user's own that options name, by content: what goes on is told where it is another."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from megatron_rapo.fingerprint import files_fingerprint, fingerprint
from megatron_rapo.user_code import ADDRESS

_GIVES_DATA = "problems"  # the option of data sources
_OURS = "megatron_rapo"


def addresses_in(values: Any) -> list[str]:
    """The `module:name` texts in options' values, sorted.

    Without functions that give data: what they give is compared itself.
    """
    return sorted(set(_addresses(values)))


def modules_of(address: str, folders: Sequence[Path]) -> dict[str, str]:
    """A fingerprint of each module that an address leads to: its own, and those of the user that it imports.

    The user's are those in the folders, and in the package that the address names. Nothing is imported for
    it. Comments and layout of a file do not count; files that are no Python do not count at all.

    Args:
        address: `module:name`.
        folders: of the user's own modules (`run.code`).
    """
    own = address.partition(":")[0]
    files: dict[str, Path] = {}
    waiting = [own]
    while waiting:
        name = waiting.pop()
        if name in files or (file := _file(name, folders, own.partition(".")[0])) is None:
            continue
        files[name] = file
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        for imported in (name, *_imports(file, package)):
            parts = imported.split(".")
            waiting += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return {name: _fingerprint(file) for name, file in sorted(files.items())}


def _addresses(values: Any, key: str = "") -> Iterator[str]:
    if isinstance(values, Mapping):
        for inner, value in values.items():
            yield from _addresses(value, inner)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _addresses(value, key)
    elif isinstance(values, str) and key.rpartition(".")[2] != _GIVES_DATA and ADDRESS.fullmatch(values):
        yield values


def _file(name: str, folders: Sequence[Path], package: str) -> Path | None:
    """The file of a module of the user's; None of other ones, and of folders without one."""
    top = name.partition(".")[0]
    if top == _OURS:
        return None
    spec = _found(name, [str(folder) for folder in folders])
    if spec is None and top == package:
        spec = _found(name, sys.path) or _installed(name)
    return Path(spec.origin) if spec is not None and spec.has_location and spec.origin else None


def _found(name: str, path: Sequence[str]) -> ModuleSpec | None:
    """Looked for as Python does, without its packages being imported."""
    spec, parts = None, name.split(".")
    for length in range(1, len(parts) + 1):
        spec = PathFinder.find_spec(".".join(parts[:length]), path)
        if spec is None:
            return None
        path = spec.submodule_search_locations or []
    return spec


def _installed(name: str) -> ModuleSpec | None:
    """By the finders that an editable installation adds."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, ValueError):  # there is no such package, which `load` tells
        return None


def _imports(file: Path, package: str) -> Iterator[str]:
    """What may be modules that a file imports: `from a import b` may mean `a.b`."""
    tree = _tree(file)
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)


def _fingerprint(file: Path) -> str:
    tree = _tree(file)
    return files_fingerprint([file]) if tree is None else fingerprint([ast.unparse(tree)])


def _tree(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # compiled, or what `load` tells
        return None
