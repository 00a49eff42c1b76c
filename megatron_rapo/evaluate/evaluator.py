"""pass@k on held-out problems, by the engines and verifier of the run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from megatron_rapo.config import Evaluate
from megatron_rapo.data.prompts import PromptSet
from megatron_rapo.evaluate.pass_at_k import mean_pass_at_k
from megatron_rapo.experience.collector import Collector


class Evaluator:
    """Samples the held-out problems, always the same and with the same seeds."""

    def __init__(self, evaluate: Evaluate, problems: PromptSet, collector: Collector, seed: int) -> None:
        self.evaluate = evaluate
        self.problems = problems
        self.collector = collector
        self.seed = seed

    def due(self, step: int, last_step: int) -> bool:
        """Whether the weights after `step` are to be evaluated: the base, the last, and every so many."""
        every = self.evaluate.every
        return step in (0, last_step) or (every is not None and step % every == 0)

    def run(self, weight_version: int) -> Mapping[str, float]:
        """`pass@k` for each k with its 95% interval (`…_low`, `…_high`), the same on all ranks.

        All ranks must call it.
        """
        collector, samples = self.collector, self.evaluate.samples
        groups = collector.sample(
            self.problems.prompts, responses=samples, weight_version=weight_version, seed=self.seed
        )
        correct = collector.share([int(sum(group.rewards)) for group in collector.score(groups)])
        metrics: dict[str, float] = {}
        for k in self.evaluate.k:
            estimate = mean_pass_at_k(np.array(correct), samples, k, seed=self.seed)
            metrics |= {
                f"pass@{k}": estimate.mean,
                f"pass@{k}_low": estimate.low,
                f"pass@{k}_high": estimate.high,
            }
        return metrics
