"""Sequences that carry what was sampled: what is refused, and what they tell."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_rapo.episode.group import known_rewards
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence
from tests.episodes import group_of, scored_response


def sequence(sampled: list[bool], **changes: list[float]) -> Sequence:
    mask = np.array(sampled, dtype=bool)
    fields = {
        "token_ids": np.arange(len(mask)),
        "log_probs": np.where(mask, -0.5, np.nan),
        "versions": np.where(mask, 3, -1),
    }
    fields |= {name: np.array(values) for name, values in changes.items()}
    return Sequence(
        fields["token_ids"].astype(np.int32),
        mask,
        fields["log_probs"].astype(np.float32),
        fields["versions"].astype(np.int32),
    )


@pytest.mark.parametrize(
    ("sampled", "changes", "message"),
    [
        ([True, False], {}, "must begin with a token that was given"),
        ([], {}, "must begin with a token that was given"),
        ([False, True], {"log_probs": [np.nan, np.nan]}, "no finite log-prob"),
        ([False, True], {"versions": [-1, -1]}, "no version"),
        ([False, True], {"versions": [-1]}, "lengths"),
    ],
)
def test_a_sequence_that_cannot_be_trained_on_is_refused(sampled, changes, message):
    with pytest.raises(ValueError, match=message):
        sequence(sampled, **changes)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "token_ids",
            [1, 2],
            r"token_ids is \[1, 2\] \(list\); give a NumPy array of one dimension, of integers",
        ),
        ("token_ids", np.array([1.0, 2.0]), r"token_ids is array.*integers"),
        ("sampled", np.array([0, 1]), "sampled is .*booleans"),
        ("log_probs", np.array([0, -1]), "log_probs is .*floats"),
        ("versions", np.array([1, 3], np.uint32), "versions is .*with a sign"),
        ("versions", np.array([[-1, 3]]), "versions is .*one dimension"),
    ],
)
def test_fields_of_another_type_are_refused(field, value, message):
    """Masks of integers would index other tokens, and ids that are floats be rounded."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(sequence([False, True]), **{field: value})


def test_only_sampled_tokens_count():
    several = sequence([False, True, True, False, True], token_ids=[99, 1, 2, 99, 3])
    assert (len(several), several.sampled_tokens) == (5, 3)
    assert several.turns == several.brief().turns == (2, 1)
    assert (sequence([False]).turns, several.brief().sampled_tokens) == ((), 3)
    assert not several.leaves(4), "a given token outside the tokenizer is no sample's fault"
    assert several.leaves(3)


def test_a_problem_is_a_mapping_of_its_columns():
    problem = Problem("7", "1 + 1?", "2", columns={"question": "1 + 1?", "level": 3})
    assert (problem["level"], len(problem), list(problem)) == (3, 2, ["question", "level"])
    assert problem.get("hint") is None
    with pytest.raises(KeyError, match="problem 7 has no column 'hint'; its columns: question, level"):
        problem["hint"]


def test_unknown_rewards_and_missing_episodes_are_masked():
    groups = [
        group_of(*(scored_response(outcome, [1]) for outcome in outcomes))
        for outcomes in ([Outcome.CORRECT, Outcome.TIMEOUT, Outcome.WRONG], [Outcome.WRONG])
    ]
    rewards = known_rewards(groups)
    assert rewards.filled(-1).tolist() == [[1, -1, 0], [0, -1, -1]]
