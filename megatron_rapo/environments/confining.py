"""Whether this machine can confine the functions of an environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.processes.confine import lacking
from megatron_rapo.tools.described import Tool
from megatron_rapo.tools.plan import Limits, Plan


def check_confinement(tools: Sequence[Tool], limits: Limits) -> None:
    """That the kernel has what confines these functions.

    Raises:
        RapoError: it lacks something.
    """
    for tool in tools:
        plan = Plan({tool.name: tool.address}, limits, runs_code=tool.runs_code)
        if missing := lacking(plan.confinement(Path())):
            remedy = (
                "run it on a machine that has it"
                if tool.runs_code or "Landlock" not in missing[0]
                else 'add "files" to environment.options.allow, if it may read and write what this user may'
            )
            raise RapoError(
                f'"{tool.name}" cannot be confined on this machine, which lacks {" and ".join(missing)}; '
                f"{remedy}"
            )
