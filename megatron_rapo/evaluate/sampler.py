"""Samples problems, verifies and stores the responses: engines work on while a batch before is verified."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from transformers import PreTrainedTokenizerBase

from megatron_rapo.errors import RapoError
from megatron_rapo.evaluate.manifest import SettingRecord
from megatron_rapo.evaluate.plan import Batch
from megatron_rapo.evaluate.store import SampleStore, StoredSample
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.groups import RolloutGroup
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.requests import sample_seed

UNDER_WAY = 2  # batches that engines have at a time


class TooFewEngines(RapoError):
    """Engines were lost, and too few are left; what is on disk by then stays."""


class Sampler:
    """Draws samples of one model.

    Args:
        pool: engines that serve it as `weight_version`.
        tokenizer: of the model.
        seed: with problem and sample number it determines what is drawn.
        writer: number of this process among those that write to the same stores.
    """

    def __init__(
        self,
        pool: EnginePool,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weight_version: int,
        seed: int,
        writer: int = 0,
    ) -> None:
        self.pool = pool
        self.tokenizer = tokenizer
        self.weight_version = weight_version
        self.seed = seed
        self.writer = writer

    def draw(
        self, batches: Iterable[Batch], setting: SettingRecord, verifier: Verifier, store: SampleStore
    ) -> Iterator[list[StoredSample]]:
        """Samples the batches; each is yielded once it is verified and on disk.

        Raises:
            TooFewEngines: no request is under way any more; once they are back, what is missing can be drawn.
            RapoError: an engine or a verifier refused, or the disk is full. What was written stays.
        """
        for batch, groups in self.generated(batches, setting):
            samples = self._verified(batch, groups, verifier)
            store.write(samples, self.writer)
            yield samples

    def generated(
        self, batches: Iterable[Batch], setting: SettingRecord
    ) -> Iterator[tuple[Batch, list[RolloutGroup]]]:
        """Batches with their responses, in order; the next ones are under way meanwhile."""
        executor = ThreadPoolExecutor(UNDER_WAY, thread_name_prefix="evaluate")
        waiting: deque[tuple[Batch, Future[list[RolloutGroup]]]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, executor.submit(self._generate, batch, setting)))
                if len(waiting) > UNDER_WAY:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except TooFewEngines:
            executor.shutdown()  # what follows makes engines serve weights anew
            raise
        finally:
            # Not waited for: after an error the pool is closed next, which ends what it was asked.
            executor.shutdown(wait=False)

    def _generate(self, batch: Batch, setting: SettingRecord) -> list[RolloutGroup]:
        groups = self.pool.generate(
            batch.prompts,
            responses_per_prompt=batch.count,
            max_response_tokens=setting.max_response_tokens,
            temperature=setting.temperature,
            weight_version=self.weight_version,
            seed=self.seed,
            top_p=setting.top_p,
            top_k=setting.top_k,
            first_response=batch.first,
        )
        found = [group for group in groups if group is not None]
        if len(found) < len(groups):
            reasons = "".join(f"\n  {url}: {reason}" for url, reason in self.pool.failures.items())
            raise TooFewEngines(
                "too few engines are left to sample from; mend what ended them, then run the same command "
                f"again to go on:{reasons}"
            )
        return found

    def _verified(
        self, batch: Batch, groups: Iterable[RolloutGroup], verifier: Verifier
    ) -> list[StoredSample]:
        rows = [
            (group.prompt, batch.first + number, response)
            for group in groups
            for number, response in enumerate(group.responses)
        ]
        texts = self.tokenizer.batch_decode(
            [response.token_ids.tolist() for _, _, response in rows], skip_special_tokens=True
        )
        problems = [prompt.problem for prompt, _, _ in rows]
        verified = verifier.verify(list(zip(texts, problems, strict=True)))
        return [
            StoredSample(
                problem=prompt.id,
                sample=number,
                outcome=verification.outcome,
                reward=verification.reward,
                extracted=verification.extracted,
                truncated=response.truncated,
                seed=sample_seed(self.seed, prompt, number),
                text=text,
                token_ids=response.token_ids,
                log_probs=response.log_probs,
            )
            for (prompt, number, response), text, verification in zip(rows, texts, verified, strict=True)
        ]
