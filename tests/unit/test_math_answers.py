r"""The `math` verifier: which final answers it finds, and what it takes for equal."""

import json
import random
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rapo.config.verifiers import built_in
from megatron_rapo.data.golds import join
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.reward import values
from megatron_rapo.reward.math_answers import RESPONSE_TAIL, final_answer, is_correct, stating
from megatron_rapo.reward.verifier import Verifier
from tests.judging import outcomes as outcomes_of

SPELLINGS = defaultdict(list)
for line in (Path(__file__).parents[1] / "spellings.jsonl").open(encoding="utf-8"):
    SPELLINGS[json.loads(line)["kind"]].append(json.loads(line))

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(scope="module")
def verifier():
    with Verifier(built_in("math"), workers=2, time_limit_s=30.0) as started:
        yield started


@pytest.mark.parametrize("kind", sorted(SPELLINGS))
def test_right_spellings_are_correct_and_near_misses_wrong(kind):
    found = [(row, is_correct(row["response"], row["gold"])) for row in SPELLINGS[kind]]
    assert [row for row, correct in found if correct is not row["right"]] == []
    assert {True, False} == {row["right"] for row in SPELLINGS[kind]}


@pytest.mark.parametrize(
    ("response", "found"),
    [
        (rf"So \boxed{{1}}. {'On reflection that cannot be. ' * 3}So \boxed{{2}}", "2"),
        (r"From $x = 1$ follows $\boxed{2}$", "2"),
        (r"\[ \boxed{2} \]", "2"),
        (r"I got \boxed{2}. That took 3 steps", "2"),
        ("1, 3. The final answer is $2$. I hope it is correct.", "2"),
        ("Given 1 and 3, the answer is 2.", "2"),
        ("1 + 1 = 2", "2"),
    ],
)
def test_the_final_answer_is_found(response, found):
    assert is_correct(response, found)
    assert not is_correct(response, "1")
    assert not is_correct(response, "3")


@pytest.mark.parametrize(
    "response", ["", "no number at all", r"\boxed{}", r"\boxed{", r"\boxed{2}, \boxed{3}"]
)
def test_a_response_without_the_answer_is_wrong(response):
    assert not is_correct(response, "2")


def test_a_number_elsewhere_does_not_stand_in_for_an_answer_that_does_not_parse():
    assert not is_correct(r"We add 2 and 3, so \boxed{\frac{2 + 3 -}}.", "2")
    assert not is_correct(r"\boxed{2}", r"2007 + \frac\pi 2")


def test_only_the_end_of_a_response_counts():
    answer = r"\boxed{2}."
    assert is_correct("\n" * 10_000_000 + answer, "2")
    assert is_correct(answer + " " * (RESPONSE_TAIL - len(answer)), "2")
    assert not is_correct(answer + " " * RESPONSE_TAIL, "2")


@pytest.mark.parametrize("gold", ["", "  ", "$$", r"\text{}", r"\boxed{}", r"\boxed{5", "."])
def test_a_gold_answer_that_is_empty_is_an_error(gold):
    with pytest.raises(ValueError, match="holds nothing to compare with"):
        is_correct(r"\boxed{2}", gold)


@pytest.mark.parametrize(
    "gold",
    [
        "Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $18.\n#### 18",
        "#### 18",
        "He has 5 apples. She has 6.",
        "Natalia sold altogether in the months of April and May as many as 72 clips to her friends",
    ],
)
def test_a_gold_answer_that_is_a_solution_is_an_error(gold):
    with pytest.raises(ValueError, match="is a sentence or a solution; give the final answer alone"):
        is_correct(rf"\boxed{{{gold}}}", gold)


def test_the_longest_gold_answer_has_ten_words():
    gold = rf"\text{{{'word ' * 10}}}"
    assert is_correct(stating(gold), gold)
    with pytest.raises(ValueError, match="is a sentence or a solution"):
        is_correct(r"\boxed{2}", gold.replace("word", "word word", 1))


@pytest.mark.parametrize(("letters", "found"), [(58, True), (59, False)])
def test_an_answer_in_words_is_no_longer_than_sixty_characters(letters, found):
    text = f"a {'b' * letters}"
    assert final_answer(f"The answer is {text} .") == (text if found else None)


@pytest.mark.parametrize(
    ("several", "right", "wrong"),
    [
        ("any", [r"\boxed{1/2}", r"\boxed{(1,2)}", r"\boxed{0.5}"], [r"\boxed{1/2,(1,2)}", r"\boxed{2}"]),
        ("all", [r"\boxed{1/2, (1,2)}", r"\boxed{(1,2), 0.5}"], [r"\boxed{1/2}", r"\boxed{(1,2)}"]),
    ],
)
def test_several_gold_answers_are_right_one_by_one_or_together(several, right, wrong):
    gold = join([r"\frac{1}{2}", "(1,2)"], several)
    assert is_correct(stating(gold), gold)
    assert [response for response in right if not is_correct(response, gold)] == []
    assert [response for response in wrong if is_correct(response, gold)] == []


def test_golds_of_a_list_may_be_lists():
    gold = join(["1,2", "3"], "all")
    assert is_correct(r"\boxed{3,2,1}", gold)
    assert not is_correct(r"\boxed{3,2}", gold)
    # The gold's decimal decides how near an answer must come, in a list as alone.
    assert is_correct(r"\boxed{2, 0.3470005}", join(["0.347", "2"], "all"))
    assert not is_correct(r"\boxed{2, 0.347}", join(["0.3470005", "2"], "all"))


def test_one_gold_of_a_list_is_itself():
    assert join(["5"], "any") == join(["5"], "all") == "5"


def test_values_are_compared_at_the_same_points_each_time():
    seen = []
    for seed in (1, 2):
        random.seed(seed)
        seen.append(values._coordinates(3, 1, whole=False))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    "name",
    ["simplerl_math_lv3to5_8k", "math500", "aime24", "aime25", "amc23", "gsm8k_test", "minerva_math"],
)
def test_every_gold_answer_is_correct_against_itself(verifier, name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    rows = [json.loads(line) for line in path.open()]
    golds = [row["answer"] for row in rows if row["answer"]]
    golds = golds[:: 1 + len(golds) // 1500]  # a sample of the largest: tests are to be quick
    outcomes = outcomes_of(verifier, [(rf"The answer is \boxed{{{gold}}}.", gold) for gold in golds])
    disagreements = [
        gold for gold, outcome in zip(golds, outcomes, strict=True) if outcome != Outcome.CORRECT
    ]
    assert disagreements == []


@pytest.mark.parametrize("name", ["math500", "minerva_math"])
def test_every_worked_solution_is_correct(verifier, name):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path.name} is not on this machine")
    rows = [json.loads(line) for line in path.open()]
    outcomes = outcomes_of(verifier, [(row["solution"], row["answer"]) for row in rows])
    assert [row["answer"] for row, outcome in zip(rows, outcomes, strict=True) if outcome != "correct"] == []


COMMANDS = [r"\boxed{", r"\frac", r"\sqrt", r"\text{", r"\infty", r"\pi", r"\sum_", r"\le", r"\\"]
DELIMITERS = [r"\{", r"\}", "{", "}", r"\[", r"\]", "[", "]", r"\(", r"\)", "(", ")", "$", "$$", "|"]
WORDS = ["0", "1", "12", "x", "e", "i", "zoo", "answer", "final answer is", " ", "\n", *"^_,.=<-+*/!%&"]
PIECES = st.sampled_from(COMMANDS + DELIMITERS + WORDS)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=40), min_size=10, max_size=10))
def test_no_text_harms_the_verifier_or_passes_by_accident(verifier, texts):
    boxed = [rf"\boxed{{{text}}}" for text in texts]
    control = (r"\boxed{1234567}", "1234567")
    *outcomes, last = outcomes_of(verifier, [*((text, "1234567") for text in texts + boxed), control])
    assert Outcome.CORRECT not in outcomes
    assert last == Outcome.CORRECT


HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{" + "(" * 2000 + ")" * 2000 + "}",
    r"\boxed{" + r"\frac{1}{" * 300 + "2" + "}" * 300 + "}",
    r"\boxed{" + "9" * 5000 + "}",
    r"\boxed{(10^{10})!}",
    r"\boxed{\sum_{n=1}^{10^{9}} \frac{1}{n}}",
]


def test_hostile_answers_cost_their_time_limit_and_nothing_else():
    with Verifier(built_in("math"), workers=2, time_limit_s=1.0) as verifier:
        items = [item for text in HOSTILE for item in ((text, "7"), (r"\boxed{7}", "7"))]
        outcomes = outcomes_of(verifier, items)
    assert outcomes[0] == Outcome.TIMEOUT
    assert Outcome.CORRECT not in outcomes[::2]
    assert outcomes[1::2] == [Outcome.CORRECT] * len(HOSTILE)
