"""The router of a mixture of experts names Transformer Engine's matrix product also where there is none.

megatron/core/transformer/moe/moe_utils.py defines `te_general_gemm` where it can import it, and compares it
with None before each use (lines 34 and 1192 of 0.16.1): without Transformer Engine that is a NameError.
"""

from __future__ import annotations

from megatron.core.transformer.moe import moe_utils

VERSIONS = ">=0.16.1,<0.19"


def repair() -> None:
    """Defines it as what it is compared with."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
