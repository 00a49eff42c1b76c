"""Starts the examination in the run's ranks, and brings its findings back."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from megatron_rapo.config import RunConfig
from megatron_rapo.doctor.finding import Finding
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.local import run_local


def find_mismatch(config: RunConfig) -> list[Finding]:
    """Examines a run's engines, on this machine's processes, or as one rank of a torchrun job.

    Raises:
        RapoError: the examination cannot be made.
    """
    environment = RankEnvironment.read()
    if environment is not None:
        environment.check_world_size(config.parallel.world_size)
        return _examine(config)
    with tempfile.TemporaryDirectory(prefix="megatron-rapo-doctor-") as directory:
        report = Path(directory) / "findings.json"
        run_local(
            _examine_and_write,
            (config, report),
            config.parallel.world_size,
            imports=["megatron_rapo.doctor.mismatch"],
        )
        return [Finding(**finding) for finding in json.loads(report.read_text())]


def _examine(config: RunConfig) -> list[Finding]:
    """One rank's part. The process that only watches ranks does not import Megatron."""
    from megatron_rapo.doctor.mismatch import examine

    return examine(config)


def _examine_and_write(config: RunConfig, report: Path) -> None:
    findings = _examine(config)
    environment = RankEnvironment.read()
    if environment is not None and environment.rank == 0:
        report.write_text(json.dumps([asdict(finding) for finding in findings]))
