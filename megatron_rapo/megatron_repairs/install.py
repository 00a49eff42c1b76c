"""Installs the repairs that the installed megatron-core needs, if it is a release that they are known for."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_rapo.errors import RapoError

# Repairs name internals of these. `make test` runs the oldest, `make test-newest` the newest.
SUPPORTED = ">=0.16.1,<0.20"


def check_version() -> Version:
    """The release of megatron-core that is installed; Megatron is not imported for it.

    Raises:
        RapoError: the repairs are not known to fit it.
    """
    found = Version(version("megatron-core"))
    if not SpecifierSet(SUPPORTED).contains(found, prereleases=False):
        raise RapoError(
            f"megatron-core {found} is installed, and this package mends internals of {SUPPORTED} alone: "
            f"pip install 'megatron-core{SUPPORTED}'"
        )
    return found


@cache
def install() -> None:
    """Mends megatron-core in this process, before any model; once, however often it is called.

    Raises:
        RapoError: the repairs are not known to fit the version that is installed.
    """
    found = check_version()
    # They import Megatron, which takes seconds.
    from megatron_rapo.megatron_repairs import (
        adam,
        buckets,
        cpu,
        gloo_sizes,
        notices,
        pickles,
        results_queue,
        router_gemm,
    )

    for module in (cpu, gloo_sizes, adam, buckets, notices, pickles, results_queue, router_gemm):
        if found in SpecifierSet(module.VERSIONS):
            module.repair()
