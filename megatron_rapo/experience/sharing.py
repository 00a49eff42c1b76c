"""Groups that heads sampled, on all ranks: without tokens and texts, of which there are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_rapo.environments.times import Times
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.episode.problem import Problem
from megatron_rapo.parallel.placement import Placement


@dataclass
class Shared:
    """Groups of a step as one rank has them.

    Attributes:
        groups: the same on all ranks; brief, unless the method reads responses.
        heads: the replica whose head sampled each.
        whole: those that this rank sampled, with tokens and texts, by place in `groups`.
        times: of the episodes that this rank ran.
    """

    groups: list[Group] = field(default_factory=list)
    heads: list[int] = field(default_factory=list)
    whole: dict[int, Group] = field(default_factory=dict)
    times: Times = field(default_factory=Times)

    def extend(self, other: Shared) -> None:
        """Appends the groups of a further round."""
        self.whole |= {len(self.groups) + place: group for place, group in other.whole.items()}
        self.groups += other.groups
        self.heads += other.heads
        self.times.extend(other.times)

    def join(self, other: Shared) -> None:
        """Appends to each group the further episodes of the same problem, that another one has."""
        self.groups = [_joined(*pair) for pair in zip(self.groups, other.groups, strict=True)]
        self.whole = {place: _joined(group, other.whole[place]) for place, group in self.whole.items()}
        self.times.extend(other.times)

    def guided(self, guides: Sequence[Sequence[Guide]]) -> Shared:
        """With the guides by which the episodes were asked for, `[groups][episodes]`."""
        whole = {place: _guided(group, guides[place]) for place, group in self.whole.items()}
        groups = [_guided(group, own) for group, own in zip(self.groups, guides, strict=True)]
        return replace(self, groups=groups, whole=whole)

    def answer(self, place: int, number: int, placement: Placement) -> str:
        """The text of an episode, on all ranks, which all call it."""
        here = self.whole.get(place)
        mine = "" if here is None else here.episodes[number].episode.answer
        return placement.share_from_heads(mine)[self.heads[place]]


def _joined(group: Group, further: Group) -> Group:
    return Group(group.problem, group.episodes + further.episodes)


def _guided(group: Group, guides: Sequence[Guide]) -> Group:
    pairs = zip(group.episodes, guides, strict=True)
    return Group(group.problem, tuple(replace(one, guide=guide) for one, guide in pairs))


def share(problems: Sequence[Problem], mine: Sequence[Group], placement: Placement, *, whole: bool) -> Shared:
    """What all heads sampled, in the problems' order; all ranks call it.

    Args:
        problems: the same on all ranks.
        mine: what this head sampled: groups of each DP-th problem, from that of its replica's number on; none
            on other ranks.
        placement: this rank's.
        whole: whether all ranks get tokens and texts (`Method.reads_responses`).
    """
    heads = placement.layout.data_parallel
    # Every rank has the problems, whose columns may be large.
    shares = placement.share_from_heads([(one if whole else one.brief()).episodes for one in mine])
    places = range(len(problems))
    return Shared(
        groups=[Group(problems[place], shares[place % heads][place // heads]) for place in places],
        heads=[place % heads for place in places],
        whole=dict(zip(places[placement.data_rank :: heads], mine, strict=False)),
    )
