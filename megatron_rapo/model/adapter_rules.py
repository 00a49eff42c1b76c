"""The parameters of adapters, as lines of a family's table: where its linear layers are adapted, and how.

Each HF matrix W `[out, in]` that is adapted has A `[rank, in]` and B `[out, rank]`. Where tensor parallelism
cuts W's rows it cuts B's, where W's columns A's; the other of the two is whole on each rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from megatron_rapo.config import Adapter
from megatron_rapo.config.adapter import OF_MLP
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.rules import COLUMNS, ROWS, WHOLE, Rule

A, B = "lora_A", "lora_B"  # PEFT's names
MODULE = "adapter"  # of a Megatron linear layer, beside its weight
_WEIGHT = ".weight"


@dataclass(frozen=True)
class AdaptedLinear:
    """A Megatron linear layer of which some HF matrices are adapted.

    Attributes:
        rule: of its weight.
        targets: the HF matrices that are, by their places in the rule, each by its name as a target.
    """

    rule: Rule
    targets: Mapping[int, str]

    @property
    def name(self) -> str:
        """The linear layer's name within its layer."""
        return self.rule.megatron.removesuffix(_WEIGHT)

    def rules(self, rank: int) -> Iterator[Rule]:
        """The lines of its adapter's parameters."""
        matrices = list(self.rule.hf.items())
        cut = self.rule.cut
        for place, target in self.targets.items():
            hf, (rows, columns) = matrices[place]
            module = hf.removesuffix(_WEIGHT)
            of_a, of_b = f"{module}.{A}{_WEIGHT}", f"{module}.{B}{_WEIGHT}"
            own = f"{self.name}.{MODULE}.{target}_"
            expert = self.rule.expert
            of_columns, of_rows = (side if cut == side else WHOLE for side in (COLUMNS, ROWS))
            yield Rule(own + A, {of_a: (rank, columns)}, of_columns, expert=expert)
            yield Rule(own + B, {of_b: (rows, rank)}, of_rows, heads=self.rule.heads, expert=expert)


def adapted_linears(architecture: Architecture, adapter: Adapter) -> Iterator[AdaptedLinear]:
    """What `adapter.targets` names in each layer.

    Of a mixture's MLP it is each expert, and the one that every token passes as well.

    Raises:
        RapoError: the model has no such layer, or of experts' gate and up projections one alone is named.
    """
    if adapts_experts(architecture, adapter):
        _check_experts(architecture, adapter)
    found: set[str] = set()
    for rule in family_of(architecture).layer(architecture):
        names = _names(rule)
        targets = {place: name for place, name in enumerate(names) if name in adapter.names}
        found |= set(targets.values())
        if targets:
            yield AdaptedLinear(rule, targets)
    if missing := [name for name in adapter.names if name not in found]:
        _refuse(missing, found, architecture, adapter)


def adapts_experts(architecture: Architecture, adapter: Adapter | None) -> bool:
    """Whether experts of a mixture are adapted."""
    return architecture.experts is not None and adapter is not None and bool(set(adapter.names) & set(OF_MLP))


def _names(rule: Rule) -> list[str]:
    """The names as targets of the matrices of a rule; those of experts are published under several."""
    if rule.expert is not None:
        return list(OF_MLP[:2] if len(rule.hf) == 2 else OF_MLP[2:])
    return [name.removesuffix(_WEIGHT).rpartition(".")[2] for name in rule.hf if name.endswith(_WEIGHT)]


def adapter_rules(architecture: Architecture, adapter: Adapter) -> Iterator[Rule]:
    """The adapters' parameters in a layer."""
    for linear in adapted_linears(architecture, adapter):
        yield from linear.rules(adapter.rank)


def _check_experts(architecture: Architecture, adapter: Adapter) -> None:
    gated = [name for name in OF_MLP[:2] if name in adapter.names]
    if len(gated) == 1:
        raise RapoError(
            f"adapter.targets = {list(adapter.names)} has {gated[0]} alone; gate_proj and up_proj of a "
            f"{architecture.family}'s experts are one tensor in transformers, which PEFT adapts as a whole; "
            "name both, or neither"
        )


def _refuse(missing: list[str], found: set[str], architecture: Architecture, adapter: Adapter) -> None:
    chosen = '"all"' if adapter.targets == "all" else str(list(adapter.names))
    has = ", ".join(f'"{name}"' for name in adapter.names if name in found)
    raise RapoError(
        f"adapter.targets = {chosen} has {', '.join(missing)}, which a {architecture.family} has not; "
        + (f"name what it has of them: [{has}]" if has else "name others")
    )
