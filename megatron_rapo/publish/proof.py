"""The greedy probe: do the engines and the trainer give the same tokens the same probability?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.data.batching import Sample, pack
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.engines.engine import Generation
from megatron_rapo.episode.sequence import Sequence as TokenSequence
from megatron_rapo.errors import RapoError
from megatron_rapo.loss.chunked import Head
from megatron_rapo.loss.vocabulary import VocabularyShard
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.rollout.responses import to_response
from megatron_rapo.weights.engines import Engines

TOKENS = 8  # of each greedy continuation
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Continuation:
    """What one engine made of one prompt: `token_ids` `[TOKENS]`, `log_probs` `[TOKENS]` in nats."""

    url: str
    prompt: Prompt
    token_ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]

    @property
    def sequence(self) -> tuple[int, ...]:
        """Prompt and response: engines that agree have the same."""
        return (*self.prompt.token_ids, *self.token_ids.tolist())


def probe(engines: Engines, prompts: Sequence[Prompt], version: int, vocabulary: int) -> list[Continuation]:
    """Each engine's greedy continuations of the same prompts; on the main rank.

    Raises:
        EngineLost: an engine does not answer, and is out.
        RapoError: an engine answers what cannot be, or with other weights than `version`.
    """
    wanted = [Generation(prompt.token_ids, TOKENS, temperature=0.0, ignore_eos=True) for prompt in prompts]
    urls = list(engines.urls)
    found = []
    continued = engines.each(lambda engine, _: engine.generate(wanted, timeout=TIMEOUT_S), urls).result()
    for url, answers in zip(urls, continued, strict=True):
        for prompt, answer in zip(prompts, answers, strict=True):
            response = to_response(
                answer, weight_version=version, vocab_size=vocabulary, max_tokens=TOKENS, source=url
            )
            found.append(Continuation(url, prompt, response.token_ids, response.log_probs))
    return found


def mean_differences(
    policy: Policy, placement: Placement, continuations: Sequence[Continuation], sequence_multiple: int
) -> dict[str, float]:
    """Mean |engine − trainer log-prob| of each engine's tokens, in nats, on all ranks, which all call it."""
    distinct = {continuation.sequence: continuation for continuation in continuations}
    expected = _trainer_log_probs(policy, placement, list(distinct.values()), sequence_multiple)
    row = {sequence: number for number, sequence in enumerate(distinct)}
    differences: dict[str, list[float]] = {}
    for continuation in continuations:
        difference = np.abs(continuation.log_probs - expected[row[continuation.sequence]])
        differences.setdefault(continuation.url, []).append(float(difference.mean()))
    return {url: float(np.mean(values)) for url, values in differences.items()}


def check_policy(
    policy: Policy, placement: Placement, prompts: Sequence[Prompt], version: int, sequence_multiple: int
) -> None:
    """Whether the policy itself can be computed, before engines are asked about it. All ranks call it.

    Raises:
        RapoError: on all ranks, where its log-probs at the probe's prompts are not finite.
    """
    repeated = [
        Continuation("", p, np.full(TOKENS, p.token_ids[-1], np.int32), np.zeros(TOKENS, np.float32))
        for p in prompts
    ]
    if not np.isfinite(_trainer_log_probs(policy, placement, repeated, sequence_multiple)).all():
        raise RapoError(
            f"the policy of version {version} gives NaN or infinite log-probs: its weights are damaged, or "
            "training has diverged; go on from an earlier checkpoint with a lower optimizer.learning_rate"
        )


def compare(url: str, sent: Mapping[str, int], arrived: Mapping[str, int]) -> None:
    """Compares what one engine has with what was sent, tensor by tensor, where both tell of whole tensors.

    Raises:
        RapoError: a tensor is another one there.
    """
    other = [name for name in sorted(sent.keys() & arrived.keys()) if sent[name] != arrived[name]]
    if other:
        raise RapoError(
            f"{len(other)} of {len(sent)} tensors arrived at {url} otherwise than they were sent "
            f"({', '.join(other[:3])}): their checksums differ; choose another weights.transport, "
            "and report this"
        )


def check(differences: dict[str, float], tolerance: float, version: int) -> None:
    """Raises RapoError for engines that differ by more than `tolerance`."""
    for url, difference in differences.items():
        if not difference <= tolerance:
            raise RapoError(
                f"{url} has weights of version {version} by name, but not in fact: the log-probs of greedy "
                f"tokens differ from the trainer's by {difference:.3g} nats on average "
                f"(weights.probe_tolerance = {tolerance:g}); is it the same model, and does no other run "
                "update it?"
            )


def _trainer_log_probs(
    policy: Policy, placement: Placement, continuations: Sequence[Continuation], sequence_multiple: int
) -> npt.NDArray[np.float64]:
    """`[continuations, TOKENS]`, the policy's log-probs of the same tokens, on all ranks."""
    layout, architecture = placement.layout, policy.architecture
    microbatch = pack(
        [_sample(continuation) for continuation in continuations],
        sequence_multiple=sequence_multiple,
        context_rank=placement.context_rank,
        context_ranks=layout.context_parallel,
        device=device(),
    )

    def head(weight: Tensor) -> Head:
        # Greedy log-probs are of the unscaled logits, over all rows that the engine has.
        shard = VocabularyShard.of(weight.size(0), architecture.vocabulary, placement.tensor_group)
        return Head(weight, shard, temperature=1.0, chunk_tokens=len(continuations) * TOKENS)

    # Interleaved schedules want as many microbatches as there are stages.
    copies = layout.pipeline_parallel if layout.virtual_pipeline_parallel else 1
    found = torch.zeros(len(continuations), TOKENS, dtype=torch.float64)
    log_probs = policy.log_probs([microbatch] * copies, head)
    if log_probs and placement.tensor_rank == placement.data_rank == 0:  # the others have the same
        chosen = microbatch.is_response
        rows = microbatch.sequences[chosen].cpu()
        starts = torch.tensor([len(continuation.prompt.token_ids) for continuation in continuations])
        columns = microbatch.position_ids[chosen].cpu() + 1 - starts[rows]
        found[rows, columns] = log_probs[0][chosen].double().cpu()
    dist.all_reduce(found, group=placement.host_group)
    return found.numpy()


def _sample(continuation: Continuation) -> Sample:
    return Sample(
        sequence=TokenSequence.of_response(
            continuation.prompt.token_ids, continuation.token_ids, continuation.log_probs, version=0
        ),
        phi=1.0,
        advantage=0.0,
        token_weight=1.0,
    )
