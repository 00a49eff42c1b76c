"""What was published, a line a publication: `published.jsonl` in the run's directory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_rapo.errors import RapoError
from megatron_rapo.folder import writing_file

FILE = "published.jsonl"


@dataclass(frozen=True)
class Publication:
    """One publication.

    Attributes:
        version: of the weights.
        dtype: that they were sent in.
        digest: of all tensors' checksums.
        seconds: until the engines served it.
        engines: how many received it.
        difference: the largest mean |engine − trainer log-prob| of the greedy probe, in nats.
    """

    version: int
    dtype: str
    digest: str
    seconds: float
    engines: int
    difference: float


def digest(checksums: Mapping[str, int]) -> str:
    """One value of all tensors' checksums."""
    text = "".join(f"{name} {value}\n" for name, value in sorted(checksums.items()))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Record:
    """The publications of a run, its earlier starts included."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / FILE
        self._end = 0  # of the last whole line, in bytes
        self._digests = self._read()

    def check(self, version: int, dtype: str, found: str) -> None:
        """Weights of a checkpoint must be those that were published when it was made.

        The classic fault after a resume is to send the reference, or the model that training began with.

        Raises:
            RapoError: they are not.
        """
        earlier = self._digests.get((version, dtype))
        if earlier is not None and earlier != found:
            raise RapoError(
                f"the weights of step {version} are not those that were published after that step before "
                f"(digest {found} in place of {earlier} in {self._file}): the checkpoint is damaged or of "
                f"another run; go on from another one, or remove {self._file.name} if that is on purpose"
            )

    def add(self, publication: Publication) -> None:
        """Appends a publication."""
        line = (json.dumps(asdict(publication)) + "\n").encode()
        with writing_file(self._file), self._file.open("ab") as lines:
            if lines.tell() > self._end:  # half a line of an earlier start
                lines.truncate(self._end)
            lines.write(line)
        self._end += len(line)

    def _read(self) -> dict[tuple[int, str], str]:
        """The last digest of each version and type."""
        digests: dict[tuple[int, str], str] = {}
        if not self._file.is_file():
            return digests
        for number, line in enumerate(self._file.read_bytes().splitlines(keepends=True), 1):
            if not line.endswith(b"\n"):
                break  # The run ended, or its disk was full, while it wrote this line.
            self._end += len(line)
            try:
                entry = json.loads(line)
                digests[int(entry["version"]), str(entry["dtype"])] = str(entry["digest"])
            except (ValueError, KeyError, TypeError) as error:
                raise RapoError(
                    f"{self._file}, line {number} is no publication ({error!r}); remove it"
                ) from error
        return digests
