"""Rows out of records: a question or messages, the gold answer, and all columns beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from megatron_rapo.data.columns import NotPlain, find, plain
from megatron_rapo.data.golds import join
from megatron_rapo.data.messages import Malformed, Message, question_of, read_messages
from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class Row:
    """One row of a source.

    Attributes:
        index: from 0.
        question: blank ones are empty.
        answer: the gold; empty where there is none.
        name: what the row calls itself.
        columns: all it has.
        messages: the prompt, where it is made of them; `question` is the last user's turn then.
        solution: the assistant's turn that stands behind these.
    """

    index: int
    question: str
    answer: str
    name: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[Message, ...] | None = None
    solution: Message | None = None


@dataclass(frozen=True)
class Layout:
    """Where rows of a source have what, and what errors say of it.

    Attributes:
        place: the source, as errors call it.
        prompts: columns that may hold the problem; the first that a row has is it.
        answer: column of the gold.
        id: column that names a row; None: `id` where a row has it.
        several: what a list of golds means; None: it is refused.
        takes_messages: whether a problem may be made of them.
        needs_answers: whether the reward reads golds; otherwise one that is no text is left to the columns.
        remedies: for a `prompt` of another kind, an `answer` that is none, a list of `answers`, and an `id`
            that is none.
    """

    place: str
    prompts: tuple[str, ...]
    answer: str
    id: str | None
    several: Literal["any", "all"] | None
    takes_messages: bool
    needs_answers: bool
    remedies: Mapping[Literal["prompt", "answer", "answers", "id"], str]


def read_row(index: int, record: Mapping[str, Any], layout: Layout) -> Row:
    """The record as a row.

    Raises:
        RapoError: its problem is neither text nor (where they may be) messages, its answer neither text nor
            number, nor as `several` says a list of them, its id neither; or a column is not
            plain (`columns.plain`).
    """
    place = f"{layout.place}, row {index}"
    try:
        columns = plain(record)
    except NotPlain as error:
        raise RapoError(f"{place}{error}") from error
    column = next((name for name in layout.prompts if find(columns, name) is not None), layout.prompts[0])
    question, messages, solution = _problem(find(columns, column), layout, f"{place}: field '{column}'")
    answer = find(columns, layout.answer)
    said = "" if solution is None else (solution.get("content") or "").strip()
    gold = said if answer is None else _gold(answer, layout, f"{place}: field '{layout.answer}'")
    return Row(index, question, gold, _name(columns, layout, place), columns, messages, solution)


def _problem(
    value: Any, layout: Layout, place: str
) -> tuple[str, tuple[Message, ...] | None, Message | None]:
    """The question, the messages if it is made of them, and the answer that these end with."""
    if value is None or isinstance(value, str):
        return (value if value and value.strip() else ""), None, None
    if not layout.takes_messages:
        raise RapoError(f"{place} is {value!r:.200}, not text; {layout.remedies['prompt']}")
    try:
        messages, solution = read_messages(value)
    except Malformed as error:
        raise RapoError(f"{place} is {error}; {layout.remedies['prompt']}") from error
    question = question_of(messages)
    return (question if question.strip() else ""), tuple(messages), solution


def _name(record: Mapping[str, Any], layout: Layout, place: str) -> str | None:
    """The row's own name: of `id`, which every row must have then, or of the column `id` if it has one."""
    name = find(record, layout.id or "id")
    is_name = name is not None and not isinstance(name, bool | list | dict)
    if layout.id is not None and not is_name:
        raise RapoError(
            f"{place}: field '{layout.id}' is {name!r}, neither text nor number; {layout.remedies['id']}"
        )
    return str(name) if is_name else None


def _gold(answer: object, layout: Layout, place: str) -> str:
    """The gold answer as one text; blank where there is none."""
    if not layout.needs_answers and isinstance(answer, bool | list | tuple | dict) and layout.several is None:
        return ""
    if not isinstance(answer, list):
        return _answer_text(answer, layout, place)
    if layout.several is None:
        raise RapoError(f"{place} is {answer!r}, a list; {layout.remedies['answers']}")
    texts = [_answer_text(one, layout, place) for one in answer]
    return join([text for text in texts if text], layout.several)


def _answer_text(answer: object, layout: Layout, place: str) -> str:
    """The answer as stripped text; null is blank."""
    if isinstance(answer, bool | list | dict) or not isinstance(answer, str | int | float | Decimal | None):
        raise RapoError(f"{place} is {answer!r}, no text and no number; {layout.remedies['answer']}")
    return "" if answer is None else str(answer).strip()
