"""Uploads in parts that a killed process left unfinished in a bucket, where no listing shows them.

They take up room that is paid for, and do no other harm.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import Any

from ddpo.store import keys, objects
from ddpo.store.fs_errors import named_call
from ddpo.store.objects import Store


def abort_uploads(
    store: Store, run_id: str, *, grace: timedelta, dry_run: bool = False
) -> list[str]:
    """Abort a run's unfinished uploads, of which a bucket lists a thousand at a time.

    Args:
        store: The store; on a disk, there are none.
        run_id: The run.
        grace: Uploads that began more recently than this are left alone.
        dry_run: Whether to find them only.

    Returns:
        Keys of the objects that were never completed, sorted.

    Raises:
        StoreCallFailed: A call failed, or is not permitted.
    """
    found, path, *_ = store.connection
    if "s3" not in found.protocol:
        return []
    fs: Any = found  # what follows is specific to s3fs, so not in fsspec's types
    bucket, prefix, _ = fs.split_path(f"{path}/")
    limit = objects.now() - grace
    with named_call("list", "", store.root, writes=True):
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix)
    aborted = []
    for upload in answer.get("Uploads", []):
        key = upload["Key"].removeprefix(prefix)
        if not keys.belongs_to(key, run_id) or upload["Initiated"] >= limit:
            continue
        if not dry_run:
            # Another command may have aborted it.
            with suppress(FileNotFoundError), named_call("delete", key, store.root):
                fs.abort_mpu(bucket, upload["Key"], upload["UploadId"])
        aborted.append(key)
    return sorted(aborted)
