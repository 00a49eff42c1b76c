"""Countdown with further guesses: verdicts, rewards, and what is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo import Episode, Problem
from megatron_rapo.cli import main
from megatron_rapo.config.load import load_config, validate
from megatron_rapo.data.tasks import countdown
from megatron_rapo.environments.countdown_turns import CountdownTurns
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.plain_renderer import Markers, PlainRenderer
from megatron_rapo.environments.rendering import Rendering
from megatron_rapo.errors import RapoError
from tests.dialogues import TINY, SamplingIds, tiny
from tests.stand_in import stand_ins

ROOT = Path(__file__).parents[2]
POSED = countdown.pose([3, 7, 2], 12)  # 7+3+2
WRONG = "={value}\n{question}"
MALFORMED = "\n{question}"


def play(turns: list[str], most: int = 200, **options: Any) -> tuple[Episode, str]:
    """The episode, and its text after the prompt, given and sampled."""
    tokenizer = tiny()
    prompt = tokenizer.encode(POSED.question)
    ids = [[*tokenizer.encode(turn), tokenizer.eos_token_id] for turn in turns]
    generate = SamplingIds(tokenizer, ids, prompt, most)
    form = Rendering(PlainRenderer(tokenizer, Markers(user=("", ""))), tokenizer)
    made = CountdownTurns.Options(wrong=WRONG, malformed=MALFORMED, **options)
    problem = Problem(
        "0", POSED.question, answer=POSED.answer, columns=POSED.columns, token_ids=tuple(prompt)
    )
    episode = asyncio.run(CountdownTurns(form, made).run(problem, generate, 0))
    [sequence] = episode.sequences
    generate.check(sequence)
    return episode, tokenizer.decode(sequence.token_ids[len(prompt) :], skip_special_tokens=True)


def test_a_wrong_guess_is_told_what_it_comes_to() -> None:
    episode, text = play(["3*7-2", "7+3", "7+3+2"])
    assert text == "3*7-2=19\n3 7 2=12:7+3\n3 7 2=12:7+3+2"
    assert (episode.score.value, episode.score.answer, episode.truncated) == (1.0, "7+3+2", False)
    assert [episode.facts[f"right_by_{n}"] for n in (1, 2, 3)] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("turns", "reward"),
    [
        (["7+3+2"], 1.0),
        (["7+3-2", "7+3+2"], 1.0),
        (["7+3-2", "7-3+2", "7-3-2"], 0.0),
        (["7+3-2", "7-3+2", "7+3+2"], 1.0),
    ],
)
def test_any_right_guess_earns_the_reward(turns: list[str], reward: float) -> None:
    episode, _ = play(turns)
    assert episode.score.value == reward
    assert episode.facts["turns"] == len(turns)
    assert not episode.truncated


def test_there_are_no_more_guesses_than_the_option_says() -> None:
    episode, text = play(["7+3-2", "7+3+2"], guesses=1)
    assert (episode.score.value, text) == (0.0, "7+3-2")
    assert [name for name in episode.facts if name.startswith("right_by")] == ["right_by_1"]


def test_a_guess_that_is_cut_is_the_last() -> None:
    episode, _ = play(["7+3-2", "7+3+2"], most=22)
    assert (episode.score.value, episode.truncated, episode.facts["ended_out_of_tokens"]) == (0.0, True, 1.0)


@pytest.mark.parametrize(
    ("said", "value"),
    [("3*7-2", 19), ("so\n 3×7−2 = 12", 19), ("7/2+3", 6.5), ("7+3", None), ("7/(3-3)", None), ("", None)],
)
def test_what_a_guess_comes_to(said: str, value: float | None) -> None:
    assert countdown.comes_to(said, POSED.answer) == value


def configured(data: dict[str, Any] | None = None, **options: Any) -> Any:
    return open_environment(
        validate(
            {
                "run": {"directory": "r", "steps": 1},
                "model": {"path": str(TINY)},
                "data": data or {"source": "countdown"},
                "environment": {"use": "countdown_turns", "max_turns": 4, "options": options},
                "rollout": {"prompts_per_step": 2, "max_response_tokens": 50},
                "algorithm": {"minibatch_prompts": 2},
                "optimizer": {"learning_rate": 1e-3},
            },
            "test",
        )
    )


def test_it_is_opened_by_its_name() -> None:
    assert isinstance(configured(guesses=4), CountdownTurns)


@pytest.mark.parametrize(
    ("data", "options", "told"),
    [
        ({"source": "arithmetic"}, {}, 'judges Countdown, and .* is of source = "arithmetic"'),
        (None, {"guesses": 5}, "guesses = 5 is more than environment.max_turns = 4"),
        (None, {"wrong": "{came}"}, "has a field other than"),
        (None, {"malformed": "{"}, "has a field other than"),
        (None, {"guesses": 0}, "guesses"),
    ],
)
def test_what_does_not_fit_is_refused(data: dict[str, Any] | None, options: Any, told: str) -> None:
    with pytest.raises(RapoError, match=told):
        configured(data, **options)


def test_the_example_s_episode_is_that_of_its_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_config([Path("examples/turns/run.toml")])
    assert isinstance(open_environment(config), CountdownTurns)
    options = CountdownTurns.Options(**config.environment.options)
    assert (options.guesses, options.wrong, options.malformed) == (3, WRONG, MALFORMED)
    _, text = play(["3*7-2", "7+3+2"])
    assert f"```\n{POSED.question}{text}\n```" in Path("examples/turns/README.md").read_text()


def test_the_example_asks_again_after_each_wrong_guess(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an engine that says nothing but `1`."""
    monkeypatch.chdir(ROOT)
    ids = [*tiny().encode("1"), tiny().eos_token_id]

    def answer(body: dict[str, Any]) -> list[dict[str, Any]]:
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": server.version,
            "output_token_logprobs": [[-0.5, token, None] for token in ids],
        }
        return [{"text": "", "output_ids": ids, "meta_info": meta} for _ in body["input_ids"]]

    with stand_ins(1) as ([server], urls):
        server.generate = answer
        engine = f'rollout.engine={{kind = "sglang", urls = ["{urls[0]}"]}}'
        status = main(["try", "examples/turns/run.toml", "--responses", "1", "--set", engine])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    asked = [
        tiny().decode(one) for path, body in server.asked if path == "/generate" for one in body["input_ids"]
    ]
    question = asked[0]
    end = tiny().eos_token
    assert asked[1:] == [f"{question}1{end}\n{question}", f"{question}1{end}\n{question}1{end}\n{question}"]
    for fact in ("turns = 3", "right_by_3 = 0", "ended_answered = 1"):
        assert f"environment/{fact}" in shown.out
