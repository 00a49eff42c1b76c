"""Batches that are not sampled to their end, kept in a checkpoint: tokens, log-probs and versions so far.

CHECKPOINT/ahead/unfinished.json           of each batch, its prompts, and how it is sampled
CHECKPOINT/ahead/unfinished-000.parquet    pieces of its turns that head 0 has
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from megatron_rapo.ahead.keeping import FOLDER
from megatron_rapo.environments.generating import Pieces, Turns
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.carried import SoFar
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.rollout.response import Response

_INDEX = "unfinished.json"
_PIECES = pyarrow.schema(
    [
        *((name, pyarrow.int32()) for name in ("batch", "place", "episode", "turn")),
        ("context", pyarrow.string()),
        ("version", pyarrow.int32()),
        ("finish", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int32())),
        ("log_probs", pyarrow.list_(pyarrow.float32())),
    ]
)
"""A row is a piece; those of a turn stand in their order."""


@dataclass(frozen=True)
class Unfinished:
    """A batch that is not sampled to its end.

    Attributes:
        first: the draw of its first prompt; the others follow it.
        prompts: how many it has.
        chosen: how it is sampled.
        so_far: what this head has of it.
    """

    first: int
    prompts: int
    chosen: Sampling
    so_far: SoFar


def keep_unfinished(unfinished: Mapping[int, Unfinished], checkpoint: Path, placement: Placement) -> None:
    """Writes batches into a checkpoint that is being made: each head what it sampled, the main rank the rest.

    Args:
        unfinished: by the step that trains on them.
        checkpoint: its folder.
        placement: this rank's.

    Raises:
        OSError: the disk is full or broken.
    """
    if not unfinished or not placement.is_head:
        return
    folder = checkpoint / FOLDER
    folder.mkdir(exist_ok=True)
    rows = [row for number, batch in unfinished.items() for row in _rows(number, batch.so_far)]
    table = pyarrow.Table.from_pylist(rows, schema=_PIECES)
    pyarrow.parquet.write_table(table, _file(folder, placement.data_rank), compression="zstd")
    if placement.is_main:
        index = {
            "heads": placement.layout.data_parallel,
            "batches": {
                number: {"first": batch.first, "prompts": batch.prompts, "chosen": asdict(batch.chosen)}
                for number, batch in unfinished.items()
            },
        }
        (folder / _INDEX).write_text(json.dumps(index))


def take_up_unfinished(
    checkpoint: Path, *, prompts_per_step: int, partial_tokens: int | None
) -> dict[int, Unfinished]:
    """The batches of a checkpoint, by step, with what all heads had of them.

    Raises:
        RapoError: a batch is damaged, of another size than steps are now, or is to be sampled no further.
    """
    folder = checkpoint / FOLDER
    if not (folder / _INDEX).is_file():
        return {}
    index = json.loads((folder / _INDEX).read_text())
    batches: Mapping[str, Any] = index["batches"]
    for name, described in batches.items():
        if partial_tokens is None or described["prompts"] != prompts_per_step:
            raise RapoError(
                f"{checkpoint} has {described['prompts']} prompts for step {name} whose responses are not "
                f"finished, and rollout.prompts_per_step is {prompts_per_step}, rollout.partial_tokens "
                f"{partial_tokens}; go on with the former values"
            )
    found = {
        int(name): Unfinished(of["first"], of["prompts"], Sampling(**of["chosen"]), {})
        for name, of in batches.items()
    }
    for head in range(index["heads"]):
        for row in _read(_file(folder, head)):
            batch = found[row["batch"]]
            episodes = batch.so_far.setdefault(
                row["place"], [{} for _ in range(batch.chosen.responses_per_prompt)]
            )
            _add(row, episodes[row["episode"]])
    return found


def _file(folder: Path, head: int) -> Path:
    return folder / f"unfinished-{head:03d}.parquet"


def _rows(number: int, so_far: SoFar) -> Iterator[dict[str, Any]]:
    for place, episodes in so_far.items():
        for episode, turns in enumerate(episodes):
            for turn, pieces in turns.items():
                for piece in pieces.sampled:
                    yield {
                        "batch": number,
                        "place": place,
                        "episode": episode,
                        "turn": turn,
                        "context": pieces.context,
                        "version": piece.weight_version,
                        "finish": piece.finish_reason,
                        "token_ids": piece.token_ids,
                        "log_probs": piece.log_probs,
                    }


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(path, schema=_PIECES).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise RapoError(
            f"{path} cannot be read: {error}; remove this checkpoint to go on from the one before"
        ) from error
    return rows


def _add(row: Mapping[str, Any], turns: Turns) -> None:
    piece = Response(
        np.array(row["token_ids"], np.int32),
        np.array(row["log_probs"], np.float32),
        row["version"],
        row["finish"],
    )
    turns.setdefault(row["turn"], Pieces(row["context"], [])).sampled.append(piece)
