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
            if "model.safetensors" not in self._files.values() and (directory / "model.safetensors").exists():
                raise RapoError(
                    f"model {directory} holds its weights twice: in model.safetensors, and in the files that "
                    f"{index.name} names, and who loads it takes either; remove the one that is out of date"
                )
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

    def type_name(self, name: str) -> str:
        """The tensor's type as safetensors calls it, such as `BF16`."""
        return str(self._slices(name).get_dtype())

    def check_index(self) -> None:
        """Compares the index with the files.

        Raises:
            RapoError: a file lacks a tensor that the index names in it, or holds one that it does not: who
                loads files one after the other would take that.
        """
        for file in sorted(set(self._files.values())):
            named = {name for name, part in self._files.items() if part == file}
            held = set(self._handle(file).keys())
            if named != held:
                name = sorted(named ^ held)[0]
                what = "does not hold" if name in named else "holds"
                where = self._files.get(name, "no file")
                raise RapoError(
                    f"model {self.directory}: its index says that tensor {name} is in {where}, and {file} "
                    f"{what} it; copy index and files again"
                )

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
        file = self._files[name]
        try:
            return self._handle(file).get_slice(name)
        except SafetensorError as error:
            raise RapoError(
                f"model {self.directory}: its index says that tensor {name} is in {file}, which has it not; "
                "copy index and files again"
            ) from error

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RapoError(f"{file} is no index of weights ({error!r}); copy it again") from error
