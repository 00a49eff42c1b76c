"""The guards of a run: faults that it is watched for, and what is done where one is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from megatron_rapo.section import PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig

Action = Literal["off", "warn", "skip", "roll_back", "stop"]

_THRESHOLDS = {
    "gradient_spike_factor": "gradient_spike",
    "entropy_least": "entropy_collapse",
    "truncated_share": "truncation",
    "mismatch_limit": "mismatch",
}


class Guards(Section):
    """Faults that a run is watched for, and what is then done (docs/guards.md).

    `"off"`: it is not watched for; `"warn"`: it is told; `"skip"`: the update is not applied; `"roll_back"`:
    nor is it, and the run goes on from the newest checkpoint with the prompts that come next; `"stop"`: the
    run ends after the step.
    """

    not_finite: Literal["skip", "roll_back", "stop"] = Field(
        "stop", description="Loss or gradients hold NaN or infinity. Weights that do end the run in any case."
    )
    gradient_spike: Action = Field(
        "warn",
        description="The gradient's norm is beyond `gradient_spike_factor` times the median of the newest "
        "32.",
    )
    gradient_spike_factor: float = Field(
        20.0, gt=1, allow_inf_nan=False, description="See `gradient_spike`; the first 8 norms are not judged."
    )
    entropy_collapse: Literal["off", "warn", "roll_back", "stop"] = Field(
        "warn", description="The policy's entropy (`loss/entropy`) is below `entropy_least`."
    )
    entropy_least: PositiveFloat = Field(
        1e-3, description="Nats a token, below which next to nothing is left to explore."
    )
    equal_rewards: Literal["off", "warn", "skip", "stop"] = Field(
        "warn",
        description="Every group earned the same reward throughout, `steps_in_a_row` times in a row, though "
        "divergence or entropy has a gradient.",
    )
    no_gradient: Literal["off", "warn", "stop"] = Field(
        "stop",
        description="A step teaches nothing: no response is in the loss, or the gradient is 0. The first is "
        'warned of; `"stop"` ends the run at `steps_in_a_row` of them.',
    )
    unknown_rewards: Literal["off", "warn", "skip", "stop"] = Field(
        "stop", description="More than `reward.unknown_limit` of a step's rewards are unknown."
    )
    truncation: Literal["off", "warn", "skip", "stop"] = Field(
        "warn",
        description="At least `truncated_share` of the responses end at their limit, `steps_in_a_row` times "
        "in a row.",
    )
    truncated_share: float = Field(0.95, gt=0, le=1, description="See `truncation`.")
    engine_log_probs: Action = Field(
        "warn",
        description="The engines' log-probs of a step's tokens are all the same, or their mean is −log of "
        "the vocabulary's size: such come of an engine whose weights are damaged.",
    )
    mismatch: Action = Field(
        "warn", description="Engines and trainer are apart by more than `mismatch_limit` (docs/mismatch.md)."
    )
    mismatch_limit: PositiveFloat = Field(
        0.1,
        description="Mean absolute difference of their log-probs at a step's tokens, in nats "
        "(`mismatch/log_prob_mean`), beyond which more than rounding must be wrong.",
    )
    no_learning_rate: Literal["off", "warn", "stop"] = Field(
        "warn", description="The learning rate of a step's updates is 0."
    )
    unchanged_weights: Literal["off", "warn", "stop"] = Field(
        "warn",
        description="No weight of the model changed in a step whose gradient and learning rate are not 0: "
        "updates vanish in the rounding of `model.dtype`.",
    )
    steps_in_a_row: PositiveInt = Field(
        5, description="After which `equal_rewards`, `no_gradient` and `truncation` act."
    )
    rollbacks: PositiveInt = Field(
        3, description='How often a run rolls back (`"roll_back"`); one more fault of that kind ends it.'
    )

    @property
    def actions(self) -> dict[str, str]:
        """What each guard does, by its name."""
        watched = (name for name, field in type(self).model_fields.items() if isinstance(field.default, str))
        return {name: getattr(self, name) for name in watched}

    def without_effect(self) -> dict[str, str]:
        inert = {
            threshold: f'{guard} = "off"'
            for threshold, guard in _THRESHOLDS.items()
            if getattr(self, guard) == "off"
        }
        if {self.equal_rewards, self.no_gradient, self.truncation} == {"off"}:
            inert["steps_in_a_row"] = "none of the guards that count steps is on"
        if "roll_back" not in self.actions.values():
            inert["rollbacks"] = 'no guard has the action "roll_back"'
        return inert


def check_guards(config: RunConfig) -> None:
    """Beside the other sections.

    Raises:
        ValueError: they do not go together.
    """
    guards = config.guards
    if "roll_back" in guards.actions.values():
        if config.checkpoint.every is None:
            raise ValueError(
                'guards with the action "roll_back" need checkpoint.every, so that what they go back to does '
                "not depend on the clock; set it"
            )
        if config.rollout.max_staleness:
            raise ValueError(
                'guards with the action "roll_back" do not go with rollout.max_staleness: what was sampled '
                'ahead is of the weights that are given up; choose "skip" or "stop"'
            )
    limit = config.reward.unknown_limit
    if guards.unknown_rewards == "off" and limit != type(config.reward)().unknown_limit:
        raise ValueError(
            f'reward.unknown_limit = {limit} would have no effect: guards.unknown_rewards = "off"; remove it'
        )
