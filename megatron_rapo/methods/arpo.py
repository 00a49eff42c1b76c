"""ARPO (Agentic Reinforced, arXiv 2507.19849): more samples where a tool's answer surprises.

    N of the G responses to a prompt are sampled whole; of turn k ≥ 1 of these, up to Z more go on from there
    each with the probability  P = p0 + w (H_k − H_0),      H_k the entropy of the turn's first m tokens
    what is left of G is sampled whole
    A = (r − mean r) / std r over all of them;  of tokens that several responses share:
    soft: each response's own A, so that their gradients are averaged;  hard: the mean of their A

After the abstract, public descriptions and the public code (github.com/dongguanting/ARPO), of which
N = G / 2, Z = 1, m = 20, p0 = 0.5 and w = 0.2 are. Ours: H is −mean log μ of the tokens as sampled, an
estimate in nats, where the code has the 10 most probable tokens of each and divides by the logarithm of
the vocabulary; chance is a digest of the tokens, so that a run that goes on draws the same; branches do
not branch again; no divergence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, Literal

import numpy as np
from pydantic import Field

from megatron_rapo.episode.brief import BriefEpisode
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.methods.turns import spread, turns_of
from megatron_rapo.section import Fraction, NonNegativeFloat, PositiveInt


class ARPO(Method):
    """Clipped policy gradient of responses that branch after a tool's answer where entropy rose."""

    class Options(Clipping):
        """ARPO (arXiv 2507.19849)."""

        method: str = "arpo"
        whole: float = Field(0.5, gt=0, le=1, description="N / G: share of responses sampled whole first.")
        branches: PositiveInt = Field(1, description="Z: most branches of a turn.")
        branch_probability: Fraction = Field(0.5, description="p0: where entropy did not change.")
        entropy_weight: NonNegativeFloat = Field(0.2, description="w: of the entropy's rise, per nat.")
        entropy_tokens: PositiveInt = Field(20, description="m: tokens of a turn that its entropy is of.")
        shared: Literal["soft", "hard"] = Field("soft", description="The advantage of shared tokens.")

    options: Options
    reads_responses = True

    def ask(self, groups: Sequence[Group]) -> Sequence[Sequence[Guide]]:
        """Some whole; then branches of these, and the rest whole."""
        count = self.configured.responses_per_prompt
        first = max(1, round(count * self.options.whole))
        return [self._more(group, count - first) if group.episodes else [PLAIN] * first for group in groups]

    def _more(self, group: Group, left: int) -> list[Guide]:
        if len(group.episodes) >= self.configured.responses_per_prompt:
            return []
        branches = list(islice(self._branches(group), left))
        return branches + [PLAIN] * (left - len(branches))

    def _branches(self, group: Group) -> Iterator[Guide]:
        """Earlier turns first."""
        o = self.options
        of_turns = [_log_probs(one) for one in group.episodes]
        entropies = [[-float(own[: o.entropy_tokens].mean()) for own in turns] for turns in of_turns]
        for turn in range(1, max(map(len, of_turns))):
            for number, own in enumerate(entropies):
                for branch in range(o.branches if turn < len(own) else 0):
                    drawn = _chance(group.episodes[number], turn, branch)
                    if drawn < o.branch_probability + o.entropy_weight * (own[turn] - own[0]):
                        yield Guide(after=(number, turn), name="branch")

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        own = standardised(known_rewards(groups))
        if self.options.shared == "soft":
            return own
        return [_of_turns(group, row) for group, row in zip(groups, own, strict=True)]

    def terms(self) -> Sequence[tuple[float, Term]]:
        return [(1.0, self.options.surrogate())]


def _of_turns(group: Group, advantages: Any) -> list[Any]:
    """Of each episode's tokens: the mean over all known episodes that have them."""
    sharing: dict[tuple[int, int], list[float]] = {}
    for number, one in enumerate(group.episodes):
        for turn in range(len(turns_of(one)) if one.reward is not None else 0):
            sharing.setdefault(_origin(group, number, turn), []).append(float(advantages[number]))
    means = {turn: sum(values) / len(values) for turn, values in sharing.items()}
    return [
        spread([means.get(_origin(group, number, turn), 0.0) for turn in range(len(turns_of(one)))], one)
        for number, one in enumerate(group.episodes)
    ]


def _origin(group: Group, number: int, turn: int) -> tuple[int, int]:
    """The episode that first had this turn of this episode."""
    after = group.episodes[number].guide.after
    return (after[0], turn) if after is not None and turn < after[1] else (number, turn)


def _log_probs(one: ScoredEpisode) -> list[Any]:
    """Of each turn's tokens, as sampled."""
    if isinstance(one.episode, BriefEpisode) or not one.episode.sequences:
        return []
    sampled = np.concatenate([sequence.log_probs[sequence.sampled] for sequence in one.episode.sequences])
    return np.split(sampled.astype(np.float64), np.cumsum(turns_of(one))[:-1])


def _chance(one: ScoredEpisode, turn: int, branch: int) -> float:
    """From 0 to 1, of the tokens before the turn."""
    assert not isinstance(one.episode, BriefEpisode)
    digest = hashlib.blake2b(f"{turn}/{branch}".encode(), digest_size=8)
    for sequence in one.episode.sequences:
        digest.update(sequence.token_ids.tobytes())
    return int.from_bytes(digest.digest(), "big") / 2**64
