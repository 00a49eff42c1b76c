"""How a batch is asked for."""

from __future__ import annotations

from megatron_rapo.config import RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.sampling import Sampling


def seed_of(number: int, config: RunConfig) -> int:
    """The seed of a step's samples; 0 is evaluation's, whose samples are the same each time."""
    return (number << 31) + config.run.seed


def sampling_of(method: Method, config: RunConfig) -> Sampling:
    """What the method says now.

    Raises:
        RapoError: it cannot be.
    """
    sampling = method.sampling()
    if wrong := sampling.wrong(method.configured):
        raise RapoError(f'sampling of method "{config.algorithm.method}" returned {wrong}; mend it')
    return sampling
