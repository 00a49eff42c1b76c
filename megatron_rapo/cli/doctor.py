"""`megatron-rapo doctor`: what is wrong with a machine, or with a run's engines."""

from __future__ import annotations

import argparse

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.errors import RapoError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    doctor = commands.add_parser(
        "doctor",
        help="find out what a machine lacks, or what is wrong with a run's engines",
        description="Looks at software, host and the links between ranks: what is there, what each missing "
        "part costs, and how to get it; with a configuration, for that run and its layout. No engines are "
        "started. It ends with status 1 where something is to be mended.",
    )
    doctor.add_argument(
        "--mismatch",
        action="store_true",
        help="instead: why log-probs of engines and trainer differ, by probing fixed prompts, at the run's "
        "layout and with its engines. They must serve no run meanwhile, and have the run's newest weights "
        "afterwards",
    )
    add_configuration(doctor, help="the run's, or <run.directory>/config.toml", required=False)
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    if not options.configs and (options.mismatch or options.set):
        what = "--mismatch" if options.mismatch else "--set"
        raise RapoError(
            f"megatron-rapo doctor needs a configuration; name a TOML file: {what} is about a run"
        )
    config = load_config(options.configs, options.set) if options.configs else None
    if options.mismatch and config is not None:
        return _mismatch(config)
    from megatron_rapo.launch.environment import RankEnvironment
    from megatron_rapo.machine.examine import examine
    from megatron_rapo.machine.finding import lines

    findings = examine(config)
    environment = RankEnvironment.read()
    if environment is None or environment.rank == 0:
        print("\n".join(lines(findings)))
    return int(any(finding.verdict == "wrong" for finding in findings))


def _mismatch(config: RunConfig) -> int:
    from megatron_rapo import preflight
    from megatron_rapo.doctor.run import find_mismatch
    from megatron_rapo.doctor.table import table
    from megatron_rapo.launch.environment import RankEnvironment

    preflight.check(config)
    findings = find_mismatch(config)
    environment = RankEnvironment.read()
    if environment is None or environment.rank == 0:
        print(table(findings))
    return int(any(finding.verdict != "ok" for finding in findings))
