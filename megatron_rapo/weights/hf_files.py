"""The tensors of a HF model directory, read slice by slice."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_rapo.errors import RapoError


class HFTensors:
    """The tensors of a HF model directory, opened lazily, file by file."""

    def __init__(self, directory: Path) -> None:
        """Reads which file holds which tensor.

        Raises:
            RapoError: the directory holds no safetensors, or its index is malformed or names a missing file.
        """
        self.directory = directory
        self._files: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        self._stack = ExitStack()
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            self._files = _read_index(index)
            for name in sorted(set(self._files.values())):
                if not (directory / name).is_file():
                    raise RapoError(f"model {directory} lacks {name}, which its index names; copy it again")
        elif (directory / "model.safetensors").is_file():
            self._files = dict.fromkeys(self._handle("model.safetensors").keys(), "model.safetensors")
        else:
            raise RapoError(
                f"model directory {directory} holds no weights (no model.safetensors, no "
                "model.safetensors.index.json); download or convert them"
            )

    def __enter__(self) -> HFTensors:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._files)

    def shape(self, name: str) -> list[int]:
        """Shape of the whole tensor."""
        return list(self._slices(name).get_shape())

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> Tensor:
        """`name`, or its part `start:stop` of `dimension`."""
        slices = self._slices(name)
        if dimension is None:
            return slices[:]
        return slices[start:stop] if dimension == 0 else slices[:, start:stop]

    def close_files(self) -> None:
        """Unmaps the files, whose pages count as this process's memory once read; `read` opens them again."""
        self._open.clear()
        self._stack.close()

    def _slices(self, name: str) -> Any:
        if name not in self._files:
            raise RapoError(
                f"model {self.directory} has no tensor {name}; is config.json that of its weights?"
            )
        return self._handle(self._files[name]).get_slice(name)

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            try:
                handle = safe_open(str(self.directory / file), framework="pt")
                self._open[file] = self._stack.enter_context(handle)
            except (SafetensorError, OSError) as error:
                raise RapoError(f"{self.directory / file} cannot be read ({error}); copy it again") from error
        return self._open[file]


def _read_index(file: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    try:
        weight_map = json.loads(file.read_text())["weight_map"]
        return {str(name): str(part) for name, part in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RapoError(f"{file} is no index of weights ({error!r}); copy it again") from error
