"""The alarm on steps that teach nothing: a warning at the first, the end of the run after some in a row.

Nothing is a gradient of exactly 0, since Adam divides a gradient by its size and so makes much of a small
one: where every group earned the same, a divergence from a reference that the policy still equals has a
gradient of rounding at first, and one 10,000 times as large some updates later. There the rewards tell.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError


class IdleAlarm:
    """Watches for steps without a response in the loss, or with a gradient of 0; and for such as have one by
    divergence and entropy alone, which may be meant: these are warned of once they are as many in a row.

    One alone can be chance: without divergence and entropy, groups that all earned the same have no gradient.
    """

    def __init__(self, config: RunConfig) -> None:
        self._algorithm = config.algorithm
        self._most = config.observe.idle_steps
        self._in_a_row = 0
        self._alike_in_a_row = 0
        self._samples = config.demonstrations is None
        self._compares = self._samples and config.rollout.responses_per_prompt > 1

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
        alike = self._compares and metrics["reward/groups_without_variance"] == 1 and not idle
        self._alike_in_a_row = self._alike_in_a_row + 1 if alike else 0
        if self._alike_in_a_row == self._most:
            print(
                f"warning: step {step} is number {self._most} in a row in which every group earned the same "
                f"reward throughout (mean {metrics['reward/mean']:.3f}), so that comparing responses teaches "
                "nothing: what moves the policy is the rest of its loss, such as divergence and entropy. See "
                "by `megatron-rapo samples` whether the reward is right; else take prompts that are solved "
                "sometimes, or sample more responses a prompt",
                file=sys.stderr,
                flush=True,
            )

    def _cause(self, metrics: Mapping[str, float]) -> str:
        if not self._samples:
            return "the gradient is 0: all that the data say is certain already; take other data, or end here"
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
