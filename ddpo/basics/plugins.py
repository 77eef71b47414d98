"""Find what a config names, by registered name, entry point or import path, and check parameters.

Rewards and prompt sets share one lookup and one check of parameters. Nothing is called before its
parameters are known to fit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import inspect
import sys
import tokenize
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from pydantic import JsonValue, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from ddpo.basics import trust
from ddpo.basics.digests import canonical_json
from ddpo.errors import ConfigError


@dataclass(frozen=True)
class Plugin:
    """Something that a config names, imported but not yet called."""

    kind: str
    """What it is, for messages, such as ``"reward"``."""
    name: str
    """The name in the config."""
    target: Any
    """The class, function or object."""
    module: str
    """The module in which it was looked up."""


@dataclass(frozen=True)
class CheckedParameters:
    """Parameters that fit the signature for which they were checked."""

    values: Mapping[str, Any]
    """The given parameters, converted to the annotated types; to be passed by keyword."""
    identity: Mapping[str, JsonValue]
    """All parameters in force, including defaults, as plain JSON. Spelling out a default makes no
    difference. A default that JSON cannot represent is left out."""


def resolve(kind: str, name: str, registered: Mapping[str, str], group: str) -> Plugin:
    """Import what a name stands for.

    Args:
        kind: What is looked up, for messages: ``"reward"``.
        name: A key of ``registered``, the name of an entry point of ``group``, or an import path
            ``package.module:attribute``.
        registered: The project's own, name to import path. They take precedence over entry points.
        group: Entry point group in which other packages register theirs.

    Raises:
        ConfigError: There is no such name (the nearest is suggested), module or attribute; the
            import fails; or two packages claim an entry point.
        NotTrusted: A stored run that is not trusted names an import path other than theirs.
    """
    if ":" in name:
        return _import_named(kind, name, {*registered.values(), *_values(group)})
    if name in registered:
        return _import_plugin(kind, name, registered[name])
    found = [point for point in entry_points(group=group) if point.name == name]
    if len({point.value for point in found}) > 1:
        raise ConfigError(
            f"{kind} {name!r} is claimed by {' and '.join(map(_origin, found))}; "
            "use the import path of the one you mean"
        )
    if found:
        return _import_plugin(kind, name, found[0].value)
    names = available(registered, group)
    raise ConfigError(
        f"there is no {kind} {name!r}{_did_you_mean(name, names)} Known: {', '.join(names)}. "
        "Name one of your own by its import path: 'my_package.my_module:attribute'"
    )


def available(registered: Mapping[str, str], group: str) -> tuple[str, ...]:
    """Return the registered names and those of entry points, sorted."""
    return tuple(sorted({*registered, *(point.name for point in entry_points(group=group))}))


def check_parameters(
    what: str,
    factory: Callable[..., Any],
    parameters: Mapping[str, Any],
    taken: Iterable[str] = (),
) -> CheckedParameters:
    """Check parameters against the signature of a function or class, without calling it.

    Types are checked strictly, as JSON: 1 is a float, and a list is a tuple, but "3" is not an int.
    A parameter without an annotation accepts anything.

    Args:
        what: Whose parameters they are, for messages: ``"reward 'jpeg_compressibility'"``.
        factory: The function or class that will be called with them.
        parameters: From the config.
        taken: Names that the caller passes itself, which a config cannot set.

    Raises:
        ConfigError: A parameter is unknown (the nearest is suggested), missing, or of a wrong type.
    """
    signature = _signature(what, factory)
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind in by_keyword and name not in set(taken)
    }
    rest = next((p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    hints = type_hints(what, factory, [*known.values(), *([rest] if rest else [])])

    values: dict[str, Any] = {}
    identity: dict[str, JsonValue] = {}
    for name, given in parameters.items():
        if name not in known and (rest is None or name in signature.parameters):
            takes = f"It takes: {', '.join(known)}." if known else "It takes none."
            raise ConfigError(
                f"{what} takes no parameter {name!r}{_did_you_mean(name, known)} {takes}"
            )
        annotation = hints.get(name if rest is None or name in known else rest.name, Any)
        values[name], identity[name] = _convert(what, name, annotation, given)

    missing = [n for n, p in known.items() if p.default is p.empty and n not in values]
    if missing:
        raise ConfigError(
            f"{what} needs {', '.join(map(repr, missing))}; set it under its `parameters`"
        )
    for name, parameter in known.items():
        if name in values:
            continue
        # A default without a JSON form (an object, an infinity) is pinned by the code's version.
        with contextlib.suppress(PydanticSerializationError, PydanticUserError, ValueError):
            adapter: TypeAdapter[Any] = TypeAdapter(hints.get(name, Any))
            default = adapter.dump_python(parameter.default, mode="json", warnings=False)
            canonical_json(default)
            identity[name] = default
    return CheckedParameters(values=values, identity=dict(sorted(identity.items())))


def _values(group: str) -> Iterable[str]:
    return (point.value for point in entry_points(group=group))


def _import_named(kind: str, name: str, known: Iterable[str]) -> Plugin:
    """Import what an import path names, if its author is trusted to name that code."""
    if name in known:
        return _import_plugin(kind, name, name)
    what = f"{kind} {name!r}"
    trust.check_module(what, name.partition(":")[0])
    plugin = _import_plugin(kind, name, name)
    # A trusted module may have imported the attribute from one that is not: 'mine:os.system'.
    target = inspect.unwrap(plugin.target) if callable(plugin.target) else plugin.target
    trust.check_module(what, getattr(target, "__module__", None) or type(target).__module__)
    return plugin


def _import_plugin(kind: str, name: str, path: str) -> Plugin:
    module_name, _, attribute_path = path.partition(":")
    attributes = attribute_path.split(".")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attributes)):
        raise ConfigError(
            f"{kind} {name!r} is not an import path; write 'my_package.my_module:attribute'"
        )
    module = _import_module(kind, name, module_name)
    target: Any = module
    for attribute in attributes:
        try:
            target = getattr(target, attribute)
        except AttributeError:
            public = [other for other in dir(target) if not other.startswith("_")]
            raise ConfigError(
                f"{kind} {name!r}: {module_name} ({getattr(module, '__file__', 'built in')}) has "
                f"no {attribute_path!r}{_did_you_mean(attribute, public)}"
            ) from None
    return Plugin(kind=kind, name=name, target=target, module=module_name)


_SOURCES: weakref.WeakKeyDictionary[ModuleType, tuple[ModuleSpec | None, str]] = (
    weakref.WeakKeyDictionary()
)


def module_source(module: ModuleType) -> str:
    """Return a module's source as it was imported; what a config names is read with its import.

    Raises:
        OSError: There is no Python source.
        TypeError: The module is built in.
        SyntaxError: Its encoding is unknown.
    """
    spec, source = _SOURCES.get(module, (None, None))
    if source is not None and spec is module.__spec__:  # reloading creates a new spec
        return source
    path = inspect.getsourcefile(module)
    if path is None:
        raise OSError("there is no Python source")
    with tokenize.open(path) as file:  # normalises encoding and line ends
        source = file.read()
    _SOURCES[module] = (module.__spec__, source)
    return source


def _import_module(kind: str, name: str, module_name: str) -> ModuleType:
    try:
        module = importlib.import_module(module_name)
        with contextlib.suppress(OSError, TypeError, SyntaxError):
            module_source(module)  # now: the file may be edited before it is asked for
        return module
    except ModuleNotFoundError as error:
        itself = error.name and f"{module_name}.".startswith(f"{error.name}.")
        if not itself:
            raise ConfigError(
                f"{kind} {name!r}: {module_name} imports {error.name!r}, which is not installed; "
                f"install it in the environment of ddpo ({sys.executable})"
            ) from error
        raise ConfigError(
            f"{kind} {name!r}: there is no module {error.name!r}; install the package that has "
            "it, or put its folder on the path: PYTHONPATH=/path/to/folder"
        ) from error
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{kind} {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error


def _signature(what: str, factory: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{what}: {factory!r} has no signature to check parameters against ({error}); name a "
            "class or a function written in Python"
        ) from error


def type_hints(
    what: str,
    factory: Callable[..., Any],
    parameters: Iterable[inspect.Parameter],
    include_extras: bool = True,
) -> dict[str, Any]:
    """Evaluate the annotations of parameters.

    Only these: others may name what is imported for type checkers alone. A dataclass's field is
    evaluated in the module of the class that declares it, which may be a base from elsewhere.

    Args:
        what: Whose parameters they are, for messages.
        factory: The function or class that takes them.
        parameters: Those to evaluate; ones without an annotation are left out.
        include_extras: Whether to keep `Annotated`.

    Returns:
        Types by parameter name.

    Raises:
        ConfigError: An annotation cannot be evaluated.
    """
    hints: dict[str, Any] = {}
    for parameter in parameters:
        if parameter.annotation is parameter.empty:
            continue

        def holder() -> None: ...

        holder.__annotations__ = {parameter.name: parameter.annotation}
        names = _names_around(factory, parameter.name)
        try:
            hints |= typing.get_type_hints(holder, globalns=names, include_extras=include_extras)
        except Exception as error:
            raise ConfigError(
                f"{what}: cannot evaluate its annotations: {error}; import at run time what they "
                "name"
            ) from error
    return hints


def _names_around(factory: Callable[..., Any], parameter: str) -> dict[str, Any]:
    """Return the globals of the module in which a parameter was written."""
    if inspect.isroutine(factory):
        return getattr(inspect.unwrap(factory), "__globals__", {})
    if inspect.isclass(factory) and dataclasses.is_dataclass(factory):
        for base in inspect.getmro(factory):
            if parameter in inspect.get_annotations(base):
                return vars(sys.modules[base.__module__])
    constructor = inspect.getattr_static(factory, "__init__")
    return getattr(inspect.unwrap(constructor), "__globals__", {})


def _convert(what: str, name: str, annotation: Any, given: Any) -> tuple[Any, JsonValue]:
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        value = adapter.validate_json(to_json(given), strict=True)
        plain = adapter.dump_python(value, mode="json", warnings=False)
        canonical_json(plain)
        return value, plain
    except ValidationError as error:
        wrong = "; ".join(
            "".join(f"[{key!r}]" for key in item["loc"]) + " " * bool(item["loc"]) + item["msg"]
            for item in error.errors()
        )
        raise ConfigError(f"{what}: parameter {name!r} is {given!r}: {wrong}") from None
    except PydanticUserError:
        raise ConfigError(
            f"{what}: parameter {name!r} is annotated {annotation!r}, which a config cannot set; "
            "annotate it with a JSON type, and build the object from that"
        ) from None
    except (PydanticSerializationError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{what}: parameter {name!r} is {given!r}, which JSON cannot represent: {error}"
        ) from None


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name if point.dist else 'an unnamed package'} ({point.value})"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."
