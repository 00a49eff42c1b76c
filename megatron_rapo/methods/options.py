"""The options that every method has."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rapo.section import PositiveInt, Section


class Options(Section):
    """What is learnt, and the options that every method has; each has its own beside them, below."""

    method: str = Field(
        description="What is learnt, and how: one of the methods below, each with options of its own, or "
        '`"my_package.mine:Mine"`, a class of yours (docs/methods.md).',
    )
    minibatch_prompts: PositiveInt | None = Field(
        None,
        description="Prompts of one optimizer update; must divide rollout.prompts_per_step. "
        "Default: all of them, one update a step.",
    )
    mask_truncated: bool = Field(
        False, description="Leave responses that were cut at max_response_tokens out of the loss."
    )
    groups_without_variance: Literal["keep", "keep_failed", "drop"] = Field(
        "keep",
        description="Groups whose responses all earned the same teach nothing by comparison. `keep`: they "
        "stay in divergence, entropy and normaliser; `keep_failed`: only those in which all failed do; "
        "`drop`: none does.",
    )
    importance_correction: Literal["off", "truncated", "masked"] = Field(
        "off",
        description="For engine and trainer log-probs that differ: the policy gradient is weighted by "
        "trainer / engine probability, truncated at `importance_cap`; or tokens where that ratio or its "
        "inverse exceeds it are masked out. Where a method's ratios are of responses, a response's tokens "
        "share the mean of their weights, which leaves the loss as it is. The ratio is reported either way.",
    )
    importance_cap: float = Field(2.0, gt=1, allow_inf_nan=False, description="See `importance_correction`.")
    old_log_probs: Literal["recomputed", "engine"] = Field(
        "recomputed",
        description="Of which policy the ratio that is clipped is over: `recomputed`, the one that the step "
        "begins with, of which `importance_correction` then says how it differs from the one that sampled "
        "(decoupled PPO, arXiv 2505.24298); `engine`, the one that sampled, by the engines' log-probs, which "
        "saves a pass where a step has several updates.",
    )
    routing_replay: Literal["off", "old", "engine"] = Field(
        "off",
        description="Of a mixture of experts: where a step's updates send tokens. `off`: to the experts that "
        "routers choose then; `old`: to those that they chose when old log-probs were computed, so that no "
        "ratio jumps because other experts are chosen; `engine`: to those that the engine chose when it "
        "sampled, old log-probs too (docs/models.md). What routers learn is the probabilities of the experts "
        "that are taken.",
    )
    max_tokens_per_microbatch: PositiveInt = Field(
        16384,
        description="Token budget (padded) of one packed microbatch, over all its CP ranks. The default is "
        "for GPUs: on CPUs a few thousand take as long, in a fraction of the memory (docs/performance.md).",
    )
    share_prompts: bool = Field(
        False,
        description="Compute what sequences of a group begin with alike once, as responses do with their "
        "prompt, in annotation and update: faster where prompts are long, and equal up to rounding "
        "(docs/shared-prompts.md). Not with context parallelism.",
    )
    loss_chunk_tokens: PositiveInt = Field(
        1024, description="Tokens whose logits exist at a time; memory of the loss grows with it."
    )

    def without_effect(self) -> dict[str, str]:
        """As of every section."""
        if self.old_log_probs == "engine":
            reason = 'old_log_probs is "engine": the ratio is over the policy that sampled'
            return dict.fromkeys(("importance_correction", "importance_cap"), reason)
        if self.importance_correction == "off":
            return {"importance_cap": 'importance_correction is "off"'}
        return {}
