"""Whether the processes of an environment's functions start, and can be confined on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_rapo.background import BackgroundLoop
from megatron_rapo.errors import RapoError
from megatron_rapo.processes.confine import lacking
from megatron_rapo.tools.plan import Plan
from megatron_rapo.tools.process import started


def check_processes(plans: Sequence[Plan]) -> None:
    """Starts one of each, and ends it.

    Raises:
        RapoError: the kernel lacks something, or a function cannot be imported where it is confined.
    """
    for plan in plans:
        if missing := lacking(plan.confinement(Path())):
            raise RapoError(
                f"{', '.join(plan.functions)} cannot be confined on this machine, which lacks "
                f"{' and '.join(missing)}; {_remedy(plan, missing)}"
            )
    loop = BackgroundLoop("tools")  # whoever asks may have a loop that runs
    try:
        for plan in plans:
            loop.run(_start(plan))
    finally:
        loop.close()


async def _start(plan: Plan) -> None:
    (await started(plan)).close()


def _remedy(plan: Plan, missing: Sequence[str]) -> str:
    if plan.runs_code or not all("Landlock" in what for what in missing):
        return "run it on a machine that has it"
    return 'add "files" to environment.options.allow, if it may read and write what this user may'
