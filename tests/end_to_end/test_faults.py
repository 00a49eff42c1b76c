"""What goes wrong ends the whole job soon, with one message that names thing and remedy."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.command import (
    MODEL,
    Command,
    checkpoints,
    heartbeats,
    metrics,
    run,
    started,
    write_config,
)
from tests.leftovers import nothing_left
from tests.models import make_tokenizer
from tests.ports import free_port

TWO_STAGES = {"pipeline_parallel": 2, "timeout_s": 60.0}
SOON = 30.0  # seconds from the fault to the end of the job, on a machine that is busy


def assert_one_message(command: Command, message: str) -> None:
    assert command.process.returncode == 1
    assert re.search(message, command.stderr), command.stderr
    assert len(re.findall("^error: ", command.stderr, re.MULTILINE)) == 1, command.stderr
    assert "Traceback" not in command.stderr, command.stderr
    assert command.left_processes() == []


# Before anything is started


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": {"stepz": 3}}, r"run\.stepz"),
        ({"parallel": {"tensor_parallel": 3}}, r"tensor_parallel = 3 does not divide .* 8 attention heads"),
        ({"parallel": {"pipeline_parallel": 3}}, r"= 3 does not divide the model's 4 layers"),
        ({"model": {"path": "/nowhere/model"}}, r"/nowhere/model .*model\.path"),
        ({"data": {"source": "file", "path": "/nowhere/data.jsonl"}}, r"/nowhere/data\.jsonl .*data\.path"),
    ],
)
def test_an_impossible_run_is_refused_at_once(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if changes.get("data", {}).get("source") == "file":
        changes = {**changes, "data": {**changes["data"], "numbers": None, "problems": None}}
    command = run(write_config(tmp_path / "run.toml", tmp_path / "run", **changes))
    assert_one_message(command, message)
    assert not (tmp_path / "run/heartbeat").exists(), "no rank was started"


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, r"run\.toml does not exist; examples/configs/"), ("[run\nsteps", r"run\.toml is not valid TOML")],
)
def test_a_missing_or_malformed_configuration_is_named(
    tmp_path: Path, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert_one_message(run(tmp_path / "run.toml"), message)


def test_another_world_size_of_torchrun_is_refused(tmp_path: Path) -> None:
    torchrun = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29511",
    }
    command = run(write_config(tmp_path / "run.toml", tmp_path / "run"), environment=torchrun)
    assert_one_message(command, r"WORLD_SIZE=2 ranks were started, but \[parallel\] lays out 1")


def copy_of_model(folder: Path) -> Path:
    return Path(shutil.copytree(MODEL, folder / "model"))


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    model = copy_of_model(tmp_path)
    (model / "model.safetensors").unlink()
    command = run(write_config(tmp_path / "run.toml", tmp_path / "run", model={"path": str(model)}))
    assert_one_message(command, "holds no weights .*; download or convert them")


def test_a_model_of_another_architecture_is_refused(tmp_path: Path) -> None:
    model = copy_of_model(tmp_path)
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    command = run(write_config(tmp_path / "run.toml", tmp_path / "run", model={"path": str(model)}))
    assert_one_message(command, "is of the family 'gpt2' .*; there are llama")


# As the ranks start


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    model = copy_of_model(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    command = run(write_config(tmp_path / "run.toml", tmp_path / "run", model={"path": str(model)}))
    assert_one_message(command, "has no tokenizer .*; copy the tokenizer files")


@pytest.mark.parametrize(
    ("row", "message"),
    [("", r"data\.jsonl has no rows; point data\.path"), ('{"problem": "1+1", "answer": "2"}', "question")],
)
def test_data_without_prompts_are_refused(tmp_path: Path, row: str, message: str) -> None:
    model = copy_of_model(tmp_path)
    make_tokenizer(31).save_pretrained(model)
    (tmp_path / "data.jsonl").write_text(row and row + "\n")
    data = {"source": "file", "path": str(tmp_path / "data.jsonl"), "template": "plain"}
    data |= {"numbers": None, "problems": None}
    command = run(
        write_config(tmp_path / "run.toml", tmp_path / "run", model={"path": str(model)}, data=data)
    )
    assert_one_message(command, message)


def test_a_server_that_is_not_up_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    rollout = {"engine.kind": "embedded", "engine.urls": [url], "startup_timeout_s": 2.0}
    command = run(write_config(tmp_path / "run.toml", tmp_path / "run", rollout=rollout))
    assert_one_message(
        command, rf"{url} was not ready within 2 s .*; look into .* or raise rollout\.startup_timeout_s"
    )


# In the middle of training


@contextmanager
def training(
    tmp_path: Path, environment: dict[str, str] | None = None, **changes: Any
) -> Iterator[tuple[Path, Command]]:
    """A run on two ranks (unless changed) that has saved a checkpoint and would go on for long."""
    directory = tmp_path / "run"
    changes = {"parallel": TWO_STAGES, "run": {"steps": 1000}, **changes}
    config = write_config(tmp_path / "run.toml", directory, **changes)
    with started(config, environment=environment) as command:
        command.wait_until((directory / "checkpoints/step_000001/run.json").exists)
        yield directory, command


def end(command: Command) -> float:
    """Seconds until the command ended."""
    began = time.monotonic()
    command.wait(2 * SOON)
    return time.monotonic() - began


def assert_checkpoints_are_whole(directory: Path) -> None:
    complete = [name for name in checkpoints(directory) if not name.startswith(".partial_")]
    assert complete
    for name in complete:
        record = json.loads((directory / "checkpoints" / name / "run.json").read_text())
        assert record["state"]["step"] == int(name.removeprefix("step_"))


def test_killed_servers_are_replaced_and_cost_nothing(tmp_path: Path) -> None:
    """With dynamic sampling, whose rounds every rank must agree on."""
    rollout = {"engine.servers": 2, "prompts_per_request": 1}
    sampling = {"rollout": rollout, "rollout.dynamic_sampling": {"over_sampling": 1.5, "max_rounds": 2}}
    layout = {"parallel": {"data_parallel": 2, "timeout_s": 60.0}, "run": {"steps": 1000}}
    with nothing_left(), training(tmp_path, **layout, **sampling) as (directory, command):
        victim = min(engines(command), key=lambda process: process.pid)
        victim.send_signal(signal.SIGKILL)
        command.wait_until(lambda: metrics(directory)[-1].get("engines/returned", 0) >= 1)
        command.wait_until(lambda: metrics(directory)[-1]["engines/live"] == 2)
        assert victim not in engines(command)
        for server in engines(command):  # in the middle of a step there is none: it waits for them
            server.send_signal(signal.SIGKILL)
        command.wait_until(lambda: metrics(directory)[-1]["engines/returned"] >= 3)
        command.wait_until(lambda: metrics(directory)[-1]["engines/live"] == 2)
        command.process.send_signal(signal.SIGTERM)
        end(command)
    assert re.search(r"engine http://\S+ is out \(1 of 2 are left\): ", command.stdout), command.stdout
    assert re.search(r"engine http://\S+ is back", command.stdout), command.stdout
    assert command.left_processes() == []
    for line in metrics(directory)[1:]:
        responses = line["reward/correct"] + line["reward/wrong"] + line["reward/timeout"]
        assert responses + line["reward/crash"] == pytest.approx(1.0)
        assert line["sampling/prompts_drawn"] >= 6
    last = metrics(directory)[-1]["step"]
    drawn = sum(line["sampling/prompts_drawn"] for line in metrics(directory)[1:])
    record = json.loads((directory / f"checkpoints/step_{last:06d}/run.json").read_text())
    assert record["state"]["prompts_drawn"] == drawn, "a run that resumes goes on behind all that was drawn"


def engines(command: Command) -> list[psutil.Process]:
    return [p for p in command.processes() if "megatron_rapo.embedded_server" in p.cmdline()]


def test_where_no_server_is_left_the_job_ends(tmp_path: Path) -> None:
    rollout = {"restarts": 0}
    with training(tmp_path, rollout=rollout) as (directory, command):
        (server,) = [p for p in command.processes() if "megatron_rapo.embedded_server" in p.cmdline()]
        server.send_signal(signal.SIGKILL)
        assert end(command) < SOON
    assert_one_message(
        command, r"the embedded server was killed by SIGKILL; its log .*engine-0\.log ends with"
    )
    assert_checkpoints_are_whole(directory)


def test_a_killed_rank_ends_the_job(tmp_path: Path) -> None:
    with training(tmp_path) as (directory, command):
        psutil.Process(heartbeats(directory)[1]["pid"]).send_signal(signal.SIGKILL)
        assert end(command) < SOON
    assert_one_message(command, r"rank 1 was killed by SIGKILL: usually out of memory")
    assert "where the ranks are" in command.stderr
    assert_checkpoints_are_whole(directory)


def test_sigterm_ends_the_job_after_its_step_which_is_saved(tmp_path: Path) -> None:
    with training(tmp_path, checkpoint={"every": 1, "stop_grace_s": 60.0}) as (directory, command):
        command.process.send_signal(signal.SIGTERM)
        assert end(command) < SOON
    assert command.process.returncode == 128 + signal.SIGTERM
    assert command.stderr == ""
    assert command.left_processes() == []
    assert_checkpoints_are_whole(directory)
    last = metrics(directory)[-1]["step"]
    told = (
        rf"^stopped by SIGTERM after step {last} of 1000: the newest checkpoint is \S+/step_{last:06d}, and "
    )
    assert re.search(told, command.stdout, re.MULTILINE), command.stdout


def test_a_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    """The engine is asleep, so that the step would take for ever."""
    with training(tmp_path, checkpoint={"every": 1, "stop_grace_s": 600.0}) as (_, command):
        for engine in engines(command):
            engine.suspend()
        command.process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert command.process.poll() is None
        command.process.send_signal(signal.SIGINT)
        assert end(command) < SOON
    assert command.process.returncode == 130
    assert command.left_processes() == []
    told = r"^stopped in step \d+ \(.*\) without saving, as it was asked again: the newest checkpoint is"
    assert re.search(told, command.stdout, re.MULTILINE), command.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_rank_that_no_launcher_of_ours_watches_leaves_nothing(
    tmp_path: Path, number: signal.Signals
) -> None:
    """As srun starts and ends it: the signal comes to the rank alone, with nothing above to sweep."""
    place = {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    environment = {name: str(value) for name, value in place.items()}
    changes = {"parallel": {"timeout_s": 60.0}, "weights": {"transport": "tensor"}}
    with nothing_left(), training(tmp_path, environment, **changes) as (directory, command):
        began = {process.pid for process in command.processes()}
        assert len(began) >= 3, "a server and a verifier beside the rank"
        command.process.send_signal(number)
        assert end(command) < SOON  # its output is at its end as well
        assert command.left_processes() == []
    assert command.process.returncode == (143 if number == signal.SIGTERM else -number)
    assert "Traceback" not in command.stderr, command.stderr
    assert_checkpoints_are_whole(directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk_ends_the_job_and_spares_earlier_checkpoints(tmp_path: Path) -> None:
    disk = tmp_path / "run/checkpoints"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], check=True, timeout=10)
    try:
        with training(tmp_path) as (directory, command):
            assert end(command) < 2 * SOON
        assert_one_message(
            command,
            r"checkpoint .* cannot be written: .*(No space left|, with [0-3] MiB free).*free space or mend",
        )
        assert_checkpoints_are_whole(directory)
        assert [name for name in checkpoints(directory) if name.startswith(".")] == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True, timeout=10)
