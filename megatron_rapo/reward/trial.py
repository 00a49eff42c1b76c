"""Reward functions tried before a run starts: on a made-up response to the first problem of each data set."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rapo.config import Data, RunConfig
from megatron_rapo.config.algorithm import find_method
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.reward.verifier import Verifier

RESPONSE = "This response is made up, to try the reward."


@dataclass(frozen=True)
class Trial:
    """What came of it, for people.

    Attributes:
        known: whether there was a reward.
    """

    text: str
    known: bool = True

    def __str__(self) -> str:
        return self.text


def try_rewards(config: RunConfig, tables: Sequence[tuple[str, Data, Problem | None]]) -> Iterator[Trial]:
    """Tries each reward that is not a built-in verifier alone, in a process as the run has them.

    Args:
        config: of the run.
        tables: of each data set the table that the user set, and a problem; None where there is none yet: the
            functions are then imported, and not called.

    Raises:
        RapoError: a function cannot be imported, takes other arguments, or returned what is no reward, or
            not one that the method takes.
    """
    tried: set[str] = set()
    for table, data, problem in tables:
        plan = config.verifier_of(data)
        if plan.is_verifier or str(plan) in tried:
            continue
        tried.add(str(plan))
        options = config.reward.model_copy(update={"workers": 1})
        with Verifier.configured(plan, options) as verifier:
            if problem is None:
                yield Trial(f"{plan}: imported; not tried, as there is no problem of {table} here")
                continue
            start = time.perf_counter()
            [found] = verifier.verify([(RESPONSE, problem)])
            seconds = time.perf_counter() - start
        asked = f"a made-up response to problem {problem.id} of {table}"
        if found.reward is None:
            why = f"{found.outcome} ({found.why})" + (f"\n{found.trace}" if found.trace else "")
            yield Trial(f"{plan}: unknown for {asked}, by {why}", known=False)
            continue
        _check_range(config, str(plan), found.reward)
        facts = "".join(f", {name} {value:g}" for name, value in found.facts.items())
        yield Trial(f"{plan}: {found.reward:g} for {asked}, in {seconds:.3f} s{facts}")


def _check_range(config: RunConfig, plan: str, reward: float) -> None:
    method = config.algorithm.method
    low, high = find_method(method).reward_range
    if not low <= reward <= high:
        raise RapoError(
            f'{plan} gave a made-up response the reward {reward:g}, and algorithm.method = "{method}" takes '
            f"rewards from {low:g} to {high:g}; scale the reward, or choose another method"
        )
