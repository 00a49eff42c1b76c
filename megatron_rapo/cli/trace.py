"""`megatron-rapo trace`: when ranks and engines did what, as a trace file."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole, writing_to


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    trace = commands.add_parser(
        "trace",
        help="write when ranks and engines did what",
        description="Writes a trace of all ranks and engines, which https://ui.perfetto.dev shows, and says "
        "for how long engines were idle, and why (docs/ahead.md).",
    )
    trace.add_argument("run", type=Path, metavar="RUN", help="a run's directory")
    trace.add_argument("--output", type=Path, metavar="FILE", help="default: RUN/timeline/trace.json")
    trace.add_argument("--steps", metavar="FIRST-LAST", help="default: all, with what is before the first")
    trace.set_defaults(command=_trace)


def _trace(options: argparse.Namespace) -> int:
    from megatron_rapo.timeline.idle import told
    from megatron_rapo.timeline.simulated import is_simulated
    from megatron_rapo.timeline.trace import chrome_trace, load

    simulated = " (simulated)" if is_simulated(options.run) else ""
    run = load(options.run, _steps(options.steps))
    output = options.output or options.run / "timeline" / "trace.json"
    with writing_to(output.parent, "--output"):
        write_whole(output, json.dumps(chrome_trace(run, simulated)))
    if simulated:
        print(f"{options.run} was simulated, and never ran:")
    for line in told(run):
        print(line)
    print(f"{output}  to be opened at https://ui.perfetto.dev")
    return 0


def _steps(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not found or int(found[2] or found[1]) < int(found[1]):
        raise RapoError(f'--steps {text} names no steps; write them like "3-8", or "3"')
    return int(found[1]), int(found[2] or found[1])
