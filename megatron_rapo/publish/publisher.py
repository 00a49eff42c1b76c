"""Makes the engines serve the policy's weights, and proves that they do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

from megatron_rapo.data.prompts import Prompt
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.experience.engines import SharedEngines
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.proof import Continuation, check, check_policy, compare, mean_differences, probe
from megatron_rapo.publish.record import Publication, Record, digest
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.stream import attempt

T = TypeVar("T")
TRIES = 2  # that fail although all engines are there still
logger = logging.getLogger(__name__)


class Transport(Protocol):
    """A way for weights from the trainer's ranks to the engines (`weights.transports`)."""

    def send(self, engines: Engines | None, version: int) -> Mapping[str, int]:
        """Sends all weights; all ranks call it, `engines` is the main rank's. Returns checksums there."""


class Publisher:
    """All ranks call it together; the main rank deals with the engines.

    Args:
        transport: the way of the weights.
        policy: whose weights.
        placement: this rank's.
        engines: that are sent to.
        prompts: whose greedy continuations are compared; the same on all ranks.
        dtype: that the weights are sent in.
        tolerance: of that comparison, in nats; None lets pass whatever engines have.
        sequence_multiple: what sequences are padded to.
        record: where publications are written; on the main rank.
    """

    def __init__(
        self,
        transport: Transport,
        policy: Policy,
        placement: Placement,
        engines: SharedEngines,
        prompts: Sequence[Prompt],
        *,
        dtype: str,
        tolerance: float | None,
        sequence_multiple: int,
        record: Record | None,
    ) -> None:
        self._transport = transport
        self._policy = policy
        self._placement = placement
        self._engines = engines
        self._pool = engines.pool if placement.is_main else None
        self._prompts = prompts
        self._dtype = dtype
        self._tolerance = tolerance
        self._sequence_multiple = sequence_multiple
        self._record = record

    def publish(self, version: int, *, resumed: bool = False) -> Mapping[str, float]:
        """Sends the weights as `version`, to the end: an engine that is lost meanwhile is left out.

        Args:
            version: the step that made them.
            resumed: whether they come from a checkpoint, so were published before.

        Returns:
            Metrics: seconds until the engines served, and the probe's largest mean difference in nats.

        Raises:
            RapoError: the policy's log-probs are not finite; an engine refuses, has other weights in fact
                than by name, or too few are left.
        """
        begun = time.perf_counter()
        self._policy.synchronise_parameters()
        check_policy(self._policy, self._placement, self._prompts, version, self._sequence_multiple)
        checksums, found = self._serve(version)
        self._engines.agree()
        seconds = time.perf_counter() - begun
        difference = self._prove(version, found)
        self._together(partial(self._register, version, checksums, seconds, difference, resumed))
        return {"time/publish/send_s": seconds, "publish/probe_difference": difference}

    def _serve(self, version: int) -> tuple[Mapping[str, int], list[Continuation]]:
        """Sends until all engines that are left have everything, and continue the probe's prompts."""
        in_vain = 0
        while True:
            self._together(self._engines.revive)
            members = self._membership()
            try:
                self._together(self._engines.onload)  # those that came back, or failed to before
                checksums = self._together(partial(self._send_once, version))
                self._together(partial(self._compare, checksums))
                return checksums, self._together(partial(self._probe, version))
            except EngineLost as failure:
                in_vain = in_vain + 1 if self._membership() == members else 0
                if in_vain == TRIES:
                    raise
                logger.warning("weights are sent again to the engines that are left: %s", failure)

    def _membership(self) -> int:
        """The main rank's number of its engines' membership, on all ranks."""
        return self._placement.share_from_main(self._pool.membership if self._pool else None)

    def _send_once(self, version: int) -> Mapping[str, int]:
        if self._pool is None:
            return self._transport.send(None, version)
        members = self._pool.membership
        try:
            return self._transport.send(self._pool, version)
        except EngineLost:
            self._pool.abandon_update()
            raise
        except RapoError as refusal:
            self._pool.abandon_update()
            # An engine refuses as well what broke off because another one died: that one is out, or is now.
            self._pool.tensor_parallel()
            if self._pool.membership != members:
                raise EngineLost(f"an engine was lost while others took weights: {refusal}") from refusal
            raise

    def _compare(self, checksums: Mapping[str, int]) -> None:
        """Compares what arrived with what was sent, at engines that tell; on the main rank."""
        if self._pool is None or self._tolerance is None:
            return
        for url, arrived in self._pool.weights_checksums(self._dtype).items():
            compare(url, checksums, arrived)

    def _together(self, work: Callable[[], T]) -> T:
        """`work` on all ranks; what the main rank meets with there is raised on all."""
        result, failure = attempt(work)
        failure = self._placement.share_from_main(failure)
        if failure is not None:
            raise failure
        return result

    def _prove(self, version: int, found: list[Continuation]) -> float:
        """Compares what the engines continued with the policy; on all ranks."""
        continuations = self._placement.share_from_main(found)
        differences = mean_differences(self._policy, self._placement, continuations, self._sequence_multiple)
        if self._tolerance is not None:
            check(differences, self._tolerance, version)
        return max(differences.values())

    def _probe(self, version: int) -> list[Continuation]:
        if self._pool is None:
            return []
        return probe(self._pool, self._prompts, version, self._policy.architecture.vocabulary)

    def _register(
        self, version: int, checksums: Mapping[str, int], seconds: float, difference: float, resumed: bool
    ) -> None:
        if self._record is None or self._pool is None:
            return
        dtype, found = self._dtype, digest(checksums)
        if resumed:
            self._record.check(version, dtype, found)
        engines = len(self._pool.urls)
        self._record.add(Publication(version, dtype, found, seconds, engines, difference))
