"""The options that all kinds of engines have (`[rollout.engine]`)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from megatron_rapo.engines.address import same_server
from megatron_rapo.section import NonNegativeInt, PositiveInt, Section


class EngineOptions(Section):
    """Who samples: servers that run already, or the run's own."""

    of_given: ClassVar[frozenset[str]] = frozenset({"kind", "urls"})
    """Options that have an effect where `urls` name running servers."""

    kind: str = Field(
        description="What the servers are: `embedded`, `sglang`, `vllm`, or a class of your own as "
        "`module:Kind` (docs/engines.md)."
    )
    urls: list[str] = Field(
        [],
        description="Addresses of running servers of this kind. Empty: the run starts `servers` of its own "
        "on the machine of rank 0.",
    )
    servers: PositiveInt = Field(1, description="How many servers the run starts.")

    @property
    def count(self) -> int:
        """How many engines the run begins with."""
        return len(self.urls) or self.servers

    @property
    def ranks(self) -> int:
        """Ranks of each engine that the run starts; 1 for given ones, as far as is known before asking."""
        return 1

    @property
    def by_router(self) -> bool:
        """Whether a router takes the prompts, in a request a response."""
        return False

    def without_effect(self) -> dict[str, str]:
        if not self.urls:
            return {}
        own = [name for name in type(self).model_fields if name not in self.of_given]
        return dict.fromkeys(own, "urls name running servers")

    @model_validator(mode="after")
    def _check_urls(self) -> EngineOptions:
        try:
            twice = same_server(self.urls)
        except ValueError as error:
            raise ValueError(f"urls = {self.urls}: {error}") from None
        if twice:
            raise ValueError(
                f"urls = {self.urls}: {twice[0]!r} and {twice[1]!r} are the same server; name each once"
            )
        return self


class OwnServers(EngineOptions):
    """Kinds whose servers have an environment of their own, and shard a model over GPUs."""

    set_by_the_run: ClassVar[tuple[str, ...]] = ()
    """Arguments of the server's command that a run has its own ideas of."""

    tensor_parallel: PositiveInt = Field(1, description="GPUs that share one server's model.")
    gpus: list[NonNegativeInt] | None = Field(
        None,
        description="The GPUs, tensor_parallel of them for each server, in order. Default: what the server "
        "takes by itself.",
    )
    python: str = Field(
        "python", description="Interpreter of the environment that the servers' package is installed in."
    )
    arguments: list[str] = Field([], description="Further arguments of the servers' command.")

    @property
    def ranks(self) -> int:
        return self.tensor_parallel

    @model_validator(mode="after")
    def _check_servers(self) -> OwnServers:
        wanted = self.servers * self.tensor_parallel
        if self.gpus is not None and (len(self.gpus), len(set(self.gpus))) != (wanted, wanted):
            raise ValueError(
                f"gpus = {self.gpus} does not name {wanted} GPUs for servers = {self.servers} of "
                f"tensor_parallel = {self.tensor_parallel}; name each once"
            )
        for argument in self.arguments:
            if argument.partition("=")[0] in self.set_by_the_run:
                raise ValueError(
                    f"arguments = {self.arguments}: {argument} is set by the run; remove it, or start the "
                    "servers yourself and name them in urls"
                )
        return self
