"""`megatron-rapo doctor --mismatch`: engines and trainer answer for the same tokens, stage by stage.

Greedy answers to fixed prompts are asked for three times: as the engines are found (those that the run was
given), with other weights published on purpose, and with the run's own published after that. Each time with
what is cached and again once the cache is flushed, and each answer is held against the weights that the
trainer has then. Then responses are sampled as a run does. What differs when tells the cause.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TypeVar

from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.prompts import Prompt
from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
from megatron_rapo.doctor.engines import Answer, EngineProbe
from megatron_rapo.doctor.evidence import Asked, Evidence, Stage
from megatron_rapo.doctor.finding import Finding
from megatron_rapo.doctor.trainer import Trainer
from megatron_rapo.doctor.verdicts import judge
from megatron_rapo.experience.engines import open_engines
from megatron_rapo.hangs.patience import patient_layout
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.opening import open_publisher
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.rollout.requests import Sampling

T = TypeVar("T")
ByEngine = dict[str, T]

PROMPTS = 8
GREEDY_TOKENS = 16
RESPONSES = 16  # sampled, of each prompt
SAMPLED_TOKENS = 128  # at most, of each response


def examine(config: RunConfig) -> list[Finding]:
    """The findings about all engines, on all ranks of the layout, which all call it."""
    with process_groups(patient_layout(config), config.run.seed) as placement:
        return examine_at(config, placement)


def examine_at(config: RunConfig, placement: Placement) -> list[Finding]:
    """The same of ranks that stand in the layout already.

    The weights are those of the run's newest checkpoint, else those that it begins with. Engines that the run
    was given serve them afterwards.

    Raises:
        RapoError: an engine is gone, refuses, or serves a model of another architecture.
    """
    with ExitStack() as stack:
        architecture = read_architecture(config.model.path)
        tokenizer = load_tokenizer(config.model.path)
        prompts = load_training_prompts(config, tokenizer)
        aside = _aside(config)
        engines = stack.enter_context(open_engines(aside, placement, architecture))
        policy = Policy(
            config.model,
            config.optimizer,
            architecture,
            placement,
            total_updates=config.decay_steps * config.updates_per_step,
            adapter=config.adapter,
            seed=config.run.seed,
        )
        checkpoints = CheckpointStore(config)
        newest = checkpoints.newest_whole(placement)
        version = 0 if newest is None else checkpoints.load(newest, policy).step
        policy.offload()  # there are no updates
        publisher = open_publisher(aside, policy, placement, engines, prompts, trusting=True)
        probe = None
        if placement.is_main and engines.pool is not None:
            urls, timeout = engines.pool.urls, config.rollout.request_timeout_s
            probe = stack.enter_context(EngineProbe(urls, config.engine_kind.connect, timeout))
        trainer = Trainer(config, policy, placement, vocabulary_size(tokenizer, architecture.vocabulary))
        examination = _Examination(config, placement, probe, trainer, prompts.prompts[:PROMPTS], version)
        return [finding for evidence in examination.run(publisher) for finding in judge(evidence)]


def _aside(config: RunConfig) -> RunConfig:
    """The same with a folder of its own in the run's: logs and weights do not mix with the run's."""
    directory = config.run.directory / "doctor"
    return config.model_copy(update={"run": config.run.model_copy(update={"directory": directory})})


class _Examination:
    """The stages. All ranks call every method together; `probe` is the main rank's."""

    def __init__(
        self,
        config: RunConfig,
        placement: Placement,
        probe: EngineProbe | None,
        trainer: Trainer,
        prompts: Sequence[Prompt],
        version: int,
    ) -> None:
        self._config = config
        self._placement = placement
        self._probe = probe
        self._trainer = trainer
        self._prompts = prompts
        self._version = version
        self._greedy_tokens = min(GREEDY_TOKENS, config.rollout.max_response_tokens)

    def run(self, publisher: Publisher) -> list[Evidence]:
        """Evidence of each engine."""
        found_versions, found = None, None
        if self._config.rollout.engine.urls:
            found_versions = self._ask(lambda probe: probe.versions())
            found = self._stage("as found")
        with self._trainer.shaken():
            self._tell(f"publishing other weights, as version {self._version + 1}")
            publisher.publish(self._version + 1)
            shaken = self._stage("with other weights")
        self._tell(f"publishing the run's weights, version {self._version}")
        publisher.publish(self._version)
        fresh = self._stage("with the run's weights")
        shaken_by_fresh = self._held({url: stage.cold.answers for url, stage in shaken.items()}, 1.0)
        continued = self._continued(fresh)
        sampled = self._sampled()
        answers = {url: asked.answers for url, asked in sampled.items()}
        prefilled = self._ask(lambda probe: probe.prefilled(answers))
        return [
            Evidence(
                url=url,
                version=self._version,
                found_version=found_versions[url] if found_versions else None,
                found=found[url] if found else None,
                shaken=shaken[url],
                shaken_by_fresh=shaken_by_fresh[url],
                fresh=fresh[url],
                continued=continued[url],
                sampled=sampled[url],
                prefilled=prefilled[url],
                temperature=self._config.rollout.temperature,
                tolerance=self._config.probe_tolerance,
            )
            for url in fresh
        ]

    def _stage(self, name: str) -> ByEngine[Stage]:
        self._tell(f"greedy answers {name}")
        prompts = [prompt.token_ids for prompt in self._prompts]
        warm = self._greedy(prompts, self._greedy_tokens)
        self._flush()
        cold = self._greedy(prompts, self._greedy_tokens)
        return {url: Stage(name, warm[url], cold[url]) for url in cold}

    def _greedy(self, prompts: Sequence[tuple[int, ...]], tokens: int) -> ByEngine[Asked]:
        return self._held(self._ask(lambda probe: probe.greedy(prompts, tokens)), 1.0)

    def _continued(self, fresh: ByEngine[Stage]) -> ByEngine[Asked]:
        """Answers to the prompts with the first half of one engine's answers to them."""
        half = self._greedy_tokens // 2
        answers = next(iter(fresh.values())).cold.answers
        prompts = [(*answer.prompt, *answer.token_ids[:half].tolist()) for answer in answers]
        asked = prompts or [prompt.token_ids for prompt in self._prompts]
        return self._greedy(asked, self._greedy_tokens - half)

    def _sampled(self) -> ByEngine[Asked]:
        rollout = self._config.rollout
        self._tell(f"responses sampled at temperature {rollout.temperature:g}")
        sampling = Sampling(
            responses_per_prompt=RESPONSES,
            max_response_tokens=min(SAMPLED_TOKENS, rollout.max_response_tokens),
            temperature=rollout.temperature,
            weight_version=self._version,
            seed=self._config.run.seed,
        )
        self._flush()
        return self._held(
            self._ask(lambda probe: probe.sampled(self._prompts, sampling)), rollout.temperature
        )

    def _held(self, answers: Mapping[str, Sequence[Answer]], temperature: float) -> ByEngine[Asked]:
        """The answers beside the trainer's readings of them, which has the same weights now."""
        known = {url: [a for a in of_engine if self._trainer.knows(a)] for url, of_engine in answers.items()}
        readings = iter(
            self._trainer.read([a for of_engine in known.values() for a in of_engine], temperature)
        )
        return {
            url: Asked(
                of_engine,
                [next(readings) for _ in of_engine],
                foreign=sum(self._trainer.foreign(answer) for answer in answers[url]),
            )
            for url, of_engine in known.items()
        }

    def _flush(self) -> None:
        self._ask(lambda probe: probe.flush())

    def _ask(self, question: Callable[[EngineProbe], T]) -> T:
        return self._placement.share_from_main(question(self._probe) if self._probe else None)

    def _tell(self, text: str) -> None:
        if self._placement.is_main:
            print(text, flush=True)
