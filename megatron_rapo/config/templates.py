"""The options of how a problem becomes a prompt, which all sources of questions share."""

from __future__ import annotations

import re
from string import Formatter
from typing import Any

from pydantic import Field, model_validator

from megatron_rapo.config.source import Source
from megatron_rapo.section import PathOption, Section

_STATEMENT = re.compile(r"\{\{|\{%")  # of Jinja
SET_BY_US = ("messages", "problem", "add_generation_prompt", "continue_final_message", "strftime_now")
"""What templates are given in any case, so that no option may give it."""

OF_TURNS = ("template_text", "system_prompt", "few_shot", "few_shot_file")
"""Options of what `messages` are made of."""


class Shot(Section):
    """A worked example, a table of `[[data.few_shot]]`."""

    question: str = Field(description="As the data would have it: `template_text` goes around it.")
    answer: str = Field(description="The whole response to it.")


class Templated(Source):
    """Options of sources whose questions are put into a template."""

    template: str = Field(
        "chat",
        description="`chat`: the tokenizer's own chat template; `plain`: `template_text` alone; or a chat "
        "template of one's own, as a file (`prompt.jinja`) or as Jinja text. It sees `messages`, and "
        "`problem` with all columns.",
    )
    template_text: str = Field(
        "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
        description="The user's turn; `{prompt}` stands for the problem, `{{` and `}}` for braces. Problems "
        "that are messages already stay as they are.",
    )
    template_options: dict[str, Any] | None = Field(
        None,
        description="Switches of the chat template, such as `{ enable_thinking = false }`, or `tools`; one "
        "that the template does not mention is refused.",
    )
    system_prompt: str | None = Field(
        None, description="System turn of the chat template; refused where the data bring their own."
    )
    few_shot: list[Shot] = Field(
        [], description="Worked examples before the question, as turns of the chat or as plain text."
    )
    few_shot_file: PathOption | None = Field(
        None, description="A .jsonl file of such examples, each with `question` and `answer`."
    )

    def without_effect(self) -> dict[str, str]:
        return (
            dict.fromkeys(("system_prompt", "template_options"), 'template is "plain"')
            if self.template == "plain"
            else {}
        )

    @property
    def has_own_template(self) -> bool:
        """Whether `template` is a Jinja text or file."""
        return self.template not in ("chat", "plain")

    @model_validator(mode="after")
    def _check_template(self) -> Templated:
        if self.has_own_template and not (
            self.template.endswith(".jinja") or _STATEMENT.search(self.template)
        ):
            raise ValueError(
                f'template = "{self.template}" is neither "chat" nor "plain", nor a .jinja file, nor Jinja '
                "text (which has {{ }} or {% %}); choose one"
            )
        _check_text(self.template_text)
        for option in SET_BY_US:
            if option in (self.template_options or {}):
                raise ValueError(f"template_options has {option!r}, which every template is given; remove it")
        if self.few_shot and self.few_shot_file is not None:
            raise ValueError(
                f"few_shot_file = '{self.few_shot_file}' stands beside few_shot; keep one of them"
            )
        if self.few_shot_file is not None and self.few_shot_file.suffix != ".jsonl":
            raise ValueError(f"few_shot_file = '{self.few_shot_file}' is no .jsonl file; convert it")
        return self


def _check_text(text: str) -> None:
    """Nothing of the format language but `{prompt}` itself: `{prompt[0]}` would ask for a letter."""
    try:
        fields = [rest for _, *rest in Formatter().parse(text) if rest[0] is not None]
    except ValueError as error:
        fields = [[str(error)]]
    for field in fields:
        if field != ["prompt", "", None]:
            raise ValueError(
                f"template_text = {text!r} has {field[0]!r} in braces, and more than {{prompt}} is not "
                "understood; write {prompt} for the problem, and {{ }} for literal braces"
            )
    if not fields:
        raise ValueError(f"template_text = {text!r} lacks {{prompt}}; add it")
