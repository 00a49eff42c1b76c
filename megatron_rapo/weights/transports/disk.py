"""Weights through a folder that trainer and engines both see, as a HF model directory a version."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.engines import Engines
from megatron_rapo.weights.export import write_hf_model


class DiskTransport:
    """Writes each version in parallel by the pipeline's stages, has the engines load it, and removes it."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        placement: Placement,
        directory: Path,
        model_path: Path,
    ) -> None:
        """
        Args:
            chunks: this rank's weights.
            architecture: theirs.
            placement: this rank's.
            directory: where versions are written.
            model_path: HF directory whose configuration and tokenizer files go with the weights.
        """
        self._chunks = chunks
        self._architecture = architecture
        self._placement = placement
        self._directory = directory
        self._model_path = model_path

    def send(self, engines: Engines | None, version: int) -> Mapping[str, int]:
        """Sends the weights as `version`. All ranks call it; `engines` is the main rank's.

        Returns:
            The checksum of each tensor as it was written.

        Raises:
            RapoError: the folder cannot be written (on all ranks), or an engine refuses (on the main rank).
            EngineLost: an engine is gone; on the main rank.
        """
        folder = self._directory / f"version_{version:06d}"
        checksums = write_hf_model(
            self._chunks, self._architecture, self._placement, folder, companions_of=self._model_path
        )
        if engines is not None:
            try:
                engines.update_weights(folder, version)
            finally:
                shutil.rmtree(folder)
        return checksums
