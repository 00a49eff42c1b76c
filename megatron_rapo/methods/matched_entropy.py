"""A control for RAPO, of no paper: its entropy without its direction.

    J = E[ g(θ) − α · KL(π_ref ‖ π) + β_k · H(π) ],   β_{k+1} = clip(β_k + γ (H*_k − H_k), 0, β_max)

RAPO with φ ≡ 1, so that the reference is never flattened, and an entropy bonus that is controlled step by
step so that the policy's entropy H_k follows H*_k: a number, or what the run `entropy_of` measured at the
same step. If the strength of exploration decides, and not where the flattened reference points, this does
as well as RAPO.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field

from megatron_rapo.episode.group import Group, known_rewards
from megatron_rapo.methods.advantages import standardised
from megatron_rapo.methods.clipping import Clipping
from megatron_rapo.methods.method import Method, OfEpisodes
from megatron_rapo.methods.sampling import Sampling
from megatron_rapo.methods.terms.divergences import Divergence
from megatron_rapo.methods.terms.entropy import Entropy
from megatron_rapo.methods.terms.term import Term
from megatron_rapo.section import NonNegativeFloat, PathOption, PositiveFloat


class MatchedEntropy(Method):
    """RAPO that never flattens the reference, with an entropy bonus that holds the entropy at a given one."""

    example = MappingProxyType({"target_entropy": 1.0})

    class Options(Clipping):
        """A control for RAPO: its entropy without its direction."""

        method: str = "matched_entropy"
        divergence_coefficient: NonNegativeFloat = Field(
            5e-3, description="α, of KL(reference ‖ policy); 0: no divergence, and no reference is loaded."
        )
        target_entropy: PositiveFloat | None = Field(None, description="H*, in nats, of every step.")
        entropy_of: PathOption | None = Field(
            None,
            description="The directory of a run: H* is its `loss/entropy` at the same step, after its last "
            "that of the last. One of this and `target_entropy` must be given.",
        )
        entropy_coefficient: NonNegativeFloat = Field(1e-3, description="β of the first step.")
        entropy_coefficient_limit: PositiveFloat = Field(0.1, description="β_max.")
        gain: PositiveFloat = Field(0.01, description="γ: by how much a nat too little raises β, each step.")

    options: Options

    def __init__(self, options: Options, configured: Sampling) -> None:
        super().__init__(options, configured)
        self.targets = _targets(options.target_entropy, options.entropy_of)
        self.steps, self.coefficient = 0, options.entropy_coefficient

    def advantages(self, groups: Sequence[Group]) -> OfEpisodes:
        return standardised(known_rewards(groups))

    def terms(self) -> Sequence[tuple[float, Term]]:
        o = self.options
        terms: list[tuple[float, Term]] = [(1.0, o.surrogate()), (-self.coefficient, Entropy())]
        if o.divergence_coefficient:
            terms.append((o.divergence_coefficient, Divergence("forward_exact")))
        return terms

    def learn(self, measured: Mapping[str, float]) -> None:
        target = self.targets[min(self.steps, len(self.targets) - 1)]
        self.steps += 1
        moved = self.coefficient + self.options.gain * (target - measured["loss/entropy"])
        self.coefficient = min(max(moved, 0.0), self.options.entropy_coefficient_limit)

    def metrics(self) -> Mapping[str, float]:
        """β of the next step, and H* of this one."""
        step = min(max(self.steps - 1, 0), len(self.targets) - 1)
        return {"entropy_coefficient": self.coefficient, "target_entropy": self.targets[step]}

    def state(self) -> Any:
        return {"steps": self.steps, "coefficient": self.coefficient}

    def restore(self, state: Any) -> None:
        self.steps, self.coefficient = state["steps"], state["coefficient"]


def _targets(entropy: float | None, run: Path | None) -> list[float]:
    """H* of each step; the last one stays."""
    if entropy is not None and run is None:
        return [entropy]
    if run is not None and entropy is None:
        return _measured(run)
    raise ValueError("target_entropy and entropy_of: give one of them, a number or a run's directory")


def _measured(run: Path) -> list[float]:
    """`loss/entropy` of each of a run's steps, in order."""
    file = run / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"entropy_of = {str(run)!r} has no readable metrics.jsonl: {error}") from error
    found = [float(line["loss/entropy"]) for line in lines if "loss/entropy" in line]
    if not found:
        raise ValueError(
            f"entropy_of = {str(run)!r}: {file} has no loss/entropy; give the directory of a run"
        )
    return found
