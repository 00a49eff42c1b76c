"""The options of what is sampled, and from whom."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_rapo.engines.address import same_server
from megatron_rapo.section import (
    NonNegativeInt,
    PathOption,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)

# Arguments of sglang.launch_server that a run has its own ideas of.
_SET_BY_THE_RUN = ("--model-path", "--model", "--host", "--port", "--dtype", "--tp-size", "--tp")


_OF_ENGINES = (
    *("urls", "router", "sglang", "colocated", "prompts_per_request", "requests_per_engine"),
    *("startup_timeout_s", "request_timeout_s", "health_interval_s", "minimum_engines", "restarts"),
)


class SGLangServers(Section):
    """SGLang servers that the run starts on the machine of rank 0, in place of embedded ones."""

    servers: PositiveInt = Field(1, description="How many servers.")
    tensor_parallel: PositiveInt = Field(1, description="GPUs that share one server's model.")
    gpus: list[NonNegativeInt] | None = Field(
        None,
        description="The GPUs, tensor_parallel of them for each server, in order. Default: what SGLang takes "
        "by itself.",
    )
    python: str = Field("python", description="Interpreter of the environment that SGLang is installed in.")
    arguments: list[str] = Field([], description="Further arguments of `sglang.launch_server`.")

    @model_validator(mode="after")
    def _check(self) -> SGLangServers:
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
                    "servers yourself and name them in rollout.urls"
                )
        return self


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
        "full support (no top-p, no top-k): engine log-probs are not renormalised for them.",
    )
    urls: list[str] = Field(
        [],
        description="Addresses of running SGLang (or embedded) servers. Empty: the run starts "
        "`embedded_servers` of its own.",
    )
    router: str | None = Field(
        None,
        description="Address of SGLang's router (`sglang-router`), through which prompts then go; all else "
        "goes to the engines of `urls` directly, which the run registers with the router while they may "
        "serve. Default: the run spreads prompts over the engines itself.",
    )
    embedded_servers: PositiveInt = Field(1, description="Embedded servers that the run starts.")
    embedded_device: Literal["cpu", "cuda"] = Field("cpu", description="Where embedded servers compute.")
    embedded_threads: PositiveInt = Field(1, description="CPU threads of one embedded server.")
    sglang: SGLangServers | None = Field(
        None, description="SGLang servers that the run starts, in place of embedded ones."
    )
    colocated: bool = Field(
        False,
        description="Engines share the trainer's GPUs (or memory): they give their weights and cache back "
        "while it trains. SGLang servers of your own need `--enable-memory-saver`. See also "
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

    replay: PathOption | None = Field(
        None,
        description="Folder of a run whose recorded samples (docs/samples.md) are trained on again, with "
        "their rewards and log-probs, in place of new ones: no engine is opened. Default: engines sample.",
    )

    @property
    def engines(self) -> int:
        """How many engines the run begins with."""
        return len(self.urls) or (self.sglang.servers if self.sglang else self.embedded_servers)

    @property
    def engine_tensor_parallel(self) -> int:
        """Ranks of each engine that the run starts; 1 for given ones, as far as is known before asking."""
        return self.sglang.tensor_parallel if self.sglang else 1

    def without_effect(self) -> dict[str, str]:
        embedded = ["embedded_servers", "embedded_device", "embedded_threads"]
        if self.replay is not None:
            return dict.fromkeys([*embedded, *_OF_ENGINES], "replay takes recorded samples, without engines")
        if self.urls:
            inert = dict.fromkeys([*embedded, "sglang"], "urls name running servers")
            if self.router:
                inert["prompts_per_request"] = "SGLang's router takes a request a response"
            return inert
        return dict.fromkeys(embedded, "[rollout.sglang] starts SGLang servers") if self.sglang else {}

    @model_validator(mode="after")
    def _check(self) -> Rollout:
        if self.minimum_engines > self.engines:
            raise ValueError(
                f"minimum_engines = {self.minimum_engines} is more than the run's {self.engines} engines; "
                "lower it"
            )
        self._check_addresses()
        return self

    def _check_addresses(self) -> None:
        try:
            twice = same_server(self.urls)
        except ValueError as error:
            raise ValueError(f"urls = {self.urls}: {error}") from None
        if twice:
            raise ValueError(
                f"urls = {self.urls}: {twice[0]!r} and {twice[1]!r} are the same server; name each once"
            )
        if self.router is None:
            return
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
