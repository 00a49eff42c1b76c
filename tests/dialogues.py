"""Tokenizers of several kinds, and engines that sample given ids, for tests of conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_rapo.episode.environment import Turn
from megatron_rapo.episode.sequence import Sequence as TokenSequence

TINY = Path(__file__).parents[1] / "examples/models/tiny-countdown"

# Special tokens of Qwen's and of Llama 3; those that Qwen adds and does not call special.
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
    *("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>"),
]
ADDED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

CHATML = """{%- if tools %}<|im_start|>system
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{%- for tool in tools %}{{ "\\n" ~ (tool | tojson) }}{%- endfor %}{{ "\\n" }}</tools>

{{ "For each function call, return a json object with function name and arguments within " -}}
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""What Qwen3's own template makes of tools and of users' turns."""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions.\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nReturn a json object within <tool_call></tool_call> XML tags.<|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. ' }}
        {{- 'You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first)
        or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.index0 == 0 or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
"""Structure of Qwen2.5's template; its instructions are shortened."""

_CORPUS = [
    'The answer is 5. {"name": "calculator", "arguments": {"expression": "2 + 3"}} error: no such tool\n\n',
    "assistant user system tool What is 2 + 3? Are you sure? Ä ö ü 你好 🙂 <tools> </tools> def f(x): x\n",
]


@cache
def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Qwen's and Llama 3's."""
    return _finished(_byte_level_bpe())


def _byte_level_bpe() -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return inner


@cache
def qwen25() -> PreTrainedTokenizerFast:
    """As Qwen2.5's: its template, and of the tokens that control a chat those of calls alone."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_byte_level_bpe().to_str()),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=QWEN25,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED[:2]])
    return tokenizer


@cache
def sentencepiece_like() -> PreTrainedTokenizerFast:
    """BPE over characters, with ▁ for spaces, bytes for what it lacks, and a normalizer."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *byte_tokens])
    trained.train_from_iterator(_CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    inner = Tokenizer(
        models.BPE(model["vocab"], merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _finished(inner)


@cache
def tiny() -> Any:
    """That of the example's model: digits, operators, and little else."""
    return AutoTokenizer.from_pretrained(TINY)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "sentencepiece_like": sentencepiece_like,
    "tiny": tiny,
}


def _finished(inner: Tokenizer) -> PreTrainedTokenizerFast:
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


class SamplingIds:
    """A `Generate` that samples the given ids, a list a call, cut at a token that stops.

    Attributes:
        asked: what each call continued.
        sampled: what each call returned.
    """

    def __init__(
        self, tokenizer: Any, turns: Sequence[Sequence[int]], prompt: Sequence[int], most: int
    ) -> None:
        self.asked: list[list[int]] = []
        self.sampled: list[list[int]] = []
        self._tokenizer = tokenizer
        self._turns = list(turns)
        self._prompt = len(prompt)
        self._most = most

    async def __call__(
        self,
        token_ids: Sequence[int],
        *,
        turn: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[int] = (),
    ) -> Turn:
        assert turn == len(self.asked), "turns are numbered in order"
        whole = list(self._turns[turn]) if turn < len(self._turns) else [stop[0]]
        ends = next((n + 1 for n, token in enumerate(whole) if token in stop), None)
        whole = [*whole, stop[0]] if ends is None else whole[:ends]
        sampled = whole[: max(0, self.tokens_left(token_ids))]
        self.asked.append(list(token_ids))
        self.sampled.append(sampled)
        return Turn(
            np.array(sampled, np.int32),
            np.array([-(turn + 1) - n / 1e6 for n in range(len(sampled))], np.float32),
            np.full(len(sampled), turn, np.int32),
            "stop" if len(sampled) == len(whole) else "length",
            self.decode(sampled),
        )

    async def recorded(self, question: object, ask: Any, *, again: bool = False) -> Any:
        return await ask()

    def tokens_left(self, token_ids: Sequence[int]) -> int:
        return self._most - (len(token_ids) - self._prompt)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def check(self, sequence: TokenSequence) -> None:
        """That the sequence is what was sampled, each turn behind what it continued, and that the mask covers
        nothing else.
        """
        mask = np.zeros(len(sequence), bool)
        for turn, (before, sampled) in enumerate(zip(self.asked, self.sampled, strict=True)):
            assert sequence.token_ids[: len(before)].tolist() == before
            span = slice(len(before), len(before) + len(sampled))
            assert sequence.token_ids[span].tolist() == sampled
            assert not mask[span].any()
            mask[span] = True
            assert (sequence.versions[span] == turn).all()
            assert (np.floor(-sequence.log_probs[span]) == turn + 1).all()
        assert sequence.sampled.tolist() == mask.tolist()
        assert (sequence.versions[~mask] == -1).all()
        assert np.isnan(sequence.log_probs[~mask]).all()
