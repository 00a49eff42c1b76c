"""The tensors of a Megatron checkpoint (torch_dist form), read parameter by parameter under their HF names.

Such a checkpoint holds each parameter once, whole, whatever layout wrote it: cut into chunks that its index
`.metadata` places. So it is read without a process a rank, and without building a model.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.weights.stored_parameters import StoredParameter, stored_parameters

FORM = "metadata.json"  # Megatron's word on the form of a checkpoint
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron-LM's word on the newest one of a folder
REMEDY = "name the HF model that it was trained from"
MODEL = ("embedding.", "decoder.", "output_layer.")  # what the keys of a model's parameters begin with


class StoredTensors:
    """The tensors of a checkpoint, by the keys that Megatron has for them.

    Attributes:
        directory: of the checkpoint.
        sizes: whole shape of each.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the index, and checks that the files are there that it names.

        Raises:
            RapoError: it is damaged.
        """
        self.directory = directory
        self._reader = _SafeReader(directory)
        try:
            self._index = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._index, is_coordinator=True)
            self._check_files()
            self.sizes = {
                key: list(stored.size)
                for key, stored in self._index.state_dict_metadata.items()
                if isinstance(stored, TensorStorageMetadata)
            }
        except RapoError:
            raise
        except Exception as error:  # a damaged pickle raises anything, and its objects lack anything
            raise RapoError(
                f"checkpoint {directory} has no index that can be read ({error}); copy it again"
            ) from error

    def metadata(self, key: str) -> TensorStorageMetadata:
        """Size and type of a tensor.

        Raises:
            RapoError: there is none of that key.
        """
        stored = self._index.state_dict_metadata.get(key)
        if not isinstance(stored, TensorStorageMetadata):
            raise RapoError(f"checkpoint {self.directory} has no tensor {key}; {REMEDY}")
        return stored

    def read(self, key: str, offsets: Sequence[int], shape: Sequence[int]) -> Tensor:
        """The part of a tensor that begins at `offsets`.

        Raises:
            RapoError: its files, or its places in the index, are damaged.
        """
        stored = self.metadata(key)
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(shape))
        try:
            target = torch.empty(torch.Size(shape), dtype=stored.properties.dtype)
            items = create_read_items_for_chunk_list(key, stored, [chunk])
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except Exception as error:  # of damaged files and places in the index
            raise RapoError(
                f"checkpoint {self.directory}: {key} cannot be read ({error}); copy it again"
            ) from error
        return target

    def _check_files(self) -> None:
        ends: dict[str, int] = {}
        for place in self._index.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        for name, end in ends.items():
            file = self.directory / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                what = "is missing" if size is None else f"has {size} of at least {end} bytes"
                raise RapoError(f"checkpoint {self.directory} is damaged: {name} {what}; copy it again")


class MegatronTensors:
    """The model in a Megatron checkpoint, as HF tensors."""

    def __init__(self, path: Path, architecture: Architecture) -> None:
        """Reads the index, and checks that it describes the architecture and that its files are there.

        Args:
            path: a checkpoint, or a folder of them (see `find_checkpoint`).
            architecture: of the model.

        Raises:
            RapoError: there is none, it is damaged, or it is of another architecture.
        """
        self.directory = find_checkpoint(path)
        self._stored = StoredTensors(self.directory)
        self._architecture = architecture
        self.parameters = list(stored_parameters(architecture))
        self._place = {
            name: (each, part) for each in self.parameters for part, name in enumerate(each.rule.hf)
        }
        self._check_architecture(architecture)
        self._last: tuple[StoredParameter, list[Tensor]] | None = None

    def shape(self, name: str) -> list[int]:
        """Shape of the whole HF tensor."""
        parameter, _ = self._place[name]
        return list(parameter.rule.hf[name])

    def read(self, name: str, dimension: int | None, start: int, stop: int) -> Tensor:
        """The HF tensor `name`, or its part `start:stop` of `dimension`.

        The parameter that it is fused into is read whole, and kept for the next of its parts.
        """
        parameter, part = self._place[name]
        if self._last is None or self._last[0] is not parameter:
            self._last = None  # Its memory is free before the next is read.
            self._last = (parameter, self._parts(parameter))
        whole = self._last[1][part]
        return whole if dimension is None else whole.narrow(dimension, start, stop - start)

    def dtype(self, parameter: StoredParameter) -> torch.dtype:
        """The type that a parameter is stored in."""
        return self._stored.metadata(parameter.key).properties.dtype

    def _parts(self, parameter: StoredParameter) -> list[Tensor]:
        fused = self._stored.read(parameter.key, parameter.offsets, parameter.part).view(parameter.shape)
        return list(parameter.rule.fusion.split(fused, self._architecture))

    def _check_architecture(self, architecture: Architecture) -> None:
        for parameter in self.parameters:
            found = list(self._stored.metadata(parameter.key).size)
            expected = list(parameter.whole)
            if parameter.rule.vocabulary:
                # Padded to a multiple of the layout's; an embedding of another model seldom differs by less.
                fits = found[1:] == expected[1:] and found[0] >= expected[0]
            else:
                fits = found == expected
            if not fits:
                raise RapoError(
                    f"checkpoint {self.directory} is of another architecture: {parameter.key} has shape "
                    f"{found}, config.json makes it {expected}; {REMEDY}"
                )
        known = {parameter.key for parameter in self.parameters}
        for key, size in self._stored.sizes.items():
            if key.startswith(MODEL) and key not in known:
                raise RapoError(
                    f"checkpoint {self.directory} is of another architecture: {architecture.family} has "
                    f"no {key} {size}; {REMEDY}"
                )


def is_checkpoint(path: Path) -> bool:
    """Whether a Megatron checkpoint, or a folder of them, is at `path`."""
    return any((candidate / FORM).is_file() for candidate in _candidates(path))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`: itself, the newest of a run, or the one that a Megatron-LM folder names.

    Raises:
        RapoError: there is none, or it has another form than torch_dist.
    """
    for candidate in _candidates(path):
        if (candidate / FORM).is_file():
            _check_form(candidate / FORM)
            return candidate
    if any(True for candidate in _candidates(path) for _ in candidate.glob("mp_rank_*")):
        raise RapoError(
            f"{path} is a checkpoint in Megatron's legacy form, a file a rank; save it again with "
            "Megatron-LM's --ckpt-format torch_dist"
        )
    raise RapoError(
        f"{path} is no Megatron checkpoint (no {FORM}); name a run's directory, one of its "
        "checkpoints/step_*, or a folder that Megatron-LM saved to"
    )


def _candidates(path: Path) -> list[Path]:
    """Where the checkpoint may be, the newest first."""
    runs = [path, path / "checkpoints"]
    steps = [step for folder in runs for step in sorted(folder.glob("step_*"), key=_step, reverse=True)]
    return [path, *_tracked(path), *steps]


def _step(folder: Path) -> int:
    """The step in a checkpoint's name; −1, older than any, where it names none."""
    number = folder.name.removeprefix("step_")
    return int(number) if number.isdecimal() else -1


def _tracked(path: Path) -> list[Path]:
    """What Megatron-LM's tracker file names as the newest."""
    file = path / TRACKER
    if not file.is_file():
        return []
    name = file.read_text(errors="replace").strip()
    return [path / (f"iter_{int(name):07d}" if name.isdecimal() else name)]


def _check_form(file: Path) -> None:
    try:
        form = json.loads(file.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RapoError(f"{file} is damaged ({error!r}); copy the checkpoint again") from error
    if form != "torch_dist":
        raise RapoError(
            f"checkpoint {file.parent} has the form {form!r}; save it again in Megatron's form torch_dist"
        )


class _Into(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def lookup_tensor(self, index: Any) -> Tensor:
        return self.target


class _SafeReader(FileSystemReader):
    """Reads an index without running what a pickle may hold: torch's own reader calls whatever it names."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Unpickler(file).load()


class _Unpickler(pickle.Unpickler):
    """Admits what an index is made of: torch's classes for it, types of tensors, shapes and paths."""

    INDEX = "torch.distributed.checkpoint."
    NAMES = frozenset({("torch", "Size"), ("torch.serialization", "_get_layout"), ("pathlib", "PosixPath")})

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" or module.startswith(self.INDEX) or (module, name) in self.NAMES:
            found = super().find_class(module, name)
            # A dotted name leads out of its module, so it is what was found that counts.
            is_index = isinstance(found, type) and found.__module__.startswith(self.INDEX)
            if is_index or isinstance(found, torch.dtype) or (module, name) in self.NAMES:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index needs")
