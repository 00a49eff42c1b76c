"""What a method learnt of its run, as a checkpoint keeps it."""

from __future__ import annotations

import json
from typing import Any

from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.user_code import own_traceback, place_of


def saved_state(method: Method) -> Any:
    """The method's state as JSON gives it back.

    Raises:
        RapoError: it cannot be asked for, or JSON cannot hold it.
    """
    try:
        state = method.state()
    except Exception as error:  # of the user's own code
        raise RapoError(f"state of {named(method)} fails; mend it:\n{own_traceback(error)}") from error
    try:
        kept = json.loads(json.dumps(state, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RapoError(
            f"state of {named(method)} cannot be saved with a checkpoint: {error}; return numbers, texts, "
            "lists and dictionaries"
        ) from error
    if kept != state:
        raise RapoError(
            f"state of {named(method)} would not come back from a checkpoint as it was: {state!r:.200} as "
            f"{kept!r:.200}; return dictionaries with text keys, and lists in place of tuples"
        )
    return kept


def restore_state(method: Method, state: Any) -> None:
    """Gives a method the state that was saved.

    Raises:
        RapoError: it does not take it.
    """
    try:
        method.restore(state)
    except Exception as error:  # of the user's own code
        raise RapoError(
            f"restore of {named(method)} does not take the state {state!r:.200} that was saved; mend it:\n"
            f"{own_traceback(error)}"
        ) from error


def named(method: Method) -> str:
    """A method by name and place, for errors."""
    return f'method "{method.options.method}" ({place_of(type(method))})'
