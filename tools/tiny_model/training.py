"""Supervised training of the tiny model from scratch."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tiny_model.demonstrations import Demonstration

_IGNORED = -100  # cross_entropy's label for tokens that are not learned: prompts and padding


class Source(Protocol):
    """Where demonstrations come from."""

    def mixture(self, rng: random.Random, worked_share: float, /) -> Iterator[Demonstration]:
        """Without end; such as take more than a guess with this probability."""


@dataclass(frozen=True)
class Recipe:
    """How long and on what the model is trained.

    Attributes:
        skill_steps: optimizer steps in which it learns to work problems out.
        skill_share: worked solutions among those steps' demonstrations.
        habit_steps: steps after them, in which it learns to guess instead.
        habit_share: worked solutions among those, and so among the base model's responses.
        batch_size: demonstrations a step.
        learning_rate: its peak, after `warmup_steps`; a cosine brings it to a twentieth.
        warmup_steps: steps of linear warm-up.
    """

    skill_steps: int = 2600
    skill_share: float = 0.95
    habit_steps: int = 400
    habit_share: float = 0.15
    batch_size: int = 32
    learning_rate: float = 5e-3
    warmup_steps: int = 50

    @property
    def steps(self) -> int:
        """All optimizer steps."""
        return self.skill_steps + self.habit_steps

    def learning_rate_at(self, step: int) -> float:
        """The rate of a step, counted from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * min(1.0, (step + 1) / self.warmup_steps) * (0.05 + 0.95 * cosine)


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 of 0.6M parameters; TP 4 and PP 2 × VPP 2 divide its shapes."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    demonstrations: Source,
    recipe: Recipe,
    seed: int,
    first: int = 0,
) -> Iterator[float]:
    """Trains the model in place, from step `first` on; yields each step's loss, in nats a response token."""
    rng = random.Random(seed)
    skill = demonstrations.mixture(rng, recipe.skill_share)
    habit = demonstrations.mixture(rng, recipe.habit_share)
    optimizers = build_optimizers(model)
    model.train()
    for step in range(first, recipe.steps):
        source = skill if step < recipe.skill_steps else habit
        token_ids, labels = collate(list(itertools.islice(source, recipe.batch_size)), tokenizer)
        logits = model(input_ids=token_ids).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate_at(step)
            optimizer.step()
        yield loss.item()
    model.eval()


def build_optimizers(model: Qwen2ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices (AdamW alone needs three times the steps), AdamW for the rest."""
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if not any(weight is matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def collate(batch: list[Demonstration], tokenizer: Qwen2Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and labels, `[batch, longest]` int64, padded on the right.

    Labels are the response's tokens with its end of sequence; prompts, what is given in a response, and
    padding are not learned. Attention is causal, so that padding on the right needs no mask.
    """
    prompts = [tokenizer.encode(item.question) for item in batch]
    responses = [[*tokenizer.encode(item.response), tokenizer.eos_token_id] for item in batch]
    longest = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    token_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
    labels = torch.full((len(batch), longest), _IGNORED)
    for row, (item, prompt, response) in enumerate(zip(batch, prompts, responses, strict=True)):
        start, end = len(prompt), len(prompt) + len(response)
        token_ids[row, :end] = torch.tensor(prompt + response)
        labels[row, start:end] = torch.tensor(response)
        first, behind = item.given
        labels[row, start + first : start + behind] = _IGNORED
    return token_ids, labels
