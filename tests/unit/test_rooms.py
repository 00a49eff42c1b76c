"""The package's rooms import only downwards, in the order that docs/architecture.md writes down."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "megatron_rapo"


def rooms() -> set[str]:
    """The package's folders and modules."""
    entries = (path for path in PACKAGE.iterdir() if path.is_dir() or path.suffix == ".py")
    return {path.stem for path in entries if not path.stem.startswith("__")}


def levels() -> list[list[str]]:
    """The page's order of rooms, from the top: one list a line of its block."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```rooms\n(.*?)```", page, re.DOTALL)
    assert block is not None, "docs/architecture.md has no block ```rooms"
    return [line.split() for line in block[1].splitlines()]


def libraries() -> dict[str, set[str]]:
    """The page's table of libraries: which rooms may import each."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| ((?:`\w+`(?:, )?)+) \|$", page, re.MULTILINE)
    return {library: set(re.findall(r"\w+", named)) for library, named in rows}


def imports(source: str) -> set[str]:
    """All modules that a module imports, late imports too: `from a import b` counts as `a.b`."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import, line {node.lineno}"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_by_file() -> Iterator[tuple[Path, str, set[str]]]:
    """Every module of the package with its room and what it imports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if room != "__init__":
            yield path, room, imports(path.read_text(encoding="utf-8"))


def room_of(module: str) -> str | None:
    package, _, rest = module.partition(".")
    name = rest.split(".")[0]
    return name if package == PACKAGE.name and name in rooms() else None


def upward_imports(source: str, room: str, rank: dict[str, int]) -> list[str]:
    """The imports that do not go down; a room that the page does not name counts as the highest."""
    targets = {module: room_of(module) for module in imports(source)}
    return [name for name, to in targets.items() if to not in (None, room) and rank[room] <= rank.get(to, 0)]


def rank() -> dict[str, int]:
    """Height of each room; those on one line are equal and may not import each other."""
    return {room: -height for height, line in enumerate(levels()) for room in line}


def test_the_page_names_every_room_once() -> None:
    named = [room for line in levels() for room in line]
    assert sorted(named) == sorted(rooms()), (
        "give each room its line in docs/architecture.md, and no other one"
    )


def test_imports_go_downwards_only() -> None:
    heights = rank()
    upward = {
        str(path.relative_to(ROOT)): found
        for path, room, _ in imports_by_file()
        if room in heights and (found := upward_imports(path.read_text(encoding="utf-8"), room, heights))
    }
    assert not upward, "imports of a room that does not stand below"


@pytest.mark.parametrize("library", sorted(libraries()))
def test_a_library_stays_in_its_rooms(library: str) -> None:
    allowed = libraries()[library]
    strays = {
        str(path.relative_to(ROOT))
        for path, room, modules in imports_by_file()
        if room not in allowed and any(f"{module}.".startswith(f"{library}.") for module in modules)
    }
    assert not strays, f"{library} belongs to {sorted(allowed)} (docs/architecture.md)"


def test_the_page_keeps_megatron_and_engines_apart() -> None:
    assert libraries()["megatron"].isdisjoint({"rollout", "reward", "loss", "data", "config"})
    assert libraries()["httpx"] == {"engines"}


@pytest.mark.parametrize(
    "source",
    [
        "from megatron_rapo.loop import train",
        "import megatron_rapo.rollout.pool",
        "def late():\n    from megatron_rapo import job",
        "from megatron_rapo.weights.load import load_weights",  # of the same line
    ],
)
def test_an_upward_import_is_seen(source: str) -> None:
    assert upward_imports(source, "loss", rank())


def test_a_downward_import_is_none() -> None:
    assert not upward_imports("from megatron_rapo.config import Model\nimport torch", "loss", rank())
