"""Evaluation during training: the same samples each time, by the engines of the run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pyarrow
from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import RunConfig
from megatron_rapo.evaluation.held_out import HeldOut, code_of, environment_of, load_held_out, setting_records
from megatron_rapo.evaluation.manifest import Manifest, ModelRecord, SettingRecord, now
from megatron_rapo.evaluation.plan import plan
from megatron_rapo.evaluation.sampler import Sampler
from megatron_rapo.evaluation.statistics import COLUMNS, Statistics, summarise
from megatron_rapo.evaluation.store import SAMPLES, SampleStore, begin, remove
from megatron_rapo.experience.collector import Collector
from megatron_rapo.observe.versions import software_versions
from megatron_rapo.reward.golds import gold_judge
from megatron_rapo.reward.verifier import Verifier
from megatron_rapo.rollout.dispatch import TooFewEngines


class Evaluator:
    """Samples the held-out problems with the same seeds each time; leaves them in `<run>/evaluations`.

    Args:
        collector: whose engines are asked; each head samples its share of the problems.
        verifiers: by name, those of all data sets; this head's own, empty on other ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        tokenizer: PreTrainedTokenizerBase,
        collector: Collector,
        verifiers: Mapping[str, Verifier],
    ) -> None:
        assert config.evaluate is not None
        self.config = config
        self.evaluate = config.evaluate
        self.collector = collector
        self.verifiers = verifiers
        self.data_sets = load_held_out(config, tokenizer, gold_judge(config, collector.placement))
        self.settings = setting_records(config)

    def due(self, step: int) -> bool:
        """Whether the weights after `step` are to be evaluated: the base, the last, and every so many."""
        every = self.evaluate.every
        return step in (0, self.config.run.steps) or (every is not None and step % every == 0)

    def run(self, step: int) -> Mapping[str, float]:
        """Evaluates the weights after `step`, which the engines must have; the same on all ranks.

        All ranks must call it. What an earlier attempt left of this step is sampled anew: its weights may
        not have been the same to the last bit.

        Returns:
            `pass@k` and `maj@k` for each k, and `reward` where it is not right or wrong alone, each with its
            95% interval (`…_low`, `…_high`); mean length, and the shares of responses that were truncated and
            that could not be verified; of several data sets or settings behind `DATA/SETTING/`.
        """
        placement = self.collector.placement
        directory = self.config.run.directory / "evaluations" / f"step_{step:06d}"
        manifest = self._manifest(step)
        if placement.is_main:
            remove(directory)
            begin(directory, manifest, {held_out.name: held_out.problems for held_out in self.data_sets})
        placement.share_from_main(None)
        metrics: dict[str, float] = {}
        for held_out in self.data_sets:
            for setting in self.settings:
                mine = self._sample(held_out, setting, directory, step)
                samples = pyarrow.concat_tables(placement.share_from_heads(mine))
                statistics = summarise(
                    samples,
                    [prompt.id for prompt in held_out.prompts],
                    self.evaluate.k,
                    seed=self.config.run.seed,
                )
                several = len(self.data_sets) * len(self.settings) > 1
                found = _as_metrics(statistics, graded=held_out.graded)
                prefix = f"{held_out.name}/{setting.name}/" if several else ""
                metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        if placement.is_main:
            manifest.model_copy(update={"finished": now()}).write(directory)
        return metrics

    def _sample(self, held_out: HeldOut, setting: SettingRecord, directory: Path, step: int) -> pyarrow.Table:
        """This head's share, stored; the columns that statistics need of it. Nothing on other ranks."""
        placement, pool = self.collector.placement, self.collector.engines.pool
        runner = self.collector.runner
        narrow = pyarrow.schema([SAMPLES.field(name) for name in COLUMNS])
        tables = [narrow.empty_table()]
        prompts = held_out.prompts[placement.data_rank :: placement.layout.data_parallel]
        present: set[tuple[str, int]] = set()

        def ask() -> int:
            """Draws what is missing here, as far as engines are left; how much still is."""
            if pool is None or runner is None:
                return 0
            sampler = Sampler(
                runner,
                pool,
                weight_version=step,
                seed=self.config.run.seed,
                writer=placement.data_rank,
            )
            batches = plan(prompts, self.evaluate.samples, frozenset(present), rows=self.evaluate.batch)
            judge = self.verifiers[held_out.verifier].score
            store = SampleStore(directory / held_out.name / setting.name, held_out.problems)
            with suppress(TooFewEngines):  # told where they do not come back
                for samples in sampler.draw(batches, setting, judge, store):
                    rows = [{name: getattr(sample, name) for name in COLUMNS} for sample in samples]
                    tables.append(pyarrow.Table.from_pylist(rows, schema=narrow))
                    present.update((sample.problem, sample.sample) for sample in samples)
            return len(prompts) * self.evaluate.samples - len(present)

        self.collector.until_complete(ask, weight_version=step)
        return pyarrow.concat_tables(tables)

    def _manifest(self, step: int) -> Manifest:
        run = self.config.run
        return Manifest(
            model=ModelRecord(path=str(self.config.model.path), run=str(run.directory), step=step),
            data=tuple(held_out.record for held_out in self.data_sets),
            settings=self.settings,
            samples=self.evaluate.samples,
            seed=run.seed,
            date=run.date,
            verifier={held_out.name: held_out.verifier for held_out in self.data_sets},
            prompts={held_out.name: held_out.prompts_fingerprint for held_out in self.data_sets},
            environment=environment_of(self.config),
            code=code_of(self.config, self.data_sets),
            versions=software_versions(),
            started=now(),
        )


def _as_metrics(statistics: Statistics, *, graded: bool) -> Mapping[str, float]:
    estimates = {
        **{f"pass@{k}": estimate for k, estimate in statistics.pass_at_k.items()},
        **{f"maj@{k}": estimate for k, estimate in statistics.majority_at_k.items()},
    }
    if graded and statistics.reward is not None:
        estimates = {"reward": statistics.reward, **estimates}
    return {
        **{
            f"{name}{end}": value
            for name, estimate in estimates.items()
            for end, value in (("", estimate.mean), ("_low", estimate.low), ("_high", estimate.high))
        },
        "response_tokens_mean": statistics.lengths.mean,
        "truncated": statistics.truncated,
        "unknown": statistics.unknown,
    }
