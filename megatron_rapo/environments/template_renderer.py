"""Chats continued by the model's own template, where that writes turn behind turn, as Qwen2.5's does.

What stands behind a turn of the policy is what the template writes behind turns that are made up. It must not
hang on what they say, and they must stand there as they were said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from renderers.base import RenderedTokens
from renderers.configs import DefaultRendererConfig
from renderers.default import DefaultRenderer
from transformers import PreTrainedTokenizerBase

_ASKED = {"role": "user", "content": "What is 2 + 3?"}
_SAID = (
    "It is 5.",
    "<think>\nThat is easy.\n</think>\n\nIt is 5.",
)  # some templates take reasoning out again


class TemplateRenderer(DefaultRenderer):
    """A renderer, as the package `renderers` has them (`renderers.base.Renderer`)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DefaultRendererConfig) -> None:
        """Calls are read as Qwen's where there is a token `<tool_call>`, unless `tool_parser` says other."""
        if config.tool_parser is None and "<tool_call>" in tokenizer.get_vocab():
            config = config.model_copy(update={"tool_parser": "qwen3"})
        super().__init__(tokenizer, config)

    def bridge_to_next_turn(
        self,
        previous_prompt_ids: Sequence[int],
        previous_completion_ids: Sequence[int],
        new_messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> RenderedTokens | None:
        """The tokens so far, and behind them the new messages; None where the template has it otherwise."""
        ends = self.get_stop_token_ids()
        if not previous_completion_ids or previous_completion_ids[-1] not in ends:
            return None
        try:
            behind = [self._behind(said, new_messages, tools) for said in _SAID]
        except TemplateError:  # it does not take such messages
            return None
        if behind[0] is None or behind.count(behind[0]) < len(behind):
            return None
        return RenderedTokens([*previous_prompt_ids, *previous_completion_ids, *behind[0]])

    def _behind(
        self, said: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int] | None:
        """What follows a turn that says this; None where it does not stand there as it was said."""
        encoded = self._tokenizer.encode(said, add_special_tokens=False)
        turn = [*self._apply([_ASKED], tools=tools, add_generation_prompt=True), *encoded]
        turn += self.get_stop_token_ids()
        spoken = {"role": "assistant", "content": said}
        whole = self._apply([_ASKED, spoken, *messages], tools=tools, add_generation_prompt=True)
        return whole[len(turn) :] if whole[: len(turn)] == turn else None
