"""Gold answers judged when data are loaded, by the verifier that they are for."""

from types import SimpleNamespace

import pytest

from megatron_rapo.config.data import FileData
from megatron_rapo.config.reward import Reward
from megatron_rapo.config.verifiers import built_in
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.reward import golds as golds_module
from megatron_rapo.reward.golds import gold_judge
from megatron_rapo.reward.verifier import Verifier

DATA = FileData(source="file", path="x.jsonl")


def configuration(verifier="math", time_limit_s=20.0):
    reward = Reward(verifier=verifier, workers=1, time_limit_s=time_limit_s)
    return SimpleNamespace(reward=reward, verifier_of=lambda data: built_in(verifier))


def test_golds_that_no_response_can_match_are_told_with_the_reason():
    rationale = "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"
    golds = [
        "7",
        r"\frac{1}{2}",
        rationale,
        r"\text{}",
        '{"any": ["1", "#### 2"]}',
        r"\frac{1}{2}",
        rationale,
    ]
    whys = gold_judge(configuration())(DATA, golds)
    assert [why is None for why in whys] == [True, True, False, False, False, True, False]
    assert whys[2] == whys[6]
    assert whys[2].startswith("ValueError: the gold answer 'She makes 9 * 2")
    assert "holds nothing to compare with" in whys[3]


def test_golds_are_judged_by_the_datas_own_verifier():
    whys = gold_judge(configuration("integer"))(DATA, ["1,000", "1.5", "12"])
    assert whys[0] is None
    assert whys[2] is None
    assert "'1.5' is not an integer" in whys[1]


@pytest.mark.parametrize(("times", "kept"), [(1, True), (2, False)])
def test_a_gold_that_runs_into_the_time_limit_has_one_more_try(monkeypatch, times, kept):
    tried = []

    class Slow(Verifier):
        def judge(self, golds):
            tried.append(list(golds))
            late = Verification(Outcome.TIMEOUT, why="not done within 20 s")
            return [late if gold == "slow" and len(tried) <= times else one for gold, one in self._ask(golds)]

        def _ask(self, golds):
            return zip(golds, super().judge(golds), strict=True)

    monkeypatch.setattr(golds_module, "Verifier", Slow)
    whys = gold_judge(configuration())(DATA, ["slow", "x+1"])
    assert tried == [["slow", "x+1"], ["slow"]]
    assert whys == [None if kept else "not done within 20 s", None]


def test_integers_need_no_verifier(monkeypatch):
    monkeypatch.setattr(golds_module, "Verifier", None)
    assert gold_judge(configuration())(DATA, ["1", "-20", "0"]) == [None] * 3


def test_a_verifier_that_states_no_answers_keeps_all():
    assert gold_judge(configuration("countdown"))(DATA, ["no JSON"]) == [None]


@pytest.mark.parametrize("is_main", [True, False])
def test_one_rank_judges_for_all(monkeypatch, is_main):
    """All ranks must keep the same prompts, also where one of them was too slow to judge."""
    given = []

    def share_from_main(mine):
        given.append(mine)
        return ["the main rank's word"]

    if not is_main:
        monkeypatch.setattr(golds_module, "Verifier", None)
    placement = SimpleNamespace(is_main=is_main, share_from_main=share_from_main)
    assert gold_judge(configuration(), placement)(DATA, ["x+1"]) == ["the main rank's word"]
    assert given == [[None] if is_main else None]
