"""Prompts that are messages already: `[{"role": "user", "content": "…"}, …]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]


class Malformed(Exception):
    """What is wrong with the messages, in words."""


def read_messages(value: Any) -> tuple[list[Message], Message | None]:
    """The turns up to where the assistant is to answer, and the answer that stands behind them, if any.

    A last turn of the assistant is the answer of the data, and no part of the prompt. All other keys of a
    message (`name`, `tool_calls`) go to the chat template as they are; parts of text become one text.

    Raises:
        Malformed: they are no messages, or none to answer.
    """
    if not isinstance(value, list) or not value:
        raise Malformed("no list of messages")
    turns = [_turn(number, turn) for number, turn in enumerate(value)]
    answer = turns.pop() if turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] not in ("user", "tool"):
        last = turns[-1]["role"] if turns else "nothing"
        raise Malformed(f"messages that end with {last}, so that there is nothing to answer")
    return turns, answer


def question_of(turns: list[Message]) -> str:
    """The last user's turn: what people are shown as the problem."""
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")


def _turn(number: int, turn: Any) -> Message:
    if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
        raise Malformed(f"messages whose number {number} is {turn!r:.80}, without a role")
    content = turn.get("content")
    if isinstance(content, list) and all(_is_text(part) for part in content):
        content = "".join(part["text"] for part in content)
    if content is None and turn["role"] == "assistant":
        return dict(turn)  # it calls tools
    if not isinstance(content, str):
        raise Malformed(f"messages whose number {number} has the content {content!r:.80}, no text")
    return {**turn, "content": content}


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)
