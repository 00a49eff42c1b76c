"""The configuration of one run: its sections, and what must hold between them.

Every option is typed, validated, documented, and refused where it would have no effect.
`docs/configuration.md` is generated from these models (`megatron_rapo.config.document`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pydantic import model_validator

from megatron_rapo.config.algorithm import Algorithm
from megatron_rapo.config.data import Data
from megatron_rapo.config.running import Checkpoint, Evaluate, Observe, Run
from megatron_rapo.config.sampling import Reward, Rollout
from megatron_rapo.config.section import Section
from megatron_rapo.config.training import Model, Optimizer, Parallel


class RunConfig(Section):
    """The whole configuration of one run."""

    run: Run
    model: Model
    parallel: Parallel = Parallel()
    data: Data
    rollout: Rollout
    reward: Reward = Reward()
    algorithm: Algorithm = Algorithm()
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate | None = None
    observe: Observe = Observe()

    @property
    def minibatch_prompts(self) -> int:
        """Prompts of one optimizer update."""
        return self.algorithm.minibatch_prompts or self.rollout.prompts_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one rollout batch."""
        return self.rollout.prompts_per_step // self.minibatch_prompts

    @property
    def verifier(self) -> str:
        """The verifier's name: `reward.verifier`, or the one that belongs to the data."""
        belonging = {"file": "math", "countdown": "countdown", "arithmetic": "integer"}
        return self.reward.verifier or belonging[self.data.source]

    @property
    def sequence_multiple(self) -> int:
        """What each sequence's tokens are padded to a multiple of: CP's zig-zag halves, SP's shards."""
        halves = 2 * self.parallel.context_parallel if self.parallel.context_parallel > 1 else 1
        shards = self.parallel.model_parallel // self.parallel.pipeline_parallel
        return math.lcm(halves, shards if self.parallel.sequence_parallel else 1)

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        checks: list[Callable[[], None]] = [
            self._check_batch,
            self._check_warmup,
            self._check_rewards,
            self._check_evaluation,
        ]
        for check in checks:
            check()
        return self

    def _check_batch(self) -> None:
        prompts, replicas = self.rollout.prompts_per_step, self.parallel.data_parallel
        if prompts % self.minibatch_prompts:
            raise ValueError(
                f"algorithm.minibatch_prompts = {self.minibatch_prompts} does not divide "
                f"rollout.prompts_per_step = {prompts}; choose a divisor"
            )
        if prompts < replicas:
            raise ValueError(
                f"rollout.prompts_per_step = {prompts} leaves some of parallel.data_parallel = {replicas} "
                "replicas without a prompt; raise it, or lower data_parallel"
            )
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        padded = -(-longest // self.sequence_multiple) * self.sequence_multiple
        if padded > self.algorithm.max_tokens_per_microbatch:
            raise ValueError(
                f"algorithm.max_tokens_per_microbatch = {self.algorithm.max_tokens_per_microbatch} cannot "
                f"hold rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens "
                f"({padded} padded); raise it to {padded}"
            )

    def _check_warmup(self) -> None:
        warmup, updates = self.optimizer.warmup_updates, self.run.steps * self.updates_per_step
        if warmup >= updates:
            raise ValueError(
                f"optimizer.warmup_updates = {warmup} leaves none of the run's {updates} updates at the full "
                "rate; lower it, or raise run.steps"
            )

    def _check_rewards(self) -> None:
        if self.data.source == "countdown" and self.verifier != "countdown":
            raise ValueError(
                f'reward.verifier = "{self.verifier}" cannot check data.source = "countdown"; remove it'
            )
        if self.data.source != "countdown" and self.verifier == "countdown":
            raise ValueError(
                f'reward.verifier = "countdown" cannot check data.source = "{self.data.source}"; remove it'
            )

    def _check_evaluation(self) -> None:
        if self.evaluate is None:
            return
        if self.evaluate.data is None and self.data.source == "file":
            raise ValueError(
                "evaluate.data is missing: training prompts from a file leave none held out; add it"
            )
        if self.evaluate.data is not None and (
            (self.evaluate.data.source == "countdown") != (self.data.source == "countdown")
        ):
            raise ValueError(
                f'evaluate.data.source = "{self.evaluate.data.source}" needs another verifier than '
                f'data.source = "{self.data.source}"; evaluate on the same kind of task'
            )

    def resolved(self) -> dict[str, Any]:
        """All options that have an effect, with their values, as written beside a run's output.

        To validate them gives this configuration again.
        """
        return self.model_dump(mode="json", exclude_none=True)
