"""The runs of a study as a table: live on a terminal, a line for each change elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from megatron_rapo.study.cost import estimate
from megatron_rapo.study.results import Result
from megatron_rapo.study.standing import Standing, State

COLUMNS = ("run", "state", "step", "reward", "left")


def rows(standings: Sequence[Standing], results: Mapping[str, Result]) -> list[tuple[str, ...]]:
    """A row for each run, as text."""
    return [
        (
            one.run.name,
            one.state.value,
            _step(one),
            "" if one.reward is None else f"{one.reward:.3f}",
            _left(one, standings, results),
        )
        for one in standings
    ]


def counted(standings: Sequence[Standing]) -> str:
    """`12 runs: 3 done, 2 running, 7 waiting`."""
    states = Counter(one.state for one in standings)
    parts = [f"{states[state]} {state.value}" for state in State if states[state]]
    return f"{len(standings)} runs: {', '.join(parts)}"


def text_table(standings: Sequence[Standing], results: Mapping[str, Result]) -> str:
    """The table for a terminal or a file."""
    lines = [COLUMNS, *rows(standings, results)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(COLUMNS))]
    shown = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    failures = [f"{one.run.name}: {one.told}" for one in standings if one.state is State.FAILED]
    return "\n".join([*shown, counted(standings), *failures])


class Shown:
    """Shows the table while runs go on; `ask` gives what is known now."""

    def __init__(self, ask: Callable[[], tuple[Sequence[Standing], Mapping[str, Result]]]) -> None:
        self._ask = ask
        self._before: dict[str, State] = {}
        self._live: Live | None = None
        if sys.stdout.isatty():
            self._live = Live(console=Console(), auto_refresh=False, transient=True)

    def show(self) -> None:
        """What has changed."""
        standings, results = self._ask()
        if self._live is not None:
            self._live.update(_rich(standings, results), refresh=True)
            return
        for one in standings:
            if (
                self._before.get(one.run.name, State.WAITING) is not one.state
                and one.state is not State.BEGUN
            ):
                print(f"{one.run.name}  {one.state.value}  ({counted(standings)})", flush=True)
            self._before[one.run.name] = one.state

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        else:
            self._before = {one.run.name: one.state for one in self._ask()[0]}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


def _rich(standings: Sequence[Standing], results: Mapping[str, Result]) -> Table:
    """Runs that go on first; those that are done only as a number, where there is not room for all."""
    table = Table(title=counted(standings), title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column)
    order = [State.RUNNING, State.FAILED, State.BEGUN, State.WAITING, State.DONE]
    shown = sorted(standings, key=lambda one: order.index(one.state))
    for row in rows(shown, results)[:40]:
        table.add_row(*row)
    return table


def _step(one: Standing) -> str:
    return f"{one.step or 0}/{one.run.config.run.steps}" if one.run.train else "evaluation"


def _left(one: Standing, standings: Sequence[Standing], results: Mapping[str, Result]) -> str:
    if one.state in (State.DONE, State.FAILED):
        return ""
    seconds, _ = estimate(one.run, standings, results)
    if seconds is None:
        return "unknown"
    done = (one.step or 0) * (one.seconds_a_step or 0.0)
    return str(timedelta(seconds=round(max(seconds - done, 0.0))))
