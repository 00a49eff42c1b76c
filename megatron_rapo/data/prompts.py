"""What the run trains on: prompts with their gold answers, and the report of what was left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_rapo.data.messages import Message
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence

_SHOWN = 5  # rows of a finding


@dataclass(frozen=True)
class Prompt:
    """One problem, ready to be sampled from.

    Attributes:
        index: row in the source (from 0); the same problem has the same index in every run.
        question: the problem as its source gives it.
        token_ids: the templated prompt.
        answer: the gold answer, in the verifier's notation.
        draw: which draw of the run this is (from 0): it tells the prompt from itself in
            another epoch; 0 where prompts are not drawn from an order.
        name: what its source calls it; None where it has no name.
        source: the name of its data set (`data.label`).
        columns: all columns of its row, as plain Python values.
        messages: the chat that its row is, where it is one; `question` is its last user's turn then.
        demonstration: where given texts are learnt, the prompt with the text; it goes on from `token_ids`.
    """

    index: int
    question: str
    token_ids: tuple[int, ...]
    answer: str
    draw: int = 0
    name: str | None = None
    source: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)
    messages: tuple[Message, ...] | None = field(default=None, hash=False)
    demonstration: TokenSequence | None = field(default=None, compare=False, repr=False)

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """The prompt, and the text to learn where there is one."""
        if self.demonstration is None:
            return self.token_ids
        return tuple(self.demonstration.token_ids.tolist())

    @property
    def id(self) -> str:
        """The source's name for it, or else its row."""
        return str(self.index) if self.name is None else self.name

    @property
    def problem(self) -> Problem:
        """What rewards, environments and methods see of it."""
        return Problem(self.id, self.question, self.answer, self.source, self.token_ids, self.columns)


@dataclass(frozen=True)
class LoadReport:
    """What became of a source's rows. `str()` tells it in a line for each finding.

    Attributes:
        source: the file, or the generated task and its split.
        rows: rows read.
        kept: prompts that the set holds.
        without_question: rows whose question is missing or blank; dropped.
        without_answer: rows whose answer is missing or blank; dropped.
        too_long: rows whose prompt has more than `max_prompt_tokens` tokens; dropped.
        max_prompt_tokens: the limit that `too_long` was measured against.
        duplicates: groups of rows that ask the same, but for white space; kept, so they count double.
        unmatched: rows whose answer no response can match, and why; dropped.
        without_solution: where given texts are learnt, rows without one; dropped.
        solution_too_long: rows whose text, from what is learnt first, has more than `max_response_tokens`
            tokens; dropped.
        max_response_tokens: the limit that it was measured against.
    """

    source: str
    rows: int
    kept: int
    without_question: tuple[int, ...]
    without_answer: tuple[int, ...]
    too_long: tuple[int, ...]
    max_prompt_tokens: int
    duplicates: tuple[tuple[int, ...], ...]
    unmatched: Mapping[int, str] = field(default_factory=dict)
    without_solution: tuple[int, ...] = ()
    solution_too_long: tuple[int, ...] = ()
    max_response_tokens: int = 0

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept} prompts from {self.rows} rows"]
        dropped = {
            "without a question": self.without_question,
            "without an answer": self.without_answer,
            "whose answer no response can match": tuple(self.unmatched),
            "without a text to learn": self.without_solution,
            f"longer than {self.max_prompt_tokens} tokens": self.too_long,
            f"whose text to learn is longer than {self.max_response_tokens} tokens": self.solution_too_long,
        }
        for finding, rows in dropped.items():
            if rows:
                lines.append(f"  dropped {len(rows)} {finding}: rows {_examples(rows)}")
        for row, why in list(self.unmatched.items())[:_SHOWN]:
            lines.append(f"    row {row}: {why}")
        if self.duplicates:
            pairs = _examples(["=".join(map(str, rows)) for rows in self.duplicates])
            lines.append(f"  kept {len(self.duplicates)} questions that occur more than once: rows {pairs}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PromptSet:
    """Prompts in their source's order, never empty, and the report of how they were loaded."""

    prompts: tuple[Prompt, ...]
    report: LoadReport

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, position: int) -> Prompt:
        return self.prompts[position]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)


@dataclass(frozen=True)
class TrainingPrompts:
    """What a run trains on: a set of prompts, or several that are mixed.

    Attributes:
        sets: of each source.
        shares: of each set in the prompts that are drawn; they sum to 1.
        shuffled: whether each set is drawn in a new order each epoch, or in its own.
        held_out: of all sources, texts that are not learnt, but measured.
    """

    sets: tuple[PromptSet, ...]
    shares: tuple[float, ...]
    shuffled: tuple[bool, ...]
    held_out: tuple[Prompt, ...] = ()

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Those of all sets."""
        return tuple(prompt for one in self.sets for prompt in one)

    @property
    def report(self) -> str:
        """What became of each source's rows."""
        held_out = f"\nheld out: {len(self.held_out)} texts" if self.held_out else ""
        if len(self.sets) == 1:
            return f"{self.sets[0].report}{held_out}"
        named = zip(self.sets, self.shares, strict=True)
        told = [f"{one[0].source} ({share:.1%} of prompts): {one.report}" for one, share in named]
        return "\n".join(told) + held_out


def _examples(rows: tuple[int, ...] | list[str]) -> str:
    return ", ".join(map(str, rows[:_SHOWN])) + (", …" if len(rows) > _SHOWN else "")
