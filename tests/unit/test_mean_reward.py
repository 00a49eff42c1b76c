"""The mean reward of an evaluation: against its rows, and without bias under an adaptive budget."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_rapo.config import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.evaluator import _as_metrics
from megatron_rapo.evaluation.interval import estimate
from megatron_rapo.evaluation.results import Result, table
from megatron_rapo.evaluation.statistics import COLUMNS, Statistics, summarise, summarise_adaptive
from tests.unit.stored import store

NAN = float("nan")


def of(folder: Path, rewards: list[list[float]], **options: Any) -> Statistics:
    """Statistics of samples that are correct where they earn 1 or more."""
    earned = np.array(rewards)
    samples = store(folder, earned >= 1.0, rewards=earned).samples("sums", "t1")
    return summarise(samples.read(COLUMNS), [p.id for p in samples.problems], [1], seed=0, **options)


def test_it_is_the_mean_over_problems_of_known_rewards(tmp_path: Path) -> None:
    """One problem has an unknown reward, another none that is known."""
    found = of(tmp_path, [[0.5, 0.0, 1.0], [0.2, NAN, 0.4], [NAN, NAN, NAN]])
    assert found.reward == estimate(np.array([0.5, 0.3]))
    assert found.graded
    assert "\n  reward           0.400 [0.000, 1.000]\n" in table([Result("sums", "t1", found)])
    metrics = _as_metrics(found, graded=True)
    assert (metrics["reward"], metrics["reward_low"], metrics["reward_high"]) == pytest.approx(
        (found.reward.mean, found.reward.low, found.reward.high)
    )
    assert not any("reward" in name for name in _as_metrics(found, graded=False))


def test_it_is_not_told_beside_pass_at_1_where_it_is_the_same(tmp_path: Path) -> None:
    found = of(tmp_path, [[1.0, 0.0], [0.0, NAN]])
    assert not found.graded
    assert found.reward == estimate(np.array([0.5, 0.0]))
    assert "reward" not in table([Result("sums", "t1", found)])


def test_without_a_known_reward_there_is_none(tmp_path: Path) -> None:
    found = of(tmp_path, [[NAN, NAN]])
    assert (found.reward, found.graded) == (None, False)
    assert "reward" not in _as_metrics(found, graded=True)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_its_interval_knows_no_units(tmp_path: Path, scale: float) -> None:
    """From −1 to 3 in any unit it is that of values from 0 to 1; wide where one problem is all there is."""
    rewards = np.array([[-1.0, 3.0], [0.0, 1.0], [2.0, 2.0]])
    found = of(tmp_path, (scale * rewards).tolist()).reward
    of_shares = estimate((rewards.mean(axis=1) + 1.0) / 4.0)
    assert found is not None
    expected = [scale * (4.0 * value - 1.0) for value in (of_shares.mean, of_shares.low, of_shares.high)]
    assert [found.mean, found.low, found.high] == pytest.approx(expected)


def test_under_an_adaptive_budget_it_has_no_bias(tmp_path: Path) -> None:
    """A problem for each sequence of five samples, as likely 1 as ½ as 0; it stops at the second 1."""
    rewards = np.array(list(product([1.0, 0.5, 0.0], repeat=5)))
    right = rewards == 1.0
    drawn = np.cumsum(right, axis=1) - right < 2  # up to the one that stops it, and that one
    samples = store(tmp_path, right, rewards=rewards, there=drawn, adaptive=2).samples("sums", "t1")
    ids = [problem.id for problem in samples.problems]
    found = summarise_adaptive(samples.read([*COLUMNS, "sample"]), ids, [1], correct=2, most=5)
    assert found.reward is not None
    assert found.reward.mean == pytest.approx(0.5)
    assert found.mean.mean == pytest.approx(1 / 3)


def evaluated(best: str, **changes: Any) -> object:
    return validate(
        {
            "run": {"directory": "runs/one", "steps": 1},
            "model": {"path": "models/tiny"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 8, "max_response_tokens": 8},
            "evaluate": {"k": [1], "samples": 1, "best": best},
            **changes,
        },
        source="run.toml",
    )


@pytest.mark.parametrize(
    "changes",
    [{"reward": {"function": "mine:score"}}, {"environment": {"use": "mine:Search"}}],
)
def test_the_best_checkpoint_may_be_that_of_the_highest_reward(changes: dict[str, Any]) -> None:
    evaluated("reward", **changes)


@pytest.mark.parametrize("changes", [{}, {"environment": {"use": "tool_use", "tools": ["calculator"]}}])
def test_of_rewards_that_are_right_or_wrong_it_is_that_of_pass_at_1(changes: dict[str, Any]) -> None:
    with pytest.raises(RapoError, match="'reward' is not measured; choose one of pass@1, maj@1"):
        evaluated("reward", **changes)
