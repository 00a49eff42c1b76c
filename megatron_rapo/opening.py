"""The parts of a run, opened in order and closed in reverse, on every rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_rapo.ahead.batches import Batches, Source
from megatron_rapo.ahead.partial import PartialBatches
from megatron_rapo.checkpoint.files import how_to_go_on
from megatron_rapo.checkpoint.store import CheckpointStore
from megatron_rapo.config import RunConfig
from megatron_rapo.config.date import with_date
from megatron_rapo.data.guided import GuidedPrompts
from megatron_rapo.data.load import load_training_prompts
from megatron_rapo.data.order import order_of
from megatron_rapo.data.prompts import TrainingPrompts
from megatron_rapo.data.tokenizer import load_tokenizer, vocabulary_size
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.episode.choices import ChoiceShape
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.evaluator import Evaluator
from megatron_rapo.evaluation.given_loss import GivenLoss
from megatron_rapo.evaluation.held_out import load_held_out
from megatron_rapo.experience.batch import Prompts
from megatron_rapo.experience.carried import Carried
from megatron_rapo.experience.collector import Collector
from megatron_rapo.experience.engines import SharedEngines, open_engines
from megatron_rapo.experience.given import Given
from megatron_rapo.experience.sharing import Shared
from megatron_rapo.experience.unknown import UnknownRewards
from megatron_rapo.guards.guards import Guards
from megatron_rapo.hangs.opening import open_watch
from megatron_rapo.hangs.patience import patient_layout
from megatron_rapo.job import Job
from megatron_rapo.launch.stop import requests
from megatron_rapo.loss.objective import Objective
from megatron_rapo.methods.method import Method
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.heartbeat import where_is
from megatron_rapo.observe.observer import Observer
from megatron_rapo.observe.phase_memory import PhaseMemory
from megatron_rapo.parallel.device import take_peak_memory
from megatron_rapo.parallel.placement import Placement, process_groups
from megatron_rapo.policy.beside import open_frozen
from megatron_rapo.policy.expert_routing import told_choices
from megatron_rapo.policy.policy import Policy
from megatron_rapo.publish.opening import open_publisher
from megatron_rapo.publish.publisher import Publisher
from megatron_rapo.record.answers import AnswerLog, StepAnswers
from megatron_rapo.record.identity import Identity, prompts_fingerprint
from megatron_rapo.record.replaying import check_recorded_identity
from megatron_rapo.record.start import check_identity
from megatron_rapo.reward.by_source import judge_by_source
from megatron_rapo.reward.golds import gold_judge
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.samples.recorder import SampleRecorder
from megatron_rapo.samples.replay import Replay, Unpublished


@contextmanager
def open_job(config: RunConfig) -> Iterator[Job]:
    """Joins the ranks, opens engines and verifiers where they belong, and builds the models."""
    with ExitStack() as stack:
        placement = stack.enter_context(process_groups(patient_layout(config), config.run.seed))
        # Ranks that start at midnight, or whose machines' clocks differ, have the same prompts.
        config = with_date(config, placement.share_from_main(config.run.date))
        if placement.is_main:
            requests.last_words = partial(_tell_loss, config.run.directory)
        observer = stack.enter_context(Observer(config, placement.rank, placement.layout.world_size))
        observer.listen(stack.enter_context(open_watch(config, placement)).beat)
        memory = PhaseMemory(take_peak_memory)
        observer.listen(memory.enter)
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
            engines = _open_engines(stack, config, placement, architecture, observer)
            runner = _open_runner(stack, config, engines, tokenizer, architecture)
        with observer.phase("build models"):
            total_updates = config.decay_steps * config.updates_per_step
            policy = Policy(
                *(config.model, config.optimizer, architecture, placement, total_updates),
                *(config.adapter, config.run.seed),
            )
            stack.callback(policy.close)
            method = config.new_method()
            frozen = open_frozen(config, architecture, method, placement, policy.chunks)
            objective = Objective(
                method,
                temperature=config.rollout.temperature,
                vocabulary=vocabulary,
                group=placement.tensor_group,
                context_group=placement.context_group,
            )
            held_out = prompts.held_out
        publisher = _open_publisher(config, policy, engines, prompts)
        choices = told_choices(config, architecture)
        collector = _open_collector(config, engines, runner, verifiers, publisher, placement, choices)
        source = _groups_from(config, placement, collector)
        order = order_of(prompts, config.run.seed)
        guards = Guards(config, vocabulary, is_main=placement.is_main)
        batches = _open_batches(stack, config, observer, placement, method, order, source, guards)
        if placement.is_main:
            print(prompts.report)
        yield Job(
            config=config,
            observer=observer,
            memory=memory,
            placement=placement,
            identity=identity,
            architecture=architecture,
            vocabulary=vocabulary,
            choices=choices,
            prompts=order,
            engines=engines,
            batches=batches,
            guards=guards,
            recorder=stack.enter_context(SampleRecorder(config, placement)),
            evaluator=_open_evaluator(config, tokenizer, collector, verifiers),
            given_loss=GivenLoss(config, policy, objective, held_out) if held_out else None,
            policy=policy,
            frozen=frozen,
            method=method,
            objective=objective,
            publisher=publisher,
            checkpoints=CheckpointStore(config, identity.fingerprints()),
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
    judged = [*(config.training_sources if config.demonstrations is None else []), *config.evaluation_data]
    if placement.is_head and config.opens_engines:
        for plan in map(config.verifier_of, judged):
            if str(plan) not in verifiers:
                verifiers[str(plan)] = stack.enter_context(Verifier.configured(plan, config.reward))
    return verifiers


def _open_evaluator(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    collector: Collector | None,
    verifiers: Mapping[str, Verifier],
) -> Evaluator | None:
    """None where nothing is evaluated."""
    if config.evaluate is None or collector is None:
        return None
    return Evaluator(config, tokenizer, collector, verifiers)


def _open_engines(
    stack: ExitStack,
    config: RunConfig,
    placement: Placement,
    architecture: Architecture,
    observer: Observer,
) -> SharedEngines:
    """None of them where nothing is sampled."""
    if not config.opens_engines:
        return SharedEngines(placement, None, None)
    return stack.enter_context(open_engines(config, placement, architecture, observer.timeline.request))


def _open_runner(
    stack: ExitStack,
    config: RunConfig,
    engines: SharedEngines,
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
) -> Runner | None:
    """What runs a head's episodes; None on other ranks, and where nothing is sampled."""
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


def _open_publisher(
    config: RunConfig, policy: Policy, engines: SharedEngines, prompts: TrainingPrompts
) -> Publisher | Unpublished:
    """Where weights go to."""
    if not config.opens_engines:
        return Unpublished(policy)
    return open_publisher(config, policy, policy.placement, engines, prompts)


def _open_collector(
    config: RunConfig,
    engines: SharedEngines,
    runner: Runner | None,
    verifiers: Mapping[str, Verifier],
    publisher: Publisher | Unpublished,
    placement: Placement,
    choices: ChoiceShape | None,
) -> Collector | None:
    """What asks the engines; None where there are none."""
    if not config.opens_engines:
        return None
    judge = None
    if runner is not None and config.demonstrations is None:
        by_source = {data.name: verifiers[str(config.verifier_of(data))] for data in config.training_sources}
        judge = judge_by_source(by_source)
    return Collector(placement, engines, runner, judge, recover=publisher.publish, experts=choices)


def _open_batches(
    stack: ExitStack,
    config: RunConfig,
    observer: Observer,
    placement: Placement,
    method: Method,
    prompts: Prompts,
    source: Source,
    guards: Guards,
) -> Batches | PartialBatches:
    """What is begun and not needed any more is given up when the run ends."""
    answers: AnswerLog | None = None
    if placement.is_head and config.opens_engines:
        answers = stack.enter_context(closing(AnswerLog(config, placement.data_rank)))
    unknown = UnknownRewards(config.reward.unknown_limit, placement)

    def check(step: int, sampled: Shared) -> None:
        guards.refuse_unknown(unknown.check(step, sampled), step)

    def of_step(step: int) -> StepAnswers | None:
        return answers.of_step(step) if answers else None

    batches: Batches | PartialBatches
    if config.rollout.partial_tokens is None:
        batches = Batches(config, method, prompts, source, phase=observer.phase, check=check, answers=of_step)
    else:
        assert isinstance(source, Collector)
        carried = Carried(source, config.rollout.prompts_per_step)
        batches = PartialBatches(
            config, method, prompts, carried, phase=observer.phase, check=check, answers=of_step
        )
    return stack.enter_context(closing(batches))


def _groups_from(config: RunConfig, placement: Placement, collector: Collector | None) -> Source:
    """Where the groups come from that are trained on."""
    if config.demonstrations is not None:
        return Given(placement)
    if config.rollout.replay is not None:
        return Replay(config.rollout.replay, placement)
    assert collector is not None
    return collector
