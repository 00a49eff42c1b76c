"""Recorded rollouts in place of sampled ones: the same updates again, without an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.environments.recorded import Answers
from megatron_rapo.environments.running import Tries
from megatron_rapo.episode.group import Group
from megatron_rapo.errors import RapoError
from megatron_rapo.experience.course import Known, Phase, Wanted
from megatron_rapo.experience.sharing import Shared, share
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.samples.store import read_step, scored, steps_of


class Replay:
    """In place of a `Collector`: what a run has recorded, with its rewards. Each head reads its share."""

    def __init__(self, run: Path, placement: Placement) -> None:
        self._placement = placement
        self._run = run
        self._files = steps_of(run)

    def begin(
        self,
        wanted: Wanted,
        *,
        chosen: Sampling,
        weight_version: int,
        seed: int,
        whole: bool = False,
        answers: Answers | None = None,
    ) -> Known:
        """The prompts' groups as the run recorded them; see `Collector.begin`.

        Raises:
            RapoError: once they are read: the run has not recorded these prompts at this step.
        """
        del seed, answers  # they are drawn already
        placement, prompts, tries = self._placement, wanted.prompts, wanted.tries
        own = slice(placement.data_rank, None, placement.layout.data_parallel)
        mine = prompts[own] if placement.is_head else []

        def read(phase: Phase) -> Shared:
            with phase("rollout"):
                groups = self._groups(weight_version + 1, mine, chosen, None if tries is None else tries[own])
            with phase("reward"):  # known already
                return share([prompt.problem for prompt in prompts], groups, placement, whole=whole)

        return Known(weight_version, read)

    def _groups(
        self, step: int, prompts: Sequence[Prompt], chosen: Sampling, tries: Sequence[Tries] | None
    ) -> list[Group]:
        if step not in self._files:
            raise RapoError(f"rollout.replay = {self._run} has no samples of step {step}; lower run.steps")
        draws = {prompt.draw for prompt in prompts}
        brief = read_step(self._files[step], ["draw", "number"])
        keys = {(row["draw"], row["number"]) for row in brief if row["draw"] in draws}
        rows: dict[int, list[dict[str, Any]]] = {}
        for row in read_step(self._files[step], only=keys):
            rows.setdefault(row["draw"], []).append(row)
        return [
            self._group(step, prompt, rows.get(prompt.draw, []), chosen, tries[place] if tries else None)
            for place, prompt in enumerate(prompts)
        ]

    def _group(
        self,
        step: int,
        prompt: Prompt,
        rows: Sequence[dict[str, Any]],
        chosen: Sampling,
        tries: Tries | None,
    ) -> Group:
        """All that was recorded; or the episodes of these tries, of which a method asks several."""
        responses = chosen.responses_per_prompt
        if tries is not None:
            responses = tries.first + len(tries.guides)
            rows = rows[:responses]
        if len(rows) != responses or any(row["problem"] != prompt.id for row in rows):
            found = f"{len(rows)} responses to problem {rows[0]['problem']}" if rows else "nothing"
            raise RapoError(
                f"rollout.replay = {self._run} has {found} as draw {prompt.draw} of step {step}, where "
                f"this run needs {responses} to problem {prompt.id}; give the options that it was recorded "
                "with"
            )
        if (temperature := rows[0]["temperature"]) != chosen.temperature:
            raise RapoError(
                f"rollout.replay = {self._run} has samples of step {step} at temperature "
                f"{temperature:g}, where this run needs {chosen.temperature:g}: their log-probs would be of "
                "another distribution; let rollout.temperature, and the method's own, be the same"
            )
        return Group(prompt.problem, tuple(map(scored, rows[tries.first if tries else 0 :])))


class Unpublished:
    """In place of a `Publisher`: there is no engine that weights could go to."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def publish(self, version: int, *, resumed: bool = False) -> Mapping[str, float]:
        """Nothing to send, and no metrics."""
        del version, resumed
        self._policy.synchronise_parameters()
        return {}
