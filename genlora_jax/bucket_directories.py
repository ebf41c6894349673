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
from typing import Any

from genlora_jax.storage import file_system, listed, upload

WRITTEN = ".genlora.json"  # lists the files of a directory that `atomic_files` made
# Without these no reader takes a directory for a model or an adapter.
KNOWN_BY = (WRITTEN, "config.json", "adapter_config.json", "adapter.json", "results.json")


def publish(new: Path, url: str) -> None:
    """Uploads a local directory, its marker included, to replace what is at a URL."""
    beside = _beside(url)
    _remove(file_system(url), beside, listed(beside))
    names = [os.path.relpath(file, new) for file in new.rglob("*") if file.is_file()]
    upload(new, beside, _marker_last(names))
    recover(url)


def recover(url: str) -> None:
    """Finishes what a killed writer had uploaded whole; what it had not, the next `publish` drops.

    For writers alone: while one copies, nobody else may.
    """
    beside, system = _beside(url), file_system(url)
    names = listed(beside)
    if WRITTEN not in names:
        return
    names = [*json.loads(system.cat_file(f"{beside}/{WRITTEN}")), WRITTEN]
    there = listed(url)
    known_by = [name for name in there if PurePosixPath(name).name in KNOWN_BY]
    _remove(system, url, known_by)
    _remove(system, url, set(there) - set(known_by) - set(names))
    for name in _marker_last(names):
        system.cp_file(f"{beside}/{name}", f"{url}/{name}")
    # First the marker, without which the rest is nothing.
    _remove(system, beside, [WRITTEN])
    _remove(system, beside, listed(beside))


def check_writable(url: str) -> None:
    """Raises OSError if nothing can be written where `publish` would begin."""
    system, probe = file_system(url), f"{_beside(url)}/probe"
    system.pipe_file(probe, b"")
    system.rm_file(probe)


def written_by_us(url: str) -> set[str]:
    """The names that the marker lists; none if there is no marker."""
    try:
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


def _remove(system: Any, url: str, names: Iterable[str]) -> None:
    # A removal whose answer got lost is asked for again.
    if paths := [f"{url}/{name}" for name in names]:
        with contextlib.suppress(FileNotFoundError):
            system.rm(paths)
