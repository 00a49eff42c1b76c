"""Times annotation and update with `algorithm.share_prompts` and without, on the same samples.

    OMP_NUM_THREADS=1 python tools/bench_shared_prompts.py
    python tools/bench_shared_prompts.py --shapes 512x8x128 16x8x64 --groups 4 --rounds 5 --json result.json

A shape is prompt tokens × responses × tokens of a response. A step has two minibatches, so it annotates
(old log-probs and the reference's hidden states) and updates twice, by RAPO's exact divergence, on a random
Qwen2 of 5.0M parameters. Both variants step in turn, in one process; times are medians of its processor time,
and `ratio` is the median over rounds. Memory is the most that a process of each variant alone held beyond
what it held before its step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from random_model import make_random_model

from megatron_rapo.config import Parallel, RunConfig, validate
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.launch.local import run_local
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.device import peak_memory
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.policy import Policy

Step = Callable[[], tuple[float, float]]
"""Makes one step, and returns what annotation and update took, in seconds."""


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(layers=4, hidden=256, feed_forward=1024, vocabulary=4096)
    parser.add_argument("--shapes", nargs="+", default=["512x8x128", "16x8x64"])
    parser.add_argument("--groups", type=int, default=4, help="prompts of a step")
    parser.add_argument("--budget", type=int, default=4096, help="max_tokens_per_microbatch")
    parser.add_argument("--equal", action="store_true", help="all responses of a shape are of its length")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    print(f"{'':<12}{'annotate':>18}{'update':>18}{'both':>18}{'ratio':>8}{'memory':>18}")
    print(f"{'':<12}" + f"{'off':>9}{'on':>9}" * 3 + f"{'':>8}{'off':>9}{'on':>9}")
    with tempfile.TemporaryDirectory() as folder:
        make_random_model(Path(folder) / "model", options)
        for shape in options.shapes:
            found[shape] = of_shape(Path(folder), shape, options)
            print(_line(shape, found[shape]), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


def of_shape(folder: Path, shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a shape took, off and on, and its ratio."""
    report = folder / "report.json"
    run_local(in_turn, (folder, shape, options, report), 1)
    found = json.loads(report.read_text())
    found["memory"] = []
    for shared in (False, True):
        run_local(memory, (folder, shape, options, shared, report), 1)
        found["memory"].append(json.loads(report.read_text()))
    return found


def _line(shape: str, found: dict[str, Any]) -> str:
    seconds = [f"{value:8.2f}s" for name in ("annotate", "update", "both") for value in found[name]]
    memory = [f"{value / 2**20:6.0f}MiB" for value in found["memory"]]
    return f"{shape:<12}{''.join(seconds)}{found['ratio']:7.2f}×{''.join(memory)}"


def in_turn(folder: Path, shape: str, options: argparse.Namespace, report: Path) -> None:
    """In the one rank: both variants, round after round."""
    times: list[list[tuple[float, float]]] = [[], []]
    with process_groups(Parallel(), seed=1) as placement:
        steps = [a_step(folder, shape, options, placement, shared) for shared in (False, True)]
        for number in range(options.rounds + 1):
            for step, own in zip(steps, times, strict=True):
                took = step()
                if number:  # the first warms up
                    own.append(took)

    def medians(what: Callable[[tuple[float, float]], float]) -> list[float]:
        return [statistics.median(map(what, own)) for own in times]

    found = {
        "annotate": medians(lambda took: took[0]),
        "update": medians(lambda took: took[1]),
        "both": medians(sum),
        "ratio": statistics.median(sum(off) / sum(on) for off, on in zip(*times, strict=True)),
    }
    report.write_text(json.dumps(found))


def memory(folder: Path, shape: str, options: argparse.Namespace, shared: bool, report: Path) -> None:
    """In a process of its own: what one step adds."""
    with process_groups(Parallel(), seed=1) as placement:
        step = a_step(folder, shape, options, placement, shared)
        before = peak_memory()
        step()
        report.write_text(json.dumps(peak_memory() - before))


def a_step(folder: Path, shape: str, options: argparse.Namespace, placement: Placement, shared: bool) -> Step:
    """What annotates and updates once, from groups that are made before."""
    prompt, responses, tokens = (int(size) for size in shape.split("x"))
    config = configuration(folder, prompt, responses, tokens, options, shared)
    architecture, method = read_architecture(config.model.path), config.new_method()
    policy = Policy(config.model, config.optimizer, architecture, placement, total_updates=100)
    frozen = open_frozen(config, architecture, method, placement, policy.chunks)
    objective = Objective(
        method, temperature=1.0, vocabulary=options.vocabulary, group=placement.tensor_group
    )
    groups = made_up(prompt, responses, tokens, options)

    def step() -> tuple[float, float]:
        began = time.process_time()
        samples = make_samples(groups, method, options.vocabulary, config.minibatch_prompts)
        minibatches = build_minibatches(samples, plan_minibatches(samples, config), config, placement)
        policy.annotate(minibatches, objective)
        for one in frozen:
            one.annotate(minibatches, objective)
        annotated = time.process_time()
        policy.update(minibatches, objective, frozen[-1])
        return annotated - began, time.process_time() - annotated

    return step


def configuration(
    folder: Path, prompt: int, responses: int, tokens: int, options: argparse.Namespace, shared: bool
) -> RunConfig:
    """Of one variant."""
    return validate(
        {
            "run": {"directory": str(folder / "run"), "steps": 1},
            "model": {"path": str(folder / "model"), "dtype": "float32"},
            "data": {"source": "arithmetic"},
            "rollout": {
                "prompts_per_step": options.groups,
                "responses_per_prompt": responses,
                "max_prompt_tokens": prompt,
                "max_response_tokens": tokens,
            },
            "algorithm": {
                "minibatch_prompts": options.groups // 2,
                "max_tokens_per_microbatch": options.budget,
                "loss_chunk_tokens": 256,
                "share_prompts": shared,
            },
        },
        source="of the benchmark",
    )


def made_up(prompt: int, responses: int, tokens: int, options: argparse.Namespace) -> list[Group]:
    """Groups of random tokens; lengths of responses are spread from half of `tokens` on, unless `--equal`."""
    random = np.random.default_rng(0)

    def group(number: int) -> Group:
        given = tuple(random.integers(0, options.vocabulary, prompt).tolist())
        episodes = []
        for place in range(responses):
            length = tokens if options.equal else int(random.integers(tokens // 2, tokens + 1))
            sequence = TokenSequence.of_response(
                given,
                random.integers(0, options.vocabulary, length).astype(np.int32),
                np.full(length, -np.log(options.vocabulary), np.float32),
                version=0,
            )
            verification = Verification(Outcome.CORRECT if place % 3 else Outcome.WRONG)
            episodes.append(ScoredEpisode(Episode((sequence,), ""), verification))
        return Group(Problem(str(number), "", token_ids=given), tuple(episodes))

    return [group(number) for number in range(options.groups)]


if __name__ == "__main__":
    main()
