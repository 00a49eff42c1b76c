"""Which packages of an environment are behind, and what holds them there.

    .venv/bin/python tools/outdated.py
    .venv/bin/python tools/outdated.py --python .venv-sglang/bin/python

pip says what is newest for the environment's Python, from the index that it is configured with. A package is
held by those installed beside it whose requirements exclude its newest release; the others may move, under
what constraints.txt says of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LIMIT_S = 600  # pip asks about one package a second


@dataclass(frozen=True)
class Behind:
    """A package that is not the newest; `held_by` are the requirements that exclude the newest."""

    name: str
    installed: str
    newest: str
    held_by: tuple[str, ...]


def newest_releases(python: Path) -> list[dict[str, str]]:
    """pip's `name`, `version` and `latest_version` of each package of this Python that is behind."""
    listing = [str(python), "-m", "pip", "list", "--outdated", "--format", "json"]
    found = subprocess.run(listing, stdout=subprocess.PIPE, check=True, timeout=LIMIT_S)
    return json.loads(found.stdout)


def packages_of(python: Path) -> list[Distribution]:
    """What is installed for this Python."""
    where = [str(python), "-c", "import json, sys; print(json.dumps(sys.path[1:]))"]
    found = subprocess.run(where, stdout=subprocess.PIPE, check=True, timeout=LIMIT_S)
    return list(distributions(path=json.loads(found.stdout)))


def behind(newest: Iterable[dict[str, str]], installed: Iterable[Distribution]) -> Iterator[Behind]:
    """What pip has found, with the reasons."""
    requirements = [
        (distribution, requirement)
        for distribution in installed
        for requirement in map(Requirement, distribution.requires or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    for entry in newest:
        held_by = {
            f"{distribution.name} ({requirement.specifier})"
            for distribution, requirement in requirements
            if canonicalize_name(requirement.name) == canonicalize_name(entry["name"])
            and not requirement.specifier.contains(entry["latest_version"], prereleases=True)
        }
        yield Behind(entry["name"], entry["version"], entry["latest_version"], tuple(sorted(held_by)))


def table(rows: Iterable[Behind]) -> str:
    """A line a package, in columns."""
    cells = [("package", "installed", "newest", "held by")]
    cells += [(row.name, row.installed, row.newest, ", ".join(row.held_by)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the environment's Python")
    python = parser.parse_args().python
    print(table(behind(newest_releases(python), packages_of(python))))


if __name__ == "__main__":
    main()
