"""Local launch: ranks' environment, and that one failure ends all ranks, once, with its reason."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_rapo.errors import RapoError
from megatron_rapo.launch import local
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.failure import Failure, Kind, WorkerFailed, root_cause
from megatron_rapo.launch.local import run_local
from megatron_rapo.observe.heartbeat import describe
from tests.unit import launched

TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Whatever a test starts is gone after it; multiprocessing's own tracker stays, as it should."""
    before = set(psutil.Process().children(recursive=True))
    yield
    left = [
        process
        for process in set(psutil.Process().children(recursive=True)) - before
        if "resource_tracker" not in " ".join(process.cmdline())
    ]
    for process in left:
        process.kill()
    assert not left


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers that only sleep have nothing to tell or to close: they need no long wait."""
    monkeypatch.setattr(local, "SETTLE_S", 0.2)
    monkeypatch.setattr(local, "GRACE_S", 2.0)


# The environment


def test_the_environment_of_torchrun_is_read() -> None:
    place = RankEnvironment.read(TORCHRUN)
    assert place == RankEnvironment(5, 1, 8, 4, "node0", 29500)
    assert place.variables() == TORCHRUN


def test_without_a_launcher_there_is_no_place() -> None:
    assert RankEnvironment.read({"MASTER_ADDR": "node0"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": ""}, "lacks MASTER_ADDR; start with torchrun"),
        ({"RANK": "x"}, "RANK='x' is no number"),
        ({"RANK": "-1"}, "RANK='-1' is no number"),
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 is not below LOCAL_WORLD_SIZE=4"),
    ],
)
def test_a_broken_environment_is_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(RapoError, match=message):
        RankEnvironment.read({**TORCHRUN, **change})


def test_another_world_size_than_the_layout_is_refused() -> None:
    place = RankEnvironment.read(TORCHRUN)
    assert place is not None
    place.check_world_size(8)
    with pytest.raises(RapoError, match=r"WORLD_SIZE=8 ranks were started, but \[parallel\] lays out 4"):
        place.check_world_size(4)


# Success


def test_ranks_meet_and_the_parents_environment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = dict(os.environ)
    run_local(launched.all_reduce_ranks, (tmp_path,), world_size=2)
    assert dict(os.environ) == before
    for index in range(2):
        total, place, *threads = (tmp_path / str(index)).read_text().splitlines()
        assert total == "3"
        assert place.startswith(f"RankEnvironment(rank={index}, local_rank={index}, world_size=2, ")
        assert "local_world_size=2, master_address='127.0.0.1'" in place
        assert threads == ["1", "1"]


def test_ranks_that_end_before_others_begin_have_ended_well() -> None:
    run_local(launched.rank, (), world_size=8)


def test_threads_that_the_user_set_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    run_local(launched.write_threads, (tmp_path,), world_size=1)
    assert (tmp_path / "threads").read_text() == "3"


def who_imported(folder: Path, *imports: str) -> list[dict[str, Any]]:
    """Of two ranks: the process that imported their function, their own, and threads of what forked them."""
    run_local(launched.tell_who_imported, (folder,), world_size=2, imports=imports)
    return [json.loads((folder / f"imported_{rank}").read_text()) for rank in range(2)]


def test_ranks_share_what_one_process_imported_before_it_had_a_thread(tmp_path: Path) -> None:
    """A fork has no threads, but the locks that they held; jemalloc, which is in pyarrow, frees its own."""
    first, second = who_imported(tmp_path, "megatron_rapo.loop")
    assert first["importer"] == second["importer"]
    assert len({first["importer"], first["own"], second["own"], os.getpid()}) == 4
    assert set(first["threads"]) <= {"jemalloc_bg_thd"}


def test_where_there_is_cuda_each_rank_imports_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver does not survive a fork, and an import may call it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for found in who_imported(tmp_path, "megatron_rapo.loop"):
        assert found["importer"] == found["own"]


def test_an_import_that_fails_is_left_to_the_ranks(tmp_path: Path) -> None:
    assert len(who_imported(tmp_path, "megatron_rapo.nowhere")) == 2


def test_what_a_rank_leaves_running_is_ended(tmp_path: Path) -> None:
    run_local(launched.leave_a_child, (tmp_path,), world_size=1)
    assert gone(int((tmp_path / "child").read_text()))


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether the process ends (or is only waiting to be reaped) in time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


# Failure


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("user", r"^model\.path = 'x' holds no model; give one$"),
        ("bug", r"(?s)^rank 1 failed:\nTraceback.*KeyError: 'surprise'\nthe ranks are here$"),
        ("status", "^rank 1 exited with status 7; "),
        ("SIGKILL", "^rank 1 was killed by SIGKILL: usually out of memory"),
        ("SIGSEGV", "^rank 1 was killed by SIGSEGV: a crash in native code"),
        ("SIGTERM", "^rank 1 was killed by SIGTERM: someone or the scheduler"),
    ],
)
def test_one_failure_ends_all_and_is_told_once(how: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match=message) as caught:
        run_local(launched.fail, (how, 1), world_size=2, diagnose=lambda: "the ranks are here")
    assert time.monotonic() - started < 60
    assert caught.value.failure.rank == 1


def test_the_reason_is_told_and_not_the_broken_collective_of_a_peer() -> None:
    with pytest.raises(WorkerFailed, match=r"^the reason$"):
        run_local(launched.fail_behind_a_collective, (), world_size=2)


@pytest.mark.usefixtures("impatient")
def test_the_rank_that_hung_is_named(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match=r"rank 0 failed") as caught:
        run_local(
            launched.wait_for_a_rank_that_hangs,
            (tmp_path,),
            world_size=2,
            diagnose=lambda: describe(tmp_path),
        )
    assert caught.value.failure.kind is Kind.COLLECTIVE
    assert re.search(r"rank 1: step 3, rollout, for \d+ s", str(caught.value))


def test_a_failure_is_seen_although_the_process_cannot_exit() -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"^the reason$"):
        run_local(launched.fail_with_a_thread_that_never_ends, (), world_size=1)
    assert time.monotonic() - started < 60


@pytest.mark.usefixtures("impatient")
def test_ranks_and_what_they_started_end_with_what_forked_them(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="was killed by SIGKILL"):
        run_local(launched.kill_what_forked, (tmp_path,), world_size=2)
    assert gone(int((tmp_path / "child").read_text()))


@pytest.mark.usefixtures("impatient")
def test_ranks_that_are_ended_may_close_what_they_opened(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed):
        run_local(launched.fail_while_a_peer_cleans_up, (tmp_path,), world_size=2)
    assert (tmp_path / "closed").exists()


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_does_not_end_is_killed(tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match="the reason"):
        run_local(launched.ignore_the_end, (tmp_path,), world_size=2)
    assert time.monotonic() - started < 60


def failure(rank: int, kind: Kind, time_s: float) -> Failure:
    return Failure(rank, kind, time_s, "")


def test_the_kind_of_a_failure_counts_before_its_time() -> None:
    late_user = failure(3, Kind.USER, 9.0)
    killed = failure(2, Kind.KILLED, 8.0)
    bug, later_bug = failure(1, Kind.ERROR, 6.0), failure(0, Kind.ERROR, 7.0)
    aborted, broken = failure(4, Kind.ABORTED, 1.0), failure(5, Kind.COLLECTIVE, 2.0)
    likeliest_first = [late_user, killed, bug, later_bug, broken, aborted]
    for index, expected in enumerate(likeliest_first):
        assert root_cause(likeliest_first[index:][::-1]) == expected


# The parent's end


PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.unit import launched
from megatron_rapo.launch.local import run_local
if __name__ == "__main__":
    run_local(launched.wait_for_ever, (Path({folder!r}),), world_size=2)
"""


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_ranks_end_with_their_parent(tmp_path: Path, number: signal.Signals, status: int) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path)))
    # A killed parent cannot remove its folder of reports; here that goes with the test's.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL, env=environment)
    try:
        files = [tmp_path / f"pid_{index}" for index in range(2)]
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline
            assert parent.poll() is None
            time.sleep(0.05)
        pids = [int(file.read_text()) for file in files]
        parent.send_signal(number)
        assert parent.wait(timeout=30) == status
        assert all(gone(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait(timeout=15)


def test_a_stop_before_the_ranks_are_forked_ends_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
    )
    script = PARENT.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    (tmp_path / "parent.py").write_text(
        script.replace("world_size=2", "world_size=2, defers_stops=True, imports=['slow']")
    )
    with subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stderr=subprocess.DEVNULL) as parent:
        try:
            launched.wait_for(tmp_path / "importing")
            parent.send_signal(signal.SIGTERM)
            assert parent.wait(timeout=10) == 143
        finally:
            parent.kill()
    assert not list(tmp_path.glob("pid_*"))


# Stop requests


DEFERRING = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tests.unit import launched
from megatron_rapo.launch.local import run_local
if __name__ == "__main__":
    run_local(launched.{function}, (Path({folder!r}), *{more!r}), world_size=2, defers_stops=True)
"""


@contextlib.contextmanager
def deferring(folder: Path, function: str, *more: object) -> Iterator[subprocess.Popen[str]]:
    """A launcher whose two ranks defer stops, once they do."""
    script, tests = folder / "parent.py", str(Path(__file__).parents[2])
    script.write_text(DEFERRING.format(tests=tests, function=function, folder=str(folder), more=more))
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        try:
            for index in range(2):
                launched.wait_for(folder / f"ready_{index}")
            yield parent
        finally:
            parent.kill()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGUSR1])
def test_a_stop_that_is_deferred_lets_ranks_save(tmp_path: Path, sent: signal.Signals) -> None:
    """SIGUSR1 has no grace that ends; the other's is long enough here."""
    grace_s = 0.0 if sent == signal.SIGUSR1 else 60.0
    with deferring(tmp_path, "defer_a_stop", grace_s) as parent:
        parent.send_signal(sent)
        time.sleep(0.5)
        assert parent.poll() is None
        (tmp_path / "ends").touch()
        assert parent.wait(30) == (-signal.SIGINT if sent == signal.SIGINT else 128 + sent)
    for index in range(2):
        assert (tmp_path / f"saved_{index}").read_text() == str(sent.value)


def test_a_second_signal_ends_ranks_that_defer_the_first(tmp_path: Path) -> None:
    with deferring(tmp_path, "defer_a_stop", 600.0) as parent:
        parent.send_signal(signal.SIGTERM)
        time.sleep(1.2)
        began = time.monotonic()
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(30) == 143
        assert time.monotonic() - began < 15
    assert not list(tmp_path.glob("saved_*"))


def test_what_fails_while_a_stop_is_heeded_is_told(tmp_path: Path) -> None:
    with deferring(tmp_path, "defer_a_stop_and_fail") as parent:
        parent.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        (tmp_path / "ends").touch()
        _, stderr = parent.communicate(timeout=30)
    assert parent.returncode == 1
    assert "the disk is full" in stderr


STOPPED = """
import time
from megatron_rapo.launch import stop
stop.CLOSING_S = 0.5
stop.requests.last_words = lambda reason: print("lost:", reason, flush=True)
class Swallows:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(60)
{body}
"""

SWALLOWED = """
with stop.requests.noted():
    swallows = Swallows()
    del swallows
    {goes_on}
"""

GRACE = """
with stop.requests.noted(), stop.requests.deferring({grace_s}):
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("closing", flush=True)
        {closing}
"""


def stopped(body: str, *signals: int, apart_s: float = 0.0) -> tuple[int, str]:
    """Exit status and output of a process that is sent signals once it is ready."""
    command = [sys.executable, "-c", STOPPED.format(body=body)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            time.sleep(0.2)  # it is asleep, then, and not about to be
            for number in signals:
                process.send_signal(number)
                time.sleep(apart_s)
            return process.wait(20), process.stdout.read()
        finally:
            process.kill()


def test_a_stop_that_python_swallows_ends_the_process_all_the_same() -> None:
    body = SWALLOWED.format(goes_on='print("goes on", flush=True); time.sleep(60)')
    assert stopped(body, signal.SIGTERM) == (143, "lost: a stop was asked for\ngoes on\n")


def test_a_stop_that_was_swallowed_is_heeded_where_stops_are_deferred() -> None:
    body = SWALLOWED.format(goes_on='stop.requests.deferring(60).__enter__(); print("not reached")')
    assert stopped(body, signal.SIGINT) == (130, "lost: a stop was asked for\n")


def test_the_end_of_the_grace_ends_the_process_through_its_finally_blocks() -> None:
    status, output = stopped(GRACE.format(grace_s=0.3, closing='print("closed")'), signal.SIGTERM)
    assert status == 143
    assert output == "lost: its step did not end within 0.3 s (checkpoint.stop_grace_s)\nclosing\nclosed\n"


def test_a_process_that_does_not_come_to_its_end_is_ended() -> None:
    status, output = stopped(GRACE.format(grace_s=0.3, closing="time.sleep(60)"), signal.SIGTERM)
    assert (status, output.count("closing")) == (143, 1)


def test_two_signals_at_once_are_one_request() -> None:
    """Schedulers signal a process and its launcher, which hands the signal on."""
    patient = "stop.ONE_REQUEST_S = 10.0"  # a busy machine may take a second to look at both
    body = patient + GRACE.format(grace_s=2.0, closing="pass")
    status, output = stopped(body, signal.SIGTERM, signal.SIGINT)
    assert status in (143, 130)  # signals that are pending together come in the order of their numbers
    assert "within 2 s" in output


def test_a_second_request_is_told_as_such() -> None:
    body = GRACE.format(grace_s=60.0, closing="pass")
    # Where a busy machine is slow to note the first, the second counts as one with it; the third does not.
    status, output = stopped(body, *[signal.SIGINT] * 3, apart_s=1.2)
    assert status == 130
    assert "lost: it was asked again" in output
