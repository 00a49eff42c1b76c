"""Problems of reasoning_gym: the same in every process, and scored by the datasets themselves."""

import os
import subprocess
import sys

import pytest

from megatron_rapo.config import validate
from megatron_rapo.config.data import ReasoningGymData
from megatron_rapo.data.load import load_prompts
from megatron_rapo.data.tasks import gym
from megatron_rapo.data.tasks.problem import split_of
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.verifier import Verifier
from tests.models import make_tokenizer

pytest.importorskip("reasoning_gym", reason="the extra gym is not installed")

from megatron_rapo.reward import gym as scoring

TOKENIZER = make_tokenizer(vocab_size=200)


def gym_data(dataset="chain_sum", **options):
    return ReasoningGymData(source="reasoning_gym", dataset=dataset, **options)


def drawn(made, split="train", count=20):
    return gym.generate(made, made.seed, split, count, "data")


def test_problems_are_different_and_hang_on_the_seed_and_the_split():
    train, test = drawn(gym_data()), drawn(gym_data(), "test", 5)
    questions = [problem.question for problem in train]
    assert len(set(questions)) == 20
    assert {split_of(question) for question in questions} == {"train"}
    assert {split_of(problem.question) for problem in test} == {"test"}
    assert [problem.question for problem in drawn(gym_data(seed=5))] != questions
    assert [problem.question for problem in drawn(gym_data(), count=7)] == questions[:7]


def test_problems_are_the_same_in_every_process():
    """word_ladder draws by the order of a set of texts, which Python shuffles in each process."""
    script = (
        "from megatron_rapo.config.data import ReasoningGymData; from megatron_rapo.data.tasks import gym; "
        "made = ReasoningGymData(source='reasoning_gym', dataset='word_ladder'); "
        "print([one.question for one in gym.generate(made, 1234, 'train', 20, 'data')])"
    )
    questions = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert questions[0] == questions[1] == f"{[one.question for one in drawn(gym_data('word_ladder'))]}\n"


def test_prompts_carry_what_their_score_needs():
    made = gym_data(options={"min_terms": 2, "max_terms": 2}, problems=4, template="plain")
    loaded = load_prompts(
        made, TOKENIZER, max_prompt_tokens=300, split="train", count=None, needs_answers=False
    )
    assert str(loaded.report) == (
        "reasoning_gym chain_sum (min_terms = 2, max_terms = 2; training problems of seed 1234): 4 prompts "
        "from 4 rows"
    )
    for prompt in loaded:
        assert prompt.source == "chain_sum"
        value = eval(prompt.problem["metadata"]["expression"])
        assert int(prompt.answer) == value
        assert scoring.score(rf"It is \boxed{{{value}}}.", prompt.problem) == 1.0
        assert scoring.score(f"<answer>{value}</answer>", prompt.problem) == 1.0
        assert scoring.score(f"so it is\n{value}\n", prompt.problem) == 1.0
        assert scoring.score(rf"\boxed{{{value + 1}}}", prompt.problem) < 0.1
        assert scoring.score("", prompt.problem) == 0.0


def test_datasets_that_have_no_single_answer_are_scored_by_what_is_right():
    (problem,) = drawn(gym_data("graph_color"), count=1)
    assert problem.answer == ""  # any good colouring is right
    right = problem.columns["metadata"]["possible_answer"]
    written = "{" + ", ".join(f'"{vertex}": {colour}' for vertex, colour in right.items()) + "}"
    assert scoring.score(f"<answer>{written}</answer>", problem.columns) == 1.0
    wrong = "{" + ", ".join(f'"{vertex}": 1' for vertex in right) + "}"
    assert scoring.score(f"<answer>{wrong}</answer>", problem.columns) < 0.5


def test_an_answer_that_a_dataset_cannot_read_scores_nothing(monkeypatch):
    (problem,) = drawn(gym_data("prime_factorization"), count=1)
    assert scoring.score(rf"\boxed{{{problem.answer}}}", problem.columns) == 1.0
    assert scoring.score(r"\boxed{no numbers}", problem.columns) == 0.0  # its score_answer raises

    class Broken:
        def score_answer(self, answer, entry):
            raise KeyError("metadata")

    monkeypatch.setattr(scoring, "_dataset", lambda name, options: Broken())
    with pytest.raises(KeyError):  # so does that of the gold answer: no fault of the response
        scoring.score(r"\boxed{2}", problem.columns)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and so on", r"\frac{1}{2}"),
        (r"<answer>1</answer> \boxed{2}", "2"),
        (r"\boxed{2} then \boxed{3", "2"),
        ("<answer>1</answer> no <answer>1 2\n3 4</answer> yes", "1 2\n3 4"),
        ("thinking\n\n 42 \n", "42"),
        ("42", "42"),
        (" \n", None),
        (r"\boxed{}", None),
    ],
)
def test_the_final_answer(response, expected):
    assert scoring.final_answer(response) == expected


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (gym_data("chain_sums"), r'data\.dataset = "chain_sums" is none of .* did you mean chain_sum,'),
        (gym_data("zzz"), r'data\.dataset = "zzz" is none of reasoning_gym\'s \d+; its README lists them'),
        (gym_data("composite"), r'data\.dataset = "composite" is a mixture; use data\.source = "mixture"'),
        (
            gym_data(options={"terms": 3}),
            r"data\.options has 'terms', which chain_sum has not; it has min_terms,",
        ),
        (
            gym_data(options={"seed": 3}),
            r"data\.options has 'seed', .*seed and size are data\.seed and data\.problems",
        ),
        (
            gym_data(options={"min_terms": -1}),
            r"data\.options = \{'min_terms': -1\} are refused by chain_sum: Asser",
        ),
        (
            gym_data(options={"max_terms": 2, "max_digits": 1}),
            r"9999 train problems were asked for, but only \d+ could be found; ask for at most \d+",
        ),
    ],
)
def test_what_reasoning_gym_has_not_is_told(made, message):
    with pytest.raises(RapoError, match=message):
        drawn(made, count=9999 if made.options == {"max_terms": 2, "max_digits": 1} else 2)


def test_a_missing_package_is_told_with_the_command(monkeypatch):
    monkeypatch.setattr(gym, "find_spec", lambda name: None)
    with pytest.raises(RapoError, match=r'is not installed; pip install .* "megatron_rapo\[gym\]"'):
        drawn(gym_data())


def test_its_own_score_is_the_reward_and_golds_are_not_needed():
    values = {
        "run": {"directory": "runs/gym", "steps": 1},
        "model": {"path": "models/tiny"},
        "data": {"source": "reasoning_gym", "dataset": "graph_color", "problems": 2, "label": "colours"},
        "rollout": {"prompts_per_step": 2, "max_response_tokens": 8},
    }
    config = validate(values, source="run.toml")
    plan = config.verifier_of(config.data)
    assert str(plan) == "reasoning_gym"
    assert not config.needs_answers(config.data)
    (problem,) = drawn(gym_data("graph_color"), count=1)
    asked = Problem("0", problem.question, problem.answer, columns=problem.columns)
    colours = problem.columns["metadata"]["possible_answer"]
    right = "{" + ", ".join(f'"{vertex}": {colour}' for vertex, colour in colours.items()) + "}"
    with Verifier.configured(plan, config.reward.model_copy(update={"time_limit_s": 60.0})) as verifier:
        found = verifier.verify([(f"<answer>{right}</answer>", asked), ("no", asked)])
    assert found[0].reward == 1.0
    assert found[1].reward < 0.5
