"""Short names of contents: the same content has the same one, wherever it lies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

WHOLE_BYTES = 8 << 20  # files up to this size are read whole
BLOCK_BYTES = 1 << 12
BLOCKS = 1024  # of a large file that is no safetensors

# What makes a tokenizer and its chat template of a HF model directory.
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template*",
    "additional_chat_templates/*",
)


def fingerprint(parts: Iterable[object]) -> str:
    """16 hex digits that differ where a part's text does."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(part).encode()
        digest.update(f"{len(text)}:".encode())
        digest.update(text)
    return digest.hexdigest()


def in_json(value: Any) -> str:
    """One text of nested plain values: the same whatever the order of keys; what JSON lacks by its `repr`."""
    return json.dumps(value, sort_keys=True, default=repr)


def weights_fingerprint(model: Path) -> str:
    """16 hex digits that tell apart the weights of HF model directories, and their configurations."""
    return files_fingerprint([*model.glob("config.json"), *model.glob("*.safetensors")])


def tokenizer_fingerprint(model: Path) -> str:
    """16 hex digits that tell apart tokenizers, their chat templates included."""
    found = {file for pattern in TOKENIZER_FILES for file in model.glob(pattern) if file.is_file()}
    return files_fingerprint(found)


def files_fingerprint(files: Iterable[Path]) -> str:
    """16 hex digits of files' names, sizes and contents.

    Files up to 8 MiB are read whole. Of a larger safetensors file it is the header (names, types and shapes),
    and 4 KiB at the beginning, the middle and the end of every tensor; of another one 1,024 blocks of 4 KiB.
    So models of any size take a second or so, and what trains or converts a model changes it; a change that
    spares all these places goes unseen.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as stream:
            for start, length in _places(file, size):
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()


def _places(file: Path, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of what is read of a file."""
    if size <= WHOLE_BYTES:
        yield 0, size
        return
    if file.suffix != ".safetensors":
        yield from ((block * (size // BLOCKS), BLOCK_BYTES) for block in range(BLOCKS))
        yield size - BLOCK_BYTES, BLOCK_BYTES
        return
    with file.open("rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(data - 8)) if data <= size else {}
            tensors = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, KeyError):
            tensors = []  # it is damaged, which its reader tells
    yield 0, min(data, size)
    for start, stop in tensors:
        for place in (start, (start + stop) // 2, max(start, stop - BLOCK_BYTES)):
            yield data + place, min(BLOCK_BYTES, stop - place)
