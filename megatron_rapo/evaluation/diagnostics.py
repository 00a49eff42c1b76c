"""Exploration diagnostics: what a trained model's correct responses are under its base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.manifest import SettingRecord
from megatron_rapo.evaluation.store import SampleStore

FLOOR = math.log(1e-4)  # nats: a token of less is hardly ever drawn in ten thousand
CHUNK = 256  # positions whose logits exist at a time

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OfKind:
    """Means over the tokens of one kind; entropies and divergence of the distributions they were drawn from.

    Attributes:
        tokens: how many there were.
        base_entropy, model_entropy: in nats.
        reverse_kl: KL(model ‖ base).
    """

    tokens: int
    base_entropy: float
    model_entropy: float
    reverse_kl: float


@dataclass(frozen=True)
class Diagnostics:
    """Over some correct responses of the model; log-probs, entropies and divergences are in nats, at the
    setting's temperature, over the full vocabulary.

    Attributes:
        responses: how many there were.
        base_log_prob: `[responses]`, of each whole response under the base.
        model_log_prob: `[responses]`, under the model itself.
        tokens_below_floor: share of tokens whose log-prob under the base is below `FLOOR`.
        responses_below_floor: share of responses with such a token: off the base's support, for practical
            purposes.
        forward_kl: `[positions]`, KL(base ‖ model), the mean over responses that reach the position.
        reverse_kl: `[positions]`, KL(model ‖ base).
        base_entropy, model_entropy: `[positions]`.
        reaching: `[positions]`, responses that reach it.
        kinds: by what the token's text is: `words` where it has a letter, else `digits`, `signs`, `blank`.
    """

    responses: int
    base_log_prob: tuple[float, ...]
    model_log_prob: tuple[float, ...]
    tokens_below_floor: float
    responses_below_floor: float
    forward_kl: tuple[float, ...]
    reverse_kl: tuple[float, ...]
    base_entropy: tuple[float, ...]
    model_entropy: tuple[float, ...]
    reaching: tuple[int, ...]
    kinds: Mapping[str, OfKind] = field(default_factory=dict)


@dataclass(frozen=True)
class _Row:
    """One response: prompt and response tokens."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


class Pair:
    """Base and model in this process, side by side.

    Raises:
        RapoError: they have other vocabularies.
    """

    def __init__(self, base: Path, model: Path, dtype: str = "float32") -> None:
        self._base, self._model = _load(base, dtype), _load(model, dtype)
        sizes = [_head(one).weight.shape[0] for one in (self._base, self._model)]
        if sizes[0] != sizes[1]:
            raise RapoError(
                f"{base} has a vocabulary of {sizes[0]}, {model} of {sizes[1]}: the model was not trained "
                "from this base; name its own"
            )
        self._tokenizer = load_tokenizer(base)
        self.vocabulary = vocabulary_size(self._tokenizer, sizes[0])

    def kinds(self, row: _Row) -> list[str]:
        """`[tokens]`, the kind of each token of the response."""
        return [_kind(self._tokenizer.decode([token])) for token in row.response]

    @torch.inference_mode()
    def statistics(self, row: _Row, temperature: float) -> Floats:
        """`[6, tokens]`: log-prob under base and model, KL(base ‖ model), KL(model ‖ base), entropies."""
        ids = torch.tensor([[*row.prompt, *row.response]], device=self._base.device)
        hidden = [one.base_model(input_ids=ids).last_hidden_state[0] for one in (self._base, self._model)]
        first = len(row.prompt) - 1
        targets = ids[0, first + 1 :]
        parts = []
        for start in range(0, len(targets), CHUNK):
            here = slice(first + start, min(first + start + CHUNK, first + len(targets)))
            base, model = (
                self._log_probs(one, states[here], temperature)
                for one, states in zip((self._base, self._model), hidden, strict=True)
            )
            chosen = targets[start : start + CHUNK, None]
            p, q = base.exp(), model.exp()
            parts.append(
                torch.stack(
                    [
                        base.gather(1, chosen)[:, 0],
                        model.gather(1, chosen)[:, 0],
                        (p * (base - model)).sum(1),
                        (q * (model - base)).sum(1),
                        -(p * base).sum(1),
                        -(q * model).sum(1),
                    ]
                )
            )
        return torch.cat(parts, dim=1).double().cpu().numpy()

    def _log_probs(self, one: Any, states: Tensor, temperature: float) -> Tensor:
        """`[positions, vocabulary]`; the head's spare rows are no tokens."""
        logits = _head(one)(states).float()[:, : self.vocabulary]
        return torch.log_softmax(logits / temperature, dim=-1)


def diagnose(store: SampleStore, setting: SettingRecord, pair: Pair, *, limit: int) -> Diagnostics | None:
    """Of at most `limit` correct responses, of as many problems as there are; None without any."""
    rows = _choose(store, limit, pair.vocabulary)
    if not rows:
        return None
    found = [pair.statistics(row, setting.temperature) for row in rows]
    longest = max(one.shape[1] for one in found)
    padded = np.full((len(found), 6, longest), np.nan)
    for place, one in enumerate(found):
        padded[place, :, : one.shape[1]] = one
    by_position = np.nanmean(padded, axis=0)
    below = padded[:, 0] < FLOOR  # not so where there is no token
    reaching = np.isfinite(padded[:, 0]).sum(axis=0)
    return Diagnostics(
        responses=len(rows),
        base_log_prob=tuple(np.nansum(padded[:, 0], axis=1).tolist()),
        model_log_prob=tuple(np.nansum(padded[:, 1], axis=1).tolist()),
        tokens_below_floor=float(below.sum() / reaching.sum()),
        responses_below_floor=float(below.any(axis=1).mean()),
        forward_kl=tuple(by_position[2].tolist()),
        reverse_kl=tuple(by_position[3].tolist()),
        base_entropy=tuple(by_position[4].tolist()),
        model_entropy=tuple(by_position[5].tolist()),
        reaching=tuple(reaching.tolist()),
        kinds=_by_kind([kind for row in rows for kind in pair.kinds(row)], np.concatenate(found, axis=1)),
    )


def _kind(text: str) -> str:
    for kind, has in (("words", str.isalpha), ("digits", str.isdigit)):
        if any(map(has, text)):
            return kind
    return "signs" if text.strip() else "blank"


def _by_kind(kinds: Sequence[str], statistics: Floats) -> dict[str, OfKind]:
    """Of the `[6, tokens]` that `Pair.statistics` gives, of all responses."""
    found = {}
    for kind in sorted(set(kinds)):
        reverse, base, model = statistics[3:, np.array(kinds) == kind].mean(axis=1).tolist()
        found[kind] = OfKind(kinds.count(kind), base, model, reverse)
    return found


def _choose(store: SampleStore, limit: int, vocabulary: int) -> list[_Row]:
    """Correct responses in one piece, first one of every problem, then a second one, and so on."""
    narrow = store.read(["problem", "sample", "outcome", "given"])
    correct: dict[str, list[int]] = {}
    columns = (narrow[name].to_pylist() for name in ("problem", "sample", "outcome", "given"))
    for problem, sample, outcome, given in zip(*columns, strict=True):
        if outcome == Outcome.CORRECT and not given:
            correct.setdefault(problem, []).append(sample)
    turns = sorted(
        (turn, problem, sample)
        for problem, samples in correct.items()
        for turn, sample in enumerate(sorted(samples))
    )
    wanted = {(problem, sample) for _, problem, sample in turns[:limit]}
    prompts = {problem.id: problem.prompt_ids for problem in store.problems}
    rows = []
    stream = store.stream(["problem", "sample", "token_ids"], problems={problem for problem, _ in wanted})
    for batch in stream:
        for row in batch.to_pylist():
            # A token that does not exist has no probability under either.
            if (row["problem"], row["sample"]) in wanted and max(row["token_ids"]) < vocabulary:
                rows.append(_Row(prompts[row["problem"]], tuple(row["token_ids"])))
    return rows


def _load(path: Path, dtype: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
    )
    return model.to(device).eval()


def _head(model: Any) -> Any:
    return model.get_output_embeddings()
