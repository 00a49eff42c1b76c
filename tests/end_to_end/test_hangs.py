"""A rank that hangs in the middle of training is named, and the run goes on by itself as if it had not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tests.end_to_end.command import metrics, run, without_times, write_config

METHOD = '''
import os
import time
from pathlib import Path

from megatron_rapo.methods.grpo import GRPO


class Hanging(GRPO):
    """GRPO, whose second rank hangs the first time that it comes to its third step."""

    def advantages(self, groups):
        if os.environ["RANK"] == "1":
            steps = Path(__file__).with_name("steps")
            with steps.open("a") as file:
                file.write("x")
            if len(steps.read_text()) == 3:
                hang_for_ever()
        return super().advantages(groups)


def hang_for_ever():
    time.sleep(1000)
'''


def test_a_run_that_hangs_goes_on_by_itself(tmp_path: Path) -> None:
    def directory(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "hanging.py").write_text(METHOD)
        changes = {"algorithm": {"method": "hanging:Hanging"}, **changes}
        return write_config(folder / "run.toml", folder / "run", **changes)

    layout = {"parallel": {"pipeline_parallel": 2, "timeout_s": 60.0}}
    config = directory("hung", run={"steps": 3, "relaunches": 1}, observe={"hang_least_s": 4.0}, **layout)
    hung = run(config)
    assert hung.process.returncode == 0, hung.stderr
    assert re.search(r"no progress: rank \d has been in annotate of step 3 for \d+ s", hung.stdout)
    assert re.search(r"rank 0 waits in \w+, number \d+ of group \w+ \(ranks 0-1\), for rank 1", hung.stdout)
    assert re.search(r"the stack of rank 1 .*\n  File .* in hang_for_ever\n", hung.stdout)
    assert "started again, 1 of 1 times" in hung.stdout
    assert hung.left_processes() == []

    whole = directory("whole", run={"steps": 3}, **layout)
    (whole.parent / "steps").write_text("xxx")
    assert run(whole).process.returncode == 0
    for name in ("hung", "whole"):
        lines = [without_times(line) for line in metrics(tmp_path / name / "run")]
        assert len(lines) == 4
    assert lines == [without_times(line) for line in metrics(tmp_path / "hung/run")]
    for written in (tmp_path / "whole/run/model").iterdir():
        assert (tmp_path / "hung/run/model" / written.name).read_bytes() == written.read_bytes(), written.name
