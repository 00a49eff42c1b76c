"""What a run loaded, by content: it goes on with the same alone, wherever that lies by then."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rapo.config import MixtureData, RunConfig
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.fingerprint import (
    files_fingerprint,
    fingerprint,
    in_json,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from megatron_rapo.folder import write_whole

FILE = "identity.json"
SHOWN = 3  # rows in a message


@dataclass(frozen=True)
class Row:
    """A prompt that the run trains on: its row in its source, and fingerprints of what it became.

    Attributes:
        source: the name of its data set where there are several.
    """

    source: str
    index: int
    question: str
    answer: str
    tokens: str
    columns: str

    @property
    def place(self) -> tuple[str, int]:
        """The prompt's data set and row."""
        return self.source, self.index


@dataclass(frozen=True)
class Identity:
    """What was loaded.

    Attributes:
        contents: weights and tokenizer, a fingerprint each, by a name for people.
        evaluation: the problems of each evaluation data set, likewise.
        prompts: in the source's order, which the run's order follows from.
    """

    contents: dict[str, str]
    evaluation: dict[str, str]
    prompts: Sequence[Row]

    @classmethod
    def of(cls, config: RunConfig, prompts: Sequence[Prompt], evaluation: dict[str, str]) -> Identity:
        """Reads weights and tokenizer in part (`fingerprint`).

        Args:
            config: of the run.
            prompts: all that it may train on, as they became: rows that are dropped are not among them.
            evaluation: the fingerprint of each evaluation data set, by name.
        """
        model, teacher = config.model, config.teacher
        contents = {
            "weights of model.path": weights_fingerprint(model.path),
            "tokenizer or chat template of model.path": tokenizer_fingerprint(model.path),
        }
        if model.checkpoint is not None:
            contents["weights of model.checkpoint"] = _checkpoint_fingerprint(model.checkpoint)
        if model.reference_path is not None:
            contents["weights of model.reference_path"] = weights_fingerprint(model.reference_path)
        if teacher is not None and teacher.checkpoint is None:
            contents["weights of the teacher"] = weights_fingerprint(teacher.path)
        elif teacher is not None and teacher.checkpoint is not None:
            contents["weights of the teacher"] = _checkpoint_fingerprint(teacher.checkpoint)
        if isinstance(config.data, MixtureData):
            order = [(one.name, one.weight, getattr(one, "shuffle", True)) for one in config.data.sources]
            contents["weights or shuffling of data.sources"] = fingerprint(order)
        mixed = len({prompt.source for prompt in prompts}) > 1  # else a set may be called otherwise
        rows = [_row(prompt, prompt.source if mixed else "") for prompt in prompts]
        return cls(contents, evaluation, rows)

    @classmethod
    def read(cls, directory: Path) -> Identity | None:
        """That of the run in the directory; None where it tells none.

        Raises:
            RapoError: the file is damaged.
        """
        path = directory / FILE
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            rows = [Row(*row) for row in values["prompts"]]
            return cls(dict(values["contents"]), dict(values["evaluation"]), rows)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RapoError(
                f"{path} is damaged ({error!r}); restore it: nothing else tells whether the run goes on with "
                "the data and weights that it began with"
            ) from error

    def write(self, directory: Path) -> None:
        """Leaves it in the run's directory, whole."""
        values = {**vars(self), "prompts": [list(asdict(row).values()) for row in self.prompts]}
        write_whole(directory / FILE, json.dumps(values) + "\n")

    def fingerprints(self) -> dict[str, str]:
        """What a checkpoint must share with the run, in short."""
        prompts = fingerprint(asdict(row).values() for row in self.prompts)
        return {"training prompts": prompts, **self.contents}

    def differences(self, now: Identity) -> list[str]:
        """What `now` has otherwise, a phrase each. What only one of them has is no difference."""
        others = [
            *(f"other {name}" for name in _other(self.contents, now.contents)),
            *(f"other problems to evaluate on in {name}" for name in _other(self.evaluation, now.evaluation)),
        ]
        return [*_row_differences(self.prompts, now.prompts), *others]


def _checkpoint_fingerprint(path: Path) -> str:
    return files_fingerprint([file for file in path.rglob("*") if file.is_file()])


def prompts_fingerprint(prompts: Sequence[Prompt]) -> str:
    """16 hex digits that differ where prompts or their columns do."""
    return fingerprint(
        part for p in prompts for part in (p.question, p.answer, p.all_token_ids, in_json(p.columns))
    )


def _other(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    return [name for name, value in before.items() if now.get(name, value) != value]


def _row(prompt: Prompt, source: str) -> Row:
    parts = (prompt.question, prompt.answer, prompt.all_token_ids, in_json(prompt.columns))
    return Row(source, prompt.index, *(fingerprint([part]) for part in parts))


def _row_differences(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    if list(before) == list(now):
        return []
    old, new = ({row.place: row for row in rows} for rows in (before, now))
    both = [(row, new[row.place]) for row in before if row.place in new]
    kinds: dict[str, list[tuple[str, int]]] = {
        "another question in": [one.place for one, other in both if one.question != other.question],
        "another answer in": [
            one.place for one, other in both if one.question == other.question and one.answer != other.answer
        ],
        "other tokens of the same question in": [
            one.place for one, other in both if one.question == other.question and one.tokens != other.tokens
        ],
        "other columns of the same question and answer in": [
            one.place
            for one, other in both
            if _beside(one) == _beside(other) and one.columns != other.columns
        ],
        "no more": [place for place in old if place not in new],
        "new": [place for place in new if place not in old],
    }
    told = [f"{kind} {_named(rows)}" for kind, rows in kinds.items() if rows]
    return [f"other training prompts ({'; '.join(told) or 'in another order'})"]


def _beside(row: Row) -> tuple[str, str]:
    """What other findings tell of, which are columns too."""
    return row.question, row.answer


def _named(rows: Sequence[tuple[str, int]]) -> str:
    sources = {source for source, _ in rows}
    shown = ", ".join(str(row) if len(sources) == 1 else f"{of} {row}" for of, row in rows[:SHOWN])
    more = f" and {len(rows) - SHOWN:,} more" if len(rows) > SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
