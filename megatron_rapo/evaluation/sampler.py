"""Samples problems and stores the episodes: engines work on while a batch before is judged."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack

import numpy as np

from megatron_rapo.environments.runner import Rollout, Runner
from megatron_rapo.environments.running import Judge
from megatron_rapo.episode.episode import ScoredEpisode
from megatron_rapo.episode.group import Group
from megatron_rapo.evaluation.manifest import SettingRecord
from megatron_rapo.evaluation.plan import Batch
from megatron_rapo.evaluation.store import SampleStore, StoredSample
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import Sampling, sample_seed

UNDER_WAY = 2  # batches beside the one that is waited for


class Sampler:
    """Draws samples of one model, as training does: by the same environment.

    Args:
        runner: of the environment, on engines that serve the model as `weight_version`.
        pool: these engines.
        seed: with problem and sample number it determines what is drawn.
        writer: number of this process among those that write to the same stores.
    """

    def __init__(
        self, runner: Runner, pool: EnginePool, *, weight_version: int, seed: int, writer: int = 0
    ) -> None:
        self.runner = runner
        self.pool = pool
        self.weight_version = weight_version
        self.seed = seed
        self.writer = writer

    def draw(
        self, batches: Iterable[Batch], setting: SettingRecord, judge: Judge, store: SampleStore
    ) -> Iterator[list[StoredSample]]:
        """Samples the batches; each is yielded once it is judged and on disk.

        Raises:
            TooFewEngines: no request is under way any more; once they are back, what is missing can be drawn.
            RapoError: an engine or a verifier refused, or the disk is full. What was written stays.
        """
        for batch, groups in self.generated(batches, setting, judge):
            samples = [
                self._stored(
                    prompt.id, batch.first + number, sample_seed(self.seed, prompt, batch.first + number), one
                )
                for prompt, group in zip(batch.prompts, groups, strict=True)
                for number, one in enumerate(group.episodes)
            ]
            store.write(samples, self.writer)
            yield samples

    def generated(
        self, batches: Iterable[Batch], setting: SettingRecord, judge: Judge
    ) -> Iterator[tuple[Batch, list[Group]]]:
        """Batches with their groups, in order; the next ones are under way meanwhile."""
        waiting: deque[tuple[Batch, ExitStack, Rollout]] = deque()
        try:
            for batch in batches:
                stack = ExitStack()
                rollout = self.runner.begin(batch.prompts, self._sampling(batch, setting), judge)
                waiting.append((batch, stack, stack.enter_context(rollout)))
                if len(waiting) > UNDER_WAY:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            for _, stack, _ in waiting:
                stack.close()

    def _next(self, waiting: deque[tuple[Batch, ExitStack, Rollout]]) -> tuple[Batch, list[Group]]:
        batch, stack, rollout = waiting[0]
        groups = rollout.groups()
        waiting.popleft()
        stack.close()
        found = [group for group in groups if group is not None]
        if len(found) < len(groups):
            reasons = "".join(f"\n  {url}: {reason}" for url, reason in self.pool.failures.items())
            raise TooFewEngines(
                "too few engines are left to sample from; mend what ended them, then run the same command "
                f"again to go on:{reasons}"
            )
        return batch, found

    def _sampling(self, batch: Batch, setting: SettingRecord) -> Sampling:
        return Sampling(
            responses_per_prompt=batch.count,
            max_response_tokens=setting.max_response_tokens,
            temperature=setting.temperature,
            weight_version=self.weight_version,
            seed=self.seed,
            top_p=setting.top_p,
            top_k=setting.top_k,
            first_response=batch.first,
        )

    def _stored(self, problem: str, number: int, seed: int, scored: ScoredEpisode) -> StoredSample:
        """As rows are stored."""
        episode, verification = scored.episode, scored.verification
        token_ids, log_probs = np.zeros(0, np.int32), np.zeros(0, np.float32)
        if episode.sequences:
            last = episode.sequences[-1]
            response = slice(last.prompt_tokens, None)
            token_ids, log_probs = last.token_ids[response], last.log_probs[response]
        return StoredSample(
            problem=problem,
            sample=number,
            outcome=verification.outcome,
            reward=verification.reward,
            extracted=verification.extracted,
            truncated=episode.truncated,
            seed=seed,
            text=episode.answer,
            token_ids=token_ids,
            log_probs=log_probs,
            given=episode.given_tokens,
            sequences=[{"token_ids": one.token_ids, "log_probs": one.log_probs} for one in episode.sequences]
            if len(episode.sequences) > 1
            else None,
        )
