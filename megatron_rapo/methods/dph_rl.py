"""DPH-RL ("The Choice of Divergence", arXiv 2509.07430): what the base model masters is rehearsed.

    J = E_{x ∈ D_exp}[ g(θ) ] − η · E_{x ∈ D_pef}[ D_f(π_ref ‖ π) ]

D_pef are the prompts that the base model solves at least with the given rate, which a column of the data
tells; there D_f, the forward KL or the Jensen–Shannon divergence, keeps what it can do, and nothing is
rewarded. On all other prompts there is the policy gradient alone. After the abstract and public
descriptions. Ours: D_f is exact over the vocabulary, at the policy's own prefixes, where the paper estimates
it on samples that the base model left before training; both parts are averaged over the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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
    """A divergence that covers modes where the base model solves a prompt, the policy gradient elsewhere."""

    class Options(Clipping):
        """DPH-RL (arXiv 2509.07430)."""

        method: str = "dph_rl"
        base_success_column: str = Field(
            "base_success", description="The column of a problem that has the base model's success rate."
        )
        mastered_rate: Fraction = Field(1.0, description="From this rate a prompt is of D_pef.")
        divergence: Literal["forward", "jensen_shannon"] = Field(
            "forward", description="D_f: KL(π_ref ‖ π), or between both directions."
        )
        divergence_coefficient: PositiveFloat = Field(0.01, description="η, of the divergence.")

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
        o = self.options
        return [(1.0, o.surrogate()), (o.divergence_coefficient, Rehearsal(o.divergence))]


@dataclass(frozen=True)
class Rehearsal(Term):
    """The divergence from the reference where the mark `mastered` is 1."""

    divergence: Literal["forward", "jensen_shannon"]
    reads = frozenset({"mastered"})

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        """The divergence."""
        return frozenset({Need.FORWARD_KL if self.divergence == "forward" else Need.JENSEN_SHANNON})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself as `rehearsal`."""
        [need] = self.needs
        loss = token.marks["mastered"].to(token.log_prob.dtype) * present(getattr(token, need.value))
        return loss, {"rehearsal": loss}
