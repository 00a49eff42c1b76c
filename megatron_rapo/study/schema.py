"""What a study file says: the question, its arms, and what is compared, named before anything runs."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from megatron_rapo.config.explain import explain_value
from megatron_rapo.errors import RapoError
from megatron_rapo.section import NonNegativeInt, PathOption, PositiveInt, Section

Options = dict[str, Any]

_OUTCOME = re.compile(r"(?:(?P<data>[^/]+)/(?P<setting>[^/]+)/)?(?:pass@(?P<k>[1-9]\d*)|reward)")


class Factor(Section):
    """An option that arms differ in: each of its values with each of the other factors'."""

    option: str = Field(description="By its dotted name, such as `algorithm.method` or `model.path`.")
    values: list[Any] = Field(min_length=1, description="Its values.")


class Arm(Section):
    """One way to train: several options under one name."""

    name: str = Field(min_length=1, description="What it is called in contrasts, folders and the report.")
    configs: list[PathOption] = Field([], description="Overlays of its own, after the study's.")
    options: Options = Field({}, description="Options over these.")
    train: bool = Field(True, description="False: the model as it is, sampled with the same budget.")
    seed_offset: NonNegativeInt = Field(
        0, description="Added to the study's seeds: another sample of the same, such as one that chooses."
    )
    seeds: PositiveInt | None = Field(
        None,
        description="It has only the first so many of the study's seeds: 1 of what chooses hard problems, "
        "say, as the samples of all its seeds choose together.",
    )
    follows: str | None = Field(
        None,
        description="Another arm: its run of the same seed comes first, `@run` in `options` is a "
        "folder with its metrics, and what the search chose for it is taken over.",
    )
    tune: dict[str, list[Any]] = Field(
        {}, description="Options that `[tuning]` chooses a value of, each with its candidates."
    )


class Contrast(Section):
    """A difference of two arms that the study was made to tell."""

    arm: str = Field(description="The arm whose outcome counts as it is.")
    against: str = Field(description="The arm whose outcome is taken away.")
    outcome: str | None = Field(None, description="Default: the study's.")
    hard: str | None = Field(
        None,
        description="Only problems that this arm never solved. It takes no part in the contrast itself: who "
        "chooses by outcomes does not judge.",
    )

    @property
    def name(self) -> str:
        """For people."""
        on = f", problems that {self.hard} never solved" if self.hard else ""
        return f"{self.arm} − {self.against}{on}"


class Tuning(Section):
    """The search that each arm gets alike, before the study's own seeds."""

    trials: PositiveInt = Field(description="Settings that each arm tries, the same number for all.")
    seeds: list[NonNegativeInt] = Field(min_length=1, description="None of them one of the study's.")
    outcome: str | None = Field(None, description="What is maximised. Default: the study's outcome.")
    options: Options = Field(
        description="Over each run of the search: its validation problems (`evaluate.data`), steps, samples."
    )


class Study(Section):
    """The whole file."""

    question: str = Field(min_length=1, description="In a sentence.")
    outcome: str = Field(description="`pass@16` or `reward`; with several data sets `DATA/SETTING/pass@16`.")
    seeds: list[NonNegativeInt] = Field(min_length=2, description="`run.seed` of each arm's runs.")
    configs: list[PathOption] = Field(description="The base configuration: files beside the study's.")
    options: Options = Field({}, description="Options over these, of all runs.")
    factors: list[Factor] = Field([], description="A grid over `arms`, or a grid alone.")
    arms: list[Arm] = Field([], description="Named sets of options.")
    contrasts: list[Contrast] = Field(min_length=1, description="The first one is the primary.")
    evaluation: Options = Field(
        {},
        description="Options of `[evaluate]` for an evaluation of its own after training. Default: the "
        "outcome is that of the run's last evaluation.",
    )
    diagnose: PositiveInt | None = Field(
        None,
        description="So many correct responses of each trained run are laid beside the model that it began "
        "as, token by token, after `[evaluation]`. Default: none.",
    )
    tuning: Tuning | None = Field(None, description="Default: no search.")
    retries: NonNegativeInt = Field(1, description="How often a run that failed is started again.")
    cores_per_run: PositiveInt | None = Field(
        None, description="Default: the ranks of a run's `[parallel]`; engines work while they wait."
    )
    sbatch: list[str] = Field([], description="Arguments of sbatch, such as `--time=2:00:00`.")
    changes_the_answer: list[str] = Field(
        [], description="What would change the answer, as far as it is known beforehand."
    )

    @model_validator(mode="after")
    def _check(self) -> Study:
        if not self.arms and not self.factors:
            raise ValueError("arms and factors are both missing; name at least two arms, or a factor")
        named: dict[str, list[Any]] = {
            "seeds": self.seeds,
            "arms": [arm.name for arm in self.arms],
            "factors": [factor.option for factor in self.factors],
            "tuning.seeds": self.tuning.seeds if self.tuning else [],
        }
        for option, values in named.items():
            for value, times in Counter(values).items():
                if times > 1:
                    raise ValueError(f"{option} has {value!r} {times} times; leave one")
        if self.diagnose is not None and not self.evaluation:
            raise ValueError("diagnose takes the responses of [evaluation]; add that table, or leave it out")
        for arm in self.arms:
            if arm.seeds is not None and arm.seeds >= len(self.seeds):
                raise ValueError(
                    f"arms: {arm.name} has seeds = {arm.seeds} of {len(self.seeds)}, which leaves none out; "
                    "give fewer, or leave it out"
                )
        for outcome in self.outcomes():
            if not _OUTCOME.fullmatch(outcome):
                raise ValueError(
                    f'outcome = "{outcome}" is none; write pass@K or reward, or DATA/SETTING/pass@K'
                )
        if self.tuning is not None:
            _check_tuning(self, self.tuning)
        elif tuned := [arm.name for arm in self.arms if arm.tune]:
            raise ValueError(f"arms: {tuned[0]} has tune without a table [tuning]; add it, or leave tune out")
        return self

    def outcomes(self) -> list[str]:
        """All that contrasts and the search look at, the primary first."""
        named = [self.outcome, *(contrast.outcome for contrast in self.contrasts)]
        named += [self.tuning.outcome] if self.tuning else []
        return list(dict.fromkeys(filter(None, named)))


def _check_tuning(study: Study, tuning: Tuning) -> None:
    if both := set(tuning.seeds) & set(study.seeds):
        raise ValueError(
            f"tuning.seeds and seeds both have {min(both)}: a run would choose and judge; give the search "
            "seeds of its own"
        )
    if not any(key.startswith("evaluate") for key in tuning.options):
        raise ValueError(
            "tuning.options names no validation problems: the search would see the held-out ones; set "
            "evaluate.data there (another seed of a generated task, or another file)"
        )
    if torn := [arm.name for arm in study.arms if arm.follows and arm.tune]:
        raise ValueError(
            f"arms: {torn[0]} has tune, and follows an arm whose choice it takes over; leave one of them out"
        )
    untuned = [arm.name for arm in study.arms if arm.train and not arm.tune and not arm.follows]
    if untuned or not study.arms:
        raise ValueError(
            f"tuning: {untuned[0] if untuned else 'arms of factors alone'} would be searched over nothing, "
            "and others not; give each trained arm a table tune"
        )


@dataclass(frozen=True)
class Outcome:
    """A measure of a run: `pass@k`, or the mean reward where k is None.

    Attributes:
        data, setting: of the evaluation; None where it has but one.
    """

    data: str | None
    setting: str | None
    k: int | None

    @classmethod
    def read(cls, text: str) -> Outcome:
        """Of an outcome as the study writes it."""
        found = _OUTCOME.fullmatch(text)
        assert found is not None, "the study was checked"
        return cls(found["data"], found["setting"], int(found["k"]) if found["k"] else None)

    @property
    def measure(self) -> str:
        """`pass@16` or `reward`."""
        return "reward" if self.k is None else f"pass@{self.k}"


def load_study(path: Path) -> Study:
    """Reads a study file; paths in it start at its folder.

    Raises:
        RapoError: it is missing or malformed, or says what cannot be.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RapoError(f"study {path} does not exist; examples/study/ has one to start from") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RapoError(f"study {path} is not valid TOML: {error}; mend it there") from error
    except OSError as error:
        raise RapoError(f"study {path} cannot be read: {error.strerror}; give a TOML file") from error
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise RapoError(
            "\n  ".join([f"study {path} is not valid:", *map(_explain, error.errors())])
        ) from error
    return study.model_copy(
        update={
            "configs": _beside(path, study.configs),
            "arms": [arm.model_copy(update={"configs": _beside(path, arm.configs)}) for arm in study.arms],
        }
    )


def _explain(problem: ErrorDetails) -> str:
    """A line: the key, its value, the remedy."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
    key = key.removeprefix(".")
    if problem["type"] != "extra_forbidden":
        return explain_value(problem, key)
    tables: dict[str, type[Section]] = {
        "arms": Arm,
        "factors": Factor,
        "contrasts": Contrast,
        "tuning": Tuning,
    }
    table = tables.get(str(problem["loc"][0]), Study) if len(problem["loc"]) > 1 else Study
    return f"{key} is nothing that a study has; there is {', '.join(table.model_fields)} (docs/studies.md)"


def _beside(study: Path, configs: Sequence[Path]) -> list[Path]:
    return [study.parent / config for config in configs]
