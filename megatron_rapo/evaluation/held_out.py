"""The data sets of an evaluation, ready to be sampled from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_rapo.config import FileData, FunctionData, RunConfig
from megatron_rapo.config.code import addresses_in, modules_of
from megatron_rapo.config.data import Data
from megatron_rapo.config.verifiers import RewardPlan
from megatron_rapo.data.load import Judge, load_source
from megatron_rapo.data.prompts import LoadReport, Prompt
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.manifest import DataRecord, SettingRecord
from megatron_rapo.evaluation.store import Problem
from megatron_rapo.fingerprint import fingerprint, in_json

GENERATED_PROBLEMS = 64  # of a generated task, where the configuration does not say how many


@dataclass(frozen=True)
class HeldOut:
    """One data set.

    Attributes:
        name: of its folder.
        plan: what judges responses to its problems.
        graded: whether they can earn anything but 1 and 0.
    """

    name: str
    prompts: tuple[Prompt, ...]
    plan: RewardPlan
    report: LoadReport
    graded: bool = False

    @property
    def verifier(self) -> str:
        """What judges, as the manifest has it."""
        return str(self.plan)

    @property
    def problems(self) -> list[Problem]:
        """As they are stored."""
        return [Problem(p.id, p.question, p.answer, p.token_ids) for p in self.prompts]

    @property
    def record(self) -> DataRecord:
        """As the manifest has it."""
        return DataRecord(
            name=self.name,
            source=self.report.source,
            problems=len(self.prompts),
            fingerprint=fingerprint(
                part for p in self.prompts for part in (p.id, p.question, p.answer, in_json(p.columns))
            ),
        )

    @property
    def prompts_fingerprint(self) -> str:
        """Differs where template or tokenizer do."""
        return fingerprint(prompt.token_ids for prompt in self.prompts)


def load_held_out(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, judge: Judge | None = None
) -> list[HeldOut]:
    """The data sets that the configuration names.

    Args:
        judge: as in `data.load.load_prompts`.

    Raises:
        RapoError: one cannot be read, has too few usable problems, or has an id twice.
    """
    tables = zip(config.evaluation_data, config.evaluation_tables, strict=True)
    return [_load(config, data, tokenizer, table, judge) for data, table in tables]


def setting_records(config: RunConfig) -> tuple[SettingRecord, ...]:
    """The sampling settings that the configuration names."""
    return tuple(
        SettingRecord(
            name=setting.name,
            temperature=setting.temperature,
            top_p=setting.top_p,
            top_k=-1 if setting.top_k is None else setting.top_k,
            max_response_tokens=setting.max_response_tokens or config.rollout.max_response_tokens,
        )
        for setting in config.evaluation_settings
    )


def environment_of(config: RunConfig) -> dict[str, Any]:
    """What makes episodes, beside code; how long it may take is no part of that."""
    return config.environment.model_dump(mode="json", exclude={"time_limit_s"}, exclude_defaults=True)


def code_of(config: RunConfig, data_sets: Sequence[HeldOut]) -> dict[str, str]:
    """Fingerprints of the user's own code that judges, or makes episodes, by its `module:name`."""
    judges = [part.address for held_out in data_sets for part in held_out.plan.parts]
    named = addresses_in([*judges, config.environment.model_dump()])
    code = {address: modules_of(address, config.run.code) for address in named}
    return {address: fingerprint([in_json(modules)]) for address, modules in code.items() if modules}


def _load(
    config: RunConfig, data: Data, tokenizer: PreTrainedTokenizerBase, table: str, judge: Judge | None
) -> HeldOut:
    assert config.evaluate is not None
    count = config.evaluate.problems
    if count is None and not isinstance(data, FileData | FunctionData):
        count = GENERATED_PROBLEMS
    loaded = load_source(config, data, tokenizer, table, split="test", count=count, judge=judge)
    _refuse_duplicates(loaded.prompts, loaded.report.source, table)
    return HeldOut(data.name, loaded.prompts, config.verifier_of(data), loaded.report, config.is_graded(data))


def _refuse_duplicates(prompts: tuple[Prompt, ...], source: str, table: str) -> None:
    [(name, times)] = Counter(prompt.id for prompt in prompts).most_common(1)
    if times > 1:
        rows = [prompt.index for prompt in prompts if prompt.id == name]
        raise RapoError(
            f"{source} has the id {name!r} {times} times (rows {', '.join(map(str, rows[:5]))}), so samples "
            f"could not be told apart; mend the ids, or set {table}.id_field to a field that is unique"
        )
