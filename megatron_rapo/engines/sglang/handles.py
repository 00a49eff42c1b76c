"""Tensors as handles of memory, as SGLang's MultiprocessingSerializer makes them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler

from torch import Tensor, multiprocessing


def handles(named: Sequence[tuple[str, Tensor]]) -> str:
    """Names and handles of tensors, for one reader.

    torch counts handles: memory is free again once as many were opened as were made, so each reader gets its
    own.
    """
    strategy = multiprocessing.get_sharing_strategy()
    multiprocessing.set_sharing_strategy("file_system")
    try:
        return base64.b64encode(ForkingPickler.dumps(list(named))).decode()
    finally:
        multiprocessing.set_sharing_strategy(strategy)
