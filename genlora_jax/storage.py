"""Paths, on this machine or in a bucket: `gs://` and `s3://` URLs beside local ones."""

import os
import shutil
from pathlib import Path
from typing import Any

REMOTE = ("gs://", "s3://")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of an object store."""
    return os.fspath(path).startswith(REMOTE)


def storage_path(path: str | os.PathLike[str]) -> Any:
    """A path with the methods of `pathlib.Path`, wherever it leads."""
    if not is_remote(path):
        return Path(path)
    import fsspec  # only where something is read or written

    from genlora_jax.remote_path import RemotePath

    # What other processes write is seen: a listing is never older than the question.
    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)
    return RemotePath(path)


def copy_file(source: Any, target: Any) -> None:
    """Copies a file's content, from wherever it is to wherever it is to be."""
    if is_remote(source) or is_remote(target):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copyfile(source, target)
