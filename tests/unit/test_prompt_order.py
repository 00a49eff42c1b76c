"""The endless order of prompts: its epochs, and that its position is its whole state."""

from itertools import chain

import pytest

from megatron_rapo.data.order import PromptOrder
from megatron_rapo.data.prompts import LoadReport, Prompt, PromptSet


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
