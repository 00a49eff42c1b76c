"""Arms that follow others: `@run` among their options is a folder with the metrics of the first run.

It is made of that run's result, so that it is there as long as the small tables are.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rapo.folder import write_whole
from megatron_rapo.study.plan import FOLLOWED
from megatron_rapo.study.results import Result


def leave_metrics(folder: Path, result: Result) -> None:
    """Writes the metrics of a run that others follow, where they are not there."""
    file = folder / FOLLOWED / result.run / "metrics.jsonl"
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "step": step,
            **{name: path[place] for name, path in result.paths.items() if path[place] is not None},
        }
        for place, step in enumerate(result.steps)
    ]
    write_whole(file, "".join(json.dumps(line) + "\n" for line in lines))
