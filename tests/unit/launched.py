"""What test_launch runs in ranks. It imports little, since each rank imports it anew."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.stop import AT_ONCE, requests

IMPORTED_BY = os.getpid()


def rank() -> int:
    return int(os.environ["RANK"])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.05)


def all_reduce_ranks(folder: Path) -> None:
    import torch
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    total = torch.tensor([rank() + 1])
    torch.distributed.all_reduce(total)
    place = RankEnvironment.read()
    lines = [str(total.item()), str(place), os.environ["OMP_NUM_THREADS"], str(torch.get_num_threads())]
    (folder / str(rank())).write_text("\n".join(lines))
    torch.distributed.destroy_process_group()


def tell_who_imported(folder: Path) -> None:
    tasks = sorted(Path(f"/proc/{os.getppid()}/task").iterdir(), key=lambda task: int(task.name))
    threads = [(task / "comm").read_text().strip() for task in tasks[1:]]  # beside the main one
    found = {"importer": IMPORTED_BY, "own": os.getpid(), "threads": threads}
    (folder / f"imported_{rank()}").write_text(json.dumps(found))


def kill_what_forked(folder: Path) -> None:
    if rank() == 0:
        leave_a_child(folder)
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(120)


def write_threads(folder: Path) -> None:
    (folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])


def leave_a_child(folder: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"])
    (folder / "child").write_text(str(child.pid))


def fail(how: str, failing: int) -> None:
    """The rank `failing` fails; its peers wait for it, in a collective or asleep."""
    if rank() == failing:
        if how == "user":
            raise RapoError("model.path = 'x' holds no model; give one")
        if how == "bug":
            raise KeyError("surprise")
        if how == "status":
            os._exit(7)
        os.kill(os.getpid(), getattr(signal, how))
    time.sleep(120)


def wait_for_a_rank_that_hangs(folder: Path) -> None:
    """Rank 1 stays in its rollout; rank 0 waits for it in a collective until that times out."""
    from megatron_rapo.observe.heartbeat import Heartbeat

    heartbeat = Heartbeat(folder, rank(), world_size=2)
    if rank() == 1:
        heartbeat.beat(3, "rollout")
        (folder / "hangs").touch()
        time.sleep(120)
    heartbeat.beat(3, "update")
    wait_for(folder / "hangs")
    raise RuntimeError("[gloo] Timed out waiting 1800000ms for recv operation to complete")


def fail_behind_a_collective() -> None:
    """Rank 1 leaves the group first and tells its reason last, as happens where it closes much in between."""
    import torch
    import torch.distributed

    torch.distributed.init_process_group("gloo")
    torch.distributed.barrier()
    if rank() == 1:
        try:
            raise RapoError("the reason")
        finally:
            torch.distributed.destroy_process_group()
            time.sleep(1)
    torch.distributed.all_reduce(torch.ones(1))


def fail_with_a_thread_that_never_ends() -> None:
    threading.Thread(target=time.sleep, args=(120,)).start()
    raise RapoError("the reason")


def fail_while_a_peer_cleans_up(folder: Path) -> None:
    if rank() == 1:
        wait_for(folder / "open")
        raise RapoError("the reason")
    try:
        (folder / "open").touch()
        time.sleep(120)
    finally:
        (folder / "closed").touch()


def ignore_the_end(folder: Path) -> None:
    signal.signal(AT_ONCE, signal.SIG_IGN)
    if rank() == 1:
        wait_for(folder / "ignores")
        raise RapoError("the reason")
    (folder / "ignores").touch()
    time.sleep(120)


def wait_for_ever(folder: Path) -> None:
    partial = folder / f"partial_{rank()}"
    partial.write_text(str(os.getpid()))
    partial.replace(folder / f"pid_{rank()}")
    time.sleep(120)


def defer_a_stop(folder: Path, grace_s: float) -> None:
    """Heeds the request after a while, as at a step's end."""
    with requests.deferring(grace_s):
        (folder / f"ready_{rank()}").touch()
        wait_for(folder / "ends")
        requests.heed()
    (folder / f"saved_{rank()}").write_text(str(int(requests.number)))
    sys.exit(128 + requests.number)


def defer_a_stop_and_fail(folder: Path) -> None:
    """What fails while a stop is heeded is told."""
    with requests.deferring(60.0):
        (folder / f"ready_{rank()}").touch()
        wait_for(folder / "ends")
        raise RapoError("the disk is full")
