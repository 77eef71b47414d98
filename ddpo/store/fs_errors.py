"""Calls to a filesystem, and what their failures are called."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aiohttp import ClientError as ConnectionLost
from aiohttp import ClientPayloadError
from botocore.exceptions import BotoCoreError, IncompleteReadError, ResponseStreamingError
from fsspec.exceptions import FSTimeoutError

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import StoreCallFailed

CALL_ERRORS = (OSError, BotoCoreError, ConnectionLost)
"""What a call raises when it fails: s3fs lets some errors of its own libraries through."""

BROKEN_OFF = (ClientPayloadError, FSTimeoutError, IncompleteReadError, ResponseStreamingError)
"""What a read on S3 raises when the bytes end, or stand still, within the object."""

BROKEN_OFF_WAITS_S = (0.1, 0.5, 1.0, 2.0, None)
"""Seconds before the next try of a read that broke off."""

_T = TypeVar("_T")


def read_whole(read: Callable[[], _T]) -> _T:
    """Read, and again where the bytes broke off: botocore tries only until they begin.

    Args:
        read: Reads from the beginning.

    Returns:
        What `read` returned.
    """
    for wait_s in BROKEN_OFF_WAITS_S:
        try:
            return read()
        except BROKEN_OFF:
            if wait_s is None:
                raise
            time.sleep(wait_s)
    raise AssertionError("the last round returns or raises")


def read_on(file: Any, size: int) -> bytes:
    """Read the next bytes of an open file, and again where they broke off.

    Args:
        file: The file.
        size: How many bytes at most.

    Returns:
        The bytes, none at the end.
    """

    def read() -> bytes:
        try:
            return file.read(size)
        except IndexError as error:
            # s3fs looks into every error's arguments, and that of a time that is up has none.
            if isinstance(error.__context__, FSTimeoutError):
                raise error.__context__ from error.__context__.__cause__
            raise

    return read_whole(read)


@contextmanager
def named_call(call: str, key: str, root: str, *, writes: bool = False) -> Iterator[None]:
    """Turn the errors of a filesystem into one that tells which call on what failed.

    Args:
        call: What is being done, as a verb.
        key: To which object or folder; '' for the whole store.
        root: Of the store.
        writes: Whether it writes: a bucket that is not there is a failure then.

    Raises:
        StoreCallFailed: The call failed.
        FileNotFoundError: Of a call that does not write, as it is: there being nothing is an
            answer, and each call has its own.
    """
    try:
        yield
    except CALL_ERRORS as error:
        if isinstance(error, FileNotFoundError) and not writes:
            raise
        # fsspec's own timeout error has no message.
        cause = error.__cause__ or error if isinstance(error, FSTimeoutError) else error
        reason = f"{type(cause).__name__}: {hide_credentials(str(cause))}"
        # Not chained: its message may contain credentials.
        raise StoreCallFailed(call, key, root, reason, _way_out(error, root)) from None


def _way_out(error: Exception, root: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there, then resume"
    if number == errno.EROFS:
        return "It is mounted read-only: mount it writable, or take another --root"
    if not root.startswith("s3"):
        return "Check the address and the permissions of the root"
    if isinstance(error, PermissionError):
        return (
            "Check the address, the credentials and their permissions (a run needs s3:GetObject, "
            "s3:PutObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload)"
        )
    return (
        "Check that the server is up and its address right (storage.s3.endpoint_url, "
        "AWS_ENDPOINT_URL), and the credentials"
    )
