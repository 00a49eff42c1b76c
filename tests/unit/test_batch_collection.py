"""Which groups a step trains on, with and without dynamic sampling: exact counts, and ends of the data."""

from __future__ import annotations

import pytest

from megatron_rapo.config.sampling import DynamicSampling
from megatron_rapo.data.order import PromptOrder
from megatron_rapo.data.prompts import LoadReport, Prompt, PromptSet
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.experience.batch import collect
from megatron_rapo.experience.course import follow
from megatron_rapo.experience.sharing import Shared
from tests.episodes import group_of, scored_response
from tests.methods import a_method

MIXED = (Outcome.CORRECT, Outcome.WRONG)
ALL_RIGHT = (Outcome.CORRECT, Outcome.CORRECT)
ALL_WRONG = (Outcome.WRONG, Outcome.TIMEOUT)


class Scores:
    """Earns what a table says for each prompt's index; notes what each round asked for."""

    def __init__(self, outcomes):
        self.outcomes = outcomes
        self.rounds = []
        self.draws = []

    def __call__(self, wanted):
        prompts = wanted.prompts
        self.rounds.append([prompt.index for prompt in prompts])
        self.draws += [prompt.draw for prompt in prompts]
        groups = [
            group_of(*(scored_response(o, [0]) for o in self.outcomes[prompt.index]), number=prompt.index)
            for prompt in prompts
        ]
        whole = {place: groups[place] for place in range(1, len(groups), 2)}
        return Shared([group.brief() for group in groups], [place % 2 for place in range(len(groups))], whole)


def order_of(size):
    prompts = tuple(Prompt(index, "", (1,), "") for index in range(size))
    report = LoadReport("test", size, size, (), (), (), 10, ())
    return PromptOrder(PromptSet(prompts, report), seed=0, shuffle=False)


def collected(outcomes, wanted, dynamic):
    """The indices chosen, those of each round, where the order stands, and the metrics."""
    prompts, score = order_of(len(outcomes)), Scores(outcomes)
    batch = follow(collect(prompts, wanted, a_method(), dynamic), score)
    chosen = [int(group.problem.id) for group in batch.groups]
    metrics = {name.removeprefix("sampling/"): value for name, value in batch.metrics().items()}
    for place, group in batch.sampled.whole.items():
        assert group.brief() == batch.drawn[place], "what was sampled here is at another place"
        assert batch.sampled.heads[place] == 1
    assert len(batch.sampled.heads) == len(batch.drawn)
    return chosen, score.rounds, prompts.position, metrics


def dynamic(over_sampling=1.0, max_rounds=4):
    return DynamicSampling(over_sampling=over_sampling, max_rounds=max_rounds)


def test_without_it_the_step_has_the_prompts_that_it_drew():
    chosen, rounds, position, metrics = collected([ALL_WRONG] * 4 + [MIXED] * 4, 3, None)
    assert (chosen, rounds, position) == ([0, 1, 2], [[0, 1, 2]], 3)
    assert metrics == {}


def test_groups_without_variance_are_replaced_by_those_of_further_prompts():
    outcomes = [MIXED, ALL_WRONG, ALL_RIGHT, MIXED, ALL_WRONG, MIXED, MIXED, MIXED]
    chosen, rounds, position, metrics = collected(outcomes, 4, dynamic())
    assert rounds == [[0, 1, 2, 3], [4, 5], [6]]
    assert chosen == [0, 3, 5, 6]
    assert position == 7
    assert (metrics["rounds"], metrics["prompts_drawn"], metrics["filled_up"]) == (3, 7, 0)
    # 4 + 2 of the 12 known rewards are 1: the timeouts' are unknown.
    assert metrics["reward_mean_drawn"] == pytest.approx(6 / 12)


def test_over_sampling_draws_more_at_once_and_drops_what_is_beyond():
    outcomes = [MIXED, ALL_WRONG, MIXED, MIXED, MIXED, MIXED, ALL_WRONG, MIXED]
    chosen, rounds, position, metrics = collected(outcomes, 4, dynamic(over_sampling=1.5))
    assert rounds == [[0, 1, 2, 3, 4, 5]]
    assert chosen == [0, 2, 3, 4]
    assert position == 6, "what was drawn beyond those wanted counts as drawn"
    assert metrics["surplus"] == 1


def test_the_number_for_a_round_is_rounded_up():
    _, rounds, _, _ = collected([MIXED, MIXED, ALL_WRONG] + [MIXED] * 7, 3, dynamic(over_sampling=1.1))
    assert [len(drawn) for drawn in rounds] == [4]
    _, rounds, _, _ = collected([ALL_WRONG] * 4 + [MIXED] * 20, 3, dynamic(over_sampling=1.1))
    assert [len(drawn) for drawn in rounds] == [4, 4]


def test_after_the_last_round_the_batch_is_filled_up_in_the_order_drawn():
    outcomes = [ALL_WRONG, MIXED, ALL_RIGHT] + [ALL_WRONG] * 3 + [MIXED] * 4
    chosen, rounds, position, metrics = collected(outcomes, 3, dynamic(max_rounds=2))
    assert rounds == [[0, 1, 2], [3, 4]]
    assert chosen == [0, 1, 2]
    assert position == 5
    assert (metrics["filled_up"], metrics["rounds"]) == (2, 2)


def test_a_step_meets_no_prompt_twice_when_the_data_run_out():
    outcomes = [ALL_WRONG, MIXED, ALL_RIGHT, ALL_WRONG, MIXED]
    chosen, rounds, position, metrics = collected(outcomes, 3, dynamic(max_rounds=9))
    assert rounds == [[0, 1, 2], [3, 4]]
    assert chosen == [0, 1, 4]
    assert position == 5
    assert metrics["filled_up"] == 1
    # The next step goes on in the next epoch.
    prompts, score = order_of(5), Scores(outcomes)
    prompts.position = position
    follow(collect(prompts, 3, a_method(), None), score)
    assert (score.draws, prompts.position) == ([5, 6, 7], 8)


def test_a_batch_larger_than_the_set_is_full_after_one_round():
    chosen, rounds, position, _ = collected([ALL_WRONG, MIXED], 5, dynamic(over_sampling=2.0))
    assert rounds == [[0, 1, 0, 1, 0]]
    assert chosen == [0, 1, 0, 1, 0]
    assert position == 5


def test_where_nothing_teaches_the_batch_is_still_full():
    chosen, _, _, metrics = collected([ALL_WRONG] * 20, 3, dynamic())
    assert chosen == [0, 1, 2]
    assert metrics["filled_up"] == 3
