"""Batches that are sampled ahead: which weights sample them, when, and what a checkpoint keeps of them."""

from __future__ import annotations

import tomllib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from megatron_rapo.ahead.batches import Batches
from megatron_rapo.ahead.keeping import FOLDER, keep, take_up
from megatron_rapo.config.sampling import DynamicSampling, Rollout
from megatron_rapo.data.order import PromptOrder
from megatron_rapo.data.prompts import LoadReport, Prompt, PromptSet
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.episode.guide import Guide
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.batch import Batch
from megatron_rapo.experience.course import Phase, Wanted
from megatron_rapo.experience.sharing import Shared
from tests.methods import a_method
from tests.unit.test_batch_collection import ALL_WRONG, MIXED
from tests.unit.test_pages import ROOT, blocks
from tests.unit.test_replay import alone
from tests.unit.test_samples import placement, tool_episode

STEPS = 6
PROMPTS = 2


class Round:
    """A round that notes when it ends; without `lost` engines it is what its weights make of the prompts."""

    def __init__(self, engines: Engines, wanted: Wanted, batch: int, version: int, answers: Any) -> None:
        assert engines.version == version, "engines sample with other weights than they are asked for"
        self.weight_version = version
        self._engines, self._wanted, self._batch = engines, wanted, batch
        engines.under_way.append(batch)
        engines.did.append(("begin", batch, version))
        assert answers == batch

    def finish(self, phase: Phase, now: int) -> Shared:
        self._engines.under_way.remove(self._batch)
        if self._engines.lost:
            self._engines.lost = False
            self.weight_version = self._engines.version = now
        self._engines.did.append(("end", self._batch, self.weight_version))
        groups = []
        for prompt in self._wanted.prompts:
            of = self._engines.outcomes[prompt.index % len(self._engines.outcomes)]
            episodes = tuple(episode(outcome, self.weight_version, prompt) for outcome in of)
            groups.append(Group(prompt.problem, episodes))
        brief = [group.brief() for group in groups]
        return Shared(brief, [0] * len(groups), dict(enumerate(groups)))

    def give_up(self) -> None:
        self._engines.under_way.remove(self._batch)


def episode(outcome: Any, version: int, prompt: Prompt) -> ScoredEpisode:
    """Of two turns, whose tokens tell its weights and prompt."""
    found = tool_episode()
    [sequence] = found.episode.sequences
    log_probs = sequence.log_probs - np.float32(version + prompt.draw / 1024)
    sequence = replace(
        sequence, log_probs=log_probs, versions=np.where(sequence.sampled, version, -1).astype(np.int32)
    )
    known = replace(found.verification, outcome=outcome, reward=None if outcome.value == "timeout" else 1.0)
    if outcome.value == "wrong":
        known = replace(known, reward=0.0)
    return ScoredEpisode(replace(found.episode, sequences=(sequence,)), known)


class Engines:
    """A source of groups that refuses what a request may not meet."""

    def __init__(self, outcomes: Any = (MIXED,)) -> None:
        self.version = 0
        self.outcomes = outcomes
        self.lost = False
        self.under_way: list[int] = []
        self.did: list[Any] = []

    def begin(self, wanted: Wanted, *, weight_version: int, seed: int, answers: Any, **_: Any) -> Round:
        assert seed & 0x7FFFFFFF == 7
        return Round(self, wanted, seed >> 31, weight_version, answers)

    def publish(self, version: int) -> None:
        assert not self.under_way, "weights overtake a request"
        self.did.append(("publish", version))
        self.version = version


class Run:
    """A run of steps that do nothing but take their batches."""

    def __init__(
        self,
        ahead: int,
        folder: Path,
        engines: Engines | None = None,
        dynamic: DynamicSampling | None = None,
        steps: int = STEPS,
    ) -> None:
        self.engines = engines or Engines()
        self.folder, self.steps = folder, steps
        prompts = tuple(Prompt(index, f"{index}?", (1,), "") for index in range(50))
        self.prompts = PromptOrder(
            PromptSet(prompts, LoadReport("test", 50, 50, (), (), (), 10, ())), seed=0, shuffle=True
        )
        rollout = SimpleNamespace(prompts_per_step=PROMPTS, dynamic_sampling=dynamic, max_staleness=ahead)
        config = SimpleNamespace(
            rollout=rollout,
            run=SimpleNamespace(seed=7, steps=steps),
            algorithm=SimpleNamespace(method="grpo"),
        )
        self.method = a_method("grpo")
        self.checked: list[int] = []
        self.batches = Batches(
            cast(Any, config),
            self.method,
            self.prompts,
            cast(Any, self.engines),
            phase=lambda name: nullcontext(),
            check=lambda step, sampled: self.checked.append(step),
            answers=lambda step: cast(Any, step),
        )

    def go(self, first: int = 1, last: int | None = None) -> dict[int, Any]:
        """What each step trains on. After each, a checkpoint is kept."""
        found = {}
        for step in range(first, (last or self.steps) + 1):
            found[step] = told(self.batches.take(step))
            self.batches.settle(step)
            self.engines.publish(step)
            position = self.prompts.position
            self.batches.run_ahead(step)
            checkpoint = self.folder / str(step)
            checkpoint.mkdir(parents=True)
            keep(self.batches.ready, checkpoint, alone())
            (checkpoint / "position").write_text(str(position))
        return found

    def resume(self, step: int) -> None:
        checkpoint = self.folder / str(step)
        ready = take_up(checkpoint, self.prompts, alone(), prompts_per_step=PROMPTS, whole=False)
        self.batches.go_on(step, ready, {})
        self.prompts.position = int((checkpoint / "position").read_text())
        self.engines.version = step
        self.batches.run_ahead(step)


def told(batch: Batch) -> Any:
    """All of a batch that a step reads."""
    episodes = [
        (group.problem, one.verification, sequence.token_ids.tolist(), sequence.log_probs.tolist())
        for _, group in sorted(batch.sampled.whole.items())
        for one in group.episodes
        for sequence in one.episode.sequences
    ]
    versions = {
        int(version)
        for group in batch.sampled.whole.values()
        for one in group.episodes
        for sequence in one.episode.sequences
        for version in sequence.versions[sequence.sampled]
    }
    chosen = [batch.drawn.index(group) for group in batch.groups]
    guides = [[one.guide for one in group.episodes] for group in batch.groups]
    what = (batch.first, batch.temperature, batch.rounds, batch.teaching, chosen, batch.groups, guides)
    return versions, what, repr(episodes)


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_a_step_trains_on_what_weights_of_so_many_steps_before_sampled(ahead: int, tmp_path: Path) -> None:
    run = Run(ahead, tmp_path)
    found = run.go()
    assert [versions for versions, *_ in found.values()] == [
        {max(0, step - 1 - ahead)} for step in range(1, STEPS + 1)
    ]
    assert [what[0] for _, what, _ in found.values()] == [PROMPTS * n for n in range(STEPS)]
    assert run.checked == list(range(1, STEPS + 1)), "each batch is looked at once"
    assert run.prompts.position == STEPS * PROMPTS, "nothing is sampled that no step trains on"


def test_engines_work_while_the_trainer_does(tmp_path: Path) -> None:
    """A batch is begun right after a publication, and ends before the next one; without, never ahead."""
    run = Run(1, tmp_path, steps=3)
    run.go()
    begun = [("begin", 1, 0), ("end", 1, 0), ("begin", 2, 0)]  # while step 1 trains
    assert run.engines.did == [
        *begun,
        *[("end", 2, 0), ("publish", 1), ("begin", 3, 1)],
        *[("end", 3, 1), ("publish", 2), ("publish", 3)],
    ]
    run = Run(0, tmp_path / "waits", steps=2)
    run.go()
    assert [what for what, *_ in run.engines.did] == ["begin", "end", "publish"] * 2


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_run_that_was_killed_trains_on_the_same(ahead: int, step: int, tmp_path: Path) -> None:
    """Also with groups that dynamic sampling replaced."""
    dynamic = DynamicSampling(over_sampling=1.0, max_rounds=3)
    outcomes = (ALL_WRONG, MIXED, MIXED, ALL_WRONG, MIXED)
    undisturbed = Run(ahead, tmp_path / "whole", Engines(outcomes), dynamic).go()
    assert len({what[2] for _, what, _ in undisturbed.values()}) > 1, "no batch took another number of rounds"
    Run(ahead, tmp_path / "killed", Engines(outcomes), dynamic).go(last=step)
    again = Run(ahead, tmp_path / "killed", Engines(outcomes), dynamic)
    again.resume(step)
    assert again.go(step + 1) == {n: one for n, one in undisturbed.items() if n > step}


def test_with_other_heads_each_has_its_share(tmp_path: Path) -> None:
    run = Run(1, tmp_path)
    run.go(last=2)
    batch = run.batches.ready[3]
    for rank in (0, 1):
        rank_of_two = placement(rank, 2)
        shares = [[group.brief().episodes for group in _share(batch, head)] for head in (0, 1)]
        rank_of_two.share_from_heads = lambda mine, shares=shares: shares
        [found] = take_up(
            tmp_path / "2", run.prompts, rank_of_two, prompts_per_step=PROMPTS, whole=False
        ).values()
        assert list(found.sampled.whole) == [rank]
        assert repr(found.sampled.whole[rank]) == repr(batch.sampled.whole[rank])
        assert found.drawn == batch.drawn


def _share(batch: Batch, head: int) -> list[Group]:
    return [batch.sampled.whole[place] for place in range(head, len(batch.drawn), 2)]


def test_guides_are_kept(tmp_path: Path) -> None:
    run = Run(1, tmp_path)
    run.go(last=1)
    [(step, batch)] = run.batches.ready.items()
    guide = Guide(question="hinted", keeps_prompt=True, name="hint")
    onward = Guide(after=(0, 1), temperature=0.5)
    guided = batch.sampled.guided([[guide, onward], [Guide()] * 2])
    keep({step: replace(batch, groups=guided.groups, sampled=guided)}, tmp_path, alone())
    [found] = take_up(tmp_path, run.prompts, alone(), prompts_per_step=PROMPTS, whole=False).values()
    assert [[one.guide for one in group.episodes] for group in found.groups] == [
        [guide, onward],
        [Guide()] * 2,
    ]


def test_engines_that_were_lost_sample_with_the_weights_that_there_are(tmp_path: Path) -> None:
    """Those that they had are gone; the batch is trained on all the same, and is fresher."""
    run = Run(2, tmp_path, steps=5)
    run.engines.lost = False
    run.go(last=2)
    run.engines.lost = True
    found = run.go(3, 5)
    assert [versions for versions, *_ in found.values()] == [{0}, {1}, {3}]


def test_a_batch_of_another_size_is_refused(tmp_path: Path) -> None:
    run = Run(1, tmp_path)
    run.go(last=1)
    with pytest.raises(RapoError, match=r"has a batch of 2 prompts for step 2.*prompts_per_step is 3; go on"):
        take_up(tmp_path / "1", run.prompts, alone(), prompts_per_step=3, whole=False)


def test_what_is_under_way_is_given_up(tmp_path: Path) -> None:
    run = Run(1, tmp_path)
    run.batches.take(1)
    assert run.engines.under_way == [2]
    run.batches.close()
    assert run.engines.under_way == []


def test_a_checkpoint_without_batches_has_no_folder(tmp_path: Path) -> None:
    Run(0, tmp_path).go(last=1)
    assert not (tmp_path / "1" / FOLDER).exists()


def test_colocated_engines_cannot_sample_ahead() -> None:
    options = {"prompts_per_step": 1, "max_response_tokens": 4, "colocated": True}
    Rollout(**options, max_staleness=0)
    with pytest.raises(ValueError, match=r"max_staleness = 1 has engines sample while the trainer trains"):
        Rollout(**options, max_staleness=1)


def test_the_pages_options_are_some() -> None:
    for block in blocks(ROOT / "docs/ahead.md", "toml"):
        options = tomllib.loads(block)["rollout"]
        assert Rollout(prompts_per_step=1, max_response_tokens=1024, **options).max_staleness
