"""Leaves out what megatron-core logs at every start about calls that are made on purpose.

Dense models are GPTModels as long as there are any (0.19 advises HybridModel), and DistributedDataParallel
lays out its buffers by itself (0.18 would be given the layout, and computes the same).
"""

from __future__ import annotations

import logging
from functools import partial

VERSIONS = ">=0.18,<0.20"

MADE_ON_PURPOSE = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    "megatron.core.distributed.distributed_data_parallel": "full_param_layout not provided",
}


def repair() -> None:
    """Filters these lines, and no other."""
    for name, text in MADE_ON_PURPOSE.items():
        logging.getLogger(name).addFilter(partial(_is_other, text))


def _is_other(text: str, record: logging.LogRecord) -> bool:
    return text not in record.getMessage()
