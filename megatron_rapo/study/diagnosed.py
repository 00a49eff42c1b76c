"""Where a run's probability went: its correct responses beside the model that it began as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from megatron_rapo.study.plan import PlannedRun

DIGITS = 5  # of what is kept


@dataclass(frozen=True)
class Diagnosed:
    """Of one data set at one setting; entropies and divergences in nats, `[positions]`, means over the
    correct responses that reach the position (`evaluation.diagnostics`).

    Attributes:
        responses: how many there were.
        below_floor: share of them with a token that the base draws less than once in ten thousand.
        base_entropy, entropy: of the base and of the run's model.
        reverse_kl: KL(model ‖ base).
        reaching: `[positions]`, responses that reach it.
        forms: solutions of different form, expected among four correct responses to a problem
            (`evaluation.diversity`); of problems with so many.
        kinds: the same means over tokens of a kind, and `tokens`, how many they are
            (`evaluation.diagnostics.OfKind`).
    """

    responses: int
    below_floor: float
    base_entropy: Sequence[float]
    entropy: Sequence[float]
    reverse_kl: Sequence[float]
    reaching: Sequence[int]
    forms: float
    kinds: Mapping[str, Mapping[str, float]]


def diagnose(run: PlannedRun) -> dict[str, Diagnosed]:
    """Of a run that was judged; by `DATA/SETTING`, where it has a correct response.

    Raises:
        RapoError: its model or the one that it began as is not there.
    """
    if not run.diagnosed or run.judged is None:
        return {}
    from megatron_rapo.evaluation import diagnostics
    from megatron_rapo.evaluation.diversity import diversity
    from megatron_rapo.evaluation.store import Evaluation

    evaluation = Evaluation.open(run.judged)
    settings = {setting.name: setting for setting in evaluation.manifest.settings}
    pair = diagnostics.Pair(run.config.model.path, run.directory / "model")
    tables = {}
    for data, setting in evaluation:
        store = evaluation.samples(data, setting)
        found = diagnostics.diagnose(store, settings[setting], pair, limit=run.diagnosed)
        if found is not None:
            tables[f"{data}/{setting}"] = Diagnosed(
                responses=found.responses,
                below_floor=round(found.responses_below_floor, DIGITS),
                base_entropy=_short(found.base_entropy),
                entropy=_short(found.model_entropy),
                reverse_kl=_short(found.reverse_kl),
                reaching=found.reaching,
                forms=round(diversity(store).forms, DIGITS),
                kinds={kind: _rounded(asdict(one)) for kind, one in found.kinds.items()},
            )
    return tables


def mean_by_position(tables: Sequence[Diagnosed], measure: str, fewest: int) -> list[float]:
    """The mean over the responses of all tables that reach a position; to the first that too few reach."""
    longest = max(len(one.reaching) for one in tables)

    def padded(rows: Iterable[Sequence[float]]) -> npt.NDArray[np.float64]:
        return np.array([[*row, *[0.0] * (longest - len(row))] for row in rows])

    reaching = padded(one.reaching for one in tables)
    total = (padded(getattr(one, measure) for one in tables) * reaching).sum(axis=0)
    known = reaching.sum(axis=0)
    shown = int(np.argmax(known < fewest)) if (known < fewest).any() else longest
    return [float(value) for value in total[:shown] / known[:shown]]


def mean_by_kind(tables: Sequence[Diagnosed]) -> dict[str, dict[str, float]]:
    """The means over the tokens of all tables, by kind; `tokens` is their sum."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({kind for one in tables for kind in one.kinds}):
        parts = [one.kinds[kind] for one in tables if kind in one.kinds]
        tokens = [part["tokens"] for part in parts]
        found[kind] = {
            name: float(np.average([part[name] for part in parts], weights=tokens)) for name in parts[0]
        }
        found[kind]["tokens"] = sum(tokens)
    return found


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, DIGITS) for name, value in values.items()}


def _short(values: Sequence[float]) -> list[float]:
    return [round(value, DIGITS) for value in values]
