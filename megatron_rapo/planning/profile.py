"""What a device and its links can do: measured by `megatron-rapo calibrate`, or from published figures."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from megatron_rapo.errors import RapoError
from megatron_rapo.section import NonNegativeFloat, PositiveFloat, PositiveInt, Section

SHIPPED = Path(__file__).with_name("profiles")


class Rate(Section):
    """How fast a piece of work of some size runs; larger pieces run faster, up to a point."""

    flops: PositiveFloat = Field(description="Floating-point operations of the piece.")
    flops_per_s: PositiveFloat = Field(description="At which they run.")


class Link(Section):
    """Between two devices: an operation of n bytes takes latency_s + n / bytes_per_s."""

    latency_s: NonNegativeFloat = Field(description="Seconds of an operation without bytes.")
    bytes_per_s: PositiveFloat = Field(description="Bandwidth of a device, in one direction.")


class EngineRates(Section):
    """What a decoding step takes beside its arithmetic and its reads of memory."""

    step_s: NonNegativeFloat = Field(description="Seconds of a step.")
    layer_s: NonNegativeFloat = Field(description="Seconds of each layer of a step.")
    response_s: NonNegativeFloat = Field(description="Seconds of each response of a step.")


class Profile(Section):
    """The figures that a plan is made with. All are of one device, and of `dtype`.

    Operations count as in `scaling/flops.py`, attention's without a discount for causality.
    """

    format: Literal[1] = Field(1, description="Version of this form.")
    device: str = Field(description="The device's name, as CUDA or the host tells it.")
    source: str = Field(description="Where the figures come from.")
    dtype: Literal["bfloat16", "float32"] = Field(description="The type that rates are of.")
    devices_per_node: PositiveInt = Field(description="Devices (CPU: cores) of one node.")
    memory_gib: PositiveFloat = Field(description="Memory of a device.")
    memory_bytes_per_s: PositiveFloat = Field(description="Bandwidth of that memory.")
    matrix: list[Rate] = Field(min_length=1, description="Matrix products by size, ascending.")
    attention: list[Rate] = Field(min_length=1, description="Attention by size, ascending.")
    layer_s: NonNegativeFloat = Field(
        description="Seconds that a layer's forward takes beside arithmetic and memory: launches, Python."
    )
    step_s: NonNegativeFloat = Field(description="Seconds of a step that depend on nothing: Python, metrics.")
    within_node: Link = Field(description="Between devices of one node.")
    between_nodes: Link = Field(description="Between devices of two nodes.")
    engine: EngineRates = Field(description="Of the engines.")
    verifications_per_s: PositiveFloat = Field(description="Of one verifier process.")
    disk_bytes_per_s: PositiveFloat = Field(description="Written and read again.")

    @model_validator(mode="after")
    def _check_order(self) -> Profile:
        for name in ("matrix", "attention"):
            sizes = [rate.flops for rate in getattr(self, name)]
            if sizes != sorted(set(sizes)):
                raise ValueError(f"{name} must have its flops in ascending order, each once; sort it")
        return self

    def matrix_s(self, flops: float, pieces: float) -> float:
        """Seconds of matrix products of so many operations in so many equal pieces."""
        return _seconds(self.matrix, flops, pieces)

    def attention_s(self, flops: float, pieces: float) -> float:
        """Likewise, of attention."""
        return _seconds(self.attention, flops, pieces)

    def link(self, span: int) -> Link:
        """The slowest link of a group whose ranks lie among so many neighbours."""
        return self.within_node if span <= self.devices_per_node else self.between_nodes


def all_reduce_s(link: Link, ranks: int, nbytes: float) -> float:
    """A ring's bandwidth and a tree's latency; half of it is a reduce-scatter, or an all-gather."""
    if ranks == 1:
        return 0.0
    return 2 * (
        math.ceil(math.log2(ranks)) * link.latency_s + (ranks - 1) / ranks * nbytes / link.bytes_per_s
    )


def all_to_all_s(link: Link, ranks: int, nbytes: float) -> float:
    """Each of so many ranks has so many bytes, of which an equal part goes to each."""
    if ranks == 1:
        return 0.0
    return link.latency_s + (ranks - 1) / ranks * nbytes / link.bytes_per_s


def read_profile(name: str) -> Profile:
    """A profile by its file, or by the name of a shipped one.

    Raises:
        RapoError: there is none, or the file is no profile.
    """
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}
    path = shipped.get(name.lower(), Path(name))
    try:
        return Profile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RapoError(
            f"--profile {name}: {error.strerror}; name a file that megatron-rapo calibrate wrote, or one of "
            f"{', '.join(shipped)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RapoError(f"--profile {name} is not valid TOML: {error}; calibrate again") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RapoError(
            f"--profile {name}: {where} {first['msg']}; mend it there, or calibrate again"
        ) from error


def _seconds(rates: Sequence[Rate], flops: float, pieces: float) -> float:
    return flops / _rate(rates, flops / pieces) if flops else 0.0


def _rate(rates: Sequence[Rate], flops: float) -> float:
    """Between two sizes the logarithm of the rate goes with that of the size; a smaller piece than the
    smallest takes as long as that one, a larger than the largest runs at its rate."""
    if flops <= rates[0].flops:
        return rates[0].flops_per_s * flops / rates[0].flops
    for below, above in pairwise(rates):
        if flops <= above.flops:
            share = math.log(flops / below.flops) / math.log(above.flops / below.flops)
            return below.flops_per_s * (above.flops_per_s / below.flops_per_s) ** share
    return rates[-1].flops_per_s
