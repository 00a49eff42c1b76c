"""`megatron-rapo plan --simulate`: a run on a planned layout, event by event."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import writing_to

if TYPE_CHECKING:
    from megatron_rapo.config import RunConfig
    from megatron_rapo.planning.plan import Planned, Planner
    from megatron_rapo.simulation.lengths import Lengths

_HOUR = 3600.0


def add_simulation(plan: argparse.ArgumentParser) -> None:
    """Adds the options of a simulation."""
    group = plan.add_argument_group("simulation", "of the first layout, step by step (docs/planning.md)")
    group.add_argument(
        "--simulate", type=Path, metavar="FOLDER", help="where the simulated run goes, as a real one's would"
    )
    group.add_argument(
        "--lengths",
        type=Path,
        metavar="RUN|FILE",
        help="responses of a run, or a file of their tokens; default: exponential",
    )
    group.add_argument(
        "--corrected-by", type=Path, metavar="RUN", help="a real run, which says how wrong the profile is"
    )
    group.add_argument(
        "--stragglers", type=float, metavar="SHARE", help="of ranks and engines, slow in a step (0)"
    )
    group.add_argument(
        "--straggler-factor", type=float, metavar="TIMES", help="as long as others these take (2)"
    )
    group.add_argument(
        "--engine-mtbf",
        type=float,
        metavar="HOURS",
        help="until an engine fails, in the mean; default: none does",
    )
    group.add_argument(
        "--engine-restart", type=float, metavar="SECONDS", help="until one that failed is back (300)"
    )
    group.add_argument("--seed", type=int, metavar="NUMBER", help="of what is drawn (0)")


def check_simulation(options: argparse.Namespace) -> None:
    """Refuses options that would have no effect.

    Raises:
        RapoError: it names one.
    """
    needs = {
        "--lengths": (options.lengths, options.simulate, "--simulate"),
        "--corrected-by": (options.corrected_by, options.simulate, "--simulate"),
        "--stragglers": (options.stragglers, options.simulate, "--simulate"),
        "--straggler-factor": (options.straggler_factor, options.stragglers, "--stragglers"),
        "--engine-mtbf": (options.engine_mtbf, options.simulate, "--simulate"),
        "--engine-restart": (options.engine_restart, options.engine_mtbf, "--engine-mtbf"),
        "--seed": (options.seed, options.simulate, "--simulate"),
    }
    for option, (given, needed, name) in needs.items():
        if given is not None and needed is None:
            raise RapoError(f"{option} {given} has no effect without {name}; give that, or remove it")
    if options.lengths is not None and options.response_tokens is not None:
        raise RapoError(
            f"--response-tokens {options.response_tokens:g} has no effect beside --lengths, whose mean "
            "counts; remove one of them"
        )


def lengths_of(options: argparse.Namespace) -> Lengths | None:
    """Those that are given."""
    if options.lengths is None:
        return None
    from megatron_rapo.simulation.lengths import read_lengths

    return read_lengths(options.lengths)


def simulated(
    options: argparse.Namespace, config: RunConfig, planner: Planner, way: Planned, lengths: Lengths | None
) -> list[str]:
    """Simulates a run of `config`, which has the layout of `way`; lines for people."""
    from megatron_rapo.observe.closing import metrics_summary
    from megatron_rapo.observe.step_lines import read_step_lines
    from megatron_rapo.simulation.conditions import Conditions
    from megatron_rapo.simulation.correction import corrected_by
    from megatron_rapo.simulation.lengths import exponential
    from megatron_rapo.simulation.run import simulate
    from megatron_rapo.simulation.seconds import Correction, Seconds

    given = {
        "seed": options.seed,
        "stragglers": options.stragglers,
        "straggler_factor": options.straggler_factor,
        "engine_mtbf_s": None if options.engine_mtbf is None else options.engine_mtbf * _HOUR,
        "engine_restart_s": options.engine_restart,
    }
    conditions = Conditions(**{name: value for name, value in given.items() if value is not None})
    correction = Correction()
    if options.corrected_by is not None:
        correction = corrected_by(options.corrected_by, planner.profile)
    lengths = lengths or exponential(planner.workload)
    began = time.perf_counter()
    with writing_to(options.simulate, "--simulate"):
        simulate(config, Seconds(planner, way, correction), lengths, conditions, options.simulate)
    seconds = time.perf_counter() - began
    lines = read_step_lines(options.simulate / "metrics.jsonl")
    return [
        f"simulated in {seconds:.1f} s: {lines[-1]['step']} steps of {options.gpus:,} devices, "
        f"{lines[-1]['time_s'] / _HOUR:,.1f} hours, without evaluations and checkpoints; {lengths.source}",
        *metrics_summary(lines),
        f"{options.simulate}  for megatron-rapo trace, and megatron-rapo report",
    ]
