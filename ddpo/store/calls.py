"""Calls to a filesystem, and what their failures are called."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from aiohttp import ClientError as ConnectionLost
from botocore.exceptions import BotoCoreError

from ddpo.errors import StoreCallFailed
from ddpo.secrets import hide_credentials

CALL_ERRORS = (OSError, BotoCoreError, ConnectionLost)
"""What a call raises when it fails: s3fs lets some errors of its own libraries through."""


@contextmanager
def named_call(call: str, key: str, root: str) -> Iterator[None]:
    """Turn the errors of a filesystem into one that tells which call on what failed.

    Args:
        call: What is being done, as a verb.
        key: To which object or folder; '' for the whole store.
        root: Of the store.

    Raises:
        StoreCallFailed: The call failed.
        FileNotFoundError: As it is: there being nothing is an answer, and each call has its own.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except CALL_ERRORS as error:
        reason = f"{type(error).__name__}: {hide_credentials(str(error))}"
        # Not chained: what it quotes may hold credentials.
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
