"""The options of each prompt source: files and generated tasks."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_rapo.section import NonNegativeInt, PathOption, PositiveInt, Section

_LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LABEL_MEANS = "letters, digits, dots, hyphens and underscores, a letter or digit first"
_LABEL_MEANING = "What evaluations call it. Default: the file's name, or the task's."
_SEED_MEANING = (
    "Draws the problems, of training and held out; runs of another `run.seed` have the same ones, in another "
    "order."
)


class FileData(Section):
    """Prompts from a JSONL or Parquet file."""

    source: Literal["file"]
    label: str | None = Field(None, pattern=_LABEL, description=_LABEL_MEANING)
    path: PathOption = Field(description="A .jsonl or .parquet file, one problem a row.")
    prompt_field: str = Field("question", description="Field that holds the problem.")
    answer_field: str = Field(
        "answer", description="Field that holds the gold answer; rows without one are reported and dropped."
    )
    answer_lists: Literal["any", "all"] | None = Field(
        None,
        description="What a list in `answer_field` means, as OlympiadBench's `final_answer` is one. `any`: "
        "each of its answers is right by itself; `all`: a response must give them all. Default: lists are "
        "refused.",
    )
    id_field: str | None = Field(
        None, description="Field that names a problem. Default: `id` where a row has it, else its number."
    )
    template: Literal["plain", "chat"] = Field(
        "chat",
        description="`chat`: the tokenizer's own chat template; `plain`: `template_text` alone.",
    )
    template_text: str = Field(
        "{prompt}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
        description="The user's turn; `{prompt}` stands for the problem, `{{` and `}}` for braces.",
    )
    system_prompt: str | None = Field(None, description="System turn of the chat template.")
    shuffle: bool = Field(True, description="A new order each epoch, by `run.seed`; else the file's order.")

    def without_effect(self) -> dict[str, str]:
        return {"system_prompt": 'template is "plain"'} if self.template == "plain" else {}

    @property
    def name(self) -> str:
        """What its evaluation is filed under."""
        return self.label or self.path.stem

    @model_validator(mode="after")
    def _check(self) -> FileData:
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(
                f"path = '{self.path}' is neither .jsonl nor .parquet; convert it to one of them"
            )
        _check_template(self.template_text)
        return self


def _check_template(text: str) -> None:
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


class CountdownData(Section):
    """Generated: reach a target with given numbers, each used once, by + − × ÷ and brackets."""

    source: Literal["countdown"]
    label: str | None = Field(None, pattern=_LABEL, description=_LABEL_MEANING)
    numbers: Literal[3, 4] = Field(4, description="How many numbers a problem gives.")
    largest: int = Field(25, ge=2, le=99, description="Numbers are drawn from 1 to this.")
    operators: str = Field("+-*", description="Operators that a problem's hidden solution uses, of `+-*/`.")
    problems: PositiveInt = Field(10_000, le=1_000_000, description="Size of the training set.")
    seed: NonNegativeInt = Field(1234, description=_SEED_MEANING)

    @property
    def name(self) -> str:
        """What its evaluation is filed under."""
        return self.label or self.source

    @model_validator(mode="after")
    def _check(self) -> CountdownData:
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"operators = {self.operators!r} must be a choice of the characters '+-*/'")
        return self


class ArithmeticData(Section):
    """Generated: integer sums and products, answered in `\\boxed{}`."""

    source: Literal["arithmetic"]
    label: str | None = Field(None, pattern=_LABEL, description=_LABEL_MEANING)
    terms: int = Field(2, ge=2, le=6, description="Numbers a problem combines.")
    digits: int = Field(2, ge=1, le=6, description="Digits of the largest number.")
    operators: str = Field("+-*", description="Operators, of `+-*`.")
    problems: PositiveInt = Field(10_000, le=1_000_000, description="Size of the training set.")
    seed: NonNegativeInt = Field(1234, description=_SEED_MEANING)

    @property
    def name(self) -> str:
        """What its evaluation is filed under."""
        return self.label or self.source

    @model_validator(mode="after")
    def _check(self) -> ArithmeticData:
        if not self.operators or set(self.operators) - set("+-*"):
            raise ValueError(f"operators = {self.operators!r} must be a choice of the characters '+-*'")
        return self


Data = Annotated[FileData | CountdownData | ArithmeticData, Field(discriminator="source")]
