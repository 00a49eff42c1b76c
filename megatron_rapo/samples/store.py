"""A run's samples on disk: what is there is whole, and belongs to a step that the run has done.

    RUN/samples/step_000012-000.parquet    step 12, the share of head 0

`docs/samples.md` describes the columns.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_rapo.episode.brief import BriefSequence
from megatron_rapo.episode.episode import Episode, ScoredEpisode
from megatron_rapo.episode.outcome import Outcome, Verification, encodable
from megatron_rapo.episode.problem import Problem
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.folder import writing_file

FOLDER = "samples"

_LABEL = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
_FACTS = pyarrow.map_(pyarrow.string(), pyarrow.float64())
_OF_TOKENS = {
    "token_ids": pyarrow.int32(),
    "sampled": pyarrow.bool_(),
    "log_probs": pyarrow.float32(),
    "versions": pyarrow.int32(),
}
_SEQUENCES = pyarrow.list_(pyarrow.struct([(n, pyarrow.list_(kind)) for n, kind in _OF_TOKENS.items()]))
SAMPLES = pyarrow.schema(
    [
        ("step", pyarrow.int32()),
        ("draw", pyarrow.int64()),
        ("number", pyarrow.int32()),
        ("temperature", pyarrow.float64()),
        ("problem", _LABEL),
        ("source", _LABEL),
        ("question", _LABEL),
        ("gold", _LABEL),
        ("outcome", _LABEL),
        ("reward", pyarrow.float64()),
        ("facts", _FACTS),
        ("extracted", pyarrow.string()),
        ("why", pyarrow.string()),
        ("trace", pyarrow.string()),
        ("length", pyarrow.int32()),
        ("given", pyarrow.int32()),
        ("truncated", pyarrow.bool_()),
        ("trained", pyarrow.bool_()),
        ("text", pyarrow.string()),
        ("environment_facts", _FACTS),
        ("sequences", _SEQUENCES),
    ]
)
"""The columns of a file."""

ROWS_OF_A_GROUP = 256  # rows that are read together

_NAME = re.compile(r"step_(\d+)-\d+\.parquet")


@dataclass(frozen=True)
class Recorded:
    """An episode of a step, as it is kept.

    Attributes:
        draw: which draw of the run its prompt was.
        number: of the episode among those of its prompt.
        temperature: that it was sampled at.
        trained: whether its tokens were in the loss.
    """

    draw: int
    number: int
    temperature: float
    problem: Problem
    scored: ScoredEpisode
    trained: bool


def write_part(run: Path, step: int, head: int, rows: Sequence[Recorded]) -> None:
    """Writes a head's share of a step, in place of what is there; it appears whole or not at all.

    Raises:
        OSError: the disk is full or broken (`folder.writing_to` makes a message of it).
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    final = folder / f"step_{step:06d}-{head:03d}.parquet"
    partial = final.with_suffix(".partial")
    try:
        with writing_file(partial):
            pyarrow.parquet.write_table(
                _table(step, rows), partial, compression="zstd", row_group_size=ROWS_OF_A_GROUP
            )
        partial.replace(final)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def steps_of(run: Path) -> dict[int, list[Path]]:
    """The files of each step that is there, steps and files in order."""
    found: dict[int, list[Path]] = {}
    for path in sorted((run / FOLDER).glob("step_*.parquet")):
        if name := _NAME.fullmatch(path.name):
            found.setdefault(int(name[1]), []).append(path)
    return dict(sorted(found.items()))


def drop_after(run: Path, step: int) -> None:
    """Removes what a run that goes on after `step` samples again, and what was never whole."""
    for partial in (run / FOLDER).glob("step_*.partial"):
        partial.unlink(missing_ok=True)
    _drop(path for found, paths in steps_of(run).items() if found > step for path in paths)


def keep_newest(run: Path, count: int) -> None:
    """Removes all but the newest steps."""
    _drop(path for paths in list(steps_of(run).values())[:-count] for path in paths)


def read_step(
    paths: Sequence[Path],
    columns: Sequence[str] | None = None,
    *,
    only: Collection[tuple[int, int]] | None = None,
) -> list[dict[str, Any]]:
    """Rows of a step's files, in the order in which prompts were drawn; facts as dictionaries.

    Args:
        paths: of the step (`steps_of`).
        columns: what to read, `draw` and `number` among them; None: all.
        only: (draw, number) of the rows; None: all. Tokens of others are not kept in memory.

    Raises:
        RapoError: a file is damaged.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            with pyarrow.parquet.ParquetFile(path) as part:
                for batch in part.iter_batches(ROWS_OF_A_GROUP, columns=columns):
                    rows += _taken(batch, only).to_pylist(maps_as_pydicts="strict")
        except (OSError, pyarrow.ArrowException) as error:
            raise RapoError(
                f"{path} cannot be read: {error}; remove it to see the other samples of the run"
            ) from error
    return sorted(rows, key=lambda row: (row["draw"], row["number"]))


def scored(row: Mapping[str, Any]) -> ScoredEpisode:
    """The episode of a row that `read_step` read."""
    episode = Episode(
        tuple(map(_sequence_of, row["sequences"])),
        row["text"],
        truncated=row["truncated"],
        facts=row["environment_facts"],
    )
    verification = Verification(
        Outcome(row["outcome"]),
        row["extracted"],
        row["why"],
        reward=row["reward"],
        facts=row["facts"],
        trace=row["trace"],
    )
    return ScoredEpisode(episode, verification)


def _sequence_of(fields: Mapping[str, Any]) -> TokenSequence:
    return TokenSequence(
        token_ids=np.array(fields["token_ids"], np.int32),
        sampled=np.array(fields["sampled"], bool),
        log_probs=np.array(fields["log_probs"], np.float32),
        versions=np.array(fields["versions"], np.int32),
    )


def _taken(batch: pyarrow.RecordBatch, only: Collection[tuple[int, int]] | None) -> pyarrow.RecordBatch:
    if only is None:
        return batch
    keys = zip(batch["draw"].to_pylist(), batch["number"].to_pylist(), strict=True)
    return batch.filter(pyarrow.array([key in only for key in keys], pyarrow.bool_()))


def _drop(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


def _table(step: int, rows: Sequence[Recorded]) -> pyarrow.Table:
    episodes = [row.scored.episode for row in rows]
    judged = [row.scored.verification for row in rows]
    columns: Mapping[str, Any] = {
        "step": [step] * len(rows),
        "draw": [row.draw for row in rows],
        "number": [row.number for row in rows],
        "temperature": [row.temperature for row in rows],
        "problem": [row.problem.id for row in rows],
        "source": [row.problem.source for row in rows],
        "question": [row.problem.question for row in rows],
        "gold": [row.problem.answer for row in rows],
        "outcome": [one.outcome.value for one in judged],
        "reward": [one.reward for one in judged],
        "facts": [list(one.facts.items()) for one in judged],
        "extracted": [one.extracted for one in judged],
        "why": [one.why for one in judged],
        "trace": [one.trace for one in judged],
        "length": [episode.sampled_tokens for episode in episodes],
        "given": [episode.given_tokens for episode in episodes],
        "truncated": [episode.truncated for episode in episodes],
        "trained": [row.trained for row in rows],
        "text": [encodable(episode.answer) for episode in episodes],
        "environment_facts": [list(episode.facts.items()) for episode in episodes],
        "sequences": _sequences([episode.sequences for episode in episodes]),
    }
    return pyarrow.table(columns, schema=SAMPLES)


def _sequences(episodes: Sequence[Sequence[TokenSequence | BriefSequence]]) -> pyarrow.ListArray:
    """Of arrays as they are: there may be millions of tokens."""
    sequences = [sequence for episode in episodes for sequence in episode]
    offsets = _offsets([len(sequence) for sequence in sequences])
    fields = [
        pyarrow.ListArray.from_arrays(
            offsets,
            pyarrow.array(
                np.concatenate([getattr(sequence, name) for sequence in sequences] or [np.zeros(0)]),
                type=kind,
                from_pandas=False,  # NaN stays a number
            ),
        )
        for name, kind in _OF_TOKENS.items()
    ]
    structs = pyarrow.StructArray.from_arrays(fields, names=list(_OF_TOKENS))
    return pyarrow.ListArray.from_arrays(_offsets(list(map(len, episodes))), structs)


def _offsets(lengths: Sequence[int]) -> pyarrow.Array:
    return pyarrow.array(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]), type=pyarrow.int32())
