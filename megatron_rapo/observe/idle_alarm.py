"""The alarm on steps that teach nothing: a warning at the first, the end of the run after some in a row."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError


class IdleAlarm:
    """Watches for steps without a response in the loss, or with a gradient of 0.

    One alone can be chance: without divergence and entropy, groups that all earned the same have no gradient.
    """

    def __init__(self, config: RunConfig) -> None:
        self._algorithm = config.algorithm
        self._most = config.observe.idle_steps
        self._in_a_row = 0

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at a step's metrics; those of what comes before the first step say nothing of it.

        Raises:
            RapoError: it is the last of `observe.idle_steps` such steps in a row.
        """
        if "loss/tokens" not in metrics:
            return
        idle = metrics["loss/tokens"] == 0 or metrics["optimizer/gradient_norm"] == 0
        self._in_a_row = self._in_a_row + 1 if idle else 0
        if self._in_a_row == self._most:
            raise RapoError(
                f"step {step} is number {self._most} in a row that teaches nothing (observe.idle_steps): "
                f"{self._cause(metrics)}"
            )
        if self._in_a_row == 1:
            print(
                f"warning: step {step} teaches nothing: {self._cause(metrics)}", file=sys.stderr, flush=True
            )

    def _cause(self, metrics: Mapping[str, float]) -> str:
        if metrics["loss/tokens"] > 0:
            alike, mean = metrics["reward/groups_without_variance"], metrics["reward/mean"]
            return (
                f"the gradient is 0. {alike:.0%} of the groups earned the same reward throughout (mean "
                f"{mean:.3f}); take prompts that are solved sometimes, sample more responses a prompt, or "
                "give the loss a divergence or entropy"
            )
        causes = [f"{metrics[name]:.0%} {what}" for name, what in self._masks().items() if metrics[name] > 0]
        return f"no response is in the loss: {'; '.join(causes)}"

    def _masks(self) -> Mapping[str, str]:
        """What can keep responses out of the loss under this run's options, by the metric that counts it."""
        masks = {
            "rollout/outside_vocabulary": "of the responses have tokens that the tokenizer lacks (do model "
            "and tokenizer belong together?)",
            "reward/unknown": "have no reward, since the verifier timed out or crashed (mend it)",
        }
        if self._algorithm.mask_truncated:
            masks["rollout/truncated"] = (
                "were truncated (raise rollout.max_response_tokens, or set algorithm.mask_truncated = false)"
            )
        if self._algorithm.groups_without_variance != "keep":
            masks["reward/groups_without_variance"] = (
                "of the groups earned the same reward throughout (take prompts that are solved sometimes, or "
                'set algorithm.groups_without_variance = "keep")'
            )
        return masks
