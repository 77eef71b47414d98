"""Reinforcement learning for text-to-image diffusion models (DDPO, arXiv 2305.13301).

This package is the library: it uses neither Prefect nor MLflow. ``tasks/`` and ``flows/`` do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ddpo.basics.version import VERSION as __version__

if TYPE_CHECKING:
    from ddpo.analysis.history import open_history

__all__ = ["__version__", "open_history"]


def __getattr__(name: str) -> Any:
    """Import what notebooks use when it is asked for: `import ddpo` itself loads nothing heavy."""
    if name == "open_history":
        from ddpo.analysis.history import open_history

        return open_history
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
