"""The reward of a few responses, by hand, judged as in training: `pytest` in this folder."""

from my_rewards import score

from megatron_rapo import Score
from megatron_rapo.testing import check_reward

PROBLEM = {"numbers": [3, 4, 5], "target": 17}


def test_what_responses_earn():
    check_reward(
        score,
        [
            ("3*4+5", PROBLEM, Score(1.0, {"expression": 1, "numbers": 1}, answer="3*4+5")),
            ("try 3+4\n3*4+5=17", PROBLEM, 1.0),
            ("3*5+4", PROBLEM, 0.1 + 0.2 + 0.2 / 3),  # the numbers, and 2 beside the target
            ("3+3", PROBLEM, Score(0.1 + 0.2 / 12, {"expression": 1, "numbers": 0})),
            ("3/0", PROBLEM, 0.0),
            ("3**4", PROBLEM, 0.0),
            ("I give up", PROBLEM, Score(0.0, {"expression": 0})),
        ],
    )
