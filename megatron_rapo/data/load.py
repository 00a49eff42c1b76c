"""The prompt set of a run: read or generated, templated, with nothing dropped in silence."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import RunConfig
from megatron_rapo.config.data import ArithmeticData, CountdownData, Data
from megatron_rapo.data.columns import has
from megatron_rapo.data.demonstrations import encode_demonstrations, solution_of
from megatron_rapo.data.prompts import LoadReport, Prompt, PromptSet, TrainingPrompts
from megatron_rapo.data.rows import Row
from megatron_rapo.data.sources import read_source
from megatron_rapo.data.tasks.problem import Split
from megatron_rapo.data.templates import encode_plain, encode_template
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.fingerprint import in_json
from megatron_rapo.methods.demonstrations import Demonstrations
from megatron_rapo.tools.described import load_tools

Judge = Callable[[Data, Sequence[str]], Sequence[str | None]]
"""Of a source's gold answers: why no response can match each, or None where one can."""


def load_prompts(
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    split: Split,
    count: int | None,
    option: str = "data",
    date: str | None = None,
    judge: Judge | None = None,
    needs_answers: bool = True,
    code: Sequence[Path] = (),
    tools: Sequence[Mapping[str, Any]] = (),
    demonstrations: Demonstrations | None = None,
    max_response_tokens: int = 0,
) -> PromptSet:
    """Loads prompts, drops the unusable ones, and reports them.

    Args:
        data: the source and its template. A generated task's question is its whole prompt.
        tokenizer: the policy's.
        max_prompt_tokens: longer prompts are dropped.
        split: of a generated task; a file is one split, named by its path.
        count: how many prompts; of a file, the first usable ones, so that all evaluations have
            the same. None: all of the file, or `data.problems` of a generated task.
        option: the table that the user set, as errors call it: `data`, or `evaluate.data`.
        date: the day that chat templates are told; None: today (UTC).
        judge: rows of files and functions whose gold answer no response can match are dropped, too; None:
            golds are not looked at.
        needs_answers: whether the reward reads gold answers; if so, rows without one are dropped.
        code: folders with the user's own modules (`run.code`).
        tools: as in `encode_template`.
        demonstrations: which texts of the rows are learnt; rows without one are dropped. None: none are.
        max_response_tokens: rows with longer ones are dropped.

    Raises:
        RapoError: the source cannot be read, holds fewer usable prompts than `count` or none at all, or
            the tokenizer lacks the template.
    """
    source, rows = read_source(data, option, split=split, count=count, needs_answers=needs_answers, code=code)
    if isinstance(data, CountdownData | ArithmeticData):
        usable, unmatched = rows, dict[int, str]()  # right by construction
    else:
        usable, unmatched = _judged(data, rows, judge, needs_answers)
    without_solution: tuple[int, ...] = ()
    if demonstrations is not None:
        usable, without_solution = _taught(usable, demonstrations, source)
    encoded = _encode(usable, tokenizer, data, demonstrations, source, option, date, tools)
    prompts = [
        one.prompt(data.name)
        for one in encoded
        if len(one.token_ids) <= max_prompt_tokens and one.learnt <= max_response_tokens
    ][:count]
    report = LoadReport(
        source=source,
        rows=len(rows),
        kept=len(prompts),
        without_question=tuple(row.index for row in rows if not row.question),
        without_answer=tuple(row.index for row in rows if needs_answers and row.question and not row.answer),
        unmatched=unmatched,
        too_long=tuple(one.row.index for one in encoded if len(one.token_ids) > max_prompt_tokens),
        max_prompt_tokens=max_prompt_tokens,
        duplicates=_duplicates(usable),
        without_solution=without_solution,
        solution_too_long=tuple(one.row.index for one in encoded if one.learnt > max_response_tokens),
        max_response_tokens=max_response_tokens,
    )
    if not prompts:
        limits = "rollout.max_prompt_tokens" + (" or max_response_tokens" if demonstrations else "")
        raise RapoError(f"no prompt is usable; correct {option} or {limits}\n{report}")
    if count is not None and len(prompts) < count:
        raise RapoError(
            f"{count} prompts were asked for, but {len(prompts)} are usable; ask for no more\n{report}"
        )
    return PromptSet(tuple(prompts), report)


@dataclass(frozen=True)
class _Encoded:
    """A row as tokens: of its prompt, and of what is learnt with it, where texts are given."""

    row: Row
    token_ids: tuple[int, ...]
    demonstration: TokenSequence | None = None

    @property
    def learnt(self) -> int:
        """Tokens from the first that is learnt on; 0 where no text is given."""
        return 0 if self.demonstration is None else len(self.demonstration) - len(self.token_ids)

    def prompt(self, source: str) -> Prompt:
        row = self.row
        return Prompt(
            row.index,
            row.question,
            self.token_ids,
            row.answer,
            name=row.name,
            source=source,
            columns=row.columns,
            messages=row.messages,
            demonstration=self.demonstration,
        )


def _encode(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    demonstrations: Demonstrations | None,
    source: str,
    option: str,
    date: str | None,
    tools: Sequence[Mapping[str, Any]],
) -> list[_Encoded]:
    """Each row as tokens; the arguments are `load_prompts`'s."""
    if demonstrations is not None:
        taught = encode_demonstrations(rows, tokenizer, data, demonstrations, source, option, date, tools)
        encoded = [
            _Encoded(row, tuple(one.token_ids[: one.trained.argmax()].tolist()), one)
            for row, one in zip(rows, taught, strict=True)
        ]
    else:
        if isinstance(data, CountdownData | ArithmeticData):
            prompts = encode_plain([row.question for row in rows], tokenizer)
        else:
            prompts = encode_template(rows, tokenizer, data, option, date, tools)
        encoded = [_Encoded(row, tuple(ids)) for row, ids in zip(rows, prompts, strict=True)]
    for one in encoded:
        if not one.token_ids:
            raise RapoError(
                f"the tokenizer {tokenizer.name_or_path} has no token for any character of "
                f"{one.row.question!r}; use the tokenizer that the model was trained with"
            )
    return encoded


def _taught(rows: Sequence[Row], wanted: Demonstrations, source: str) -> tuple[list[Row], tuple[int, ...]]:
    """Rows with a text to learn; the numbers of the others."""
    if wanted.column is not None and not any(has(row.columns, wanted.column) for row in rows):
        there = ", ".join(sorted({name for row in rows for name in row.columns})) or "none"
        raise RapoError(
            f'algorithm.solution = "{wanted.column}" is no column of {source} (its columns: {there}); name '
            "one with what the assistant is to say"
        )
    kept = [row for row in rows if solution_of(row, wanted, source)]
    indices = {row.index for row in kept}
    return kept, tuple(row.index for row in rows if row.index not in indices)


def _judged(
    data: Data, rows: Sequence[Row], judge: Judge | None, needs_answers: bool
) -> tuple[list[Row], dict[int, str]]:
    """The rows that can be trained on; of those whose gold no response can match, why, by row."""
    whole = [row for row in rows if row.question and (row.answer or not needs_answers)]
    whys = judge(data, [row.answer for row in whole]) if judge and needs_answers else [None] * len(whole)
    unmatched = {row.index: why for row, why in zip(whole, whys, strict=True) if why is not None}
    return [row for row in whole if row.index not in unmatched], unmatched


def load_source(
    config: RunConfig,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    *,
    split: Split,
    count: int | None,
    judge: Judge | None = None,
) -> PromptSet:
    """As `load_prompts`, with what the run's other options say of it."""
    demonstrations = config.demonstrations if split == "train" else None
    return load_prompts(
        data,
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        split=split,
        count=count,
        option=option,
        date=config.run.date,
        judge=judge,
        needs_answers=demonstrations is None and config.needs_answers(data),
        code=config.run.code,
        tools=tool_schemas(config),
        demonstrations=demonstrations,
        max_response_tokens=config.rollout.max_response_tokens,
    )


def load_training_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, judge: Judge | None = None
) -> TrainingPrompts:
    """The prompts that the run trains on, of each source at least as many as a step draws of it.

    Args:
        judge: as in `load_prompts`.

    Raises:
        RapoError: they cannot be loaded, or are fewer.
    """
    sources = config.training_sources
    weights = [source.weight or 1.0 for source in sources]
    shares = tuple(weight / sum(weights) for weight in weights)
    sets = tuple(
        load_source(config, source, tokenizer, table, split="train", count=None, judge=judge)
        for source, table in zip(sources, config.training_tables, strict=True)
    )
    sets, held_out = _hold_out(sets, config.demonstrations)
    for prompts, share, table in zip(sets, shares, config.training_tables, strict=True):
        _require_enough(config, prompts, share)
        _require_columns(config, prompts, table)
    shuffled = tuple(getattr(source, "shuffle", True) for source in sources)
    return TrainingPrompts(sets, shares, shuffled, held_out)


def _hold_out(
    sets: tuple[PromptSet, ...], given: Demonstrations | None
) -> tuple[tuple[PromptSet, ...], tuple[Prompt, ...]]:
    """The sets without their last texts, and these."""
    count = 0 if given is None else given.held_out
    if not count:
        return sets, ()
    for prompts in sets:
        if len(prompts) <= count:
            raise RapoError(
                f"algorithm.held_out = {count} leaves none of the {len(prompts)} texts of "
                f"{prompts.report.source} to learn; lower it"
            )
    kept = tuple(PromptSet(prompts.prompts[:-count], prompts.report) for prompts in sets)
    return kept, tuple(prompt for prompts in sets for prompt in prompts.prompts[-count:])


def tool_schemas(config: RunConfig) -> list[Mapping[str, Any]]:
    """JSON schemas of the tools that the policy may call; none where it calls none.

    Raises:
        RapoError: one does not exist, or cannot be described.
    """
    return [tool.schema for tool in load_tools(config.environment.tools, config.run.code)]


def _require_enough(config: RunConfig, prompts: PromptSet, share: float) -> None:
    step = config.rollout.prompts_per_step
    if len(prompts) >= math.ceil(step * share):
        return
    most = math.floor(len(prompts) / share)
    drawn = "" if share == 1 else f" at a share of {share:.1%}"
    raise RapoError(
        f"rollout.prompts_per_step = {step} is more than the {len(prompts)} prompts of "
        f"{prompts.report.source}{drawn}, and a step would have copies of them; lower it to {most} "
        "or less, or give more data"
    )


def _require_columns(config: RunConfig, prompts: PromptSet, table: str) -> None:
    """That what the method reads of problems is there, in one of them at least."""
    for column in config.new_method().columns:
        if not any(prompt.columns.get(column) for prompt in prompts):
            there = ", ".join(prompts[0].columns) or "none"
            raise RapoError(
                f'method "{config.algorithm.method}" reads the column {column!r} of problems, which no row '
                f"of {table} has (its columns: {there}); give the data one, or name another in [algorithm]"
            )


def _duplicates(rows: Sequence[Row]) -> tuple[tuple[int, ...], ...]:
    """Rows that ask the same question, but for white space."""
    same: defaultdict[str, list[int]] = defaultdict(list)
    for row in rows:
        asked = row.question if row.messages is None else in_json(row.messages)
        same[" ".join(asked.split())].append(row.index)
    return tuple(tuple(indices) for indices in same.values() if len(indices) > 1)
