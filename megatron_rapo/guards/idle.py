"""Steps that teach nothing: no response is in the loss, or the gradient is exactly 0.

Nothing is a gradient of exactly 0, since Adam divides a gradient by its size and so makes much of a small
one: where every group earned the same, a divergence from a reference that the policy still equals has a
gradient of rounding at first, and one 10,000 times as large some updates later. There the rewards tell.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rapo.config import RunConfig


class Idle:
    """Tells that a step teaches nothing, and why.

    One alone can be chance: without divergence and entropy, groups that all earned the same have no gradient.
    """

    def __init__(self, config: RunConfig) -> None:
        self._algorithm = config.algorithm
        self._samples = config.demonstrations is None

    def __call__(self, metrics: Mapping[str, float]) -> str | None:
        """What the step's metrics tell; None where it teaches, or a guard kept updates from being applied."""
        if "loss/tokens" not in metrics or metrics.get("guards/skipped_updates"):
            return None
        idle = metrics["loss/tokens"] == 0 or metrics["optimizer/gradient_norm"] == 0
        return f"it teaches nothing: {self._cause(metrics)}" if idle else None

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
