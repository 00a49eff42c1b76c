"""`check_method` passes what is sound, and fails by name what is not: each fault is planted once."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.methods.gspo import GSPO
from megatron_rapo.methods.rapo import RAPO
from megatron_rapo.testing import a_group, check_method
from tests.own_method import PAGE, write_method


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, *changes: tuple[str, str]) -> Any:
    """The class of docs/methods.md, with texts in it changed."""
    write_method(folder, *changes)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("my_method").RunningBaseline


def test_the_pages_method_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = own(tmp_path, monkeypatch)
    check_method(method, groups=[a_group(1.0, 0.0, None), a_group(0.5, 0.25, tokens=9)])


def test_the_pages_test_of_it_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, monkeypatch)
    [_, block, _] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (RAPO, {"divergence_coefficient": 0.1}),
        (GSPO, {"importance_correction": "truncated", "importance_cap": 1.2}),
    ],
)
def test_named_methods_are_sound(method: Any, options: dict[str, Any]) -> None:
    check_method(method, options)


VALUE = "return over.square(), {"
LAST = "    def terms"


def hook(source: str) -> tuple[str, str]:
    return (LAST, f"    {source}\n\n{LAST}")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (
            VALUE,
            "return over.detach() * over, {",
            r"  term Overconfidence: its gradient along a random direction is \S+, and finite differences",
        ),
        (
            VALUE,
            "return over.square() / len(over), {",
            r"  in chunks of 1 token, by term Overconfidence: the loss is \S+ in place of \S+; what a term",
        ),
        (
            VALUE,
            "return over - over.detach() + (over.detach() - over.detach().mean()) ** 2, {",
            r"  with each sequence in a microbatch of its own, by term Overconfidence: ",
        ),
        (
            'self.baseline = state["baseline"]',
            "pass",
            r"  state \{'baseline': 0\.\d+\} is \{'baseline': 0\.0\} after restore",
        ),
        (
            'return {"baseline": self.baseline}\n\n    def restore',
            "return {}\n\n    def restore(self, state) -> None:\n        pass\n\n    def unused",
            r"  advantages of the step after restore: 1\.0, but 0\.\d+ where the run goes on; let state have",
        ),
        (
            "return rewards - before",
            "return rewards - before + 0.1 * np.arange(len(groups))[:, None]",
            r"  with the groups in reverse order: the loss is .*; hooks must treat groups alike",
        ),
        (
            "return rewards - before",
            "return rewards - before + np.random.default_rng().random()",
            r"  when it is computed again: the loss is .*; a hook must not draw unseeded random numbers",
        ),
        (
            *hook("def weigh(self, tokens):\n        return tokens.weights / tokens.weights.sum()"),
            r"  on 2 context-parallel ranks: .*\n  on 2 data-parallel ranks: the loss .*, and weigh gather",
        ),
        (
            "return rewards - before",
            "return [[len(one.episode.answer) for one in group.episodes] for group in groups]",
            r"my_method\.py, line \d+, reads `answer` of a response, .*`reads_responses = True`",
        ),
        ("token.log_prob", "token.forward_kl", r"fails on 3 tokens: TypeError.*needs nothing"),
        ("def __call__", "def call", r"term Overconfidence of .* fails on 3 tokens: NotImplementedError"),
    ],
)
def test_what_is_not_sound_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str, told: str
) -> None:
    method = own(
        tmp_path, monkeypatch, (before, after), ("import math\n", "import math\nimport numpy as np\n")
    )
    with pytest.raises(AssertionError, match=told):
        check_method(method, {"penalty": 0.5})


def test_weights_that_are_gathered_are_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathers = "return tokens.weights / tokens.of_all_ranks(tokens.weights).sum()"
    check_method(own(tmp_path, monkeypatch, hook(f"def weigh(self, tokens):\n        {gathers}")))


def test_a_detach_that_is_meant_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = own(tmp_path, monkeypatch, (VALUE, "return over.detach() * over, {"))
    check_method(method, gradient=False)


def test_an_option_that_it_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="penality"):
        check_method(own(tmp_path, monkeypatch), {"penality": 0.5})
