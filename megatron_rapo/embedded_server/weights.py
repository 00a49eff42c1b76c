"""The weights of a model in use: written a few at a time, served only while all are of one version."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.embedded_server.checkpoint import read_checkpoint
from megatron_rapo.embedded_server.published import published
from megatron_rapo.errors import RapoError
from megatron_rapo.wire.slices import Slice

NamedTensors = Sequence[tuple[str, torch.Tensor]]


class Weights:
    """A model's parameters and persistent buffers under their published names, and what they are called
    together.

    An update is a session of writes. From its first write on the weights are a mixture, until every tensor
    has been written; a session that ends sooner leaves a mixture behind, which the next one has to replace as
    a whole.

    Attributes:
        version: of the weights; `default` until the first update, as in SGLang.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.version = "default"
        tensors = model.state_dict(keep_vars=True)
        first: dict[int, str] = {}
        tied = {name: first.setdefault(id(values), name) for name, values in tensors.items()}
        self._model_type = getattr(getattr(model, "config", None), "model_type", "")
        self._own = {name: tensors[name] for name in first.values()}
        """What the model computes with, by transformers' names."""
        self._own_shapes = {name: values.shape for name, values in self._own.items()}
        self._tensors = self._published()
        self._shapes = {name: tuple(values.shape) for name, values in self._tensors.items()}
        others = {name: one for name, one in tied.items() if name != one}
        self._canonical = {**{name: name for name in self._tensors}, **others}
        """The first name of the matrix that a name, of tied ones, stands for."""
        # How many numbers of which tensors are not of the version that others already are of.
        self._missing: dict[str, int] = {}
        self._announced: str | None = None  # the version's name once nothing is missing
        self._in_session = False
        self._released = False

    def problem(self) -> str | None:
        """Why nothing can be sampled from these weights; None if it can."""
        if self._released:
            return "the memory of the weights is released; resume it, and send a whole update"
        if not self._missing:
            return None
        return (
            f"the weights are not whole: {len(self._missing)} of {len(self._tensors)} tensors have not come "
            f"({_some(self._missing.keys())}); send a whole update, or restart the server"
        )

    def begin(self) -> None:
        """Opens a session. What an earlier one left unfinished must come as a whole now."""
        if self._in_session:
            raise RapoError("an update is under way; end it (/end_weight_update) before the next")
        self._in_session, self._announced = True, None
        if self._missing:
            self._missing = self._sizes()

    def end(self) -> None:
        """Closes the session.

        Raises:
            RapoError: there is none, or it leaves a mixture behind; it is closed all the same.
        """
        if not self._in_session:
            raise RapoError("no update is under way; begin one (/begin_weight_update)")
        self._in_session = False
        if problem := self.problem():
            raise RapoError(f"the update has ended, but {problem}")

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Whether tensors of these names and shapes can be written now.

        Raises:
            RapoError: no session is open, the weights are released, or a name or shape is not the model's.
        """
        if not self._in_session:
            raise RapoError("weights are taken between /begin_weight_update and /end_weight_update only")
        if self._released:
            raise RapoError("the memory of the weights is released; resume it (/resume_memory_occupation)")
        problems = []
        for name, shape in shapes.items():
            if name not in self._canonical:
                problems.append(f"{name} is not in the model")
            elif tuple(shape) != (expected := self._shapes[self._canonical[name]]):
                problems.append(f"{name} has shape {list(shape)} in place of {list(expected)}")
        if problems:
            raise RapoError(
                f"{len(problems)} of {len(shapes)} tensors are not this model's: {'; '.join(problems[:5])}; "
                "send weights of the architecture that the server was started with"
            )

    def write(self, named: NamedTensors, version: str | None) -> None:
        """Takes tensors, in order, converting to the model's type; all are checked before the first.

        Args:
            named: names and values.
            version: what the weights are called once all have come; None leaves that to another request.
        """
        self.check({name: values.shape for name, values in named})
        self._put([(name, self._tensors[self._canonical[name]], values) for name, values in named], version)

    def write_slices(
        self, slices: Sequence[Slice], values: Sequence[torch.Tensor], version: str | None
    ) -> None:
        """Takes slices of tensors, as `write` takes whole ones; each number must come once in a session."""
        places = [self.place(one) for one in slices]
        named = [(one[0], place, one_s) for one, place, one_s in zip(slices, places, values, strict=True)]
        self._put(named, version)

    def place(self, one: Slice) -> torch.Tensor:
        """Where a slice belongs in the model.

        Raises:
            RapoError: it is of no tensor of this model.
        """
        name, dimension, start, stop = one
        self.check({})
        if name not in self._canonical:
            raise RapoError(f"{name} is not in the model; send weights of its architecture")
        tensor = self._tensors[self._canonical[name]]
        if dimension is None:
            return tensor
        if not (0 <= dimension < tensor.dim() and 0 <= start < stop <= tensor.size(dimension)):
            raise RapoError(
                f"{start}:{stop} of dimension {dimension} is no slice of {name}, {list(tensor.shape)}; send "
                "weights of the architecture that the server was started with"
            )
        return tensor.narrow(dimension, start, stop - start)

    def _put(self, named: Sequence[tuple[str, torch.Tensor, torch.Tensor]], version: str | None) -> None:
        """Copies each value to its place in the tensor of that name."""
        if named and not self._missing:
            self._missing = self._sizes()
        with torch.no_grad():
            for name, place, values in named:
                place.copy_(values)
                tensor = self._canonical[name]
                self._missing[tensor] = self._missing.get(tensor, 0) - values.numel()
                if self._missing[tensor] <= 0:
                    del self._missing[tensor]
        self._announced = version if version is not None else self._announced
        if self._announced is not None and not self._missing:
            self.version, self._announced = self._announced, None

    def load_checkpoint(self, path: Path, version: str | None) -> None:
        """Takes all tensors of a checkpoint, as one whole update; None keeps the version's name.

        Raises:
            RapoError: the checkpoint is not of this model; nothing has changed then.
        """
        if self._released:
            raise RapoError("the memory of the weights is released; resume it (/resume_memory_occupation)")
        loaded = read_checkpoint(path, self._shapes)
        with torch.no_grad():
            for name, values in loaded.items():
                self._tensors[name].copy_(values)
        self._missing = {}
        self.version = self.version if version is None else version

    def rename(self, version: str) -> None:
        """Calls the weights by another name.

        Raises:
            RapoError: they are not whole, so that no name is theirs.
        """
        if problem := self.problem():
            raise RapoError(problem)
        self.version = version

    def release(self) -> None:
        """Gives their memory back."""
        self._tensors = {}  # parts of what the model computes with would keep its memory
        for values in self._own.values():
            values.data = values.data.new_empty(0)
        self._released = True

    def resume(self) -> None:
        """Takes memory again, whose contents are of no use until a whole update has come."""
        if self._released:
            for name, values in self._own.items():
                values.data = values.data.new_empty(self._own_shapes[name])
            self._tensors = self._published()
            self._released, self._missing = False, self._sizes()

    def _published(self) -> dict[str, torch.Tensor]:
        return dict(published(self._own, self._model_type))

    def _sizes(self) -> dict[str, int]:
        """How many numbers each tensor has."""
        return {name: values.numel() for name, values in self._tensors.items()}

    def checksums(self) -> dict[str, int]:
        """`tensor_checksum` of each tensor, in the model's type; tied ones under their first name.

        Raises:
            RapoError: the memory is released.
        """
        if self._released:
            raise RapoError("the memory of the weights is released; there is nothing to sum up")
        return {name: tensor_checksum(values) for name, values in self._tensors.items()}


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    first, more = ordered[:3], ordered[3:]
    return ", ".join(first) + (", …" if more else "")
