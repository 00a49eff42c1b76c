"""The environment by itself: `pytest examples/rebuilt`."""

from my_environment import Rebuilt

from megatron_rapo.testing import a_problem, run_environment

PROBLEM = a_problem("3 7 2=12:")


def texts(turns, **options):
    """What each sequence's context was, and what was sampled behind it."""
    episode = run_environment(Rebuilt(**options), PROBLEM, turns)
    found = []
    for sequence in episode.sequences:
        characters = list(map(chr, sequence.token_ids))
        begins = int(sequence.sampled.argmax())
        assert sequence.sampled[begins:].all()
        found.append(("".join(characters[:begins]), "".join(characters[begins:])))
    return episode, found


def test_a_round_sees_the_question_and_the_last_note_alone():
    episode, found = texts(["7+3=10\n", "10+2=12\n", "7+3+2"])
    assert found == [
        ("3 7 2=12:", "7+3=10\n"),
        ("3 7 2=12:7+3=10\n", "10+2=12\n"),
        ("3 7 2=12:10+2=12\n", "7+3+2"),
    ]
    assert (episode.answer, episode.truncated, episode.facts) == ("7+3+2", False, {"rounds": 3})


def test_an_answer_ends_it():
    episode, found = texts(["7+3+2"])
    assert (len(found), episode.truncated) == (1, False)


def test_without_an_answer_it_was_cut():
    episode, found = texts(["7+3=10\n", "10\n"], rounds=2)
    assert (len(found), episode.truncated) == (2, True)
