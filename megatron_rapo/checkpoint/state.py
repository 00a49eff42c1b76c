"""What a step's state is, besides weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """Where training stands between two steps.

    Everything else follows from it: the weight version and the learning rate from the step, sampling seeds
    from `run.seed` and the step.

    Attributes:
        step: steps done; also the version of the weights.
        prompts_drawn: prompts taken from the training set so far.
        method: whose state it is (`algorithm.method`).
        method_state: what the method learnt of the run, as JSON.
        guards: what the guards remember, as JSON.
    """

    step: int = 0
    prompts_drawn: int = 0
    method: str = ""
    method_state: Any = None
    guards: Any = None
