"""What makes two rewards the same one."""

from __future__ import annotations

import functools
import inspect
import re
import sys
import tokenize
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pydantic import JsonValue

from ddpo.basics.digests import json_digest
from ddpo.errors import ConfigError

_LONGEST_NAME = 80  # of reward_id, which becomes part of one path segment


@dataclass(frozen=True)
class RewardIdentity:
    """Name, parameters, model revisions and version of a reward. Equal identity, equal scores.

    Attributes:
        name: As the config has it: a registered name or an import path.
        parameters: Those in force, defaults among them, as plain JSON.
        revisions: Revision of each model that it runs, by the model's name.
        version: Raised by hand where the project (or a user's ``version`` attribute) has one;
            otherwise ``source-`` and a digest of the source.
    """

    name: str
    parameters: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    revisions: Mapping[str, str] = field(default_factory=dict, hash=False)
    version: str = "1"

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 (hex) of all four, over canonical JSON."""
        return json_digest(asdict(self))

    @property
    def reward_id(self) -> str:
        """Name and digest, fit for a storage key: ``[A-Za-z0-9_.-]``, at most 89 characters."""
        return reward_id_of(self.name, self.digest)


def reward_id_of(name: str, digest: str) -> str:
    """Return the id of a reward of this name and digest."""
    return f"{name_in_keys(name)}-{digest[:8]}"


def name_in_keys(name: str) -> str:
    """Return a reward's name as keys of the store have it: ``[A-Za-z0-9_.-]``, 80 characters."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", name)[:_LONGEST_NAME]


def source_digest(target: Any, modules: Iterable[str] = ()) -> str:
    """Return the sha256 over the source of the modules that something was written in.

    Args:
        target: A class, a function, or an instance (its class counts).
        modules: Names of further imported modules to take in.

    Returns:
        The digest. It is that of the code as it was loaded: an edit shows once the module is
        imported anew or reloaded. What those modules import is not in it.

    Raises:
        ConfigError: A module has no source to read.
    """
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target) if callable(target) else target
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        target = type(target)
    names = {target.__module__, *modules}
    return json_digest({name: _module_source(sys.modules[name]) for name in sorted(names)})


_SOURCES: weakref.WeakKeyDictionary[ModuleType, tuple[ModuleSpec | None, str]] = (
    weakref.WeakKeyDictionary()
)


def _module_source(module: ModuleType) -> str:
    spec, source = _SOURCES.get(module, (None, None))
    if source is not None and spec is module.__spec__:  # a reload makes a new spec
        return source
    try:
        path = inspect.getsourcefile(module)
        if path is None:
            raise OSError("it has no Python source")
        with tokenize.open(path) as file:  # any encoding and line ends read alike
            source = file.read()
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"the source of {module.__name__} cannot be read ({error}), so nothing says which "
            "version of the reward it is; give the reward an attribute `version`, a string"
        ) from error
    _SOURCES[module] = (module.__spec__, source)
    return source
