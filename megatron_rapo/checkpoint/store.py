"""Checkpoints of a run: written whole or not at all, reloaded under any layout.

<run>/checkpoints/step_000010/       torch_dist shards of weights and optimizer (megatron dist_checkpointing)
<run>/checkpoints/step_000010/run.json   step, prompts drawn, and what the run must share with it
"""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rapo.checkpoint import files
from megatron_rapo.checkpoint.best import BestCheckpoint
from megatron_rapo.checkpoint.checksums import Sums, damage_to, sums_of
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy

# How optimizer shards are written so that they reload under another DP, TP and PP.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}

_REMEDY = "remove it to go on from the one before"

# What dist_checkpointing raises of a checkpoint that it cannot read; a lost peer is none of these.
UNREADABLE = (CheckpointException, CheckpointingException, OSError, EOFError, pickle.UnpicklingError)


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, config: RunConfig, fingerprints: Mapping[str, str] | None = None) -> None:
        """
        Args:
            config: of the run.
            fingerprints: of what it loaded, by name: checkpoints are of no other.
        """
        self.config = config
        self.fingerprints = fingerprints or {}
        self.directory = config.run.directory / files.FOLDER
        self._saved = time.monotonic()
        best = config.evaluate.best if config.evaluate else None
        self.best = None if best is None else BestCheckpoint(self.directory, best)

    def newest(self) -> Path | None:
        """The last complete checkpoint."""
        return files.newest(self.config.run.directory)

    def newest_whole(self, placement: Placement) -> Path | None:
        """The last checkpoint whose files are as they were saved; all ranks call it.

        Damaged ones are told, and put aside under another name.

        Raises:
            RapoError: there are checkpoints, and all of them are damaged.
        """
        told: list[str] = []
        for checkpoint in reversed(placement.share_from_main(files.complete(self.directory))):
            damage = self._damage(checkpoint, placement)
            if damage is None:
                return checkpoint
            aside = checkpoint.with_name(f"damaged_{checkpoint.name}")
            told.append(f"checkpoint {checkpoint} is damaged: {damage}")
            if placement.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.rename(aside)
                print(f"warning: {told[-1]}; it is now {aside.name}", flush=True)
        if told:
            reasons = "\n".join(told)
            raise RapoError(f"{reasons}\nno checkpoint is whole; remove {self.directory} to begin anew")
        return None

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after the step, by `checkpoint.every` or by this process's clock."""
        options = self.config.checkpoint
        minutes = (time.monotonic() - self._saved) / 60
        return (
            step == self.config.run.steps
            or (options.every is not None and step % options.every == 0)
            or 0 < options.every_minutes <= minutes
        )

    def save(
        self, policy: Policy, state: TrainState, beside: Callable[[Path], None] = lambda folder: None
    ) -> None:
        """Saves weights, optimizer and state; keeps the newest `checkpoint.keep` and the best. All ranks must
        call it.

        Args:
            policy: whose weights and optimizer.
            state: the rest.
            beside: writes what else belongs to the checkpoint into its folder, on every rank.

        Raises:
            RapoError: it cannot be written (a full disk, say); earlier checkpoints are untouched. Every rank
                raises it, unless rank 0 failed while others wait for it inside dist_checkpointing.
        """
        placement = policy.placement
        final = self.directory / files.folder_of(state.step)
        partial = final.with_name(f".partial_{final.name}")
        policy.synchronise_parameters()
        failure = _on_main(placement, lambda: _make_empty(partial))
        if failure is None:
            failure = _write_shards(policy, partial)
        if failure is None:
            failure = self._finish(partial, final, state, placement, beside)
        if failure is not None:
            if placement.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            raise RapoError(
                f"checkpoint {final} cannot be written: {failure}; free space or mend the folder: "
                f"{files.how_to_go_on(self.config.run.directory)}"
            )
        self._saved = time.monotonic()

    def load(self, checkpoint: Path, policy: Policy) -> TrainState:
        """Fills the policy, saved under whatever layout, from a checkpoint. All ranks must call it.

        Raises:
            RapoError: the checkpoint is of another run, or cannot be read. Bytes are not compared
                (`newest_whole`).
        """
        try:
            record = _record_of(checkpoint)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RapoError(
                f"checkpoint {checkpoint} is damaged ({files.RECORD}: {error!r}); {_REMEDY}"
            ) from error
        state, saved = TrainState(**record["state"]), record["must_match"]
        for name, value in self._must_match().items():
            if saved.get(name, value) != value:
                raise RapoError(
                    f"checkpoint {checkpoint} was made with {name} = {saved[name]!r}, this run has "
                    f"{value!r}; restore it, or choose another run.directory"
                )
        try:
            loaded = dist_checkpointing.load(_sharded_state(policy, is_loading=True), str(checkpoint))
        except UNREADABLE as error:
            raise RapoError(f"checkpoint {checkpoint} cannot be read: {_reason(error)}; {_REMEDY}") from error
        for key, chunk in zip(_chunk_keys(policy), policy.chunks, strict=True):
            chunk.load_state_dict(loaded[key], strict=True)
        policy.optimizer.load_state_dict(loaded["optimizer"])
        policy.go_to_update(state.step * self.config.updates_per_step)
        return state

    def _damage(self, checkpoint: Path, placement: Placement) -> str | None:
        """What is wrong with its files, the same on all ranks."""
        found: Any = None  # its files, or why they are not known
        if placement.is_main:
            try:
                found = _record_of(checkpoint)["files"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                found = f"{files.RECORD}: {error!r}"
        found = placement.share_from_main(found)
        return found if isinstance(found, str) else damage_to(checkpoint, found, placement)

    def _finish(
        self,
        partial: Path,
        final: Path,
        state: TrainState,
        placement: Placement,
        beside: Callable[[Path], None],
    ) -> str | None:
        """Makes a checkpoint of the written files; what failed, on all ranks."""
        failed = ""
        try:
            beside(partial)
        except OSError as error:
            failed = _reason(error)
        if failures := [one for one in placement.share_from_all(failed) if one]:
            return failures[0]
        try:
            sums = sums_of(partial, placement)
        except OSError as error:
            return _reason(error)
        return _on_main(placement, lambda: self._complete(partial, final, state, sums))

    def _complete(self, partial: Path, final: Path, state: TrainState, sums: Sums) -> None:
        """Adds run.json, which makes a checkpoint of it, moves it into place, and removes old ones."""
        record = {
            "state": asdict(state),
            "must_match": self._must_match(),
            "model_path": str(self.config.model.path),  # whose tokenizer an export carries over
            "files": sums,
        }
        (partial / files.RECORD).write_text(json.dumps(record, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self._prune()
        if self.best is not None and self.best.step == state.step:
            self.best.write()

    def _must_match(self) -> dict[str, Any]:
        """What would silently change the meaning of the saved state if it changed."""
        config = self.config
        return {
            "run.seed": config.run.seed,
            "model.dtype": config.model.dtype,
            "optimizer.distributed": config.optimizer.distributed,
            **{f"fingerprint of {name}": value for name, value in self.fingerprints.items()},
        }

    def _prune(self) -> None:
        best = None if self.best is None or self.best.step is None else files.folder_of(self.best.step)
        for old in files.complete(self.directory)[: -self.config.checkpoint.keep]:
            if old.name != best:
                shutil.rmtree(old)


def _record_of(checkpoint: Path) -> dict[str, Any]:
    """What its run.json says.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is damaged.
    """
    record: dict[str, Any] = json.loads((checkpoint / files.RECORD).read_text())
    TrainState(**record["state"]), record["must_match"], record["files"]
    return record


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


def _write_shards(policy: Policy, directory: Path) -> str | None:
    """Writes weights and optimizer; what failed, on all ranks or on rank 0 alone.

    Raises:
        Exception: anything but a folder that cannot be written to, such as a lost peer.
    """
    placement = policy.placement
    try:
        state = _sharded_state(policy, is_loading=False)
        with _without_log_lines():
            dist_checkpointing.save(state, str(directory), content_metadata=SHARDING)
    except CheckpointException as error:
        # All ranks raise it together, but the reasons are told to rank 0 alone.
        told = (_refusal(directory) or _with_free_space(error, directory)) if placement.is_main else None
        return placement.share_from_main(told)
    except (OSError, RuntimeError):
        # Rank 0's own files: the others wait for it inside, and end with it.
        if placement.is_main and (refusal := _refusal(directory)):
            return refusal
        raise
    return None


@contextmanager
def _without_log_lines() -> Iterator[None]:
    """Megatron's writer prints what it raises as well, in torch's words and once a rank."""
    writer = logging.getLogger(filesystem_async.__name__)
    writer.addFilter(_nothing)
    try:
        yield
    finally:
        writer.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def _refusal(directory: Path) -> str | None:
    """Why the folder takes no more files, or None if it does: torch's own errors do not name a full disk."""
    probe = directory / "probe"
    try:
        probe.write_bytes(bytes(1 << 20))
        probe.unlink()
    except OSError as error:
        return _reason(error)
    return None


def _with_free_space(error: BaseException, directory: Path) -> str:
    """The reason of a failed write, which may have left some space of a disk that was too small for it."""
    return f"{_reason(error)}, with {shutil.disk_usage(directory).free >> 20} MiB free on that disk"


def _on_main(placement: Placement, work: Callable[[], None]) -> str | None:
    """Has rank 0 do its part while the others wait; what failed, on all ranks."""
    failure = None
    if placement.is_main:
        try:
            work()
        except OSError as error:
            failure = _reason(error)
    return placement.share_from_main(failure)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


def _reason(error: BaseException) -> str:
    """What happened, in a line; of what happened on several ranks, the first's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"{_reason(error)} (rank {rank})"
    return f"{type(error).__name__}: {error}"
