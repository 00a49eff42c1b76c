"""The day that chat templates are told: one for a whole run, though it goes on the next day."""

from __future__ import annotations

import tomllib
from datetime import UTC, datetime
from pathlib import Path

from megatron_rapo.config.schema import RunConfig
from megatron_rapo.errors import RapoError


def with_date(config: RunConfig, *known: str | None) -> RunConfig:
    """The configuration with a day in `run.date`: its own, or the first one known, or else today's (UTC).

    Without prompts of a chat template it stays as it is: nothing else is told the day.
    """
    if not config.has_chat_data:
        return config
    days = [config.run.date, *known, datetime.now(UTC).date().isoformat()]
    day = next(day for day in days if day is not None)
    return config.model_copy(update={"run": config.run.model_copy(update={"date": day})})


def recorded_date(directory: Path) -> str | None:
    """The day of the run in `directory`, where one began there and tells it.

    Raises:
        RapoError: its config.toml is damaged.
    """
    path = directory / "config.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))["run"].get("date")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RapoError(
            f"{path} cannot be read: {error}; restore the configuration that the run wrote there"
        ) from error
