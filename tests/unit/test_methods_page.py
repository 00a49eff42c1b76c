"""The lists of methods: on the page, whose tables are current, and on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rapo.cli import main
from megatron_rapo.methods.described import described, example
from megatron_rapo.methods.named import METHODS

ROOT = Path(__file__).parents[2]


def test_the_pages_tables_are_current() -> None:
    tool = [sys.executable, "tools/document_methods.py", "--check"]
    assert subprocess.run(tool, cwd=ROOT, timeout=60).returncode == 0, "run tools/document_methods.py"


def test_each_method_says_what_it_changes() -> None:
    said = [described(name).changes for name in METHODS]
    assert all(changes.endswith(".") for changes in said)
    assert len(set(said)) == len(said)


def test_what_a_method_needs_is_told() -> None:
    assert described("grpo").needs == ("a reference model",)
    assert described("dr_grpo").needs == ()
    assert described("otc").needs == ("fact `calls`",)
    assert described("dph_rl").needs == ("a reference model", "column `base_success`")
    assert described("distill").needs == ("a teacher",)
    assert described("copg").needs == (
        "a reference model",
        "the policy once more a step",
        "and once more each further update",
    )
    assert set(described("d3s").hooks) == {"choose", "advantages", "weigh", "learn", "state"}


@pytest.mark.parametrize("name", METHODS)
def test_an_example_of_each_can_be_made(name: str) -> None:
    assert example(name).options.method == name


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines() if not line.startswith(" ")] == list(METHODS)
    assert "needs a reference model, column `base_success`\n" in listed


def test_one_method_is_told_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "bapo"]) == 0
    assert "ρ0 · Σ |min(w A, clip(w, c_low, c_high) A)|" in capsys.readouterr().out
    assert main(["methods", "bappo"]) == 1
    assert "there is no method 'bappo'; `megatron-rapo methods` lists" in capsys.readouterr().err
