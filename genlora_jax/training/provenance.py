"""Where a result comes from: versions, commit, machine and data."""

import contextlib
import hashlib
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genlora_jax.hf.tensorfile import TensorFile
from genlora_jax.storage import storage_path

SAMPLES, SAMPLE = 16, 256  # of a tensor: how many places, and their bytes

PACKAGES = (
    *("genlora_jax", "jax", "flax", "optax", "numpy"),
    *("safetensors", "torch", "transformers", "peft"),
)


def provenance() -> dict[str, Any]:
    """Versions of the installed packages, commit (and whether it is clean) and machine."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    devices = jax.devices()
    return {
        "versions": versions,
        "commit": _commit(),
        "machine": f"{len(devices)} {devices[0].device_kind}, {os.cpu_count()} cores, "
        f"{platform.machine()}",
    }


def digest(file: str | Path) -> str | None:
    """SHA-256 of a file; None for a data set that is no file."""
    if not storage_path(file).is_file():
        return None
    with storage_path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def checkpoint_digest(directory: Path) -> str:
    """A digest of a checkpoint's tensors: of names, dtypes, shapes and bytes at some places.

    A model trained otherwise differs nearly everywhere, so that gigabytes need not be read. How
    the tensors are distributed over files does not matter.
    """
    digests = []
    for file in sorted(directory.glob("*.safetensors")):
        opened = TensorFile(file)
        entries = sorted(opened.entries.items(), key=lambda item: item[1].start)
        ends = [entry.start for _, entry in entries[1:]] + [opened.size]
        places = []
        for (_, entry), end in zip(entries, ends, strict=True):
            last, count = max(end - SAMPLE, entry.start), min(SAMPLE, end - entry.start)
            starts = np.linspace(entry.start, last, SAMPLES, dtype=np.int64)
            places += [(int(start), count) for start in starts]
        pieces = iter(opened.pieces(places))
        for name, entry in entries:
            found = hashlib.sha256(f"{name} {entry.kind} {entry.shape}".encode())
            for _ in range(SAMPLES):
                found.update(next(pieces))
            digests.append(f"{name} {found.hexdigest()}")
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:16]


def _commit() -> str:
    """The commit, or GENLORA_COMMIT where the sources are outside a repository."""
    git = ["git", "describe", "--always", "--dirty"]
    if commit := os.environ.get("GENLORA_COMMIT"):
        return commit
    try:
        return subprocess.run(
            git, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
