"""Checkpoints of a run: written whole or not at all, reloaded under any layout.

<run>/checkpoints/step_000010/       torch_dist shards of what is trained, and its optimizer (sharded.py)
<run>/checkpoints/step_000010/run.json   step, prompts drawn, and what the run must share with it
<run>/checkpoints/step_000010/checksums.json   of all these files
"""

from __future__ import annotations

import json
import pickle
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rapo.checkpoint import files
from megatron_rapo.checkpoint.best import BestCheckpoint
from megatron_rapo.checkpoint.checksums import damage_to, saved_sums
from megatron_rapo.checkpoint.sharded import sharded_state, take_up
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.writing import Writing, reason_of
from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.file_sums import DAMAGED, FILE, Sums, write_sums
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy

_PARTIAL = ".partial_"
_REMEDY = "remove it to go on from the one before"

# What dist_checkpointing raises of a checkpoint that it cannot read; a lost peer is none of these.
UNREADABLE = (CheckpointException, CheckpointingException, OSError, EOFError, pickle.UnpicklingError)


@dataclass
class _Saving:
    """A checkpoint that is being saved, and what best.json is to say with it."""

    state: TrainState
    final: Path
    best: str | None
    writing: Writing | None = None

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.final.with_name(f"{_PARTIAL}{self.final.name}")


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
        self._saving: _Saving | None = None
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
        """Saves weights, optimizer and state; keeps the newest `checkpoint.keep`, the best, and each
        `checkpoint.keep_every`. All ranks must call it.

        With `checkpoint.in_background` it only begins, and training may go on until `finish`.

        Args:
            policy: whose weights and optimizer.
            state: the rest.
            beside: writes what else belongs to the checkpoint into its folder, on every rank.

        Raises:
            RapoError: it cannot be written (a full disk, say); earlier checkpoints are untouched. Every rank
                raises it, unless rank 0 failed while others wait for it inside dist_checkpointing.
        """
        placement = policy.placement
        assert self._saving is None, "finish() the one before"
        saving = _Saving(
            state,
            self.directory / files.folder_of(state.step),
            self.best.told(state.step) if self.best else None,
        )
        policy.synchronise_parameters()
        failure = _on_main(placement, lambda: _make_empty(saving.partial))
        if failure is None:
            saving.writing = Writing(
                sharded_state(policy, is_loading=False),
                saving.partial,
                placement,
                in_background=self.config.checkpoint.in_background,
            )
            failure = saving.writing.failure or _on_all(placement, lambda: beside(saving.partial))
        self._refuse(failure, saving, placement)
        self._saving, self._saved = saving, time.monotonic()
        if not self.config.checkpoint.in_background:
            self.finish(placement)

    def finish(self, placement: Placement, *, wait: bool = True) -> None:
        """Makes a checkpoint of what `save` began, once all ranks have written. All ranks must call it.

        Args:
            placement: this rank's.
            wait: for them; else nothing is done before all have.

        Raises:
            RapoError: as `save`.
        """
        saving = self._saving
        if saving is None or saving.writing is None:
            return
        if not wait and not all(placement.share_from_all(saving.writing.written)):
            return
        self._saving = None
        failure = saving.writing.complete()
        if failure is None:
            sums = placement.share_from_all(saving.writing.sums)
            failure = _on_main(placement, lambda: self._complete(saving, sums))
        self._refuse(failure, saving, placement)

    def remove_partial(self, placement: Placement) -> None:
        """Removes what a start that was killed left half written. All ranks must call it."""
        if placement.is_main:
            for partial in self.directory.glob(f"{_PARTIAL}*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _refuse(self, failure: str | None, saving: _Saving, placement: Placement) -> None:
        if failure is None:
            return
        if placement.is_main:
            shutil.rmtree(saving.partial, ignore_errors=True)
        raise RapoError(
            f"checkpoint {saving.final} cannot be written: {failure}; free space or mend the folder: "
            f"{files.how_to_go_on(self.config.run.directory)}"
        )

    def load(self, checkpoint: Path, policy: Policy) -> TrainState:
        """Fills the policy, saved under whatever layout, from a checkpoint. All ranks must call it.

        Raises:
            RapoError: the checkpoint is of another run, or cannot be read. Bytes are not compared
                (`newest_whole`).
        """
        try:
            record = _record_of(checkpoint)
        except DAMAGED as error:
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
            loaded = dist_checkpointing.load(sharded_state(policy, is_loading=True), str(checkpoint))
        except UNREADABLE as error:
            raise RapoError(
                f"checkpoint {checkpoint} cannot be read: {reason_of(error)}; {_REMEDY}"
            ) from error
        take_up(policy, loaded)
        policy.go_to_update(state.step * self.config.updates_per_step)
        return state

    def _damage(self, checkpoint: Path, placement: Placement) -> str | None:
        """What is wrong with its files, the same on all ranks."""
        found: Any = None  # its files, or why they are not known
        if placement.is_main:
            try:
                found = saved_sums(checkpoint, _record_of(checkpoint))
            except DAMAGED as error:
                found = f"{files.RECORD} or {FILE}: {error!r}"
        found = placement.share_from_main(found)
        return found if isinstance(found, str) else damage_to(checkpoint, found, placement)

    def _complete(self, saving: _Saving, sums: Sequence[Sums]) -> None:
        """Adds run.json, which makes a checkpoint of it, moves it into place, and removes old ones."""
        record = {
            "state": asdict(saving.state),
            "must_match": self._must_match(),
            "model_path": str(self.config.model.path),  # whose tokenizer an export carries over
            "base": str((self.config.model.checkpoint or self.config.model.path).absolute()),  # of adapters
        }
        (saving.partial / files.RECORD).write_text(json.dumps(record, indent=1))
        write_sums(saving.partial, sums)
        shutil.rmtree(saving.final, ignore_errors=True)
        saving.partial.rename(saving.final)
        self._prune()
        if self.best is not None and saving.best is not None:
            self.best.write(saving.best)

    def _must_match(self) -> dict[str, Any]:
        """What would silently change the meaning of the saved state if it changed."""
        config = self.config
        return {
            "run.seed": config.run.seed,
            "model.dtype": config.model.dtype,
            "optimizer.distributed": config.optimizer.distributed,
            "adapter": None if config.adapter is None else config.adapter.model_dump(mode="json"),
            **{f"fingerprint of {name}": value for name, value in self.fingerprints.items()},
        }

    def _prune(self) -> None:
        best = None if self.best is None or self.best.step is None else files.folder_of(self.best.step)
        options = self.config.checkpoint
        for old in files.complete(self.directory)[: -options.keep]:
            for_good = options.keep_every is not None and files.step_of(old) % options.keep_every == 0
            if old.name != best and not for_good:
                shutil.rmtree(old)


def _record_of(checkpoint: Path) -> dict[str, Any]:
    """What its run.json says.

    Raises:
        DAMAGED: one of these.
    """
    record: dict[str, Any] = json.loads((checkpoint / files.RECORD).read_text())
    TrainState(**record["state"]), record["must_match"]
    return record


def _on_main(placement: Placement, work: Callable[[], None]) -> str | None:
    """Has rank 0 do its part while the others wait; what failed, on all ranks."""
    failure = None
    if placement.is_main:
        try:
            work()
        except OSError as error:
            failure = reason_of(error)
    return placement.share_from_main(failure)


def _on_all(placement: Placement, work: Callable[[], None]) -> str | None:
    """Has every rank do its part; what failed, on all ranks."""
    failure = None
    try:
        work()
    except OSError as error:
        failure = reason_of(error)
    return next((one for one in placement.share_from_all(failure) if one is not None), None)


def _make_empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
