"""Times annotation and update of a mixture of experts at EP 1, 2 and 4, beside a dense model of its size.

    python tools/bench_experts.py
    python tools/bench_experts.py --experts 16 --chosen 4 --ranks 2 --rounds 3 --json result.json

All variants have so many data-parallel ranks, of one thread each, and take the same random samples: a step
annotates (the reference's hidden states and old log-probs) and updates twice, by RAPO's exact divergence. The
dense model's feed-forward part has as many channels as a token's experts have together. Variants take their
rounds in turn, each a start of its own; times are wall-clock medians over rounds of the fastest of --steps,
after a first one. Memory is the most that the ranks held, together, each with the libraries' own.
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

import torch.distributed as dist
from bench_shared_prompts import configuration, made_up
from random_model import make_random_model

from megatron_rapo.config import Parallel
from megatron_rapo.launch.local import run_local
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.device import peak_memory
from megatron_rapo.parallel.placement import process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.policy import Policy

PROMPT, RESPONSES, TOKENS = 16, 8, 64
DENSE = 0  # in place of an expert-parallel size


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--feed-forward", type=int, default=256, help="channels of an expert")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=4, help="experts of a token")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8, help=f"prompts of a step × {RESPONSES} responses")
    parser.add_argument("--budget", type=int, default=2048, help="max_tokens_per_microbatch")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(equal=True)
    options = parser.parse_args()
    sizes = [size for size in (1, 2, 4) if options.ranks % size == 0 and options.experts % size == 0]
    with tempfile.TemporaryDirectory() as name:
        found = measured(Path(name), [DENSE, *sizes], options)
    print(table(found, options))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def measured(
    folder: Path, variants: list[int], options: argparse.Namespace
) -> dict[int, list[dict[str, float]]]:
    """Every round of each variant, by its expert-parallel size."""
    dense = {**vars(options), "experts": 0, "feed_forward": options.feed_forward * options.chosen}
    for name, sizes in (("dense", argparse.Namespace(**dense)), ("experts", options)):
        (folder / name).mkdir()
        make_random_model(folder / name / "model", sizes)
    found: dict[int, list[dict[str, float]]] = {variant: [] for variant in variants}
    for _ in range(options.rounds):
        for variant, rounds in found.items():
            own = folder / ("dense" if variant == DENSE else "experts")
            run_local(steps, (own, max(1, variant), options, folder / "report.json"), options.ranks)
            rounds.append(json.loads((folder / "report.json").read_text()))
    return found


def steps(folder: Path, expert_parallel: int, options: argparse.Namespace, report: Path) -> None:
    """In each rank: the fastest step, in seconds by phase, and the ranks' memory in bytes."""
    layout = Parallel(data_parallel=options.ranks, expert_parallel=expert_parallel)
    with process_groups(layout, seed=1) as placement:
        config = configuration(folder, PROMPT, RESPONSES, TOKENS, options, shared=False)
        config = config.model_copy(update={"parallel": layout})
        architecture, method = read_architecture(config.model.path), config.new_method()
        policy = Policy(config.model, config.optimizer, architecture, placement, total_updates=100)
        frozen = open_frozen(config, architecture, method, placement, policy.chunks)
        objective = Objective(
            method, temperature=1.0, vocabulary=options.vocabulary, group=placement.tensor_group
        )
        groups = made_up(PROMPT, RESPONSES, TOKENS, options)

        def step() -> dict[str, float]:
            dist.barrier()
            began = time.perf_counter()
            samples = make_samples(groups, method, options.vocabulary, config.minibatch_prompts)
            minibatches = build_minibatches(samples, plan_minibatches(samples, config), config, placement)
            policy.annotate(minibatches, objective)
            for one in frozen:
                one.annotate(minibatches, objective)
            dist.barrier()
            annotated = time.perf_counter()
            policy.update(minibatches, objective, frozen[-1])
            dist.barrier()
            return {"annotate": annotated - began, "update": time.perf_counter() - annotated}

        taken = [step() for _ in range(options.steps + 1)][1:]
        held = [0] * options.ranks
        dist.all_gather_object(held, peak_memory())
        if placement.is_main:
            fastest = min(taken, key=lambda took: total(took))
            report.write_text(json.dumps({**fastest, "memory": sum(held)}))


def total(took: Mapping[str, float]) -> float:
    """Seconds of a step."""
    return took["annotate"] + took["update"]


def table(found: Mapping[int, list[dict[str, float]]], options: argparse.Namespace) -> str:
    """A row a variant."""
    tokens = options.groups * RESPONSES * (PROMPT + TOKENS)
    rows = ["| | annotate | update | tokens/s | to dense | memory |", "|---|---|---|---|---|---|"]
    dense = statistics.median(map(total, found[DENSE]))
    for variant, rounds in found.items():
        middle: dict[str, Any] = {
            name: statistics.median(one[name] for one in rounds) for name in ("annotate", "update", "memory")
        }
        seconds = statistics.median(map(total, rounds))
        name = "dense" if variant == DENSE else f"EP {variant}"
        rows.append(
            f"| {name} | {middle['annotate']:.2f} s | {middle['update']:.2f} s | {tokens / seconds:,.0f} "
            f"| {dense / seconds:.2f} × | {middle['memory'] / 2**30:.2f} GiB |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
