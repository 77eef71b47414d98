"""Turn the errors of filesystem calls into `StoreCallFailed`, and retry interrupted reads."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fsspec.exceptions import FSTimeoutError

from ddpo.basics.redaction import hide_credentials
from ddpo.errors import StoreCallFailed, StoreRefused, StoreUnavailable

_AIOHTTP, _BOTOCORE = "aiohttp.client_exceptions", "botocore.exceptions"

BROKEN_OFF_WAITS_S = (0.1, 0.5, 1.0, 2.0, None)
"""Seconds before each retry of an interrupted read."""

_T = TypeVar("_T")
_Errors = tuple[type[Exception], ...]


def call_errors() -> _Errors:
    """Return what a failed call raises; s3fs lets some errors of its dependencies through."""
    return (OSError, *_loaded(_BOTOCORE, "BotoCoreError"), *_loaded(_AIOHTTP, "ClientError"))


def broken_off() -> _Errors:
    """Return what a read on S3 raises when the transfer stops or stalls within the object."""
    of_botocore = _loaded(_BOTOCORE, "IncompleteReadError", "ResponseStreamingError")
    return (FSTimeoutError, *of_botocore, *_loaded(_AIOHTTP, "ClientPayloadError"))


def read_whole(read: Callable[[], _T]) -> _T:
    """Call `read`, which reads from the beginning, and retry it if the transfer is interrupted.

    botocore itself only retries until the first bytes arrive.
    """
    for wait_s in BROKEN_OFF_WAITS_S:
        try:
            return read()
        except broken_off():
            if wait_s is None:
                raise
            time.sleep(wait_s)
    raise AssertionError("the last round returns or raises")


def read_on(read: Callable[[], _T]) -> _T:
    """Call `read`, which reads more of an open file, and retry it if the transfer is interrupted.

    A file of s3fs remains where it was when a read fails.
    """

    def read_once() -> _T:
        try:
            return read()
        except IndexError as error:
            # s3fs indexes the arguments of every error, and a timeout error has none.
            if isinstance(error.__context__, FSTimeoutError):
                raise error.__context__ from error.__context__.__cause__
            raise

    return read_whole(read_once)


@contextmanager
def named_call(call: str, key: str, root: str, *, writes: bool = False) -> Iterator[None]:
    """Turn a filesystem's errors into one that names the call and the key that failed.

    Args:
        call: The call, as a verb.
        key: Its object or folder; '' for the whole store.
        root: The store's root.
        writes: Whether the call writes: a missing bucket is a failure then.

    Raises:
        StoreUnavailable: No server answered, or it was busy.
        StoreRefused: The server or the disk did not permit the call.
        StoreCallFailed: The call failed otherwise.
        FileNotFoundError: A call that does not write found nothing; callers handle that themselves.
    """
    try:
        yield
    except call_errors() as error:
        if isinstance(error, FileNotFoundError) and not writes:
            raise
        # fsspec's own timeout error has no message.
        cause = error.__cause__ or error if isinstance(error, FSTimeoutError) else error
        reason = f"{type(cause).__name__}: {hide_credentials(str(cause))}"
        # Not chained: its message may contain credentials.
        raise _kind_of(error)(call, key, root, reason, _way_out(error, root)) from None


def _kind_of(error: Exception) -> type[StoreCallFailed]:
    if isinstance(error, PermissionError):
        return StoreRefused
    lost = (*_loaded(_BOTOCORE, "HTTPClientError"), *_loaded(_AIOHTTP, "ClientError"))
    if isinstance(error, (*lost, FSTimeoutError)):
        return StoreUnavailable
    answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
    busy = answer.get("HTTPStatusCode") in (429, 500, 502, 503, 504)
    return StoreUnavailable if busy else StoreCallFailed


def _loaded(module: str, *names: str) -> _Errors:
    """Return errors of a library; none if it is not loaded, since then it raises none.

    Importing the libraries of S3 takes longer than most commands on a local store.
    """
    found = sys.modules.get(module)
    return tuple(error for name in names if (error := getattr(found, name, None)))


def _way_out(error: Exception, root: str) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "Free some space there, then resume"
    if number == errno.EROFS:
        return "It is mounted read-only: remount it writable, or use another --root"
    if not root.startswith("s3"):
        return "Check the address and the permissions of the root"
    if isinstance(error, PermissionError):
        return (
            "Check the address, the credentials and their permissions (a run needs s3:GetObject, "
            "s3:PutObject, s3:DeleteObject, s3:ListBucket and s3:AbortMultipartUpload)"
        )
    return (
        "Check that the server is running, its address (storage.s3.endpoint_url, "
        "AWS_ENDPOINT_URL) and the credentials"
    )
