"""The environment with answers that are given to it: `pytest` in this folder."""

import pytest
from my_environment import TryAgain, is_right

from megatron_rapo.testing import a_problem, run_environment

PROBLEM = a_problem("3 4 5=17:", numbers=[3, 4, 5], target=17)


@pytest.mark.parametrize(
    ("answers", "reward", "tries"),
    [
        (["3*4+5"], 1.0, 1),
        (["3+4+5", "5+3*4"], 0.5, 2),
        (["3+4+5", "I give up"], 0.0, 2),
    ],
)
def test_what_an_episode_earns(answers, reward, tries):
    episode = run_environment(TryAgain(tries=2), PROBLEM, turns=answers)
    assert episode.score.value == reward
    assert episode.score.facts == {"tries": tries}
    assert episode.answer == answers[-1]


def test_the_question_is_given_again_and_not_trained_on():
    episode = run_environment(TryAgain(tries=2), PROBLEM, turns=["3", "4"])
    [sequence] = episode.sequences
    question = list(PROBLEM.token_ids)
    assert sequence.token_ids[~sequence.sampled].tolist() == question + question


@pytest.mark.parametrize("text", ["3*4+5", " 5 + 4*3", "3+4+5=12\n4*3+5=17"])
def test_right_answers(text):
    assert is_right(text, PROBLEM)


@pytest.mark.parametrize("text", ["", "17", "3*4+5+0", "3**4+5", "3-4+5", "3*4+"])
def test_wrong_answers(text):
    assert not is_right(text, PROBLEM)
