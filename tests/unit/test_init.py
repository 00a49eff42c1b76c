"""`megatron-rapo init`: the files of each kind of project, and where it refuses to write."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rapo.cli import main
from megatron_rapo.config import load_config
from megatron_rapo.init.project import KINDS

ROOT = Path(__file__).parents[2]
OWN = {"reward": "my_rewards.py", "method": "my_method.py", "environment": "my_environment.py"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_project_is_whole_and_its_own_test_passes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a project"
    assert main(["init", str(folder), "--kind", kind]) == 0
    assert f"megatron-rapo train {folder}/configuration.toml" in capsys.readouterr().out
    files = {path.name for path in folder.iterdir()}
    assert files == {"README.md", "configuration.toml", "tiny-countdown", OWN[kind], f"test_{OWN[kind]}"}
    config = load_config([folder / "configuration.toml"], [])
    assert config.model.path == folder / "tiny-countdown"
    assert config.run.directory == folder / "run"
    assert config.run.code == [folder]
    assert (config.model.path / "model.safetensors").stat().st_size > 100_000
    assert not (folder / "tiny-countdown").is_symlink()
    assert "FOLDER" not in (folder / "README.md").read_text()
    passed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert passed.returncode == 0, passed.stdout


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_there_already_stays(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "mine" if what == "file" else tmp_path / "mine" / "kept.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    assert main(["init", str(tmp_path / "mine"), "--kind", "reward"]) == 1
    assert "mine is there already, and not empty; name a new folder" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert len(list(tmp_path.rglob("*"))) == (1 if what == "file" else 2)


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert main(["init", str(tmp_path), "--kind", "method"]) == 0


def test_the_pages_build_the_same_files() -> None:
    templates = ROOT / "megatron_rapo/init"
    page = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    block = re.search(r"```python\n(# my_method\.py\n.*?)```", page, re.DOTALL)
    assert block is not None
    assert (templates / "method/my_method.py").read_text(encoding="utf-8") == block[1]
    for kind, file in (("reward", "my_rewards.py"), ("method", "my_method.py")):
        for name in (file, f"test_{file}"):
            example = ROOT / f"examples/own_{kind}" / name
            assert (templates / kind / name).read_bytes() == example.read_bytes(), name
