"""The loss on texts that are held out: supervised learning measured without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import Sample
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.loss.objective import Objective
from megatron_rapo.parallel.device import device
from megatron_rapo.policy.batch import build_minibatches, plan_minibatches
from megatron_rapo.policy.policy import Policy


class GivenLoss:
    """−log π of the held-out texts' tokens, a mean over all of them.

    Args:
        config: of the run.
        policy: whose loss.
        objective: how its head is read.
        prompts: that were held out (`TrainingPrompts.held_out`).
    """

    def __init__(
        self, config: RunConfig, policy: Policy, objective: Objective, prompts: Sequence[Prompt]
    ) -> None:
        self._config = config
        self._policy = policy
        self._objective = objective
        sequences = [prompt.demonstration for prompt in prompts if prompt.demonstration is not None]
        self._samples = [[Sample(sequence, 1.0, 0.0, 1.0) for sequence in sequences]]

    def due(self, step: int) -> bool:
        """Whether it is measured after a step: at first, at last, and every so many."""
        given = self._config.demonstrations
        assert given is not None, "texts are held out where texts are given"
        every = given.held_out_every
        return step in (0, self._config.run.steps) or (every is not None and step % every == 0)

    def measure(self) -> Mapping[str, float]:
        """`loss`, in nats a token, the same on all ranks, which all call it."""
        placement = self._policy.placement
        plans = plan_minibatches(self._samples, self._config)
        [microbatches] = build_minibatches(self._samples, plans, self._config, placement)
        total = torch.zeros(2, dtype=torch.float64, device=device())
        # Elsewhere than on the last stage there are none.
        for microbatch, log_probs in zip(
            microbatches, self._policy.log_probs(microbatches, self._objective.head), strict=False
        ):
            learnt = log_probs[microbatch.is_response].double()
            total += torch.stack([-learnt.sum(), torch.ones_like(learnt).sum()])
        loss, tokens = placement.sum_from_last_stage(total).tolist()
        return {"loss": loss / tokens}
