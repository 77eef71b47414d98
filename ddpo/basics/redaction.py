"""Keep credentials out of messages and logs."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote

HIDDEN = "***"
NO_PASSWORD = (
    "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD for a server, or what the driver of "
    "a database reads (PGPASSWORD)"
)
"""Where the password of a tracking address belongs."""

_USER_INFO = re.compile(r"(?<=://)[^@\s]+@")
_SECRET = re.compile(r"pass|pwd|secret|token|credential|signature|api_?key", re.IGNORECASE)
_QUERY = re.compile(r"(\w+://[^\s?#]+)\?[^\s#]*")


def hide_credentials(text: str) -> str:
    """Remove user, password and query (where signed URLs are signed) from all URLs in a text."""
    return _QUERY.sub(r"\1", _USER_INFO.sub(f"{HIDDEN}@", text))


def has_password(address: str) -> bool:
    """Return whether a tracking address holds a password, before its host or in its query.

    Args:
        address: A URL of a server or a database; credentials of any other kind go unnoticed.
    """
    scheme, _, place = address.partition("://")
    # Up to the last '@': a password may hold any character.
    user, at, _ = place.rpartition("@")
    holds = at and (":" in unquote(user) or scheme.startswith("http"))
    if holds and not scheme.startswith("sqlite"):  # a path
        return True
    query = parse_qsl(place.partition("?")[2], keep_blank_values=True)
    return any(
        _SECRET.search(value if name == "odbc_connect" else name) is not None
        for name, value in query
    )
