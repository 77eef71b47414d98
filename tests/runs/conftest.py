from __future__ import annotations

from tests.store.conftest import local_store, spawn

__all__ = ["local_store", "spawn"]
