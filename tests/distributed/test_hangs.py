"""Ranks that make no progress are found and named, with who waits for them and their stacks."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rapo.config.verifiers import built_in
from megatron_rapo.episode.problem import Problem
from megatron_rapo.hangs.bounds import Bounds
from megatron_rapo.hangs.watch import Watch
from megatron_rapo.launch.failure import Kind, WorkerFailed
from megatron_rapo.launch.local import run_local
from megatron_rapo.launch.rank import give_up
from megatron_rapo.observe.heartbeat import Heartbeat
from megatron_rapo.reward.verifier import Verifier

LEAST_S = 2.0
HUNG = 2  # the rank


def sleep(_: dist.ProcessGroup) -> None:
    time.sleep(120)


def stop(_: dist.ProcessGroup) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_the_interpreter(_: dist.ProcessGroup) -> None:
    ctypes.PyDLL(None).sem_wait(bytes(64))  # which no signal ends


def call_another(pair: dist.ProcessGroup) -> None:
    dist.barrier(pair)


def wait_for_verifiers(_: dist.ProcessGroup) -> None:
    with Verifier(built_in("countdown"), workers=1, time_limit_s=1.0) as verifier:
        verifier._lock.acquire()  # a deadlock: whoever asks waits for it, and so does the pool's own thread
        verifier.verify([("", Problem(id="", question="", answer=""))])


def rank_of_a_job(directory: Path, hang: Callable[[dist.ProcessGroup], None]) -> None:
    """Four ranks; the third hangs in its fifth step, where the second waits for it and others for that."""
    os.environ["TORCH_FR_BUFFER_SIZE"] = "200"
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    rank = dist.get_rank()
    pair = dist.new_group([1, HUNG], group_desc="PAIR")
    assert isinstance(pair, dist.ProcessGroup) or rank not in (1, HUNG)
    heartbeat = Heartbeat(directory, rank, 4)
    bounds = Bounds(5.0, LEAST_S, unmeasured_s=60.0, patience_s={})
    watch = Watch(directory / "hangs" / "one", rank, 4, bounds, lambda report: give_up(rank, report))
    with watch:
        for step in range(1, 8):
            heartbeat.beat(step, "update")
            watch.beat(step, "update")
            if step == 5 and rank == HUNG:
                hang(pair)
            if rank in (1, HUNG):
                dist.all_reduce(torch.ones(4), group=pair)
            dist.all_reduce(torch.ones(4))
            time.sleep(0.1)
            watch.beat(step, "between phases")
    dist.destroy_process_group()


HANGS = [sleep, stop, hold_the_interpreter, call_another, wait_for_verifiers]


@pytest.mark.parametrize("hang", HANGS, ids=lambda f: f.__name__)
def test_a_rank_that_hangs_is_named(hang: Callable[[dist.ProcessGroup], None], tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        run_local(rank_of_a_job, (tmp_path, hang), 4)
    told = str(caught.value)
    print(told)
    assert caught.value.failure.kind is Kind.HUNG
    # Beside the bound: what ranks take to start and to say where they are.
    assert time.monotonic() - began < 40
    assert "in update of step 5" in told
    assert "ranks 0-3: step 5, update" in told
    assert "ranks 0, 3 wait in all_reduce, number 5 of group default_pg (ranks 0-3), for ranks 1-2" in told
    if hang is call_another:
        assert "rank 1 waits in all_reduce and rank 2 waits in barrier, number 5 of group PAIR" in told
        return
    assert "rank 1 waits in all_reduce, number 5 of group PAIR (ranks 1-2), for rank 2" in told
    assert "rank 2 holds up the others" in told
    assert ("rank 2 does not answer" in told) == (hang in (stop, hold_the_interpreter))
    if hang is stop:
        assert "rank 2 does not answer: its process is stopped" in told
    else:
        assert f" in {hang.__name__}\n" in told


def test_a_job_without_a_hang_leaves_nothing(tmp_path: Path) -> None:
    run_local(rank_of_a_job, (tmp_path, be_late), 4)
    assert not (tmp_path / "hangs" / "one").exists()


def be_late(_: dist.ProcessGroup) -> None:
    """A rank that is late, within the bound."""
    time.sleep(LEAST_S / 2)
