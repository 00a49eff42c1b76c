"""The alarm on the gap between engines and trainer: a warning at each crossing, or the end of the run."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError

MISMATCH = "mismatch/log_prob_mean"


class MismatchAlarm:
    """Watches `mismatch/log_prob_mean` for `observe.mismatch_alarm`."""

    def __init__(self, config: RunConfig) -> None:
        self._options = config.observe
        # Older weights differ as well as they should; each publication is proved on its own.
        self._quiet = config.rollout.max_staleness > 0 or config.algorithm.old_log_probs == "engine"
        self._remedy = f"megatron-rapo doctor --mismatch {config.run.directory / 'config.toml'}"
        self._beyond = False

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Looks at a step's metrics. Steps that stay beyond the threshold are not warned of again.

        Raises:
            RapoError: the gap is beyond the threshold, and `observe.mismatch_action` is "stop".
        """
        gap, limit = metrics.get(MISMATCH, 0.0), self._options.mismatch_alarm
        before, self._beyond = self._beyond, gap > limit and not self._quiet
        if not self._beyond:
            return
        message = (
            f"step {step}: {MISMATCH} = {gap:.3g} nats is beyond observe.mismatch_alarm = {limit:g}: the "
            "engines did not sample from the policy that the trainer computes. Once the run has ended, "
            f"`{self._remedy}` finds the cause"
        )
        if self._options.mismatch_action == "stop":
            raise RapoError(message)
        if not before:
            print(f"warning: {message}", file=sys.stderr, flush=True)
