"""Scored groups for prompts: every data-parallel head samples and verifies its share, all ranks get all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import Rollout
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.episode.group import Group
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.reward.scoring import score_groups
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.groups import RolloutGroup

T = TypeVar("T")


class Collector:
    """Asks engines and verifier on heads; the other ranks of a replica receive what their head got.

    Attributes:
        recover: makes engines serve a version of the weights again, on all ranks, where a rollout has lost
            too many; without it such a rollout is an error.
    """

    def __init__(
        self,
        rollout: Rollout,
        placement: Placement,
        tokenizer: PreTrainedTokenizerBase,
        engines: SharedEngines,
        verifiers: Mapping[str, Verifier],
    ) -> None:
        """`verifiers` are this head's own, by the data set that each judges; none on other ranks."""
        self.rollout = rollout
        self.placement = placement
        self.tokenizer = tokenizer
        self.engines = engines
        self.verifiers = verifiers
        self.recover: Callable[[int], object] | None = None

    def sample(
        self, prompts: Sequence[Prompt], *, sampling: Sampling, weight_version: int, seed: int
    ) -> list[RolloutGroup]:
        """This head's share of the prompts with their responses; nothing on other ranks. All ranks call it.

        What engines that failed leave open is sampled from those that are left, or that came back.

        Args:
            prompts: the same on all ranks.
            sampling: how many responses of each prompt, and how they are drawn.
            weight_version: that must have sampled every token.
            seed: of this batch of samples.

        Raises:
            RapoError: engines refused, or too few are left.
        """
        mine = list(prompts[self.placement.data_rank :: self.placement.layout.data_parallel])
        groups: dict[int, RolloutGroup] = {}

        def ask() -> int:
            """Samples what is missing here; how much still is."""
            pool = self.engines.pool
            if pool is None:
                return 0
            missing = [place for place in range(len(mine)) if place not in groups]
            found = pool.generate(
                [mine[place] for place in missing],
                responses_per_prompt=sampling.responses_per_prompt,
                max_response_tokens=sampling.max_response_tokens,
                temperature=sampling.temperature,
                weight_version=weight_version,
                seed=seed,
            )
            answered = zip(missing, found, strict=True)
            groups.update((place, group) for place, group in answered if group is not None)
            return len(mine) - len(groups)

        self.until_complete(ask, weight_version)
        return [groups[place] for place in sorted(groups)]

    def until_complete(self, ask: Callable[[], int], weight_version: int) -> None:
        """Has every head ask its engines until nothing is missing; all ranks call it.

        Args:
            ask: samples what is missing here, as far as engines are left; returns how much still is.
            weight_version: that engines get again before the next try.

        Raises:
            RapoError: engines refused, or too few are left.
        """
        while self.engines.any_missing(ask()):
            if self.recover is None:
                raise self.engines.too_few()
            self.recover(weight_version)

    def score(self, groups: Sequence[RolloutGroup]) -> list[Group]:
        """Verifies this head's groups; nothing on other ranks."""
        if not self.verifiers:
            return []
        scored: dict[int, Group] = {}
        for verifier in {id(one): one for one in self.verifiers.values()}.values():
            mine = [i for i, one in enumerate(groups) if self.verifiers[one.prompt.source] is verifier]
            found = score_groups([groups[i] for i in mine], verifier, self.tokenizer)
            scored.update(zip(mine, found, strict=True))
        return [scored[i] for i in range(len(groups))]

    def share(self, mine: Sequence[T]) -> list[T]:
        """What all heads made of their shares of the prompts, in the prompts' order, on all ranks."""
        shares = self.placement.share_from_heads(list(mine))
        merged = [None] * sum(len(share) for share in shares)
        for head, share in enumerate(shares):
            merged[head :: len(shares)] = share  # type: ignore[assignment]
        return merged  # type: ignore[return-value]
