"""When ranks and engines did what: the record, the trace, and engines' idle time by cause."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_rapo.cli import main
from megatron_rapo.errors import RapoError
from megatron_rapo.observe.phases import Phases
from megatron_rapo.timeline import record
from megatron_rapo.timeline.idle import idle_by_cause, told
from megatron_rapo.timeline.record import Asked, Entered, Timeline, read
from megatron_rapo.timeline.trace import chrome_trace, load

# Steps of 10 s: 4 s of rollout, 5 s of update, 1 s between. The engine works for 3 s of each rollout.
ENTERED = [
    Entered(10.0 * step + at, step, phase)
    for step in (1, 2)
    for at, phase in ((0.0, "between phases"), (1.0, "rollout"), (5.0, "update"))
]
ASKED = [Asked(11.5, 13.0, "http://a", 8), Asked(12.0, 14.5, "http://a", 4), Asked(22.0, 25.0, "http://a", 8)]


def written(run: Path) -> Path:
    (run / record.FOLDER).mkdir(parents=True)
    lines = [[one.at, one.step, one.phase] for one in [*ENTERED, Entered(30.0, 3, "between phases")]]
    more = [[one.begun, one.ended, one.engine, one.responses] for one in ASKED]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, *more])
    (run / record.FOLDER / "rank_00000.jsonl").write_text(text + '[31.0, 3, "rol')
    shifted = "".join(json.dumps([at + 0.5, step, phase]) + "\n" for at, step, phase in lines)
    (run / record.FOLDER / "rank_00001.jsonl").write_text(shifted)
    return run


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    clock = iter(range(100))
    timeline = Timeline(tmp_path, 3, lambda: float(next(clock)))
    phases = Phases([timeline.enter])
    phases.begin_step(7)
    with phases.phase("evaluate"), phases.phase("rollout"):
        timeline.request("http://a", 0.25, 0.5, 4)
    timeline.flush()
    [(rank, entries)] = read(tmp_path)
    assert rank == 3
    names = ["between phases", "evaluate", "evaluate/rollout", "evaluate", "between phases"]
    assert [one for one in entries if isinstance(one, Entered)] == [
        Entered(float(at), 7, name) for at, name in enumerate(names)
    ]
    assert [one for one in entries if isinstance(one, Asked)] == [Asked(0.25, 0.5, "http://a", 4)]
    timeline = Timeline(tmp_path, 3)  # the run goes on
    timeline.enter(8, "rollout")
    timeline.flush()
    assert len(next(read(tmp_path))[1]) == 7


def test_long_phases_do_not_hold_the_record_in_memory(tmp_path: Path) -> None:
    timeline = Timeline(tmp_path, 0)
    for number in range(1000):
        timeline.enter(number, "rollout")
    assert len(next(read(tmp_path))[1]) > 700


def test_a_trace_has_every_stay_and_request(tmp_path: Path) -> None:
    trace = chrome_trace(load(written(tmp_path)))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    of_rank = [event for event in events if (event["pid"], event["tid"]) == (1, 0)]
    assert [(event["name"], event["ts"], event["dur"]) for event in of_rank] == [
        (name, (10 * step + at) * 1_000_000, seconds * 1_000_000)
        for step in (0, 1)
        for name, at, seconds in (("between phases", 0, 1), ("rollout", 1, 4), ("update", 5, 5))
    ]
    assert [event["args"] for event in of_rank] == [{"step": 1}] * 3 + [{"step": 2}] * 3
    requests = [event for event in events if event["pid"] == 2]
    assert [(event["tid"], event["ts"], event["dur"]) for event in requests] == [
        (0, 1_500_000, 1_500_000),
        (1, 2_000_000, 2_500_000),  # beside the first
        (0, 12_000_000, 3_000_000),
    ]
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"}
    assert names == {"trainer", "engines", "rank 0", "rank 1", "http://a (0)", "http://a (1)"}


def test_a_killed_run_did_nothing_until_it_was_started_again(tmp_path: Path) -> None:
    """It was in an update of step 2 when it was killed; a day later it goes on after step 1."""
    (tmp_path / record.FOLDER).mkdir()
    entered = [[10.0, 1, "update"], [20.0, 2, "update"], [86400.0, 0, "load"], [86405.0, 2, "update"]]
    lines = "".join(json.dumps(one) + "\n" for one in [*entered, [86409.0, 2, "publish"]])
    (tmp_path / record.FOLDER / "rank_00000.jsonl").write_text(lines)
    [stays] = load(tmp_path).stays.values()
    found = [(one.step, one.phase, one.ended - one.begun) for one in stays]
    assert found == [(1, "update", 10.0), (0, "load", 5.0), (2, "update", 4.0)]


def test_idle_time_is_told_by_what_the_trainer_did(tmp_path: Path) -> None:
    run = load(written(tmp_path))
    [seconds] = idle_by_cause(run).values()
    assert dict(seconds) == {"busy": 6.0, "rollout": 2.0, "update": 10.0, "between phases": 2.0}
    assert told(run) == [
        "http://a: busy 30%; idle while the trainer was in: update 50%, between phases 10%, rollout 10%"
    ]
    [seconds] = idle_by_cause(load(tmp_path, (2, 2))).values()
    assert dict(seconds) == {"busy": 3.0, "rollout": 1.0, "update": 5.0, "between phases": 1.0}


def test_the_command_writes_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path)
    assert main(["trace", str(tmp_path), "--steps", "1", "--output", str(tmp_path / "one.json")]) == 0
    steps = {
        event["args"]["step"]
        for event in json.loads((tmp_path / "one.json").read_text())["traceEvents"]
        if event["ph"] == "X" and event["pid"] == 1
    }
    assert steps == {1}
    assert "http://a: busy 30%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "5-7"], "has no timeline of steps 5 to 7; name the directory"),
        (["--steps", "7-5"], '--steps 7-5 names no steps; write them like "3-8"'),
        (["--steps", "x"], "--steps x names no steps"),
        (["--output", "nowhere/t.json"], "nowhere"),
    ],
)
def test_what_cannot_be_traced_is_told(
    tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(written(tmp_path)), *options]) == 1
    assert said in capsys.readouterr().err


def test_a_folder_without_a_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(RapoError, match="has no timeline; name the directory of a run"):
        load(tmp_path)
