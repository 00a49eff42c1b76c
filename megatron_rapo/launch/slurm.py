"""A run as a SLURM job: the script that starts it (slurm.sh, the one template), written and submitted."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from textwrap import indent

from megatron_rapo.config import RunConfig, Slurm
from megatron_rapo.config.cluster import KINDS_OF_JOBS
from megatron_rapo.engines.kinds import KINDS
from megatron_rapo.errors import RapoError

COLUMN = 48  # where comments of the settings begin


def submit(config: RunConfig, configs: Sequence[Path], settings: Sequence[str], *, dry_run: bool) -> int:
    """Writes `<run.directory>/slurm.sh` and runs it: it checks, prints the plan, and submits itself.

    Args:
        config: the whole configuration.
        configs: the files that it came from; the job reads them again.
        settings: what came after them on the command line.
        dry_run: print the plan without submitting.

    Returns:
        The script's exit status; what went wrong, it has told.

    Raises:
        RapoError: the configuration has no [slurm], or the script cannot be written.
    """
    if config.slurm is None:
        raise RapoError("--slurm needs a table [slurm] in the configuration; examples/slurm/ has some")
    beside = Path(sys.executable).with_name("megatron-rapo")
    command = str(beside) if beside.is_file() else "megatron-rapo"
    script = config.run.directory / "slurm.sh"
    text = render(config, [path.absolute() for path in configs], settings, command=command)
    try:
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RapoError(
            f"run.directory = {config.run.directory} takes no files: {error.strerror}; choose another place"
        ) from error
    return subprocess.run(["bash", str(script), *(["--dry-run"] if dry_run else [])]).returncode


def render(
    config: RunConfig,
    configs: Sequence[Path],
    settings: Sequence[str] = (),
    *,
    command: str = ".venv/bin/megatron-rapo",
    title: str = "A run of megatron_rapo as a SLURM job.",
) -> str:
    """The script of a run whose configuration has a table [slurm]."""
    template = files("megatron_rapo.launch").joinpath("slurm.sh").read_text(encoding="utf-8")
    replaced = {
        "@TITLE@": title,
        "@SETTINGS@": "\n".join(_settings(config, configs, settings, command)),
        "@ENGINES@": "\n".join(map(_starting, KINDS_OF_JOBS)),
    }
    for name, text in replaced.items():
        template = template.replace(name, text)
    return template


def describe(slurm: Slurm) -> list[str]:
    """What a job asks for and where its processes run, for people."""
    gpus = f" of {slurm.gpus_per_node} GPUs" if slurm.gpus_per_node else ""
    where = f"{slurm.engine_nodes} of their own" if slurm.engine_nodes else "the trainer's"
    return [
        f"{slurm.nodes} nodes{gpus}: {slurm.ranks_per_node} ranks on each of the first {slurm.trainer_nodes}",
        f"{slurm.engines} {slurm.engine} engines on {where}, ports {', '.join(map(str, slurm.engine_ports))}",
    ]


def _settings(config: RunConfig, configs: Sequence[Path], settings: Sequence[str], command: str) -> list[str]:
    """The block of settings: bash variables and arrays."""
    slurm = config.slurm
    assert slurm is not None
    asked = [
        f"--job-name={config.run.directory.name}",
        f"--time={slurm.time_limit}",
        *([f"--partition={slurm.partition}"] if slurm.partition else []),
        *([f"--account={slurm.account}"] if slurm.account else []),
        *slurm.sbatch_arguments,
    ]
    engine_python = slurm.engine_python or _interpreter(command)
    environment = ["OMP_NUM_THREADS=1", "CUDA_DEVICE_MAX_CONNECTIONS=1", "HF_HUB_OFFLINE=1"]
    return [
        _array("SBATCH_ARGUMENTS", asked, "also --partition, --account, --qos, …"),
        _array("CONFIGS", map(str, configs), "later files overlay earlier ones"),
        _array("SETTINGS", list(_beside_the_block(settings)), "single options over them: run.steps=200"),
        _value("MODEL", str(config.model.path)),
        _value("RUN_DIRECTORY", str(config.run.directory)),
        _value("REQUEUE_BEFORE_S", slurm.requeue_before_s, "seconds before --time is up"),
        _value("RELAUNCHES", config.run.relaunches, "of the trainer after it hung"),
        "",
        _value("TRAINER_NODES", slurm.trainer_nodes),
        _value("RANKS_PER_NODE", slurm.ranks_per_node, "times TRAINER_NODES: the ranks of [parallel]"),
        _value("GPUS_PER_NODE", slurm.gpus_per_node, "0: all compute on CPUs"),
        _value("ENGINE_NODES", slurm.engine_nodes, "0: engines run on the trainer's nodes"),
        _array("ENGINE_PORTS", map(str, slurm.engine_ports), "of each node with engines: one engine a port"),
        _value("GPUS_PER_ENGINE", slurm.gpus_per_engine),
        _value("MASTER_PORT", slurm.master_port, "of the trainer's rendezvous"),
        "",
        _array("RAPO", [command]),
        _value("ENGINE", slurm.engine, " or ".join(KINDS_OF_JOBS)),
        _value(
            "ENGINE_PYTHON",
            engine_python,
            "of the environment that engines run in",
        ),
        _array("ENGINE_ARGUMENTS", ["--dtype", config.model.dtype, *slurm.engine_arguments]),
        _array("SRUN_ARGUMENTS", slurm.srun_arguments, "of each step, such as --container-image=…"),
        _array("ENVIRONMENT", environment, "NCCL's, too"),
    ]


def _starting(kind: str) -> str:
    """A case of the script: how an engine of the kind is started."""
    return indent(f"{kind})\n{indent(KINDS[kind].bash or '', '    ')}    ;;", "    ")


def _interpreter(command: str) -> str:
    """The interpreter of the environment that the command is installed in."""
    return str(Path(command).with_name("python")) if "/" in command else "python"


def _beside_the_block(settings: Sequence[str]) -> Iterator[str]:
    """The settings that the block's own variables do not hold."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key not in ("model.path", "run.directory", "run.relaunches") and not key.startswith("slurm."):
            yield setting


def _value(name: str, value: str | int, comment: str = "") -> str:
    return _commented(f"{name}={shlex.quote(str(value))}", comment)


def _array(name: str, words: Sequence[str] | map[str], comment: str = "") -> str:
    return _commented(f"{name}=({' '.join(shlex.quote(word) for word in words)})", comment)


def _commented(text: str, comment: str) -> str:
    return f"{text:<{COLUMN}} # {comment}" if comment else text
