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
    if not Path(file).is_file():
        return None
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
