"""Open the filesystem of a store's address."""

from __future__ import annotations

import os
import re

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from ddpo.basics.loopback import never_proxy_loopback
from ddpo.basics.paths import expand
from ddpo.config.s3 import S3Options
from ddpo.errors import StoreNotWritable


def open_filesystem(root: str, s3: S3Options | None) -> tuple[AbstractFileSystem, str]:
    """Return the filesystem of an address and the root's path on it; read and write nothing.

    Args:
        root: An fsspec URL, or a path (made absolute). Repeated slashes count as one: object stores
            would write below an empty folder name that their listings skip.
        s3: How to connect to a bucket; by default as the AWS environment variables say.

    Raises:
        ConfigError: The address names a variable that is not set.
        StoreNotWritable: The kind of store is unknown, or the address contains credentials, names
            no bucket, or has a segment `.` or `..` that an object store would take literally.
    """
    root = expand(root)
    scheme, _, place = root.partition("://")
    if place and "@" in place and scheme not in ("file", "local"):
        raise StoreNotWritable(
            f"{scheme}://...",
            "its address contains '@', so it seems to hold credentials",
            "Use s3://bucket/prefix, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
            "environment",
        )
    if "::" in root:
        raise StoreNotWritable(
            root, "its address contains '::', which chains filesystems", "Use one without."
        )
    arguments = {}
    if scheme in ("s3", "s3a"):
        if place.startswith("/") or not place:
            raise StoreNotWritable(root, "its address names no bucket", "Use s3://bucket/prefix.")
        for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            if "@" in os.environ.get(name, ""):
                raise StoreNotWritable(
                    root,
                    f"{name} contains '@', so it seems to hold credentials",
                    "Set it to http://host:port, and set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY in the environment",
                )
        arguments = (s3 or S3Options()).filesystem_arguments()
        bundle = s3.bundle if s3 else None
        if bundle and not bundle.is_file():
            raise StoreNotWritable(root, f"ca_bundle {bundle} does not exist", "Check its path.")
    never_proxy_loopback()
    # Other processes write to the same store, so a cached listing would be wrong.
    try:
        fs, path = fsspec.core.url_to_fs(root, use_listings_cache=False, **arguments)
    except (ValueError, ImportError) as error:
        way_out = "Give a folder, or an fsspec URL such as s3://bucket/prefix."
        raise StoreNotWritable(root, str(error), way_out) from error
    if arguments:
        fs.retries = 1  # botocore retries already; combined, there would be 30 attempts
    path = re.sub("/{2,}", "/", path)
    if not isinstance(fs, LocalFileSystem) and {".", ".."} & {*path.split("/")}:
        raise StoreNotWritable(
            root, "its address has a segment '.' or '..'", "Write the address without it."
        )
    return fs, path
