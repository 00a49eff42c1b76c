"""Weights through a folder that trainer and engines both see, as a HF model directory a version."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.export import write_hf_model


class Engines(Protocol):
    """Who receives weights."""

    def update_weights(self, model_path: Path, weight_version: int) -> None:
        """Loads a HF model directory as version `weight_version`, in every engine, or raises."""


class DiskTransport:
    """Writes each version in parallel by the pipeline's stages, has the engines load it, and removes it."""

    def __init__(self, directory: Path, model_path: Path, engines: Engines | None) -> None:
        """
        Args:
            directory: where versions are written.
            model_path: HF directory whose configuration and tokenizer files go with the weights.
            engines: on rank 0; None elsewhere.
        """
        self.directory = directory
        self.model_path = model_path
        self.engines = engines

    def publish(
        self, chunks: Sequence[GPTModel], architecture: Architecture, placement: Placement, version: int
    ) -> None:
        """Makes the engines serve these weights as `version`. All ranks must call it.

        Raises:
            RapoError: the folder cannot be written, or an engine refuses.
        """
        folder = self.directory / f"version_{version:06d}"
        write_hf_model(chunks, architecture, placement, folder, companions_of=self.model_path)
        if self.engines is not None:
            self.engines.update_weights(folder, version)
            shutil.rmtree(folder)
