"""Paths, on this machine or in a bucket: `gs://` and `s3://` URLs beside local ones."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

REMOTE = ("gs://", "s3://")
URL = re.compile(r"[A-Za-z][\w+.-]+:/")  # nor `C:/`, nor `ID:SPLIT`
WRITTEN = ".genlora.json"  # lists the files of a directory that `atomic_files` made


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of an object store.

    Raises:
        ValueError: If it is another URL, which would else be taken for a local path.
    """
    text = os.fspath(path)
    if text.startswith(REMOTE):
        return True
    if URL.match(text):
        raise ValueError(
            f"{text}: of URLs, gs:// and s3:// are read and written (as str: Path drops a slash)"
        )
    return False


def storage_path(path: str | os.PathLike[str]) -> Path:
    """A path with the methods of `pathlib.Path`, wherever it leads."""
    if not is_remote(path):
        return Path(path)
    from genlora_jax.remote_path import RemotePath  # only where something is read or written

    remote: Any = RemotePath(path)
    return remote


def copy_file(source: Any, target: Any) -> None:
    """Copies a file's content, from wherever it is to wherever it is to be."""
    if is_remote(source) or is_remote(target):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copyfile(source, target)


def size_and_version(path: Path) -> tuple[int, str]:
    """A file's bytes, and what differs once it is written anew: its time, or what a bucket says.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if is_remote(path):
        size, version = path.size_and_version()  # type: ignore[attr-defined]
        return int(size), str(version)
    found = path.stat()
    return found.st_size, str(found.st_mtime)


def listed(url: str | os.PathLike[str]) -> list[str]:
    """The names of all objects below a URL, from there on, in order."""
    from genlora_jax.remote_path import file_system, naming

    with naming(url):
        found = file_system(url).find(os.fspath(url))
    prefix = os.fspath(url).partition("://")[2].rstrip("/") + "/"
    return sorted(name.removeprefix(prefix) for name in found if name.startswith(prefix))
