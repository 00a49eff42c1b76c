"""The options of each prompt source: files, functions, generated tasks."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_rapo.config.source import Source
from megatron_rapo.config.templates import Templated
from megatron_rapo.section import NonNegativeInt, PathOption, PositiveInt, Section
from megatron_rapo.user_code import ADDRESS

_SEED_MEANING = (
    "Draws the problems, of training and held out; runs of another `run.seed` have the same ones, in another "
    "order."
)
_SHUFFLE_MEANING = "A new order each epoch, by `run.seed`; else the source's own."

Format = Literal["rows", "messages", "verl", "slime"]
PROMPT_FIELDS: dict[Format, str] = {
    "rows": "question",
    "messages": "messages",
    "verl": "prompt",
    "slime": "prompt",
}
ANSWER_FIELDS: dict[Format, str] = {
    "rows": "answer",
    "messages": "answer",
    "verl": "reward_model.ground_truth",
    "slime": "label",
}


class FileData(Templated):
    """Prompts from a JSONL or Parquet file, in a format of one's own or in one that others use."""

    source: Literal["file"]
    path: PathOption = Field(description="A .jsonl or .parquet file, one problem a row.")
    format: Format = Field(
        "rows",
        description="`rows`: a text and its answer; `messages`: chats as OpenAI has them; `verl`, `slime`: "
        "as those packages read them (docs/data.md).",
    )
    prompt_field: str | None = Field(
        None,
        description="Field that holds the problem, as text or (but for `rows`) as messages; dots lead into "
        "nested ones. Default: `question` of `rows`, `messages` of `messages`, else `prompt`.",
    )
    answer_field: str | None = Field(
        None,
        description="Field that holds the gold answer. Where the reward needs one, rows without are reported "
        "and dropped. Default: `answer` of `rows` and `messages`, `reward_model.ground_truth` of `verl`, "
        "`label` of `slime`.",
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
    shuffle: bool = Field(True, description=_SHUFFLE_MEANING)

    @property
    def name(self) -> str:
        """What its evaluation is filed under."""
        return self.label or self.path.stem

    @property
    def prompt_column(self) -> str:
        """Where the problem stands."""
        return self.prompt_field or PROMPT_FIELDS[self.format]

    @property
    def answer_column(self) -> str:
        """Where the gold answer stands."""
        return self.answer_field or ANSWER_FIELDS[self.format]

    @model_validator(mode="after")
    def _check(self) -> FileData:
        if self.path.suffix not in (".jsonl", ".parquet"):
            raise ValueError(
                f"path = '{self.path}' is neither .jsonl nor .parquet; convert it to one of them"
            )
        return self


class FunctionData(Templated):
    """Prompts from a function of one's own (docs/data.md)."""

    source: Literal["function"]
    problems: str = Field(
        description="`module:function`, of `run.code` or of an installed package. It returns mappings, each "
        "with `question`, `prompt` or `messages`, and `answer` where there is one."
    )
    count: PositiveInt | None = Field(
        None,
        description="How many problems to take; given to the function if it has such a parameter. Default: "
        "all.",
    )
    seed: NonNegativeInt = Field(1234, description="Given to the function if it has such a parameter.")
    shuffle: bool = Field(True, description=_SHUFFLE_MEANING)

    @property
    def name(self) -> str:
        """What its evaluation is filed under."""
        return self.label or self.problems.partition(":")[2]

    @model_validator(mode="after")
    def _check(self) -> FunctionData:
        if not ADDRESS.fullmatch(self.problems):
            raise ValueError(
                f'problems = "{self.problems}" names no function; write it like "my_data:problems"'
            )
        return self


class CountdownData(Source):
    """Generated: reach a target with given numbers, each used once, by + − × ÷ and brackets."""

    source: Literal["countdown"]
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


class ArithmeticData(Source):
    """Generated: integer sums and products, answered in `\\boxed{}`."""

    source: Literal["arithmetic"]
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


class ReasoningGymData(Templated):
    """Generated by reasoning_gym, which scores answers itself (docs/data.md); its package is an extra."""

    source: Literal["reasoning_gym"]
    dataset: str = Field(description="One of its datasets, such as `chain_sum`.")
    options: dict[str, Any] | None = Field(
        None, description="Options of the dataset, such as `{ max_terms = 4 }`. Default: its own."
    )
    problems: PositiveInt = Field(10_000, le=1_000_000, description="Size of the training set.")
    seed: NonNegativeInt = Field(1234, description=_SEED_MEANING)
    shuffle: bool = Field(True, description=_SHUFFLE_MEANING)

    @property
    def name(self) -> str:
        """What its evaluation is filed under."""
        return self.label or self.dataset


Data = Annotated[
    FileData | FunctionData | ReasoningGymData | CountdownData | ArithmeticData,
    Field(discriminator="source"),
]


class MixtureData(Section):
    """Prompts of several sources (`[[data.sources]]`), in shares that every stretch of the run keeps."""

    source: Literal["mixture"]
    sources: list[Data] = Field(
        description="Two sources or more, each a table like `[data]`, with a `weight`."
    )

    @model_validator(mode="after")
    def _check(self) -> MixtureData:
        if len(self.sources) < 2:
            raise ValueError(f"sources has {len(self.sources)}, which is no mixture; name two or more")
        for place, one in enumerate(self.sources):
            if one.weight is None:
                raise ValueError(f"sources[{place}].weight is missing; set it")
        for name, times in Counter(one.name for one in self.sources).items():
            if times > 1:
                raise ValueError(f'sources has "{name}" {times} times; tell them apart by label')
        return self


TrainingData = Annotated[
    FileData | FunctionData | ReasoningGymData | CountdownData | ArithmeticData | MixtureData,
    Field(discriminator="source"),
]
