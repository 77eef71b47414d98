"""The identity of a reward: what decides its scores."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from types import ModuleType
from typing import Any

from pydantic import JsonValue

from ddpo.basics.digests import json_digest
from ddpo.basics.plugins import module_source
from ddpo.errors import ConfigError

SOURCE = "source-"
"""What the version of a reward without an attribute ``version`` starts with."""

_LONGEST_NAME = 80  # reward_id is part of one path segment


@dataclass(frozen=True)
class RewardIdentity:
    """Name, parameters, model revisions and version of a reward. Equal identity, equal scores."""

    name: str
    """As in the config: a registered name or an import path."""
    parameters: Mapping[str, JsonValue] = field(default_factory=dict, hash=False)
    """All parameters in force, including defaults, as plain JSON."""
    revisions: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Revision of each model that it runs, by the model's name."""
    version: str = "1"
    """The reward's attribute ``version``, incremented by hand; without one, ``source-`` and a
    digest of the source."""

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 (hex) of all four fields as canonical JSON."""
        return json_digest(asdict(self))

    @property
    def reward_id(self) -> str:
        """Name and digest as part of a storage key: ``[A-Za-z0-9_.-]``, at most 89 characters."""
        return reward_id_of(self.name, self.digest)


def reward_id_of(name: str, digest: str) -> str:
    """Return the id of a reward with this name and digest."""
    return f"{name_in_keys(name)}-{digest[:8]}"


def name_in_keys(name: str) -> str:
    """Return a reward's name as it appears in storage keys.

    That is a letter and up to 79 characters of ``[A-Za-z0-9_.-]``.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    return (plain if re.match("[A-Za-z]", plain) else f"reward{plain}")[:_LONGEST_NAME]


def source_digest(target: Any, modules: Iterable[str] = ()) -> str:
    """Return the sha256 of the source of the module that defines something.

    The digest is that of the code as loaded: an edit shows once the module is imported again or
    reloaded. What the module imports is not included.

    Args:
        target: A class, a function, or an instance (whose class counts).
        modules: Names of further imported modules to include.

    Raises:
        ConfigError: A module's source cannot be read.
    """
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target) if callable(target) else target
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        target = type(target)
    names = {target.__module__, *modules}
    return json_digest({name: _module_source(sys.modules[name]) for name in sorted(names)})


def _module_source(module: ModuleType) -> str:
    try:
        return module_source(module)
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"cannot read the source of {module.__name__} ({error}), which would identify the "
            "reward's version; give the reward an attribute `version`, a string"
        ) from error
