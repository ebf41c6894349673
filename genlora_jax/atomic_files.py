"""Files and directories that appear whole or not at all, and directories held by one process."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from genlora_jax.storage import WRITTEN, is_remote, listed, storage_path

ADAPTER = {"adapter.json", "adapter.safetensors"}  # names that nobody else gives need no list


def refuse_existing(
    path: str | Path, *, overwrite: bool, inputs: tuple[str | None, ...] = ()
) -> None:
    """Checks that `new_directory` can make a directory, before the work and not after.

    Args:
        path: The directory to make.
        overwrite: Replace what is there, if all of it was made by `new_directory`.
        inputs: What is read, such as the base and the adapter.

    Raises:
        FileExistsError: If it exists and is not to be overwritten, holds what was not written here,
            is, or lies in, a directory that is read, or is being written.
        PermissionError: If it cannot be made.
    """
    path = storage_path(path)
    _in_bucket().recover(str(path)) if is_remote(path) else recover(path)
    refuse_inside(path, inputs)
    exists = bool(listed(path)) if is_remote(path) else path.exists()
    if exists and not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another output or pass overwrite (--overwrite in a command)"
        )
    if exists and (foreign := _foreign_file(path)):
        raise FileExistsError(
            f"{path} is not overwritten, as nothing says that genlora wrote {foreign}: choose "
            "another output, or move away what is there"
        )
    refuse_unwritable(path)
    if not is_remote(path) and _being_written(path):
        raise FileExistsError(
            f"{path} is being written by another command: wait for its end, or choose another "
            "output"
        )


def _in_bucket() -> Any:
    """What does the same in a bucket."""
    from genlora_jax import bucket_directories  # only where it is used, as most paths are local

    return bucket_directories


def refuse_inside(path: Any, inputs: tuple[str | None, ...]) -> None:
    """Raises FileExistsError if `path` is, or lies in, one of the directories that are read."""
    for source in inputs:
        if not source or is_remote(source) != is_remote(path):
            continue
        inside = path.resolve().is_relative_to(storage_path(source).resolve())
        if inside and storage_path(source).is_dir():
            raise FileExistsError(
                f"{path} is, or lies in, {source}, which is read: choose another output"
            )


def _foreign_file(path: Any) -> Any:
    """What overwriting a directory would lose that `new_directory` did not make; or None."""
    if is_remote(path):
        written = _in_bucket().written_by_us(str(path)) or ADAPTER
        return _first_other(path, listed(path), written)
    if not path.is_dir():
        return path
    try:
        written = {*json.loads((path / WRITTEN).read_text()), WRITTEN}
    except (OSError, ValueError, TypeError):
        written = ADAPTER
    return _first_other(path, _files(path), written)


def _first_other(path: Any, names: Iterable[str], written: set[str]) -> Any:
    return next((path / name for name in names if name not in written), None)


def _files(path: Path) -> list[str]:
    """All files and links below a directory, and empty directories, by their paths from there."""
    found = []
    for place, directories, names in os.walk(path):
        links = [name for name in directories if Path(place, name).is_symlink()]
        empty = [] if directories or names or place == str(path) else [""]
        found += [os.path.relpath(Path(place, name), path) for name in names + links + empty]
    return sorted(found)


def refuse_unwritable(path: str | Path) -> None:
    """Raises PermissionError, or for a bucket another OSError, if `path` cannot be made."""
    if is_remote(path):
        _in_bucket().check_writable(str(path))
        return
    parent = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise PermissionError(
            f"cannot write to {parent}, where {path} is to be: choose another output"
        )


@contextlib.contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `path` when the block ends well, and else is removed.

    What a killed process leaves, `recover` puts right. For a bucket the directory is written on
    this machine, below TMPDIR, and uploaded; see `bucket_directories`.

    Args:
        path: The directory to make.
        overwrite: Replace what is there; it stays until the new one is complete.

    Raises:
        FileExistsError: As `refuse_existing` does.
        OSError: If its parent cannot be made or written, or the disk is full.
    """
    if is_remote(path):
        with _uploaded_directory(os.fspath(path), overwrite) as scratch:
            yield scratch
        return
    path = Path(os.path.realpath(path))
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=_hidden_prefix(path)))
    new = hidden / "new"
    try:
        with locked(hidden):
            new.mkdir()
            yield new
            if not {*_files(new)} <= ADAPTER:
                _list_files(new)
            _open_to_others(new)
            if path.exists():
                if not overwrite:
                    raise FileExistsError(f"{path} was made by something else meanwhile")
                path.rename(hidden / "old")
            new.rename(path)
    except Exception as error:
        if full := disk_full(error):
            raise OSError(f"{full}: {path} was not written; make room there") from error
        raise
    finally:
        _settle(hidden, path)


@contextlib.contextmanager
def _uploaded_directory(url: str, overwrite: bool) -> Iterator[Path]:
    """A temporary directory of this machine, uploaded to a bucket when the block ends well."""
    refuse_existing(url, overwrite=overwrite)
    with scratch_directory() as scratch:
        try:
            yield scratch
            _list_files(scratch)
        except Exception as error:
            if full := disk_full(error):
                raise OSError(
                    f"{full}: {tempfile.gettempdir()} has no room for {url}, which is written "
                    "there and then uploaded; make room, or set TMPDIR"
                ) from error
            raise
        refuse_existing(url, overwrite=overwrite)  # hours may have passed
        _in_bucket().publish(scratch, url)


@contextlib.contextmanager
def scratch_directory() -> Iterator[Path]:
    """A temporary directory for what goes to a bucket; those that killed processes left go."""
    prefix = "genlora-upload-"
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError), locked(left) as sure:
            if sure:
                shutil.rmtree(left)
    scratch = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        with locked(scratch):
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _list_files(directory: Path) -> None:
    """Writes the marker, which lists the directory's files."""
    (directory / WRITTEN).write_text(json.dumps(_files(directory), indent=1) + "\n")


def _settle(hidden: Path, path: Path) -> None:
    """Finishes a replacement that ended between its two renames, and removes what is left of it.

    Between them nothing is at `path`, and the new directory is complete.
    """
    if not path.exists() and (hidden / "old").exists():
        (hidden / "new").rename(path)
    shutil.rmtree(hidden, ignore_errors=True)


def _being_written(path: Path) -> bool:
    """Whether a `new_directory` for this path is open, here or in another process."""
    path = Path(os.path.realpath(path))
    for name in glob.glob(f"{glob.escape(_hidden_prefix(path))}*", root_dir=path.parent):
        try:
            with locked(path.parent / name):
                pass
        except BlockingIOError:
            return True
        except OSError:  # it is gone by now, or not ours
            pass
    return False


def _hidden_prefix(path: Path) -> str:
    return f".{path.name}.genlora-"


def recover(path: str | Path) -> None:
    """Finishes what a killed process left half-done at a directory's place, and tidies up."""
    if is_remote(path):
        return  # a reader must leave it to the next writer: nothing tells whether one is at work
    path = Path(os.path.realpath(path))
    for name in glob.glob(f"{glob.escape(_hidden_prefix(path))}*", root_dir=path.parent):
        hidden = path.parent / name
        # Another process may be at work on it, or it may not be ours to change.
        with contextlib.suppress(OSError), locked(hidden) as sure:
            if sure:
                _settle(hidden, path)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Holds a directory: no other process can, until the block ends or this process does.

    Yields:
        Whether it is held for sure; a file system may not know locks.

    Raises:
        BlockingIOError: If another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _open_to_others(directory: Path) -> None:
    """Gives files and directories the modes that the umask allows.

    `mkdtemp` lets in nobody but the owner, and so does safetensors, which writes to a temporary
    file: whoever is to serve the result would be locked out.
    """
    os.umask(mask := os.umask(0o077))  # it can be read only by setting it
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_whole(file: Any, text: str) -> None:
    """Writes a text file that is replaced whole or not at all."""
    if is_remote(file):
        _in_bucket().write_object(str(file), text.encode())
        return
    temporary = file.with_name(f"{file.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{error.strerror}: {file} was not written") from error
    temporary.replace(file)


def disk_full(error: BaseException) -> str | None:
    """What an error, also of a library that writes files, says of a lack of room; None if not."""
    texts = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    return next((text for text in texts if text in str(error)), None)
