"""The methods that have a name."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rapo.methods.dapo import DAPO
from megatron_rapo.methods.dgpo import DGPO
from megatron_rapo.methods.distill import Distill
from megatron_rapo.methods.dr_grpo import DrGRPO
from megatron_rapo.methods.empo import EMPO
from megatron_rapo.methods.ghpo import GHPO
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.gspo import GSPO
from megatron_rapo.methods.hbpo import HBPO
from megatron_rapo.methods.hpt import HPT
from megatron_rapo.methods.lite_ppo import LitePPO
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.open_rs import OpenRS
from megatron_rapo.methods.rapo import RAPO
from megatron_rapo.methods.rloo import RLOO

METHODS: Mapping[str, type[Method]] = {
    "rapo": RAPO,
    "grpo": GRPO,
    "dapo": DAPO,
    "dr_grpo": DrGRPO,
    "gspo": GSPO,
    "lite_ppo": LitePPO,
    "rloo": RLOO,
    "dgpo": DGPO,
    "distill": Distill,
    "hpt": HPT,
    "ghpo": GHPO,
    "open_rs": OpenRS,
    "empo": EMPO,
    "hbpo": HBPO,
}
"""By what `algorithm.method` calls them."""
