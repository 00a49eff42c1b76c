"""Methods by name, with the options that a test sets."""

from __future__ import annotations

from typing import Any

from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling

# Whose advantages are made of rewards, group by group or over the batch, and whose tokens all count;
# tests/unit/test_zoo.py has the others.
OF_REWARDS = ("rapo", "grpo", "dapo", "dr_grpo", "gspo", "lite_ppo", "rloo", "dgpo", "distill")


def a_method(name: str = "rapo", *, max_response_tokens: int = 10, **options: Any) -> Method:
    """The method of that name, on its own: `a_method("grpo", divergence="k2")`."""
    method = METHODS[name]
    given = {**method.example, **options}
    return method(method.Options(method=name, **given), Sampling(1.0, 4, max_response_tokens))
