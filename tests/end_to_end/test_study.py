"""A run of a study by the command, killed with it, gone on with, and told."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from tests.end_to_end.command import running

EXAMPLE = Path(__file__).parents[2] / "examples/study"
RUN = "RAPO-seed1"


def test_a_run_ends_with_a_study_that_is_killed_and_goes_on(tmp_path: Path) -> None:
    for file in EXAMPLE.glob("*.toml"):
        shutil.copy(file, tmp_path)
    study = tmp_path / "study.toml"
    study.write_text(
        "options = { run.steps = 12, evaluate.every = 12, checkpoint.every = 1, evaluate.problems = 8 }\n"
        + study.read_text()
    )
    directory = tmp_path / "study/runs" / RUN
    with running("study", str(study), "--only", RUN) as command:
        command.wait_until(lambda: any(directory.glob("checkpoints/step_*/run.json")))
        command.process.send_signal(signal.SIGKILL)
        command.process.wait(10)
        assert not command.left_processes(within=40), "its run saved its step, and ended"
    with running("study", str(study), "--only", RUN) as command:
        assert command.wait() == 0, command.stderr
    log = (tmp_path / "study/logs" / f"{RUN}.log").read_text()
    assert log.count("$ megatron-rapo train") == 2 and "going on after step" in log
    result = json.loads((tmp_path / "study/results" / f"{RUN}.json").read_text())
    assert result["steps"] == list(range(13)), "each step once"
    assert [len(one["correct"]) for one in result["judged"].values()] == [8]
    with running("study", str(study), "--status") as command:
        assert command.wait() == 0
    assert f"{RUN}  done     12/12" in command.stdout and "3 waiting" in command.stdout
