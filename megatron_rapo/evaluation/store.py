"""The samples of an evaluation on disk: what is written is whole, what is not there is still to be sampled.

    DIRECTORY/evaluation.json                     the manifest
    DIRECTORY/DATA/problems.parquet               id, question, answer and prompt of each problem
    DIRECTORY/DATA/SETTING/part-000-000000.parquet   samples, in the order in which they came

`docs/evaluation.md` describes the columns.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.compute
import pyarrow.dataset
import pyarrow.parquet

from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.counts import COUNTED, Counts, count
from megatron_rapo.evaluation.manifest import FILE, Manifest

_LABEL = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
_SEQUENCE = pyarrow.struct(
    [("token_ids", pyarrow.list_(pyarrow.int32())), ("log_probs", pyarrow.list_(pyarrow.float32()))]
)
SAMPLES = pyarrow.schema(
    [
        ("problem", _LABEL),
        ("sample", pyarrow.int32()),
        ("outcome", _LABEL),
        ("reward", pyarrow.float64()),
        ("extracted", pyarrow.string()),
        ("length", pyarrow.int32()),
        ("truncated", pyarrow.bool_()),
        ("seed", pyarrow.int64()),
        ("text", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("log_probs", pyarrow.list_(pyarrow.float32())),
        ("given", pyarrow.int32()),
        ("sequences", pyarrow.list_(_SEQUENCE)),
    ]
)
"""The columns of a part; the last two are null in those of earlier versions."""

PROBLEMS = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("question", pyarrow.string()),
        ("answer", pyarrow.string()),
        ("prompt_ids", pyarrow.list_(pyarrow.int32())),
    ]
)

ROWS_OF_A_GROUP = 256  # rows that are read together: what a filter on a problem cannot skip


@dataclass(frozen=True)
class Problem:
    """A problem as it was evaluated.

    Attributes:
        id: unique in its data set.
        prompt_ids: the templated prompt's tokens.
    """

    id: str
    question: str
    answer: str
    prompt_ids: tuple[int, ...]


@dataclass(frozen=True)
class StoredSample:
    """One row of a part.

    Attributes:
        problem: the problem's id.
        sample: number of the sample, from 0; with the evaluation's seed it determines `seed`.
        reward: None where it is unknown; also read of parts that were written before rewards were kept.
        extracted: the final answer that the verifier found; None where it found none, or did not finish.
        text: without special tokens.
        token_ids: int32, of the last sequence, from its first sampled token on.
        log_probs: float32, the engine's, in nats; NaN where a token was given.
        given: tokens that were given after the prompt.
        sequences: `token_ids` and `log_probs` of each sequence, whole, where there are several; else None.
    """

    problem: str
    sample: int
    outcome: Outcome
    extracted: str | None
    truncated: bool
    seed: int
    text: str
    token_ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]
    reward: float | None = None
    given: int = 0
    sequences: Sequence[Mapping[str, npt.NDArray[Any]]] | None = None

    @property
    def length(self) -> int:
        """Sampled tokens, of all sequences."""
        parts = [self.log_probs] if self.sequences is None else [one["log_probs"] for one in self.sequences]
        return sum(len(part) - int(np.isnan(part).sum()) for part in parts)


class SampleStore:
    """The samples of one data set at one setting."""

    def __init__(self, directory: Path, problems: Sequence[Problem]) -> None:
        self.directory = directory
        self.problems = tuple(problems)

    def parts(self) -> list[Path]:
        """Complete parts; a kill leaves none that is not."""
        return sorted(self.directory.glob("part-*.parquet"))

    def write(self, samples: Sequence[StoredSample], writer: int = 0) -> None:
        """Adds a part; it appears whole or not at all.

        Args:
            samples: in any order.
            writer: number of the process among those that write here at the same time.
        """
        if not samples:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        number = len(list(self.directory.glob(f"part-{writer:03d}-*.parquet")))
        final = self.directory / f"part-{writer:03d}-{number:06d}.parquet"
        partial = final.with_suffix(".partial")
        columns = {name: [getattr(sample, name) for sample in samples] for name in SAMPLES.names}
        try:
            pyarrow.parquet.write_table(
                pyarrow.table(columns, schema=SAMPLES),
                partial,
                compression="zstd",
                row_group_size=ROWS_OF_A_GROUP,
            )
            partial.replace(final)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RapoError(
                f"samples cannot be written to {final}: {error}; what stood there before is intact: free "
                "space, then run the same command again to go on"
            ) from error

    def present(self) -> set[tuple[str, int]]:
        """(problem, sample number) of every sample on disk.

        Raises:
            RapoError: one is there twice.
        """
        self.check()
        table = self.read(["problem", "sample"])
        return set(zip(table["problem"].to_pylist(), table["sample"].to_pylist(), strict=True))

    def check(self) -> None:
        """Raises RapoError where a sample is on disk twice: it would count double."""
        table = self.read(["problem", "sample"])
        # Not by its labels: each part has dictionaries of its own.
        table = table.set_column(0, "problem", table["problem"].cast(pyarrow.string()))
        times = table.group_by(["problem", "sample"]).aggregate([([], "count_all")])
        doubles = times.filter(pyarrow.compute.field("count_all") > 1).to_pylist()
        if doubles:
            problem, sample, count = (doubles[0][key] for key in ("problem", "sample", "count_all"))
            raise RapoError(
                f"{self.directory} holds {len(doubles):,} samples more than once (sample {sample} of problem "
                f"{problem} {count} times): its parts were copied, or two processes wrote to it; evaluate "
                "again, into another directory"
            )

    def read(self, columns: Sequence[str]) -> pyarrow.Table:
        """The named columns of all samples; for those of a few bytes a sample."""
        return self._dataset.to_table(columns=list(columns))

    def stream(
        self, columns: Sequence[str], *, problems: Iterable[str] | None = None, outcome: Outcome | None = None
    ) -> Iterator[pyarrow.RecordBatch]:
        """The named columns, some hundred samples at a time: for texts, tokens and log-probs.

        Args:
            problems: only samples of these; parts and row groups without them are hardly read.
            outcome: only samples with this one.
        """
        wanted = None
        if problems is not None:
            wanted = pyarrow.dataset.field("problem").isin(pyarrow.array(list(problems), pyarrow.string()))
        if outcome is not None:
            is_outcome = pyarrow.dataset.field("outcome") == outcome.value
            wanted = is_outcome if wanted is None else wanted & is_outcome
        yield from self._dataset.to_batches(
            columns=list(columns),
            filter=wanted,
            batch_size=ROWS_OF_A_GROUP,
            batch_readahead=2,
            fragment_readahead=1,
        )

    def counts(self) -> Counts:
        """How each problem's samples came out; reads neither texts nor tokens."""
        return count(self.read(COUNTED), [problem.id for problem in self.problems])

    @property
    def _dataset(self) -> pyarrow.dataset.Dataset:
        return pyarrow.dataset.dataset([str(part) for part in self.parts()], schema=SAMPLES, format="parquet")


class Evaluation:
    """A stored evaluation: its manifest, and its samples by data set and setting."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest

    @classmethod
    def open(cls, directory: Path) -> Evaluation:
        """Reads one from disk.

        Raises:
            RapoError: the directory holds none, its manifest is not of this format, or a sample is there
                twice.
        """
        evaluation = cls(directory, Manifest.read(directory))
        for data, setting in evaluation:
            evaluation.samples(data, setting).check()
        return evaluation

    @cached_property
    def _problems(self) -> dict[str, tuple[Problem, ...]]:
        return {data.name: _read_problems(self.directory / data.name) for data in self.manifest.data}

    def problems(self, data: str) -> tuple[Problem, ...]:
        """The problems of a data set, in its order."""
        return self._problems[data]

    def samples(self, data: str, setting: str) -> SampleStore:
        """The samples of a data set at a setting, both by name."""
        return SampleStore(self.directory / data / setting, self.problems(data))

    def __iter__(self) -> Iterator[tuple[str, str]]:
        """The names (data set, setting) of all sample stores."""
        for data in self.manifest.data:
            for setting in self.manifest.settings:
                yield data.name, setting.name


def begin(directory: Path, manifest: Manifest, problems: Mapping[str, Sequence[Problem]]) -> Evaluation:
    """Writes all but samples; `problems` by data set. What is there already of the same stays.

    Raises:
        RapoError: the directory cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, rows in problems.items():
            write_problems(directory / name, rows)
        manifest.write(directory)
    except OSError as error:
        raise RapoError(
            f"the evaluation cannot be written to {directory}: {error.strerror or error}; free space, or "
            "choose another place"
        ) from error
    return Evaluation(directory, manifest)


def write_problems(directory: Path, problems: Sequence[Problem]) -> None:
    """Writes a data set's problems.parquet into its folder."""
    directory.mkdir(parents=True, exist_ok=True)
    columns = {name: [getattr(problem, name) for problem in problems] for name in PROBLEMS.names}
    partial = directory / "problems.partial"
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=PROBLEMS), partial, compression="zstd")
    partial.replace(directory / "problems.parquet")


def remove(directory: Path) -> None:
    """Removes a stored evaluation, manifest first, so that no half of one can be taken for a whole."""
    (directory / FILE).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _read_problems(directory: Path) -> tuple[Problem, ...]:
    try:
        table = pyarrow.parquet.read_table(directory / "problems.parquet", schema=PROBLEMS)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise RapoError(
            f"{directory / 'problems.parquet'} cannot be read: {error}; "
            "evaluate again, into another directory"
        ) from error
    return tuple(
        Problem(row["id"], row["question"], row["answer"], tuple(row["prompt_ids"]))
        for row in table.to_pylist()
    )
