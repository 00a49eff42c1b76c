"""Code of the user's own is part of what a run or an evaluation was begun with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rapo.config import RunConfig
from megatron_rapo.config.code import addresses_in, modules_of
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.held_out import code_of
from megatron_rapo.record.configurations import read_configurations
from megatron_rapo.record.standing import check_standing
from megatron_rapo.record.start import begin
from megatron_rapo.report.configuration import _run_options
from tests.unit.test_record import VERSIONS, config, identity, run_until

REWARDS = """
from my_helpers import near
from megatron_rapo import Score
def score(response, problem):
    return near(response)
"""
HELPERS = "import json, other_helpers\ndef near(response):\n    return 0.5\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_rewards.py").write_text(REWARDS)
    (folder / "my_helpers.py").write_text(HELPERS)
    (folder / "unrelated.py").write_text("x = 1\n")
    return folder


def test_a_module_and_what_it_imports_beside_it_are_told_by_content(folder: Path) -> None:
    before = modules_of("my_rewards:score", [folder])
    assert list(before) == ["my_helpers", "my_rewards"]
    assert "my_rewards" not in sys.modules
    (folder / "unrelated.py").write_text("x = 2\n")
    (folder / "my_helpers.py").write_text(HELPERS.replace("    return", "    # near enough\n    return  "))
    moved = folder.rename(folder.with_name("elsewhere"))
    assert modules_of("my_rewards:score", [moved]) == before, "comments, layout and places count"
    (moved / "my_helpers.py").write_text(HELPERS.replace("0.5", "0.6"))
    now = modules_of("my_rewards:score", [moved])
    assert [name for name in before if now[name] != before[name]] == ["my_helpers"]
    (moved / "other_helpers.py").write_text("")
    assert list(modules_of("my_rewards:score", [moved])) == ["my_helpers", "my_rewards", "other_helpers"]


def test_a_package_is_followed_within_itself_installed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "__init__.py": "from .names import NAME\n",
        "names.py": "import numpy\nNAME = 1\n",
        "inner/__init__.py": "",
        "inner/rewards.py": "from ..helpers import near\nfrom . import plain\nscore = near\n",
        "inner/plain.py": "",
        "helpers.py": "near = len\n",
        "unused.py": "",
        "broken.py": "def",
    }
    for name, text in files.items():
        (tmp_path / "my_package" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "my_package" / name).write_text(text)
    beside = modules_of("my_package.inner.rewards:score", [tmp_path])
    used = ["helpers", "inner", "inner.plain", "inner.rewards", "names"]
    assert list(beside) == ["my_package", *(f"my_package.{name}" for name in used)]
    assert modules_of("my_package.inner.rewards:score", []) == {}
    monkeypatch.syspath_prepend(tmp_path)
    assert modules_of("my_package.inner.rewards:score", []) == beside
    assert list(modules_of("my_package.broken:score", [])) == [
        "my_package",
        "my_package.broken",
        "my_package.names",
    ]


def test_what_an_editable_installation_finds_is_followed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Finder:
        """As pip leaves one: it knows its module's place, which is in no folder of sys.path."""

        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> Any:
            if name == "my_rewards":
                return importlib.util.spec_from_file_location(name, folder / "my_rewards.py")
            return None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert list(modules_of("my_rewards:score", [])) == ["my_rewards"]


def test_the_package_itself_is_no_users_code(folder: Path) -> None:
    """Also where the configuration stands beside it."""
    root = Path(__file__).parents[2]
    assert list(modules_of("my_rewards:score", [folder, root])) == ["my_helpers", "my_rewards"]
    assert modules_of("megatron_rapo.reward.format:score", [root]) == {}


def test_addresses_are_found_wherever_options_name_them() -> None:
    values = {
        "reward.functions": [{"use": "a:b", "weight": 1.0}, {"use": "math"}],
        "environment.tools": ["c.d:e", "python"],
        "data.problems": "my_data:problems",
        "evaluate.data": [{"source": "function", "problems": "f:g", "reward": {"function": "h:i"}}],
        "rollout.engine.urls": ["http://x:1"],
    }
    assert addresses_in(values) == ["a:b", "c.d:e", "h:i"]


def with_reward(directory: Path, folder: Path, **checkpoint: Any) -> RunConfig:
    return config(
        directory,
        run={"code": [str(folder)]},
        reward={"function": "my_rewards:score"},
        checkpoint=checkpoint,
    )


def test_a_run_goes_on_with_other_code_only_if_it_is_asked_to(tmp_path: Path, folder: Path) -> None:
    directory = tmp_path / "run"
    run_until(with_reward(directory, folder), 5)
    assert check_standing(with_reward(directory, folder)) == ""
    (folder / "my_helpers.py").write_text(HELPERS.replace("0.5", "0.6"))
    with pytest.raises(RapoError) as told:
        check_standing(with_reward(directory, folder))
    assert str(told.value) == (
        f"run.directory = {directory} would go on with other code than before: reward.function = "
        '"my_rewards:score", whose my_helpers changed; restore it, or ask for it: --accept-changes '
        "reward.function"
    )
    asked = with_reward(directory, folder, accept_changes=["reward.function"])
    assert check_standing(asked) == ""
    lines = begin(asked, identity(asked), VERSIONS, 5)
    assert lines[-1] == (
        '  with other code than before: reward.function = "my_rewards:score", whose my_helpers changed'
    )
    assert [entry.step for entry in read_configurations(directory)] == [0, 5]
    assert _run_options(directory)["reward.function"] == (
        '"my_rewards:score"; after step 5: other code in my_helpers'
    )
    assert check_standing(with_reward(directory, folder)) == "", "a job that requeues itself goes on"


def test_another_function_is_another_option_alone(tmp_path: Path, folder: Path) -> None:
    directory = tmp_path / "run"
    run_until(with_reward(directory, folder), 5)
    (folder / "my_rewards.py").rename(folder / "their_rewards.py")
    other = config(directory, run={"code": [str(folder)]}, reward={"function": "their_rewards:score"})
    with pytest.raises(
        RapoError, match=r'with other options than before: reward.function = "my_rewards:score"'
    ):
        check_standing(other)


def test_a_run_that_kept_no_code_goes_on(tmp_path: Path, folder: Path) -> None:
    directory = tmp_path / "run"
    run_until(with_reward(directory, folder), 5)
    file = directory / "configurations.jsonl"
    text = file.read_text()
    file.write_text(text[: text.index(', "code"')] + "}\n")
    (folder / "my_helpers.py").write_text("")
    assert check_standing(with_reward(directory, folder)) == ""


def judged_by(run: RunConfig) -> Any:
    return [SimpleNamespace(plan=run.verifier_of(run.data))]


def test_an_evaluation_has_the_code_that_judges_it_and_makes_its_episodes(folder: Path) -> None:
    evaluated = config(
        folder,
        run={"code": [str(folder)]},
        data={"source": "countdown", "reward": {"function": "my_rewards:score"}},
        environment={"use": "my_helpers:Near"},
    )
    (folder / "my_helpers.py").write_text(
        HELPERS + "class Near:\n    async def run(self, *_):\n        pass\n"
    )
    judged: Any = [SimpleNamespace(plan=evaluated.verifier_of(evaluated.data))]
    before = code_of(evaluated, judged)
    assert list(before) == ["my_helpers:Near", "my_rewards:score"]
    (folder / "my_rewards.py").write_text(REWARDS + "more = 1\n")
    now = code_of(evaluated, judged_by(evaluated))
    assert [address for address in before if now[address] != before[address]] == ["my_rewards:score"]
    assert (
        code_of(config(folder), [SimpleNamespace(plan=config(folder).verifier_of(config(folder).data))]) == {}
    )
