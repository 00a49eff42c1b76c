"""How long ranks wait for each other: also while the main rank waits for an engine that is silent."""

from __future__ import annotations

from megatron_rapo.config import Parallel, RunConfig
from megatron_rapo.wire.patience import TIMEOUT_S


def patient_layout(config: RunConfig) -> Parallel:
    """The run's layout. With engines its collectives end later, by the time that one may take to answer, to
    start, or to join the group over which it gets weights: so a silent engine is given up first."""
    if not config.opens_engines:
        return config.parallel
    engine_s = max(config.rollout.request_timeout_s, config.rollout.startup_timeout_s, TIMEOUT_S)
    return config.parallel.model_copy(update={"timeout_s": config.parallel.timeout_s + engine_s})
