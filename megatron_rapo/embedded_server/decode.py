"""Batched decoding: each distinct prompt is run once, then each forward makes one token of every row."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from megatron_rapo.embedded_server.cache import growing_cache
from megatron_rapo.embedded_server.routed_experts import Experts, RoutedExperts
from megatron_rapo.embedded_server.sampling import Truncation, draw, uniforms
from megatron_rapo.embedded_server.windows import masks

COMPACT_BELOW = 0.85  # dropping finished rows copies the cache: done once they are this much of the batch
_NO_LIMIT = torch.iinfo(torch.int64).max
ROOM = 256  # tokens of a response that the cache has room for before it must grow


@dataclass(frozen=True)
class Sample:
    """One response to be made.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: where the response is cut, at least 1.
        temperature: 0 is greedy.
        stop_ids: tokens that end the response and belong to it.
        seed: an int64: with the prompt and the weights it determines the response.
        top_p, top_k: which tokens may be drawn (`Truncation`); None: no limit.
        tells_experts: whether the choices of a mixture's routers are kept.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    stop_ids: frozenset[int]
    seed: int
    top_p: float = 1.0
    top_k: int | None = None
    tells_experts: bool = False


@dataclass(frozen=True)
class Completion:
    """One response: its tokens, the log-prob of each in nats, why it ended, and experts if they are told."""

    token_ids: list[int]
    log_probs: list[float]
    finish: Literal["stop", "length", "abort"]
    experts: Experts | None = None


@dataclass
class _Rows:
    """The rows of the batch; the first dimension of each field is a row."""

    sample: torch.Tensor  # whose row it is
    live: torch.Tensor  # False once the sample has ended
    prompt_length: torch.Tensor
    max_new_tokens: torch.Tensor
    temperature: torch.Tensor
    seed: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    stop_ids: torch.Tensor  # [rows, most stop ids], filled up with -1
    mask: torch.Tensor  # [rows, 1, 1, positions], added to attention scores: -inf where the prompt is padded

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device, dtype: torch.dtype) -> _Rows:
        lengths = torch.tensor([len(sample.prompt) for sample in samples])
        width = int(lengths.max())
        padded = (
            torch.arange(width + max(sample.max_new_tokens for sample in samples)) < width - lengths[:, None]
        )
        stop_ids = [torch.tensor(sorted(sample.stop_ids), dtype=torch.int64) for sample in samples]
        rows = cls(
            sample=torch.arange(len(samples)),
            live=torch.ones(len(samples), dtype=torch.bool),
            prompt_length=lengths,
            max_new_tokens=torch.tensor([sample.max_new_tokens for sample in samples]),
            temperature=torch.tensor([sample.temperature for sample in samples], dtype=torch.float32),
            seed=torch.tensor([sample.seed for sample in samples], dtype=torch.int64),
            top_p=torch.tensor([sample.top_p for sample in samples], dtype=torch.float32),
            top_k=torch.tensor([sample.top_k or _NO_LIMIT for sample in samples], dtype=torch.int64),
            stop_ids=pad_sequence(stop_ids, batch_first=True, padding_value=-1),
            mask=torch.zeros(padded.shape, dtype=dtype).masked_fill(padded, -torch.inf)[:, None, None],
        )
        rows._update(lambda values: values.to(device))
        return rows

    def _update(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for field in fields(self):
            setattr(self, field.name, change(getattr(self, field.name)))

    def select(self, indices: torch.Tensor) -> None:
        """Keeps the rows of these indices."""
        self._update(lambda values: values[indices])


def decode(model: Any, samples: Sequence[Sample], aborted: threading.Event) -> list[Completion]:
    """Decodes all samples as one batch.

    Args:
        model: a HF causal LM in evaluation mode, whose layers attend to the whole sequence, or in a window.
        samples: at least one. Those with the same prompt share its prefill.
        aborted: looked at before each token; once set, what has not ended ends as it is.

    Raises:
        FloatingPointError: a log-prob is not finite.
    """
    if not any(sample.tells_experts for sample in samples):
        return _decode(model, samples, aborted)
    routed = RoutedExperts()
    with routed.listening(model):
        completions = _decode(model, samples, aborted, routed)
    distinct = {prompt: place for place, prompt in enumerate(dict.fromkeys(one.prompt for one in samples))}
    told = routed.of_samples(
        [distinct[sample.prompt] for sample in samples],
        [len(sample.prompt) for sample in samples],
        [len(completion.token_ids) for completion in completions],
    )
    return [replace(one, experts=experts) for one, experts in zip(completions, told, strict=True)]


@torch.inference_mode()
def _decode(
    model: Any, samples: Sequence[Sample], aborted: threading.Event, routed: RoutedExperts | None = None
) -> list[Completion]:
    longest = max(sample.max_new_tokens for sample in samples)
    token_ids = torch.zeros(len(samples), longest, dtype=torch.int64, device=model.device)
    log_probs = torch.zeros(len(samples), longest, dtype=torch.float32, device=model.device)
    lengths = torch.zeros(len(samples), dtype=torch.int64, device=model.device)

    rows = _Rows.of(samples, model.device, model.dtype)
    truncated = any(sample.top_p < 1 or sample.top_k is not None for sample in samples)
    logits, cache = _prefill(model, [sample.prompt for sample in samples], longest)
    if routed is not None:
        routed.end_prefill(len({sample.prompt for sample in samples}))
    for step in range(longest):
        if aborted.is_set():
            break
        truncation = Truncation(rows.top_p, rows.top_k) if truncated else None
        tokens, token_log_probs = draw(logits, rows.temperature, uniforms(rows.seed, step), truncation)
        token_ids[rows.sample, step] = tokens
        log_probs[rows.sample, step] = token_log_probs
        lengths[rows.sample] += rows.live
        rows.live &= (step + 1 < rows.max_new_tokens) & ~(tokens[:, None] == rows.stop_ids).any(dim=1)
        live = int(rows.live.sum())
        if live == 0:
            break
        if live < COMPACT_BELOW * len(tokens):
            kept = rows.live.nonzero().squeeze(1)
            rows.select(kept)
            cache.batch_select_indices(kept)
            tokens = tokens[kept]
        logits = _forward(model, tokens, rows, cache, step)
        if routed is not None:
            routed.end_step(rows.sample)
    return _completions(samples, token_ids, log_probs, lengths)


def _prefill(
    model: Any, prompts: Sequence[tuple[int, ...]], max_new_tokens: int
) -> tuple[torch.Tensor, Cache]:
    """Runs each distinct prompt once, padded on the left.

    Returns:
        The logits `[rows, vocab]` of each row's first token, and the cache of all rows.
    """
    distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    width = max(map(len, distinct))
    # Which token pads does not matter: its position is masked.
    ids = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in distinct], device=model.device)
    real = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in distinct])
    real = real.to(model.device)
    cache = growing_cache(model.config.num_hidden_layers, width + min(max_new_tokens, ROOM))
    output = model(
        input_ids=ids,
        attention_mask=real,
        position_ids=(real.cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        logits_to_keep=1,
    )
    prompt_of_row = torch.tensor([distinct[prompt] for prompt in prompts], device=model.device)
    cache.batch_select_indices(prompt_of_row)
    return output.logits[:, -1][prompt_of_row], cache


def _forward(model: Any, tokens: torch.Tensor, rows: _Rows, cache: Cache, step: int) -> torch.Tensor:
    """Feeds the tokens emitted at `step`; returns the logits `[rows, vocab]` of the next."""
    output = model(
        input_ids=tokens[:, None],
        attention_mask=masks(model.config, rows.mask[..., : cache.get_seq_length() + 1]),
        position_ids=(rows.prompt_length + step)[:, None],
        past_key_values=cache,
    )
    return output.logits[:, -1]


def _completions(
    samples: Sequence[Sample], token_ids: torch.Tensor, log_probs: torch.Tensor, lengths: torch.Tensor
) -> list[Completion]:
    completions = []
    for sample, ids, values, length in zip(
        samples, token_ids.tolist(), log_probs.tolist(), lengths.tolist(), strict=True
    ):
        ids, values = ids[:length], values[:length]
        if not all(map(math.isfinite, values)):
            raise FloatingPointError("the model's log-probs are not finite")
        completions.append(Completion(ids, values, _finish(sample, ids)))
    return completions


def _finish(sample: Sample, token_ids: list[int]) -> Literal["stop", "length", "abort"]:
    if token_ids and token_ids[-1] in sample.stop_ids:
        return "stop"
    return "length" if len(token_ids) == sample.max_new_tokens else "abort"
