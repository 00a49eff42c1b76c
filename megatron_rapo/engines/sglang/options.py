"""The options of SGLang servers, and of its router."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megatron_rapo.engines.address import same_server
from megatron_rapo.engines.options import EngineOptions
from megatron_rapo.section import NonNegativeInt, PositiveInt

# Arguments of sglang.launch_server that a run has its own ideas of.
_SET_BY_THE_RUN = ("--model-path", "--model", "--host", "--port", "--dtype", "--tp-size", "--tp")


class RoutedOptions(EngineOptions):
    """Servers that speak SGLang's contract may stand behind its router."""

    of_given: ClassVar[frozenset[str]] = EngineOptions.of_given | {"router"}

    router: str | None = Field(
        None,
        description="Address of SGLang's router (`sglang-router`), through which prompts then go; all else "
        "goes to the engines of `urls` directly, which the run registers with the router while they may "
        "serve. Default: the run spreads prompts over the engines itself.",
    )

    @property
    def by_router(self) -> bool:
        return self.router is not None

    @model_validator(mode="after")
    def _check_router(self) -> RoutedOptions:
        if self.router is None:
            return self
        if not self.urls:
            raise ValueError(
                f"router = {self.router!r} needs the engines' own addresses, which weights go to; name "
                "them in urls, or remove it"
            )
        try:
            behind = same_server([*self.urls, self.router])
        except ValueError as error:
            raise ValueError(f"router = {self.router!r}: {error}") from None
        if behind:
            raise ValueError(
                f"router = {self.router!r} is the engine {behind[0]!r} of urls; name the router, not "
                "an engine"
            )
        return self


class SGLangOptions(RoutedOptions):
    """SGLang servers, 0.5.14 to 0.5.23."""

    kind: Literal["sglang"] = Field("sglang", description="Names this kind of engines.")
    tensor_parallel: PositiveInt = Field(1, description="GPUs that share one server's model.")
    gpus: list[NonNegativeInt] | None = Field(
        None,
        description="The GPUs, tensor_parallel of them for each server, in order. Default: what SGLang takes "
        "by itself.",
    )
    python: str = Field("python", description="Interpreter of the environment that SGLang is installed in.")
    arguments: list[str] = Field([], description="Further arguments of `sglang.launch_server`.")

    @property
    def ranks(self) -> int:
        return self.tensor_parallel

    @model_validator(mode="after")
    def _check_servers(self) -> SGLangOptions:
        wanted = self.servers * self.tensor_parallel
        if self.gpus is not None and (len(self.gpus), len(set(self.gpus))) != (wanted, wanted):
            raise ValueError(
                f"gpus = {self.gpus} does not name {wanted} GPUs for servers = {self.servers} of "
                f"tensor_parallel = {self.tensor_parallel}; name each once"
            )
        for argument in self.arguments:
            if argument.partition("=")[0] in _SET_BY_THE_RUN:
                raise ValueError(
                    f"arguments = {self.arguments}: {argument} is set by the run; remove it, or start the "
                    "servers yourself and name them in urls"
                )
        return self
