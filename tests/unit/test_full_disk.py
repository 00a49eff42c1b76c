"""Where a run's disk takes no more: each kind of write ends in one error, with file and remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_rapo.config import RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.store import Problem as EvaluatedProblem
from megatron_rapo.evaluation.store import SampleStore
from megatron_rapo.folder import write_whole, writing_to
from megatron_rapo.observe.heartbeat import Heartbeat
from megatron_rapo.observe.loggers import TensorBoard
from megatron_rapo.observe.metrics import MetricsLog
from megatron_rapo.observe.step_lines import StepLines, read_step_lines
from megatron_rapo.record.identity import Identity
from megatron_rapo.record.start import begin
from megatron_rapo.samples.store import Recorded, steps_of, write_part
from tests.episodes import scored_response
from tests.unit.full_disk import no_file_beyond
from tests.unit.test_evaluation_store import sample

STEPS = 50


def config(directory: Path) -> RunConfig:
    return validate(
        {
            "run": {"directory": str(directory), "steps": STEPS},
            "model": {"path": "models/tiny"},
            "data": {"source": "countdown"},
            "rollout": {"prompts_per_step": 8, "max_response_tokens": 64},
        },
        source="test",
    )


def heartbeats(directory: Path) -> Callable[[int], None]:
    beats = Heartbeat(directory, 0, 1)
    return lambda step: beats.beat(step, "p" * (20 * step))


def metrics(directory: Path) -> Callable[[int], None]:
    lines = StepLines(directory / "metrics.jsonl", None)
    return lambda step: lines.write(step, {"reward/mean": 0.5})


def tensorboard(directory: Path) -> Callable[[int], None]:
    events = TensorBoard(config(directory), None)
    return lambda step: events.write(step, {"reward/mean": 0.5})


def samples(directory: Path) -> Callable[[int], None]:
    # Numbers that do not compress.
    rows = [
        Recorded(
            0, n, 1.0, Problem("p", "q", "a", ""), scored_response(Outcome.WRONG, [n * 7919 % 1009]), True
        )
        for n in range(STEPS * 20)
    ]
    return lambda step: write_part(directory, step, 0, rows[: step * 20])


def evaluations(directory: Path) -> Callable[[int], None]:
    store = SampleStore(directory / "evaluations", [EvaluatedProblem("a", "?", "1", (1,))])
    return lambda step: store.write([sample("a", number * 7919 % 1009) for number in range(step * 20)])


@pytest.mark.parametrize(
    ("writer", "file"),
    [
        (heartbeats, "heartbeat/rank_00000"),
        (metrics, r"metrics\.jsonl"),
        (tensorboard, r"tensorboard/events\.out\.tfevents"),
        (samples, "samples/step_0000"),
        (evaluations, "evaluations/part-000-0000"),
    ],
)
def test_a_full_disk_is_told_once_with_the_file_and_the_remedy(
    writer: Callable[[Path], Any], file: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write = writer(tmp_path)
    done = []
    remedy = r"(make room there or mend it and run the same command again|free space, then run the same)"
    with (
        no_file_beyond(9000 if writer in (samples, evaluations) else 1000),
        pytest.raises(RapoError, match=rf"{re.escape(str(tmp_path))}.*{file}.*{remedy}") as refused,
        writing_to(tmp_path, "run.directory"),
    ):
        for step in range(1, STEPS + 1):
            write(step)
            done.append(step)
    assert done, "nothing could be written at all"
    assert "\n" not in str(refused.value) and "File too large" in str(refused.value)
    assert capfd.readouterr() == ("", "")


def test_what_was_written_before_is_whole(tmp_path: Path) -> None:
    with MetricsLog(config(tmp_path)) as log, no_file_beyond(1500), pytest.raises(OSError, match="too large"):
        for step in range(STEPS):
            log.write(step, {"reward/mean": 0.5})
            written = step
    assert 0 < written < STEPS - 1
    lines = read_step_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines][: written + 1] == list(range(written + 1))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward/mean")][: written + 1] == list(range(written + 1))

    write = samples(tmp_path)
    with no_file_beyond(9000), pytest.raises(OSError, match="too large"):
        for step in range(1, STEPS):
            write(step)
    assert 0 < len(steps_of(tmp_path)) < STEPS - 1
    assert list((tmp_path / "samples").glob("*.partial")) == []


def test_what_stood_in_a_file_that_is_written_anew_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "note", "text")
    with no_file_beyond(2), pytest.raises(OSError, match=r"too large: .*/note'"):
        write_whole(tmp_path / "note", "another")
    assert (tmp_path / "note").read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["note"]


def test_the_configuration_that_stood_there_stays(tmp_path: Path) -> None:
    """It tells the run's day, without which the run does not go on."""
    begin(config(tmp_path), Identity({}, {}, []), {}, None)
    before = (tmp_path / "config.toml").read_text()
    with no_file_beyond(len(before) // 2), pytest.raises(OSError, match=r"too large: .*config\.toml"):
        begin(config(tmp_path), Identity({}, {}, []), {}, 3)
    assert (tmp_path / "config.toml").read_text() == before


def test_all_logs_are_closed_where_one_fails_at_its_end(tmp_path: Path) -> None:
    log, closed = MetricsLog(config(tmp_path)), []

    class Full:
        def write(self, step: int, metrics: Any) -> None: ...

        def close(self, failed: bool) -> None:
            closed.append(failed)
            raise OSError("full")

    log._loggers = [Full(), *log._loggers, Full()]
    with pytest.raises(OSError, match="full"):
        log.close(failed=True)
    assert closed == [True, True]
    assert log._lines._file.closed
