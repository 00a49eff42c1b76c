"""Installs all repairs of megatron-core, of a version that they are known for."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from megatron_rapo.errors import RapoError

KNOWN = ("0.16.1",)  # the repairs name internals of these, and their tests have passed with them


def check_version() -> None:
    """Whether the repairs fit the megatron-core that is installed; Megatron is not imported for it.

    Raises:
        RapoError: they are not known to.
    """
    found = version("megatron-core")
    if found.split("+")[0] not in KNOWN:
        raise RapoError(
            f"megatron-core {found} is installed, and this package mends internals of {', '.join(KNOWN)} "
            f"alone: pip install megatron-core=={KNOWN[-1]}"
        )


@cache
def install() -> None:
    """Mends megatron-core in this process, before any model; once, however often it is called.

    Raises:
        RapoError: the repairs are not known to fit the version that is installed.
    """
    check_version()
    # They import Megatron, which takes seconds.
    from megatron_rapo.megatron_repairs import adam, buckets, cpu, results_queue

    cpu.repair()
    adam.repair()
    buckets.repair()
    results_queue.repair()
