"""Lets tensors be pickled for processes that have no megatron-core.

From 0.17 on, importing it replaces `torch.storage._load_from_bytes` by a function that trusts no pickle
within a pickle. A pickled tensor names that function, and by its own module, megatron.core.safe_globals,
which engines do not have and would refuse.
"""

from __future__ import annotations

import torch

VERSIONS = ">=0.17,<0.20"


def repair() -> None:
    """Names the safe function as torch names the one that it replaced."""
    safe = torch.storage._load_from_bytes
    safe.__module__ = torch.storage.__name__
    safe.__name__ = safe.__qualname__ = "_load_from_bytes"
