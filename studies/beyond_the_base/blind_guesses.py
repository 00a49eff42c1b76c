"""How many Countdown problems blind guesses solve, by how often they multiply: exactly, without a model.

    python studies/beyond_the_base/blind_guesses.py

A guess takes the numbers in any order, each operator × with the given chance, else + or −. The table of
README.md: of a model 85% of whose responses are such guesses, and none of the others correct.
"""

from __future__ import annotations

from itertools import permutations, product
from math import prod

from megatron_rapo.config import CountdownData
from megatron_rapo.data.tasks import countdown
from megatron_rapo.data.tasks.problem import Problem

TASK = CountdownData(source="countdown", numbers=3, largest=25, operators="+-*")
SHARES = (1 / 3, 0.1, 0.03, 0.01, 0.005, 0.002)
GUESSED = 0.85
PROBLEMS = 256


def chance(problem: Problem, share: float) -> float:
    """Of one blind guess to be right."""
    orders = list(permutations(problem.question.partition("=")[0].split()))
    right = 0.0
    for (a, b, c), (first, second) in product(orders, product(TASK.operators, repeat=2)):
        if countdown.is_correct(f"{a}{first}{b}{second}{c}", problem.answer):
            right += prod(share if sign == "*" else (1 - share) / 2 for sign in (first, second))
    return right / len(orders)


def main() -> None:
    """Prints the table."""
    problems = countdown.generate(TASK, 1, "test", PROBLEMS)
    print(
        "| share of × | pass@256 | pass@1024 | of 128 problems unsolved in 1,280 samples |\n|---|---|---|---|"
    )
    for share in SHARES:
        missed = [1 - GUESSED * chance(problem, share) for problem in problems]
        at_256, at_1024, at_1280 = (sum(one**k for one in missed) / PROBLEMS for k in (256, 1024, 1280))
        print(f"| {share:.3g} | {1 - at_256:.3f} | {1 - at_1024:.3f} | {128 * at_1280:.1f} |")


if __name__ == "__main__":
    main()
