"""Who may speak to an engine: this machine, or whoever has the key.

The key is a secret: it travels in the environment, not in the configuration.
"""

from __future__ import annotations

import ipaddress
import os

API_KEY_VARIABLE = "RAPO_ENGINE_API_KEY"


def api_key_from_environment() -> str | None:
    """The key, or None where the variable is unset or empty."""
    return os.environ.get(API_KEY_VARIABLE) or None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches this host name or address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
