"""The objective's building blocks, and the presets that are choices among them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_rapo.section import BelowOne, Fraction, NonNegativeFloat, PositiveInt, Section

Preset = Literal["rapo", "grpo", "dapo", "dr_grpo", "gspo", "lite_ppo"]
Divergence = Literal[
    "forward_exact",
    "forward_sampled",
    "forward_printed",
    "reverse_exact",
    "k1",
    "k2",
    "k3",
    "none",
]
FLATTENED: tuple[Divergence, ...] = ("forward_exact", "forward_sampled", "forward_printed")

# What a preset sets; options that are set beside it win. RAPO is what the options default to.
PRESETS: dict[Preset, dict[str, Any]] = {
    "rapo": {},
    # DeepSeekMath, arXiv 2402.03300.
    "grpo": {
        "divergence": "k3",
        "divergence_coefficient": 0.04,
        "entropy_coefficient": 0.0,
        "loss_aggregation": "sequence_mean",
    },
    # arXiv 2503.14476; its dynamic sampling is an option of the rollouts.
    "dapo": {
        "clip_high": 0.28,
        "divergence": "none",
        "entropy_coefficient": 0.0,
        "mask_truncated": True,
    },
    # arXiv 2503.20783.
    "dr_grpo": {
        "advantage": "dr_grpo",
        "divergence": "none",
        "entropy_coefficient": 0.0,
        "loss_aggregation": "constant",
    },
    # arXiv 2507.18071.
    "gspo": {
        "ratio": "sequence",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "divergence": "none",
        "entropy_coefficient": 0.0,
        "loss_aggregation": "sequence_mean",
    },
    # arXiv 2508.08221.
    "lite_ppo": {"advantage": "lite_ppo", "divergence": "none", "entropy_coefficient": 0.0},
}


class Algorithm(Section):
    """The objective: clipped policy gradient − α · divergence + β · entropy. The defaults are RAPO's."""

    preset: Preset = Field(
        "rapo",
        description="Where the other options of this section start: a named method's choices, which options "
        "set beside it override.",
    )
    advantage: Literal["grpo", "dr_grpo", "lite_ppo", "leave_one_out", "dgpo"] = Field(
        "grpo",
        description="`grpo`: (r − mean) / std over the group; `dr_grpo`: r − mean; `lite_ppo`: (r − group "
        "mean) / std of the rollout batch; `leave_one_out`: r − mean of the group's others; `dgpo`: (r − "
        "mean) / mean absolute deviation, harder questions weighted up.",
    )
    ratio: Literal["token", "sequence"] = Field(
        "token",
        description="π / π_old of each token, or its geometric mean over the response (GSPO).",
    )
    clip_low: BelowOne = Field(0.2, description="The ratio is clipped below at 1 − this.")
    clip_high: NonNegativeFloat = Field(0.2, description="The ratio is clipped above at 1 + this.")
    clip_dual: float | None = Field(
        None,
        gt=1,
        allow_inf_nan=False,
        description="Bound of the surrogate of negative advantages, c · A (dual clip). Default: unbounded.",
    )
    importance_correction: Literal["off", "truncated", "masked"] = Field(
        "off",
        description="For engine and trainer log-probs that differ: the policy gradient is weighted by "
        "trainer / engine probability, truncated at `importance_cap`; or tokens where that ratio or its "
        'inverse exceeds it are masked out. With ratio = "sequence" a response\'s tokens share the mean of '
        "their weights, which leaves the loss as it is. The ratio is reported either way.",
    )
    importance_cap: float = Field(2.0, gt=1, allow_inf_nan=False, description="See `importance_correction`.")
    divergence: Divergence = Field(
        "forward_exact",
        description="`forward_exact`: KL(flattened reference ‖ policy), exact over the vocabulary (RAPO); "
        "`forward_sampled`: its unbiased estimate on the samples; `forward_printed`: the estimate as the "
        "paper prints it, for replication; `reverse_exact`: KL(policy ‖ reference), exact; `k1`, `k2`, `k3`: "
        "its usual sampled estimates; `none`: no reference at all.",
    )
    divergence_coefficient: NonNegativeFloat = Field(5e-3, description="α.")
    flatten_floor: Fraction | None = Field(
        None,
        description="φ0 in φ(r) = φ0 + (1 − φ0) · clip(r, 0, 1), the power that flattens the reference for a "
        "response with reward r; 1 never flattens. Default: 0.5 exact, 0.8 sampled.",
    )
    entropy_coefficient: NonNegativeFloat = Field(1e-3, description="β.")
    loss_aggregation: Literal["token_mean", "sequence_mean", "constant"] = Field(
        "token_mean",
        description="`token_mean`: over all response tokens of the minibatch; `sequence_mean`: over each "
        "response's tokens, then over responses; `constant`: sum over tokens divided by "
        "responses × max_response_tokens (Dr. GRPO).",
    )
    mask_truncated: bool = Field(
        False, description="Leave responses that were cut at max_response_tokens out of the loss."
    )
    overlong_buffer_tokens: PositiveInt | None = Field(
        None,
        description="DAPO's soft overlong penalty: rewards for the advantage fall linearly by up to ½ over "
        "the last so many tokens before max_response_tokens, at most all of them. (The paper's 1 is of "
        "rewards that are −1 and 1; those here are 0 and 1.) φ sees rewards without it. Default: no penalty.",
    )
    groups_without_variance: Literal["keep", "keep_failed", "drop"] = Field(
        "keep",
        description="Groups whose responses all earned the same teach nothing by comparison. `keep`: they "
        "stay in divergence, entropy and normaliser; `keep_failed`: only those in which all failed do; "
        "`drop`: none does.",
    )
    audit_estimators: bool = Field(
        False,
        description="Report bias and variance of the sampled estimators against the exact divergences, on "
        "the same tokens. Costs one more pass over the reference's logits.",
    )
    minibatch_prompts: PositiveInt | None = Field(
        None,
        description="Prompts of one optimizer update; must divide rollout.prompts_per_step. "
        "Default: all of them, one update a step.",
    )
    max_tokens_per_microbatch: PositiveInt = Field(
        16384, description="Token budget (padded) of one packed microbatch, over all its CP ranks."
    )
    loss_chunk_tokens: PositiveInt = Field(
        1024, description="Tokens whose logits exist at a time; memory of the loss grows with it."
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = PRESETS.get(values.get("preset", "rapo"), {})
        # An override may leave an option of the preset without effect: it is then not set at all.
        inert = _without_effect({**preset, **values})
        return {**{k: v for k, v in preset.items() if k not in inert}, **values}

    @property
    def phi_floor(self) -> float:
        """φ0, with its default."""
        if self.flatten_floor is not None:
            return self.flatten_floor
        return 0.5 if self.divergence == "forward_exact" else 0.8

    @property
    def wants_reference(self) -> bool:
        """Whether there is a reference model at all."""
        return self.divergence != "none"

    @property
    def wants_reference_hidden(self) -> bool:
        """Whether the loss needs the reference's whole distribution, so its hidden states."""
        return self.divergence in ("forward_exact", "reverse_exact") or self.audit_estimators

    def without_effect(self) -> dict[str, str]:
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return _without_effect(values)

    @model_validator(mode="after")
    def _check(self) -> Algorithm:
        if self.divergence != "none" and self.divergence_coefficient == 0:
            raise ValueError(
                f'divergence_coefficient = 0 makes "{self.divergence}" cost time without effect; '
                'set divergence = "none"'
            )
        if self.ratio == "sequence" and self.loss_aggregation == "token_mean":
            raise ValueError(
                'ratio = "sequence" is one number a response, and loss_aggregation = "token_mean" would '
                'weigh long responses more; set loss_aggregation = "sequence_mean"'
            )
        return self


def _without_effect(values: dict[str, Any]) -> dict[str, str]:
    """Options that do nothing beside the others; `values` may hold only some of them."""
    divergence = values.get("divergence", "forward_exact")
    inert: dict[str, str] = {}
    if divergence == "none":
        options = ["divergence_coefficient", "flatten_floor", "audit_estimators"]
        inert = dict.fromkeys(options, 'divergence is "none"')
    elif divergence not in FLATTENED:
        inert["flatten_floor"] = f'divergence = "{divergence}" is against the unflattened reference'
    if values.get("importance_correction", "off") == "off":
        inert["importance_cap"] = 'importance_correction is "off"'
    return inert
