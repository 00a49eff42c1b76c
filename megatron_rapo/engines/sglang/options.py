"""The options of SGLang servers, and of its router."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from megatron_rapo.engines.address import same_server
from megatron_rapo.engines.options import EngineOptions, OwnServers


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


class SGLangOptions(RoutedOptions, OwnServers):
    """SGLang servers, 0.5.14 to 0.5.23."""

    set_by_the_run: ClassVar[tuple[str, ...]] = (
        *("--model-path", "--model", "--host", "--port", "--dtype", "--tp-size", "--tp"),
    )

    kind: Literal["sglang"] = Field("sglang", description="Names this kind of engines.")
