"""`megatron-rapo plan`: layouts of a run on so many devices, before there are any."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.cli.simulation import add_simulation, check_simulation, lengths_of, simulated
from megatron_rapo.config import load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole, writing_to

if TYPE_CHECKING:
    from megatron_rapo.config import RunConfig
    from megatron_rapo.planning.plan import Plan, Planned, Planner


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    plan = commands.add_parser(
        "plan",
        help="find the layout of a run on so many devices",
        description="Ranks the layouts of trainer and engines that fit so many devices by the predicted time "
        "of a step, says why others do not fit, and writes the first as a configuration that lies over the "
        "given one (docs/planning.md).",
    )
    add_configuration(plan, help="configuration; later files overlay earlier ones", required=True)
    plan.add_argument("--gpus", type=int, required=True, metavar="N", help="devices of trainer and engines")
    plan.add_argument(
        "--profile",
        required=True,
        help="what a device can do: a file of megatron-rapo calibrate, or h100, h200 or b200",
    )
    plan.add_argument("--prompt-tokens", type=float, metavar="MEAN", help="default: the longest")
    plan.add_argument("--response-tokens", type=float, metavar="MEAN", help="default: the longest")
    plan.add_argument(
        "--as-configured", action="store_true", help="the configuration's own layout, in place of all others"
    )
    plan.add_argument("--show", type=int, default=10, metavar="COUNT", help="layouts that are listed (10)")
    plan.add_argument("--output", type=Path, metavar="FILE", help="where the first goes, as TOML")
    add_simulation(plan)
    plan.set_defaults(command=_plan)


def _plan(options: argparse.Namespace) -> int:
    for option, value in (("--gpus", options.gpus), ("--show", options.show)):
        if value < 1:
            raise RapoError(f"{option} {value} is no count; give 1 or more")
    if options.as_configured and options.output:
        raise RapoError(
            "--output would write what is configured already (--as-configured); remove one of them"
        )
    check_simulation(options)
    config = load_config(options.configs, options.set)
    from megatron_rapo.planning.plan import Plan
    from megatron_rapo.planning.table import lines
    from megatron_rapo.scaling.devices import own_device_name

    lengths = lengths_of(options)
    planner = _planner(options, config, None if lengths is None else lengths.mean)
    workload, profile = planner.workload, planner.profile
    plan = Plan([_as_configured(options, planner)]) if options.as_configured else planner.plan(options.gpus)
    print(f"{profile.device}: {profile.source}")
    if (here := own_device_name()) != profile.device:
        print(f"not for this machine, whose device is {here}")
    print(f"responses of {workload.response_tokens:g} tokens in the mean, the longest {workload.longest}")
    print("\n".join(lines(plan, workload, options.gpus, options.show)))
    chosen, number, text = config, 1, ""
    if not options.as_configured and (options.output or options.simulate):
        number, text, chosen = _first_that_loads(options, planner, plan)
    if options.output:
        with writing_to(options.output.parent, "--output"):
            write_whole(options.output, text)
        configs = " ".join(map(str, [*options.configs, options.output]))
        print(f"\n{options.output}  number {number} of them, for megatron-rapo train {configs}")
    if options.simulate:
        print("\n" + "\n".join(simulated(options, chosen, planner, plan.found[number - 1], lengths)))
    return 0


def _planner(options: argparse.Namespace, config: RunConfig, mean: float | None) -> Planner:
    """`mean` is of given lengths."""
    from megatron_rapo.model.hf_config import read_architecture
    from megatron_rapo.planning.plan import Planner
    from megatron_rapo.planning.profile import read_profile
    from megatron_rapo.planning.workload import workload_of

    architecture = read_architecture(config.model.config or config.model.path)
    architecture.check_lengths(config.rollout)
    if mean is not None:
        mean = min(mean, config.rollout.max_response_tokens)
    workload = workload_of(config, options.prompt_tokens, mean or options.response_tokens)
    return Planner(config, architecture, workload, read_profile(options.profile))


def _as_configured(options: argparse.Namespace, planner: Planner) -> Planned:
    from megatron_rapo.planning.configured import as_configured

    return as_configured(planner, options.gpus)


def _first_that_loads(
    options: argparse.Namespace, planner: Planner, plan: Plan
) -> tuple[int, str, RunConfig]:
    """The fastest that goes with all other options: its number, from 1, its overlay, and both together."""
    from megatron_rapo.planning.overlay import overlay

    refused: RapoError | None = None
    for number, way in enumerate(plan.found, start=1):
        text = overlay(
            planner.config, way, planner.transport(way.division), node=planner.profile.devices_per_node
        )
        try:
            loaded = load_config([*options.configs, tomllib.loads(text)], options.set)
        except RapoError as error:
            refused = refused or error
        else:
            return number, text, loaded
    raise RapoError(f"no layout goes with the configuration's other options; of the first: {refused}")
