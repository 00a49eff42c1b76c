"""DPH-RL ("The Choice of Divergence", arXiv 2509.07430): what the base model masters is rehearsed.

    J = E_{x ∈ D_exp}[ g(θ) ] − η · E_{x ∈ D_pef}[ D_f(π_ref ‖ π) ]

D_pef are the prompts that the base model solves at least with the given rate, which a column of the data
tells; there the forward KL keeps what it can do, and nothing is rewarded. On all other prompts there is the
policy gradient alone. After the abstract and public descriptions. Ours: the forward KL is exact over the
vocabulary, at the policy's own prefixes, where the paper estimates it on samples that the base model left
before training; both parts are averaged over the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from megatron_rapo.episode.facts import finite_number
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import AtToken, Need, Term, present
from megatron_rapo.section import Fraction, PositiveFloat

if TYPE_CHECKING:
    from torch import Tensor


class DPHRL(Method):
    """A forward KL where the base model already solves a prompt, the policy gradient elsewhere."""

    class Options(Clipping):
        """DPH-RL (arXiv 2509.07430)."""

        method: str = "dph_rl"
        base_success_column: str = Field(
            "base_success", description="The column of a problem that has the base model's success rate."
        )
        mastered_rate: Fraction = Field(1.0, description="From this rate a prompt is of D_pef.")
        divergence_coefficient: PositiveFloat = Field(0.01, description="η, of the forward KL.")

    options: Options

    @property
    def columns(self) -> Sequence[str]:
        return (self.options.base_success_column,)

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """0 on prompts of D_pef."""
        return np.where(self._mastered(groups)[:, None], 0.0, standardised(known_rewards(groups)))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        mastered = self._mastered(groups)
        return {"mastered": [[float(one)] * len(g.episodes) for one, g in zip(mastered, groups, strict=True)]}

    def _mastered(self, groups: Sequence[Group]) -> np.ndarray:
        return np.array([self._rate(group) >= self.options.mastered_rate for group in groups])

    def _rate(self, group: Group) -> float:
        column = self.options.base_success_column
        rate = finite_number(group.problem.get(column))
        if rate is None:
            raise RapoError(
                f'algorithm.base_success_column = "{column}": problem {group.problem.id} has no number; '
                "add the base model's success rate to the data, or name the column that has it"
            )
        return rate

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate()), (self.options.divergence_coefficient, Rehearsal())]


@dataclass(frozen=True)
class Rehearsal(Term):
    """KL(reference ‖ policy) where the mark `mastered` is 1."""

    needs = frozenset({Need.FORWARD_KL})
    reads = frozenset({"mastered"})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `rehearsal`."""
        loss = token.marks["mastered"].to(token.log_prob.dtype) * present(token.forward_kl)
        return loss, {"rehearsal": loss}
