"""Products of parameters of which `make test` runs a part, and `make faults` the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def swept(cases: Iterable[tuple[Any, ...]], often: Callable[..., bool]) -> list[Any]:
    """Return cases for `pytest.mark.parametrize`.

    Args:
        cases: The values of each.
        often: Says of its values whether `make test` runs it.
    """
    return [pytest.param(*case, marks=[] if often(*case) else pytest.mark.faults) for case in cases]
