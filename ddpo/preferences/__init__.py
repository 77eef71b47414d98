"""Preference pairs that people made: a prompt, the image they chose, and the one they rejected."""

from ddpo.preferences.files import Pair, PairFiles

__all__ = ["Pair", "PairFiles"]
