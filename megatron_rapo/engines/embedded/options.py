"""The options of embedded servers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_rapo.engines.sglang.options import RoutedOptions
from megatron_rapo.section import PositiveInt


class EmbeddedOptions(RoutedOptions):
    """Embedded servers, for tests and small models."""

    kind: Literal["embedded"] = Field("embedded", description="Names this kind of engines.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where a server computes.")
    threads: PositiveInt = Field(1, description="CPU threads of one server.")
