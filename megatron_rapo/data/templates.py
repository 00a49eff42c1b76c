"""From questions to prompt tokens, by the tokenizer's chat template or by a plain text."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, time

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from megatron_rapo.config.data import FileData
from megatron_rapo.errors import RapoError


def encode_plain(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The texts' tokens, with a beginning-of-sequence token in front if the tokenizer's own habit is to
    begin texts with one (Llama's is, Qwen's is not). No end-of-sequence token, whatever its habit: the
    response goes on from here.
    """
    encoded = _encode(texts, tokenizer)
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer.encode("")[:1] != [bos]:
        return encoded
    return [token_ids if token_ids[:1] == [bos] else [bos, *token_ids] for token_ids in encoded]


def encode_chat(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    option: str = "data",
    date: str | None = None,
) -> list[list[int]]:
    """Each text as the user's turn of the tokenizer's chat template, up to where the assistant's begins.

    Args:
        texts: the user's turns.
        tokenizer: the policy's.
        system_prompt: the system's turn, if there is one.
        option: the table that the user set, as errors call it.
        date: the day that the template is told where it asks for the time, at midnight: a run that goes on
            later has the same prompts. None: today (UTC).

    Raises:
        RapoError: the tokenizer has no chat template, or none by default, or its template refuses the
            conversation or fails.
    """
    _require_template(tokenizer, option)
    day = datetime.now(UTC).date() if date is None else datetime.fromisoformat(date).date()
    told = datetime.combine(day, time(), UTC)
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    conversations = [[*system, {"role": "user", "content": text}] for text in texts]
    try:
        rendered = tokenizer.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True, strftime_now=told.strftime
        )
    except Exception as error:  # a template is a program, which may fail in every way
        remedy = f"remove {option}.system_prompt" if system else f'set {option}.template = "plain"'
        reason = str(error) if isinstance(error, TemplateError) else repr(error)
        raise RapoError(
            f"the chat template of {tokenizer.name_or_path} refuses the conversation: {reason}; {remedy}"
        ) from error
    # The template writes every special token itself; adding the tokenizer's own would double them.
    return _encode(rendered, tokenizer)


def encode_template(
    questions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    data: FileData,
    option: str = "data",
    date: str | None = None,
) -> list[list[int]]:
    """The questions' prompts, by the template that the configuration names."""
    texts = [data.template_text.format(prompt=question) for question in questions]
    if data.template == "chat":
        return encode_chat(texts, tokenizer, data.system_prompt, option, date)
    return encode_plain(texts, tokenizer)


def _require_template(tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    template = tokenizer.chat_template
    if not template:
        raise RapoError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template; "
            f'set {option}.template = "plain" (base models usually want it)'
        )
    if isinstance(template, dict) and "default" not in template:
        raise RapoError(
            f"the tokenizer {tokenizer.name_or_path} has chat templates for special uses alone "
            f'({", ".join(sorted(template))}) and no default; name one of them "default" in its files, or '
            f'set {option}.template = "plain"'
        )


def _encode(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
