"""Batches that wait for their steps, kept in a checkpoint: the weights that sampled them are gone.

CHECKPOINT/ahead/batches.json                        of each batch, which groups it has
CHECKPOINT/ahead/samples/step_000012-000.parquet     its episodes that head 0 has (docs/samples.md)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import PLAIN, Guide
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch, Prompts
from megatron_rapo.experience.sharing import share
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.samples.store import Recorded, read_step, scored, steps_of, write_part

FOLDER = "ahead"
_INDEX = "batches.json"


def keep(ready: Mapping[int, Batch], checkpoint: Path, placement: Placement) -> None:
    """Writes batches into a checkpoint that is being made: each head what it sampled, the main rank the rest.

    Args:
        ready: by the step that trains on them.
        checkpoint: its folder.
        placement: this rank's.

    Raises:
        OSError: the disk is full or broken.
    """
    folder = checkpoint / FOLDER
    if not ready or not placement.is_head:
        return
    folder.mkdir(exist_ok=True)
    for step, batch in ready.items():
        write_part(folder, step, placement.data_rank, list(_rows(batch)))
    if placement.is_main:
        index = {step: _described(batch) for step, batch in ready.items()}
        (folder / _INDEX).write_text(json.dumps(index))


def take_up(
    checkpoint: Path, prompts: Prompts, placement: Placement, *, prompts_per_step: int, whole: bool
) -> dict[int, Batch]:
    """The batches of a checkpoint, by step; all ranks call it. It moves the prompts' position.

    Args:
        checkpoint: its folder.
        prompts: that they were drawn from.
        placement: this rank's.
        prompts_per_step: what a batch must have.
        whole: whether all ranks get tokens and texts (`Method.reads_responses`).

    Raises:
        RapoError: a batch is damaged, or of another size than steps are now.
    """
    folder = checkpoint / FOLDER
    if not (folder / _INDEX).is_file():
        return {}
    files = steps_of(folder)
    ready: dict[int, Batch] = {}
    for name, described in json.loads((folder / _INDEX).read_text()).items():
        if len(described["chosen"]) != prompts_per_step:
            raise RapoError(
                f"{checkpoint} has a batch of {len(described['chosen'])} prompts for step {name}, which was "
                f"sampled ahead, and rollout.prompts_per_step is {prompts_per_step}; go on with the former "
                "value, at first with rollout.max_staleness = 0: the next checkpoint has no such batch then"
            )
        ready[int(name)] = _batch(described, files[int(name)], prompts, placement, whole=whole)
    return ready


def _rows(batch: Batch) -> Iterator[Recorded]:
    for place, group in sorted(batch.sampled.whole.items()):
        for number, one in enumerate(group.episodes):
            yield Recorded(batch.first + place, number, batch.temperature, group.problem, one, False)


def _described(batch: Batch) -> dict[str, Any]:
    places = {id(group): place for place, group in enumerate(batch.drawn)}
    guides = [[one.guide for one in group.episodes] for group in batch.drawn]
    guided = any(guide != PLAIN for of_group in guides for guide in of_group)
    return {
        "first": batch.first,
        "drawn": len(batch.drawn),
        "chosen": [places[id(group)] for group in batch.groups],
        "rounds": batch.rounds,
        "teaching": batch.teaching,
        "temperature": batch.temperature,
        "guides": [[asdict(guide) for guide in of_group] for of_group in guides] if guided else None,
    }


def _batch(
    described: Mapping[str, Any],
    files: Sequence[Path],
    prompts: Prompts,
    placement: Placement,
    *,
    whole: bool,
) -> Batch:
    """The batch; each head reads its share, which need not be what that head sampled."""
    prompts.position = described["first"]
    problems = [prompt.problem for prompt in prompts.draw(described["drawn"])]
    mine: list[Group] = []
    if placement.is_head:
        rows: dict[int, list[dict[str, Any]]] = {place: [] for place in range(len(problems))}
        for row in read_step(files):
            rows[row["draw"] - described["first"]].append(row)
        for place in range(placement.data_rank, len(problems), placement.layout.data_parallel):
            mine.append(Group(problems[place], tuple(map(scored, rows[place]))))
    sampled = share(problems, mine, placement, whole=whole)
    if described["guides"] is not None:
        sampled = sampled.guided([list(map(_guide, of_group)) for of_group in described["guides"]])
    return Batch(
        [sampled.groups[place] for place in described["chosen"]],
        sampled,
        described["rounds"],
        tuple(described["teaching"]),
        described["first"],
        described["temperature"],
    )


def _guide(fields: Mapping[str, Any]) -> Guide:
    """JSON has no tuples."""
    after = fields["after"]
    return Guide(**{**fields, "after": None if after is None else tuple(after)})
