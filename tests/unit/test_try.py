"""`megatron-rapo try`: what is shown of one problem, with an engine that is a stand-in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rapo.cli import main
from tests.end_to_end.command import write_config
from tests.stand_in import StandIn, stand_ins

ONE, TWO, EQUALS = 13, 14, 10  # token ids of the tiny model
REWARD = """
from megatron_rapo import Episode, Score, Transcript


def score(response, problem):
    return Score(0.25, facts={"length": len(response), "target": problem["target"]}, answer="read")


def fails(response, problem):
    return 1 / (problem["target"] * 0)
"""
ENVIRONMENT = """

class Twice:
    async def run(self, problem, generate, seed):
        transcript = Transcript(problem.token_ids)
        for number in range(2):
            turn = await generate(transcript.token_ids, turn=number)
            transcript.add_turn(turn)
            if number == 0:
                transcript.add_given(generate.encode("="))
        return Episode((transcript.sequence(),), "said", Score(2.0, {"turns": 2}), facts={"tools": 1})


class Broken:
    async def run(self, problem, generate, seed):
        await generate(problem.token_ids)
        raise ValueError("its own fault")


class Nothing:
    async def run(self, problem, generate, seed):
        await generate(problem.token_ids)
"""


def answers(server: StandIn) -> Callable[[dict], list[dict]]:
    """Always the text 12."""

    def generate(body: dict) -> list[dict]:
        meta = {
            "finish_reason": {"type": "stop"},
            "weight_version": server.version,
            "output_token_logprobs": [[-0.5, ONE, None], [-1.0, TWO, None]],
        }
        return [{"text": "", "output_ids": [ONE, TWO], "meta_info": meta} for _ in body["input_ids"]]

    return generate


@pytest.fixture
def tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs the command with sections of options; status, and what it printed."""
    # Python has one module of a name: each test has its own.
    own = f"own_{tmp_path.name}"
    (tmp_path / f"{own}.py").write_text(REWARD + ENVIRONMENT)
    with stand_ins(1) as ([server], urls):
        server.generate = answers(server)

        def run(*words: str, **sections: dict) -> tuple[int, str]:
            sections = {
                name: {key: value.replace("own:", f"{own}:") for key, value in options.items()}
                for name, options in sections.items()
            }
            sections["rollout"] = {"engine.kind": "sglang", "engine.urls": urls}
            config = write_config(tmp_path / "run.toml", tmp_path / "run", **sections)
            status = main(["try", str(config), *words])
            printed = capsys.readouterr()
            return status, printed.out + printed.err

        yield run
    assert not (tmp_path / "run").exists(), "the run's directory is not the trial's"


def test_what_was_sampled_is_told_apart_and_facts_have_names(tried: Callable[..., tuple[int, str]]) -> None:
    status, shown = tried("--problem", "3", "--responses", "1", reward={"function": "own:score"})
    assert status == 0, shown
    assert "problem 3 of countdown" in shown
    assert "column   target = " in shown
    assert "response 1 of 1" in shown
    assert "sampled  13 '1' · 14 '2'\n           2 tokens, of mean log-prob -0.750" in shown
    for line in ("text     '12'", "answer   'read', as it was read", "outcome  wrong", "reward   0.25"):
        assert line in shown
    assert "reward/length = 2" in shown
    for part in ("data", "engine's start", "sampling", "reward"):
        assert f"  {part} " in shown


def test_the_prompt_is_shown_as_its_exact_tokens(tried: Callable[..., tuple[int, str]]) -> None:
    _, shown = tried("--responses", "1")
    question = next(line for line in shown.splitlines() if line.startswith("  question"))
    pieces = shown.partition("prompt, ")[2].partition("response 1")[0].split("given")[1]
    text = "".join(item.split("'")[1] for item in pieces.replace("\n", " · ").split(" · ") if "'" in item)
    assert f"'{text}'" in question


def test_turns_of_an_environment_stand_between_what_it_gave(tried: Callable[..., tuple[int, str]]) -> None:
    status, shown = tried("--responses", "1", environment={"use": "own:Twice"})
    assert status == 0, shown
    spans = [line.split()[:2] for line in shown.splitlines() if line.startswith(("  given", "  sampled"))]
    assert spans[-4:] == [["given", "the"], ["sampled", "13"], ["given", "10"], ["sampled", "13"]]
    assert "reward   2, of the environment" in shown
    assert "environment/tools = 1" in shown


@pytest.mark.parametrize(
    ("sections", "line"),
    [
        ({"reward": {"function": "own:fails"}}, 'return 1 / (problem["target"] * 0)'),
        ({"environment": {"use": "own:Broken"}}, 'raise ValueError("its own fault")'),
    ],
)
def test_the_users_own_line_that_fails_is_shown(
    tried: Callable[..., tuple[int, str]], sections: dict, line: str
) -> None:
    status, shown = tried(**sections)
    assert status == 1
    assert line in shown
    assert "megatron_rapo/" not in shown.partition("Traceback")[2], "frames of the package help nobody"
    assert "reward   unknown" in shown


@pytest.mark.parametrize(
    ("words", "sections", "told"),
    [
        (["--problem", "40000"], {}, "--problem 40000: no usable problem has this id or row"),
        (["--responses", "0"], {}, "--responses 0: ask for at least one"),
        ([], {"environment": {"use": "own:Nothing"}}, "problem 0: run returned None"),
        ([], {"model": {"path": "nowhere"}}, "model directory nowhere does not exist"),
    ],
)
def test_what_is_wrong_is_one_message(
    tried: Callable[..., tuple[int, str]], words: list[str], sections: dict, told: str
) -> None:
    status, shown = tried(*words, **sections)
    assert status == 1
    assert "error: " in shown
    assert told in shown
