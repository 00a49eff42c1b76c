"""The model that the embedded server samples from, and the version of its weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from megatron_rapo.embedded_server.attention import DECODING_ATTENTION
from megatron_rapo.embedded_server.decode import Completion, Sample, decode
from megatron_rapo.embedded_server.olmo3 import mend
from megatron_rapo.embedded_server.routed_experts import routers_of
from megatron_rapo.embedded_server.weights import NamedTensors, Weights
from megatron_rapo.embedded_server.windows import KINDS
from megatron_rapo.errors import RapoError

MemoryTag = Literal["weights", "kv_cache"]
MAX_ROWS = 1024  # rows of one decoding batch: larger requests are decoded in pieces, to bound memory


class CannotGenerate(RapoError):
    """Nothing can be sampled now: the weights are not whole, or memory is released."""


class Engine:
    """A HF causal LM with its tokenizer. Not thread-safe: one thread calls it.

    Attributes:
        model_path: the folder whose weights it has.
        weights: what it samples from.
        vocab_size: token ids are below it.
        context_length: most tokens of prompt and response together.
        eos_ids: tokens that end a response.
        tokenizer: None where the folder has none; then only token ids can be sent.
    """

    def __init__(self, model_path: Path, device: str, dtype: str) -> None:
        """Loads the model.

        Args:
            model_path: HF folder: config.json, safetensors, and tokenizer files if text is to be sent.
            device: `cpu` or `cuda`.
            dtype: `float32` or `bfloat16`, of weights and activations.

        Raises:
            RapoError: the folder has no such model, or one that cannot be decoded here.
        """
        if not (model_path / "config.json").is_file():
            raise RapoError(f"{model_path} has no config.json; give a Hugging Face model folder")
        if device == "cuda" and not torch.cuda.is_available():
            raise RapoError("--device cuda: torch finds no CUDA device on this machine; use cpu")
        transformers_logging.disable_progress_bar()
        self.model_path = model_path
        self._model = _load_model(model_path, getattr(torch, dtype)).to(device)
        self.weights = Weights(self._model)
        self._released: set[MemoryTag] = set()
        self.tokenizer = _load_tokenizer(model_path)
        self.vocab_size: int = self._model.config.vocab_size
        self.context_length: int = self._model.config.max_position_embeddings
        self.eos_ids = self._eos_ids()

    @property
    def weight_version(self) -> str:
        """What the weights are called."""
        return self.weights.version

    @property
    def is_mixture(self) -> bool:
        """Whether its layers have experts."""
        return bool(routers_of(self._model))

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.device

    def computing(self) -> dict[str, Any]:
        """Where and how it computes, for people."""
        return {
            "device": str(self._model.device),
            "dtype": str(self._model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "max_rows": MAX_ROWS,
        }

    def _eos_ids(self) -> frozenset[int]:
        declared = [self._model.config.eos_token_id, self._model.generation_config.eos_token_id]
        if self.tokenizer is not None:
            declared.append(self.tokenizer.eos_token_id)
        ids: set[int] = set()
        for value in declared:
            if value is not None:
                ids.update([value] if isinstance(value, int) else value)
        return frozenset(ids)

    def generate(self, samples: Sequence[Sample], aborted: threading.Event) -> list[Completion]:
        """Makes all responses; see `decode`.

        Raises:
            CannotGenerate: memory is released, or the weights are not whole.
        """
        if self._released:
            released = ", ".join(sorted(self._released))
            raise CannotGenerate(
                f"the memory of {released} is released; resume it (/resume_memory_occupation) first"
            )
        if problem := self.weights.problem():
            raise CannotGenerate(problem)
        completions: list[Completion] = []
        for start in range(0, len(samples), MAX_ROWS):
            completions += decode(self._model, samples[start : start + MAX_ROWS], aborted)
        return completions

    def load_checkpoint(self, model_path: Path, weight_version: str | None) -> None:
        """Takes the weights of another checkpoint of the same architecture; None keeps the version's name.

        Raises:
            RapoError: it cannot be loaded; weights and version stay what they were.
        """
        self.weights.load_checkpoint(model_path, weight_version)
        self.model_path = model_path

    def write_weights(self, named: NamedTensors, weight_version: str | None) -> None:
        """`Weights.write`; the sender may use its memory anew once this returns."""
        self.weights.write(named, weight_version)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def release(self, tags: Sequence[MemoryTag]) -> None:
        """Gives memory back. Between requests there is no cache: its memory goes with each batch."""
        if "weights" in tags:
            self.weights.release()
        self._released |= set(tags)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def resume(self, tags: Sequence[MemoryTag]) -> None:
        """Takes memory again; weights must be updated as a whole before they are of use."""
        if "weights" in tags:
            self.weights.resume()
        self._released -= set(tags)


def _load_model(path: Path, dtype: torch.dtype) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        attn_implementation=DECODING_ATTENTION,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    # HF only warns of these, and fills in random weights.
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise RapoError(f"{path}: {kind.replace('_', ' ')} in the checkpoint: {sorted(report[kind])[:5]}")
    others = set(getattr(model.config, "layer_types", None) or []) - KINDS
    if others:
        raise RapoError(
            f"{path} has layers of type {', '.join(sorted(others))}; the embedded server decodes only "
            f"{' and '.join(sorted(KINDS))}: serve this model with SGLang (rollout.engine)"
        )
    return mend(model).eval()


def _load_tokenizer(path: Path) -> Any:
    if not (path / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(path, local_files_only=True)
