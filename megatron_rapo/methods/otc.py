"""OTC (Optimal Tool Calls, arXiv 2504.14870): a right answer earns the less the more calls of tools it took.

    r = r_tool · r_answer
    r_tool = 1                       where m = n = 0
             cos(m π / (2 m + c))    where n = 0
             sin(f π / (2 n))        else,  f = 2 n m / (m + n)

m are the response's calls, n the fewest with which a response to the prompt was right so far, of this step
and all before. Advantages and clip are GRPO's. After the abstract and public descriptions. Ours: a prompt
that was never right has no n, and r_tool = 1, as its rewards are 0; the paper's factor α in front is left
out, as standardised advantages do not depend on it; and its value of c.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.facts import known_facts
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import PositiveFloat


class OTC(Method):
    """Rewards are multiplied by how near a response's tool calls are to the fewest known for its prompt."""

    reward_range = (0.0, np.inf)

    class Options(Clipping):
        """OTC (arXiv 2504.14870)."""

        method: str = "otc"
        calls_fact: str = Field("calls", description="The fact that tells how many calls an episode made.")
        smoothing: PositiveFloat = Field(
            5.0, description="c: how slowly rewards fall with the calls where none is needed."
        )

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.fewest: dict[str, int] = {}  # calls of a right response, by problem

    @property
    def facts(self) -> Sequence[str]:
        return (self.options.calls_fact,)

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        o, rewards = self.options, known_rewards(groups)
        calls = known_facts(groups, o.calls_fact, "algorithm.calls_fact")
        for group, of_group, earned in zip(groups, calls, rewards, strict=True):
            right = np.ma.masked_where(~np.ma.filled(earned > 0.0, False), of_group)
            if right.count():
                name = f"{group.problem.source}/{group.problem.id}"
                self.fewest[name] = min(int(right.min()), self.fewest.get(name, int(right.min())))
                earned *= [self._factor(name, count) for count in np.ma.filled(of_group, 0.0)]
        return standardised(rewards)

    def _factor(self, name: str, calls: float) -> float:
        return tool_reward(int(calls), self.fewest[name], self.options.smoothing)

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]

    def state(self) -> Any:
        return self.fewest

    def restore(self, state: Any) -> None:
        self.fewest = state


def tool_reward(calls: int, fewest: int, smoothing: float) -> float:
    """r_tool of m `calls` where n = `fewest` suffice; 1 at best."""
    if fewest == 0:
        return 1.0 if calls == 0 else math.cos(calls * math.pi / (2 * calls + smoothing))
    nearness = 2 * fewest * calls / (calls + fewest)
    return math.sin(nearness * math.pi / (2 * fewest))
