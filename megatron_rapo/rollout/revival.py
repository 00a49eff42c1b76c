"""How engines that were lost come back: own ones are started anew, given ones are waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from megatron_rapo.engines.engine import Engine
from megatron_rapo.engines.servers import LocalServers
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.rollout.identity import check_context, check_model


class Reviver:
    """Brings engines back, each a bounded number of times. One rank of a run has it.

    Attributes:
        returned: how often engines came back so far.
    """

    def __init__(
        self,
        servers: LocalServers | None,
        architecture: Architecture,
        *,
        restarts: int,
        startup_timeout: float,
        longest: int = 0,
    ) -> None:
        """
        Args:
            servers: the run's own; None where it was given addresses.
            architecture: the policy's; an engine of another one stays out.
            restarts: how often each engine may be brought back.
            startup_timeout: seconds in which it must be ready.
            longest: tokens of the longest prompt and response, which an engine must take.
        """
        self.returned = 0
        self._servers = servers
        self._architecture = architecture
        self._restarts = restarts
        self._startup_timeout = startup_timeout
        self._longest = longest
        self._used: Counter[int] = Counter()

    def may_return(self, number: int) -> bool:
        """Whether engine `number` has not come back too often already."""
        return self._used[number] < self._restarts

    async def bring_back(self, number: int, url: str, client_of: Callable[[str], Engine]) -> str:
        """Makes engine `number`, which was at `url`, ready again; returns its address. Its weights are any.

        Raises:
            RapoError: it does not become ready, or serves another model.
        """
        if self._servers is None:
            client = client_of(url)
            await client.until_healthy(self._startup_timeout)
            await self.check(client)
            self._used[number] += 1
            self.returned += 1
            return url
        while True:
            self._used[number] += 1
            try:
                url = await self._servers.restart(number)
                await self.check(client_of(url))
            except RapoError as error:
                if not self.may_return(number):
                    raise RapoError(
                        f"it was started anew {self._used[number]} times (rollout.restarts); {error}"
                    ) from error
            else:
                self.returned += 1
                return url

    async def check(self, client: Engine) -> None:
        """Raises RapoError where the engine serves another model, or takes too few tokens."""
        info = await client.info()
        check_model(client.url, Path(info.model_path), self._architecture)
        check_context(client.url, info.context_length, self._longest)
