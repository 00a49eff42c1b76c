"""The engines as all ranks see them: opened, brought back, and agreed upon."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from megatron_rapo.config import RunConfig
from megatron_rapo.engines.kind import Served
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.errors import EngineLost, RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.rollout.identity import check_distinct
from megatron_rapo.rollout.pool import EnginePool, NoteRequest
from megatron_rapo.rollout.revival import Reviver

if TYPE_CHECKING:  # Megatron takes seconds, and commands that open engines alone need none of it
    from megatron_rapo.parallel.placement import Placement


class SharedEngines:
    """Each head's pool, kept to the same engines. All ranks call each method together.

    Attributes:
        pool: this head's own; None on other ranks.
    """

    def __init__(
        self,
        placement: Placement,
        pool: EnginePool | None,
        reviver: Reviver | None,
        *,
        colocated: bool = False,
    ) -> None:
        """
        Args:
            placement: this rank's.
            pool: this head's own; None on other ranks.
            reviver: the main rank's, which brings engines back for all; None on other ranks.
            colocated: whether engines are offloaded while the trainer works.
        """
        self.pool = pool
        self._placement = placement
        self._reviver = reviver
        self._colocated = colocated

    def software(self) -> str:
        """Names and versions of the engines' software, as this head's pool has them."""
        return self.pool.software() if self.pool is not None else ""

    @contextmanager
    def offloaded(self) -> Iterator[None]:
        """For training: colocated engines are offloaded, and onloaded again.

        One that is lost then is out until the publication that follows. An error leaves them as they are.
        """
        self.offload()
        yield
        with suppress(EngineLost):
            self.onload()

    def offload(self) -> None:
        """After rollouts: colocated engines give their memory to the trainer."""
        if self._colocated and self._placement.is_main and self.pool is not None:
            self.pool.release_memory()

    def onload(self) -> None:
        """Before weights are published: those that gave their memory take it again.

        Raises:
            EngineLost: on the main rank, where one was lost.
        """
        if self._colocated and self._placement.is_main and self.pool is not None:
            self.pool.resume_memory()

    def revive(self) -> None:
        """Before weights are published: brings back engines that any head lost.

        Raises:
            RapoError: on the main rank, where too few are left.
        """
        lost = self._lost()
        if self._placement.is_main and self.pool is not None:
            self.pool.revive(lost)

    def agree(self) -> None:
        """After weights were published: all heads take those engines that have them."""
        urls = self._placement.share_from_main(self.pool.urls if self.pool else None)
        if self.pool is not None and not self._placement.is_main:
            self.pool.use(urls or [])

    def any_missing(self, mine: int) -> bool:
        """Whether any head misses groups; `mine` is how many this rank does."""
        return any(self._placement.share_from_heads(mine))

    def too_few(self) -> RapoError:
        """The error that says why groups are missing, the same on all ranks."""
        reasons = "".join(f"\n  {url}: {reason}" for url, reason in self._lost().items())
        return RapoError(f"too few engines are left to sample from; mend what ended them:{reasons}")

    def metrics(self) -> Mapping[str, float]:
        """Engines that are live; returns of engines, and requests sent again, since the run was started."""
        resent = sum(self._placement.share_from_heads(self.pool.resent if self.pool else 0))
        return {
            "engines/live": len(self.pool.urls) if self.pool else 0,
            "engines/returned": self._reviver.returned if self._reviver else 0,
            "engines/requests_resent": resent,
        }

    def _lost(self) -> dict[str, str]:
        """What heads lost, with one head's reason each."""
        shares = self._placement.share_from_heads(self.pool.failures if self.pool else {})
        return {url: reason for share in reversed(shares) for url, reason in share.items()}


@contextmanager
def open_engines(
    config: RunConfig,
    placement: Placement,
    architecture: Architecture,
    note: NoteRequest | None = None,
) -> Iterator[SharedEngines]:
    """Rank 0 starts the servers that the run is not given; each head opens its own pool of all.

    Raises:
        RapoError: one of them is not ready in time, or serves another model.
    """
    with ExitStack() as stack:
        servers = stack.enter_context(_own_servers(config)) if placement.is_main else None
        reviver = _reviver(config, servers, architecture) if placement.is_main else None
        urls = placement.share_from_main(servers.urls if servers else config.rollout.engine.urls)
        if not placement.is_head:
            yield SharedEngines(placement, None, None, colocated=config.rollout.colocated)
            return
        pool = _pool(config, architecture, urls, placement.data_rank, servers, reviver, note)
        yield SharedEngines(placement, stack.enter_context(pool), reviver, colocated=config.rollout.colocated)


@contextmanager
def open_own_engines(config: RunConfig, architecture: Architecture) -> Iterator[EnginePool]:
    """The engines of a single process, which no others share.

    Raises:
        RapoError: one of them is not ready in time, or serves another model.
    """
    with _own_servers(config) as servers:
        urls = servers.urls if servers else config.rollout.engine.urls
        reviver = _reviver(config, servers, architecture)
        with _pool(config, architecture, urls, 0, servers, reviver) as pool:
            yield pool


@contextmanager
def _own_servers(config: RunConfig) -> Iterator[LocalServers | None]:
    """The servers that the run is not given; None where it is."""
    if config.rollout.engine.urls:
        check_distinct(config.rollout.engine.urls)
        yield None
        return
    kind = config.engine_kind
    with LocalServers(
        kind.launcher(Served(config.model.path, config.model.dtype, config.rollout.colocated)),
        kind.connect,
        count=config.rollout.engine.count,
        log_directory=config.run.directory / "engines",
        startup_timeout=config.rollout.startup_timeout_s,
    ) as servers:
        yield servers


def _reviver(config: RunConfig, servers: LocalServers | None, architecture: Architecture) -> Reviver:
    rollout = config.rollout
    return Reviver(
        servers,
        architecture,
        restarts=rollout.restarts,
        startup_timeout=rollout.startup_timeout_s,
        longest=config.longest_sequence,
    )


@contextmanager
def _pool(
    config: RunConfig,
    architecture: Architecture,
    urls: Sequence[str],
    head: int,
    servers: LocalServers | None,
    reviver: Reviver | None,
    note: NoteRequest | None = None,
) -> Iterator[EnginePool]:
    rollout, kind = config.rollout, config.engine_kind
    with EnginePool(
        urls,
        kind.connect,
        vocab_size=architecture.vocabulary,
        prompts_per_request=rollout.prompts_per_request,
        request_timeout=rollout.request_timeout_s,
        head=head,
        requests_per_engine=rollout.requests_per_engine,
        minimum_engines=rollout.minimum_engines,
        health_interval=rollout.health_interval_s,
        reviver=reviver,
        diagnose=servers.diagnose if servers else None,
        router=kind.router,
        note=note,
    ) as pool:
        pool.wait_until_healthy(rollout.startup_timeout_s)
        yield pool
