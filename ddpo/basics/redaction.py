"""Keep credentials out of messages and logs."""

from __future__ import annotations

import re

HIDDEN = "***"

USER_INFO = re.compile(r"(?<=://)[^@\s]+@")
_QUERY = re.compile(r"(\w+://[^\s?#]+)\?[^\s#]*")


def hide_credentials(text: str) -> str:
    """Remove user, password and query (where signed URLs are signed) from all URLs in a text."""
    return _QUERY.sub(r"\1", USER_INFO.sub(f"{HIDDEN}@", text))
