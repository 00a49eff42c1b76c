"""Code of the user's own, named in the configuration as "module:name"."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from megatron_rapo.episode.facts import shown
from megatron_rapo.errors import RapoError

ADDRESS = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
"""How the configuration names an object of a module: `my_rewards:score`, `my_package.rewards:score`."""

_LIBRARY = Path(importlib.__file__).parents[1]
_LIBRARY_PLACES = {
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib")),
    str(Path(sysconfig.get_path("platstdlib"), "lib-dynload")),
}
_CALLERS = (Path(__file__).parent, _LIBRARY / "importlib", _LIBRARY / "asyncio")  # of the user's code
_LONGEST_TRACEBACK = 4000  # characters
_SHOWN = 8  # modules of a folder


def is_named_in(values: Any) -> bool:
    """Whether a text of a configuration's values is such a name."""
    if isinstance(values, Mapping):
        return any(map(is_named_in, values.values()))
    if isinstance(values, list):
        return any(map(is_named_in, values))
    return isinstance(values, str) and ADDRESS.fullmatch(values) is not None


def malformed(address: str) -> str | None:
    """What is wrong with the form of an address, and what may have been meant; None where it has the form."""
    if ADDRESS.fullmatch(address) and ".py:" not in address:
        return None
    module, _, name = address.replace("/", ".").partition(":")
    module = module.strip(".").replace(".py", "") if module.endswith(".py") else module
    if not name and "." in module:
        module, _, name = module.rpartition(".")
    meant = f"{module}:{name}"
    return f'is no address; write "{meant if ADDRESS.fullmatch(meant) else "module:name"}"'


def load(address: str, folders: Sequence[Path], option: str) -> Any:
    """The object that an address names, in a module of one of the folders or of an installed package.

    From then on the folders come on `sys.path` before all that is installed, so that what is in them imports
    its neighbours, but behind Python's own library, for whose modules a file in them must not stand in.

    Args:
        address: `module:name`.
        folders: of the user's own modules (`run.code`).
        option: that holds the address, for errors.

    Raises:
        RapoError: there is no such module or name, or the module fails when it is imported.
    """
    named = f'{option} = "{address}"'
    if wrong := malformed(address):
        raise RapoError(f"{named} {wrong}")
    module_name, _, name = address.partition(":")
    _put_on_path([str(folder) for folder in folders])
    _refuse_a_taken_name(module_name.partition(".")[0], folders, named)
    _refuse_two_of_a_name(module_name, folders, named)
    try:
        with same_folder():
            module = importlib.import_module(module_name)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise RapoError(f"{named}: {_no_module(address, folders)}") from error
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RapoError(
            f"{named}: the module {module_name} fails when it is imported; mend it, or install what it "
            f"needs:\n{own_traceback(error)}"
        ) from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise RapoError(f"{named}: {_no_name(address, vars(module), place_of(module))}") from None


@contextmanager
def same_folder() -> Iterator[None]:
    """Goes back to the working directory, in which paths of the configuration may begin."""
    before = Path.cwd()
    try:
        yield
    finally:
        os.chdir(before)


def ours_or_own(name: str, ours: Mapping[str, Any], folders: Sequence[Path], option: str, what: str) -> Any:
    """What an option calls so: one of ours by its name, or an object of the user's by its address.

    Args:
        name: a name, or `module:name`.
        ours: by name.
        folders: of the user's own modules (`run.code`).
        option: that holds the name, for errors.
        what: they are, for errors: `method`.

    Raises:
        ValueError: there is none of that name.
        RapoError: as from `load`.
    """
    if name in ours:
        return ours[name]
    if ":" in name:
        return load(name, folders, option)
    near = difflib.get_close_matches(name, ours, n=1)
    meant = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f'is no {what}; {meant}choose one of {", ".join(ours)}, or "module:class" of your own')


def in_order(
    found: object,
    parameters: Sequence[str],
    address: str,
    option: str,
    *,
    options: Mapping[str, object] | None = None,
    elsewhere: bool = True,
) -> Callable[..., Any]:
    """What calls a function with positional arguments in this order, and with these options.

    Args:
        found: what `load` returned.
        parameters: the arguments' names.
        address: of it.
        option: that holds the address, for errors.
        options: further arguments, by name.
        elsewhere: whether parameters that are named as all the arguments get them wherever they stand.

    Raises:
        RapoError: it is no function, takes other arguments, or has one of these names where another argument
            would be given.
    """
    named, further = f'{option} = "{address}"', dict(options or {})
    called = f"{address.partition(':')[2]}({', '.join([*parameters, *(f'{name}=…' for name in further)])})"
    if not callable(found):
        raise RapoError(
            f"{named} is {shown(found, typed=False)}, which cannot be called; name a function that takes "
            f"{called}"
        )
    call: Callable[..., Any] = functools.partial(found, **further) if further else found
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # written in C, without one
        return call
    why = _misplaced(signature, parameters) or _refusal(signature, parameters, further)
    if why is None:
        return call
    if elsewhere and _refusal(signature, (), {**dict.fromkeys(parameters), **further}) is None:
        return lambda *arguments: call(**dict(zip(parameters, arguments, strict=True)))
    remedy = "give it these parameters"
    if inspect.isclass(found) and "__call__" in vars(found):
        remedy = f"it is a class: write judge = {found.__name__}() in its module, and name judge"
    raise RapoError(
        f"{named} ({place_of(found)}) takes {signature}, but it is called as {called}: {why}; {remedy}"
    )


def _misplaced(signature: inspect.Signature, parameters: Sequence[str]) -> str | None:
    """Why arguments in this order would go to parameters that are named as others of them."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [name for name, parameter in signature.parameters.items() if parameter.kind in kinds]
    for place, name in enumerate(own[: len(parameters)]):
        if name in parameters and name != parameters[place]:
            return f"its parameter {name} stands where {parameters[place]} is given"
    return None


def _refusal(
    signature: inspect.Signature, arguments: Sequence[object], options: Mapping[str, object]
) -> str | None:
    """Why it cannot be called so."""
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        return str(error)
    return None


def message_of(error: BaseException) -> str:
    """An exception's kind and message, also where the message cannot be made."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return f"{type(error).__name__}, whose message fails"


def place_of(found: object) -> str:
    """The file of a module, class or function, and but for modules the line; or else its name."""
    if isinstance(found, functools.partial):
        return place_of(found.func)
    if callable(found):
        found = inspect.unwrap(found)
    if not (inspect.ismodule(found) or inspect.isclass(found) or inspect.isroutine(found)):
        found = type(found)
    try:
        file = inspect.getsourcefile(found) or inspect.getfile(found)
        line = "" if inspect.ismodule(found) else f":{inspect.getsourcelines(found)[1]}"
    except (TypeError, OSError):
        return getattr(found, "__name__", repr(found))
    return f"{_short(Path(file))}{line}"


def own_traceback(error: BaseException) -> str:
    """The traceback as Python prints it, without the frames that led to the user's code."""
    told = traceback.TracebackException.from_exception(error)
    for part in _chain(told):
        frames = [frame for frame in part.stack if not frame.filename.startswith("<frozen importlib")]
        while frames and any(Path(frames[0].filename).is_relative_to(folder) for folder in _CALLERS):
            del frames[0]
        part.stack = traceback.StackSummary.from_list(frames)
    text = "".join(told.format()).rstrip()
    if len(text) > _LONGEST_TRACEBACK:
        half = _LONGEST_TRACEBACK // 2
        text = f"{text[:half]}\n  […]\n{text[-half:]}"
    return text


def _chain(told: traceback.TracebackException | None) -> Iterator[traceback.TracebackException]:
    """An exception, and those that it came of."""
    if told is not None:
        yield told
        yield from _chain(told.__cause__)
        yield from _chain(told.__context__)


def _put_on_path(folders: Sequence[str]) -> None:
    library = [entry for entry in sys.path if entry in _LIBRARY_PLACES]
    if new := [folder for folder in folders if folder not in sys.path]:
        sys.path[:] = [*library, *new, *(entry for entry in sys.path if entry not in library)]
    importlib.invalidate_caches()


def _refuse_two_of_a_name(module: str, folders: Sequence[Path], named: str) -> None:
    """Of a file and a package by the same name Python takes the package, whichever was meant."""
    parts = module.split(".")
    for folder, depth in product(folders, range(1, len(parts) + 1)):
        package = folder.joinpath(*parts[:depth])
        file = package.with_name(f"{package.name}.py")
        if file.is_file() and (package / "__init__.py").is_file():
            raise RapoError(
                f"{named}: {_short(file)} and the package {_short(package)} have one name, of which Python "
                "takes the package; rename one of them"
            )


def _refuse_a_taken_name(top: str, folders: Sequence[Path], named: str) -> None:
    """Python has one module of a name: that of the folders must not be another than the one in use."""
    theirs = PathFinder.find_spec(top, [str(folder) for folder in folders])
    taken = getattr(sys.modules.get(top), "__spec__", None)
    if top not in sys.modules:
        taken = find_spec(top)  # Python's own comes first
    if theirs is None or taken is None or theirs.origin is None or theirs.origin == taken.origin:
        return
    raise RapoError(
        f"{named}: {_short(Path(theirs.origin))} cannot be imported, since {top} is already the name of "
        f"{taken.origin}; rename yours"
    )


def _no_module(address: str, folders: Sequence[Path]) -> str:
    module, _, name = address.partition(":")
    there = sorted({found for folder in folders for found in _modules(folder)})
    near = difflib.get_close_matches(module, there, n=1)
    meant = f'; did you mean "{near[0]}:{name}"?' if near else "; correct it, or run.code"
    if not folders:
        return f"no module {module} is installed, and run.code names no folder with one{meant}"
    where = " and ".join(map(str, folders))
    has = ", ".join(there[:_SHOWN]) + (", …" if len(there) > _SHOWN else "") if there else "no module"
    return f"there is no module {module} in {where}, which has {has}, and none is installed{meant}"


def _modules(folder: Path) -> Iterator[str]:
    """The modules of a folder and of its packages, one level deep."""
    for file in sorted([*folder.glob("*.py"), *folder.glob("*/*.py")]):
        parts = file.relative_to(folder).with_suffix("").parts
        if all(part.isidentifier() for part in parts) and parts[-1] != "__init__":
            yield ".".join(parts)


def _no_name(address: str, names: dict[str, Any], place: str) -> str:
    module, _, name = address.partition(":")
    own = [key for key, value in names.items() if getattr(value, "__module__", None) == names["__name__"]]
    near = difflib.get_close_matches(name, own, n=1)
    if near:
        return f'{place} has no {name}; did you mean "{module}:{near[0]}"?'
    return f"{place} has no {name}; it has {', '.join(own[:_SHOWN]) or 'nothing of its own'}"


def _short(file: Path) -> str:
    """As seen from the working directory, where the file is below it."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)
