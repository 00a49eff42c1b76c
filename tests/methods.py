"""Methods by name, with the options that a test sets."""

from __future__ import annotations

from typing import Any

from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling


def a_method(name: str = "rapo", *, max_response_tokens: int = 10, **options: Any) -> Method:
    """The method of that name, on its own: `a_method("grpo", divergence="k2")`."""
    method = METHODS[name]
    return method(method.Options(method=name, **options), Sampling(1.0, 4, max_response_tokens))
