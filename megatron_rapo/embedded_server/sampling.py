"""How the next token is drawn: by each row's own seed, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_GOLDEN_RATIO = 0x9E3779B97F4A7C15


def uniforms(seeds: torch.Tensor, step: int) -> torch.Tensor:
    """The random number of each row at one step: a pure function of the row's seed and the step.

    A counter-based generator (SplitMix64, Steele, Lea and Flood 2014) keeps no state that would tie a row to
    its batch: rows may be split, joined and dropped without changing what they draw.

    Args:
        seeds: `[rows]` int64.
        step: tokens that the rows have emitted so far.

    Returns:
        `[rows]` float32, uniform in [0, 1), multiples of 2⁻²⁴.
    """
    bits = _mix(_mix(seeds) + _signed((step + 1) * _GOLDEN_RATIO))
    return _shifted_right(bits, 40).to(torch.float32) * 2.0**-24


def _mix(z: torch.Tensor) -> torch.Tensor:
    """SplitMix64's finalizer, in int64 arithmetic that wraps around."""
    z = (z ^ _shifted_right(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted_right(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted_right(z, 31)


def _shifted_right(z: torch.Tensor, places: int) -> torch.Tensor:
    """The logical shift; `>>` on int64 copies the sign."""
    return (z >> places) & ((1 << (64 - places)) - 1)


def _signed(z: int) -> int:
    """The int64 with the same lowest 64 bits."""
    return (z + 2**63) % 2**64 - 2**63


@dataclass(frozen=True)
class Truncation:
    """Top-k, then top-p of what it leaves, as SGLang applies them.

    Attributes:
        top_p: `[rows]` float32; the likeliest tokens that are needed to reach it are kept, at least one.
        top_k: `[rows]` int64; the vocabulary or more: no limit.
    """

    top_p: torch.Tensor
    top_k: torch.Tensor

    def apply(self, probs: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab]` probabilities with those that may not be drawn set to 0, not renormalised."""
        ordered, tokens = probs.sort(dim=1, descending=True, stable=True)
        beyond_k = torch.arange(probs.shape[1], device=probs.device) >= self.top_k[:, None]
        ordered = ordered.masked_fill(beyond_k, 0.0)
        before = ordered.cumsum(dim=1) - ordered
        # A rounded total may lie below it: top-p 1 must keep everything.
        beyond_p = (before >= self.top_p[:, None] * ordered.sum(dim=1, keepdim=True)) & (self.top_p < 1)[
            :, None
        ]
        beyond_p[:, 0] = False
        return torch.zeros_like(probs).scatter(1, tokens, ordered.masked_fill(beyond_p, 0.0))


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    uniform: torch.Tensor,
    truncation: Truncation | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token a row from softmax(logits / temperature), by inverting its distribution function.

    Log-probs are of that distribution over its full support, also where it is truncated, as SGLang's are.

    Args:
        logits: `[rows, vocab]`, of any floating type.
        temperatures: `[rows]` float32. 0 takes the likeliest token, and its log-prob at temperature 1.
        uniform: `[rows]` float32, multiples of 2⁻²⁴ in [0, 1).
        truncation: which tokens may be drawn; None: all.

    Returns:
        Tokens `[rows]` int64, and their log-probs `[rows]` float32 in nats: NaN where the logits are.
    """
    greedy = temperatures == 0
    logits = logits.float()
    log_probs = torch.log_softmax(logits / temperatures.masked_fill(greedy, 1.0).unsqueeze(1), dim=1)
    probs = log_probs.exp()
    if truncation is not None:
        probs = truncation.apply(probs)
    cumulative = probs.cumsum(dim=1)
    # With uniform ≤ 1 − 2⁻²⁴ the product rounds below the total, so no token of probability 0 is reached.
    threshold = uniform * cumulative[:, -1]
    sampled = torch.searchsorted(cumulative, threshold.unsqueeze(1), right=True).squeeze(1)
    sampled.clamp_(max=logits.shape[1] - 1)  # past the end only where logits are NaN
    tokens = torch.where(greedy, logits.argmax(dim=1), sampled)
    return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
