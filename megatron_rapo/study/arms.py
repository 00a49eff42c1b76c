"""The arms of a study: each named one with each combination of the factors' values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_rapo.config.write import toml_value
from megatron_rapo.errors import RapoError
from megatron_rapo.study.schema import Arm, Options, Study


@dataclass(frozen=True)
class PlannedArm:
    """An arm with its factors' values.

    Attributes:
        configs: overlays of its own, after the study's.
        options: by dotted name, over the files.
        train: whether it is trained, or is a model as it is.
        seed_offset: added to the study's seeds.
        seeds: how many of the study's it has, the first ones; None: all.
        follows: the arm whose run of the same seed comes first; None: it waits for none.
        tune: options that the search chooses, each with its candidates.
    """

    name: str
    configs: Sequence[Path]
    options: Options
    train: bool
    seed_offset: int
    seeds: int | None
    follows: str | None
    tune: dict[str, list[Any]]


def expand(study: Study) -> list[PlannedArm]:
    """All arms, in the file's order.

    Raises:
        RapoError: a contrast names an arm that is not there, or one that cannot be compared.
    """
    named: list[Arm | None] = [*study.arms] or [None]
    grid = list(product(*(factor.values for factor in study.factors)))
    arms = [_planned(study, arm, values) for arm in named for values in grid]
    _check_contrasts(study, [arm.name for arm in arms])
    _check_follows(arms)
    return arms


def _planned(study: Study, arm: Arm | None, values: Sequence[Any]) -> PlannedArm:
    chosen = {factor.option: value for factor, value in zip(study.factors, values, strict=True)}
    own = arm or Arm(name="grid")
    return PlannedArm(
        name=_joined(own.name if arm else None, chosen),
        configs=own.configs,
        options={**study.options, **own.options, **chosen},
        train=own.train,
        seed_offset=own.seed_offset,
        seeds=own.seeds,
        follows=_joined(own.follows, chosen) if own.follows else None,
        tune=own.tune,
    )


def _joined(name: str | None, chosen: Options) -> str:
    """An arm's name with its factors' values."""
    values = [f"{option.rpartition('.')[2]}={_short(value)}" for option, value in chosen.items()]
    return ", ".join(filter(None, [name, *values]))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else toml_value(value)


def _check_follows(arms: Sequence[PlannedArm]) -> None:
    by_name = {arm.name: arm for arm in arms}
    for arm in arms:
        first = by_name.get(arm.follows) if arm.follows else None
        if arm.follows and (first is None or first.follows or not first.train):
            raise RapoError(
                f"arm {toml_value(arm.name)} follows {toml_value(arm.follows)}, which is no trained arm that "
                "follows none; name one that is"
            )


def _check_contrasts(study: Study, names: Sequence[str]) -> None:
    for place, contrast in enumerate(study.contrasts):
        sides = {"arm": contrast.arm, "against": contrast.against, "hard": contrast.hard}
        for key, name in sides.items():
            if name is not None and name not in names:
                raise RapoError(
                    f"contrasts[{place}].{key} = {toml_value(name)} is no arm of this study; its arms are "
                    f"{', '.join(map(toml_value, names))}"
                )
        if len(set(sides.values())) < len(sides):
            raise RapoError(
                f"contrasts[{place}] names one arm twice ({contrast.name}): it would be compared with "
                "itself, or choose what it is judged by; name another (seed_offset makes another sample of "
                "the same)"
            )
