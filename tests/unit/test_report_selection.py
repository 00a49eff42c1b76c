"""Which responses the page holds: deterministic, per problem and outcome, within the budget."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron_rapo.report.selection import BUDGET, LONGEST, MOST, Rule, Samples, choose_rule


def samples(problems: int, each: int, length: int = 10, seed: int = 0) -> Samples:
    """Samples of two outcomes, in a random order of rows."""
    pairs = np.array(list(product(range(problems), range(each))))
    generator = np.random.default_rng(seed)
    generator.shuffle(pairs)
    return Samples(
        problem=pairs[:, 0],
        number=pairs[:, 1],
        outcome=generator.integers(0, 2, len(pairs)),
        length=np.full(len(pairs), length),
    )


def test_the_first_of_each_outcome_are_chosen() -> None:
    given = samples(problems=5, each=20)
    chosen = set(Rule(per_outcome=3, tokens=LONGEST, stride=1).rows(given).tolist())
    for problem, outcome in product(range(5), range(2)):
        rows = [i for i in range(100) if given.problem[i] == problem and given.outcome[i] == outcome]
        rows.sort(key=lambda i: given.number[i])
        assert {i for i in rows if i in chosen} == set(rows[:3])


def test_the_choice_does_not_depend_on_the_order_of_rows() -> None:
    one = samples(problems=4, each=9)
    order = np.random.default_rng(5).permutation(len(one.problem))
    other = Samples(*(getattr(one, name)[order] for name in ("problem", "number", "outcome", "length")))

    def chosen(of: Samples) -> list[tuple[int, int]]:
        return [(int(of.problem[i]), int(of.number[i])) for i in Rule(2, LONGEST, 1).rows(of)]

    assert chosen(one) == chosen(other)


@pytest.mark.parametrize(
    ("problems", "length", "rule"),
    [
        (10, 50, Rule(MOST, LONGEST, 1)),  # all that is ever shown
        (500, 200, Rule(2, LONGEST, 1)),  # fewer responses
        (500, 900, Rule(1, 256, 1)),  # shorter ones, too
        (4000, 9000, Rule(1, 256, 6)),  # and not every problem
    ],
)
def test_the_page_keeps_its_budget(problems: int, length: int, rule: Rule) -> None:
    given = samples(problems, each=8, length=length)
    found = choose_rule([given])
    assert found.shown_tokens(given) <= BUDGET
    assert found == rule


def test_the_gap_leaves_head_and_tail() -> None:
    rule = Rule(1, 100, 1)
    assert rule.gap(100) == (100, 0)
    assert rule.gap(1000) == (75, 900)


def test_no_samples_are_no_rows() -> None:
    assert len(Rule(1, 256, 1).rows(Samples(*[np.empty(0, dtype=np.int64)] * 4))) == 0


def test_the_rule_says_what_it_does() -> None:
    assert str(Rule(2, 1024, 1)) == (
        "for each problem and model, the first 2 responses of each outcome by sample number; of a "
        "response longer than 1,024 tokens, the middle is left out"
    )
    assert str(Rule(1, 256, 7)).startswith("for every 7th problem and model, the first response of each")
