"""Everything that a run consists of, opened in order and closed in reverse, on every rank."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rapo.checkpoint.files import how_to_go_on
from megatron_rapo.checkpoint.state import TrainState
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.config.date import with_date
from megatron_rapo.data.batching import Sample
from megatron_rapo.data.guided import GuidedPrompts
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.order import MixedOrder, PromptOrder, order_of
from megatron_rapo.data.prompts import Prompt, TrainingPrompts
from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.evaluator import Evaluator
from megatron_rapo.evaluation.held_out import load_held_out
from megatron_rapo.experience.asking import ask
from megatron_rapo.experience.batch import Batch, collect
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines, open_engines
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.summary import count_tokens
from megatron_rapo.experience.unknown import UnknownRewards
from megatron_rapo.hangs.opening import open_watch
from megatron_rapo.launch.stop import requests
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.state import restore_state, saved_state
from megatron_rapo.methods.told import told_by
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.heartbeat import where_is
from megatron_rapo.observe.observer import Observer
from megatron_rapo.observe.versions import software_versions
from megatron_rapo.parallel.device import peak_memory
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.frozen import FrozenModel
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.opening import open_publisher
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.record.answers import AnswerLog, drop_until
from megatron_rapo.record.identity import Identity, prompts_fingerprint
from megatron_rapo.record.replaying import check_recorded_identity
from megatron_rapo.record.standing import finish
from megatron_rapo.record.start import begin, check_identity
from megatron_rapo.reward.by_source import judge_by_source
from megatron_rapo.reward.golds import gold_judge
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.samples.recorder import SampleRecorder
from megatron_rapo.samples.replay import Replay, Unpublished
from megatron_rapo.weights.export import write_hf_model


@dataclass
class Job:
    """The parts of a run, and what is done with several of them at once."""

    config: RunConfig
    observer: Observer
    placement: Placement
    identity: Identity
    architecture: Architecture
    vocabulary: int
    prompts: PromptOrder | MixedOrder
    engines: SharedEngines
    collector: Collector | Replay
    unknown_rewards: UnknownRewards
    recorder: SampleRecorder
    evaluator: Evaluator | None
    policy: Policy
    frozen: Sequence[FrozenModel]
    method: Method
    objective: Objective
    publisher: Publisher | Unpublished
    checkpoints: CheckpointStore
    answers: AnswerLog | None  # of code outside: this head's own
    stop_signal: int = 0  # that asked to stop; a step's end agrees on it, on all ranks

    @property
    def distribution(self) -> FrozenModel | None:
        """The frozen model whose whole distribution the loss may need: the teacher, else the reference."""
        return self.frozen[-1] if self.frozen else None

    def begin(self) -> TrainState:
        """Takes up the newest checkpoint, or starts; the engines then serve these weights."""
        checkpoint = self.checkpoints.newest()
        state = TrainState()
        with self.policy.onloaded():
            if checkpoint is not None:
                with self.observer.phase("resume"):
                    state = self.checkpoints.load(checkpoint, self.policy)
        self.prompts.position = state.prompts_drawn
        if state.method_state is not None and state.method == self.config.algorithm.method:
            restore_state(self.method, state.method_state)
        resume_step = None if checkpoint is None else state.step
        if self.placement.is_main:
            versions = {**software_versions(), "engines": self.engines.software()}
            for line in begin(self.config, self.identity, versions, resume_step):
                print(line, flush=True)
        self.observer.open_logs(resume_step)
        self.observer.begin_step(state.step)
        with self.observer.phase("publish"):
            self.publisher.publish(state.step, resumed=checkpoint is not None)
        if state.step == 0:
            self.observer.finish_step(self._evaluate_if_due(step=0))
        return state

    def state_after(self, step: int) -> TrainState:
        """What goes on with the next step.

        Raises:
            RapoError: the method's state cannot be saved.
        """
        method = self.config.algorithm.method
        return TrainState(step, self.prompts.position, method, saved_state(self.method))

    def sampling_seed(self, step: int) -> int:
        """The seed of a step's samples; 0 is evaluation's, whose samples are the same each time."""
        return (step << 31) + self.config.run.seed

    def collect(self, step: int) -> Batch:
        """Rollouts and rewards of the step's prompts, and of further ones where need be; on all ranks."""
        sampling = self.method.sampling()
        if wrong := sampling.wrong(self.method.configured):
            raise RapoError(f'sampling of method "{self.config.algorithm.method}" returned {wrong}; mend it')
        self.objective.temperature = sampling.temperature

        def score(prompts: Sequence[Prompt]) -> Shared:
            collected = partial(
                self.collector.collect,
                prompts,
                chosen=sampling,
                weight_version=step - 1,
                seed=self.sampling_seed(step),
                phase=self.observer.phase,
                whole=self.method.reads_responses,
                answers=self.answers.of_step(step) if self.answers is not None else None,
            )
            return ask(self.method, prompts, lambda tries: collected(tries=tries))

        rollout = self.config.rollout
        batch = collect(
            self.prompts, rollout.prompts_per_step, score, rollout.dynamic_sampling, self.method.teaches
        )
        self.unknown_rewards.check(step, batch.sampled)
        return batch

    def record(self, step: int, batch: Batch, samples: Sequence[Sequence[Sample]]) -> None:
        """Keeps what the step sampled (docs/samples.md)."""
        drawn, temperature = self.prompts.position, self.objective.temperature
        self.recorder.record(step, batch, samples, prompts_drawn=drawn, temperature=temperature)

    def finish_step(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Evaluates, saves and logs, each when due."""
        metrics = {
            **metrics,
            **told_by(self.method),
            **self._evaluate_if_due(state.step),
            **self.engines.metrics(),
            "memory/peak_gib": self.placement.largest(peak_memory()) / 2**30,
        }
        self.stop_signal = int(self.placement.largest(requests.number))
        if self.stop_signal:
            requests.heed()
        best = self.checkpoints.best is not None and self.checkpoints.best.take(state.step, metrics)
        due = self.placement.share_from_main(self.checkpoints.due(state.step))  # clocks differ
        if due or best or self.stop_signal:
            with self.observer.phase("checkpoint"):
                self.recorder.finish()  # what the checkpoint goes on after is not sampled again
                self.checkpoints.save(self.policy, state)
            if self.placement.is_main:
                drop_until(self.config.run.directory, state.step)
        self.observer.finish_step(metrics)

    def end(self, state: TrainState) -> None:
        """Leaves the trained policy as a HF model in `<run>/model`.

        Raises:
            SystemExit: the run was asked to stop; it is saved.
        """
        if self.stop_signal:
            self._tell_stop(state)
            raise SystemExit(128 + self.stop_signal)
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
        if self.placement.is_main:
            finish(self.config.run.directory, state.step)

    def _tell_stop(self, state: TrainState) -> None:
        """Once all is written, on all ranks: a launcher may end the others as soon as one has ended."""
        if self.placement.is_main:
            steps, directory = self.config.run.steps, self.config.run.directory
            name = signal.Signals(self.stop_signal).name
            print(
                f"stopped by {name} after step {state.step} of {steps}: {how_to_go_on(directory)}", flush=True
            )
        self.placement.share_from_main(None)

    def throughput(self, batch: Batch) -> Mapping[str, float]:
        """Tokens a second of the step so far, whole and by phase; prompts count in the trainer's phases."""
        response_tokens, _ = count_tokens(batch.drawn)
        _, all_tokens = count_tokens(batch.groups)
        times = self.observer.times()
        return {
            "throughput/tokens_per_s": all_tokens / times["time/step_s"],
            "throughput/rollout_tokens_per_s": response_tokens / times["time/rollout_s"],
            "throughput/annotate_tokens_per_s": all_tokens / times["time/annotate_s"],
            "throughput/update_tokens_per_s": all_tokens / times["time/update_s"],
        }

    def _evaluate_if_due(self, step: int) -> Mapping[str, float]:
        if self.evaluator is None or not self.evaluator.due(step):
            return {}
        with self.observer.phase("evaluate"):
            result = self.evaluator.run(step)
        return {f"evaluate/{name}": value for name, value in result.items()}


@contextmanager
def open_job(config: RunConfig) -> Iterator[Job]:
    """Joins the ranks, opens engines and verifiers where they belong, and builds the models."""
    with ExitStack() as stack:
        placement = stack.enter_context(process_groups(config.parallel, config.run.seed))
        # Ranks that start at midnight, or whose machines' clocks differ, have the same prompts.
        config = with_date(config, placement.share_from_main(config.run.date))
        if placement.is_main:
            requests.last_words = partial(_tell_loss, config.run.directory)
        observer = stack.enter_context(Observer(config, placement.rank, placement.layout.world_size))
        observer.listen(stack.enter_context(open_watch(config, placement)).beat)
        with observer.phase("load"):
            architecture = read_architecture(config.model.path)
            tokenizer = load_tokenizer(config.model.path)
            vocabulary = vocabulary_size(tokenizer, architecture.vocabulary)
            prompts = load_training_prompts(config, tokenizer, gold_judge(config, placement))
            _require_the_same(prompts, placement)
            identity = placement.share_from_main(_identify(config, prompts, tokenizer, placement.is_main))
            check_identity(config, identity)
            check_recorded_identity(config, identity)
        with observer.phase("start engines"):
            verifiers = _open_verifiers(stack, config, placement)
            engines = _open_engines(stack, config, placement, architecture)
            runner = _open_runner(stack, config, engines, tokenizer, architecture)
        with observer.phase("build models"):
            total_updates = config.decay_steps * config.updates_per_step
            policy = Policy(config.model, config.optimizer, architecture, placement, total_updates)
            method = config.new_method()
            frozen = open_frozen(config, architecture, method, placement)
        collector, publisher = _open_collector(config, engines, runner, verifiers, policy, prompts)
        if placement.is_main:
            print(prompts.report)
        yield Job(
            config=config,
            observer=observer,
            placement=placement,
            identity=identity,
            architecture=architecture,
            vocabulary=vocabulary,
            prompts=order_of(prompts, config.run.seed),
            engines=engines,
            collector=collector,
            unknown_rewards=UnknownRewards(config.reward.unknown_limit, placement),
            recorder=stack.enter_context(SampleRecorder(config, placement)),
            evaluator=_open_evaluator(config, tokenizer, collector, verifiers),
            policy=policy,
            frozen=frozen,
            method=method,
            objective=Objective(
                method,
                temperature=config.rollout.temperature,
                vocabulary=vocabulary,
                group=placement.tensor_group,
                context_group=placement.context_group,
            ),
            publisher=publisher,
            checkpoints=CheckpointStore(config, identity.fingerprints()),
            answers=stack.enter_context(closing(AnswerLog(config, placement.data_rank))) if runner else None,
        )


def _tell_loss(directory: Path, reason: str) -> None:
    """That the run stops with a step undone."""
    where = where_is(directory, rank=0)
    print(f"stopped {where} without saving, as {reason}: {how_to_go_on(directory)}", flush=True)


def _require_the_same(prompts: TrainingPrompts, placement: Placement) -> None:
    """Files of another node may be others, and functions of the user's own may draw what they like."""
    mine = prompts_fingerprint(prompts.prompts)
    if placement.share_from_main(mine) != mine:
        raise RapoError(
            f"rank {placement.rank} has loaded other problems than rank 0:\n{prompts.report}\nlet all nodes "
            "read the same files, and a function of your own return the same each time (by its seed)"
        )


def _identify(
    config: RunConfig, prompts: TrainingPrompts, tokenizer: PreTrainedTokenizerBase, is_main: bool
) -> Identity | None:
    """What the run loaded, on the main rank: reading weights once is enough."""
    if not is_main:
        return None
    data_sets = load_held_out(config, tokenizer)
    evaluation = {one.name: f"{one.record.fingerprint} {one.prompts_fingerprint}" for one in data_sets}
    return Identity.of(config, prompts.prompts, evaluation)


def _open_verifiers(stack: ExitStack, config: RunConfig, placement: Placement) -> dict[str, Verifier]:
    """A head's verifiers, one of each kind that its data sets need; none on other ranks."""
    verifiers: dict[str, Verifier] = {}
    if placement.is_head and config.rollout.replay is None:
        for plan in map(config.verifier_of, [*config.training_sources, *config.evaluation_data]):
            if str(plan) not in verifiers:
                verifiers[str(plan)] = stack.enter_context(Verifier.configured(plan, config.reward))
    return verifiers


def _open_evaluator(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector | Replay,
    verifiers: Mapping[str, Verifier],
) -> Evaluator | None:
    """None where nothing is evaluated, as in a replay."""
    if config.evaluate is None or isinstance(collector, Replay):
        return None
    return Evaluator(config, tokenizer, collector, verifiers)


def _open_engines(
    stack: ExitStack, config: RunConfig, placement: Placement, architecture: Architecture
) -> SharedEngines:
    """None of them in a replay."""
    if config.rollout.replay is not None:
        return SharedEngines(placement, None, None)
    return stack.enter_context(open_engines(config, placement, architecture))


def _open_runner(
    stack: ExitStack,
    config: RunConfig,
    engines: SharedEngines,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
) -> Runner | None:
    """What runs a head's episodes; None on other ranks, and in a replay."""
    if engines.pool is None:
        return None
    episodes = EpisodeRunner(
        open_environment(config),
        config.environment,
        tokenizer,
        config.reward.correct_at,
        architecture.vocabulary,
        GuidedPrompts(config, tokenizer),
    )
    return stack.enter_context(Runner(episodes, engines.pool))


def _open_collector(
    config: RunConfig,
    engines: SharedEngines,
    runner: Runner | None,
    verifiers: Mapping[str, Verifier],
    policy: Policy,
    prompts: TrainingPrompts,
) -> tuple[Collector | Replay, Publisher | Unpublished]:
    """Where groups come from, and where weights go to."""
    placement = policy.placement
    if config.rollout.replay is not None:
        return Replay(config.rollout.replay, placement), Unpublished(policy)
    publisher = open_publisher(config, policy, placement, engines, prompts)
    judge = None
    if runner is not None:
        by_source = {data.name: verifiers[str(config.verifier_of(data))] for data in config.training_sources}
        judge = judge_by_source(by_source)
    return Collector(placement, engines, runner, judge, recover=publisher.publish), publisher
