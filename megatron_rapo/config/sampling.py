"""The options of what is sampled and how it is verified."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_rapo.config.section import PositiveFloat, PositiveInt, Section


class Rollout(Section):
    """What is sampled each step, and from which servers."""

    prompts_per_step: PositiveInt = Field(description="Prompts of one rollout batch, over all replicas.")
    responses_per_prompt: int = Field(8, ge=2, description="G: responses a prompt (one group).")
    max_prompt_tokens: PositiveInt = Field(1024, description="Longer prompts are reported and dropped.")
    max_response_tokens: PositiveInt = Field(description="Responses are cut (truncated) at this length.")
    temperature: PositiveFloat = Field(
        1.0,
        description="Sampling temperature; the trainer divides its logits by the same. Sampling always has "
        "full support (no top-p, no top-k): engine log-probs are not renormalised for them.",
    )
    urls: list[str] = Field(
        [],
        description="Addresses of running SGLang (or embedded) servers. Empty: the run starts "
        "`embedded_servers` of its own.",
    )
    embedded_servers: PositiveInt = Field(1, description="Embedded servers that the run starts.")
    embedded_device: Literal["cpu", "cuda"] = Field("cpu", description="Where embedded servers compute.")
    embedded_threads: PositiveInt = Field(1, description="CPU threads of one embedded server.")
    prompts_per_request: PositiveInt = Field(
        64,
        description="Prompts that share one HTTP request, and in the embedded server one decoding batch.",
    )
    startup_timeout_s: PositiveFloat = Field(600.0, description="Seconds for servers to become healthy.")
    request_timeout_s: PositiveFloat = Field(1800.0, description="Seconds for one request's answer.")

    def without_effect(self) -> dict[str, str]:
        embedded = ["embedded_servers", "embedded_device", "embedded_threads"]
        return dict.fromkeys(embedded, "urls name running servers") if self.urls else {}

    @model_validator(mode="after")
    def _check(self) -> Rollout:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"urls = {self.urls}: {url!r} is not an address; write http://HOST:PORT")
        return self


class Reward(Section):
    """How responses are verified. A correct response earns 1, any other 0."""

    verifier: Literal["math", "countdown", "integer"] | None = Field(
        None,
        description="`math`: math-verify; `countdown`, `integer`: exact checkers of the generated tasks. "
        "Default: the one that belongs to `data.source`.",
    )
    workers: PositiveInt = Field(2, description="Verifier processes of each data-parallel head.")
    time_limit_s: PositiveFloat = Field(
        5.0, description="Hard limit for one verification; past it the process is killed: outcome `timeout`."
    )
