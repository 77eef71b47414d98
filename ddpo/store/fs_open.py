"""From a store's address to a filesystem."""

from __future__ import annotations

import os

import fsspec
from fsspec import AbstractFileSystem

from ddpo.config.s3 import S3Options
from ddpo.errors import StoreNotWritable


def open_filesystem(root: str, s3: S3Options | None) -> tuple[AbstractFileSystem, str]:
    """Find the filesystem of an address; nothing is read or written.

    Args:
        root: An fsspec URL, or a path (made absolute).
        s3: How a bucket is reached; by default as the AWS environment variables say.

    Returns:
        The filesystem, and the path of the root on it.

    Raises:
        StoreNotWritable: No such kind of store is known, or the address holds credentials.
    """
    scheme, _, place = root.partition("://")
    if place and "@" in place and scheme not in ("file", "local"):
        raise StoreNotWritable(
            f"{scheme}://...",
            "its address holds an '@', as one with credentials does",
            "Give s3://bucket/prefix, and AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
            "environment",
        )
    arguments = {}
    if scheme in ("s3", "s3a"):
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            if "@" in os.environ.get(name, ""):
                raise StoreNotWritable(
                    root,
                    f"{name} holds an '@', as an address with credentials does",
                    "Give http://host:port there, and AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY beside it",
                )
        arguments = (s3 or S3Options()).filesystem_arguments()
        bundle = s3.ca_bundle if s3 else None
        if bundle and not bundle.is_file():
            raise StoreNotWritable(root, f"there is no ca_bundle {bundle}", "Check its path.")
    # Other processes write to the same store, so a cached listing is a wrong answer.
    try:
        fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False, **arguments)
    except (ValueError, ImportError) as error:
        way_out = "Give a folder, or an fsspec URL such as s3://bucket/prefix."
        raise StoreNotWritable(root, str(error), way_out) from error
    if arguments:
        fs.retries = 1  # botocore retries already; both together would try 30 times
    return fs, path
