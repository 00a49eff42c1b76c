"""Compares a run that trains adapters with one that trains all weights: memory, checkpoints, time of a step.

    python tools/bench_adapters.py
    python tools/bench_adapters.py --rank 64 --rounds 5 --json result.json

Both have one rank of one thread, the same random model and samples, and RAPO's exact divergence from the
reference. A step annotates and updates twice. `trained`, `gradients + optimizer` and `reference` are counted
from the tensors that there are; `memory` is the most that the process held, with its libraries. Variants take
their rounds in turn, each a start of its own; times are wall-clock medians over rounds of the fastest of
--steps, after a first one. The checkpoint is that of the last round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench_shared_prompts import configuration, made_up
from random_model import make_random_model
from torch import Tensor

from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import Adapter, Parallel
from megatron_rapo.launch.local import run_local
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.device import peak_memory
from megatron_rapo.parallel.placement import process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.finite import trained_parameters
from megatron_rapo.policy.policy import Policy

PROMPT, RESPONSES, TOKENS = 16, 8, 64
FULL, LORA = "all weights", "adapters"
PARTS = ("trained", "gradients + optimizer", "reference", "memory", "checkpoint")


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--feed-forward", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--groups", type=int, default=4, help=f"prompts of a step × {RESPONSES} responses")
    parser.add_argument("--budget", type=int, default=2048, help="max_tokens_per_microbatch")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(equal=True, experts=0)
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {FULL: [], LORA: []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_random_model(folder / "model", options)
        for _ in range(options.rounds):
            for variant, rounds in found.items():
                adapter = Adapter(rank=options.rank) if variant == LORA else None
                run_local(steps, (folder, adapter, options, folder / "report.json"), 1)
                rounds.append(json.loads((folder / "report.json").read_text()))
    print(table(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def steps(folder: Path, adapter: Adapter | None, options: argparse.Namespace, report: Path) -> None:
    """In the one rank: the fastest step, in seconds, and bytes by what has them."""
    with process_groups(Parallel(), seed=1) as placement:
        config = configuration(folder, PROMPT, RESPONSES, TOKENS, options, shared=False)
        config = config.model_copy(update={"adapter": adapter})
        architecture, method = read_architecture(config.model.path), config.new_method()
        policy = Policy(config.model, config.optimizer, architecture, placement, 100, adapter)
        frozen = open_frozen(config, architecture, method, placement, policy.chunks)
        objective = Objective(
            method, temperature=1.0, vocabulary=options.vocabulary, group=placement.tensor_group
        )
        groups = made_up(PROMPT, RESPONSES, TOKENS, options)

        def step() -> float:
            began = time.perf_counter()
            samples = make_samples(groups, method, options.vocabulary, config.minibatch_prompts)
            minibatches = build_minibatches(samples, plan_minibatches(samples, config), config, placement)
            policy.annotate(minibatches, objective)
            for one in frozen:
                one.annotate(minibatches, objective)
            policy.update(minibatches, objective, frozen[-1])
            return time.perf_counter() - began

        taken = min([step() for _ in range(options.steps + 1)][1:])
        held = peak_memory()
        store = CheckpointStore(config)
        store.save(policy, TrainState(1))
        newest = store.newest()
        assert newest is not None
        own = [p for chunk in frozen[-1].chunks if chunk not in policy.chunks for p in chunk.parameters()]
        values = {
            "step": taken,
            "trained": _bytes([p for _, p in trained_parameters(policy.chunks)]),
            "gradients + optimizer": _of_training(policy),
            "reference": _bytes(own),
            "memory": held,
            "checkpoint": sum(path.stat().st_size for path in newest.iterdir()),
        }
        report.write_text(json.dumps(values))


def _of_training(policy: Policy) -> int:
    """Bytes of gradient buffers and of the optimizer's tensors."""
    buffers = [buffer.grad_data for chunk in policy.wrapped for buffer in chunk.buffers]
    inner = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    states = [
        value
        for optimizer in inner
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return _bytes([*buffers, *states])


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def table(found: Mapping[str, list[dict[str, float]]]) -> str:
    """A column a variant, and one of their ratio."""

    def middle(variant: str, part: str) -> float:
        return statistics.median(one[part] for one in found[variant])

    rows = [f"| | {FULL} | {LORA} | of it |", "|---|---|---|---|"]
    for part in PARTS:
        full, lora = (middle(variant, part) / 2**20 for variant in (FULL, LORA))
        rows.append(f"| {part} | {full:,.1f} MiB | {lora:,.1f} MiB | {lora / full:.1%} |")
    full, lora = (middle(variant, "step") for variant in (FULL, LORA))
    rows.append(f"| step | {full:.2f} s | {lora:.2f} s | {lora / full:.1%} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
