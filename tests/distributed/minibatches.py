"""Made-up samples of mixed lengths for tests of updates, and their microbatches under any layout."""

from __future__ import annotations

import numpy as np

from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from tests.episodes import random_sequence

# Fewer real tokens than head rows, so that padded rows must be masked out.
VOCABULARY = 59
PROMPT_AND_RESPONSE = ((5, 9), (3, 1), (8, 20), (4, 13))


def make_samples(seed: int = 0) -> list[Sample]:
    """A minibatch; advantages and weights are arbitrary, so that no aggregation is assumed."""
    random = np.random.default_rng(seed)
    return [
        Sample(
            sequence=random_sequence(random, prompt, response),
            phi=(0.5, 1.0)[random.integers(0, 2)],
            advantage=float(random.normal()),
            token_weight=float(random.uniform(0.005, 0.02)),
        )
        for prompt, response in PROMPT_AND_RESPONSE
    ]


def make_minibatches(
    placement: Placement, seeds: list[int], token_budget: int = 64
) -> list[list[Microbatch]]:
    """A minibatch a seed, as this rank's microbatches, all padded to one length."""
    layout = placement.layout
    multiple = 2 * layout.context_parallel * layout.tensor_parallel
    return [_microbatches(make_samples(seed), placement, multiple, token_budget) for seed in seeds]


def _microbatches(
    samples: list[Sample], placement: Placement, multiple: int, token_budget: int
) -> list[Microbatch]:
    layout = placement.layout
    plan = plan_microbatches(
        [padded_length(len(sample.sequence), multiple) for sample in samples],
        replicas=layout.data_parallel,
        token_budget=token_budget,
        count_multiple=layout.pipeline_parallel if layout.virtual_pipeline_parallel else 1,
    )[placement.data_rank]
    return [
        pack(
            [samples[index] for index in chosen],
            sequence_multiple=multiple,
            total_tokens=token_budget,
            context_rank=placement.context_rank,
            context_ranks=layout.context_parallel,
            device=device(),
        )
        for chosen in plan
    ]
