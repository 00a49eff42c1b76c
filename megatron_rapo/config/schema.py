"""The configuration of one run: its sections, and what must hold between them.

Every option is typed, validated, documented, and refused where it would have no effect.
`docs/configuration.md` is generated from these models (`megatron_rapo.config.document`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from megatron_rapo.config.adapter import Adapter, check_adapter
from megatron_rapo.config.algorithm import DEFAULT_METHOD, Algorithm, find_method
from megatron_rapo.config.cluster import Slurm
from megatron_rapo.config.data import Data, MixtureData, TrainingData
from megatron_rapo.config.engine import load_own_kind
from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.config.evaluation import Evaluate, Setting
from megatron_rapo.config.guards import Guards, check_guards
from megatron_rapo.config.older_samples import (
    check_old_log_probs,
    check_partial_responses,
    refuse_alarm_of_older_samples,
)
from megatron_rapo.config.ranks import check_ranks
from megatron_rapo.config.reward import Reward
from megatron_rapo.config.routing_replay import check_routing_replay
from megatron_rapo.config.running import Checkpoint, Observe, Run
from megatron_rapo.config.sampling import Rollout
from megatron_rapo.config.schedule import check_schedule
from megatron_rapo.config.shared_prompts import check_shared_prompts
from megatron_rapo.config.templates import Templated
from megatron_rapo.config.training import Model, Optimizer, Parallel, Teacher
from megatron_rapo.config.verifiers import RewardPlan, built_in
from megatron_rapo.config.weights import Weights
from megatron_rapo.config.without_samples import refuse_options_beside_replay, refuse_options_of_samples
from megatron_rapo.engines.kind import EngineKind
from megatron_rapo.engines.kinds import find_kind
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.demonstrations import Demonstrations
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.term import OF_IMPORTANCE
from megatron_rapo.section import Section
from megatron_rapo.user_code import is_named_in, own_traceback

_BELONGING = {
    "file": "math",
    "function": "math",
    "reasoning_gym": "reasoning_gym",
    "countdown": "countdown",
    "arithmetic": "integer",
}
"""What rewards responses to the problems of a source, where the configuration does not say."""


class RunConfig(Section):
    """The whole configuration of one run."""

    run: Run
    model: Model
    teacher: Teacher | None = None
    adapter: Adapter | None = None
    parallel: Parallel = Parallel()
    data: TrainingData
    rollout: Annotated[Rollout, BeforeValidator(load_own_kind)]
    environment: EnvironmentOptions = EnvironmentOptions()
    reward: Reward = Reward()
    weights: Weights = Weights()
    algorithm: Algorithm = METHODS[DEFAULT_METHOD].Options(method=DEFAULT_METHOD)
    optimizer: Optimizer = Optimizer()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate | None = None
    observe: Observe = Observe()
    guards: Guards = Guards()
    slurm: Slurm | None = None

    def new_method(self) -> Method:
        """What `algorithm.method` names, as it is at the beginning of a run."""
        rollout = self.rollout
        sampling = Sampling(rollout.temperature, rollout.responses_per_prompt, rollout.max_response_tokens)
        return find_method(self.algorithm.method, self.run.code)(self.algorithm, sampling)

    @property
    def demonstrations(self) -> Demonstrations | None:
        """Which given texts are learnt from; None: engines sample what is."""
        return self.new_method().demonstrations

    @property
    def opens_engines(self) -> bool:
        """Whether anything is sampled: to be learnt from, or to be evaluated."""
        return self.rollout.replay is None and (self.demonstrations is None or self.evaluate is not None)

    @property
    def engine_kind(self) -> EngineKind:
        """What `rollout.engine` describes."""
        options = self.rollout.engine
        return find_kind(options.kind, self.run.code)(options)

    @property
    def minibatch_prompts(self) -> int:
        """Prompts of one optimizer update."""
        return self.algorithm.minibatch_prompts or self.rollout.prompts_per_step

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of one rollout batch."""
        return self.rollout.prompts_per_step // self.minibatch_prompts

    @property
    def responses_per_step(self) -> int:
        """Responses that a step trains on; where texts are given, one a prompt."""
        each = self.rollout.responses_per_prompt if self.demonstrations is None else 1
        return self.rollout.prompts_per_step * each

    @property
    def decay_steps(self) -> int:
        """Steps over which the learning rate decays."""
        return self.optimizer.decay_steps or self.run.steps

    @property
    def training_sources(self) -> list[Data]:
        """What is trained on: the sources of a mixture, or the only one."""
        return self.data.sources if isinstance(self.data, MixtureData) else [self.data]

    @property
    def source_names(self) -> list[str]:
        """What problems and metrics call each of them."""
        return [data.name for data in self.training_sources]

    @property
    def training_tables(self) -> list[str]:
        """What the user calls the table of each of them: `data`, or `data.sources[1]`."""
        if not isinstance(self.data, MixtureData):
            return ["data"]
        return [f"data.sources[{place}]" for place in range(len(self.data.sources))]

    def verifier_of(self, data: Data) -> RewardPlan:
        """What judges responses to a data set: its own `reward`, or that of the run.

        These name functions or a verifier; else it is what suits the source.
        """
        judging = data.reward or self.reward
        if parts := judging.parts("reward" if data.reward is None else f"{data.name}: reward"):
            return RewardPlan(parts, judging.correct_at, tuple(self.run.code))
        chosen = judging.verifier
        # Countdown's answers are no expressions that could be compared: it goes with its verifier alone.
        shared = data.reward is None and data not in self.training_sources
        if chosen is None or (shared and "countdown" in (data.source, chosen)):
            return built_in(_BELONGING[data.source])
        return built_in(chosen)

    @property
    def evaluation_data(self) -> list[Data]:
        """The data sets that are evaluated on."""
        if self.evaluate is None:
            return []
        return self.training_sources if self.evaluate.data is None else self.evaluate.data

    @property
    def evaluation_tables(self) -> list[str]:
        """What the user calls the table of each of them: `data`, `evaluate.data`, or `evaluate.data[1]`."""
        if self.evaluate is None or self.evaluate.data is None:
            return self.training_tables if self.evaluate else []
        several = len(self.evaluate.data) > 1
        return [f"evaluate.data[{i}]" if several else "evaluate.data" for i in range(len(self.evaluate.data))]

    @property
    def has_chat_data(self) -> bool:
        """Whether a chat template makes prompts of the run or its evaluation."""
        sources = [*self.training_sources, *self.evaluation_data]
        return any(isinstance(source, Templated) and source.template != "plain" for source in sources)

    def is_graded(self, data: Data) -> bool:
        """Whether responses to a data set can earn else than 1 and 0: by functions, or in an environment."""
        return not self.verifier_of(data).is_verifier or self.environment.may_score

    def needs_answers(self, data: Data) -> bool:
        """Whether what rewards responses to a data set reads gold answers."""
        return self.verifier_of(data).needs_answers and not self.environment.scores_all

    @property
    def evaluation_settings(self) -> list[Setting]:
        """How they are sampled."""
        if self.evaluate is None:
            return []
        return self.evaluate.settings or [Setting(temperature=self.rollout.temperature)]

    @property
    def probe_tolerance(self) -> float:
        """What the engines' greedy log-probs may differ from the trainer's, in nats."""
        return self.weights.probe_tolerance or {"bfloat16": 0.05, "float32": 1e-3}[self.model.dtype]

    @property
    def sequence_multiple(self) -> int:
        """What each sequence's tokens are padded to a multiple of: CP's zig-zag halves, SP's shards."""
        halves = 2 * self.parallel.context_parallel if self.parallel.context_parallel > 1 else 1
        shards = self.parallel.model_parallel // self.parallel.pipeline_parallel
        return math.lcm(halves, shards if self.parallel.sequence_parallel else 1)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt and response."""
        return self.rollout.max_prompt_tokens + self.rollout.max_response_tokens

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        checks: list[Callable[[], None]] = [
            self._check_batch,
            self._check_date,
            self._check_code,
            self._check_method,
            self._check_checkpoints,
            self._check_samples,
            self._check_rewards,
            self._check_weights_of_sources,
            self._check_evaluation,
            self._check_colocation,
            partial(refuse_alarm_of_older_samples, self),
            partial(check_ranks, self),
            partial(check_schedule, self),
            partial(check_adapter, self),
            partial(check_guards, self),
            partial(check_shared_prompts, self),
            partial(check_routing_replay, self),
            partial(refuse_options_beside_replay, self),
            partial(refuse_options_of_samples, self),
        ]
        for check in checks:
            check()
        return self

    def _check_batch(self) -> None:
        prompts, replicas = self.rollout.prompts_per_step, self.parallel.data_parallel
        if prompts % self.minibatch_prompts:
            raise ValueError(
                f"algorithm.minibatch_prompts = {self.minibatch_prompts} does not divide "
                f"rollout.prompts_per_step = {prompts}; choose a divisor"
            )
        if prompts < replicas:
            raise ValueError(
                f"rollout.prompts_per_step = {prompts} leaves some of parallel.data_parallel = {replicas} "
                "replicas without a prompt; raise it, or lower data_parallel"
            )

    def _check_date(self) -> None:
        if self.run.date is not None and not self.has_chat_data:
            raise ValueError(
                f'run.date = {self.run.date!r} would have no effect: no data has template = "chat"; remove it'
            )

    def _check_code(self) -> None:
        if self.run.code and not is_named_in(self.resolved()):
            raise ValueError(
                f"run.code = {[str(folder) for folder in self.run.code]} would have no effect: no option "
                'names a module of yours ("module:name"); remove it'
            )

    def _check_method(self) -> None:
        try:
            method = self.new_method()
            needs = method.needs
        except RapoError:
            raise
        except ValueError as error:
            raise ValueError(f"algorithm.{error}") from error
        except Exception as error:  # of the user's own code
            raise RapoError(
                f'algorithm.method = "{self.algorithm.method}" fails when made, or asked for its terms; mend '
                f"it:\n{own_traceback(error)}"
            ) from error
        correction = self.algorithm.importance_correction
        if correction != "off" and not needs & OF_IMPORTANCE:
            raise ValueError(
                f'algorithm.importance_correction = "{correction}" would have no effect: no term of method '
                f"{self.algorithm.method} reads importance weights; remove it"
            )
        check_old_log_probs(self, method)
        check_partial_responses(self, method)
        if method.wants_teacher and self.teacher is None:
            raise ValueError(
                f"teacher is missing: method {self.algorithm.method} learns from one; name its model in "
                "teacher.path"
            )
        if self.teacher is not None and not method.wants_teacher:
            raise ValueError(
                f"[teacher] would have no effect: no term of method {self.algorithm.method} reads a teacher; "
                "remove it"
            )

    def _check_checkpoints(self) -> None:
        every = self.checkpoint.every
        if every is not None and every > self.run.steps:
            raise ValueError(
                f"checkpoint.every = {every} is beyond run.steps = {self.run.steps}; lower or remove it"
            )
        if self.run.relaunches and not self.checkpoint.resume:
            raise ValueError(
                f"run.relaunches = {self.run.relaunches} needs checkpoint.resume = true; set it, or remove it"
            )

    def _check_samples(self) -> None:
        every, steps = self.observe.samples_every, self.run.steps
        if every > steps:
            raise ValueError(f"observe.samples_every = {every} is beyond run.steps = {steps}; set 0 for none")

    def _check_rewards(self) -> None:
        own = [data for data in self.evaluation_data if data.reward is not None]
        for data in [*self.training_sources, *own]:
            for part in self.verifier_of(data).parts:
                if part.verifies and (str(part) == "countdown") != (data.source == "countdown"):
                    where = "data.source" if data is self.data else f"source of {data.name}"
                    raise ValueError(
                        f'{part.option} = "{part}" cannot check {where} = "{data.source}"; remove it'
                    )

    def _check_colocation(self) -> None:
        transport = self.weights.transport
        if self.rollout.colocated and transport in ("distributed", "shard"):
            raise ValueError(
                f'weights.transport = "{transport}" cannot serve rollout.colocated = true: NCCL takes no '
                'two processes on one GPU; use "tensor"'
            )
        if self.optimizer.in_host_memory_during_rollouts and self.model.dtype == "float32":
            raise ValueError(
                'optimizer.in_host_memory_during_rollouts = true needs model.dtype = "bfloat16": in float32 '
                "the optimizer works on the model's own parameters; remove it"
            )

    def _check_weights_of_sources(self) -> None:
        alone = dict(zip(self.evaluation_tables, self.evaluation_data, strict=True))
        if isinstance(self.data, MixtureData):
            alone = {table: data for table, data in alone.items() if table.startswith("evaluate")}
        else:
            alone["data"] = self.data
        for table, data in alone.items():
            if data.weight is not None:
                raise ValueError(
                    f"{table}.weight = {data.weight} would have no effect: it is in no mixture; remove it"
                )

    def _check_evaluation(self) -> None:
        if self.evaluate is None:
            return
        if self.evaluate.data is None and any(one.source == "file" for one in self.training_sources):
            raise ValueError(
                "evaluate.data is missing: training prompts from a file leave none held out; add it"
            )
        every = self.evaluate.every
        if every is not None and every > self.run.steps:
            raise ValueError(
                f"evaluate.every = {every} is beyond run.steps = {self.run.steps}; lower or remove it"
            )
        best = self.evaluate.best
        if best is not None and best not in (names := self._evaluation_metrics()):
            raise ValueError(f"evaluate.best = {best!r} is not measured; choose one of {', '.join(names)}")
        for setting in self.evaluate.settings:
            most = setting.max_response_tokens or self.rollout.max_response_tokens
            if most > self.rollout.max_response_tokens:
                raise ValueError(
                    f"evaluate.settings max_response_tokens = {most} exceeds rollout.max_response_tokens = "
                    f"{self.rollout.max_response_tokens}; lower it, or raise that"
                )

    def _evaluation_metrics(self) -> list[str]:
        assert self.evaluate is not None
        pairs = [(d, s.name) for d in self.evaluation_data for s in self.evaluation_settings]
        kinds = [f"{kind}@{k}" for kind in ("pass", "maj") for k in self.evaluate.k]
        return [
            kind if len(pairs) == 1 else f"{data.name}/{setting}/{kind}"
            for data, setting in pairs
            for kind in (["reward", *kinds] if self.is_graded(data) else kinds)
        ]

    def resolved(self) -> dict[str, Any]:
        """All options that have an effect, with their values, as written beside a run's output.

        To validate them gives this configuration again.
        """
        return self.model_dump(mode="json", exclude_none=True)
