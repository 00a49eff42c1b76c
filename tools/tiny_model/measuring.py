"""How often the tiny model is right on problems that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from megatron_rapo.data.tasks import countdown
from megatron_rapo.data.tasks.problem import Problem

MAX_RESPONSE_TOKENS = 32

_SEQUENCES_AT_ONCE = 1024


def sample(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, questions: Sequence[str]) -> list[str]:
    """One response to each question, at temperature 1 from the whole distribution."""
    prompts = tokenizer(list(questions), padding=True, padding_side="left", return_tensors="pt")
    with torch.no_grad():
        token_ids = model.generate(
            input_ids=prompts["input_ids"],
            attention_mask=prompts["attention_mask"],
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
    responses: list[str] = tokenizer.batch_decode(
        token_ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return responses


def count_correct(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    problems: Sequence[Problem],
    samples: int,
) -> npt.NDArray[np.int64]:
    """How many of `samples` responses to each problem are correct, `[problems]`."""
    counts: list[int] = []
    at_once = max(1, _SEQUENCES_AT_ONCE // samples)
    for start in range(0, len(problems), at_once):
        asked = [problem for problem in problems[start : start + at_once] for _ in range(samples)]
        responses = sample(model, tokenizer, [problem.question for problem in asked])
        correct = [
            countdown.is_correct(text, problem.answer) for text, problem in zip(responses, asked, strict=True)
        ]
        counts += [sum(correct[first : first + samples]) for first in range(0, len(correct), samples)]
    return np.array(counts)
