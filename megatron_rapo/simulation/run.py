"""A simulated run: the loop's order of things (`loop.py`), whose work is time that passes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from megatron_rapo.ahead.batches import Batches
from megatron_rapo.ahead.partial import PartialBatches
from megatron_rapo.config import RunConfig
from megatron_rapo.config.write import to_toml
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.summary import staleness
from megatron_rapo.folder import write_whole
from megatron_rapo.observe.phases import Phases
from megatron_rapo.observe.step_lines import StepLines
from megatron_rapo.scaling.devices import peak_tflops
from megatron_rapo.scaling.flops import recomputed_flops, training_flops, update_computing
from megatron_rapo.scaling.memory import GIB
from megatron_rapo.simulation.conditions import Conditions
from megatron_rapo.simulation.groups import sampled_tokens
from megatron_rapo.simulation.lengths import Lengths
from megatron_rapo.simulation.pool import Pool
from megatron_rapo.simulation.rounds import SimulatedSource
from megatron_rapo.simulation.sampling import Prompts, Sampler, pass_time
from megatron_rapo.simulation.seconds import Seconds
from megatron_rapo.simulation.windows import SimulatedWindows
from megatron_rapo.timeline.record import Timeline
from megatron_rapo.timeline.simulated import mark_simulated

_OBJECTS = 5_000_000  # that are made between two collections


def simulate(
    config: RunConfig, seconds: Seconds, lengths: Lengths, conditions: Conditions, directory: Path
) -> None:
    """Simulates `run.steps` steps into a new run directory; `config` has the layout of `seconds`.

    Ranks go in step, so that the record has one: the slowest. Neither evaluations nor checkpoints are made.

    Raises:
        RapoError: the directory has something in it, the method cannot be simulated, or too few engines are
            left at some time.
    """
    _check(config, lengths)
    _check_empty(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark_simulated(
        directory,
        {
            "profile": seconds.planner.profile.device,
            "profile_source": seconds.planner.profile.source,
            "layout": f"{seconds.way.division}; {seconds.way.layout}; {seconds.way.split.engines} engines of "
            f"{seconds.way.split.tensor_parallel}",
            "lengths": lengths.source,
            "conditions": asdict(conditions),
            "correction": asdict(seconds.correction),
        },
    )
    run = config.run.model_copy(update={"directory": directory})
    config = config.model_copy(update={"run": run})
    write_whole(directory / "config.toml", to_toml(config))
    with _collecting_rarely():
        _Simulation(config, seconds, lengths, conditions, directory).run()


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    """A step makes tens of thousands of objects without cycles: to look for some takes half of the time."""
    before = gc.get_threshold()
    gc.set_threshold(_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Simulation:
    """The parts of a run, and what is done with several of them."""

    def __init__(
        self,
        config: RunConfig,
        seconds: Seconds,
        lengths: Lengths,
        conditions: Conditions,
        directory: Path,
    ) -> None:
        self._world = world = simpy.Environment()
        self._config, self._seconds, self._conditions = config, seconds, conditions

        def clock() -> float:
            return float(world.now)

        self._timeline = Timeline(directory, 0, clock)
        self._lines = StepLines(directory / "metrics.jsonl", None, clock)
        self._prompt_tokens = round(seconds.planner.workload.prompt_tokens)
        self._phases = Phases([self._timeline.enter], clock)
        rollout = config.rollout
        self._pool = Pool(
            world,
            [f"engine {number}" for number in range(seconds.way.split.engines)],
            seconds.rates,
            seconds.room,
            conditions,
            self._timeline.request,
            one_at_a_time=seconds.one_at_a_time,
            most_requests=rollout.requests_per_engine * config.parallel.data_parallel,
            minimum=min(rollout.minimum_engines, seconds.way.split.engines),
            restarts=rollout.restarts,
        )
        sampler = Sampler(
            world,
            config,
            self._pool,
            lengths,
            self._prompt_tokens,
            seconds.verifications_per_s,
            conditions.seed,
            self._publish,
        )
        self._batches = _batches(config, sampler, self._phases)
        self._random = np.random.default_rng([conditions.seed, 2])

    def run(self) -> None:
        """All steps, as `loop.train` has them."""
        phase = self._phases.phase
        self._phases.begin_step(0)
        with phase("publish"):
            self._publish(0)
        self._write(0, {})
        for step in range(1, self._config.run.steps + 1):
            self._phases.begin_step(step)
            batch = self._batches.take(step)
            sampled = sampled_tokens(batch.groups)
            cost = self._seconds.trainer(sum(sampled) / len(sampled))
            slowness = self._slowness()
            with phase("annotate"):
                pass_time(self._world, slowness * cost.annotate)
            with phase("update"):
                pass_time(self._world, slowness * cost.update)
            self._batches.settle(step)
            with phase("publish"):
                self._publish(step)
            self._batches.run_ahead(step)
            pass_time(self._world, self._seconds.other_s)
            self._write(step, self._metrics(step, batch, sampled))
        self._phases.begin_step(self._config.run.steps)  # the end of the last stay
        self._timeline.flush()
        self._lines.close()

    def _publish(self, version: int) -> None:
        self._pool.revive()
        pass_time(self._world, self._seconds.publish_s)

    def _slowness(self) -> float:
        """Of the slowest rank in this step, for which all others wait."""
        ranks = self._config.parallel.world_size
        slow = self._random.random() > (1.0 - self._conditions.stragglers) ** ranks
        return self._conditions.straggler_factor if slow else 1.0

    def _metrics(self, step: int, batch: Batch, sampled: list[int]) -> Mapping[str, float]:
        """As `job.Job.measured`, as far as lengths and times say them."""
        times = self._phases.times()
        lengths = [self._prompt_tokens + tokens for tokens in sampled]
        drawn = sum(sampled_tokens(batch.drawn)) if batch.rounds else sum(sampled)
        longest = self._config.rollout.max_response_tokens
        sampling = batch.sampled.times.metrics()
        ranks = self._config.parallel.world_size
        model = self._seconds.planner.architecture
        recompute = self._config.model.recompute == "full"
        peak = self._config.observe.peak_tflops or peak_tflops(self._seconds.planner.profile.device)
        of_dynamic = {name: value for name, value in batch.metrics().items() if "reward" not in name}
        return {
            "rollout/response_tokens_mean": sum(sampled) / len(sampled),
            "rollout/response_tokens_max": max(sampled),
            "rollout/truncated": sum(tokens >= longest for tokens in sampled) / len(sampled),
            **staleness(batch, step - 1, self._config.rollout.partial_tokens),
            **of_dynamic,
            **sampling,
            "throughput/rollout_tokens_per_s": drawn / sampling["time/sampling_s"],
            "throughput/tokens_per_s": sum(lengths) / times["time/step_s"],
            "throughput/update_tokens_per_s": sum(lengths) / times["time/update_s"],
            **update_computing(
                training_flops(model, lengths),
                recomputed_flops(model, lengths) if recompute else 0,
                times["time/update_s"] * ranks,
                peak,
            ),
        }

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._timeline.flush()
        told = {
            "engines/live": len(self._pool.live),
            "engines/returned": self._pool.returned,
            "engines/requests_resent": self._pool.resent,
            "memory/peak_gib": self._seconds.way.memory.total / GIB,
        }
        self._lines.write(step, {**metrics, **told, **self._phases.times()})


def _batches(config: RunConfig, sampler: Sampler, phases: Phases) -> Batches | PartialBatches:
    """The trainer's own order of batches, over simulated engines."""
    method, prompts = config.new_method(), Prompts()
    common: dict[str, Any] = {"phase": phases.phase, "check": _accept, "answers": _no_answers}
    if config.rollout.partial_tokens is None:
        return Batches(config, method, prompts, SimulatedSource(sampler), **common)
    windows = SimulatedWindows(sampler, config.rollout.prompts_per_step)
    return PartialBatches(config, method, prompts, windows, **common)


def _accept(step: int, sampled: Shared) -> None:
    """Rewards are none that could be unknown."""


def _no_answers(step: int) -> None:
    """No code outside is asked."""


def _check(config: RunConfig, lengths: Lengths) -> None:
    method = config.new_method()
    if method.asks:
        raise RapoError(
            f'algorithm.method = "{config.algorithm.method}" asks for episodes by what it has seen of '
            "others, which has no length that could be drawn; simulate another method"
        )
    if config.rollout.dynamic_sampling is not None and lengths.rewards is None:
        raise RapoError(
            "rollout.dynamic_sampling draws again by rewards, which lengths alone have not; name a run with "
            "samples (--lengths RUN), or remove it"
        )


def _check_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RapoError(f"--simulate {directory} has something in it; name a new folder")
