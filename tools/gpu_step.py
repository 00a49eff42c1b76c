"""Annotation and updates of a random model on one device: tokens/s, MFU, and peak memory beside the estimate.

    python tools/gpu_step.py result.json --device cuda
    python tools/gpu_step.py FOLDER --make              # the model alone, with a tokenizer, for runs

By RAPO's exact divergence, with Transformer Engine's layers where that is installed, else with Megatron's
own. Seconds are medians of rounds after a first one, until the device has done all.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_shared_prompts
import torch
from bench_ahead import digits_tokenizer
from random_model import add_size_options, make_random_model

from megatron_rapo.config import Parallel
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_parameters
from megatron_rapo.parallel.device import peak_memory
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.policy import Policy
from megatron_rapo.scaling.devices import own_peak_tflops
from megatron_rapo.scaling.flops import training_flops
from megatron_rapo.scaling.memory import GIB, estimate_memory

PROMPT, RESPONSES, ROUNDS = 64, 8, 5


def main() -> None:
    """Measures, or makes the model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--make", action="store_true")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--prompts", type=int, default=8, help="of a step, with 8 responses each")
    parser.add_argument("--tokens", type=int, default=1024, help="of a response")
    parser.add_argument("--budget", type=int, default=16_384, help="max_tokens_per_microbatch")
    add_size_options(parser)
    parser.set_defaults(std=0.02)  # as models are initialised
    options = parser.parse_args()
    if options.make:
        make_random_model(options.result, options)
        digits_tokenizer(options.vocabulary).save_pretrained(options.result)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    with tempfile.TemporaryDirectory() as name, process_groups(Parallel(), seed=1) as placement:
        make_random_model(Path(name) / "model", options)
        found = measure(Path(name), options, placement)
    options.result.write_text(json.dumps(found, indent=1))
    print(found)


def measure(folder: Path, options: argparse.Namespace, placement: Placement) -> dict[str, Any]:
    """Of one step."""
    options.groups, options.equal = options.prompts, True
    config = bench_shared_prompts.configuration(
        folder, PROMPT, RESPONSES, options.tokens, options, shared=False
    )
    dtype = "bfloat16" if options.device == "cuda" else "float32"
    model = config.model.model_copy(update={"dtype": dtype})
    algorithm = config.algorithm.model_copy(update={"loss_chunk_tokens": 2048})
    config = config.model_copy(update={"model": model, "algorithm": algorithm})
    architecture, method = read_architecture(config.model.path), config.new_method()
    policy = Policy(config.model, config.optimizer, architecture, placement, total_updates=100)
    frozen = open_frozen(config, architecture, method, placement, policy.chunks)
    objective = Objective(
        method, temperature=1.0, vocabulary=options.vocabulary, group=placement.tensor_group
    )
    groups = bench_shared_prompts.made_up(PROMPT, RESPONSES, options.tokens, options)
    annotated, updated = [], []
    for _ in range(ROUNDS + 1):
        began = now(options.device)
        samples = make_samples(groups, method, options.vocabulary, config.minibatch_prompts)
        minibatches = build_minibatches(samples, plan_minibatches(samples, config), config, placement)
        policy.annotate(minibatches, objective)
        for one in frozen:
            one.annotate(minibatches, objective)
        middle = now(options.device)
        policy.update(minibatches, objective, frozen[-1])
        annotated.append(middle - began)
        updated.append(now(options.device) - middle)
    lengths = [PROMPT + options.tokens] * options.prompts * RESPONSES
    flops, seconds = training_flops(architecture, lengths), statistics.median(updated[1:])
    peak = own_peak_tflops(dtype)
    estimate = estimate_memory(config, architecture).total / GIB
    return {
        "parameters": count_parameters(architecture),
        "tokens": sum(lengths),
        "annotate_s": statistics.median(annotated[1:]),
        "update_s": seconds,
        "first_update_s": updated[0],
        "update_tokens_per_s": sum(lengths) / seconds,
        "update_tflop_per_s": flops / seconds / 1e12,
        "mfu": None if peak is None else flops / seconds / 1e12 / peak,
        "peak_gib": peak_memory() / GIB,
        "estimated_gib": estimate,
    }


def now(device: str) -> float:
    """Once the device has done all that it was given."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
