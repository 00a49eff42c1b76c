"""Records out of JSONL and Parquet files, with all their columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from megatron_rapo.config.data import Format
from megatron_rapo.errors import RapoError

_LOOKED_AT = 20  # records that tell a format


def read_records(path: Path, option: str) -> list[dict[str, Any]]:
    """All rows of the file; nested columns are dicts and lists.

    Args:
        path: .jsonl or .parquet.
        option: that names the file, as errors call it.

    Raises:
        RapoError: the file is missing, malformed or empty.
    """
    try:
        records = _read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path)
    except FileNotFoundError as error:
        raise RapoError(f"data file {path} does not exist; correct {option}") from error
    except OSError as error:
        raise RapoError(f"data file {path} cannot be read: {error}; correct {option}") from error
    if not records:
        raise RapoError(f"data file {path} has no rows; point {option} at one with problems")
    return records


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of the lines.

    Raises:
        RapoError: a line is none.
        OSError: the file cannot be read.
    """
    records = []
    with path.open("rb") as lines:  # bytes: only \n ends a line, not the line separators inside of strings
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = line.decode("utf-8-sig")
                record = json.loads(text)
            except (ValueError, RecursionError) as error:  # malformed JSON, or bytes that are not UTF-8
                raise RapoError(
                    f"{path}:{number} is not JSON: {error}; correct or remove the line"
                ) from error
            if not isinstance(record, dict):
                raise RapoError(
                    f"{path}:{number} is not a JSON object but {text[:60]!r}; each line must hold one row's "
                    "fields"
                )
            records.append(record)
    return records


def looks_like(records: Sequence[Mapping[str, Any]]) -> Format | None:
    """The format that the rows' columns are those of, as far as that can be told."""
    for record in records[:_LOOKED_AT]:
        if isinstance(record.get("reward_model"), Mapping) and "prompt" in record:
            return "verl"
        if isinstance(record.get("messages"), list):
            return "messages"
        if "prompt" in record and "label" in record:
            return "slime"
        if isinstance(record.get("question"), str) and "answer" in record:
            return "rows"
    return None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException, ValueError) as error:  # ValueError: text that is not UTF-8
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the file itself; of damaged pages Arrow says so without an error number
        reason = " ".join(str(error).split())
        raise RapoError(f"data file {path} is not valid Parquet: {reason}; write it again") from error
