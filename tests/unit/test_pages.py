"""Every example of README.md, docs/ and examples/ is run by a test: those without one elsewhere, here."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rapo.cli import COMMANDS
from megatron_rapo.cli.overrides import take_configuration
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.options import option_names
from tests.own_method import write_method
from tests.stored_evaluations import store_evaluation
from tests.unit.test_samples import W, config, of, record

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
    *sorted((ROOT / "megatron_rapo/init").glob("*/README.md")),
]
# The languages of a page's blocks, and the tests that run all of them.
RUN_BY = {
    "adapters.md": ({"toml"}, "test_pages.py"),
    "ahead.md": ({"toml"}, "test_ahead.py"),
    "configuration.md": ({"toml"}, "test_configuration.py"),
    "data.md": ({"toml", "jsonl", "python"}, "test_data_page.py"),
    "distillation.md": ({"toml"}, "test_pages.py"),
    "engines.md": ({"toml", "python"}, "test_pages.py, test_own_engine.py"),
    "environments.md": ({"python", "toml"}, "test_testing.py, test_tool_use.py, test_pages.py"),
    "evaluation.md": ({"python"}, "test_pages.py"),
    "families.md": ({"python"}, "test_families.py"),
    "gateway.md": ({"python", "toml"}, "test_program.py, test_pages.py"),
    "methods.md": (
        {"python", "toml"},
        "test_own_method.py, test_check_method.py, test_asking.py, test_pages.py",
    ),
    "models.md": ({"toml"}, "test_pages.py"),
    "python.md": ({"python"}, "tests/end_to_end/test_init.py"),
    "rewards.md": ({"python", "toml"}, "test_rewards_page.py"),
    "samples.md": ({"python"}, "test_pages.py"),
    "sft.md": ({"toml"}, "test_pages.py"),
    "shared-prompts.md": ({"toml"}, "test_pages.py"),
    "studies.md": ({"toml"}, "test_study.py"),
}
LANGUAGES = {"python", "toml", "jsonl", "json", "bash", "sh", "console"}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def test_every_block_of_code_is_run_by_a_test() -> None:
    """A page, or a language of one, that is new needs its test, and its place in RUN_BY."""
    found = {}
    for page in PAGES:
        languages = re.findall(r"^ *```(\w+)$", page.read_text(encoding="utf-8"), re.M)
        if of_code := LANGUAGES.intersection(languages):
            found[page.name] = of_code
    assert found == {page: languages for page, (languages, _) in RUN_BY.items()}
    for _, (_, tests) in RUN_BY.items():
        for test in tests.split(", "):
            assert (ROOT / test).exists() or (Path(__file__).parent / test).exists(), test


# Commands


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Of each command, by its name."""
    commands = argparse.ArgumentParser().add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    return dict(commands.choices)


def mentioned() -> Iterator[tuple[str, str]]:
    """Commands in the text."""
    for page in PAGES:
        for command in re.findall(r"`megatron-rapo ([^`\n]+)`", page.read_text(encoding="utf-8")):
            yield page.name, command


def shown() -> Iterator[tuple[str, str]]:
    """Commands in blocks; what is in brackets may be left out."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for block in re.findall(r"^ *```\w*\n(.*?)^ *```$", text, re.M | re.S):
            for command in re.findall(r"^(?:.*\s)?megatron-rapo ([a-z].*)$", block, re.M):
                yield page.name, re.sub(r"\s+#.*|\s*\[.*", "", command)


@pytest.mark.parametrize(("page", "command"), sorted(set(mentioned())))
def test_a_command_in_the_text_has_these_options(page: str, command: str) -> None:
    parser = parsers()[command.split()[0]]
    assert set(re.findall(r"--[\w-]+", command)) <= parser._option_string_actions.keys()


@pytest.mark.parametrize(("page", "command"), sorted(set(shown())))
def test_a_command_in_a_block_is_taken_as_it_stands(page: str, command: str) -> None:
    name, *words = shlex.split(command)
    options = parsers()[name].parse_args(words)
    take_configuration(options)
    for setting in getattr(options, "set", []):
        known = {*option_names(RunConfig), "algorithm.flatten_floor"}
        wrong = {"rollout.promts_per_step"} if page == "README.md" else set()
        assert setting.partition("=")[0] in known | wrong


# Configurations


@pytest.mark.parametrize(
    "page",
    [
        *("distillation.md", "engines.md", "environments.md", "gateway.md", "methods.md", "sft.md"),
        "adapters.md",
        "models.md",
        "shared-prompts.md",
    ],
)
def test_configurations_of_a_page_are_valid(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])
    write_method(tmp_path)
    base = {
        "run.directory": "run",
        "run.steps": 1,
        "model.path": "models/tiny",
        "data.source": "countdown",
        "rollout": {"prompts_per_step": 8, "max_response_tokens": 8},
    }
    found = blocks(ROOT / "docs" / page, "toml")
    assert found
    for number, block in enumerate(found):
        overlay = tmp_path / f"{number}.toml"
        overlay.write_text(block)
        config = load_config([base, overlay])
        for section, options in tomllib.loads(block).items():
            chosen = getattr(config, section)
            for name, value in options.items():
                if not isinstance(value, dict):
                    read = getattr(chosen, name)
                    assert (str(read) if isinstance(read, Path) else read) == value
    sys.modules.pop("my_method", None)


# Python


def test_an_evaluation_is_read_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store_evaluation(tmp_path / "evaluations/base", [*range(8)] * 3)
    names: dict = {}
    [block] = blocks(ROOT / "docs/evaluation.md", "python")
    exec(block, names)
    assert names["counts"].correct.tolist() == [*range(8)] * 3
    assert names["narrow"].column_names == ["problem", "length"]
    assert names["batch"].num_rows == 8, "of the one problem alone"


def test_samples_are_read_as_the_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/demo").mkdir(parents=True)
    for step in (1, 2):
        record(config(tmp_path / "runs/demo"), step, [of(W, W), of(W)])
    names: dict = {}
    [block] = blocks(ROOT / "docs/samples.md", "python")
    exec(block, names)
    assert [row["step"] for row in names["rows"]] == [1, 1, 1, 2, 2, 2]
