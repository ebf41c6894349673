"""Paths, on this machine or in a bucket: `gs://` and `s3://` URLs beside local ones."""

import os
from typing import Any

REMOTE = ("gs://", "s3://")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of an object store."""
    return os.fspath(path).startswith(REMOTE)


def storage_path(path: str | os.PathLike[str]) -> Any:
    """A path with the methods of `pathlib.Path`, wherever it leads."""
    from etils import epath  # only where something is read or written

    if is_remote(path):
        import fsspec

        # What other processes write is seen: a listing is never older than the question.
        for protocol in ("gs", "gcs", "s3"):
            fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return epath.Path(path)
