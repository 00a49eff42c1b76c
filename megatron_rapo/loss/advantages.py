"""How much better a response was than the others to the same prompt."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def group_advantages(rewards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """GRPO's group-relative advantage, A = (r − mean r) / std r (RAPO, arXiv 2510.03865, section 3).

    The standard deviation is the sample's (n − 1), as in TRL and verl. A group without variance has A = 0.

    Args:
        rewards: `[groups, responses]`, at least two responses a group.
    """
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    deviation = rewards.std(axis=1, ddof=1, keepdims=True)
    return np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
