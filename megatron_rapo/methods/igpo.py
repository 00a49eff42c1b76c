"""IGPO (Information Gain, arXiv 2510.14967): each turn earns what it told of the answer.

    r_t = p_t − p_{t−1}   for t = 1 … T − 1,   r_T = r
    p_t = exp( 1/|a| Σ_j log π_old(a_j | turns 1 … t, a_<j) )
    Ã_t = (r_t − mean r) / std r   over all turns of all the group's episodes
    A_t = Σ_{k ≥ t} γ^(k − t) Ã_k

p_t is the policy's probability of the true answer a, were it to be told after turn t and what follows it; p_0
after the prompt. So a turn that finds out something is rewarded, be the final answer wrong. After the
abstract, public descriptions and the public code (github.com/GuoqingWang1/IGPO). Ours: a has the end of
sequence, and words around it by an option, of which the code leaves its own out of the mean; rewards are
compared before they are summed, where the code compares sums; a turn earns 0 where a does not fit behind it;
GRPO's clip; no divergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.by_episode import Responses
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.guided import chosen_of, filled, rewards_of
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.policy_gradient import AdvantageOfMark
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.methods.turns import spread, turns_of

if TYPE_CHECKING:
    from torch import Tensor

_ANY = -1  # the prompt is that of all episodes


class IGPO(Method):
    """A turn earns by how much the policy's probability of the true answer rose over it."""

    class Options(Clipping):
        """IGPO (arXiv 2510.14967)."""

        method: str = "igpo"
        discount: float = Field(1.0, ge=0, le=1, description="γ: of later turns' rewards.")
        told: str = Field("{answer}", description="What is a; it has `{answer}`.")

    options: Options

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """G episodes; then, of each of several turns, the answer after all but the last; once after none."""
        plain = [PLAIN] * self.configured.responses_per_prompt
        return [self._probes(group) if group.episodes else plain for group in groups]

    def _probes(self, group: Group) -> list[Guide]:
        if group.episodes[-1].guide != PLAIN or not group.problem.answer.strip():
            return []
        several = [number for number, one in enumerate(group.episodes) if len(turns_of(one)) > 1]
        places = [(number, 0) for number in several[:1]]
        places += [(n, turn) for n in several for turn in range(1, len(turns_of(group.episodes[n])))]
        told = filled(self.options.told, answer=group.problem.answer)
        return [Guide(after=place, response=told, name="answer") for place in places]

    def choose(self, groups: Sequence[Group]) -> OfEpisodes:
        """What was sampled."""
        return chosen_of(super().choose, groups, _plain(groups))

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        """GRPO's; the marks replace them."""
        return standardised(rewards_of(groups, _plain(groups)))

    def mark_responses(self, groups: Sequence[Group]) -> Mapping[str, OfEpisodes]:
        self._groups, self._responses = groups, Responses(groups)
        turn = [[_turns(one) for one in group.episodes] for group in groups]
        return {**self._responses.marks(), "turn": turn}

    def mark_tokens(self, tokens: Annotated) -> Mapping[str, Tensor]:
        """A_t of each token's turn."""
        log_probs = self._responses.sums(tokens.old_log_probs, tokens)
        by_turn = [self._of_group(*pair) for pair in zip(self._groups, log_probs, strict=True)]
        found = tokens.advantages.double() * 0.0
        for turn in range(max((len(own) for of_group in by_turn for own in of_group), default=0)):
            values = np.zeros(log_probs.shape)
            for row, of_group in zip(values, by_turn, strict=True):
                row[: len(of_group)] = [own[turn] if turn < len(own) else 0.0 for own in of_group]
            found += self._responses.spread(values, tokens) * (tokens.marks["turn"] == turn)
        return {"advantage": found.to(tokens.advantages.dtype)}

    def _of_group(self, group: Group, log_probs: Any) -> list[Any]:
        """A_t of each episode's turns; none of one that is not compared."""
        p: dict[tuple[int, int], float] = {}
        for one, log_prob in zip(group.episodes, log_probs, strict=False):
            if one.guide.after is not None and log_prob is not np.ma.masked:
                number, turn = one.guide.after
                p[number if turn else _ANY, turn] = math.exp(log_prob / one.episode.trained_tokens)
        rewards = [_rewards(number, one, p) for number, one in enumerate(group.episodes)]
        flat = np.concatenate(rewards)
        compared = standardised(flat[None])[0] if len(flat) > 1 else 0.0 * flat
        ends = np.cumsum([len(own) for own in rewards])[:-1]
        return [self._discounted(own) for own in np.split(compared, ends)]

    def _discounted(self, values: Any) -> list[float]:
        """Σ_{k ≥ t} γ^(k − t) of the values, of each t."""
        found, following = [], 0.0
        for value in values[::-1]:
            following = float(value) + self.options.discount * following
            found.append(following)
        return found[::-1]

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        return [(1.0, AdvantageOfMark(o.clip_low, o.clip_high, o.clip_dual))]


def _plain(groups: Sequence[Group]) -> list[list[bool]]:
    return [[one.guide == PLAIN for one in group.episodes] for group in groups]


def _turns(one: ScoredEpisode) -> Any:
    """The turn of each trained token; all of a text are of none."""
    return spread(range(len(turns_of(one))), one) if one.guide == PLAIN else -1.0


def _rewards(number: int, one: ScoredEpisode, p: Mapping[tuple[int, int], float]) -> Any:
    """r_t of each turn; 0 where a probability is not known. None of an episode of unknown reward."""
    turns = len(turns_of(one))
    if one.guide != PLAIN or one.reward is None or not turns:
        return np.zeros(0)
    told = [p.get((number if turn else _ANY, turn)) for turn in range(turns)]
    gains = [0.0 if None in (a, b) else b - a for a, b in pairwise(told)]  # type: ignore[operator]
    return np.array([*gains, one.reward])
