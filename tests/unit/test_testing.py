"""What tests of a user's own environment are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_rapo import Episode, Generate, Problem, Transcript
from megatron_rapo.testing import a_problem, run_environment


class Asks:
    """Asks with these arguments, one call each."""

    def __init__(self, *calls: dict) -> None:
        self.calls = calls
        self.turns: list = []

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        transcript = Transcript(problem.token_ids)
        for number, call in enumerate(self.calls):
            self.turns.append(await generate(transcript.token_ids, **{"turn": number, **call}))
            transcript.add_turn(self.turns[-1])
            transcript.add_given(generate.encode("|"))
        return Episode((transcript.sequence(),), generate.decode(transcript.token_ids), facts={"seed": seed})


def test_turns_are_sampled_in_order_and_what_is_given_is_not() -> None:
    episode = run_environment(Asks({}, {}), a_problem("2+3=", "5", level=1), turns=["six", "5"], seed=7)
    [sequence] = episode.sequences
    assert episode.answer == "2+3=six|5|"
    assert "".join(chr(token) for token in sequence.token_ids[sequence.sampled]) == "six5"
    assert episode.facts == {"seed": 7}


@pytest.mark.parametrize(
    ("call", "text", "finish"),
    [
        ({}, "abcd", "stop"),
        ({"max_tokens": 4}, "abcd", "stop"),
        ({"max_tokens": 2}, "ab", "length"),
        ({"stop": [ord("c")]}, "abc", "stop"),
        ({"stop": [ord("c")], "max_tokens": 2}, "ab", "length"),
    ],
)
def test_limits_and_stops_cut_a_turn(call: dict, text: str, finish: str) -> None:
    environment = Asks(call)
    run_environment(environment, a_problem("q"), turns=["abcd"])
    [turn] = environment.turns
    assert (turn.text, turn.finish, len(turn.token_ids)) == (text, finish, len(text))


@pytest.mark.parametrize(
    ("calls", "turns", "told"),
    [
        ([{}, {}], ["a"], "asks for turn 2, and the test has 1"),
        ([{}], ["a", "b"], "asked for 1 of the test's 2 turns"),
        ([{"turn": 3}, {"turn": 3}], ["a", "b"], "called twice with turn = 3"),
    ],
)
def test_a_script_that_does_not_fit_fails(calls: Sequence[dict], turns: list[str], told: str) -> None:
    with pytest.raises(AssertionError, match=told):
        run_environment(Asks(*calls), a_problem("q"), turns=turns)


def test_an_environment_that_returns_no_episode_fails() -> None:
    class Nothing:
        async def run(self, problem: Problem, generate: Generate, seed: int) -> None:
            await generate(problem.token_ids)

    with pytest.raises(AssertionError, match="run returned None, no Episode"):
        run_environment(Nothing(), a_problem("q"), turns=["a"])  # type: ignore[arg-type]


def test_a_problem_has_its_columns() -> None:
    problem = a_problem("2+3=", "5", level=1)
    assert (problem["level"], problem.answer, problem.token_ids) == (1, "5", (50, 43, 51, 61))


def test_the_pages_test_of_its_environment_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs/environments.md").read_text(encoding="utf-8")
    source, test, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "guess.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    names: dict = {}
    exec(test, names)
    names["test_a_second_guess_earns_half"]()
