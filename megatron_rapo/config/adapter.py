"""The section `[adapter]`: low-rank adapters that are trained in place of the policy's weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from megatron_rapo.section import PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from megatron_rapo.config.schema import RunConfig

Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OF_ATTENTION: tuple[Target, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
OF_MLP: tuple[Target, ...] = ("gate_proj", "up_proj", "down_proj")
TARGETS = OF_ATTENTION + OF_MLP


def _in_order(targets: Any) -> Any:
    """In the order of a layer, which the user's plays no part in."""
    if targets == "all":
        return targets
    if not isinstance(targets, list) or not targets:
        _refuse("must be a list of layers")
    if unknown := [name for name in targets if name not in TARGETS]:
        _refuse(f"{json.dumps(unknown[0], default=str)} is no layer that is adapted")
    if twice := [name for name in TARGETS if targets.count(name) > 1]:
        _refuse(f"{json.dumps(twice[0])} stands there twice")
    return [name for name in TARGETS if name in targets]


def _refuse(why: str) -> NoReturn:
    # An error of pydantic's own would name the members of the union.
    remedy = f'name some of {", ".join(TARGETS)}, each once, or set "all"'
    raise PydanticCustomError("adapter_targets", "{why}; {remedy}", {"why": why, "remedy": remedy})


class Adapter(Section):
    """LoRA (arXiv 2106.09685): the policy's weights W stay as they are, and W + scale · B · A is trained by
    small matrices A and B beside the linear layers that `targets` names.

    The reference is the policy without them. There is no dropout: the policy that samples has none.
    """

    rank: PositiveInt = Field(16, description="Rows of A, columns of B.")
    alpha: PositiveFloat = Field(
        32.0, description="scale is alpha / rank, or alpha / √rank where `rank_stabilized`."
    )
    targets: Annotated[Literal["all"] | list[Target], BeforeValidator(_in_order)] = Field(
        "all",
        description="Linear layers, by the names that HF and PEFT know: of attention "
        f"{', '.join(f'`{name}`' for name in OF_ATTENTION)}, of the MLP "
        f"{', '.join(f'`{name}`' for name in OF_MLP)}. `all` are these seven. Of a mixture of experts "
        "those of the MLP are of each expert.",
    )
    rank_stabilized: bool = Field(
        False, description="rsLoRA (arXiv 2312.03732): the scale falls with √rank, not with rank."
    )

    @property
    def scale(self) -> float:
        """What B · A is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    @property
    def names(self) -> tuple[str, ...]:
        """The targets, one by one."""
        return TARGETS if self.targets == "all" else tuple(self.targets)


def check_adapter(config: RunConfig) -> None:
    """Refuses an option of the reference that adapters leave without effect.

    Raises:
        ValueError: it is set.
    """
    model = config.model
    if config.adapter is not None and model.reference_in_host_memory and model.reference_path is None:
        raise ValueError(
            "model.reference_in_host_memory = true would have no effect: under [adapter] the reference is "
            "the policy without its adapters, and takes no memory of its own; remove it"
        )
