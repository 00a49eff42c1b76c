"""The section `[rollout.engine]`: the options of the kind of engines that it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, ValidationInfo
from pydantic_core import PydanticCustomError

from megatron_rapo.engines.kind import EngineKind
from megatron_rapo.engines.kinds import DEFAULT_KIND, KINDS, find_kind
from megatron_rapo.engines.options import EngineOptions
from megatron_rapo.user_code import load


def load_own_kind(rollout: Any, info: ValidationInfo) -> Any:
    """Imports a kind of the user's own while `run.code` is at hand, which sections below do not see."""
    engine = rollout.get("engine") if isinstance(rollout, Mapping) else None
    name = engine.get("kind") if isinstance(engine, Mapping) else None
    run = info.data.get("run")  # missing where it is wrong itself
    if isinstance(name, str) and ":" in name and run is not None:
        load(name, run.code, "rollout.engine.kind")
    return rollout


def _of_its_kind(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    name = values.get("kind")
    if name is None and values.get("urls"):
        choice = " or ".join(f'"{name}"' for name in KINDS)
        raise PydanticCustomError(
            "engine_kind", "{why}", {"why": f"is missing: it says what runs at urls; set it to {choice}"}
        )
    if name is not None and not isinstance(name, str):
        return values  # which the section's own type then refuses
    try:
        kind = find_kind(name or DEFAULT_KIND)
    except ValueError as error:
        raise PydanticCustomError("engine_kind", "{why}", {"why": str(error), "name": name}) from None
    options = kind.Options.model_validate({**values, "kind": name or DEFAULT_KIND})
    if not options.urls and kind.launcher is EngineKind.launcher:
        raise ValueError(f'kind = "{name}" starts no servers; name running ones in urls')
    return options


Engine = Annotated[SerializeAsAny[EngineOptions], BeforeValidator(_of_its_kind)]
"""Any kind's options; `kind` says whose."""
