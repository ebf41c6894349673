"""Files and directories that appear whole or not at all."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def refuse_existing(path: str | Path, *, overwrite: bool) -> None:
    """Raises OSError if `path` exists and is not to be overwritten, or cannot be made."""
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another output or pass overwrite")
    refuse_unwritable(path)


def refuse_unwritable(path: str | Path) -> None:
    """Raises PermissionError if `path` cannot be made."""
    parent = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(
            f"cannot write to {parent}, where {path} is to be: choose another output"
        )


@contextlib.contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and else is removed.

    Args:
        path: The directory to make.
        overwrite: Replace what is there; it stays until the new one is complete.

    Raises:
        FileExistsError: If `path` exists and is not to be overwritten.
        OSError: If its parent cannot be made or written.
    """
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield temporary
        _open_to_others(temporary)
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-old-"))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open_to_others(directory: Path) -> None:
    """Gives files and directories the modes that the umask allows.

    `mkdtemp` lets in nobody but the owner, and so does safetensors, which writes to a temporary
    file: whoever is to serve the result would be locked out.
    """
    os.umask(mask := os.umask(0o077))  # it can be read only by setting it
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_whole(file: Path, text: str) -> None:
    """Writes a text file that is replaced whole or not at all."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)
