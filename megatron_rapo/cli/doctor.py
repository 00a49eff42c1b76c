"""`megatron-rapo doctor`: what is wrong with a run's engines."""

from __future__ import annotations

import argparse

from megatron_rapo.cli.overrides import add_configuration
from megatron_rapo.config import load_config


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    doctor = commands.add_parser(
        "doctor",
        help="find out what is wrong with a run's engines",
        description="Attributes a difference of engines and trainer by probing fixed prompts, at the run's "
        "layout and with its engines. They must serve no run meanwhile, and have the run's newest weights "
        "afterwards. Ends with status 1 where a cause is found.",
    )
    doctor.add_argument(
        "--mismatch", action="store_true", required=True, help="why log-probs of engines and trainer differ"
    )
    add_configuration(doctor, help="the run's, or <run.directory>/config.toml", required=True)
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    config = load_config(options.configs, options.set)
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
