"""All that is looked at, for a machine or for a run on it."""

from __future__ import annotations

from pathlib import Path

from megatron_rapo.config import Parallel, RunConfig
from megatron_rapo.engines.options import EngineOptions
from megatron_rapo.machine.finding import Finding
from megatron_rapo.machine.host import host
from megatron_rapo.machine.links import links
from megatron_rapo.machine.software import software
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_parameters

ANY_RANKS = 2  # where no run says how many


def examine(config: RunConfig | None) -> list[Finding]:
    """Looks at this machine, and at what the run asks of it; as every rank of a job, if it is one.

    Raises:
        RapoError: the model's configuration cannot be read, or a rank failed.
    """
    if config is None:
        layout = Parallel(data_parallel=ANY_RANKS)
        return [*software(), *host(Path.cwd(), 0, 0, 0), *links(layout)]
    parameters = count_parameters(read_architecture(config.model.path))
    bytes_each = 4 if config.model.dtype == "float32" else 2
    weights = parameters * bytes_each
    # Weights, fp32 main weights where those are smaller, and two moments.
    checkpoint = parameters * (bytes_each + 8 + (0 if bytes_each == 4 else 4))
    found = [*software(), *host(config.run.directory, weights, checkpoint, config.checkpoint.keep)]
    return [*found, *_engines(config), *links(config.parallel)]


def _engines(config: RunConfig) -> list[Finding]:
    """Whether this machine can start the run's engines, where it is to."""
    options: EngineOptions = config.rollout.engine
    name = f"{options.kind} engines"
    if options.urls:
        return [Finding(name, "ok", f"given: {', '.join(options.urls)}; not asked here")]
    problems = list(config.engine_kind.problems())
    if problems:
        return [Finding(name, "wrong", "this machine cannot start them", "; ".join(problems))]
    return [Finding(name, "ok", "this machine can start them")]
