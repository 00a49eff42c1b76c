"""The run that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.command import Command, run, write_config

LAYOUT = {"tensor_parallel": 2, "pipeline_parallel": 2}
EVALUATE = {"problems": 4, "samples": 2, "k": [1, 2], "best": "pass@1"}
PEAK_TFLOPS = 0.5


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Command]:
    """Four steps in one go: the run directory, and the command after its end."""
    base = tmp_path_factory.mktemp("finished")
    observe = {"peak_tflops": PEAK_TFLOPS}
    config = write_config(
        base / "run.toml", base / "run", parallel=LAYOUT, evaluate=EVALUATE, observe=observe
    )
    return base / "run", run(config)
