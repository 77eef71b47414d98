"""Check that a store supports commits before anything is computed."""

from __future__ import annotations

import uuid
from contextlib import suppress

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import StoreCallFailed, StoreNotWritable
from ddpo.store.objects import Store


def probe(store: Store) -> None:
    """Check that a store supports commits: exclusive create, read back, list, delete.

    Leaves the store unchanged.

    Raises:
        StoreNotWritable: One of them failed; the message has the reason.
    """
    folder = ".probe"
    key = f"{folder}/{uuid.uuid4().hex}"
    way_out = "Check the address, the credentials and the permissions of the root"
    try:
        try:
            created = store.put_if_absent(key, b"first")
            refused = not store.put_if_absent(key, b"second")
            found = store.read(key)
            listed = key in store.list(folder, hidden=True)
        except Exception:
            with suppress(Exception):  # the first error is the informative one
                store.delete(key)
            raise
        store.delete(key)
        gone = not store.exists(key)
    except Exception as error:  # any error of a filesystem is reported as the reason
        if isinstance(error, StoreCallFailed):
            reason = f"it could not {error.call}: {error.reason}"
            raise StoreNotWritable(store.root, reason, error.way_out) from None
        reason = f"{type(error).__name__}: {hide_credentials(str(error))}"
        # Not chained: its message may contain credentials.
        raise StoreNotWritable(store.root, reason, way_out) from None
    if not created:
        raise StoreNotWritable(store.root, "it refused to create a new object", way_out)
    if not refused or found != b"first":
        raise StoreNotWritable(
            store.root,
            "it let a second writer overwrite an object that was created exclusively",
            "Use a local disk with hard links, or an object store with conditional puts",
        )
    if not listed:
        raise StoreNotWritable(
            store.root,
            "a listing of a folder does not show an object that was just created in it",
            "Check the address and the permissions of the root, or use another object store",
        )
    if not gone:
        raise StoreNotWritable(store.root, "a deleted object is still there", way_out)
