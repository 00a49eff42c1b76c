"""A checkpoint's shards on their way to disk: planned by all ranks together, written by a thread of each.

Megatron's own queues for that (AsyncCallsQueue) fork the trainer, or hold a process that a killed rank leaves
behind, and want CUDA. What they call is used here: a plan, a function that only writes, and functions that
complete the files.
"""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_rapo.file_sums import Sums, sum_of
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.processes.confine import end_with_parent

# How optimizer shards are written so that they reload under another DP, TP and PP.
SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}

THREAD = "checkpoint"


def _end_with_rank() -> None:
    # Megatron's function that writes forks a process for it, which would outlive a rank that is killed, and
    # hold open what verifiers wait for.
    if threading.current_thread().name == THREAD:
        end_with_parent()


os.register_at_fork(after_in_child=_end_with_rank)


class Writing:
    """Shards that are being written. All ranks make it, and call `complete`, together and on their main
    threads: what ranks exchange they exchange there.

    Attributes:
        failure: what failed so far, on all ranks or on rank 0 alone.
        sums: of the files that this rank has written.
    """

    def __init__(
        self, state: Mapping[str, Any], directory: Path, placement: Placement, *, in_background: bool
    ) -> None:
        """Plans who writes what, takes values to host memory, and begins.

        Args:
            state: sharded, as dist_checkpointing takes it.
            directory: an empty folder.
            placement: this rank's.
            in_background: whether `state` may change before it is written: then its values are copied.

        Raises:
            Exception: anything but a folder that cannot be written to, such as a lost peer.
        """
        self._directory = directory
        self._placement = placement
        self._copies = in_background
        self._finalize: Sequence[Callable[[], None]] = ()
        self._thread: threading.Thread | None = None
        self._raised: BaseException | None = None
        self.sums: Sums = {}
        self.failure = self._attempt(lambda: self._begin(dict(state)))

    @property
    def written(self) -> bool:
        """Whether this rank's thread has done its part."""
        return self._thread is None or not self._thread.is_alive()

    def complete(self) -> str | None:
        """Waits for this rank's thread, and completes the files; what failed, as `failure`.

        Raises:
            Exception: anything but a folder that cannot be written to, such as a lost peer.
        """
        if self._thread is not None:
            self._thread.join()
        raised = self._placement.share_from_all(reason_of(self._raised) if self._raised else None)
        self.failure = self.failure or next((one for one in raised if one is not None), None)
        if self.failure is None:
            self.failure = self._attempt(lambda: [finalize() for finalize in self._finalize])
        return self.failure

    def _begin(self, state: dict[str, Any]) -> None:
        # From 0.17 on the default is another package's writer.
        newer = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
        request = dist_checkpointing.save(
            state,
            str(self._directory),
            content_metadata=SHARDING,
            async_sharded_save=True,
            **({"async_strategy": "mcore"} if newer else {}),
        )
        self._finalize = request.finalize_fns
        if request.async_fn is None:
            return
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()
            if self._copies:
                arguments[1] = [_copied(bucket) for bucket in arguments[1]]

        def write() -> None:
            try:
                request.async_fn(*arguments, **request.async_fn_kwargs)
                names = [Path(bucket[0]) for bucket in arguments[1]]
                self.sums = {path.name: sum_of(path) for path in names if path.exists()}
            except BaseException as error:
                self._raised = error  # told on all ranks by `complete`

        self._thread = threading.Thread(target=write, name=THREAD, daemon=True)
        self._thread.start()

    def _attempt(self, work: Callable[[], object]) -> str | None:
        """What failed, on all ranks or on rank 0 alone."""
        directory, placement = self._directory, self._placement
        try:
            work()
        except CheckpointException as error:
            # All ranks raise it together, but the reasons are told to rank 0 alone.
            told = (refusal(directory) or _with_free_space(error, directory)) if placement.is_main else None
            return placement.share_from_main(told)
        except (OSError, RuntimeError):
            # Rank 0's own files: the others wait for it inside, and end with it.
            if placement.is_main and (told := refusal(directory)):
                return told
            raise
        return None


def _copied(bucket: Any) -> Any:
    """A bucket whose tensors are not the trainer's own: such as were on the CPU before are not copied yet."""
    file_name, storage_key, (bytes_data, tensor_data) = bucket
    return file_name, storage_key, (bytes_data, [(item, _copy(tensor)) for item, tensor in tensor_data])


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _nothing(record: logging.LogRecord) -> bool:
    return False


# Megatron's writer logs what it raises as well, in torch's words and once a rank.
logging.getLogger(filesystem_async.__name__).addFilter(_nothing)


def refusal(directory: Path) -> str | None:
    """Why the folder takes no more files, or None if it does: torch's own errors do not name a full disk."""
    probe = directory / "probe"
    try:
        probe.write_bytes(bytes(1 << 20))
        probe.unlink()
    except OSError as error:
        return reason_of(error)
    return None


def _with_free_space(error: BaseException, directory: Path) -> str:
    """The reason of a failed write, which may have left some space of a disk that was too small for it."""
    return f"{reason_of(error)}, with {shutil.disk_usage(directory).free >> 20} MiB free on that disk"


def reason_of(error: BaseException) -> str:
    """What happened, in a line; of what happened on several ranks, the first's."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"{reason_of(error)} (rank {rank})"
    return f"{type(error).__name__}: {error}"
