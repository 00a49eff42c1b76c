"""RAPO at scale: RL with verifiable rewards on Megatron-Core, with rollouts from SGLang or vLLM servers."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rapo.api import evaluate as evaluate
    from megatron_rapo.api import train as train
    from megatron_rapo.episode.environment import Environment as Environment
    from megatron_rapo.episode.environment import Generate as Generate
    from megatron_rapo.episode.environment import Transcript as Transcript
    from megatron_rapo.episode.environment import Turn as Turn
    from megatron_rapo.episode.episode import Episode as Episode
    from megatron_rapo.episode.guide import Guide as Guide
    from megatron_rapo.episode.problem import Problem as Problem
    from megatron_rapo.episode.score import Score as Score
    from megatron_rapo.episode.sequence import Sequence as Sequence
    from megatron_rapo.errors import RapoError as RapoError
    from megatron_rapo.methods.method import Method as Method
    from megatron_rapo.methods.options import Options as Options
    from megatron_rapo.methods.terms.term import AtToken as AtToken
    from megatron_rapo.methods.terms.term import Need as Need
    from megatron_rapo.methods.terms.term import Term as Term
    from megatron_rapo.section import Section as Section

__version__ = "0.1.0"

# What users import (docs/python.md); looked up when it is asked for, as most commands need none of it.
_PUBLIC = {
    "train": "megatron_rapo.api",
    "evaluate": "megatron_rapo.api",
    "RapoError": "megatron_rapo.errors",
    "Environment": "megatron_rapo.episode.environment",
    "Generate": "megatron_rapo.episode.environment",
    "Transcript": "megatron_rapo.episode.environment",
    "Turn": "megatron_rapo.episode.environment",
    "Episode": "megatron_rapo.episode.episode",
    "Guide": "megatron_rapo.episode.guide",
    "Problem": "megatron_rapo.episode.problem",
    "Score": "megatron_rapo.episode.score",
    "Sequence": "megatron_rapo.episode.sequence",
    "Method": "megatron_rapo.methods.method",
    "Options": "megatron_rapo.methods.options",
    "AtToken": "megatron_rapo.methods.terms.term",
    "Need": "megatron_rapo.methods.terms.term",
    "Term": "megatron_rapo.methods.terms.term",
    "Section": "megatron_rapo.section",
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *globals()]


# What libraries warn of on every rank although nothing is to be done about it. They must be silenced before
# Megatron is imported, hence here.
_KNOWN_AND_HARMLESS = (
    # The layer spec without Transformer Engine and Apex is chosen on purpose (model/layer_spec.py).
    r"(Transformer Engine and Apex are|Apex is) not installed",
    # A default of megatron-core's own configuration, and a part of it that is not used.
    r"full scope is deprecated",
    r"MimoModelConfig is experimental",
    # The CPU adapter hands Megatron's own accesses on (megatron_repairs/cpu.py).
    r"The \.grad attribute of a Tensor that is not a leaf",
    # megatron-core with torch 2.13 and 2.14.
    r"`torch\.distributed\.\w+` is deprecated",
    r"`load_state_dict` is deprecated and will be removed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    r"The argument order of load has been changed",
)
for _message in _KNOWN_AND_HARMLESS:
    warnings.filterwarnings("ignore", message=_message)

__all__ = [
    "AtToken",
    "Environment",
    "Episode",
    "Generate",
    "Guide",
    "Method",
    "Need",
    "Options",
    "Problem",
    "RapoError",
    "Score",
    "Section",
    "Sequence",
    "Term",
    "Transcript",
    "Turn",
    "__version__",
    "evaluate",
    "train",
]
