"""Checkpoints of a run: written whole or not at all, reloaded under any layout.

<run>/checkpoints/step_000010/       torch_dist shards of weights and optimizer (megatron dist_checkpointing)
<run>/checkpoints/step_000010/run.json   step, prompts drawn, and what the run must share with it
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_rapo.checkpoint.adam_repair import repair_adam_checkpoints
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.policy.policy import Policy

# How optimizer shards are written so that they reload under another DP, TP and PP.
SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.directory = config.run.directory / "checkpoints"
        repair_adam_checkpoints()

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        complete = sorted(path.parent for path in self.directory.glob("step_*/run.json"))
        return complete[-1] if complete else None

    def save(self, policy: Policy, state: TrainState) -> None:
        """Saves weights, optimizer and state; keeps the newest `checkpoint.keep`. All ranks must call it.

        Raises:
            RapoError: it cannot be written (a full disk, say); earlier checkpoints are untouched.
        """
        placement = policy.placement
        final = self.directory / f"step_{state.step:06d}"
        partial = final.with_name(f".partial_{final.name}")
        policy.synchronise_parameters()
        try:
            if placement.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            dist.barrier(group=placement.host_group)
            dist_checkpointing.save(
                _sharded_state(policy, is_loading=False), str(partial), content_metadata=SHARDING
            )
            if placement.is_main:
                record = {"state": asdict(state), "must_match": self._must_match()}
                (partial / "run.json").write_text(json.dumps(record, indent=1))
                shutil.rmtree(final, ignore_errors=True)
                partial.rename(final)
                self._prune()
        except Exception as error:
            # Megatron reports what its writer processes met as various types.
            if placement.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise RapoError(
                f"checkpoint {final} cannot be written: {_root(error)}; earlier checkpoints are intact: free "
                "space or mend the folder, then run the same command again to go on from the newest"
            ) from error
        dist.barrier(group=placement.host_group)

    def load(self, checkpoint: Path, policy: Policy) -> TrainState:
        """Fills the policy, saved under whatever layout, from a checkpoint. All ranks must call it.

        Raises:
            RapoError: the checkpoint is of another run, or damaged.
        """
        try:
            record = json.loads((checkpoint / "run.json").read_text())
            state, saved = TrainState(**record["state"]), record["must_match"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RapoError(f"checkpoint {checkpoint} is damaged (run.json: {error}); remove it") from error
        for option, value in self._must_match().items():
            if saved.get(option) != value:
                raise RapoError(
                    f"checkpoint {checkpoint} was made with {option} = {saved.get(option)!r}, this run has "
                    f"{value!r}; restore it, or choose another run.directory"
                )
        try:
            loaded = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(checkpoint))
        except Exception as error:
            raise RapoError(f"checkpoint {checkpoint} cannot be read: {_root(error)}; remove it") from error
        for key, chunk in zip(_chunk_keys(policy), policy.chunks, strict=True):
            chunk.load_state_dict(loaded[key], strict=True)
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.go_to_update(state.step * self.config.updates_per_step)
        return state

    def _must_match(self) -> dict[str, Any]:
        """What would silently change the meaning of the saved state if it changed."""
        values = self.config.resolved()
        model = values["model"]
        return {
            "model.path": model["path"],
            "model.reference_path": model.get("reference_path"),
            "run.seed": values["run"]["seed"],
            "data": values["data"],
            "optimizer.distributed": values["optimizer"]["distributed"],
        }

    def _prune(self) -> None:
        complete = sorted(path.parent for path in self.directory.glob("step_*/run.json"))
        for old in complete[: -self.config.checkpoint.keep]:
            shutil.rmtree(old)


def _chunk_keys(policy: Policy) -> list[str]:
    count = len(policy.chunks)
    return ["model"] if count == 1 else [f"model{index}" for index in range(count)]


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, Any]:
    metadata = {**SHARDING, "dp_cp_group": policy.placement.gradient_group}
    state = {
        key: chunk.sharded_state_dict(metadata=metadata)
        for key, chunk in zip(_chunk_keys(policy), policy.chunks, strict=True)
    }
    state["optimizer"] = policy.optimizer.sharded_state_dict(
        dict(state), is_loading=is_loading, metadata=metadata
    )
    return state


def _root(error: BaseException) -> str:
    """The innermost cause, which names what happened."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}"
