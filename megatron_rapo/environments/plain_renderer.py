"""Calls of tools and their answers as plain text, for models without a chat template: base models, tiny ones.

A call stands between two markers: `<tool>{"name": "calculator", "arguments": {"expression": "2+3"}}</tool>`.
Where there is one tool with one required text, the text alone will do: `<tool>2+3</tool>`. Its answer
follows between two markers of its own. Nothing is added where the policy's turn ended: what it sampled stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import Field, model_validator
from renderers.base import ParsedResponse, ParsedToolCall, RenderedTokens, ToolCallParseStatus
from transformers import PreTrainedTokenizerBase

from megatron_rapo.section import Section


class Markers(Section):
    """What stands around a call, around its answer, and around what a user says.

    The marker before a call may be empty: what the line has before the marker behind it is the call then.
    """

    call: tuple[str, str] = Field(("<tool>", "</tool>"), strict=False)
    answer: tuple[str, str] = Field(("<answer>", "</answer>\n"), strict=False)
    user: tuple[str, str] = Field(("\n", "\n"), strict=False)

    @model_validator(mode="after")
    def _ends_somewhere(self) -> Self:
        if not self.call[1]:
            raise ValueError(
                f"call = {list(self.call)}: the marker behind a call is empty, so no call would end; set it"
            )
        return self


class PlainRenderer:
    """A renderer, as the package `renderers` has them (`renderers.base.Renderer`)."""

    is_prefix_stable = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, markers: Markers | None = None) -> None:
        self._tokenizer = tokenizer
        self._markers = markers or Markers()

    def get_stop_token_ids(self) -> list[int]:
        """The end of the sequence, and the marker behind a call where that is one token."""
        closing = self._encode(self._markers.call[1])
        ends = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        return [*ends, *closing] if len(closing) == 1 else ends

    def render_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """The messages' texts with their markers; tools are not described."""
        del tools, add_generation_prompt
        return self._encode("".join(map(self._text, messages)))

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> RenderedTokens:
        """As `render_ids`."""
        return RenderedTokens(self.render_ids(messages, **options))

    def parse_response(
        self,
        token_ids: Sequence[int],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        prompt_ids: Sequence[int] | None = None,
    ) -> ParsedResponse:
        """The calls in what was sampled, in order, and the text around them."""
        del prompt_ids
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        content, calls = _split(text, *self._markers.call)
        unclosed = ToolCallParseStatus.UNCLOSED_BLOCK
        found = [_parsed(call, tools or ()) if closed else _bad(call, unclosed) for call, closed in calls]
        return ParsedResponse(content=content, tool_calls=found)

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: Sequence[int],
        previous_completion_ids: Sequence[int],
        new_messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedTokens:
        """The tokens so far, and behind them the new messages."""
        given = self.render_ids(new_messages, tools=tools)
        return RenderedTokens([*previous_prompt_ids, *previous_completion_ids, *given])

    def _text(self, message: Mapping[str, Any]) -> str:
        before, after = self._markers.answer if message["role"] == "tool" else self._markers.user
        return f"{before}{message['content']}{after}"

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


def _split(text: str, before: str, after: str) -> tuple[str, list[tuple[str, bool]]]:
    """The text around calls, and each call with whether it was closed."""
    if not before:  # a call is a line up to the marker behind it
        *calls, rest = text.split(after)
        return rest, [(call.strip().rpartition("\n")[2], True) for call in calls]
    content, *parts = text.split(before)
    found = [part.partition(after) for part in parts]
    around = content + "".join(behind for *_, behind in found)
    return around, [(call, bool(end)) for call, end, _ in found]


def _parsed(inside: str, tools: Sequence[Mapping[str, Any]]) -> ParsedToolCall:
    try:
        call = json.loads(inside)
    except ValueError:
        call = None
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        return ParsedToolCall(raw=inside, name=call["name"], arguments=call.get("arguments", {}))
    if (short := _only_text(tools)) is not None:
        name, argument = short
        return ParsedToolCall(raw=inside, name=name, arguments={argument: inside})
    missing = isinstance(call, dict)
    return _bad(inside, ToolCallParseStatus.MISSING_NAME if missing else ToolCallParseStatus.INVALID_JSON)


def _only_text(tools: Sequence[Mapping[str, Any]]) -> tuple[str, str] | None:
    """The tool and its argument, where there is no other tool, and none that is required but this text."""
    if len(tools) != 1:
        return None
    function = tools[0]["function"]
    required = function["parameters"].get("required", [])
    if len(required) != 1 or function["parameters"]["properties"][required[0]].get("type") != "string":
        return None
    return function["name"], required[0]


def _bad(inside: str, status: ToolCallParseStatus) -> ParsedToolCall:
    return ParsedToolCall(raw=inside, status=status)
