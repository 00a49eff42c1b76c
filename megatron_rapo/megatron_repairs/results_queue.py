"""megatron-core starts a process for a queue that a save needs in one process alone.

It is a multiprocessing manager (strategies/filesystem_async.py), which nothing ends where its rank is killed:
it stays behind and holds the job's output open, for whose end a launcher then waits.
"""

from __future__ import annotations

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async

VERSIONS = ">=0.16.1,<0.20"


def repair() -> None:
    """Gives saves a plain queue; those in the background are written by a thread (checkpoint/writing.py)."""
    filesystem_async._results_queue = queue.Queue()
