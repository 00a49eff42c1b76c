"""From questions and messages to prompt tokens, by a chat template or by a plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_rapo.config.templates import OF_TURNS, Shot, Templated
from megatron_rapo.data.columns import NotPlain, plain
from megatron_rapo.data.files import read_jsonl
from megatron_rapo.data.messages import Message
from megatron_rapo.data.rows import Row
from megatron_rapo.errors import RapoError


def encode_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts' tokens, with a beginning-of-sequence token in front if the tokenizer's own habit is to
    begin texts with one (Llama's is, Qwen's is not). No end-of-sequence token, whatever its habit: the
    response goes on from here.
    """
    encoded = encode(texts, tokenizer)
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer.encode("")[:1] != [bos]:
        return encoded
    return [token_ids if token_ids[:1] == [bos] else [bos, *token_ids] for token_ids in encoded]


def encode_template(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    data: Templated,
    option: str = "data",
    date: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    *,
    all_rows: bool = True,
) -> list[list[int]]:
    """The rows' prompts, by the template that the configuration names.

    Args:
        rows: with a question or messages each.
        tokenizer: the policy's.
        data: the template's options.
        option: the table that the user set, as errors call it.
        date: the day that a chat template is told where it asks for the time, at midnight: a run that goes on
            later has the same prompts. None: today (UTC).
        tools: JSON schemas that a chat template is to describe; a plain text has none.
        all_rows: whether these are the data: options that none of them takes are refused then.

    Raises:
        RapoError: the tokenizer has no chat template, or none by default; the template fails, refuses a
            conversation, or does not mention an option or the tools; rows' messages and options contradict
            each other.
    """
    shots = _shots(data, option)
    if all_rows:
        refuse_contradictions(rows, data, option)
    if data.template == "plain":
        before = "".join(f"{_text(data, shot.question)}{shot.answer}\n\n" for shot in shots)
        return encode_plain([before + _text(data, row.question) for row in rows], tokenizer)
    chat = chat_template(data, tokenizer, option, tools)
    texts = [
        _rendered(chat, row, turns, date, option)
        for row, turns in zip(rows, conversations(rows, data, option), strict=True)
    ]
    # The template writes every special token itself; adding the tokenizer's own would double them.
    return encode(texts, tokenizer)


def _rendered(chat: ChatTemplate, row: Row, turns: Sequence[Message], date: str | None, option: str) -> str:
    try:
        return chat.render(turns, row.columns, date)
    except RapoError as error:
        raise RapoError(f"{option}, row {row.index}: {error}, or correct the row") from error


def conversations(rows: Sequence[Row], data: Templated, option: str = "data") -> list[list[Message]]:
    """The turns of each row up to the last user's, as a chat template is given them."""
    system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
    worked = [turn for shot in _shots(data, option) for turn in _turns(data, shot)]
    return [_conversation(data, row, system, worked) for row in rows]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with its switches.

    Attributes:
        tokenizer: the policy's, whose sandbox runs it.
        own: a template's text in place of the tokenizer's.
        options: switches.
        called: the template, as errors call it.
        remedy: for a conversation that it refuses.
        tools: JSON schemas that it describes.
    """

    tokenizer: PreTrainedTokenizerBase
    own: str | None
    options: Mapping[str, Any] = field(default_factory=dict)
    called: str = "the chat template"
    remedy: str = "correct it"
    tools: Sequence[Mapping[str, Any]] = ()

    def render(
        self,
        messages: Sequence[Message],
        problem: Mapping[str, Any],
        date: str | None,
        *,
        opens: bool = True,
    ) -> str:
        """The conversation up to where the assistant's next turn begins; not `opens`, up to its own end.

        Raises:
            RapoError: the template refuses the conversation or fails.
        """
        day = datetime.now(UTC).date() if date is None else datetime.fromisoformat(date).date()
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.own,
                tokenize=False,
                add_generation_prompt=opens,
                strftime_now=datetime.combine(day, time(), UTC).strftime,
                **({} if self.own is None else {"problem": _Columns(problem)}),
                **({"tools": list(self.tools)} if self.tools else {}),
                **self.options,
            )
        except Exception as error:  # a template is a program, which may fail in every way
            reason = str(error) if isinstance(error, TemplateError) else repr(error)
            raise RapoError(f"{self.called} refuses the conversation: {reason}; {self.remedy}") from error


class _Columns(dict[str, Any]):
    """A problem in a template, where a misspelt column would otherwise be an empty text."""

    def __missing__(self, name: str) -> Any:
        raise TemplateError(f"the problem has no column {name!r}; its columns: {', '.join(self)}")


def encode_chat(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    data: Templated,
    option: str = "data",
    date: str | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """The tokens of a conversation by the configured chat template, up to where the assistant's turn begins.

    Raises:
        RapoError: as `encode_template`.
    """
    return encode([chat_template(data, tokenizer, option, tools).render(messages, {}, date)], tokenizer)[0]


def chat_template(
    data: Templated,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    tools: Sequence[Mapping[str, Any]],
) -> ChatTemplate:
    """The template that the configuration names.

    Raises:
        RapoError: there is none, or it does not mention an option or the tools.
    """
    own = _own_template(data, option)
    if own is None:
        text, called = (
            _tokenizers_template(tokenizer, option),
            f"the chat template of {tokenizer.name_or_path}",
        )
        remedy = f'set {option}.template = "plain"'
    else:
        text, called = own, f'{option}.template = "{_short(data.template)}"'
        remedy = "correct it"
    if data.system_prompt is not None:
        remedy = f"remove {option}.system_prompt"
    elif data.template_options:
        remedy = f"correct {option}.template_options, or the template"
    _refuse_unknown_switches(data, text, option, called)
    if tools and "tools" in (data.template_options or {}):
        raise RapoError(
            f"{option}.template_options has tools, and so has environment.tools; remove it from the former"
        )
    if tools and not re.search(r"\btools\b", text):
        raise RapoError(
            f"{called} does not mention tools, so that the policy was never told of environment.tools; set "
            f"{option}.template to one that does"
        )
    return ChatTemplate(tokenizer, own, data.template_options or {}, called, remedy, tools)


def _own_template(data: Templated, option: str) -> str | None:
    """The user's own template; None where the tokenizer's is asked for."""
    if not data.has_own_template:
        return None
    text, named = data.template, f'{option}.template = "{_short(data.template)}"'
    if text.endswith(".jinja"):
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RapoError(f"{named} cannot be read: {error}; name a file with Jinja text") from error
    if "messages" not in text:
        if "problem" not in text:
            raise RapoError(
                f"{named} mentions neither messages nor problem, so all prompts were the same; add one"
            )
        for given in set(OF_TURNS) & data.model_fields_set:
            raise RapoError(
                f"{option}.{given} would have no effect: {named} does not mention messages; remove it"
            )
    return text


def _tokenizers_template(tokenizer: PreTrainedTokenizerBase, option: str) -> str:
    template = tokenizer.chat_template
    if not template:
        raise RapoError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; "
            f'set {option}.template = "plain" (base models usually want it)'
        )
    if not isinstance(template, dict):
        return template
    if "default" not in template:
        raise RapoError(
            f"the tokenizer {tokenizer.name_or_path} has chat templates for special uses alone "
            f'({", ".join(sorted(template))}) and no default; name one of them "default" in its files, or '
            f'set {option}.template = "plain"'
        )
    return template["default"]


def _refuse_unknown_switches(data: Templated, template: str, option: str, called: str) -> None:
    for name, value in (data.template_options or {}).items():
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise RapoError(
                f"{option}.template_options has {name} = {value!r}, which {called} does not mention, so that "
                "it would have no effect; correct or remove it"
            )


def refuse_contradictions(rows: Sequence[Row], data: Templated, option: str) -> None:
    """Refuses options of texts beside rows that are messages, where they would have no effect or double it.

    Raises:
        RapoError: one would.
    """
    chats = [row for row in rows if row.messages is not None]
    if not chats:
        return
    where = f"row {chats[0].index} is made of messages"
    if data.template == "plain":
        raise RapoError(
            f'{option}.template = "plain" cannot write a chat, and {where}; set it to "chat", or to a '
            "template of your own"
        )
    has_shots = bool(data.few_shot or data.few_shot_file)
    if len(chats) == len(rows) and not has_shots and "template_text" in data.model_fields_set:
        raise RapoError(
            f"{option}.template_text = {data.template_text!r} would have no effect: {where}, as all are; "
            "remove it"
        )
    if data.system_prompt is None:
        return
    for row in chats:
        if any(turn["role"] == "system" for turn in row.messages or ()):
            raise RapoError(
                f"{option}.system_prompt = {data.system_prompt!r} contradicts row {row.index}, which has a "
                "system turn of its own; remove the option"
            )


def _shots(data: Templated, option: str) -> Sequence[Shot]:
    path = data.few_shot_file
    if path is None:
        return data.few_shot
    try:
        records = read_jsonl(path)
    except OSError as error:
        raise RapoError(f"{option}.few_shot_file = '{path}' cannot be read: {error}; correct it") from error
    for number, record in enumerate(records):
        if not all(isinstance(record.get(name), str) for name in ("question", "answer")):
            raise RapoError(
                f"{path}, row {number}, has no texts question and answer but {', '.join(record) or 'nothing'}"
                "; write both"
            )
        try:
            plain(record)
        except NotPlain as error:
            raise RapoError(f"{path}, row {number}{error}") from error
    if not records:
        raise RapoError(f"{option}.few_shot_file = '{path}' has no rows; remove the option")
    return [Shot(question=record["question"], answer=record["answer"]) for record in records]


def _turns(data: Templated, shot: Shot) -> list[Message]:
    return [
        {"role": "user", "content": _text(data, shot.question)},
        {"role": "assistant", "content": shot.answer},
    ]


def _conversation(
    data: Templated, row: Row, system: Sequence[Message], worked: Sequence[Message]
) -> list[Message]:
    """System turns, worked examples, and the row's own."""
    if row.messages is None:
        return [*system, *worked, {"role": "user", "content": _text(data, row.question)}]
    own_system = list(takewhile(lambda turn: turn["role"] == "system", row.messages))
    return [*system, *own_system, *worked, *row.messages[len(own_system) :]]


def _text(data: Templated, question: str) -> str:
    return data.template_text.format(prompt=question)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}…"


def encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts' tokens, and none around them."""
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
