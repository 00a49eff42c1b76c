"""A plan's choice as a configuration that lies over the one that was planned."""

from __future__ import annotations

from typing import Any

from megatron_rapo.config import RunConfig
from megatron_rapo.config.write import toml_value
from megatron_rapo.engines.options import OwnServers
from megatron_rapo.planning.plan import Planned


def overlay(config: RunConfig, way: Planned, transport: str, *, node: int) -> str:
    """TOML that `megatron-rapo train CONFIG OVERLAY` takes.

    Engines that the run cannot start by itself, as they have addresses or other nodes, stand in a comment.
    """
    tables: dict[str, dict[str, Any]] = {
        "model": {"recompute": way.layout.recompute},
        "parallel": _parallel(way),
        "rollout": {"colocated": way.division.colocated, "max_staleness": way.max_staleness},
        "weights": {"transport": transport},
        "algorithm": {"max_tokens_per_microbatch": way.layout.budget},
    }
    note = ""
    engine = config.rollout.engine
    if config.slurm is not None:
        tables["slurm"] = _nodes(config, way)
    elif engine.urls or way.division.engines > node:
        note = (
            f"# Start {way.split.engines} engines of {way.split.tensor_parallel} devices each, and name them "
            "in rollout.engine.urls.\n"
        )
    else:
        tables["rollout.engine"] = {"kind": engine.kind, "servers": way.split.engines}
        if isinstance(engine, OwnServers):
            tables["rollout.engine"] |= {"tensor_parallel": way.split.tensor_parallel}
    if transport == "disk" and "bucket_bytes" in config.weights.model_fields_set:
        tables["weights"]["bucket_bytes"] = "@default"
    lines = [f"# {way.division}: {way.layout}\n{note}"]
    for name, options in tables.items():
        lines += [f"[{name}]", *(f"{key} = {toml_value(value)}" for key, value in options.items()), ""]
    return "\n".join(lines)


def _parallel(way: Planned) -> dict[str, Any]:
    """Every option of the layout, so that none of the configuration's own is left; others are taken back."""
    layout = way.layout.parallel
    return {
        "tensor_parallel": layout.tensor_parallel,
        "pipeline_parallel": layout.pipeline_parallel,
        "virtual_pipeline_parallel": layout.virtual_pipeline_parallel or "@default",
        "context_parallel": layout.context_parallel,
        "data_parallel": layout.data_parallel,
        "sequence_parallel": layout.sequence_parallel or "@default",
        "expert_parallel": layout.expert_parallel if layout.expert_parallel > 1 else "@default",
        "expert_tensor_parallel": (
            layout.expert_tensor_parallel if layout.expert_tensor_parallel > 1 else "@default"
        ),
    }


def _nodes(config: RunConfig, way: Planned) -> dict[str, Any]:
    """Of `[slurm]`: whole nodes of trainers, then of engines."""
    assert config.slurm is not None
    each = config.slurm.ranks_per_node
    nodes, rest = divmod(way.division.trainer, each)
    if rest:
        nodes, each = 1, way.division.trainer
    engines = {"gpus_per_engine": way.split.tensor_parallel} if config.slurm.gpus_per_node else {}
    per_node = max(1, config.slurm.gpus_per_node // way.split.tensor_parallel)
    return {
        "trainer_nodes": nodes,
        "ranks_per_node": each,
        "engine_nodes": -(-way.split.engines // per_node),
        "engine_ports": [30000 + number for number in range(min(per_node, way.split.engines))],
        **engines,
    }
