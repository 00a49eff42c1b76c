"""What a method tells of a step, as metrics."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_rapo.episode.facts import checked_facts
from megatron_rapo.errors import RapoError
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.state import named
from megatron_rapo.user_code import own_traceback


def told_by(method: Method) -> Mapping[str, float]:
    """The method's own numbers of the step, as `method/<name>`.

    Raises:
        RapoError: it cannot be asked for them, or returns what cannot be logged.
    """
    what = f"metrics of {named(method)}"
    try:
        told = method.metrics()
    except Exception as error:  # of the user's own code
        raise RapoError(f"{what} fails; mend it:\n{own_traceback(error)}") from error
    found = checked_facts(told, what, group="method", what="metric")
    return {f"method/{name}": number for name, number in found.items()}
