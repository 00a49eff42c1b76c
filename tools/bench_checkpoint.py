"""Times what a checkpoint costs a step: written while training waits, and while it goes on.

    python tools/bench_checkpoint.py                       # a small model, in seconds
    python tools/bench_checkpoint.py --prompts 64 --rounds 9

In each round a step (annotate and update) is timed alone; a checkpoint is saved and waited for; then one is
begun in the background, the next step is timed beside the thread that writes, and the checkpoint is
completed. Seconds by the clock, the least of all rounds and their median: others on the machine make a round
slower, never faster. What the background costs is begin, complete, and how much longer that step took, by
their least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_methods import VOCABULARY, configuration, made_up, write_model

from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import Parallel
from megatron_rapo.launch.local import run_local
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import process_groups
from megatron_rapo.policy.batch import build_minibatches, make_samples, plan_minibatches
from megatron_rapo.policy.policy import Policy

PARTS = ("step", "saved", "begin", "step beside", "complete")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of a response, on average")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        report = Path(folder) / "report.json"
        run_local(measure, (Path(folder), options.prompts, options.tokens, options.rounds, report), 1)
        found = json.loads(report.read_text())
    print(f"{'':<12} {'least':>10} {'median':>10}")
    for name in PARTS:
        print(f"{name:<12} {min(found[name]):8.3f} s {statistics.median(found[name]):8.3f} s")
    least = {name: min(found[name]) for name in PARTS}
    beside = least["begin"] + least["complete"] + least["step beside"] - least["step"]
    waited, beside = (f"{cost / least['step']:.1%}" for cost in (least["saved"], beside))
    print(
        f"{found['bytes'] / 2**20:.0f} MiB cost {waited} of a step where it waits, {beside} where it goes on"
    )


def measure(folder: Path, prompts: int, tokens: int, rounds: int, report: Path) -> None:
    """In the one rank."""
    config = configuration(folder, prompts, tokens, method="grpo", divergence_coefficient=0.0)
    options = config.checkpoint.model_copy(update={"in_background": True})
    behind = config.model_copy(update={"checkpoint": options})
    times: dict[str, list[float]] = {name: [] for name in PARTS}

    def timed(name: str, work: Callable[[], object]) -> None:
        began = time.perf_counter()
        work()
        times[name].append(time.perf_counter() - began)

    with process_groups(Parallel(), seed=1) as placement:
        method = config.new_method()
        architecture = read_architecture(config.model.path)
        policy = Policy(config.model, config.optimizer, architecture, placement, total_updates=1000)
        objective = Objective(method, temperature=1.0, vocabulary=VOCABULARY, group=placement.tensor_group)
        groups = made_up(config, method)
        waits, goes_on = CheckpointStore(config), CheckpointStore(behind)

        def step() -> None:
            samples = make_samples(groups, method, VOCABULARY, config.minibatch_prompts)
            plans = plan_minibatches(samples, config)
            minibatches = build_minibatches(samples, plans, config, placement)
            policy.annotate(minibatches, objective)
            policy.update(minibatches, objective, None)

        step()
        for number in range(1, 2 * rounds, 2):
            timed("step", step)
            timed("saved", lambda n=number: waits.save(policy, TrainState(n)))  # type: ignore[misc]
            timed("begin", lambda n=number: goes_on.save(policy, TrainState(n + 1)))  # type: ignore[misc]
            timed("step beside", step)
            timed("complete", lambda: goes_on.finish(placement))
        newest = goes_on.newest()
        assert newest is not None
        size = sum(path.stat().st_size for path in newest.iterdir())
    report.write_text(json.dumps({**times, "bytes": size}))


if __name__ == "__main__":
    main()
