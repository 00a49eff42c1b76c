"""The runs of a study as a SLURM array: a task each, which makes its run as this machine would."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.study.plan import PlannedRun

FOLDER = "slurm"


def script(
    study: Path, names: Sequence[str], *, cores: int, at_a_time: int, folder: Path, sbatch: Sequence[str]
) -> str:
    """The array's script.

    Args:
        study: its file.
        names: of the runs, a task each.
        cores: of a task.
        at_a_time: tasks.
        folder: of the study; paths start where it is submitted.
        sbatch: further arguments.
    """
    logs = folder / FOLDER / "task-%A-%a.log"
    command = (
        f"{shlex.quote(sys.executable)} -c 'import sys; from megatron_rapo.cli import main; sys.exit(main())'"
    )
    asked = [
        f"--array=0-{len(names) - 1}%{at_a_time}",
        f"--cpus-per-task={cores}",
        "--ntasks=1",
        f"--output={logs}",
        *sbatch,
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            *(f"#SBATCH {argument}" for argument in asked),
            "set -euo pipefail",
            f"RUNS=({' '.join(map(shlex.quote, names))})",
            f'exec {command} study {shlex.quote(str(study))} --only "${{RUNS[$SLURM_ARRAY_TASK_ID]}}"',
            "",
        ]
    )


def submit(
    study: Path, runs: Sequence[PlannedRun], folder: Path, cores: int, sbatch: Sequence[str], *, dry_run: bool
) -> list[Path]:
    """Writes an array for each number of cores that runs take, and submits it.

    Args:
        study: its file.
        runs: to do.
        folder: of the study.
        cores: that may be busy at a time, over all arrays alike.
        sbatch: further arguments of sbatch.
        dry_run: only write the scripts.

    Returns:
        The scripts.

    Raises:
        RapoError: a run takes several nodes, or SLURM refuses.
    """
    for run in runs:
        if run.config.slurm is not None and run.config.slurm.nodes > 1:
            raise RapoError(
                f"{run.name} takes {run.config.slurm.nodes} nodes ([slurm]), and a task of an array one; "
                "submit it by `megatron-rapo train --slurm`, or leave [slurm] out"
            )
    if not dry_run and shutil.which("sbatch") is None:
        raise RapoError("sbatch is not on this machine; submit from one of the cluster's login nodes")
    scripts = []
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for size in sorted({run.cores for run in runs}):
        names = [run.name for run in runs if run.cores == size]
        file = folder / FOLDER / f"array-{size}-cores.sh"
        at_a_time = max(1, cores // size)
        file.write_text(
            script(study, names, cores=size, at_a_time=at_a_time, folder=folder, sbatch=sbatch),
            encoding="utf-8",
        )
        scripts.append(file)
        if not dry_run:
            done = subprocess.run(["sbatch", str(file)], capture_output=True, text=True)
            if done.returncode:
                raise RapoError(f"sbatch refuses {file}: {done.stderr.strip()}; change sbatch in {study}")
            print(done.stdout.strip())
    return scripts
