"""All that waits for a GPU, in order of value: one command, each part under its own time limit.

    python tools/gpu_suite.py RESULTS                  # where torch sees a GPU; else the same on a CPU, small
    python tools/gpu_suite.py RESULTS --parts step run
    python tools/gpu_suite.py RESULTS --again run      # also what RESULTS has

What a part found is written to RESULTS/PART.json at once, with its output in RESULTS/PART.log, so what a
machine had done when it went away is there; a further call goes on with parts that are missing or failed. All
of them take at most eight minutes, the first three at most four. Needed are torch, Triton, transformers and
pytest, and what `pip install --no-deps -e .` leaves to be found: megatron-core, pydantic, fastapi, uvicorn,
rich and the parsers of the math verifier.

- tests: tests/gpu
- loss: tools/bench_loss.py: PyTorch, torch.compile, and Liger where it is installed
- step: tools/gpu_step.py: updates of a model of 0.5B's shape: tokens/s, MFU, peak memory beside the estimate
- run: `megatron-rapo train`, colocated with an engine on the same GPU; weights by CUDA IPC, timed and proved
- offload: the same run with the reference in host memory: what that frees, and that it learns the same
- mismatch: engines' log-probs beside the trainer's in bfloat16, in these two runs
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

TOOLS = Path(__file__).parent
ROOT = TOOLS.parent
Json = dict[str, Any]

CONFIG = """
[run]
directory = "{directory}"
steps = 4
[model]
path = "model"
dtype = "{dtype}"
{more}
[data]
source = "arithmetic"
[rollout]
prompts_per_step = {prompts}
responses_per_prompt = 8
max_prompt_tokens = 64
max_response_tokens = {tokens}
colocated = true
[rollout.engine]
kind = "embedded"
device = "{device}"
[weights]
transport = "tensor"
[checkpoint]
every_minutes = 0
"""
IN_HOST_MEMORY = "reference_in_host_memory = true"


@dataclass(frozen=True)
class Setting:
    """Where and how large.

    Attributes:
        device: cuda or cpu.
        results: folder of results; runs and models lie in it as well.
    """

    device: str
    results: Path

    @property
    def small(self) -> bool:
        """Whether sizes are those of a rehearsal."""
        return self.device == "cpu"

    def limit_s(self, part: Part) -> float:
        """Of a part; a rehearsal is of what runs, not of how fast, whatever else its cores do."""
        return 20 * part.limit_s if self.small else part.limit_s

    @property
    def shape(self) -> list[str]:
        """Of the model: Qwen2.5-0.5B's, but for heads of 128."""
        sizes = (2, 128, 256, 512) if self.small else (24, 896, 4864, 151_936)
        names = ("--layers", "--hidden", "--feed-forward", "--vocabulary")
        return [word for pair in zip(names, map(str, sizes), strict=True) for word in pair]


@dataclass(frozen=True)
class Part:
    """One part: its command, and what is found once that has ended well.

    Attributes:
        limit_s: after which it is ended.
        command: to be run in `Setting.results`; None: there is none.
        found: numbers, from the files it left.
    """

    limit_s: float
    command: Callable[[Setting], list[str]] | None
    found: Callable[[Setting], Json]


def main() -> int:
    """Runs what is missing. Returns how many parts failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--again", nargs="+", choices=list(PARTS), default=[])
    parser.add_argument("--device", choices=["cuda", "cpu"])
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = options.results.resolve()
    results.mkdir(parents=True, exist_ok=True)
    setting = Setting(device, results)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and so end what runs
    print(f"{device}: {device_name(device)}, torch {torch.__version__}", flush=True)
    failed = 0
    for name in options.parts:
        if name not in options.again and done(setting, name):
            print(f"{name}: there already", flush=True)
            continue
        result = run_part(name, setting)
        failed += result["status"] != "done"
        shown = {key: value for key, value in result.items() if key not in ("machine", "records")}
        print(f"{name}: {json.dumps(shown)}", flush=True)
    return failed


def done(setting: Setting, name: str) -> bool:
    """Whether a result of this device is there."""
    file = setting.results / f"{name}.json"
    if not file.is_file():
        return False
    result = json.loads(file.read_text())
    return result["status"] == "done" and result["machine"]["device"] == device_name(setting.device)


def run_part(name: str, setting: Setting) -> Json:
    """Runs a part, and writes down what it came to, whatever that is."""
    part, began = PARTS[name], time.monotonic()
    status = "done" if part.command is None else run_command(name, part, setting)
    found: Json = {}
    if status == "done":
        try:
            found = part.found(setting)
        except (OSError, ValueError, KeyError, statistics.StatisticsError) as error:
            status = f"its results cannot be read: {error!r}"
    seconds = round(time.monotonic() - began, 1)
    result = {"status": status, "seconds": seconds, "machine": machine(setting.device), **found}
    partial_file = setting.results / f"{name}.partial"
    partial_file.write_text(json.dumps(result, indent=1))
    partial_file.replace(setting.results / f"{name}.json")
    return result


def run_command(name: str, part: Part, setting: Setting) -> str:
    """Runs a part's command in a session of its own, which is ended as a whole at the limit."""
    assert part.command is not None
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path()}
    log = setting.results / f"{name}.log"
    try:
        command = part.command(setting)
    except subprocess.CalledProcessError as error:
        return f"it could not be prepared: {error}; {error.stderr}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=setting.results,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(setting.limit_s(part))
        except subprocess.TimeoutExpired:
            return f"ended at its limit of {setting.limit_s(part):g} s (see {log.name})"
        finally:
            end(process)
    return "done" if code == 0 else f"exit status {code} (see {log.name})"


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started and left: asked first, for servers to go."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            continue


def machine(device: str) -> Json:
    """What numbers are of."""
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    return {"device": device_name(device), "host": platform.node(), **versions}


def device_name(device: str) -> str:
    """The GPU's, or that it is none."""
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def python_path() -> str:
    """The package, the tools, and what was there."""
    return os.pathsep.join(filter(None, [str(ROOT), str(TOOLS), os.environ.get("PYTHONPATH", "")]))


def tests(setting: Setting) -> list[str]:
    report = f"--junit-xml={setting.results / 'tests.xml'}"
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", report, str(ROOT / "tests/gpu")]


def tests_found(setting: Setting) -> Json:
    from xml.etree import ElementTree

    suite = next(iter(ElementTree.parse(setting.results / "tests.xml").getroot()))
    return {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}


def loss(setting: Setting) -> list[str]:
    command = [sys.executable, str(TOOLS / "bench_loss.py"), "--json", "loss-records.json", "--rounds"]
    return [*command, "1", "--small"] if setting.small else [*command, "5", "--device", "cuda"]


def loss_found(setting: Setting) -> Json:
    records = json.loads((setting.results / "loss-records.json").read_text())
    ours = [one for one in records if one.get("variant") == "this package"]
    return {"to_plain": [round(one["to_plain"], 3) for one in ours], "records": records}


def step(setting: Setting) -> list[str]:
    sizes = ["--prompts", "2", "--tokens", "32"] if setting.small else ["--prompts", "8", "--tokens", "1024"]
    command = [sys.executable, str(TOOLS / "gpu_step.py"), "step-records.json", "--device", setting.device]
    return [*command, *setting.shape, *sizes]


def step_found(setting: Setting) -> Json:
    return dict(json.loads((setting.results / "step-records.json").read_text()))


def run(setting: Setting, name: str, more: str = "") -> list[str]:
    """A run of `megatron-rapo train`; the model is made by the first."""
    if not (setting.results / "model").exists():
        command = [sys.executable, str(TOOLS / "gpu_step.py"), "model", "--make", *setting.shape]
        subprocess.run(
            command,
            cwd=setting.results,
            env={**os.environ, "PYTHONPATH": python_path()},
            check=True,
            capture_output=True,
            text=True,
        )
    directory = f"{name}-{time.time_ns()}"  # a run does not go on with what an ended one left
    (setting.results / f"{name}.directory").write_text(directory)
    text = CONFIG.format(
        directory=directory,
        device=setting.device,
        dtype="float32" if setting.small else "bfloat16",
        prompts=2 if setting.small else 16,
        tokens=16 if setting.small else 128,
        more=more,
    )
    (setting.results / f"{name}.toml").write_text(text)
    main_of = "import sys; from megatron_rapo.cli import main; sys.exit(main())"
    return [sys.executable, "-c", main_of, "train", f"{name}.toml"]


def offload(setting: Setting) -> list[str]:
    """Without a GPU all is in host memory: the same run once more."""
    return run(setting, "offload", "" if setting.small else IN_HOST_MEMORY)


def steps_of(setting: Setting, name: str) -> list[Json]:
    directory = setting.results / (setting.results / f"{name}.directory").read_text()
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["step"] > 1]  # the first compiles


def run_found(setting: Setting, name: str = "run") -> Json:
    steps = steps_of(setting, name)
    names = (
        *("time/step_s", "time/rollout_s", "time/annotate_s", "time/update_s", "time/publish_s"),
        *("throughput/tokens_per_s", "throughput/rollout_tokens_per_s", "throughput/mfu"),
        *("memory/peak_gib", "publish/probe_difference", "publish/gb_per_s"),
    )
    found = {one: [line[one] for line in steps if line.get(one) is not None] for one in names}
    return {one: statistics.median(values) for one, values in found.items() if values}


def offload_found(setting: Setting) -> Json:
    mine, plain = steps_of(setting, "offload"), steps_of(setting, "run")
    apart = max(abs(a["loss/total"] - b["loss/total"]) for a, b in zip(mine, plain, strict=True))
    freed = plain[-1]["memory/peak_gib"] - mine[-1]["memory/peak_gib"]
    return {**run_found(setting, "offload"), "freed_gib": freed, "loss_apart": apart}


def mismatch_found(setting: Setting) -> Json:
    steps = [line for name in ("run", "offload") for line in steps_of(setting, name)]
    names = sorted({name for line in steps for name in line if name.startswith("mismatch/")})
    if not names:
        raise ValueError("the runs logged no mismatch")
    return {
        name: statistics.median(line[name] for line in steps if line.get(name) is not None) for name in names
    }


PARTS = {
    "tests": Part(90, tests, tests_found),
    "loss": Part(75, loss, loss_found),
    "step": Part(75, step, step_found),
    "run": Part(120, partial(run, name="run"), run_found),
    "offload": Part(100, offload, offload_found),
    "mismatch": Part(1, None, mismatch_found),
}

if __name__ == "__main__":
    sys.exit(main())
