"""The command line: which words are configurations, and what is said to half a command."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megatron_rapo.cli import COMMANDS, main
from megatron_rapo.cli.overrides import take_configuration


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(words)
    take_configuration(options)
    return options


@pytest.mark.parametrize(
    "words",
    [
        ["a.toml", "b.toml", "--set", "run.steps=1", "run.seed=2"],
        ["--set", "run.steps=1", "run.seed=2", "a.toml", "b.toml"],
        ["--set", "run.steps=1", "--set", "run.seed=2", "a.toml", "b.toml"],
        ["a.toml", "--set", "run.steps=1", "run.seed=2", "b.toml"],
        ["--set=run.steps=1", "a.toml", "b.toml", "--set=run.seed=2"],
    ],
)
def test_settings_and_configurations_stand_in_any_order(words: list[str]) -> None:
    options = parsed("train", *words)
    assert options.configs == [Path("a.toml"), Path("b.toml")]
    assert options.set == ["run.steps=1", "run.seed=2"]


def test_a_file_of_another_name_is_a_configuration_too(tmp_path: Path) -> None:
    file = tmp_path / "configuration"
    file.touch()
    assert parsed("train", "--set", "run.steps=1", str(file)).configs == [file]


def test_a_setting_whose_value_is_a_file_stays_one() -> None:
    options = parsed("train", "a.toml", "--set", "model.config=c.toml", "run.steps")
    assert (options.configs, options.set) == ([Path("a.toml")], ["model.config=c.toml", "run.steps"])


def test_a_configuration_behind_data_is_one() -> None:
    options = parsed("evaluate", "--data", "countdown", "a.jsonl", "run.toml")
    assert (options.configs, options.data) == ([Path("run.toml")], ["countdown", "a.jsonl"])


@pytest.mark.parametrize("command", [["train"], ["train", "--set", "run.steps=1"], ["doctor", "--mismatch"]])
def test_a_command_without_its_configuration_is_refused(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 1
    assert f"megatron-rapo {command[0]} needs a configuration; name a TOML file" in capsys.readouterr().err


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    listed = capsys.readouterr().err
    for command in ("train", "certify", "evaluate", "compare", "report", "samples", "doctor", "convert"):
        assert f"    {command} " in listed
    assert main(["convert"]) == 2
    assert "to-megatron" in capsys.readouterr().err
