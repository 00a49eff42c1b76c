"""The method's advantages by hand, and its loss and state whatever the layout: `pytest` in this folder."""

import pytest
from my_method import RunningBaseline

from megatron_rapo.testing import a_group, a_method, check_method


def test_rewards_are_compared_with_the_mean_of_earlier_steps():
    method = a_method(RunningBaseline, {"memory": 0.5})
    assert method.advantages([a_group(1.0, 0.0)]).tolist() == [[1.0, 0.0]]
    assert method.baseline == pytest.approx(0.25)  # half of 0, and half of the step's mean 0.5
    assert method.advantages([a_group(1.0, 1.0)]).tolist() == [[0.75, 0.75]]


def test_an_unknown_reward_is_compared_with_nothing():
    method = a_method(RunningBaseline, {"memory": 0.0})
    assert method.advantages([a_group(None, 0.5)]).mask.tolist() == [[True, False]]
    assert method.baseline == 0.5


def test_gradient_layouts_and_state():
    check_method(RunningBaseline, {"penalty": 0.5})
