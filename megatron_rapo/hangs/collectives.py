"""Which collectives a rank has entered and not left, by PyTorch's flight recorder; and who waits for whom."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from megatron_rapo.observe.heartbeat import name_ranks


@dataclass(frozen=True)
class Entered:
    """The newest collective that one rank has entered, of one process group.

    Attributes:
        group: the group's name, the same on all its ranks.
        about: what the group is for.
        ranks: of the group, by their numbers in the job.
        number: of the collective, counted by group from 1.
        operation: such as `all_reduce`.
        waits: whether the rank has not left it.
    """

    group: str
    about: str
    ranks: tuple[int, ...]
    number: int
    operation: str
    waits: bool


def entered() -> list[Entered]:
    """This rank's newest collective of each group in which it has peers to wait for.

    From any thread; empty where nothing is recorded.
    """
    from torch._C import _distributed_c10d

    # Collectives, no stacks, and also those that ended.
    trace = pickle.loads(_distributed_c10d._dump_fr_trace(True, False, False))  # type: ignore[attr-defined]
    world = dist.distributed_c10d._world
    groups = list(world.pg_names.items())
    ranks = {str(name): tuple(world.pg_group_ranks[group]) for group, name in groups}
    members = {name: own for name, own in ranks.items() if len(own) > 1}
    newest: dict[str, dict[str, Any]] = {}
    for entry in trace.get("entries", []):
        if not entry["is_p2p"] and entry["process_group"][0] in members:
            newest[entry["process_group"][0]] = entry
    return [_entered(entry, members[name]) for name, entry in newest.items()]


def _entered(entry: Mapping[str, Any], ranks: tuple[int, ...]) -> Entered:
    name, about = entry["process_group"]
    operation = entry["profiling_name"].partition(":")[2] or entry["profiling_name"]
    # Not by the group's status: its counts are of sends and receives, too. Gloo's stay "scheduled" for ever.
    ended = entry["retired"] or entry["state"] == "completed"
    return Entered(name, about, ranks, entry["collective_seq_id"], operation, waits=not ended)


def to_json(found: Sequence[Entered]) -> list[dict[str, Any]]:
    """For `from_json`."""
    return [asdict(one) for one in found]


def from_json(found: Sequence[Mapping[str, Any]]) -> list[Entered]:
    """What `to_json` gave."""
    return [Entered(**{**one, "ranks": tuple(one["ranks"])}) for one in found]


def who_waits(ranks: Mapping[int, Sequence[Entered]]) -> list[str]:
    """Sentences for people: who waits in which collective for whom, and who is in another one than its peers.

    Args:
        ranks: what each rank entered; of a rank that is not here nothing is known.
    """
    waiting: dict[tuple[str, int], dict[int, Entered]] = {}
    for rank, found in ranks.items():
        for one in found:
            if one.waits:
                waiting.setdefault((one.group, one.number), {})[rank] = one
    return [_sentence(inside, ranks) for _, inside in sorted(waiting.items())]


def _sentence(inside: Mapping[int, Entered], ranks: Mapping[int, Sequence[Entered]]) -> str:
    some = next(iter(inside.values()))
    group = f"{some.about} ({name_ranks(some.ranks)})"
    by_operation: dict[str, list[int]] = {}
    for rank, one in inside.items():
        by_operation.setdefault(one.operation, []).append(rank)
    entered_by = {r: one.number for r, found in ranks.items() for one in found if one.group == some.group}
    absent = [r for r in some.ranks if r not in inside and entered_by.get(r, 0) < some.number]
    within = " and ".join(
        f"{name_ranks(there)} wait{'' if len(there) > 1 else 's'} in {operation}"
        for operation, there in sorted(by_operation.items())
    )
    sentence = f"{within}, number {some.number} of group {group}"
    if absent:
        sentence += f", for {name_ranks(absent)}"
    if len(by_operation) > 1:
        sentence += ": the ranks of a group must call the same"
    return sentence


def holding_up(ranks: Mapping[int, Sequence[Entered]]) -> list[int]:
    """Ranks that others wait for and that wait in no collective themselves, or of which nothing is known."""
    waited_for: set[int] = set()
    for found in ranks.values():
        for one in found:
            if one.waits:
                waited_for |= {
                    rank
                    for rank in one.ranks
                    if all(own.number < one.number for own in ranks.get(rank, ()) if own.group == one.group)
                }
    return sorted(r for r in waited_for if not any(one.waits for one in ranks.get(r, ())))
