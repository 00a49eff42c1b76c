"""Plans beside what is measured: step times of small real runs on CPU, and published figures of clusters.

    megatron-rapo calibrate --output cpu.toml
    python tools/check_plan.py cpu.toml --json result.json   # runs of eight layouts, one after the other
    python tools/check_plan.py cpu.toml --one-rank           # annotation and updates alone, in this process
    python tools/check_plan.py --published                   # no runs: predicted from the shipped profiles

Runs have responses of given lengths and no divergence, as those of `bench_ahead.py`. The fastest step counts,
after the first two: other programs disturbed it least, as in a calibration. What a step takes beside phases
(`step_s`) is taken from the first layout, which then is no test; told are errors of the others, and Kendall's
tau over all. A core computes for one process, so layouts have at most two ranks.

With --one-rank, one process annotates and updates models and batches of several sizes, by RAPO's exact
divergence; told are processor seconds, which others disturb little, and nothing is taken from them.

Published figures are of other trainers, in bfloat16; no number of a profile was fitted to them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import bench_shared_prompts
import torch
from bench_ahead import CONFIG, ENVIRONMENT, TIMES_LONGER, make_model
from published_figures import published
from random_model import make_random_model

from megatron_rapo.config import Parallel, load_config
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.planning.engine_cost import EngineSplit
from megatron_rapo.planning.layouts import Division, TrainerLayout
from megatron_rapo.planning.plan import Planner
from megatron_rapo.planning.profile import Profile, read_profile
from megatron_rapo.planning.workload import workload_of

WARM_UP = 2
PROMPT_TOKENS = 4  # of a number of four digits


@dataclass(frozen=True)
class Case:
    """A run's layout, and what differs from the first one's options."""

    name: str
    options: tuple[str, ...] = ()


CASES = (
    Case("DP 1"),
    Case("DP 1, one step ahead", ("rollout.max_staleness=1",)),
    Case("DP 1, small microbatches", ("algorithm.max_tokens_per_microbatch=224",)),
    Case("DP 1, recomputed", ('model.recompute="full"',)),
    Case("DP 2", ("parallel.data_parallel=2",)),
    Case("TP 2", ("parallel.tensor_parallel=2",)),
    Case("PP 2", ("parallel.pipeline_parallel=2",)),
    Case("CP 2", ("parallel.context_parallel=2",)),
)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", nargs="?", help="of megatron-rapo calibrate, on this machine")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--one-rank", action="store_true")
    parser.add_argument("--prompts", type=int, default=2, help="of a step, with 8 responses each")
    parser.add_argument("--tokens", type=int, default=96, help="of a response")
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", nargs="+", type=int, help="numbers, from 0; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.published:
        print("\n".join(published()))
    if options.profile and options.one_rank:
        print("\n".join(one_rank(read_profile(options.profile))))
    elif options.profile:
        print("\n".join(measured(read_profile(options.profile), options)))


class Work(NamedTuple):
    """A model, a shape of `bench_shared_prompts.py` (prompt x responses x tokens), a microbatch's tokens."""

    layers: int
    hidden: int
    shape: str
    budget: int


WORKS = (
    Work(2, 128, "16x8x64", 640),
    Work(2, 128, "16x8x64", 80),
    Work(4, 256, "16x8x64", 640),
    Work(4, 256, "16x8x64", 80),
    Work(4, 256, "128x8x128", 1024),
    Work(4, 256, "128x8x128", 256),
    Work(2, 512, "16x8x64", 640),
    Work(8, 128, "128x8x128", 1024),
)
ROUNDS = 3


def one_rank(profile: Profile) -> list[str]:
    """Each work's processor seconds beside the predicted."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    lines = ["| layers × hidden | prompt × responses × tokens | microbatch | measured | predicted | error |"]
    lines.append("|---|---|---|---|---|---|")
    pairs = []
    with process_groups(Parallel(), seed=1) as placement:
        for work in WORKS:
            found, expected = of_work(work, profile, placement)
            pairs.append((found, expected))
            sizes = f"{work.layers} × {work.hidden} | {work.shape.replace('x', ' × ')} | {work.budget}"
            lines.append(f"| {sizes} | {found:.3f} s | {expected:.3f} s | {expected / found - 1:+.0%} |")
    return [*lines, "", f"Kendall's tau: {kendall(pairs):.2f}"]


def of_work(work: Work, profile: Profile, placement: Placement) -> tuple[float, float]:
    """Seconds of annotation and updates: the fastest of some rounds after a first one, and the predicted."""
    options = argparse.Namespace(
        layers=work.layers,
        hidden=work.hidden,
        feed_forward=4 * work.hidden,
        vocabulary=4096,
        groups=2,
        budget=work.budget,
        equal=True,
    )
    prompt, responses, tokens = map(int, work.shape.split("x"))
    with tempfile.TemporaryDirectory() as name:
        make_random_model(Path(name) / "model", options)
        step = bench_shared_prompts.a_step(Path(name), work.shape, options, placement, shared=False)
        times = [sum(step()) for _ in range(ROUNDS + 1)]
        config = bench_shared_prompts.configuration(
            Path(name), prompt, responses, tokens, options, shared=False
        )
        load = workload_of(config, prompt, tokens)
        planner = Planner(config, read_architecture(config.model.path), load, profile)
    return min(times[1:]), planner.cost(TrainerLayout(Parallel(), work.budget, "none")).total


def measured(profile: Profile, options: argparse.Namespace) -> list[str]:
    """Runs every case, and predicts it."""
    chosen = [CASES[number] for number in options.cases] if options.cases else CASES
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.hidden, options.layers)
        given = {"TOKENS": options.tokens, "TAIL": 0.0, "TIMES_LONGER": TIMES_LONGER}
        text = "\n".join([*(f"{key} = {value}" for key, value in given.items()), ENVIRONMENT])
        (folder / "given_lengths.py").write_text(text)
        for number, case in enumerate(chosen):
            seconds = run(folder, case, f"run-{number}", options)
            predicted = predict(folder, case, f"run-{number}", profile, options)
            found[case.name] = {"measured": seconds, **predicted}
            print(f"{case.name}: {found[case.name]}", file=sys.stderr, flush=True)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
    return table(found)


def run(folder: Path, case: Case, name: str, options: argparse.Namespace) -> float:
    """Seconds of the fastest step."""
    text = CONFIG.format(
        directory=name, steps=options.steps, prompts=options.prompts, longest=options.tokens, ahead=""
    )
    (folder / f"{name}.toml").write_text(text)
    command = [str(Path(sys.executable).with_name("megatron-rapo")), "train", f"{name}.toml"]
    if case.options:
        command += ["--set", *case.options]
    ended = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"{case.name} failed:\n{ended.stdout}\n{ended.stderr}")
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return min(line["time/step_s"] for line in lines if line["step"] > WARM_UP)


def predict(
    folder: Path, case: Case, name: str, profile: Profile, options: argparse.Namespace
) -> dict[str, float]:
    """Seconds of the case's step by phase, as a plan has them."""
    config = load_config([folder / f"{name}.toml"], [f"model.path={folder / 'model'}", *case.options])
    planner = Planner(
        config,
        read_architecture(folder / "model"),
        workload_of(config, PROMPT_TOKENS, options.tokens),
        profile,
    )
    layout = TrainerLayout(
        config.parallel, config.algorithm.max_tokens_per_microbatch, config.model.recompute
    )
    division = Division(config.parallel.world_size, 1, False)
    way = planner.predict(division, layout, EngineSplit(1, 1), config.rollout.max_staleness)
    return {
        "predicted": way.step_s,
        "rollout": way.rollout_s,
        "annotate": way.trainer.annotate,
        "update": way.trainer.update,
        "publish": way.publish_s,
    }


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """For people: the first layout's rest is added to all."""
    first, *others = found.values()
    rest = first["measured"] - first["predicted"]
    lines = [
        f"step_s = {rest:.3f} s, of {next(iter(found))}",
        "",
        "| layout | measured | predicted | error |",
    ]
    lines.append("|---|---|---|---|")
    for name, one in list(found.items())[1:]:
        seconds, predicted = one["measured"], one["predicted"] + rest
        lines.append(f"| {name} | {seconds:.2f} s | {predicted:.2f} s | {predicted / seconds - 1:+.0%} |")
    pairs = [(one["measured"], one["predicted"]) for one in (first, *others)]
    return [*lines, "", f"Kendall's tau over {len(pairs)} layouts: {kendall(pairs):.2f}"]


def kendall(pairs: list[tuple[float, float]]) -> float:
    """Pairs in the same order less those in the other, of all (tau-a)."""
    signs = [(one[0] - other[0]) * (one[1] - other[1]) for one, other in itertools.combinations(pairs, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


if __name__ == "__main__":
    main()
