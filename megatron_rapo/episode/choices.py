"""The experts that tokens were sent to, as they are written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Choices = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class ChoiceShape:
    """Choices of a mixture's routers, `[tokens, layers, chosen]`.

    Attributes:
        layers: with a router.
        experts: of a layer.
        chosen: for a token.
    """

    layers: int
    experts: int
    chosen: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest that has a number of each expert, and one more."""
        return np.dtype(np.uint8 if self.experts < 256 else np.uint16)

    @property
    def unknown(self) -> int:
        """What stands for a choice that nobody told: no expert's number."""
        return int(np.iinfo(self.dtype).max)

    def untold(self, tokens: int) -> Choices:
        """Unknown choices of so many tokens."""
        return np.full((tokens, self.layers, self.chosen), self.unknown, self.dtype)
