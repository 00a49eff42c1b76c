"""Generated tasks: problems that their own checkers, and an independent truth, agree on."""

from __future__ import annotations

import itertools
import json
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rapo.config import ArithmeticData, CountdownData
from megatron_rapo.data.tasks import arithmetic, countdown
from megatron_rapo.data.tasks.expression import flat_value
from megatron_rapo.errors import RapoError

FOUR = CountdownData(source="countdown", numbers=4, largest=25)
SUMS = ArithmeticData(source="arithmetic", terms=3, digits=2)


def answer(numbers: list[int], target: int) -> str:
    return json.dumps({"numbers": numbers, "target": target})


def reachable(numbers: list[int], operators: str) -> set[Fraction]:
    """Everything that the numbers reach without brackets, by Python's own arithmetic on Fractions."""
    values = set()
    for order in itertools.permutations(numbers):
        for signs in itertools.product(operators, repeat=len(numbers) - 1):
            text = f"Fraction({order[0]})" + "".join(
                f"{s}Fraction({n})" for s, n in zip(signs, order[1:], strict=True)
            )
            values.add(eval(text))
    return values


@pytest.mark.parametrize("operators", ["+", "+-*", "+-*/"])
def test_countdown_problems_can_be_solved_with_the_given_numbers(operators):
    config = CountdownData(source="countdown", numbers=3, largest=12, operators=operators)
    for problem in countdown.generate(config, seed=1, split="train", count=30):
        numbers, target = re.fullmatch(r"([\d ]+)=(\d+):", problem.question).groups()
        given = [int(number) for number in numbers.split()]
        assert len(given) == 3
        assert all(1 <= number <= 12 for number in given)
        assert 1 <= int(target) <= 99
        assert int(target) in reachable(given, operators)
        assert json.loads(problem.answer) == {"numbers": sorted(given), "target": int(target)}


@pytest.mark.parametrize(("task", "config"), [(countdown, FOUR), (arithmetic, SUMS)])
def test_problems_repeat_with_the_seed_and_differ_from_each_other(task, config):
    problems = task.generate(config, seed=5, split="train", count=300)
    assert problems == task.generate(config, seed=5, split="train", count=300)
    assert problems != task.generate(config, seed=6, split="train", count=300)
    assert len({problem.question for problem in problems}) == 300


def test_first_problems_stay_the_same_between_releases():
    """Runs, and the base model's figures, are comparable only as long as this holds."""
    first = countdown.generate(FOUR, seed=1, split="train", count=1)[0]
    assert (first.question, first.answer) == ("20 22 5 3=50:", '{"numbers":[3,5,20,22],"target":50}')
    first = countdown.generate(FOUR, seed=1, split="test", count=1)[0]
    assert (first.question, first.answer) == ("10 22 14 14=32:", '{"numbers":[10,14,14,22],"target":32}')


def test_countdown_splits_share_no_numbers_with_the_same_target():
    small = CountdownData(source="countdown", numbers=3, largest=6)
    train = {p.answer for seed in (1, 2) for p in countdown.generate(small, seed, "train", 800)}
    test = {p.answer for seed in (3, 4) for p in countdown.generate(small, seed, "test", 40)}
    assert len(test) > 10
    assert not train & test


def test_arithmetic_splits_share_no_numbers_with_the_same_operators():
    def bag(question: str) -> tuple[str, ...]:
        return tuple(sorted(re.findall(r"\d+|\D", question)))

    small = ArithmeticData(source="arithmetic", terms=2, digits=1)
    train = {bag(p.question) for p in arithmetic.generate(small, 1, "train", 200)}
    test = {bag(p.question) for p in arithmetic.generate(small, 2, "test", 8)}
    assert not train & test


def test_arithmetic_answers_are_the_values_of_their_questions():
    for problem in arithmetic.generate(SUMS, seed=1, split="test", count=100):
        assert problem.question.endswith("=")
        assert int(problem.answer) == eval(problem.question[:-1])


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("task", "config"),
    [
        (countdown, CountdownData(source="countdown", numbers=3, largest=2)),
        (arithmetic, ArithmeticData(source="arithmetic", terms=2, digits=1, operators="+")),
    ],
)
def test_asking_for_more_problems_than_there_are_says_how_many_there_are(task, config, split):
    with pytest.raises(RapoError, match=rf"1000 {split} problems .* only (\d+) could be found") as caught:
        task.generate(config, 1, split, 1000)
    found = int(re.search(r"only (\d+)", str(caught.value)).group(1))
    assert len(task.generate(config, 1, split, found)) == found


@pytest.mark.parametrize(
    "response",
    [
        "3*7+25-5",
        "(3*7)+(25-5)",
        " 25 + 7 × 3 − 5 ",
        "((25))-5+7*3",
        "3*7+25-5=41",
        "25-5=20, then 3*7=21\n\n25-5+3*7 = 41\n \n",
    ],
)
def test_countdown_accepts_every_exact_solution(response):
    assert countdown.is_correct(response, answer([3, 7, 25, 5], 41))


def test_countdown_divides_exactly():
    assert countdown.is_correct("8/(3-8/3)", answer([3, 3, 8, 8], 24))
    assert countdown.is_correct("8÷(3−8÷3)", answer([3, 3, 8, 8], 24))
    assert not countdown.is_correct("7/2", answer([7, 2], 3))
    assert not countdown.is_correct("1/3*3/1", answer([1, 3, 3], 1))


@pytest.mark.parametrize(
    "response",
    [
        "",
        "\n",
        "41",
        "3*7+25-5-0",
        "3*7+25+5",  # another value
        "25+3*7-5=42",  # claims another target
        "25+3*7-5=41=41",
        "25+3*7",  # a number is left out
        "25+3*7-5+5-5",  # one is used twice
        "25+21-5",  # an intermediate result in place of its numbers
        "3*7+25-5\nso it is 41",  # the last line decides
        "the answer is 3*7+25-5",
        "3*7+25-5)",
        "(3*7+25-5",
        "3*7+25--5",
        "-5+25+3*7",
        "3*7+2 5-5",
        "03*7+25-5",
        "3*7+25-5.0",
        "3**7+25-5",
        "3*7+25-٥",
        "25/(5-5)+3*7",
        "__import__('os')",
    ],
)
def test_countdown_refuses_everything_else(response):
    assert not countdown.is_correct(response, answer([3, 7, 25, 5], 41))


def test_countdown_counts_a_division_by_zero_as_wrong():
    assert not countdown.is_correct("1/(2-2)+3", answer([1, 2, 2, 3], 3))


@pytest.mark.parametrize(
    "response",
    ["(" * 1_000_000, "9" * 1_000_000, "1+" * 500_000 + "1", "1\n" * 500_000, " " * 1_000_000 + "1+2"],
    ids=["brackets", "digits", "sum", "lines", "spaces"],
)
def test_countdown_judges_any_input_in_bounded_time(response):
    start = time.perf_counter()
    assert not countdown.is_correct(response, answer([1, 2], 3))
    assert time.perf_counter() - start < 1.0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=2, max_size=4), st.lists(st.sampled_from("+-*/"), min_size=3))
def test_flat_values_agree_with_the_checker_and_with_python(numbers, operators):
    operators = operators[: len(numbers) - 1]
    text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))
    expected = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))
    assert flat_value(numbers, operators) == expected
    if expected.denominator == 1:
        assert countdown.is_correct(text, answer(numbers, int(expected)))
        assert not countdown.is_correct(text, answer(numbers, int(expected) + 1))


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("0123456789+-*/()= \n×x"), max_size=40))
def test_countdown_survives_junk_and_never_accepts_a_wrong_value(response):
    accepted = countdown.is_correct(response, answer([1, 2], 3))
    assert accepted in (True, False)
    if accepted:
        last_line = response.split("\n")[-1] or response.strip().split("\n")[-1]
        assert eval(last_line.partition("=")[0].strip()) == 3


@pytest.mark.parametrize(
    ("task", "gold"),
    [
        (countdown, "41"),
        (countdown, '{"numbers":[1,2]}'),
        (countdown, '{"numbers":3,"target":3}'),
        (arithmetic, "forty"),
        (arithmetic, ""),
    ],
)
def test_an_unreadable_gold_answer_is_an_error_and_not_a_wrong_response(task, gold):
    with pytest.raises(RapoError):
        task.is_correct("1+2 \\boxed{3}", gold)


@pytest.mark.parametrize(
    ("response", "gold"),
    [
        (r"so \boxed{46}", "46"),
        (r"\boxed{1} no, \boxed{46}.", "46"),
        (r"\boxed{ +046 }", "46"),
        (r"\boxed{-1,234,567}", "-1234567"),
        (r"\boxed{−5}", "-5"),
        (r"\boxed{0}", "-0"),
        (r"\boxed{5}", "+5"),
    ],
)
def test_arithmetic_accepts_the_integer_in_the_last_box(response, gold):
    assert arithmetic.is_correct(response, gold)


@pytest.mark.parametrize(
    "response",
    [
        "",
        "1234",
        r"\boxed{}",
        r"\boxed{1234",
        r"\boxed{1234} or \boxed{1235}",
        r"\boxed{1234} \boxed{",
        r"\boxed{-1234}",
        r"\boxed{12,34}",
        r"\boxed{1234.0}",
        r"\boxed{1 234}",
        r"\boxed{1_234}",
        r"\boxed{{1234}}",
        r"\boxed{1200+34}",
        "\\boxed{" + "1" * 1_000_000 + "}",
    ],
)
def test_arithmetic_refuses_everything_else(response):
    assert not arithmetic.is_correct(response, "1234")
