"""Progress for people, phases, and heartbeats that name the rank that hangs."""

from __future__ import annotations

import io
import json
import os
import re
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_rapo.observe import progress
from megatron_rapo.observe.heartbeat import Heartbeat, describe
from megatron_rapo.observe.observer import Observer
from megatron_rapo.observe.phases import BETWEEN, Phases
from megatron_rapo.observe.progress import Progress
from tests.unit.test_metrics import configuration, lines

RATE = "1,234 tok/s"


class Clock:
    """A clock that tests move, in place of the module's `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run_steps(display: Progress, clock: Clock, rewards: list[float], first: int = 1) -> None:
    for step, reward in enumerate(rewards, start=first):
        display.show_phase(step, "rollout")
        clock.now += 10
        display.finish_step(step, {"reward/mean": reward, "throughput/tokens_per_s": 1234.4})


# Without a terminal


def test_without_a_terminal_each_step_is_one_plain_line(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(total_steps=100, stream=stream) as display:
        run_steps(display, clock, [0.125, 0.375])
    assert stream.getvalue().splitlines() == [
        f"step 1/100 · reward 0.125 (start 0.125, last 1: 0.125) · {RATE} · elapsed 0:00:10 · left 0:16:30",
        f"step 2/100 · reward 0.375 (start 0.125, last 2: 0.250) · {RATE} · elapsed 0:00:20 · left 0:16:20",
    ]


def test_the_moving_mean_forgets_and_the_start_does_not(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(total_steps=100, stream=stream) as display:
        run_steps(display, clock, [0.0] * progress.WINDOW + [1.0] * progress.WINDOW)
    assert "reward 1.000 (start 0.000, last 20: 1.000)" in stream.getvalue().splitlines()[-1]


def test_metrics_that_are_absent_or_not_finite_are_not_shown(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(total_steps=4, stream=stream) as display:
        display.finish_step(0, {})
        display.finish_step(1, {"reward/mean": float("nan"), "throughput/tokens_per_s": float("inf")})
    assert stream.getvalue().splitlines() == [
        "step 0/4 · elapsed 0:00:00 · left 0:00:00",
        "step 1/4 · elapsed 0:00:00 · left 0:00:00",
    ]


def test_a_resumed_run_shows_where_it_stood(clock: Clock) -> None:
    stream = io.StringIO()
    history = [
        {"step": 1, "time_s": 50.0, "reward/mean": 0.125},
        {"step": 2, "time_s": 100.0, "reward/mean": None},
    ]
    with Progress(total_steps=4, history=history, stream=stream) as display:
        run_steps(display, clock, [0.375], first=3)
    assert stream.getvalue() == (
        f"step 3/4 · reward 0.375 (start 0.125, last 2: 0.250) · {RATE} · elapsed 0:01:50 · left 0:00:10\n"
    )


def test_the_time_left_runs_down_within_a_step(clock: Clock) -> None:
    display = Progress(total_steps=4, stream=io.StringIO())
    run_steps(display, clock, [0.5])
    display.show_phase(2, "update")
    clock.now += 4
    assert display.line().startswith("step 2/4 · update 4 s · ")
    assert display.line().endswith("elapsed 0:00:14 · left 0:00:26")
    clock.now += 1000
    assert display.line().endswith("left 0:00:00")


# On a terminal


def read_all(master: int) -> str:
    """What was written to the terminal, though it comes in pieces."""
    written = b""
    while select.select([master], [], [], 0.2)[0]:
        written += os.read(master, 100_000)
    return written.decode()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[io.TextIOBase, int]]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    master, slave = os.openpty()
    stream = os.fdopen(slave, "w")
    yield stream, master
    stream.close()
    os.close(master)


def test_on_a_terminal_one_line_is_kept_current(terminal: tuple[io.TextIOBase, int], clock: Clock) -> None:
    stream, master = terminal
    with Progress(total_steps=100, stream=stream) as display:
        display.show_phase(1, "rollout")
        os.write(stream.fileno(), b"another process's line\n")
        run_steps(display, clock, [0.125])
        written = read_all(master)
        # A run that is killed now leaves the cursor to be seen.
        assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l")
    written += read_all(master)
    assert "step 1/100 · rollout 0 s" in written
    assert "another process's line" in written
    # Nothing moves the cursor up, so nothing that others wrote is erased.
    assert not re.search(r"\x1b\[\d*[AFHJ]", written)
    rows = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", written).replace("\r\n", "\n").split("\n")
    assert all(len(row) <= 80 for line in rows for row in line.split("\r"))
    assert rows[-1] == ""


def test_what_is_printed_meanwhile_stands_on_its_own_line(
    terminal: tuple[io.TextIOBase, int], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, master = terminal
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress(total_steps=100) as display:
        display.show_phase(1, "rollout")
        print("a line")
        run_steps(display, clock, [0.125])
    assert sys.stdout is stream
    plain = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", read_all(master))
    assert any(row.split("\r")[-1] == "a line" for row in plain.replace("\r\n", "\n").split("\n"))


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_go_back_gets_plain_lines(
    terminal: tuple[io.TextIOBase, int], clock: Clock, monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    monkeypatch.setenv("TERM", term)
    stream, master = terminal
    with Progress(total_steps=100, stream=stream) as display:
        run_steps(display, clock, [0.125])
    written = read_all(master)
    assert written.startswith("step 1/100") and "\x1b" not in written


# Phases


def test_phases_are_timed_and_told() -> None:
    told: list[tuple[int, str]] = []
    phases = Phases([lambda step, phase: told.append((step, phase))])
    phases.begin_step(3)
    with phases.phase("evaluate"):
        time.sleep(0.02)
        with phases.phase("rollout"):
            time.sleep(0.03)
    with phases.phase("update"):
        pass
    times = phases.times()
    assert told == [
        (3, BETWEEN),
        (3, "evaluate"),
        (3, "evaluate/rollout"),
        (3, "evaluate"),
        (3, BETWEEN),
        (3, "update"),
        (3, BETWEEN),
    ]
    assert times.keys() == {"time/evaluate_s", "time/evaluate/rollout_s", "time/update_s", "time/step_s"}
    assert times["time/evaluate/rollout_s"] >= 0.03
    assert times["time/evaluate_s"] >= times["time/evaluate/rollout_s"] + 0.02
    assert times["time/step_s"] >= times["time/evaluate_s"] + times["time/update_s"]


def test_a_repeated_phase_is_summed_and_a_new_step_starts_from_zero() -> None:
    phases = Phases([])
    phases.begin_step(1)
    for _ in range(2):
        with phases.phase("rollout"):
            time.sleep(0.02)
    assert phases.times()["time/rollout_s"] >= 0.04
    phases.begin_step(2)
    assert phases.times().keys() == {"time/step_s"}


# Heartbeats


def beat(folder: Path, rank: int, step: int, phase: str, since: float, world_size: int = 4) -> None:
    Heartbeat(folder, rank, world_size).beat(step, phase)
    path = folder / "heartbeat" / f"rank_{rank:05d}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "since": since}))


def test_the_rank_that_is_behind_is_told_first(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        beat(tmp_path, rank, step=12, phase="update", since=900.0 + rank)
    beat(tmp_path, 2, step=12, phase="rollout", since=880.0)
    heading, behind, others = describe(tmp_path, now=1000.0).splitlines()
    assert heading == f"where the ranks are ({tmp_path / 'heartbeat'}):"
    assert re.fullmatch(rf"  rank 2: step 12, rollout, for 120 s \(.+, pid {os.getpid()}\)", behind)
    assert others == "  ranks 0-1, 3: step 12, update, for 97 to 100 s"


def test_ranks_without_a_heartbeat_are_told(tmp_path: Path) -> None:
    beat(tmp_path, 1, step=0, phase="load", since=990.0)
    assert "  ranks 0, 2-3: no heartbeat yet\n" in describe(tmp_path, now=1000.0)


def test_ranks_of_an_earlier_larger_job_are_not_told(tmp_path: Path) -> None:
    beat(tmp_path, 3, step=50, phase="update", since=100.0)
    for rank in range(2):
        beat(tmp_path, rank, step=51, phase="rollout", since=990.0, world_size=2)
    assert describe(tmp_path, now=1000.0).splitlines()[1:] == ["  ranks 0-1: step 51, rollout, for 10 s"]


def test_a_description_never_fails(tmp_path: Path) -> None:
    assert describe(tmp_path) == f"no rank left a heartbeat in {tmp_path / 'heartbeat'}"
    beat(tmp_path, 0, step=1, phase="load", since=0.0, world_size=2)
    (tmp_path / "heartbeat" / "rank_00001.json").write_text("{")
    assert "rank_00001.json: unreadable (" in describe(tmp_path)


# One rank's observer


def test_an_observer_logs_metrics_with_phase_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Observer(configuration(tmp_path), rank=0, world_size=1) as observer:
        with observer.phase("load"):
            observer.open_logs(resume_step=None)
        for step in (1, 2):
            observer.begin_step(step)
            with observer.phase("rollout"):
                assert f"step {step}, rollout, for 0 s" in describe(tmp_path)
            observer.finish_step({"reward/mean": 0.5})
    first, second = lines(tmp_path)
    assert first.keys() == second.keys()
    assert second.keys() >= {"reward/mean", "time/rollout_s", "time/step_s"}
    assert [line.split(" · ")[0] for line in capsys.readouterr().out.splitlines()] == [
        "step 1/10",
        "step 2/10",
    ]


def test_other_ranks_write_only_their_heartbeat_and_timeline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Observer(configuration(tmp_path), rank=1, world_size=2) as observer:
        observer.open_logs(resume_step=None)
        observer.begin_step(1)
        with observer.phase("update"):
            pass
        observer.finish_step({"reward/mean": 0.5})
    written = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(written) == ["heartbeat/rank_00001.json", "timeline/rank_00001.jsonl"]
    assert capsys.readouterr().out == ""


def test_the_heartbeat_keeps_the_phase_that_failed(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Observer(configuration(tmp_path), rank=0, world_size=1) as observer:
        observer.begin_step(7)
        with observer.phase("evaluate"), observer.phase("rollout"):
            raise KeyError
    assert "rank 0: step 7, evaluate/rollout, for 0 s" in describe(tmp_path)
