"""An evaluation of its own: a model, its engines and verifiers, and a directory that it goes on in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_rapo.config import RunConfig
from megatron_rapo.config.date import recorded_date, with_date
from megatron_rapo.data.tokenizer import load_tokenizer
from megatron_rapo.environments.opening import open_environment
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner, Judge
from megatron_rapo.episode.outcome import Outcome
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.held_out import HeldOut, code_of, environment_of, load_held_out, setting_records
from megatron_rapo.evaluation.manifest import FILE, Manifest, ModelRecord, SettingRecord, now
from megatron_rapo.evaluation.plan import Batch, plan
from megatron_rapo.evaluation.progress import SampleProgress
from megatron_rapo.evaluation.sampler import Sampler
from megatron_rapo.evaluation.sequential import Stopping
from megatron_rapo.evaluation.store import Evaluation, StoredSample, begin
from megatron_rapo.experience.engines import open_own_engines
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.observe.versions import software_versions
from megatron_rapo.reward.golds import gold_judge
from megatron_rapo.reward.trial import try_rewards
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.dispatch import TooFewEngines
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_files import HFTensors

WEIGHT_VERSION = 0  # engines are given one model, once


def evaluate(
    config: RunConfig, model: ModelRecord, directory: Path, *, adaptive: int | None = None
) -> Evaluation:
    """Samples what is missing of the evaluation in `directory`.

    Args:
        config: `model.path` is the HF directory that is sampled; `evaluate` says what, `rollout` by whom.
        model: where it came from.
        directory: a new one, or one in which the same evaluation was begun; more samples, data sets and
            settings may be asked for than before.
        adaptive: correct samples at which a problem is done (`sequential`); None: all get all samples.

    Raises:
        RapoError: the directory holds another evaluation, the model's weights are not those of its config, or
            something failed; what was sampled stays.
    """
    before = Manifest.read(directory) if (directory / FILE).exists() else None
    config = with_date(
        config,
        None if before is None else before.date or before.started[:10],  # it tells only when it started
        None if model.run is None else recorded_date(Path(model.run)),
    )
    assert config.evaluate is not None
    tokenizer = load_tokenizer(config.model.path)
    architecture = read_architecture(config.model.path)
    if config.rollout.engine.kind == "embedded":  # others may serve what this package has no form for
        with HFTensors(config.model.path) as tensors:
            check_tensors(tensors, architecture)
    data_sets = load_held_out(config, tokenizer, gold_judge(config))
    _check_context(data_sets, setting_records(config), architecture.max_positions)
    evaluation = _open(config, model, data_sets, directory, before, adaptive)
    for held_out in data_sets:
        print(held_out.report)
    work = [
        _Work(held_out, setting, evaluation, config.evaluate.batch)
        for held_out in data_sets
        for setting in evaluation.manifest.settings
    ]
    total = sum(len(one.held_out.prompts) for one in work) * config.evaluate.samples
    left = sum(one.left() for one in work)
    if 0 < left < total:
        print(f"{directory} has {total - left:,} of {total:,} samples; going on")
    if left:
        _try_rewards(config, data_sets)
        environment = open_environment(config)
        progress = SampleProgress(total, present=total - left)
        with open_own_engines(config, architecture) as pool:
            # Also where servers run already: what they serve is then what is evaluated, for certain.
            pool.update_weights(config.model.path, WEIGHT_VERSION)
            episodes = EpisodeRunner(
                environment, config.environment, tokenizer, config.reward.correct_at, architecture.vocabulary
            )
            with Runner(episodes, pool) as runner:
                sampler = Sampler(runner, pool, weight_version=WEIGHT_VERSION, seed=config.run.seed)
                for one in work:
                    with Verifier.configured(one.held_out.plan, config.reward) as verifier:
                        _draw(one, sampler, verifier.score, progress, config.model.path)
        print(progress.line())
    if adaptive is not None:
        drawn = sum(len(one.store.present()) for one in work)
        print(f"{drawn:,} of {total:,} samples sufficed: {1 - drawn / total:.0%} were saved")
    return _finish(evaluation)


def _draw(work: _Work, sampler: Sampler, judge: Judge, progress: SampleProgress, model_path: Path) -> None:
    """Samples what is missing. Engines that were lost come back, as often as `rollout.restarts` says."""
    while True:
        try:
            for samples in sampler.draw(work.batches(), work.setting, judge, work.store):
                work.take(samples)
                progress.add(samples, f"{work.held_out.name} {work.setting.name}")
            return
        except TooFewEngines:
            sampler.pool.update_weights(model_path, WEIGHT_VERSION)  # an error where they cannot


class _Work:
    """What is to be sampled of one data set at one setting."""

    def __init__(self, held_out: HeldOut, setting: SettingRecord, evaluation: Evaluation, rows: int) -> None:
        self.held_out = held_out
        self.setting = setting
        self.store = evaluation.samples(held_out.name, setting.name)
        self._samples = evaluation.manifest.samples
        self._rows = rows
        self._present = self.store.present()
        self._stopping: Stopping | None = None
        if evaluation.manifest.adaptive is not None:
            self._stopping = Stopping(evaluation.manifest.adaptive)
            for row in self.store.read(["problem", "sample", "outcome"]).to_pylist():
                self._stopping.take(row["problem"], row["sample"], row["outcome"] == Outcome.CORRECT)

    def take(self, samples: Sequence[StoredSample]) -> None:
        """These are on disk now."""
        self._present.update((sample.problem, sample.sample) for sample in samples)
        if self._stopping is not None:
            for sample in samples:
                self._stopping.take(sample.problem, sample.sample, sample.outcome is Outcome.CORRECT)

    def batches(self) -> Iterator[Batch]:
        """What is missing; of an adaptive budget, as outcomes come in."""
        is_open = (lambda problem: True) if self._stopping is None else self._stopping.is_open
        return plan(self.held_out.prompts, self._samples, self._present, rows=self._rows, is_open=is_open)

    def left(self) -> int:
        """Samples that are missing, at most."""
        return sum(len(batch.prompts) * batch.count for batch in self.batches())


def _check_context(data_sets: Sequence[HeldOut], settings: Sequence[SettingRecord], positions: int) -> None:
    """Refuses responses that the model has no positions for, before engines do."""
    longest = max(len(prompt.token_ids) for held_out in data_sets for prompt in held_out.prompts)
    most = max(setting.max_response_tokens for setting in settings)
    if longest + most > positions:
        raise RapoError(
            f"rollout.max_response_tokens = {most} and the longest prompt's {longest} tokens are more than "
            f"the model's {positions} positions; give rollout.max_response_tokens of at most "
            f"{max(positions - longest, 1)}"
        )


def _open(
    config: RunConfig,
    model: ModelRecord,
    data_sets: list[HeldOut],
    directory: Path,
    before: Manifest | None,
    adaptive: int | None,
) -> Evaluation:
    """The evaluation in the directory, begun if there is none; refused if it is another one."""
    assert config.evaluate is not None
    manifest = Manifest(
        model=model,
        data=tuple(held_out.record for held_out in data_sets),
        settings=setting_records(config),
        samples=config.evaluate.samples,
        adaptive=adaptive,
        seed=config.run.seed,
        date=config.run.date,
        verifier={held_out.name: held_out.verifier for held_out in data_sets},
        prompts={held_out.name: held_out.prompts_fingerprint for held_out in data_sets},
        environment=environment_of(config),
        code=code_of(config, data_sets),
        versions=software_versions(),
        started=now(),
    )
    if before is not None:
        manifest = manifest.going_on_from(before, directory)
    return begin(directory, manifest, {held_out.name: held_out.problems for held_out in data_sets})


def _try_rewards(config: RunConfig, data_sets: Sequence[HeldOut]) -> None:
    """What is wrong with a reward is told before engines are started."""
    tables = zip(config.evaluation_tables, config.evaluation_data, data_sets, strict=True)
    for trial in try_rewards(config, [(table, data, one.prompts[0].problem) for table, data, one in tables]):
        if not trial.known:
            print(f"warning: {trial}", file=sys.stderr, flush=True)


def _finish(evaluation: Evaluation) -> Evaluation:
    finished = evaluation.manifest.model_copy(update={"finished": now()})
    finished.write(evaluation.directory)
    return Evaluation(evaluation.directory, finished)
