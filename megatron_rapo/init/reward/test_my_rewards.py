"""The reward of a few responses, by hand: `pytest` in this folder."""

import pytest
from my_rewards import score

PROBLEM = {"numbers": [3, 4, 5], "target": 17}


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("3*4+5", 1.0),
        ("try 3+4\n3*4+5=17", 1.0),
        ("3*5+4", 0.1 + 0.2 + 0.2 / 3),  # the numbers, and 2 beside the target
        ("3+3", 0.1 + 0.2 / 12),
        ("3/0", 0.0),
        ("3**4", 0.0),
        ("I give up", 0.0),
    ],
)
def test_what_a_response_earns(response, reward):
    assert score(response, PROBLEM).value == pytest.approx(reward)


def test_what_is_logged_beside_it():
    assert score("3*5+4", PROBLEM).facts == {"expression": True, "numbers": True}
