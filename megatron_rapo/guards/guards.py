"""A run's guards: they look at each update and each step, and say what is done."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.guards.faults import NORM, Fault, Metrics, faults
from megatron_rapo.guards.findings import Finding, FindingsLog
from megatron_rapo.guards.idle import Idle

KEEPS_OUT = ("skip", "roll_back")  # actions that must come before the update
NORMS = 32  # that are remembered
_OF_STEPS = ("equal_rewards", "no_gradient", "truncation")  # they act after some in a row


class Guards:
    """All ranks hold them, give them the same numbers, and so do the same.

    A guard whose action keeps an update from being applied looks at each minibatch before its update; one
    that warns or stops looks at the step's metrics.

    Attributes:
        rollbacks: that the run has made.
    """

    def __init__(self, config: RunConfig, vocabulary: int, *, is_main: bool) -> None:
        """`vocabulary` is the tokenizer's size; the main rank prints, and keeps the findings."""
        self._config = config
        self._actions = config.guards.actions
        self._is_main = is_main
        self._norms: deque[float] = deque(maxlen=NORMS)
        self._faults: dict[str, Fault] = {
            **faults(config, vocabulary, self._norms),
            "no_gradient": Idle(config),
        }
        self._in_a_row: dict[str, int] = {}
        self._held: set[int] = set()  # steps whose updates are not applied
        self._log: FindingsLog | None = None
        self.rollbacks = 0
        self.begin_step(0)

    def begin_step(self, step: int) -> None:
        """`step` begins."""
        self._step = step
        self._looked = False  # at what is the same for all updates of the step
        self._rolls_back = False
        self._skipped = self._findings = 0
        self._end: str | None = None  # why the run is to end after the step

    @property
    def keep_updates(self) -> bool:
        """Whether a guard may keep an update from being applied, by more than numbers that are not finite."""
        others = (action for name, action in self._actions.items() if name != "not_finite")
        return any(action in KEEPS_OUT for action in others)

    def refuse_unknown(self, message: str | None, step: int) -> None:
        """Takes what was found of a step's rewards, maybe ahead of it: too many unknown ones, or None.

        Raises:
            RapoError: `guards.unknown_rewards` is "stop".
        """
        action = self._actions["unknown_rewards"]
        if not self._acts("unknown_rewards", message) or message is None:
            return
        if action == "stop":
            raise RapoError(message)
        if action == "skip":
            self._held.add(step)
        if action != "off":
            self._tell("unknown_rewards", message)

    def allow(self, metrics: Metrics, damage: str | None) -> bool:
        """Whether an update may be applied.

        Args:
            metrics: of its minibatch, and of the step's batch.
            damage: what is not finite in loss or gradients.

        Raises:
            RapoError: something is not finite, and `guards.not_finite` is "stop".
        """
        if self._rolls_back:  # the rest of a step that is rolled back says nothing
            self._skipped += 1
            return False
        if damage is not None:
            self._refuse(damage)
            return False
        # What was found of the whole step holds for all of its updates.
        allowed = self._step not in self._held
        for name, find in self._faults.items():
            if self._actions[name] not in KEEPS_OUT or (self._looked and name in _OF_STEPS):
                continue
            message = find(metrics)
            if self._acts(name, message) and message is not None:
                allowed = False
                self._held |= {self._step} if name in _OF_STEPS else set()
                self._rolls_back |= self._actions[name] == "roll_back"
                self._tell(name, message)
        self._looked = True
        if self._actions["gradient_spike"] in KEEPS_OUT:
            self._remember(metrics)
        self._skipped += not allowed
        return allowed

    def finish_step(self, metrics: Metrics) -> Mapping[str, float]:
        """Looks at a step's metrics; returns the guards' own. What follows say `rolls_back`, `check_end`."""
        metrics = {**metrics, "guards/skipped_updates": self._skipped}
        if "loss/tokens" in metrics:  # not before the first step
            for name, find in self._faults.items():
                if self._actions[name] in ("warn", "stop"):
                    self._look_back(name, find(metrics))
            if self._actions["gradient_spike"] in ("warn", "stop"):
                self._remember(metrics)
        return {
            "guards/findings": self._findings,
            "guards/skipped_updates": self._skipped,
            "guards/rollbacks": self.rollbacks,
        }

    @property
    def rolls_back(self) -> bool:
        """Whether the run is to go on from the newest checkpoint, as of this step."""
        return self._rolls_back

    def check_end(self) -> None:
        """
        Raises:
            RapoError: the run is to end, as of this step.
        """
        if self._end is not None:
            raise RapoError(self._end)

    def check_rollback(self, *, possible: bool) -> None:
        """
        Raises:
            RapoError: there is no checkpoint to go back to (not `possible`), or the run has gone back often
                enough.
        """
        most = self._config.guards.rollbacks
        if not possible:
            raise RapoError(
                f"step {self._step} is to be rolled back ([guards]), but there is no checkpoint yet; lower "
                "checkpoint.every, or begin with other options"
            )
        if self.rollbacks == most:
            raise RapoError(
                f"step {self._step} is to be rolled back ([guards]), but the run has been {most} times, "
                "which is guards.rollbacks: other prompts do not help; change what it learns by (a lower "
                "optimizer.learning_rate, say)"
            )

    def state(self) -> dict[str, Any]:
        """What they remember, as JSON."""
        return {
            "in_a_row": dict(self._in_a_row),
            "norms": list(self._norms),
            "rollbacks": self.rollbacks,
            "held": sorted(step for step in self._held if step > self._step),
        }

    def go_on(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Takes up what `state()` gave after `step`; None: nothing was remembered."""
        state = state or {"in_a_row": {}, "norms": [], "rollbacks": 0, "held": []}
        self._held = set(state["held"])
        self._in_a_row = dict(state["in_a_row"])
        self._norms.clear()
        self._norms.extend(state["norms"])
        self.rollbacks = state["rollbacks"]
        self.begin_step(step)
        if self._is_main:
            self._log = FindingsLog(self._config.run.directory, self.rollbacks, step)

    def _refuse(self, damage: str) -> None:
        if self._actions["not_finite"] == "stop":
            raise RapoError(damage)
        self._rolls_back |= self._actions["not_finite"] == "roll_back"
        self._skipped += 1
        self._tell("not_finite", damage)

    def _look_back(self, name: str, message: str | None) -> None:
        """Of a guard that warns or stops: each stretch of steps is warned of once."""
        acts = self._acts(name, message)
        count = self._in_a_row.get(name, 0)
        if message is None:
            return
        if acts and self._actions[name] == "stop":
            self._end = f"step {self._step}{self._counted(name)}: {message} (guards.{name})"
            self._tell(name, message, told=True)
        elif count == (1 if name == "no_gradient" else self._needed(name)):
            self._tell(name, message, action="warn")

    def _acts(self, name: str, message: str | None) -> bool:
        """Counts how often in a row there was something; whether that is often enough."""
        self._in_a_row[name] = 0 if message is None else self._in_a_row.get(name, 0) + 1
        return self._in_a_row[name] >= self._needed(name)

    def _needed(self, name: str) -> int:
        return self._config.guards.steps_in_a_row if name in _OF_STEPS else 1

    def _counted(self, name: str) -> str:
        count = self._in_a_row.get(name, 0)
        return f" is number {count} in a row" if name in _OF_STEPS and count > 1 else ""

    def _remember(self, metrics: Metrics) -> None:
        """A spike, too: so what stays at another size becomes the usual."""
        if (norm := metrics.get(NORM, 0.0)) > 0:  # not NaN
            self._norms.append(norm)

    def _tell(self, name: str, message: str, *, action: str | None = None, told: bool = False) -> None:
        action = action or self._actions[name]
        self._findings += 1
        if self._log is None:
            return
        self._log.add(Finding(self.rollbacks, self._step, name, action, message))
        done = {"skip": "; the update is not applied", "roll_back": "; the step is rolled back"}
        if not told:
            where = f"step {self._step}{self._counted(name)}"
            print(
                f"warning: {where}: {message}{done.get(action, '')} (guards.{name})",
                file=sys.stderr,
                flush=True,
            )
