"""Types of parameters by the names that options have for them, and float64, in which losses are certified."""

from __future__ import annotations

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
