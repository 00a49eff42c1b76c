"""Runners of the default environment, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from megatron_rapo.config.environment import EnvironmentOptions
from megatron_rapo.environments.runner import Runner
from megatron_rapo.environments.running import EpisodeRunner
from megatron_rapo.environments.single_turn import SingleTurn
from megatron_rapo.rollout.pool import EnginePool


def single_turns(
    pool: EnginePool, text_of: Callable[[Sequence[int]], str] = str, guided: Any = None
) -> Runner:
    """Runs one response to each prompt, whose tokens `text_of` makes text of."""
    tokenizer: Any = SimpleNamespace(decode=lambda ids, skip_special_tokens: text_of(ids))
    episodes = EpisodeRunner(SingleTurn(), EnvironmentOptions(), tokenizer, 1.0, 2**31, guided)
    return Runner(episodes, pool)
