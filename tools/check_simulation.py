"""Simulated runs beside real ones: the time of a step, and the share of time that engines were idle.

    python tools/check_simulation.py here.toml --json result.json     # here.toml: megatron-rapo calibrate
    python tools/check_simulation.py here.toml --sleeping             # on one core: engines wait instead

Real runs of `megatron-rapo train` on this machine, one after the other: a trainer of one rank beside embedded
servers. Responses have given lengths, as in `bench_ahead.py`. The first run, synchronous and with responses
of one length, says how wrong the profile is (`plan --corrected-by`); it then is no test. The others sample
other lengths, with other engines, ahead, or in part, and are simulated with that correction, and with lengths
that are known before. A second simulation ("its phases") has the trainer's phases as long as they were in the
run itself: where a machine is shared, it tells the order of things apart from how long they take. Told are
medians over steps after the first five, with errors, and points of idle share.

With --sleeping, an engine waits as long as it says a token takes, and makes its tokens up: all else is real,
such as requests, batches, weights and their proof. That takes one core; trainer and engines together take
several.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench_ahead import CONFIG, ENVIRONMENT, TIMES_LONGER, WARM_UP, make_model

from megatron_rapo.config import load_config
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.step_lines import read_step_lines
from megatron_rapo.planning.configured import as_configured
from megatron_rapo.planning.plan import Planner
from megatron_rapo.planning.profile import Profile, read_profile
from megatron_rapo.planning.workload import workload_of
from megatron_rapo.simulation.conditions import Conditions
from megatron_rapo.simulation.correction import corrected_by
from megatron_rapo.simulation.lengths import read_lengths
from megatron_rapo.simulation.run import simulate
from megatron_rapo.simulation.seconds import Corrected, Correction, Seconds
from megatron_rapo.timeline.idle import idle_by_cause
from megatron_rapo.timeline.trace import load

BAR = 0.15
PROMPT_TOKENS = 4
TAIL = 0.1  # share of responses that are TIMES_LONGER as long
SLEEPING = '''
"""Embedded servers that wait in place of sampling; greedy requests, which prove the weights, are real."""

import asyncio
import math
import random
from collections import Counter

import numpy as np

from megatron_rapo.engines.embedded.client import EmbeddedClient
from megatron_rapo.engines.embedded.kind import Embedded
from megatron_rapo.engines.embedded.options import EmbeddedOptions
from megatron_rapo.engines.engine import Generated


class Client(EmbeddedClient):
    async def generate(self, wanted, *, timeout=None):
        if wanted[0].temperature == 0:
            return await super().generate(wanted, timeout=timeout)
        if not hasattr(self, "lock"):
            self.lock = asyncio.Lock()
        async with self.lock:
            ends = Counter(one.max_tokens for one in wanted)
            running, last, seconds = len(wanted), 0, 0.0
            for tokens in sorted(ends):
                seconds += (tokens - last) * (STEP_S + running * RESPONSE_S)
                running, last = running - ends[tokens], tokens
            await asyncio.sleep(seconds)
            version = await self.weight_version()
        return [made_up(one, version) for one in wanted]


def made_up(one, version):
    draw = random.Random(one.seed)
    tokens = [draw.randrange(2, VOCABULARY) for _ in range(one.max_tokens)]
    log_probs = np.full(len(tokens), -math.log(VOCABULARY), np.float32)
    return Generated(np.array(tokens), log_probs, (version,), "length")


class Options(EmbeddedOptions):
    kind: str


class Sleeping(Embedded):
    Options = Options

    @property
    def connect(self):
        return Client
'''


@dataclass(frozen=True)
class Case:
    """A run: whether some responses are longer, and what its configuration says beside the first one's."""

    name: str
    tail: bool = False
    options: tuple[str, ...] = ()


CASES = (
    Case("synchronous, one length"),
    Case("synchronous, with a tail", True),
    Case("synchronous, with a tail, two engines", True, ("rollout.engine.servers=2",)),
    Case("one step ahead, with a tail", True, ("rollout.max_staleness=1",)),
    Case("one step ahead, two engines", True, ("rollout.max_staleness=1", "rollout.engine.servers=2")),
    Case("partial responses", True, ("rollout.max_staleness=4", "rollout.partial_tokens={tokens}")),
)


def main() -> None:
    """Runs, simulates, and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("profile", help="of megatron-rapo calibrate, on this machine")
    parser.add_argument("--sleeping", action="store_true")
    parser.add_argument("--step-s", type=float, default=0.02, help="with --sleeping: of a token")
    parser.add_argument("--response-s", type=float, default=0.001, help="with --sleeping: of a response")
    parser.add_argument("--prompts", type=int, default=4, help="of a step, with 8 responses each")
    parser.add_argument("--tokens", type=int, default=48, help="of most responses")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--cases", nargs="+", type=int, help="numbers, from 1; default: all")
    parser.add_argument("--json", type=lambda name: Path(name).resolve())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = check(Path(name), read_profile(options.profile), options)
    print("\n".join(table(found)))


def check(folder: Path, profile: Profile, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each case, what was measured and simulated."""
    os.chdir(folder)  # which configurations name their model from
    make_model(folder / "model", options.hidden, options.layers)
    for tail in (False, True):
        given = {"TOKENS": options.tokens, "TAIL": TAIL if tail else 0.0, "TIMES_LONGER": TIMES_LONGER}
        text = "\n".join([*(f"{key} = {value}" for key, value in given.items()), ENVIRONMENT])
        (folder / _module(tail=tail)).with_suffix(".py").write_text(text)
        few = round(1 / TAIL) - 1
        lengths = [options.tokens] * few + [options.tokens * (TIMES_LONGER if tail else 1)]
        (folder / f"lengths-{tail}").write_text("\n".join(map(str, lengths)))
    if options.sleeping:
        known = {"STEP_S": options.step_s, "RESPONSE_S": options.response_s, "VOCABULARY": 4096}
        text = "\n".join([*(f"{key} = {value}" for key, value in known.items()), SLEEPING])
        (folder / "sleeping.py").write_text(text)
    found: dict[str, dict[str, Any]] = {}
    correction = Correction()
    for number, case in enumerate(CASES):
        if number and options.cases and number not in options.cases:
            continue
        run(folder, case, f"run-{number}", options)
        if number == 0:
            correction = corrected_by(folder / "run-0", profile)
            print(correction, file=sys.stderr, flush=True)
        found[case.name] = compare(folder, case, number, profile, correction)
        print(f"{case.name}: {found[case.name]}", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps({"cases": found, "load": os.getloadavg()}, indent=1))
    return found


def compare(
    folder: Path, case: Case, number: int, profile: Profile, correction: Correction
) -> dict[str, Any]:
    """A real run beside both simulations of it."""
    real, others = folder / f"run-{number}", (f"simulated-{number}", f"ordered-{number}")
    for name, one in zip(others, (correction, with_phases_of(real, correction)), strict=True):
        imagine(folder, case, real.name, name, profile, one)
    found = [measured(folder / name) for name in (real.name, *others)]
    return dict(zip(("real", "simulated", "ordered"), found, strict=True))


def with_phases_of(directory: Path, correction: Correction) -> Correction:
    """The correction with the trainer's own phases as long as they were in this run, in the median."""
    lines = [line for line in read_step_lines(directory / "metrics.jsonl") if line["step"] > WARM_UP]

    def own(name: str) -> Corrected:
        return Corrected(0.0, statistics.median(line[f"time/{name}_s"] for line in lines))

    return replace(correction, annotate=own("annotate"), update=own("update"), publish=own("publish"))


def run(folder: Path, case: Case, name: str, options: argparse.Namespace) -> None:
    """A real run."""
    longest = options.tokens * (TIMES_LONGER if case.tail else 1)
    text = CONFIG.format(
        directory=name, steps=options.steps, prompts=options.prompts, longest=longest, ahead=""
    )
    text = text.replace("given_lengths:", f"{_module(tail=case.tail)}:")
    if options.sleeping:
        text = text.replace('kind = "embedded"', 'kind = "sleeping:Sleeping"')
    (folder / f"{name}.toml").write_text(text)
    command = [str(Path(sys.executable).with_name("megatron-rapo")), "train", f"{name}.toml", "--set"]
    command += ["rollout.prompts_per_request=2", *(one.format(tokens=options.tokens) for one in case.options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    if ended.returncode:
        raise SystemExit(f"{case.name} failed:\n{ended.stdout}\n{ended.stderr}")


def imagine(
    folder: Path, case: Case, name: str, target: str, profile: Profile, correction: Correction
) -> None:
    """The same run, simulated with lengths that were known before it ran."""
    config = load_config([folder / name / "config.toml"])
    lengths = read_lengths(folder / f"lengths-{case.tail}")
    load = workload_of(config, PROMPT_TOKENS, lengths.mean)
    planner = Planner(config, read_architecture(folder / "model"), load, profile)
    way = as_configured(planner, config.parallel.world_size + config.rollout.engine.count)
    simulate(config, Seconds(planner, way, correction), lengths, Conditions(), folder / target)


def measured(directory: Path) -> dict[str, float]:
    """Medians over steps: seconds, and the share of time that engines were idle."""
    lines = [line for line in read_step_lines(directory / "metrics.jsonl") if line["step"] > WARM_UP]
    last = lines[-1]["step"] - 1  # beside the last steps nothing is sampled
    idle = []
    for parts in idle_by_cause(load(directory, (WARM_UP + 1, last))).values():
        idle.append(1 - parts["busy"] / sum(parts.values()))
    return {
        "step_s": statistics.median(line["time/step_s"] for line in lines if line["step"] <= last),
        "idle": statistics.fmean(idle),
    }


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """For people: of each run, then how many are within the bars."""
    lines = ["| run | step, real | simulated | its phases | idle, real | simulated | its phases |"]
    lines.append("|---|---|---|---|---|---|---|")
    within = {"simulated": 0, "ordered": 0}
    for number, (name, one) in enumerate(found.items()):
        real = one["real"]
        cells = {"step_s": [f"{real['step_s']:.2f} s"], "idle": [f"{real['idle']:.0%}"]}
        for kind in within:
            error = one[kind]["step_s"] / real["step_s"] - 1
            apart = one[kind]["idle"] - real["idle"]
            within[kind] += number > 0 and abs(error) <= BAR and abs(apart) <= BAR
            cells["step_s"].append(f"{one[kind]['step_s']:.2f} s ({error:+.0%})")
            cells["idle"].append(f"{one[kind]['idle']:.0%} ({100 * apart:+.0f})")
        told = name if number else f"{name} (says how wrong the profile is)"
        lines.append(f"| {told} | {' | '.join([*cells['step_s'], *cells['idle']])} |")
    counts = ", ".join(f"{count} of {len(found) - 1} {kind}" for kind, count in within.items())
    return [*lines, "", f"within {BAR:.0%} and {100 * BAR:.0f} points: {counts}"]


def _module(*, tail: bool) -> str:
    return "lengths_with_a_tail" if tail else "given_lengths"


if __name__ == "__main__":
    main()
