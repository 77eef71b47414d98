"""A store whose writes stay in memory, so that repair can rebuild before it changes anything."""

from __future__ import annotations

from collections.abc import Collection

from ddpo.basics.digests import sha256_bytes
from ddpo.store import keys
from ddpo.store.objects import Store, StoredObject


class ScratchStore(Store):
    """A store that reads another one, except for hidden keys, and keeps its writes in memory."""

    def __init__(self, below: Store, hidden: Collection[str]) -> None:
        super().__init__(*below.connection)
        self._hidden = frozenset(hidden)
        self.written: dict[str, bytes] = {}
        """What was written, by key."""

    def put(self, stem: str, suffix: str, data: bytes) -> StoredObject:
        """Keep an object under a key that contains its digest."""
        digest = sha256_bytes(data)
        key = keys.check_key(f"{stem}-{digest[:12]}{suffix}")
        self.written[key] = data
        return StoredObject(key=key, size=len(data), sha256=digest)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Keep an object, unless there is one in memory or in the store below."""
        if self.exists(key):
            return False
        self.written[keys.check_key(key)] = data
        return True

    def read(self, key: str) -> bytes:
        """Return an object from memory, or else from the store below."""
        if key in self.written:
            return self.written[key]
        if key in self._hidden:
            raise self._missing(key)
        return super().read(key)

    def _size(self, key: str) -> int | None:
        if key in self.written:
            return len(self.written[key])
        return None if key in self._hidden else super()._size(key)
