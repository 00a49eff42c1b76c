"""Problems out of files and functions, and out of the generated tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.config.data import (
    ArithmeticData,
    CountdownData,
    Data,
    FileData,
    Format,
    FunctionData,
    ReasoningGymData,
)
from megatron_rapo.config.write import toml_value
from megatron_rapo.data.columns import has
from megatron_rapo.data.files import looks_like, read_records
from megatron_rapo.data.functions import call
from megatron_rapo.data.rows import Layout, Row, read_row
from megatron_rapo.data.tasks import arithmetic, countdown, gym
from megatron_rapo.data.tasks.problem import Problem, Split
from megatron_rapo.errors import RapoError

Generated = CountdownData | ArithmeticData | ReasoningGymData

_FUNCTION_PROMPTS = ("messages", "question", "prompt")


def read_source(
    data: Data,
    option: str = "data",
    *,
    split: Split = "train",
    count: int | None = None,
    needs_answers: bool = True,
    code: Sequence[Path] = (),
) -> tuple[str, list[Row]]:
    """What people call the source, and all its rows, blank ones included.

    Args:
        data: the source.
        option: the table that the user set, as errors call it: `data`, or `evaluate.data`.
        split: of a generated task, and of a function that is told it; a file is one split, named by its path.
        count: of a generated task, how many problems to draw; a function may be told it.
        needs_answers: whether the reward reads gold answers.
        code: folders with the user's own modules (`run.code`).

    Raises:
        RapoError: the source cannot be read, or its rows are not as the options say.
    """
    if isinstance(data, FileData):
        return str(data.path), read_file(data, option, needs_answers)
    if isinstance(data, FunctionData):
        return read_function(data, option, split, count, needs_answers, code)
    number = data.problems if count is None else count
    return _told(data, split), generate(data, split, number, option)


def read_file(data: FileData, option: str = "data", needs_answers: bool = True) -> list[Row]:
    """All rows of the file, blank ones included.

    Raises:
        RapoError: the file is missing or malformed, lacks a configured field in every row, or holds something
            else than its format says in them; or `answer_lists` is set and no answer is a list.
    """
    records = read_records(data.path, f"{option}.path")
    _require_field(data, f"{option}.prompt_field", data.prompt_column, records, option)
    if data.answer_field is not None or (needs_answers and data.format != "messages"):
        _require_field(data, f"{option}.answer_field", data.answer_column, records, option)
    other = looks_like(records)
    prompt = f"set {option}.prompt_field to a field with the problem's text"
    if other not in (None, data.format):
        prompt = _choose(other, option)
    elif data.format != "rows":
        prompt = f"set {option}.prompt_field to a field with text or messages, or correct the row"
    layout = Layout(
        place=f"data file {data.path}",
        prompts=(data.prompt_column,),
        answer=data.answer_column,
        id=data.id_field,
        several=data.answer_lists,
        takes_messages=data.format != "rows",
        needs_answers=needs_answers,
        remedies={
            "prompt": prompt,
            "answer": f"set {option}.answer_field to a field with the gold answer alone",
            "answers": f'set {option}.answer_lists to "any" if each of its answers is right by itself, or to '
            '"all" if a response must give them all',
            "id": f"set {option}.id_field to a field that names every row, or remove it",
        },
    )
    rows = [read_row(index, record, layout) for index, record in enumerate(records)]
    if data.answer_lists and not any(isinstance(row.columns.get(data.answer_column), list) for row in rows):
        raise RapoError(
            f"{option}.answer_lists = {data.answer_lists!r} has no effect: no answer of {data.path} is a "
            "list; remove it"
        )
    return rows


def read_function(
    data: FunctionData,
    option: str,
    split: Split,
    count: int | None,
    needs_answers: bool,
    code: Sequence[Path],
) -> tuple[str, list[Row]]:
    """What people call the function, and the rows of what it returns.

    Raises:
        RapoError: see `data.functions.call`; or its mappings hold no problem, or an answer of another kind.
    """
    place, records = call(data, option, code, split, count)
    if not any(name in record for record in records for name in _FUNCTION_PROMPTS):
        raise RapoError(
            f"{place} returns mappings with {_named(records)}; let each have question (or prompt), a "
            "text, or messages"
        )
    layout = Layout(
        place=place,
        prompts=_FUNCTION_PROMPTS,
        answer="answer",
        id=None,
        several=None,
        takes_messages=True,
        needs_answers=needs_answers,
        remedies={
            "prompt": 'let it be a text, or messages like [{"role": "user", "content": "…"}]',
            "answer": "let it be the gold answer alone, a text or a number",
            "answers": "let it be one text or number, or judge several in a reward function of your own",
        },
    )
    return place, [read_row(index, record, layout) for index, record in enumerate(records)]


def generate(data: Generated, split: Split, count: int, option: str = "data") -> list[Row]:
    """`count` problems of a generated task, drawn by its seed; the same for the same arguments."""
    problems: Sequence[Problem]
    if isinstance(data, CountdownData):
        problems = countdown.generate(data, data.seed, split, count)
    elif isinstance(data, ReasoningGymData):
        problems = gym.generate(data, data.seed, split, count, option)
    else:
        problems = arithmetic.generate(data, data.seed, split, count)
    return [
        Row(index, problem.question, problem.answer, columns=problem.columns)
        for index, problem in enumerate(problems)
    ]


def _told(data: Generated, split: Split) -> str:
    if isinstance(data, ReasoningGymData):
        name, options = f"{data.source} {data.dataset}", data.options or {}
    else:
        name, options = data.source, _task_options(data)
    told = "".join(f"{name} = {toml_value(value)}, " for name, value in options.items())[:-2]
    split_name = {"train": "training", "test": "held-out"}[split]
    return f"{name} ({told}{'; ' if told else ''}{split_name} problems of seed {data.seed})"


def _task_options(data: CountdownData | ArithmeticData) -> dict[str, Any]:
    return data.model_dump(exclude={"source", "label", "reward", "weight", "problems", "seed"})


def _require_field(
    data: FileData, named: str, field: str, records: Sequence[Mapping[str, Any]], option: str
) -> None:
    if any(has(record, field) for record in records):
        return
    other = looks_like(records)
    if other not in (None, data.format):
        raise RapoError(f"data file {data.path} has no field '{field}'; {_choose(other, option)}")
    raise RapoError(
        f"data file {data.path} has no field '{field}'; set {named} to one of its fields: {_named(records)}"
    )


def _choose(format: Format | None, option: str) -> str:
    return f'it has the columns of another format: set {option}.format = "{format}"'


def _named(records: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(sorted({name for record in records for name in record})) or "nothing"
