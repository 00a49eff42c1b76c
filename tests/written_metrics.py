"""The metrics that can be written without a run, from what makes them in one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import torch

from megatron_rapo.environments.countdown_turns import CountdownTurns
from megatron_rapo.environments.program import episode_of
from megatron_rapo.environments.tool_use import ToolUse
from megatron_rapo.episode.environment import Environment, Generate, Turn
from megatron_rapo.episode.episode import Episode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.episode.outcome import Outcome, Verification
from megatron_rapo.episode.problem import Problem
from megatron_rapo.evaluation.evaluator import _as_metrics
from megatron_rapo.evaluation.statistics import COLUMNS
from megatron_rapo.evaluation.statistics import summarise as summarise_samples
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.given import summarise_given
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.summary import staleness, summarise
from megatron_rapo.gateway.route import Route
from megatron_rapo.loss.mismatch import STRETCHES, Mismatch
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.terms.divergences import DIVERGENCES
from megatron_rapo.methods.terms.term import AtToken, Term
from megatron_rapo.methods.told import told_by
from megatron_rapo.model.router import SUMS
from megatron_rapo.policy.expert_routing import summarise as summarise_routing
from tests.episodes import group_of, scored_response
from tests.methods import a_method
from tests.unit.stored import store

NO_GROUP: Any = None  # of ranks: nothing is computed


def of_rollouts() -> set[str]:
    """Of a mixture with dynamic sampling, whose rewards and environment tell nothing of their own; and of
    texts that are given in place of rollouts.

    Of the group a method has guided an episode.
    """
    first, *others = _group().episodes
    group = replace(_group(), episodes=(first, *others, replace(first, guide=Guide(question="?"))))
    prompts: Any = SimpleNamespace(position=1, size=2)
    return {
        *summarise(Batch([group], Shared([group]), rounds=1), 61, ["sums", "words"]),
        *staleness(Batch([group], Shared([group]), 0), now=1, partial_tokens=1),
        *summarise_given(Batch([group], Shared([group]), rounds=0), prompts),
    }


def of_users_own() -> set[str]:
    """What a reward, an environment, a term and a method of a user's own tell, each `own`."""
    told = _group(facts={"own": 1.0})
    method = a_method()
    with patch.multiple(method, terms=lambda: [(1.0, _Own())], metrics=lambda: {"own": 1.0}):
        objective = Objective(method, temperature=1.0, vocabulary=61, group=NO_GROUP)
        of_update = objective.metrics(torch.zeros(len(objective.parts)))
        found = {*summarise(Batch([told], Shared([told]), 0), 61), *of_update, *told_by(method)}
    return {name for name in found if name.endswith("/own")}


def of_updates() -> set[str]:
    """Of each method that has a name, and of RAPO with each divergence and the audit of estimators."""
    methods = [a_method(name) for name in METHODS]
    kinds = [kind for kind in DIVERGENCES if kind.startswith("forward") or kind == "reverse_flattened"]
    methods += [a_method(divergence=kind, audit_estimators=True) for kind in kinds]
    found: set[str] = set()
    for method in methods:
        objective = Objective(method, temperature=1.0, vocabulary=61, group=NO_GROUP)
        found |= set(objective.metrics(torch.zeros(len(objective.parts))))
    mismatch = Mismatch()
    mismatch.add(torch.zeros(len(STRETCHES)), torch.zeros(len(STRETCHES)), torch.tensor(STRETCHES))
    return found | set(mismatch.metrics()) | set(summarise_routing(torch.ones(2, 4 + SUMS), 2, replays=True))


def of_evaluations(folder: Path) -> Iterator[str]:
    """Of one data set at one setting, and of several; of given texts. Samples are left in the folder."""
    yield "evaluate/loss"  # tests/unit/test_sft.py measures it
    samples = store(folder, np.ones((2, 4), bool), rewards=np.ones((2, 4))).samples("sums", "t1")
    ids = [problem.id for problem in samples.problems]
    found = summarise_samples(samples.read(COLUMNS), ids, [1, 4], seed=0)
    for name in _as_metrics(found, graded=True):
        yield f"evaluate/{name}"
        yield f"evaluate/MATH-500/t0.6-p0.95/{name}"


def of_environments() -> set[str]:
    """Of an episode of each of ours that tells something; `tool_use` calls nothing."""

    async def generate(token_ids: list[int], **options: Any) -> Turn:
        return Turn(np.ones(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), "stop", "5")

    rendering: Any = SimpleNamespace(stop=(), parse=lambda *turn: SimpleNamespace(content="5", tool_calls=[]))
    toolbox: Any = SimpleNamespace(episode=nullcontext)
    environments: list[Environment] = [
        ToolUse(toolbox, rendering, ToolUse.Options(), max_turns=2),
        CountdownTurns(rendering, CountdownTurns.Options(guesses=2)),
    ]
    problem = Problem("0", "5=5:", '{"numbers":[5],"target":5}', token_ids=(1,))
    asked = cast(Generate, generate)
    episodes = [asyncio.run(environment.run(problem, asked, 0)) for environment in environments]
    episodes.append(asyncio.run(_of_a_program(asked)))
    return {f"environment/{name}" for episode in episodes for name in episode.facts}


async def _of_a_program(generate: Generate) -> Episode:
    route = Route(generate, vocabulary=10, max_turns=1)
    route.record.add("", [1], await generate([1]))
    return episode_of(1.0, route)


class _Own(Term):
    def __call__(self, token: AtToken) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return token.entropy, {"own": token.entropy}


def _group(**facts: Any) -> Group:
    one = scored_response(Outcome.CORRECT, [1, 2])
    one = replace(one, verification=Verification(Outcome.CORRECT, **facts))
    one = replace(one, episode=replace(one.episode, **facts))
    group = group_of(one, scored_response(Outcome.WRONG, [3]))
    return replace(group, problem=replace(group.problem, source="sums"))
