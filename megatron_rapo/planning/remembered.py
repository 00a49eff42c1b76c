"""Results of methods that a plan asks for again and again."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

Instance = TypeVar("Instance")
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Method = Callable[Concatenate[Instance, Arguments], Result]


def remembered(method: Method[Instance, Arguments, Result]) -> Method[Instance, Arguments, Result]:
    """Keeps a method's results by its positional arguments, in the instance, which does not change.

    `functools.cache` would keep all instances, and hash one at each call.
    """
    name = f"_results_of_{method.__name__}"

    @wraps(method)
    def known(self: Instance, *arguments: Arguments.args, **none: Arguments.kwargs) -> Result:
        results: dict[Any, Result] = self.__dict__.setdefault(name, {})
        if arguments not in results:
            results[arguments] = method(self, *arguments, **none)
        return results[arguments]

    return known


def remembered_by(
    key: Callable[..., Hashable],
) -> Callable[[Method[Instance, Arguments, Result]], Method[Instance, Arguments, Result]]:
    """Likewise, by a key of the arguments: all of them that the result depends on."""

    def decorate(method: Method[Instance, Arguments, Result]) -> Method[Instance, Arguments, Result]:
        name = f"_results_of_{method.__name__}"

        @wraps(method)
        def known(self: Instance, *arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
            results: dict[Any, Result] = self.__dict__.setdefault(name, {})
            which = key(*arguments, **named)
            if which not in results:
                results[which] = method(self, *arguments, **named)
            return results[which]

        return known

    return decorate
