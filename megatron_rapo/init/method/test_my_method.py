"""The method's advantages and state, by hand: `pytest` in this folder."""

import pytest
from my_method import RunningBaseline

from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem


def group_of(*rewards):
    verifications = [Verification(Outcome.WRONG, reward=reward) for reward in rewards]
    return Group(Problem("0", "?"), tuple(ScoredEpisode(Episode((), ""), one) for one in verifications))


def new_method(**options):
    return RunningBaseline(RunningBaseline.Options(method="my_method:RunningBaseline", **options), None)


def test_rewards_are_compared_with_the_mean_of_earlier_steps():
    method = new_method(memory=0.5)
    assert method.advantages([group_of(1.0, 0.0)]).tolist() == [[1.0, 0.0]]
    assert method.baseline == pytest.approx(0.25)  # half of 0, and half of the step's mean 0.5
    assert method.advantages([group_of(1.0, 1.0)]).tolist() == [[0.75, 0.75]]


def test_a_run_that_goes_on_has_the_same_baseline():
    method, resumed = new_method(), new_method()
    method.advantages([group_of(1.0, 0.0)])
    resumed.restore(method.state())
    assert resumed.baseline == method.baseline != 0.0
