"""The experts that a mixture's routers choose while a batch is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Experts = npt.NDArray[np.int16]


def routers_of(model: Any) -> list[torch.nn.Module]:
    """Of each layer that has one, in order: transformers' router, whose third output are the choices."""
    return [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]


class RoutedExperts:
    """What routers chose for each row of a batch, forward by forward.

    Attributes:
        prompt: `[prompts, width, layers, chosen]`, of the prefill.
        steps: of each later forward, whose rows it had, and `[rows, layers, chosen]`.
    """

    def __init__(self) -> None:
        self.prompt = torch.zeros(0)
        self.steps: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._layers: list[torch.Tensor] = []

    @contextmanager
    def listening(self, model: Any) -> Iterator[None]:
        """Hears what the model's routers choose."""
        hooks = [router.register_forward_hook(self._hear) for router in routers_of(model)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hear(self, router: Any, given: Any, output: Any) -> None:
        self._layers.append(output[2].to(torch.int16))

    def end_prefill(self, prompts: int) -> None:
        """Takes what was heard as that of so many prompts, all padded to one width."""
        self.prompt = self._take().unflatten(0, (prompts, -1)).cpu()

    def end_step(self, samples: torch.Tensor) -> None:
        """Takes what was heard as that of a token of each of these samples."""
        self.steps.append((samples.cpu(), self._take().cpu()))

    def _take(self) -> torch.Tensor:
        heard, self._layers = torch.stack(self._layers, dim=1), []
        return heard

    def of_samples(
        self, prompt_of: Sequence[int], prompt_lengths: Sequence[int], lengths: Sequence[int]
    ) -> list[Experts]:
        """`[prompt + response - 1, layers, chosen]` of each sample: its last token was not computed.

        Args:
            prompt_of: which of the prompts each continues.
            prompt_lengths, lengths: its tokens, and those of its response.
        """
        response = self.prompt.new_zeros(len(lengths), len(self.steps), *self.prompt.shape[2:])
        for step, (samples, chosen) in enumerate(self.steps):
            response[samples, step] = chosen
        width = self.prompt.size(1)
        return [
            torch.cat([self.prompt[place, width - size :], own[: max(length - 1, 0)]]).numpy()
            for place, size, own, length in zip(prompt_of, prompt_lengths, response, lengths, strict=True)
        ]
