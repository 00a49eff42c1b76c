"""What the transports that send buckets have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.weights.buckets import Bucket
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.stream import Deliver, Wait, WeightStream

TIMEOUT_S = 120.0  # for one bucket
Send = Callable[[Bucket, Tensor, int | None], Wait]
"""Begins to send a bucket, its bytes; the last one with the version that all are of."""


class BucketTransport(ABC):
    """Buckets through the main rank to the engines, which cut their own slices out of whole tensors."""

    def __init__(self, stream: WeightStream) -> None:
        self._stream = stream
        self._summing = ThreadPoolExecutor(1, thread_name_prefix="checksums")  # beside packing and sending

    def send(self, engines: Engines | None, version: int) -> dict[str, int]:
        """Sends the weights as `version`. All ranks call it; `engines` is the main rank's.

        Returns:
            The checksum of each tensor as it was sent; on the main rank.

        Raises:
            EngineLost, RapoError: on the main rank.
        """
        if engines is None:
            self._stream.run(None)
            return {}
        checksums: dict[str, int] = {}
        try:
            self._stream.run(lambda: self._open(engines, version, checksums))
        except BaseException:
            self._discard()
            raise
        engines.end_update(version)
        return checksums

    def _open(self, engines: Engines, version: int, checksums: dict[str, int]) -> Deliver:
        send, last = self._prepare(engines), self._stream.buckets[-1]
        under_way: list[Wait] = []

        def deliver(bucket: Bucket, flat: Tensor) -> Wait:
            # One request at a time: two could reach an engine in the other order.
            while under_way:
                under_way.pop()()
            # The version is the engines' only once they have everything.
            wait = send(bucket, flat, version if bucket is last else None)
            under_way.append(wait)
            sums = self._summing.submit(_checksums, bucket, flat)

            def finished() -> None:
                wait()
                checksums.update(sums.result())

            return finished

        return deliver

    @abstractmethod
    def _prepare(self, engines: Engines) -> Send:
        """Opens the engines' update; returns what sends them a bucket."""

    @abstractmethod
    def _discard(self) -> None:
        """After a failure: drops what it may have spoilt."""


def _checksums(bucket: Bucket, flat: Tensor) -> dict[str, int]:
    return {tensor.name: tensor_checksum(view) for tensor, view in bucket.views(flat)}
