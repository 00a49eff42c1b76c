"""SLURM without SLURM: the examples, what is refused before a submission, the script over stand-ins."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config import RunConfig, load_config
from megatron_rapo.config.cluster import seconds_of
from megatron_rapo.config.load import validate
from megatron_rapo.errors import RapoError
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.slurm import render

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TOOLS = ("bash", "cat", "env", "mkdir", "od", "sed", "seq", "sleep", "tr")
EXAMPLES = {"examples/run_qwen7b.sh": "7B", "examples/run_qwen3b.sh": "3B"}


def rendered(name: str) -> str:
    size = EXAMPLES[name]
    config, nodes = (Path(f"examples/{kind}/qwen2.5-{size.lower()}.toml") for kind in ("configs", "slurm"))
    title = f"Qwen2.5-{size} on MATH with RAPO, as a SLURM job."
    return render(load_config([ROOT / config, ROOT / nodes]), [config], title=title)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_the_template_with_its_configuration(name: str) -> None:
    assert (ROOT / name).read_text() == rendered(name), (
        f"write it anew: python -m tests.unit.test_slurm {name}"
    )


@pytest.mark.parametrize("name", [*EXAMPLES, "examples/run_cpu.sh"])
def test_shellcheck_finds_nothing(name: str) -> None:
    shellcheck = BIN / "shellcheck"
    result = subprocess.run([shellcheck, name], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout == ""


@pytest.fixture(scope="module", autouse=True)
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A PATH without this machine's SLURM, if it has one."""
    tools = tmp_path_factory.mktemp("tools")
    for tool in TOOLS:
        (tools / tool).symlink_to(str(shutil.which(tool)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tools))
        yield


def script(tmp_path: Path, name: str = "examples/run_qwen7b.sh", **changes: str) -> Path:
    """The example with settings changed and this environment's command."""
    text = (ROOT / name).read_text()
    for variable, value in {"RAPO": f"({BIN}/megatron-rapo)", **changes}.items():
        text, count = re.subn(rf"^{variable}=.*$", lambda _, v=f"{variable}={value}": v, text, flags=re.M)
        assert count == 1, variable
    path = tmp_path / "job.sh"
    path.write_text(text)
    return path


def run(path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(path), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "examples/run_qwen7b.sh",
            ["16 trainer ranks", "4 nodes of 8 GPUs: 8 ranks on each of the first 2", "8 sglang engines"],
        ),
        (
            "examples/run_qwen3b.sh",
            ["8 trainer ranks", "2 nodes of 8 GPUs: 8 ranks on each of the first 1", "8 sglang engines"],
        ),
    ],
)
def test_a_dry_run_prints_the_resolved_plan(tmp_path: Path, name: str, lines: list[str]) -> None:
    result = run(script(tmp_path, name, RUN_DIRECTORY=str(tmp_path / "run")), "--dry-run")
    assert result.returncode == 0, result.stderr
    for line in [*lines, "http://engine-node-1:30003", "divergence_coefficient = 0.005"]:
        assert line in result.stdout
    assert "sbatch is not on this machine, so SLURM was not asked" in result.stdout


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "layout": (
        {"SETTINGS": "(parallel.tensor_parallel=3)"},
        "lays out 12 (TP × PP × CP × DP); make them equal",
    ),
    "layout of the model": (
        {"SETTINGS": "(parallel.tensor_parallel=8 parallel.data_parallel=2)"},
        "tensor_parallel = 8 does not divide the model's 28 attention heads; choose a divisor",
    ),
    "ranks": ({"TRAINER_NODES": "3"}, "slurm.trainer_nodes = 3 × slurm.ranks_per_node = 8 are 24 ranks"),
    "time limit": (
        {"SBATCH_ARGUMENTS": "(--time=00:01:30)"},
        "slurm.time_limit = '00:01:30' is 90 s, no more than requeue_before_s",
    ),
    "two engines on one port": (
        {"ENGINE_PORTS": "(30000 30001 30000)"},
        "gives two engines of a node one port, 30000; give each its own",
    ),
    "GPUs": ({"GPUS_PER_ENGINE": "4"}, "4 engines of gpus_per_engine = 4; 16 are needed"),
    "GPUs beside the ranks": ({"ENGINE_NODES": "0"}, "beside them (engine_nodes = 0); 16 are needed"),
    "the rendezvous' port": (
        {"ENGINE_NODES": "0", "GPUS_PER_NODE": "16", "MASTER_PORT": "30001"},
        "master_port = 30001 is an engine's on the same node (engine_nodes = 0); choose another",
    ),
    "a directory that cannot be": (
        {"RUN_DIRECTORY": "/proc/run"},
        "RUN_DIRECTORY=/proc/run takes no files; choose",
    ),
    "configuration": ({"CONFIGS": "(nowhere.toml)"}, "configuration nowhere.toml does not exist"),
    "no sbatch": ({}, "sbatch is not on this machine; submit from one of the cluster's login nodes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_settings_are_refused_before_a_submission(tmp_path: Path, case: str) -> None:
    changes, message = REFUSED[case]
    result = run(script(tmp_path, **{"RUN_DIRECTORY": str(tmp_path / "run"), **changes}))
    assert result.returncode == 1
    assert message in result.stderr, result.stderr


def test_an_unknown_argument_is_refused(tmp_path: Path) -> None:
    result = run(script(tmp_path), "--dryrun")
    assert result.returncode == 1
    assert "unknown arguments: --dryrun; write bash" in result.stderr


# Stand-ins for a job of two nodes: scontrol tells names and addresses, srun notes its calls. Its trainer
# lasts as long as the file `go` is not there; the engines for ever, or not at all.
SCONTROL = """\
case "$*" in
"show hostnames"*) printf '%s\\n' a b ;;
"show node"*) echo "NodeName=$3 NodeAddr=$3.cluster State=IDLE" ;;
*) echo "$*" >>"$NOTES/scontrol" ;;
esac
"""
SRUN = """\
printf '%s ' "GPUS=${CUDA_VISIBLE_DEVICES-}" "MASTER=${MASTER_ADDR-}:${MASTER_PORT-}" "$@" >>"$NOTES/srun"
echo >>"$NOTES/srun"
case "$*" in
*" train "*)
    [[ ! -e $NOTES/saves ]] || trap 'mkdir -p "$NOTES/../run/checkpoints/step_000003"; exit 138' USR1
    [[ ! -e $NOTES/hangs ]] || { mkdir -p "$NOTES/../run/hangs/$$"; : >"$NOTES/../run/hangs/$$/report.txt"; }
    until [[ -e $NOTES/go ]]; do sleep 0.05; done; exit "$(cat "$NOTES/go")" ;;
*) [[ -e $NOTES/no_engines ]] || exec sleep 60 ;;
esac
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text(f"#!/bin/bash\n{text}")
        stand_in.chmod(0o755)
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


def start(notes: Path, **changes: str) -> subprocess.Popen[str]:
    directory = notes.parent / "run"
    path = script(notes.parent, **{"RUN_DIRECTORY": str(directory), "TRAINER_NODES": "1", **changes})
    environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "a,b",
        "RAPO_SUBMITTED": "1",
        "NOTES": str(notes),
    }
    return subprocess.Popen(
        ["bash", str(path)],
        env={"PATH": f"{notes.parent}/bin:{os.environ['PATH']}", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str]) -> str:
    """The job's output; then what is left of it is ended, as SLURM does."""
    job.wait(20)
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    return job.communicate(timeout=20)[0]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def calls(notes: Path) -> list[str]:
    path = notes / "srun"
    return sorted(path.read_text().splitlines()) if path.exists() else []


def test_engines_beside_the_ranks_have_gpus_ports_and_addresses_of_their_own(notes: Path) -> None:
    job = start(notes, TRAINER_NODES="2", ENGINE_NODES="0", GPUS_PER_NODE="12", ENGINE_PORTS="(30000 30001)")
    wait_until(lambda: len(calls(notes)) == 5)
    (notes / "go").write_text("0")
    assert "trainer on a b, engines on a b" in finish(job)
    assert job.returncode == 0
    engines = [
        re.search(r"GPUS=(\S*) .*--nodelist=(\S+) .*--host (\S+) --port (\d+)", c) for c in calls(notes)
    ]
    found = {match.groups() for match in engines if match}
    assert found == {
        (gpus, node, f"{node}.cluster", port)
        for node in "ab"
        for gpus, port in (("8,9", "30000"), ("10,11", "30001"))
    }
    (trainer,) = [call for call in calls(notes) if " train " in call]
    assert "MASTER=a.cluster:29500" in trainer
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8 --distribution=block --nodelist=a,b" in trainer
    assert 'rollout.engine.urls=["http://a.cluster:30000","http://a.cluster:30001","http://b' in trainer
    assert "--kill-on-bad-exit=1" in trainer


def test_the_trainers_status_is_the_jobs(notes: Path) -> None:
    job = start(notes)
    (notes / "go").write_text("3")
    finish(job)
    assert job.returncode == 3


@pytest.mark.parametrize(("hangs", "starts"), [(True, 3), (False, 1)])
def test_a_trainer_that_hung_is_started_again(notes: Path, hangs: bool, starts: int) -> None:
    if hangs:
        (notes / "hangs").touch()
    (notes / "go").write_text("75")
    job = start(notes, RELAUNCHES="2", ENGINE_PORTS="(30000)")
    output = finish(job)
    assert job.returncode == 75
    assert len([call for call in calls(notes) if " train " in call]) == starts
    assert output.count("the trainer is started again") == starts - 1
    assert ("2 of 2 times" in output) == hangs


def test_an_engine_that_cannot_be_started_ends_the_job(notes: Path) -> None:
    (notes / "no_engines").touch()
    job = start(notes, ENGINE_PORTS="(30005)")
    assert re.search(
        r"error: the engine on b, port 30005, ended \d s after its start; its log is .*/engine-b", finish(job)
    )
    assert job.returncode == 1


def test_an_engine_that_ends_later_is_started_again(notes: Path) -> None:
    (notes / "no_engines").touch()
    job = start(notes, ENGINE_PORTS="(30005)", QUICK_S="0")
    wait_until(lambda: len(calls(notes)) >= 4)
    (notes / "go").write_text("0")
    assert "the engine on b, port 30005, ended and is started again; its log is" in finish(job)
    assert job.returncode == 0


def test_the_job_requeues_itself_only_if_it_went_on(notes: Path) -> None:
    """Else it would be requeued for ever: each time it would begin the same step anew."""
    for number in (1, 2):
        (notes / "srun").unlink(missing_ok=True)
        job = start(notes)
        wait_until(lambda: any(" train " in call for call in calls(notes)))
        if number == 2:
            (notes.parent / "run/checkpoints/step_000002").mkdir(parents=True)
        job.send_signal(signal.SIGUSR1)
        output = finish(job)
        if number == 1:
            assert job.returncode == 1
            assert "raise --time or REQUEUE_BEFORE_S, or lower checkpoint.every" in output
            assert not (notes / "scontrol").exists()
        else:
            assert job.returncode == 0
            assert "requeued, to go on from" in output and "step_000002" in output
            assert (notes / "scontrol").read_text() == "requeue 7\n"


def test_before_its_time_is_up_the_trainer_saves(notes: Path) -> None:
    """Its first checkpoint is of this start; without the signal there would be none to go on from."""
    (notes / "saves").touch()
    job = start(notes)
    wait_until(lambda: any(" train " in call for call in calls(notes)))
    job.send_signal(signal.SIGUSR1)
    output = finish(job)
    assert job.returncode == 0
    assert "the trainer is to save after its step, within 100 s" in output
    assert re.search(r"requeued, to go on from \S+/step_000003", output), output


def with_slurm(**slurm: Any) -> RunConfig:
    options = {
        "run": {"directory": "run", "steps": 1},
        "model": {"path": "model"},
        "data": {"source": "arithmetic"},
        "rollout": {"prompts_per_step": 1, "max_response_tokens": 8},
        "slurm": slurm,
    }
    return validate(options, source="test")


def test_names_with_spaces_and_quotes_stay_whole() -> None:
    config = with_slurm(ranks_per_node=1, srun_arguments=["--container-mounts=/a b:/c'd"])
    text = render(config, [Path("my config.toml")], ["run.steps=2", "run.directory=x", "slurm.account=y"])
    block = text.split("── Settings")[1].split("set -euo")[0]
    shown = subprocess.run(
        [
            "bash",
            "-c",
            'source /dev/stdin; printf "%s\\n" "${SRUN_ARGUMENTS[@]}" "${CONFIGS[@]}" "${SETTINGS[@]}"',
        ],
        input="# " + block,
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert shown.stdout.splitlines() == ["--container-mounts=/a b:/c'd", "my config.toml", "run.steps=2"]


@pytest.mark.parametrize("engine", ["sglang", "embedded", "vllm"])
def test_engines_run_in_this_packages_environment_unless_told_otherwise(engine: str) -> None:
    """Not in whatever `python` the job's PATH finds first."""
    default = with_slurm(ranks_per_node=1, engine=engine)
    other = with_slurm(ranks_per_node=1, engine=engine, engine_python="/opt/other/python")
    assert "\nENGINE_PYTHON=/env/bin/python " in render(default, [], command="/env/bin/megatron-rapo")
    assert "\nENGINE_PYTHON=/opt/other/python " in render(other, [], command="/env/bin/megatron-rapo")


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [
        (90, 5400),
        ("90", 5400),
        ("90:30", 5430),
        ("24:00:00", 86400),
        ("100:59:59", 363599),
        ("1-12", 129600),
        ("2-00:00", 172800),
        ("2-01:30", 178200),
        ("7-23:59:59", 691199),
    ],
)
def test_a_time_limit_is_what_sbatch_takes(time_limit: int | str, seconds: int) -> None:
    config = with_slurm(ranks_per_node=1, time_limit=time_limit, requeue_before_s=seconds - 1)
    assert config.slurm is not None and seconds_of(config.slurm.time_limit) == seconds
    assert f"--time={time_limit}" in render(config, [])
    with pytest.raises(
        RapoError, match=rf"is {seconds} s, no more than requeue_before_s = {seconds}: the job"
    ):
        with_slurm(ranks_per_node=1, time_limit=time_limit, requeue_before_s=seconds)


@pytest.mark.parametrize(
    ("time_limit", "message"),
    [
        *(
            (text, "write minutes (90), HOURS:MINUTES:SECONDS (24:00:00) or DAYS-HOURS (2-12)")
            for text in ("", "x", "1:2:3:4", "1-", "-1", "1:", "1 day", "1.5", "2-00:00:00:00", "٣")
        ),
        *(
            (text, "has more than 59 seconds, 59 minutes of an hour, or 23 hours of a day")
            for text in ("00:99:99", "01:60:00", "01:00:60", "5:60", "1-24", "1-00:60")
        ),
        (0, "is 0 s, no more than requeue_before_s = 120"),
        (
            "00:01:00",
            "is 60 s, no more than requeue_before_s = 120: the job would requeue itself at once; raise",
        ),
        (True, "slurm.time_limit = true: must be text"),
    ],
)
def test_another_time_limit_is_refused(time_limit: int | str, message: str) -> None:
    with pytest.raises(RapoError, match=re.escape(message)):
        with_slurm(ranks_per_node=1, time_limit=time_limit)


@pytest.mark.parametrize(
    ("argument", "option"),
    [("--time=9", "time_limit"), ("-p", "partition"), ("--nodes=2", "trainer_nodes"), ("-A=x", "account")],
)
def test_what_has_an_option_is_no_further_argument(argument: str, option: str) -> None:
    with pytest.raises(RapoError, match=rf"sbatch_arguments = .* is set by {option}"):
        with_slurm(ranks_per_node=1, sbatch_arguments=["--qos=high", argument])


def test_further_arguments_reach_the_script() -> None:
    config = with_slurm(
        ranks_per_node=1,
        partition="h100",
        account="lab",
        engine_arguments=["--mem-fraction-static", "0.7"],
        sbatch_arguments=["--qos=high"],
    )
    text = render(config, [])
    assert "\nENGINE_ARGUMENTS=(--dtype bfloat16 --mem-fraction-static 0.7)\n" in text
    asked = "(--job-name=run --time=24:00:00 --partition=h100 --account=lab --qos=high)"
    assert f"\nSBATCH_ARGUMENTS={asked} " in text


def test_a_kind_that_jobs_do_not_start_is_refused() -> None:
    with pytest.raises(
        RapoError, match=r"slurm\.engine = 'other' is no kind that jobs start; .* embedded, sglang, vllm"
    ):
        with_slurm(ranks_per_node=1, engine="other")


def test_gpus_of_engines_have_no_effect_without_gpus() -> None:
    with pytest.raises(
        RapoError, match=r"slurm\.gpus_per_engine = 1 would have no effect: gpus_per_node is 0"
    ):
        with_slurm(ranks_per_node=1, gpus_per_node=0, gpus_per_engine=1)


STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}


def test_a_rank_reads_its_place_from_srun() -> None:
    assert RankEnvironment.read(STEP) == RankEnvironment(3, 1, 5, 2, "a", 29500)
    last = {**STEP, "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"}
    assert RankEnvironment.read(last) == RankEnvironment(4, 0, 5, 1, "a", 29500)


def test_torchrun_inside_a_step_counts_before_srun() -> None:
    torchrun = RankEnvironment(0, 0, 1, 1, "b", 1234)
    assert RankEnvironment.read({**STEP, **torchrun.variables()}) == torchrun


@pytest.mark.parametrize("changes", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_ID": None}])
def test_a_shell_or_a_batch_script_is_no_rank(changes: dict[str, str | None]) -> None:
    environ = {name: value for name, value in {**STEP, **changes}.items() if value is not None}
    assert RankEnvironment.read(environ) is None


def test_srun_without_a_rendezvous_is_refused() -> None:
    environ = {name: value for name, value in STEP.items() if not name.startswith("MASTER")}
    with pytest.raises(
        RapoError, match=r"5 tasks, but the environment lacks MASTER_ADDR, MASTER_PORT; export"
    ):
        RankEnvironment.read(environ)


if __name__ == "__main__":
    for example in sys.argv[1:]:
        (ROOT / example).write_text(rendered(example))
