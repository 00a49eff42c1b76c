"""Countdown with another try: a wrong answer is told by asking the question again."""

from __future__ import annotations

import re

from megatron_rapo import Episode, Generate, Problem, Score, Transcript


class TryAgain:
    """Up to `tries` answers to one problem; the reward is 1 / the number of the first right one."""

    def __init__(self, tries: int = 2) -> None:
        self.tries = tries

    async def run(self, problem: Problem, generate: Generate, seed: int) -> Episode:
        transcript = Transcript(problem.token_ids)
        reward = 0.0
        for number in range(self.tries):
            if number:
                transcript.add_given(problem.token_ids)  # as tokens: text is never encoded again
            turn = await generate(transcript.token_ids, turn=number)
            transcript.add_turn(turn)
            if is_right(turn.text, problem):
                reward = 1 / (number + 1)
                break
            if turn.truncated:
                break
        return Episode(
            sequences=(transcript.sequence(),),
            answer=turn.text,
            score=Score(reward, facts={"tries": number + 1}, answer=turn.text.strip()),
            truncated=turn.truncated,
        )


def is_right(text: str, problem: Problem) -> bool:
    """Whether its last line, up to =, has all the problem's numbers, + − *, and comes to the target."""
    text = text.strip().rpartition("\n")[2].partition("=")[0].replace(" ", "")
    if not re.fullmatch(r"\d+([+*-]\d+)*", text):
        return False
    terms = [sign + term for sign, term in re.findall(r"(^|[+-])([^+-]+)", text)]
    value = sum(product(term) for term in terms)
    numbers = sorted(int(number) for number in re.findall(r"\d+", text))
    return numbers == sorted(problem["numbers"]) and value == problem["target"]


def product(term: str) -> int:
    """`-2*3` → −6"""
    first, *others = map(int, term.split("*"))
    for other in others:
        first *= other
    return first
