"""What a guide asks for, in tokens: by the template of the problem's data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import RunConfig
from megatron_rapo.config.data import ArithmeticData, CountdownData
from megatron_rapo.data.load import tool_schemas
from megatron_rapo.data.messages import Message
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.data.rows import Row
from megatron_rapo.data.templates import encode_plain, encode_template
from megatron_rapo.episode.guide import Guide
from megatron_rapo.errors import RapoError


class TooLong(Exception):
    """What a guide asks for does not fit; the message says what, and the remedy."""


@dataclass(frozen=True)
class Guided:
    """A guide in tokens.

    Attributes:
        prompt: that the policy is given, by the template.
        begins: that follow it: the beginning of the response.
        response: of a response that is given; None: it is sampled.
        trained_under: the prompt of what is trained on.
    """

    prompt: tuple[int, ...]
    begins: tuple[int, ...]
    response: tuple[int, ...] | None
    trained_under: tuple[int, ...]


class GuidedPrompts:
    """Makes tokens of guides, as the prompts of a run were made."""

    def __init__(self, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._limits = config.rollout
        self._date = config.run.date
        self._tools = tool_schemas(config)
        tables = zip(config.training_sources, config.training_tables, strict=True)
        self._sources = {data.name: (data, table) for data, table in tables}

    def __call__(self, prompt: Prompt, guide: Guide) -> Guided:
        """The guide's tokens, for a prompt of the run.

        Raises:
            TooLong: its prompt exceeds `rollout.max_prompt_tokens`, or what it gives of the response leaves
                no token of `rollout.max_response_tokens`.
            RapoError: the template refuses it, or a response is blank.
        """
        asked = prompt.token_ids if guide.question is None else self._asked(prompt, guide.question)
        begins = tuple(self._tokenizer.encode(guide.begins, add_special_tokens=False)) if guide.begins else ()
        response = None if guide.response is None else self._response(prompt, guide.response)
        most = self._limits.max_prompt_tokens
        if len(asked) > most:
            raise TooLong(
                f"the prompt of a {guide.name or 'guide'} has {len(asked)} tokens, more than "
                f"rollout.max_prompt_tokens = {most}; raise that"
            )
        given, most = len(begins) + len(response or ()), self._limits.max_response_tokens
        if given > most or (response is None and given == most):
            raise TooLong(
                f"a {guide.name or 'guide'} gives {given} tokens of the response, which do not fit "
                f"rollout.max_response_tokens = {most}; raise that"
            )
        return Guided(asked, begins, response, asked if guide.keeps_prompt else prompt.token_ids)

    def _asked(self, prompt: Prompt, question: str) -> tuple[int, ...]:
        """Another question's prompt, in the template of the prompt's data."""
        data, table = self._sources[prompt.source]
        if isinstance(data, CountdownData | ArithmeticData):
            return tuple(encode_plain([question], self._tokenizer)[0])
        # A template of the user's own may read the problem's columns in place of messages.
        columns = {name: _other(value, prompt.question, question) for name, value in prompt.columns.items()}
        messages = None if prompt.messages is None else _with_question(prompt.messages, question)
        row = Row(prompt.index, question, prompt.answer, prompt.name, columns, messages)
        made = encode_template([row], self._tokenizer, data, table, self._date, self._tools, all_rows=False)
        return tuple(made[0])

    def _response(self, prompt: Prompt, text: str) -> tuple[int, ...]:
        """A given response's tokens, with the end that the policy is to learn."""
        if not text.strip():
            raise RapoError(f"a response that is given to problem {prompt.id} is blank; leave it out")
        end = self._tokenizer.eos_token_id
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        return (*token_ids, *([] if end is None or token_ids[-1:] == [end] else [end]))


def _other(value: Any, question: str, other: str) -> Any:
    return other if isinstance(value, str) and value == question else value


def _with_question(messages: Sequence[Message], question: str) -> tuple[Message, ...]:
    """The chat with another last user's turn."""
    last = max(place for place, turn in enumerate(messages) if turn["role"] == "user")
    return (*messages[:last], {**messages[last], "content": question}, *messages[last + 1 :])
