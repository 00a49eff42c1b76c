"""Times how long a run needs to name a rank that is dead or hangs, a silent engine, verifiers that deadlock.

    python tools/hang_times.py OUT              # all CASES, a minute each; goes on where it was ended
    python tools/hang_times.py OUT --cases 2    # ends after so many
    python tools/hang_times.py OUT --table      # what stands in OUT so far

Each case is a small run of its own (crashes/run.py) with short limits (SETTINGS). In its third step a fault
is planted, and the time is taken until the run's output names it. Stopped processes (SIGSTOP) are the engines
that accept and never answer: the kernel takes connections for them. Other faults are the method's (PLANTED),
once the tool asks for them.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import signal
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from crash_test import ending
from crashes.run import Run, wait

STEP = 3  # before it phases are measured
LIMIT_S = 300.0
SETTINGS = (
    'algorithm.method="planted:Planted"',
    "observe.hang_least_s=20",
    "rollout.request_timeout_s=20",
    "rollout.health_interval_s=3",
    "evaluate.every=1",
    "run.steps=1000",
)
PLANTED = '''
import os
import time
from pathlib import Path

import torch.distributed as dist

from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.reward.verifier import Verifier

hand_out = Verifier._hand_out


def asked_for(fault):
    """Whether it is, the first time that it is looked for."""
    try:
        Path(__file__).with_name(fault).unlink()
    except FileNotFoundError:
        return False
    return True


class Planted(GRPO):
    def advantages(self, groups):
        if os.environ["RANK"] == "1" and asked_for("sleeps"):
            sleep_for_ever()
        if os.environ["RANK"] == "1" and asked_for("calls another collective"):
            dist.barrier()
        return super().advantages(groups)


def sleep_for_ever():
    time.sleep(10_000)


def deadlock(self, under_way):
    if asked_for("deadlock"):
        sleep_for_ever()
    return hand_out(self, under_way)


Verifier._hand_out = deadlock
'''


@dataclass(frozen=True)
class Case:
    """What is done to whom in which phase, and what then must stand in the output.

    Attributes:
        named: a pattern.
        limit_s: until then; None: twice the bound that the report tells.
    """

    does: str
    victim: str
    phase: str
    named: str
    limit_s: float | None = None


HANG = r"no progress: rank \d+ has been in {} of step \d+ for \d+ s, over the bound of (\d+) s[\s\S]*{}"
OUT = r"engine \S+ is out \(.*\): .*"
REQUEST_S = 20.0
HEALTH_S = 18.0  # three looks, each waited for as long as is between them
SLACK_S = 10.0
CASES = (
    Case("SIGKILL", "a rank", "update", r"rank \d was killed by SIGKILL", 30.0),
    Case("SIGSTOP", "a rank", "update", HANG.format("[a-z]+", r"rank \d does not answer: its .* stopped")),
    Case("sleeps", "a rank", "annotate", HANG.format("[a-z]+", "rank 1 holds up .*")),
    Case("calls another collective", "a rank", "annotate", HANG.format("[a-z]+", "rank 1 waits in barrier")),
    Case("deadlock", "verifiers", "rollout", HANG.format("(?:reward|rollout)", "the stack of rank 0 ")),
    Case("SIGSTOP", "engine", "rollout", OUT, max(REQUEST_S, HEALTH_S) + SLACK_S),
    Case("SIGSTOP", "engine", "update", OUT, max(REQUEST_S, HEALTH_S) + SLACK_S),
    Case("SIGSTOP", "engine", "publish", OUT, REQUEST_S + SLACK_S),
    Case("SIGSTOP", "engine", "evaluate", OUT, max(REQUEST_S, HEALTH_S) + SLACK_S),
)  # fmt: skip


def measured(out: Path, number: int) -> dict[str, Any]:
    """One case: how long it took until it was named, and the limit, in seconds."""
    case = CASES[number]
    folder = out / f"case_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    run = Run(folder, None, SETTINGS)
    (folder / "planted.py").write_text(PLANTED)
    with ending(run):
        run.start()
        wait(lambda: run.ended() or run.phase() == (STEP, case.phase), LIMIT_S)
        if run.phase() != (STEP, case.phase):
            raise SystemExit(f"the run did not come to {case.phase} of step {STEP}:\n{run.said()[-3000:]}")
        if case.does.startswith("SIG"):
            run.members(case.victim)[-1].send_signal(signal.Signals[case.does])
        else:
            (folder / case.does).touch()
        began = time.monotonic()
        named = wait(lambda: re.search(case.named, run.said()) is not None, LIMIT_S, pause=0.05)
        seconds = time.monotonic() - began
    found = re.search(case.named, run.said())
    bound = None if found is None or case.limit_s is not None else float(found[1])
    limit = case.limit_s if bound is None else 2 * bound
    return {
        "case": number,
        **{name: getattr(case, name) for name in ("does", "victim", "phase")},
        "named": named,
        "seconds": round(seconds, 1),
        "bound_s": bound,
        "limit_s": limit,
        "said": "" if found is None else found[0].splitlines()[0],
    }


def table(lines: list[dict[str, Any]]) -> str:
    """A row a case."""
    rows = [["fault", "in", "named after", "limit", "bound", "as"], ["---"] * 6]
    for line in sorted(lines, key=lambda line: line["case"]):
        after = f"{line['seconds']:g} s" if line["named"] else "not at all"
        bound = f"{line['bound_s']:g} s" if line["bound_s"] else ""
        who = f"{line['does']}, {line['victim']}"
        rows.append([who, line["phase"], after, f"{line['limit_s']:g} s", bound, line["said"]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Measures what is not in the folder yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of runs and results")
    parser.add_argument("--cases", type=int, help="end after so many; the same command goes on")
    parser.add_argument("--table", action="store_true", help="only print what stands there")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out.absolute() / "hangs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    left = [number for number in range(len(CASES)) if number not in {line["case"] for line in lines}]
    for number in islice(left, 0 if options.table else options.cases):
        lines.append(measured(options.out.absolute(), number))
        with file.open("a") as results:
            results.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))
    if any(not line["named"] or line["seconds"] > line["limit_s"] for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
