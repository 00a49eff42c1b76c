"""What layers of some families have beside Llama's: norms in other places, and windows of attention."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rapo.model.rope import Rope


@dataclass(frozen=True)
class Norms:
    """Where a layer has an RMSNorm over its channels, by the names that the published weights have for them.

    Attributes:
        before_attention, before_mlp: of what a sublayer is given. A layer has both or none.
        after_attention, after_mlp: of what it gives, before that is added to the residual. Likewise.
        zero_centred: whether every norm of the model multiplies by 1 + its weight.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    zero_centred: bool = False

    @property
    def before(self) -> bool:
        """Whether sublayers are given normed values."""
        return self.before_attention is not None

    @property
    def after(self) -> bool:
        """Whether what they give is normed."""
        return self.after_attention is not None


LLAMAS = Norms()
"""Before the sublayers, as most families have them."""


@dataclass(frozen=True)
class Window:
    """Layers in which a token attends to the last `size` tokens alone, itself among them.

    Attributes:
        layers: counted from 0.
        rope: their rotary positions, where they are other than the model's.
    """

    size: int
    layers: tuple[int, ...]
    rope: Rope | None = None
