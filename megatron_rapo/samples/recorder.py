"""Keeps what each step sampled, while the trainer goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from types import TracebackType
from typing import Self

from megatron_rapo.config import RunConfig
from megatron_rapo.data.batching import Sample
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.experience.batch import Batch
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.samples.store import Recorded, keep_newest, write_part


class SampleRecorder:
    """Writes what a head samples, in a thread of its own; a context manager. Other ranks write nothing.

    An error of the disk is raised by the next call, or at the end.
    """

    def __init__(self, config: RunConfig, placement: Placement) -> None:
        self._run = config.run.directory
        self._every = config.observe.samples_every
        self._keep = config.observe.samples_keep
        self._placement = placement
        self._thread = ThreadPoolExecutor(1, "samples")
        self._writing: Future[None] | None = None

    def record(
        self,
        step: int,
        batch: Batch,
        minibatches: Sequence[Sequence[Sample]],
    ) -> None:
        """Keeps the step's episodes, also those of groups that dynamic sampling left out.

        Args:
            step: whose they are.
            batch: all that was sampled.
            minibatches: what the step trains on.

        Raises:
            OSError: the samples of an earlier step could not be written.
        """
        self.finish()
        if not self._every or step % self._every or not self._placement.is_head:
            return
        rows = list(_rows(batch, minibatches))
        self._writing = self._thread.submit(self._write, step, rows)

    def finish(self) -> None:
        """Waits until all that was recorded is on disk.

        Raises:
            OSError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, rows: Sequence[Recorded]) -> None:
        write_part(self._run, step, self._placement.data_rank, rows)
        if self._keep is not None and self._placement.is_main:
            keep_newest(self._run, self._keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.finish()


def _rows(batch: Batch, minibatches: Sequence[Sequence[Sample]]) -> Iterator[Recorded]:
    """Of this head."""
    in_loss = _in_loss(batch.groups, minibatches)
    trained = {id(group): flags for group, flags in zip(batch.groups, in_loss, strict=True)}
    for place, group in sorted(batch.sampled.whole.items()):
        flags = trained.get(id(batch.drawn[place]), [False] * len(group.episodes))
        for number, (scored, flag) in enumerate(zip(group.episodes, flags, strict=True)):
            own = scored.guide.temperature or batch.temperature
            yield Recorded(batch.first + place, number, own, group.problem, scored, flag)


def _in_loss(groups: Sequence[Group], minibatches: Sequence[Sequence[Sample]]) -> list[list[bool]]:
    """Whether each episode is in the loss; samples are the episodes' sequences, in the groups' order."""
    samples = iter([sample for minibatch in minibatches for sample in minibatch])

    def is_in_loss(scored: ScoredEpisode) -> bool:
        own = list(islice(samples, len(scored.episode.sequences)))
        return any(sample.token_weight for sample in own)

    return [[is_in_loss(scored) for scored in group.episodes] for group in groups]
