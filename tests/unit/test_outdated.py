"""tools/outdated.py: what pip says is behind, and which requirements hold it there; pip is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEWEST = {"tokenizers": ("0.22.2", "0.24.0"), "free": ("1.0", "2.0"), "Under_score": ("1.0", "3.0")}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A stand-in for an environment's Python: it lists packages as pip does, and says where they lie."""
    packages = tmp_path / "packages"
    install(packages, "transformers", "5.1", "tokenizers<0.24,>=0.22", "free>=1", "free<2; extra == 'old'")
    install(packages, "other", "0.5", "under-score==1.0", "free<2; python_version < '3'")
    listing = [{"name": n, "version": v, "latest_version": latest} for n, (v, latest) in NEWEST.items()]
    script = tmp_path / "python"
    script.write_text(
        f"#!{sys.executable}\nimport sys\n"
        f"print({json.dumps(listing)!r} if sys.argv[1:4] == ['-m', 'pip', 'list'] else "
        f"{json.dumps([str(packages)])!r})\n"
    )
    script.chmod(0o755)
    return script


def install(packages: Path, name: str, version: str, *requires: str) -> None:
    folder = packages / f"{name}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {text}" for text in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def test_each_package_is_told_with_what_holds_it(python: Path) -> None:
    command = [sys.executable, str(ROOT / "tools/outdated.py"), "--python", str(python)]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=60, text=True).stdout
    rows = [line.split(maxsplit=3) for line in told.splitlines()]
    assert rows == [
        ["package", "installed", "newest", "held by"],
        ["tokenizers", "0.22.2", "0.24.0", "transformers (<0.24,>=0.22)"],
        ["free", "1.0", "2.0"],
        ["Under_score", "1.0", "3.0", "other (==1.0)"],
    ]
