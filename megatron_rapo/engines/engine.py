"""One engine as a run knows it: what it is asked, and how it is given weights; a class of it a kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megatron_rapo.errors import RapoError
from megatron_rapo.wire.bucket import TensorMetadata
from megatron_rapo.wire.group import Meeting
from megatron_rapo.wire.slices import SliceMessage

Diagnose = Callable[[str], str | None]
"""Says what is known of the server at a URL once a request to it has failed: None if nothing."""


def numbers(values: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """`[n]` from a list of numbers in an engine's answer.

    Raises:
        ValueError, TypeError, OverflowError: it is none.
    """
    found = np.array(values, dtype=dtype)
    if found.ndim != 1:
        raise ValueError(f"no list of numbers: {str(values)[:100]}")
    return found


@dataclass(frozen=True)
class EngineInfo:
    """What an engine says of itself.

    Attributes:
        model_path: the folder that it was started with, or last loaded.
        weight_version: of its weights, as it spells it.
        tensor_parallel: the ranks that its weights are spread over.
        dtype: of its weights; `auto` is the checkpoint's.
        software: its name and version.
        context_length: most tokens of prompt and response together; None where it does not tell.
    """

    model_path: str
    weight_version: str
    tensor_parallel: int
    dtype: str
    software: str
    context_length: int | None = None


@dataclass(frozen=True)
class Generation:
    """One continuation that is wanted.

    Attributes:
        token_ids: what it continues.
        max_tokens: at most, at least 1.
        temperature: 0 takes the likeliest tokens.
        seed: of the sample, below 2³¹; None leaves it to the engine.
        top_p, top_k: 1 and -1: full support.
        stop: token ids that end it, besides the model's own.
        ignore_eos: whether the model's own do not end it.
        experts: whether the choices of a mixture's routers are to be told.
    """

    token_ids: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int | None = None
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[int, ...] = ()
    ignore_eos: bool = False
    experts: bool = False


@dataclass(frozen=True)
class Generated:
    """What an engine made of it, unchecked.

    Attributes:
        token_ids: `[tokens]`, the token that ended it included.
        log_probs: `[tokens]`, in nats, of the temperature-scaled distribution over its full support.
        versions: of the weights that sampled its tokens, as the engine spells them.
        finish: why it ended: `stop`, `length` (of max_tokens), or what else the engine says.
        experts: numbers of experts, token by token, layer by layer, of all tokens but the last, those that it
            continues first; None where it does not tell.
    """

    token_ids: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float32]
    versions: tuple[str, ...]
    finish: str
    experts: npt.NDArray[np.int32] | None = None


class Engine(ABC):
    """Requests to one engine, each bounded in time.

    All raise `EngineLost` where the engine is gone, late, fails inside or sends what no engine sends, and a
    plain `RapoError` where it refuses. `timeout` are seconds for the answer.

    An update is `begin_update`, then pieces (`receive_…`, all of one sort) until all weights have come, then
    `end_update`; after a failure `abandon_update`. The last piece comes with the version that the weights are
    from then on. `load_checkpoint` is an update by itself.
    """

    takes_slices: bool = False
    """Whether it has `receive_slices`."""
    one_request_at_a_time: bool = False
    """Whether it serves one `generate` after the other, so that what belongs together is sent together."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Its address, http://HOST:PORT."""

    @abstractmethod
    async def until_healthy(self, timeout: float) -> None:
        """Waits until it is ready, `timeout` seconds at most."""

    @abstractmethod
    async def silence(self, patience: float) -> str | None:
        """Why it says nothing to a question that costs it nothing; None if it answers, in any way."""

    @abstractmethod
    async def info(self) -> EngineInfo:
        """What it is, and which weights it has now."""

    @abstractmethod
    async def weight_version(self) -> str:
        """The version of its weights, as it spells it."""

    async def weights_checksum(self) -> tuple[str, dict[str, int]] | None:
        """The version, and `tensor_checksum` of each tensor under its HF name; None where it tells none."""
        return None

    @abstractmethod
    async def generate(
        self, wanted: Sequence[Generation], *, timeout: float | None = None
    ) -> list[Generated]:
        """The continuations, in order; they go as one request. No timeout: that of a rollout's requests."""

    async def prompt_log_probs(
        self, sequences: Sequence[Sequence[int]]
    ) -> list[npt.NDArray[np.float64]] | None:
        """Log-probs of all tokens but the first, `[tokens - 1]` of each sequence, at temperature 1, in nats.

        They are read at once, as a prompt's. None from an engine that does not tell those.
        """
        return None

    @abstractmethod
    async def flush_cache(self) -> None:
        """Has it forget the keys and values of earlier requests, once it is idle or paused."""

    @abstractmethod
    async def release_memory(self) -> None:
        """Has it give back the memory of weights and cache, which are lost; it must be idle."""

    @abstractmethod
    async def resume_memory(self) -> None:
        """Has it take that again. Weights hold nothing of use until an update has brought all of them."""

    @abstractmethod
    async def begin_update(self) -> None:
        """Makes it ready for weights: requests wait, no cache is left. What fails is undone."""

    @abstractmethod
    async def end_update(self, version: int) -> None:
        """Closes the update, whose weights are `version`, and lets requests through again."""

    @abstractmethod
    async def abandon_update(self) -> None:
        """After a failure: `end_update` as far as it takes part. The failure is the one to report."""

    @abstractmethod
    async def join_group(self, meeting: Meeting, first_rank: int, *, timeout: float) -> None:
        """Has its ranks join, as `first_rank` and those that follow. Answers once all have come."""

    @abstractmethod
    async def receive_bucket(
        self, layout: Sequence[TensorMetadata], group: str, version: int | None, *, timeout: float
    ) -> None:
        """Has it take a bucket of whole tensors, which rank 0 of the group broadcasts as one."""

    @abstractmethod
    async def receive_handles(
        self, named: Sequence[tuple[str, Tensor]], ranks: int, version: int | None, *, timeout: float
    ) -> None:
        """Has its `ranks` ranks copy whole tensors out of memory of this machine: shared, or of a GPU."""

    async def receive_slices(
        self,
        messages: Sequence[SliceMessage],
        group: str,
        dtype: torch.dtype,
        version: int | None,
        *,
        timeout: float,
    ) -> None:
        """Has it take messages that trainer ranks of the group send, in their order."""
        raise RapoError(f'{self.url} takes whole tensors only; use weights.transport = "distributed"')

    @abstractmethod
    async def load_checkpoint(self, model_path: Path, version: int) -> None:
        """Has it load a HF directory with safetensors, which it can read: a whole update."""


class Connect(Protocol):
    """Makes the engine at an address; a kind's class of `Engine` is one."""

    def __call__(
        self, http: httpx.AsyncClient, url: str, *, timeout: float, diagnose: Diagnose | None = None
    ) -> Engine:
        """
        Args:
            http: where connections come from (`exchange.http_client`); shared by the engines of a pool.
            url: http://HOST:PORT.
            timeout: seconds for the answer to one `generate`, and whatever else takes its time.
            diagnose: asked for the reason when the connection fails.
        """


class Router(ABC):
    """Requests to a router, which spreads prompts over engines; they fail as those to an engine do."""

    @property
    @abstractmethod
    def url(self) -> str:
        """Its address."""

    @abstractmethod
    async def generate(self, wanted: Sequence[Generation]) -> list[Generated]:
        """As `Engine.generate`, by whichever engines."""

    @abstractmethod
    async def check_workers(self, known: Collection[str]) -> None:
        """Raises RapoError where it sends to others than these engines, or cannot be reached."""

    @abstractmethod
    async def serve_with(self, urls: Sequence[str], known: Collection[str], timeout: float) -> None:
        """Makes the engines at `urls` its only workers, and waits until it sends to each.

        Args:
            urls: engines that may serve.
            known: addresses that are or were this run's; those not among `urls` are removed.
            timeout: seconds for it.

        Raises:
            RapoError: it has other workers, cannot be reached, or does not take them.
        """

    @abstractmethod
    async def remove(self, url: str) -> None:
        """Makes it send nothing more to this engine; requests that it has there stay under way."""


class ConnectRouter(Protocol):
    """Makes what speaks to the router of a run."""

    def __call__(self, http: httpx.AsyncClient, *, timeout: float) -> Router:
        """`timeout`: seconds for the answer to one response's request."""
