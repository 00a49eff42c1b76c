"""What the engines return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_rapo.episode.choices import Choices


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        token_ids: `[tokens]` int32, the end-of-sequence token included where the engine emitted it.
        log_probs: `[tokens]` float32, the engine's log-probs in nats, of the temperature-scaled distribution.
        weight_version: the version of the weights that sampled every one of its tokens.
        finish_reason: `stop`, or `length` where it was truncated.
        experts: `[given + tokens - 1, layers, chosen]`, that the engine sent the tokens to, those that the
            response continues first, its last one not; None where it was not asked.
    """

    token_ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    weight_version: int
    finish_reason: Literal["stop", "length"]
    experts: Choices | None = None
