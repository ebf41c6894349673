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

    return epath.Path(path)
