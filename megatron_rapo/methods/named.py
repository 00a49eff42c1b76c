"""The methods that have a name."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rapo.methods.aepo import AEPO
from megatron_rapo.methods.ampo import AMPO
from megatron_rapo.methods.apo import APO
from megatron_rapo.methods.arpo import ARPO
from megatron_rapo.methods.aspo import ASPO
from megatron_rapo.methods.bapo import BAPO
from megatron_rapo.methods.c_grpo import CGRPO
from megatron_rapo.methods.capo import CAPO
from megatron_rapo.methods.clpo import CLPO
from megatron_rapo.methods.copg import CoPG
from megatron_rapo.methods.critique_grpo import CritiqueGRPO
from megatron_rapo.methods.d3s import D3S
from megatron_rapo.methods.dapo import DAPO
from megatron_rapo.methods.dcpo import DCPO
from megatron_rapo.methods.dgpo import DGPO
from megatron_rapo.methods.distill import Distill
from megatron_rapo.methods.dph_rl import DPHRL
from megatron_rapo.methods.dr_grpo import DrGRPO
from megatron_rapo.methods.eapo import EAPO
from megatron_rapo.methods.empo import EMPO
from megatron_rapo.methods.epo import EPO
from megatron_rapo.methods.expo import ExPO
from megatron_rapo.methods.ghpo import GHPO
from megatron_rapo.methods.grpo import GRPO
from megatron_rapo.methods.gspo import GSPO
from megatron_rapo.methods.hapo import HAPO
from megatron_rapo.methods.hbpo import HBPO
from megatron_rapo.methods.hpt import HPT
from megatron_rapo.methods.icpo import ICPO
from megatron_rapo.methods.igpo import IGPO
from megatron_rapo.methods.lite_ppo import LitePPO
from megatron_rapo.methods.mara import MARA
from megatron_rapo.methods.matched_entropy import MatchedEntropy
from megatron_rapo.methods.matched_kl import MatchedKL
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.open_rs import OpenRS
from megatron_rapo.methods.otc import OTC
from megatron_rapo.methods.polychromic import Polychromic
from megatron_rapo.methods.rapo import RAPO
from megatron_rapo.methods.rex_rag import RexRAG
from megatron_rapo.methods.riskpo import RiskPO
from megatron_rapo.methods.rloo import RLOO
from megatron_rapo.methods.sage import SAGE
from megatron_rapo.methods.scaf_grpo import ScafGRPO
from megatron_rapo.methods.sft import SFT
from megatron_rapo.methods.tapo import TAPO
from megatron_rapo.methods.xrpo import XRPO
from megatron_rapo.methods.zero_success import ZeroSuccess

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
    "sft": SFT,
    "hpt": HPT,
    "ghpo": GHPO,
    "open_rs": OpenRS,
    "empo": EMPO,
    "hbpo": HBPO,
    "bapo": BAPO,
    "hapo": HAPO,
    "d3s": D3S,
    "capo": CAPO,
    "dcpo": DCPO,
    "riskpo": RiskPO,
    "polychromic": Polychromic,
    "copg": CoPG,
    "zero_success": ZeroSuccess,
    "epo": EPO,
    "aepo": AEPO,
    "dph_rl": DPHRL,
    "sage": SAGE,
    "mara": MARA,
    "matched_entropy": MatchedEntropy,
    "matched_kl": MatchedKL,
    "aspo": ASPO,
    "otc": OTC,
    "tapo": TAPO,
    "eapo": EAPO,
    "arpo": ARPO,
    "igpo": IGPO,
    "apo": APO,
    "c_grpo": CGRPO,
    "scaf_grpo": ScafGRPO,
    "critique_grpo": CritiqueGRPO,
    "expo": ExPO,
    "icpo": ICPO,
    "ampo": AMPO,
    "rex_rag": RexRAG,
    "clpo": CLPO,
    "xrpo": XRPO,
}
"""By what `algorithm.method` calls them."""
