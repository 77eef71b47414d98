"""A store whose writes stay in memory, so that repair can rebuild before it changes anything."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

from ddpo.basics.digests import sha256_bytes
from ddpo.store import keys
from ddpo.store.backends import Maker
from ddpo.store.objects import Store, StoredObject


class ScratchStore(Store):
    """A store that reads another one, except for hidden keys, and keeps its writes in memory."""

    def __init__(self, below: Store, hidden: Collection[str]) -> None:
        super().__init__(*below.connection)
        self._hidden = frozenset(hidden)
        self.written: dict[str, bytes] = {}
        """What was written, by key."""

    def put(self, stem: str, suffix: str, data: bytes | Maker) -> StoredObject:
        """Keep an object under a key that contains its digest."""
        if not isinstance(data, bytes):
            with tempfile.NamedTemporaryFile(prefix="ddpo-") as file:
                data(Path(file.name))
                data = Path(file.name).read_bytes()
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

    def _copied(self, key: str, copy: IO[bytes] | None) -> str:
        if key not in self.written and key not in self._hidden:
            return super()._copied(key, copy)
        data = self.read(key)
        if copy is not None:
            copy.write(data)
            copy.flush()
        return sha256_bytes(data)

    def _read_into(self, key: str, space: memoryview) -> str:
        if key not in self.written and key not in self._hidden:
            return super()._read_into(key, space)
        data = self.read(key)
        space[:] = data
        return sha256_bytes(data)

    def _size(self, key: str) -> int | None:
        if key in self.written:
            return len(self.written[key])
        return None if key in self._hidden else super()._size(key)
