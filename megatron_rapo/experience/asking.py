"""The episodes that a method asks for, in as many rounds as it wants to see what came of those before."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.running import Tries
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.course import Course, Wanted
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.methods.method import Method

MOST_ROUNDS = 64


def ask(method: Method, prompts: Sequence[Prompt]) -> Course[Shared]:
    """All episodes of the prompts that the method asks for.

    Raises:
        RapoError: the method wants no episode of a prompt, or never has enough, or asks for what is no guide.
    """
    if not method.asks:
        return (yield Wanted(prompts))
    sampled: Shared | None = None
    groups = [Group(prompt.problem, ()) for prompt in prompts]
    for _ in range(MOST_ROUNDS):
        wanted = _wanted(method, groups)
        if not any(wanted):
            break
        here = {} if sampled is None else sampled.whole
        tries = [
            Tries(len(group.episodes), tuple(guides), here[place].episodes if place in here else ())
            for place, (group, guides) in enumerate(zip(groups, wanted, strict=True))
        ]
        found = (yield Wanted(prompts, tries)).guided(wanted)
        if sampled is None:
            sampled = found
        else:
            sampled.join(found)
        groups = sampled.groups
    else:
        raise RapoError(
            f"ask of {_named(method)} still wants more after {MOST_ROUNDS} rounds; let it return no guide of "
            "a group that has enough"
        )
    if sampled is None or not all(group.episodes for group in groups):
        raise RapoError(f"ask of {_named(method)} wants no episode of a problem; let it want some of each")
    return sampled


def _wanted(method: Method, groups: Sequence[Group]) -> list[list[Guide]]:
    wanted = [list(guides) for guides in method.ask(groups)]
    if len(wanted) != len(groups) or not all(isinstance(one, Guide) for guides in wanted for one in guides):
        raise RapoError(
            f"ask of {_named(method)} returned {wanted!r:.200} for {len(groups)} groups; return a list of "
            "guides for each"
        )
    return wanted


def _named(method: Method) -> str:
    return f'method "{method.options.method}"'
