"""What is done to a run, to whom, and when."""

from __future__ import annotations

from dataclasses import dataclass

PHASES = ("start engines", "build models", "rollout", "reward", "annotate", "update", "publish", "evaluate",
          "checkpoint", "export", "any")  # fmt: skip
AT_START = PHASES[:2]  # once in each start of the command
# Where a signal may meet a run: also between these, or before the heartbeat of this start.
MET = ("before the first", "load", *AT_START, "resume", *PHASES[len(AT_START) : -1], "between phases")


@dataclass(frozen=True)
class Cell:
    """What is done, to whom, and in which phase of rank 0; "any": whenever it may be."""

    does: str
    victim: str
    phase: str


CELLS = (
    *(Cell("SIGKILL", victim, phase) for phase in PHASES for victim in ("a rank", "all ranks", "launcher")),
    *(
        Cell("SIGKILL", "everything", phase)
        for phase in ("rollout", "publish", "evaluate", "checkpoint", "any")
    ),
    *(Cell("SIGKILL", "engine", phase) for phase in ("rollout", "update", "publish", "evaluate", "any")),
    *(Cell("SIGKILL", "verifier", phase) for phase in ("rollout", "evaluate", "any", "any")),
    *(Cell("SIGTERM", "launcher", phase) for phase in ("rollout", "update", "evaluate", "checkpoint")),
    *(Cell("SIGINT twice", "launcher", phase) for phase in ("rollout", "update")),
    *(Cell("SIGSTOP", "engine", phase) for phase in ("rollout", "publish", "evaluate")),
    *(Cell("SIGSTOP", "a rank", phase) for phase in ("rollout", "update")),
    *(Cell("full disk", "launcher", phase) for phase in ("checkpoint", "any")),
    *(Cell("clock +1 h", "everything", phase) for phase in ("rollout", "update")),
    *(Cell("clock -2 h", "everything", phase) for phase in ("publish", "any")),
)
