"""The endless order of prompts: its epochs, and that its position is its whole state."""

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rapo.data.order import MixedOrder, PromptOrder, mix, order_of
from megatron_rapo.data.prompts import LoadReport, Prompt, PromptSet, TrainingPrompts


def prompt_set(size):
    prompts = tuple(Prompt(index, f"q{index}", (index,), f"a{index}") for index in range(size))
    return PromptSet(prompts, LoadReport("test", size, size, (), (), (), 10, ()))


def draw(size, counts, **options):
    order = PromptOrder(prompt_set(size), **{"seed": 1, "shuffle": True, **options})
    return [[prompt.index for prompt in order.draw(count)] for count in counts]


def test_each_epoch_holds_every_prompt_once_and_in_a_new_order():
    epochs = draw(50, [50, 50, 50])
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("counts", [[3] * 10, [30], [7, 1, 22], [29, 1]])
def test_draws_of_any_size_make_the_same_sequence(shuffle, counts):
    (whole,) = draw(10, [30], shuffle=shuffle)
    assert list(chain(*draw(10, counts, shuffle=shuffle))) == whole
    assert all(sorted(whole[start : start + 10]) == list(range(10)) for start in (0, 10, 20))


def test_a_draw_larger_than_the_set_crosses_several_epochs():
    (drawn,) = draw(4, [11])
    assert sorted(drawn[:4]) == sorted(drawn[4:8]) == [0, 1, 2, 3]
    assert len(set(drawn[8:])) == 3


def test_resuming_at_a_position_goes_on_as_if_never_stopped():
    whole = PromptOrder(prompt_set(7), seed=3, shuffle=True)
    whole.draw(17)
    resumed = PromptOrder(prompt_set(7), seed=3, shuffle=True, position=whole.position)
    assert whole.position == 17
    assert whole.epoch == 2
    assert resumed.draw(20) == whole.draw(20)


def test_the_order_hangs_on_the_seed_alone():
    assert draw(30, [30], seed=5) == draw(30, [30], seed=5)
    assert draw(30, [30], seed=5) != draw(30, [30], seed=6)


def test_without_shuffling_it_is_the_sets_own_order():
    assert draw(3, [7], shuffle=False) == [[0, 1, 2, 0, 1, 2, 0]]


def test_the_shuffle_is_frozen():
    # Written down once: runs must resume in the same order with later versions of this package and of NumPy.
    assert draw(8, [8, 8], seed=1234) == [[4, 5, 3, 1, 2, 0, 6, 7], [5, 7, 1, 3, 4, 2, 0, 6]]


def test_each_draw_has_its_number_also_after_a_resume():
    order = PromptOrder(prompt_set(4), seed=1, shuffle=True)
    assert [prompt.draw for prompt in [*order.draw(3), *order.draw(6)]] == list(range(9))
    resumed = PromptOrder(prompt_set(4), seed=1, shuffle=True, position=7)
    assert [prompt.draw for prompt in resumed.draw(3)] == [7, 8, 9]


# Mixtures


SHARES = (0.7, 0.2, 0.1)
SIZES = (40, 30, 6)


def mixed(position=0, shares=SHARES, sizes=SIZES, seed=1):
    orders = [PromptOrder(prompt_set(size), seed=seed, shuffle=True) for size in sizes]
    for source, order in enumerate(orders):
        prompts = tuple(replace(prompt, source=str(source)) for prompt in order._prompts)
        orders[source] = PromptOrder(replace(order._prompts, prompts=prompts), seed=seed, shuffle=True)
    return MixedOrder(orders, shares, position)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=5), st.integers(0, 10**7), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_every_stretch_has_of_each_source_its_share(weights, start, count):
    shares = [weight / sum(weights) for weight in weights]
    drawn, _ = mix(shares, start, count)
    assert len(drawn) == count
    for source, share in enumerate(shares):
        assert abs(drawn.count(source) - share * count) <= len(shares) * share + 1


def test_stretches_make_one_sequence_whatever_their_sizes():
    whole, _ = mix(SHARES, 0, 500)
    cut = [mix(SHARES, start, 25) for start in range(0, 500, 25)]
    assert list(chain(*(drawn for drawn, _ in cut))) == whole
    for place, (_, before) in enumerate(cut):
        assert before == [whole[: place * 25].count(source) for source in range(3)]


def test_no_prompt_of_a_source_comes_again_before_all_others_have_come():
    drawn = mixed().draw(400)
    for source, size in enumerate(SIZES):
        mine = [prompt.index for prompt in drawn if prompt.source == str(source)]
        epochs = [mine[start : start + size] for start in range(0, len(mine), size)]
        assert len(epochs) > 1
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs if len(epoch) == size)
    assert [prompt.draw for prompt in drawn] == list(range(400))


def test_a_mixture_goes_on_from_its_position():
    whole = mixed().draw(300)
    resumed = mixed(position=123)
    assert resumed.draw(50) + resumed.draw(127) == whole[123:]
    assert resumed.position == 300
    assert mixed(seed=2).draw(300) != whole


def test_a_stretch_without_repetition_is_as_long_as_the_smallest_source_lasts():
    assert mixed().size == 57  # 40 / 0.7; the others last longer
    assert mixed(sizes=(40, 30, 2)).size == 20


def test_the_order_of_one_set_is_its_own_and_of_several_a_mixture():
    sets = (prompt_set(5), prompt_set(3))
    alone = order_of(TrainingPrompts(sets[:1], (1.0,), (True,)), seed=4)
    assert alone.draw(9) == PromptOrder(sets[0], seed=4, shuffle=True).draw(9)
    both = order_of(TrainingPrompts(sets, (0.5, 0.5), (False, False)), seed=4)
    assert [prompt.index for prompt in both.draw(8)] == [0, 0, 1, 1, 2, 2, 3, 0]
