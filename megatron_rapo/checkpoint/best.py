"""Which checkpoint of a run was evaluated best: `<run>/checkpoints/best.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import write_whole

FILE = "best.json"


class BestCheckpoint:
    """The step with the highest value of a metric, as long as its checkpoint is there.

    Attributes:
        step, value: None until a step was evaluated.
    """

    def __init__(self, directory: Path, metric: str) -> None:
        """Reads what an earlier start of the run left; a value of another metric is forgotten.

        Raises:
            RapoError: the file is damaged.
        """
        self.metric = metric
        self.step: int | None = None
        self.value: float | None = None
        self._file = directory / FILE
        if not self._file.is_file():
            return
        try:
            record = json.loads(self._file.read_text())
            step, value, measured = int(record["step"]), float(record["value"]), record["metric"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RapoError(f"{self._file} is damaged ({error!r}); remove it to begin anew") from error
        if measured == metric and (directory / f"step_{step:06d}").is_dir():
            self.step, self.value = step, value

    def take(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the step is the best so far; it is taken for it then. Call it on all ranks alike."""
        value = metrics.get(f"evaluate/{self.metric}")
        if value is None or (self.value is not None and value <= self.value):
            return False
        self.step, self.value = step, value
        return True

    def told(self, step: int) -> str | None:
        """What the file is to say once the step's checkpoint is complete; None where it is not the best."""
        record = {"step": self.step, "metric": self.metric, "value": self.value}
        return json.dumps(record, indent=1) + "\n" if self.step == step else None

    def write(self, told: str) -> None:
        """Leaves the best step for people and the run's next start; the main rank's, once it is saved."""
        write_whole(self._file, told)
