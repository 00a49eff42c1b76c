"""A whole step beside TRL's: the same work, in turn on the same cores.

    make trl                                  # TRL in an environment of its own
    python tools/bench_step.py                # one core, then two
    python tools/bench_step.py --json result.json --rounds 5

On one core: GRPO with TRL's divergence (k3), this trainer with its default microbatch, with a small one, and
with `algorithm.share_prompts`, and TRL. On two: this trainer sampling ahead (`rollout.max_staleness = 1`: a
thread for the trainer, or two, and one for its engine), and TRL with two threads. Told are medians of steps
after the first three, medians over rounds, the largest sum of the processes' memory (PSS), and what the
steps' matrix products take alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from bench_ahead import VOCABULARY, make_model

WARM_UP = 3
COEFFICIENT = 0.04
PROMPT_TOKENS = 16
SMALL = 3072  # tokens of a microbatch
TASK = '''
"""Problems without a question, and rewards by chance."""

import json
import zlib
from pathlib import Path


def problems(split, seed, count=None):
    given = json.loads((Path(__file__).parent / "workload.json").read_text())
    return [{"question": question, "answer": 0} for question in given["questions"]]


def score(response, problem):
    return float(zlib.crc32(response.encode()) % 2)
'''
CONFIG = """
[run]
directory = "{name}"
steps = {steps}
[model]
path = "model"
dtype = "float32"
[data]
source = "function"
problems = "chance:problems"
template = "plain"
template_text = "{{prompt}}"
[reward]
function = "chance:score"
[rollout]
prompts_per_step = {prompts}
responses_per_prompt = {responses}
max_prompt_tokens = {prompt_tokens}
max_response_tokens = {tokens}
max_staleness = {ahead}
[rollout.engine]
kind = "embedded"
[algorithm]
method = "grpo"
divergence = "k3"
divergence_coefficient = {coefficient}
share_prompts = {shared}
minibatch_prompts = {prompts}
max_tokens_per_microbatch = {microbatch}
[checkpoint]
every_minutes = 0
[observe]
samples_every = 0
"""


@dataclass(frozen=True)
class Arm:
    """One way to make the steps."""

    name: str
    cores: int
    ahead: int = 0
    microbatch: int = 16_384
    shared: bool = False  # `algorithm.share_prompts`
    threads: int = 1  # of the trainer
    trl: bool = False


ARMS = (
    Arm("ours", 1),
    Arm(f"ours, microbatches of {SMALL}", 1, microbatch=SMALL),
    Arm(f"ours, {SMALL}, shared prompts", 1, microbatch=SMALL, shared=True),
    Arm("TRL", 1, trl=True),
    Arm("ours, ahead", 2, ahead=1),
    Arm(f"ours, ahead, {SMALL}", 2, ahead=1, microbatch=SMALL),
    Arm(f"ours, ahead, {SMALL}, shared prompts", 2, ahead=1, microbatch=SMALL, shared=True),
    Arm("the same, two threads", 2, ahead=1, microbatch=SMALL, shared=True, threads=2),
    Arm("TRL, two threads", 2, threads=2, trl=True),
)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=16, help="of a step")
    parser.add_argument("--responses", type=int, default=8, help="to a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="of a response")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl", type=Path, default=Path(__file__).parents[1] / ".venv-trl/bin/python")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.trl.exists():
        parser.error(f"there is no {options.trl}; run `make trl`, or name a Python that has TRL by --trl")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", options.hidden, options.layers)
        (folder / "chance.py").write_text(TASK)
        (folder / "workload.json").write_text(json.dumps(workload(folder, options)))
        found = measure(folder, options)
    floor = matrix_products(options)
    print(table(found, floor))
    if options.json:
        told = {"options": vars(options), "arms": found, "matrix products": floor}
        options.json.write_text(json.dumps(told, default=str, indent=1))


def workload(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What TRL is given."""
    questions = [str(10 ** (PROMPT_TOKENS - 1) + number) for number in range(options.prompts * options.steps)]
    sizes = {name: getattr(options, name) for name in ("prompts", "responses", "tokens", "steps")}
    return {
        **sizes,
        "model": str(folder / "model"),
        "questions": questions,
        "coefficient": COEFFICIENT,
        "microbatch_responses": options.prompts * options.responses // 4,
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Of each arm, the medians over rounds, and its speed against TRL's on the same cores."""
    rounds: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in ARMS}
    for number in range(options.rounds):
        for arm in ARMS:
            one = run(folder, options, arm, f"run-{number}-{ARMS.index(arm)}")
            rounds[arm.name].append(one)
            print(f"round {number}, {arm.name}: {one}", file=sys.stderr, flush=True)
    found = {}
    for arm in ARMS:
        runs = rounds[arm.name]
        against = rounds[next(other.name for other in ARMS if other.trl and other.cores == arm.cores)]
        speeds = [theirs["step_s"] / mine["step_s"] for theirs, mine in zip(against, runs, strict=True)]
        medians = {key: statistics.median(one[key] for one in runs) for key in runs[0]}
        found[arm.name] = {**medians, "speed": statistics.median(speeds)}
    return found


def run(folder: Path, options: argparse.Namespace, arm: Arm, name: str) -> dict[str, float]:
    """One run's medians over its steps, in seconds, and its memory in GiB."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arm.threads), "HF_HUB_OFFLINE": "1"}
    if arm.trl:
        script = Path(__file__).with_name("steps_of_trl.py")
        command = [str(options.trl), str(script), str(folder / "workload.json")]
    else:
        sizes = {key: getattr(options, key) for key in ("steps", "prompts", "responses", "tokens")}
        given: dict[str, Any] = {"prompt_tokens": PROMPT_TOKENS, "coefficient": COEFFICIENT}
        given |= {"ahead": arm.ahead, "microbatch": arm.microbatch, "shared": json.dumps(arm.shared)}
        text = CONFIG.format(name=name, **sizes, **given)
        (folder / f"{name}.toml").write_text(text)
        command = [str(Path(sys.executable).with_name("megatron-rapo")), "train", f"{name}.toml"]
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[: arm.cores]))
    output, gib = followed(["taskset", "--cpu-list", cores, *command], folder, environment)
    if arm.trl:
        steps = [json.loads(line) for line in output.splitlines() if line.startswith('{"step_s"')]
    else:
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        phases = ("step", "rollout", "annotate", "update")
        steps = [
            {f"{phase}_s": line.get(f"time/{phase}_s", 0.0) for phase in phases}
            for line in lines
            if line["step"] > 0
        ]
    return {
        **{key: statistics.median(step[key] for step in steps[WARM_UP:]) for key in steps[0]},
        "peak_gib": gib,
    }


def followed(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[str, float]:
    """What a command printed, and the most memory that it and what it started had together, in GiB."""
    with tempfile.TemporaryFile("w+") as output:
        ran = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True
        )
        with ThreadPoolExecutor(1) as beside:
            most = beside.submit(peak, ran)
            ran.wait(timeout=1800)
        output.seek(0)
        text = output.read()
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return text, most.result() / 2**30


def peak(ran: subprocess.Popen[str]) -> int:
    """The largest sum of a process tree's proportional set sizes, in bytes."""
    most = 0
    while ran.poll() is None:
        total = 0
        try:
            root = psutil.Process(ran.pid)
            for process in (root, *root.children(recursive=True)):
                try:
                    total += process.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):
                    continue  # it has just ended
        except psutil.NoSuchProcess:
            break
        most = max(most, total)
        time.sleep(0.25)
    return most


def matrix_products(options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step's matrix products alone, on one thread: of a forward, and with a backward's."""
    torch.set_num_threads(1)
    hidden, tokens = options.hidden, options.prompts * options.responses * (PROMPT_TOKENS + options.tokens)
    head_tokens = options.prompts * options.responses * options.tokens
    grouped = hidden // 2  # keys' and values' heads
    body = [(hidden + 2 * grouped, hidden), (hidden, hidden), (8 * hidden, hidden), (hidden, 4 * hidden)]
    shapes = [(tokens, outputs, inputs) for outputs, inputs in body]

    def forward(rows: int, outputs: int, inputs: int) -> float:
        return seconds(rows, inputs, outputs)

    def backward(rows: int, outputs: int, inputs: int) -> float:
        return seconds(rows, outputs, inputs) + seconds(outputs, rows, inputs)

    def whole(of: Callable[[int, int, int], float]) -> float:
        return options.layers * sum(of(*shape) for shape in shapes) + of(head_tokens, VOCABULARY, hidden)

    one_way = whole(forward)
    return {"forward_s": one_way, "forward_and_backward_s": one_way + whole(backward)}


def seconds(rows: int, inner: int, columns: int) -> float:
    """Of one product of `[rows, inner]` and `[inner, columns]`: the median of five."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def table(found: dict[str, dict[str, float]], floor: dict[str, float]) -> str:
    """For people."""
    columns = ("step_s", "rollout_s", "annotate_s", "update_s", "peak_gib")
    lines = [f"{'':28}cores" + "".join(f"{column:>12}" for column in columns) + f"{'to TRL':>9}"]
    for arm in ARMS:
        one = found[arm.name]
        cells = "".join(f"{one[column]:12.3f}" for column in columns)
        lines.append(f"{arm.name:28}{arm.cores:5}{cells}{one['speed']:8.2f}×")
    told = ", ".join(f"{name} {value:.3f}" for name, value in floor.items())
    return "\n".join([*lines, f"matrix products alone, one thread: {told}"])


if __name__ == "__main__":
    main()
