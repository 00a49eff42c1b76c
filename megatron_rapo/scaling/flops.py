"""The floating-point operations of a model: what its matrix products take, two a multiplication and addition.

Counted as by Chowdhery et al. (PaLM, arXiv 2204.02311, appendix B): all matrix products, the head's and
attention's among them, the latter as if every token attended to all of its sequence (s², no discount for
causality), or to a whole window; no norms, no softmax, no look-up of embeddings. What is computed again to
save memory is told apart (`recomputed_flops`). A backward pass takes twice the forward's; under adapters once
that of matrices, which then have no gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatron_rapo.config import Adapter
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import count_adapter_parameters, count_expert_adapter_parameters

FORWARD_AND_BACKWARD = 3  # times the forward pass


def forward_flops(
    architecture: Architecture, lengths: Iterable[int], attended: Iterable[int] | None = None
) -> int:
    """Of one forward pass.

    Args:
        architecture: of the model.
        lengths: tokens of each sequence, or of each segment where sequences share some (`data/trees.py`).
        attended: tokens that each attends to; default: itself.
    """
    lengths = list(lengths)
    return sum(lengths) * _matrices(architecture) + _attention(architecture, lengths, attended)


def _matrices(architecture: Architecture) -> int:
    """Of a token's products with the model's matrices."""
    queries = architecture.heads * architecture.head_dim
    keys = architecture.kv_heads * architecture.head_dim
    # Query and output projections, keys and values, and the three matrices of SwiGLU.
    layer = 2 * architecture.hidden * (2 * queries + 2 * keys + _feed_forward(architecture))
    return architecture.layers * layer + 2 * architecture.hidden * architecture.vocabulary


def _attention(architecture: Architecture, lengths: Sequence[int], attended: Iterable[int] | None) -> int:
    """Of scores, and of values weighed by them."""
    pairs = list(zip(lengths, lengths if attended is None else attended, strict=True))
    queries = architecture.heads * architecture.head_dim
    window = architecture.window
    narrow = 0 if window is None else len(window.layers)
    seen = (architecture.layers - narrow) * sum(length * keys for length, keys in pairs)
    if window is not None:
        seen += narrow * sum(length * min(keys, window.size) for length, keys in pairs)
    return 2 * 2 * queries * seen


def _feed_forward(architecture: Architecture) -> int:
    """Columns of the matrices, of `hidden` rows, that a token passes in a layer's second half."""
    experts = architecture.experts
    if experts is None:
        return 3 * architecture.feed_forward
    return 3 * (experts.chosen * architecture.feed_forward + (experts.shared or 0)) + experts.count


def _adapters(architecture: Architecture, adapter: Adapter) -> int:
    """Numbers of the adapters that a token passes: of experts those that it chooses."""
    every, of_experts = (
        count(architecture, adapter) for count in (count_adapter_parameters, count_expert_adapter_parameters)
    )
    if architecture.experts is None:
        return every
    return every - of_experts + of_experts * architecture.experts.chosen // architecture.experts.count


def training_flops(
    architecture: Architecture,
    lengths: Iterable[int],
    attended: Iterable[int] | None = None,
    adapter: Adapter | None = None,
) -> int:
    """Of a forward and a backward pass, as `forward_flops`: what an update takes; `adapter`: of it alone."""
    if adapter is None:
        return FORWARD_AND_BACKWARD * forward_flops(architecture, lengths, attended)
    lengths = list(lengths)
    trained = _attention(architecture, lengths, attended)
    trained += 2 * sum(lengths) * _adapters(architecture, adapter)
    return FORWARD_AND_BACKWARD * trained + 2 * sum(lengths) * _matrices(architecture)


def recomputed_flops(
    architecture: Architecture,
    lengths: Iterable[int],
    attended: Iterable[int] | None = None,
    adapter: Adapter | None = None,
) -> int:
    """What an update computes again under `model.recompute = "full"`: each layer's forward, no head."""
    lengths = list(lengths)
    adapters = 0 if adapter is None else 2 * sum(lengths) * _adapters(architecture, adapter)
    return forward_flops(replace(architecture, vocabulary=0), lengths, attended) + adapters


def update_computing(
    flops: int, recomputed: int, device_seconds: float, peak_tflops: float | None
) -> dict[str, float]:
    """Metrics of an update's computing: the model's operations, and those that are computed again.

    Args:
        flops: of all ranks, as `training_flops`.
        recomputed: likewise, as `recomputed_flops`.
        device_seconds: its seconds, times ranks.
        peak_tflops: of a rank's device in TFLOP/s, where it is known.

    Returns:
        Among them shares of the peak: `throughput/mfu` by the model's operations, `throughput/hfu` by all.
    """
    tflop, again = flops / 1e12, recomputed / 1e12
    rate = tflop / device_seconds
    told = {
        "compute/update_tflop": tflop,
        "compute/recomputed_tflop": again,
        "throughput/update_tflop_per_s": rate,
    }
    if peak_tflops is not None:
        told["throughput/mfu"] = rate / peak_tflops
        told["throughput/hfu"] = (tflop + again) / device_seconds / peak_tflops
    return told
