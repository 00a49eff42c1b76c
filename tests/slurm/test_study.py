"""`megatron-rapo study --slurm` on a real SLURM: an array whose tasks make the runs, and their answer."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.command import COMMAND, MARK
from tests.slurm.cluster import Cluster, missing_programs

pytestmark = [
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"{', '.join(missing_programs())} not on this machine: make test-slurm installs them",
    ),
    pytest.mark.timeout(300),
]

EXAMPLE = Path(__file__).parents[2] / "examples/study/base.toml"
# A sample of a model as it is, twice: the runs that take the shortest.
STUDY = """\
question = "Are two samples of one model alike?"
outcome = "pass@1"
seeds = [1, 2]
configs = ["base.toml"]
arms = [{ name = "one", train = false }, { name = "other", train = false, seed_offset = 10 }]
contrasts = [{ arm = "one", against = "other" }]
evaluation = { problems = 4, samples = 2, k = [1] }
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=1) as running:
        running.environment |= {MARK: "slurm-study", "OMP_NUM_THREADS": "1"}
        yield running


def test_an_array_makes_the_runs_and_the_same_command_then_has_nothing_to_submit(
    cluster: Cluster, tmp_path: Path
) -> None:
    shutil.copy(EXAMPLE, tmp_path)
    study = tmp_path / "study.toml"
    study.write_text(STUDY)
    assert "Submitted batch job" in told(cluster, study, "--slurm", "--cores", "2")
    results = tmp_path / "study/results"
    cluster.wait_until(lambda: len(list(results.glob("*.json"))) == 4, 200, "all runs have results")
    cluster.wait_until(lambda: not cluster.command("squeue", "--noheader").strip(), 30, "tasks have ended")
    assert "one − other in pass@1: " in told(cluster, study, "--report")
    assert "Submitted" not in told(cluster, study, "--slurm", "--cores", "2")
    logs = "".join(file.read_text() for file in (tmp_path / "study/slurm").glob("task-*.log"))
    assert "Traceback" not in logs


def told(cluster: Cluster, study: Path, *options: str) -> str:
    """What the command says, in the repository's root, where the example's model is."""
    done = subprocess.run(
        [str(COMMAND), "study", str(study), *options],
        env=cluster.environment,
        cwd=EXAMPLE.parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
