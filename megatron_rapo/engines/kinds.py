"""The kinds of engines by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_rapo.engines.embedded.kind import Embedded
from megatron_rapo.engines.kind import EngineKind
from megatron_rapo.engines.options import EngineOptions
from megatron_rapo.engines.sglang.kind import SGLang
from megatron_rapo.engines.vllm.kind import VLLM
from megatron_rapo.errors import RapoError
from megatron_rapo.user_code import ours_or_own, place_of

DEFAULT_KIND = "embedded"
KINDS: Mapping[str, type[EngineKind]] = {"embedded": Embedded, "sglang": SGLang, "vllm": VLLM}


def find_kind(name: str, folders: Sequence[Path] = ()) -> type[EngineKind]:
    """The kind that `rollout.engine.kind` calls so: one with a name, or a class of the user's own.

    Args:
        name: a name, or `module:class`.
        folders: of the user's own modules (`run.code`).

    Raises:
        ValueError: there is no kind of that name.
        RapoError: there is no such class, or it is no kind.
    """
    found = ours_or_own(name, KINDS, folders, "rollout.engine.kind", "kind of engines")
    named = f'rollout.engine.kind = "{name}" ({place_of(found)})'
    if not (isinstance(found, type) and issubclass(found, EngineKind)):
        raise RapoError(
            f"{named} is no class that inherits from EngineKind (megatron_rapo.engines.kind); let it"
        )
    if not (isinstance(found.Options, type) and issubclass(found.Options, EngineOptions)):
        raise RapoError(f"{named} has Options that do not inherit from EngineKind.Options; let them")
    return found
