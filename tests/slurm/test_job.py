"""The job of `megatron-rapo train --slurm` on a real SLURM: nodes of this machine, a tiny model, CPUs."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.command import COMMAND, MARK, checkpoints, metrics, run, without_times, write_config
from tests.end_to_end.wide_heads import with_wide_heads
from tests.engines.servers import VLLM_CPU, VLLM_ON_CPU, VLLM_PYTHON, why_not
from tests.ports import free_ports
from tests.slurm.cluster import Cluster, missing_programs

pytestmark = [
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"{', '.join(missing_programs())} not on this machine: make test-slurm installs them",
    ),
    pytest.mark.timeout(500),
]

ENGINE = {"engine": "embedded", "gpus_per_node": 0}
BETWEEN = {"tensor_parallel": 2, "pipeline_parallel": 2}  # two stages, each on a node of its own
STEPS = 5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), nodes=4) as running:
        running.environment |= {MARK: "slurm", "TORCHDYNAMO_DISABLE": "1"}
        yield running


@pytest.fixture(scope="module")
def long_job(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """A job on n4 alone, ranks and engine, which meets its time limit while others run elsewhere.

    SLURM tells a job of its end up to a minute too early: of three minutes it has 75 to 135 seconds.
    """
    base = tmp_path_factory.mktemp("long")
    engine_port, master_port = free_ports(2)
    slurm = {
        **ENGINE,
        "trainer_nodes": 1,
        "ranks_per_node": 2,
        "engine_nodes": 0,
        "engine_ports": [engine_port],
        "master_port": master_port,
        "time_limit": "3",
        "requeue_before_s": 45,
        "sbatch_arguments": ["--nodelist=n4"],
    }
    config = write_config(
        base / "long.toml",
        base / "run",
        run={"steps": 100_000},
        parallel={"data_parallel": 2},
        checkpoint={"keep": 2},
        slurm=slurm,
    )
    return number(submit(cluster, config)), base / "run"


def submit(cluster: Cluster, config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(COMMAND), "train", str(config), "--slurm", *arguments],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def number(submitted: subprocess.CompletedProcess[str]) -> int:
    found = re.search(r"Submitted batch job (\d+)", submitted.stdout)
    assert found, submitted.stdout + submitted.stderr
    return int(found[1])


def wait(cluster: Cluster, job: int, condition: Callable[[], bool], timeout: float, what: str) -> None:
    """Waits until the condition holds, while the job has not failed."""

    def holds() -> bool:
        state = cluster.job(job)
        assert state["JobState"] != "FAILED", Path(state["StdOut"]).read_text()
        return condition()

    cluster.wait_until(holds, timeout, what)


def log(directory: Path) -> str:
    return "".join(path.read_text() for path in sorted((directory / "slurm").glob("*.log")))


def newest(directory: Path) -> int:
    """The step of the newest checkpoint; 0 where there is none."""
    return max(
        (int(path.parent.name[5:]) for path in directory.glob("checkpoints/step_*/run.json")), default=0
    )


def test_a_requeued_job_and_one_that_lost_a_node_end_as_if_never_stopped(
    cluster: Cluster, long_job: tuple[int, Path], tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    engine_port, master_port = free_ports(2)
    ports = {"engine_ports": [engine_port], "master_port": master_port}
    slurm = {**ENGINE, "trainer_nodes": 2, "ranks_per_node": 2, **ports}
    common = {"run": {"steps": STEPS}, "parallel": BETWEEN}
    config = write_config(tmp_path / "slurm.toml", directory, **common, slurm=slurm)
    job = number(submit(cluster, config))

    wait(cluster, job, lambda: newest(directory) >= 1, 120, "the first checkpoint")
    cluster.command("scontrol", "requeue", str(job))
    wait(cluster, job, lambda: newest(directory) >= 3, 120, "a checkpoint after the requeue")
    assert cluster.job(job)["Restarts"] == "1"
    cluster.lose_node("n2")
    cluster.wait_until(lambda: cluster.job(job)["Restarts"] == "2", 60, "requeued after the loss of a node")
    cluster.start_node("n2")
    wait(cluster, job, lambda: cluster.job(job)["JobState"] == "COMPLETED", 180, "the job's end")

    written = log(directory)
    assert written.count("trainer on n1 n2, engines on n3") == 3, written
    assert f"{directory}/model  trained policy" in written

    reference = write_config(tmp_path / "local.toml", tmp_path / "local", **common)
    assert run(reference).process.returncode == 0
    expected = list(map(without_times, metrics(tmp_path / "local")))
    assert list(map(without_times, metrics(directory))) == expected
    for file in (tmp_path / "local/model").iterdir():
        assert (directory / "model" / file.name).read_bytes() == file.read_bytes(), file.name
    assert checkpoints(directory) == [f"step_{step:06d}" for step in range(1, STEPS + 1)]


def test_a_job_whose_time_is_up_goes_on_in_another_allocation(
    cluster: Cluster, long_job: tuple[int, Path]
) -> None:
    """Then its engine is killed, and started again; then a rank, and the whole job ends, as failed."""
    job, directory = long_job
    told = re.compile(r"time is nearly up: requeued, to go on from .*/step_(\d+)")
    wait(cluster, job, lambda: told.search(log(directory)) is not None, 200, "its time was up")
    last = int(told.findall(log(directory))[-1])
    wait(cluster, job, lambda: newest(directory) > last + 1, 120, "checkpoints after the restart")
    assert [line["step"] for line in metrics(directory)] == list(range(metrics(directory)[-1]["step"] + 1))

    (engine,) = _processes(job, "megatron_rapo.embedded_server")
    # One that ends within 30 s of its first start could not be started, and would end the job.
    wait(cluster, job, lambda: time.time() - engine.create_time() > 32, 40, "the engine is old enough")
    engine.kill()
    wait(cluster, job, lambda: "ended and is started again" in log(directory), 120, "the engine came back")
    last = newest(directory)
    wait(cluster, job, lambda: newest(directory) > last + 1, 120, "checkpoints with the new engine")

    next(rank for rank in _processes(job, "train") if rank.environ()["SLURM_PROCID"] == "1").kill()
    cluster.wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", 60, "the job failed")
    # Helpers of a dead rank must end by themselves: linuxproc, unlike cgroups, loses sight of orphans.
    cluster.wait_until(lambda: not _processes(job), 20, "nothing of the job is left")


@pytest.mark.exhaustive
@pytest.mark.skipif(why_not(VLLM_CPU) is not None, reason=str(why_not(VLLM_CPU)))
def test_a_job_trains_on_a_vllm_that_it_starts(cluster: Cluster, tmp_path: Path) -> None:
    engine_port, master_port = free_ports(2)
    directory = tmp_path / "run"
    slurm = {
        "engine": "vllm",
        "engine_python": str(VLLM_PYTHON),
        "engine_arguments": ["--max-model-len", "64", "--max-num-seqs", "16", "--enforce-eager"],
        "gpus_per_node": 0,
        "ranks_per_node": 2,
        "engine_ports": [engine_port],
        "master_port": master_port,
    }
    config = write_config(
        tmp_path / "vllm.toml",
        directory,
        run={"steps": 2},
        model={"path": str(with_wide_heads(tmp_path / "model"))},
        parallel={"data_parallel": 2, "timeout_s": 300.0},
        rollout={"startup_timeout_s": 280.0},
        slurm=slurm,
    )
    cluster.environment |= VLLM_ON_CPU
    job = number(submit(cluster, config))
    wait(cluster, job, lambda: cluster.job(job)["JobState"] == "COMPLETED", 330, "the job's end")
    lines = metrics(directory)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert all(line["mismatch/log_prob_mean"] < 1e-5 for line in lines[1:])
    cluster.wait_until(lambda: not _processes(job), 20, "nothing of the job is left")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sbatch_arguments": ["--nodelist=n9"]},
            r"Invalid node name specified.*error: SLURM refuses the job",
        ),
        (
            {"engine_nodes": 8},
            r"(More processors requested|node count|configuration).*error: SLURM refuses the job",
        ),
        ({"partition": "gpu"}, r"invalid partition specified: gpu.*error: SLURM refuses the job"),
    ],
)
def test_what_slurm_does_not_have_is_told_before_submitting(
    cluster: Cluster, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    slurm = {**ENGINE, "ranks_per_node": 1, **options}
    config = write_config(tmp_path / "slurm.toml", tmp_path / "run", slurm=slurm)
    before = cluster.command("squeue", "--noheader", "--format=%i")
    result = submit(cluster, config)
    assert result.returncode == 1
    assert re.search(message, result.stderr, re.DOTALL), result.stderr
    assert "change SBATCH_ARGUMENTS or the number of nodes" in result.stderr
    assert cluster.command("squeue", "--noheader", "--format=%i") == before


def test_a_script_that_was_not_checked_refuses_to_run(cluster: Cluster, tmp_path: Path) -> None:
    """`sbatch FILE` would ask for SLURM's defaults: one node, no requeue."""
    example = Path(__file__).parents[2] / "examples/run_qwen7b.sh"
    output = tmp_path / "out"
    with pytest.raises(subprocess.CalledProcessError):
        cluster.command("sbatch", "--wait", f"--output={output}", str(example))
    assert "error: this job was not checked" in output.read_text()
    assert "submit it as bash FILE" in output.read_text()


def _processes(job: int, word: str | None = None) -> list[psutil.Process]:
    """What runs in the job's steps; with `word`, only where it is an argument."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            environment = process.environ()
            in_step = environment.get("SLURM_JOB_ID") == str(job) and "SLURM_STEP_ID" in environment
            if in_step and (word is None or word in process.cmdline()):
                found.append(process)
    return found
