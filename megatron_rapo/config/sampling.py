"""The options of what is sampled, and from whom."""

from __future__ import annotations

from pydantic import Field, model_validator

from megatron_rapo.config.engine import Engine
from megatron_rapo.engines.kinds import DEFAULT_KIND, KINDS
from megatron_rapo.section import (
    NonNegativeInt,
    PathOption,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)

_OF_ENGINES = (
    *("engine", "colocated", "prompts_per_request", "requests_per_engine"),
    *("startup_timeout_s", "request_timeout_s", "health_interval_s", "minimum_engines", "restarts"),
    *("max_staleness", "partial_tokens"),
)


class DynamicSampling(Section):
    """Groups whose responses all earn the same are replaced by groups of further prompts (DAPO)."""

    over_sampling: float = Field(
        1.5,
        ge=1,
        allow_inf_nan=False,
        description="Prompts drawn for each group that is still missing, rounded up.",
    )
    max_rounds: int = Field(
        4,
        ge=2,
        description="Rounds of sampling in a step, the first included. A step that is not full then, or has "
        "met every prompt, is filled up with groups that teach nothing by comparison, in the order drawn.",
    )


class Rollout(Section):
    """What is sampled each step, and from which servers."""

    prompts_per_step: PositiveInt = Field(
        description="Prompts of one rollout batch, over all replicas; at most those that the data has."
    )
    responses_per_prompt: int = Field(8, ge=2, description="G: responses a prompt (one group).")
    max_prompt_tokens: PositiveInt = Field(1024, description="Longer prompts are reported and dropped.")
    max_response_tokens: PositiveInt = Field(description="Responses are cut (truncated) at this length.")
    temperature: PositiveFloat = Field(
        1.0,
        description="Sampling temperature; the trainer divides its logits by the same. Sampling always has "
        "full support (no top-p, no top-k): what these leave is not told by engines (docs/engines.md).",
    )
    engine: Engine = Field(
        KINDS[DEFAULT_KIND].Options(kind=DEFAULT_KIND),
        description="The engines, of kind `embedded`, `sglang`, `vllm`, or one of your own, `module:Kind` "
        "(docs/engines.md). Default: one embedded server, which the run starts.",
    )
    colocated: bool = Field(
        False,
        description="Engines share the trainer's GPUs (or memory): they give their weights and cache back "
        "while it trains. Servers at `engine.urls` need `--enable-memory-saver` (SGLang) or "
        "`--enable-sleep-mode` (vLLM). See also "
        "optimizer.in_host_memory_during_rollouts and model.reference_in_host_memory.",
    )
    prompts_per_request: PositiveInt = Field(
        64,
        description="Most prompts that share one HTTP request, with all their responses, and in the embedded "
        "server one decoding batch.",
    )
    requests_per_engine: PositiveInt = Field(
        32, description="Most requests that a replica has under way at one engine; the others wait."
    )
    startup_timeout_s: Seconds = Field(600.0, description="Seconds for servers to become healthy.")
    request_timeout_s: Seconds = Field(
        1800.0,
        description="Seconds for one request's answer. An engine that takes longer is out, and others do its "
        "work.",
    )
    health_interval_s: Seconds = Field(
        10.0,
        description="Seconds between two looks at each engine; one that is silent three times in a row is "
        "out. One that answers but does not generate is only found by request_timeout_s.",
    )
    minimum_engines: PositiveInt = Field(
        1,
        description="With fewer engines the run waits for lost ones to come back, and ends if none can.",
    )
    restarts: NonNegativeInt = Field(
        3, description="How often each engine that was lost may come back in a run, with the current weights."
    )
    dynamic_sampling: DynamicSampling | None = Field(
        None,
        description="Replaces groups without variance by further prompts. Default: a step trains on the "
        "prompts it drew.",
    )

    max_staleness: NonNegativeInt = Field(
        0,
        description="n: engines sample ahead while the trainer trains, so that a step trains on what the "
        "weights of up to n steps before it sampled. 0: they wait for each other. More than 1 gives engines "
        "no more to do, but with `partial_tokens` (docs/ahead.md).",
    )
    partial_tokens: PositiveInt | None = Field(
        None,
        description="Most tokens of a response (of all turns of an episode) that one version of the weights "
        "samples; the next one's goes on with it, up to `max_staleness` versions, of which the last samples "
        "it to its end (docs/ahead.md). Default: one version samples all of it.",
    )
    replay: PathOption | None = Field(
        None,
        description="Folder of a run whose recorded samples (docs/samples.md) are trained on again, with "
        "their rewards and log-probs, in place of new ones: no engine is opened. Default: engines sample.",
    )

    def without_effect(self) -> dict[str, str]:
        if self.replay is not None:
            return dict.fromkeys(_OF_ENGINES, "replay takes recorded samples, without engines")
        if self.engine.by_router:
            return {"prompts_per_request": "a router takes a request a response"}
        return {}

    @model_validator(mode="after")
    def _check(self) -> Rollout:
        if self.max_staleness and self.colocated:
            raise ValueError(
                f"max_staleness = {self.max_staleness} has engines sample while the trainer trains, and "
                "colocated engines are offloaded then; remove one of them"
            )
        self._check_partial_tokens()
        if self.minimum_engines > self.engine.count:
            raise ValueError(
                f"minimum_engines = {self.minimum_engines} is more than the run's {self.engine.count} "
                "engines; lower it"
            )
        return self

    def _check_partial_tokens(self) -> None:
        if self.partial_tokens is None:
            return
        told = f"partial_tokens = {self.partial_tokens}"
        if self.max_staleness < 2:
            raise ValueError(
                f"{told} has several versions of the weights sample a response, and max_staleness = "
                f"{self.max_staleness} leaves one; raise it to 2 or more, or remove partial_tokens"
            )
        if self.partial_tokens >= self.max_response_tokens:
            raise ValueError(
                f"{told} would have no effect: no response has more than max_response_tokens = "
                f"{self.max_response_tokens}; lower it, or remove it"
            )
        if self.dynamic_sampling is not None:
            raise ValueError(
                f"{told} does not go with dynamic_sampling, which draws further prompts once responses are "
                "whole, when no version is left to go on with theirs; remove one of them"
            )
