"""With which software a run or an evaluation is made."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("megatron_rapo", "torch", "megatron-core", "transformers", "latex2sympy2_extended", "sympy")
OPTIONAL = ("transformer-engine", "triton")


def software_versions() -> dict[str, str]:
    """Versions of Python, of what results depend on, and of CUDA where torch was built with it."""
    import torch  # late: it takes seconds

    found = {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}}
    for library in OPTIONAL:
        with suppress(PackageNotFoundError):  # then the run does without
            found[library] = version(library)
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})
