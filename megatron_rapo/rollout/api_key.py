"""The key that engines may demand. A secret: it travels in the environment, not in the configuration."""

from __future__ import annotations

import os

API_KEY_VARIABLE = "RAPO_ENGINE_API_KEY"


def api_key_from_environment() -> str | None:
    """The key, or None where the variable is unset or empty."""
    return os.environ.get(API_KEY_VARIABLE) or None
