"""A store whose writes stay in memory: to make something again before anything is touched."""

from __future__ import annotations

from collections.abc import Collection

from ddpo.basics.digests import sha256_bytes
from ddpo.store import keys
from ddpo.store.objects import Store, StoredObject


class ScratchStore(Store):
    """Reads what another store holds, but for some keys; keeps what is written to itself.

    Attributes:
        written: What was written, by key.
    """

    def __init__(self, below: Store, without: Collection[str]) -> None:
        super().__init__(below._fs, below._path, below.s3)
        self._without = frozenset(without)
        self.written: dict[str, bytes] = {}

    def put(self, stem: str, suffix: str, data: bytes) -> StoredObject:
        """Keeps an object under a key that carries its digest."""
        digest = sha256_bytes(data)
        key = keys.check_key(f"{stem}-{digest[:12]}{suffix}")
        self.written[key] = data
        return StoredObject(key=key, size=len(data), sha256=digest)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Keeps an object, unless there is one here or in the store below."""
        if self.exists(key):
            return False
        self.written[keys.check_key(key)] = data
        return True

    def read(self, key: str) -> bytes:
        """Reads what is kept here, else what the store below holds."""
        if key in self.written:
            return self.written[key]
        if key in self._without:
            raise self._missing(key)
        return super().read(key)

    def _size(self, key: str) -> int | None:
        if key in self.written:
            return len(self.written[key])
        return None if key in self._without else super()._size(key)
