"""Everything that a run consists of, opened in order and closed in reverse, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.config.write import to_toml
from megatron_rapo.data.load import load_prompts
from megatron_rapo.data.order import PromptOrder
from megatron_rapo.data.prompts import PromptSet
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluate.evaluator import Evaluator
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.summary import count_tokens
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.architecture import Architecture, read_architecture
from megatron_rapo.observe.observer import Observer
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.policy import Policy
from megatron_rapo.policy.reference import Reference
from megatron_rapo.reward.scoring import ScoredGroup
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.pool import EnginePool
from megatron_rapo.rollout.servers import EmbeddedServers
from megatron_rapo.weights.export import write_hf_model
from megatron_rapo.weights.transports.disk import DiskTransport

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass
class Job:
    """The parts of a run, and what is done with several of them at once."""

    config: RunConfig
    observer: Observer
    placement: Placement
    architecture: Architecture
    vocabulary: int
    prompts: PromptOrder
    collector: Collector
    evaluator: Evaluator | None
    policy: Policy
    reference: Reference | None
    objective: Objective
    transport: DiskTransport
    checkpoints: CheckpointStore

    def begin(self) -> TrainState:
        """Takes up the newest checkpoint, or starts; the engines then serve these weights."""
        checkpoint = self.checkpoints.newest()
        state = TrainState()
        if checkpoint is not None:
            if not self.config.checkpoint.resume:
                raise RapoError(
                    f"run.directory = {self.config.run.directory} holds {checkpoint.name}; choose another "
                    "directory, or set checkpoint.resume = true to go on from it"
                )
            with self.observer.phase("resume"):
                state = self.checkpoints.load(checkpoint, self.policy)
        self.prompts.position = state.prompts_drawn
        if self.placement.is_main:
            (self.config.run.directory / "config.toml").write_text(to_toml(self.config))
        self.observer.open_logs(state.step if checkpoint is not None else None)
        self.observer.begin_step(state.step)
        with self.observer.phase("publish"):
            self.publish(version=state.step)
        if state.step == 0:
            self.observer.finish_step(self._evaluate_if_due(step=0))
        return state

    def sampling_seed(self, step: int) -> int:
        """The seed of a step's samples; 0 is evaluation's, whose samples are the same each time."""
        return (step << 31) + self.config.run.seed

    def publish(self, version: int) -> None:
        """Makes the engines serve the policy's weights as `version`."""
        self.policy.synchronise_parameters()
        self.transport.publish(self.policy.chunks, self.architecture, self.placement, version)

    def finish_step(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Evaluates, saves and logs, each when due."""
        metrics = {**metrics, **self._evaluate_if_due(state.step)}
        every, last = self.config.checkpoint.every, state.step == self.config.run.steps
        if last or (every is not None and state.step % every == 0):
            with self.observer.phase("checkpoint"):
                self.checkpoints.save(self.policy, state)
        self.observer.finish_step(metrics)

    def end(self) -> None:
        """Leaves the trained policy as a HF model in `<run>/model`."""
        directory = self.config.run.directory / "model"
        with self.observer.phase("export"):
            self.policy.synchronise_parameters()
            write_hf_model(
                self.policy.chunks,
                self.architecture,
                self.placement,
                directory,
                companions_of=self.config.model.path,
            )

    def throughput(self, groups: Sequence[ScoredGroup]) -> Mapping[str, float]:
        """Tokens a second of the step so far, whole and by phase; prompts count in the trainer's phases."""
        response_tokens, all_tokens = count_tokens(groups)
        times = self.observer.times()
        return {
            "throughput/tokens_per_s": all_tokens / times["time/step_s"],
            "throughput/rollout_tokens_per_s": response_tokens / times["time/rollout_s"],
            "throughput/annotate_tokens_per_s": all_tokens / times["time/annotate_s"],
            "throughput/update_tokens_per_s": all_tokens / times["time/update_s"],
        }

    def _evaluate_if_due(self, step: int) -> Mapping[str, float]:
        if self.evaluator is None or not self.evaluator.due(step, self.config.run.steps):
            return {}
        with self.observer.phase("evaluate"):
            result = self.evaluator.run(weight_version=step)
        return {f"evaluate/{name}": value for name, value in result.items()}


@contextmanager
def open_job(config: RunConfig) -> Iterator[Job]:
    """Joins the ranks, opens engines and verifiers where they belong, and builds the models."""
    with ExitStack() as stack:
        placement = stack.enter_context(process_groups(config.parallel, config.run.seed))
        observer = stack.enter_context(Observer(config, placement.rank, placement.layout.world_size))
        with observer.phase("load"):
            architecture = read_architecture(config.model.path)
            tokenizer = load_tokenizer(config)
            vocabulary = min(len(tokenizer), architecture.vocabulary)
            prompts = _load_training_prompts(config, tokenizer)
        with observer.phase("start engines"):
            collector = _open_collector(stack, config, placement, tokenizer, architecture.vocabulary)
        with observer.phase("build models"):
            total_updates = config.run.steps * config.updates_per_step
            policy = Policy(config.model, config.optimizer, architecture, placement, total_updates)
            reference = (
                Reference(config.model, architecture, placement) if config.algorithm.wants_reference else None
            )
        if placement.is_main:
            print(prompts.report)
        yield Job(
            config=config,
            observer=observer,
            placement=placement,
            architecture=architecture,
            vocabulary=vocabulary,
            prompts=PromptOrder(prompts, seed=config.run.seed, shuffle=getattr(config.data, "shuffle", True)),
            collector=collector,
            evaluator=_open_evaluator(config, tokenizer, collector),
            policy=policy,
            reference=reference,
            objective=Objective(
                config.algorithm,
                temperature=config.rollout.temperature,
                vocabulary=vocabulary,
                group=placement.tensor_group,
                context_group=placement.context_group,
            ),
            transport=DiskTransport(
                config.run.directory / "weights",
                config.model.path,
                collector.pool if placement.is_main else None,
            ),
            checkpoints=CheckpointStore(config),
        )


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The policy's tokenizer.

    Raises:
        RapoError: the model directory has none that loads.
    """
    path, remedy = config.model.path, "copy the tokenizer files of the model beside its weights"
    # Without them transformers makes an empty tokenizer of the family's class, in silence.
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise RapoError(f"model {path} has no tokenizer (none of {', '.join(TOKENIZER_FILES)}); {remedy}")
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise RapoError(
            f"model {path} has no tokenizer that transformers loads ({error}); {remedy}"
        ) from error


def _load_training_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    return load_prompts(
        config.data,
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.run.seed,
        split="train",
        count=None,
    )


def _open_collector(
    stack: ExitStack,
    config: RunConfig,
    placement: Placement,
    tokenizer: PreTrainedTokenizerBase,
    head_rows: int,
) -> Collector:
    """Rank 0 starts the servers that the run is not given; each head opens its own pool and verifier."""
    rollout = config.rollout
    servers: EmbeddedServers | None = None
    if placement.is_main and not rollout.urls:
        servers = stack.enter_context(
            EmbeddedServers(
                config.model.path,
                count=rollout.embedded_servers,
                device=rollout.embedded_device,
                dtype=config.model.dtype,
                threads=rollout.embedded_threads,
                log_directory=config.run.directory / "engines",
                startup_timeout=rollout.startup_timeout_s,
            )
        )
    urls = placement.share_from_main(servers.urls if servers else rollout.urls)
    if not placement.is_head:
        return Collector(rollout, placement, tokenizer, pool=None, verifier=None)
    pool = stack.enter_context(
        EnginePool(
            urls,
            vocab_size=head_rows,
            prompts_per_request=rollout.prompts_per_request,
            request_timeout=rollout.request_timeout_s,
            head=placement.data_rank,
            diagnose=servers.diagnose if servers else None,
        )
    )
    pool.wait_until_healthy(rollout.startup_timeout_s)
    reward = config.reward
    verifier = stack.enter_context(
        Verifier(config.verifier, workers=reward.workers, time_limit_s=reward.time_limit_s)
    )
    return Collector(rollout, placement, tokenizer, pool, verifier)


def _open_evaluator(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, collector: Collector
) -> Evaluator | None:
    evaluate = config.evaluate
    if evaluate is None:
        return None
    problems = load_prompts(
        evaluate.data or config.data,
        tokenizer,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
        seed=config.run.seed,
        split="test",
        count=evaluate.problems,
    )
    return Evaluator(evaluate, problems, collector, seed=config.run.seed)
