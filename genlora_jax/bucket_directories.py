"""Directories in buckets that appear whole or not at all.

A bucket has no renames and no locks. A new directory is uploaded beside its place, below
`.NAME.genlora-new/`, and is complete there once its marker is, which comes last. Then the bucket
copies it to its place, where first of all the files by which readers know a directory are removed,
and put back last. A writer that is killed before the marker has changed nothing. After it, the
next writer finishes the copying. What lies beside the place has one name, so it never grows.

Two writers of one place at a time are not kept apart; `training/claims.py` keeps runs apart.
"""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from genlora_jax.remote_path import REQUESTS, file_system, naming
from genlora_jax.storage import WRITTEN, listed
from genlora_jax.threads import in_threads

# Without these no reader takes a directory for a model or an adapter.
REPLACED = ".genlora-replaced.json"  # beside: what was at the place, and goes
KNOWN_BY = (WRITTEN, "config.json", "adapter_config.json", "adapter.json", "results.json")


def upload(directory: Path, url: str, names: Iterable[str]) -> None:
    """Writes files of a local directory below a URL, one after the other, each of them whole."""
    with naming(url):
        for name in names:
            file_system(url).put_file(str(directory / name), f"{url}/{name}")


def write_object(url: str, content: bytes) -> None:
    """Writes an object, whole or not at all."""
    with naming(url):
        file_system(url).pipe_file(url, content)


def publish(new: Path, url: str) -> None:
    """Uploads a local directory, its marker included, to replace what is at a URL."""
    beside = _beside(url)
    remove_objects(beside, listed(beside))
    write_object(f"{beside}/{REPLACED}", json.dumps(listed(url)).encode())
    names = [os.path.relpath(file, new) for file in new.rglob("*") if file.is_file()]
    upload(new, beside, _marker_last(names))
    recover(url)


def recover(url: str) -> None:
    """Finishes what a killed writer had uploaded whole; what it had not, the next `publish` drops.

    For writers alone: while one copies, nobody else may.
    """
    beside, system = _beside(url), file_system(url)
    names = {*listed(beside)} - {REPLACED}
    if WRITTEN not in names:
        return
    with naming(url):
        old = {*json.loads(system.cat_file(f"{beside}/{REPLACED}"))}
    there = [name for name in listed(url) if name in old | names]  # others are somebody else's
    known_by = [name for name in there if PurePosixPath(name).name in KNOWN_BY]
    remove_objects(url, known_by)
    remove_objects(url, {*there} - {*known_by} - names)
    with naming(url):
        for name in _marker_last(names):
            system.cp_file(f"{beside}/{name}", f"{url}/{name}")
    # First the marker, without which the rest is nothing.
    remove_objects(beside, [WRITTEN])
    remove_objects(beside, listed(beside))


def check_writable(url: str) -> None:
    """Raises OSError if nothing can be written where `publish` would begin."""
    write_object(f"{_beside(url)}/probe", b"")
    remove_objects(_beside(url), ["probe"])


def written_by_us(url: str) -> set[str]:
    """The names that the marker lists; none if there is no marker."""
    try:
        with naming(url):
            return {*json.loads(file_system(url).cat_file(f"{url}/{WRITTEN}")), WRITTEN}
    except (FileNotFoundError, ValueError, TypeError):
        return set()


def _beside(url: str) -> str:
    parent, _, name = url.rstrip("/").rpartition("/")
    return f"{parent}/.{name}.genlora-new"


def _marker_last(names: Iterable[str]) -> list[str]:
    """Names in the order in which they are to appear."""
    order = {name: -i for i, name in enumerate(KNOWN_BY)}
    return sorted(names, key=lambda name: (order.get(PurePosixPath(name).name, -99), name))


def remove_objects(url: str, names: Iterable[str]) -> None:
    """Removes objects by their names, in which `rm` of `fsspec` would see patterns."""

    def remove(name: str) -> None:
        # A removal whose answer got lost is asked for again, and finds nothing.
        with contextlib.suppress(FileNotFoundError), naming(f"{url}/{name}"):
            file_system(url).rm_file(f"{url}/{name}")

    for _ in in_threads(remove, names, REQUESTS):
        pass
