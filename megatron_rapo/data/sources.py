"""Problems out of JSONL and Parquet files, and out of the generated tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_rapo.config.data import ArithmeticData, CountdownData, FileData
from megatron_rapo.data.golds import join
from megatron_rapo.data.tasks import arithmetic, countdown
from megatron_rapo.data.tasks.problem import Split
from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class Row:
    """One row of a source; a blank question or answer is an empty string, and `columns` are all it has."""

    index: int
    question: str
    answer: str
    name: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_file(data: FileData, option: str = "data") -> list[Row]:
    """All rows of the file, blank ones included.

    Args:
        data: the file and its fields.
        option: the table that the user set, as errors call it: `data`, or `evaluate.data`.

    Raises:
        RapoError: the file is missing or malformed, lacks a configured field in every row, or holds something
            else than text in the question, or than text or a number (or as `answer_lists` says a list of
            them) in the answer, or than those in the id; or text that is no Unicode; or `answer_lists` is
            set and no answer is a list.
    """
    try:
        records = _read_parquet(data.path) if data.path.suffix == ".parquet" else _read_jsonl(data.path)
    except FileNotFoundError as error:
        raise RapoError(f"data file {data.path} does not exist; correct {option}.path") from error
    except OSError as error:
        raise RapoError(f"data file {data.path} cannot be read: {error}; correct {option}.path") from error
    if not records:
        raise RapoError(f"data file {data.path} has no rows; point {option}.path at one with problems")
    _require_field(data.path, f"{option}.prompt_field", data.prompt_field, records)
    _require_field(data.path, f"{option}.answer_field", data.answer_field, records)
    rows = []
    for index, record in enumerate(records):
        question, answer = record.get(data.prompt_field), record.get(data.answer_field)
        place = f"data file {data.path}, row {index}"
        if not isinstance(question, str | None):
            raise RapoError(
                f"{place}: field '{data.prompt_field}' is {question!r}, not text; set {option}.prompt_field "
                "to a field with the problem's text"
            )
        text = question if question and question.strip() else ""
        gold = _gold(answer, data, option, f"{place}: field '{data.answer_field}'")
        row = Row(index, text, gold, _name(data, option, index, record), record)
        for column, value in (
            (data.prompt_field, row.question),
            (data.answer_field, row.answer),
            (data.id_field or "id", row.name or ""),
        ):
            _require_unicode(value, f"{place}: field '{column}'")
        rows.append(row)
    if data.answer_lists and not any(isinstance(record.get(data.answer_field), list) for record in records):
        raise RapoError(
            f"{option}.answer_lists = {data.answer_lists!r} has no effect: no answer of {data.path} is a "
            "list; remove it"
        )
    return rows


def generate(data: CountdownData | ArithmeticData, split: Split, count: int) -> list[Row]:
    """`count` problems of a generated task, drawn by its seed; the same for the same arguments."""
    if isinstance(data, CountdownData):
        problems = countdown.generate(data, data.seed, split, count)
    else:
        problems = arithmetic.generate(data, data.seed, split, count)
    return [
        Row(index, problem.question, problem.answer, columns=problem.columns)
        for index, problem in enumerate(problems)
    ]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    records = []
    with path.open("rb") as lines:  # bytes: only \n ends a line, not the line separators inside of strings
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig")
                record = json.loads(text)
            except (ValueError, RecursionError) as error:  # malformed JSON, or bytes that are not UTF-8
                raise RapoError(
                    f"{path}:{number} is not JSON: {error}; correct or remove the line"
                ) from error
            if not isinstance(record, dict):
                raise RapoError(
                    f"{path}:{number} is not a JSON object but {text[:60]!r}; each line must hold one row's "
                    "fields"
                )
            records.append(record)
    return records


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException, ValueError) as error:  # ValueError: text that is not UTF-8
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file itself; of damaged pages Arrow says so without an error number
        reason = " ".join(str(error).split())
        raise RapoError(f"data file {path} is not valid Parquet: {reason}; write it again") from error


def _require_field(path: Path, option: str, field: str, records: Sequence[Mapping[str, Any]]) -> None:
    if not any(field in record for record in records):
        present = ", ".join(sorted({name for record in records for name in record}))
        raise RapoError(
            f"data file {path} has no field '{field}'; set {option} to one of its fields: {present}"
        )


def _require_unicode(text: str, place: str) -> None:
    """JSON can write half of a surrogate pair, which is no character and cannot be stored or tokenized."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RapoError(
            f"{place} has {text[error.start]!a} at character {error.start}, half of a surrogate pair and no "
            "character; correct or remove the row"
        ) from error


def _name(data: FileData, option: str, index: int, record: Mapping[str, Any]) -> str | None:
    """The row's own name: of `id_field`, which every row must have then, or of `id` if it has one."""
    name = record.get(data.id_field or "id")
    if data.id_field is not None and (name is None or isinstance(name, bool | list | dict)):
        raise RapoError(
            f"data file {data.path}, row {index}: field '{data.id_field}' is {name!r}, neither text nor "
            f"number; set {option}.id_field to a field that names every row, or remove it"
        )
    return None if name is None or isinstance(name, bool | list | dict) else str(name)


def _gold(answer: object, data: FileData, option: str, place: str) -> str:
    """The gold answer as one text; blank where there is none."""
    if not isinstance(answer, list):
        return _answer_text(answer, option, place)
    if data.answer_lists is None:
        raise RapoError(
            f'{place} is {answer!r}, a list; set {option}.answer_lists to "any" if each of its answers is '
            'right by itself, or to "all" if a response must give them all'
        )
    texts = [_answer_text(one, option, place) for one in answer]
    return join([text for text in texts if text], data.answer_lists)


def _answer_text(answer: object, option: str, place: str) -> str:
    """The answer as stripped text; null and NaN (the null of some Parquet writers) are blank."""
    if isinstance(answer, float) and math.isnan(answer):
        return ""
    if isinstance(answer, bool | list | dict) or not isinstance(answer, str | int | float | Decimal | None):
        raise RapoError(
            f"{place} is {answer!r}, no text and no number; set {option}.answer_field to a field with the "
            "gold answer alone"
        )
    if isinstance(answer, float | Decimal) and not math.isfinite(answer):
        raise RapoError(f"{place} is {answer!r}, no finite number; correct or remove the row")
    return "" if answer is None else str(answer).strip()
