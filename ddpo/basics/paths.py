"""The one rule for paths in configs, forms and commands."""

from __future__ import annotations

import os
import re

from ddpo.errors import ConfigError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})", re.ASCII)
_LOCAL = ("", "file", "local")


def expand(path: str) -> str:
    """Return a path with a leading `~`, and every `$NAME` and `${NAME}`, replaced.

    Where a path is used, not where it is recorded: a worker on another machine has its own home.

    Args:
        path: A path, or a URL, which has a home only if it is a local file's.

    Raises:
        ConfigError: It names a variable that is not set, or contains a NUL character.
    """
    if "\0" in path:
        raise ConfigError(f"the path {path!r} contains a NUL character; leave it out")
    scheme, separator, place = path.rpartition("://")

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name not in os.environ:
            raise ConfigError(
                f"the path {path!r} has {found[0]}, and there is no environment variable {name!r}; "
                "set it, or write the path without it"
            )
        return os.environ[name]

    place = _VARIABLE.sub(value, place)
    if scheme in _LOCAL:
        place = os.path.expanduser(place)  # noqa: PTH111  # pathlib's refuses unknown users
    return scheme + separator + place
