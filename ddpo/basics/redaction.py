"""Keeping credentials out of what people and logs get to read."""

from __future__ import annotations

import re

HIDDEN = "***"

USER_INFO = re.compile(r"(?<=://)[^@\s]+@")
_QUERY = re.compile(r"(\w+://[^\s?#]+)\?[^\s#]*")


def hide_credentials(text: str) -> str:
    """Returns a text whose URLs carry neither user, password nor query (signed URLs sign there)."""
    return _QUERY.sub(r"\1", USER_INFO.sub(f"{HIDDEN}@", text))
