"""Files and directories that appear whole or not at all, and directories held by one process."""

import contextlib
import errno
import fcntl
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

WRITTEN = ".genlora.json"  # lists the files of a directory that `new_directory` made
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
    path = Path(path)
    recover(path)
    refuse_inside(path, inputs)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: choose another output or pass overwrite (--overwrite in a command)"
        )
    if path.exists() and (foreign := _foreign_file(path)):
        raise FileExistsError(
            f"{path} is not overwritten, as nothing says that genlora wrote {foreign}: choose "
            "another output, or move away what is there"
        )
    refuse_unwritable(path)
    if _being_written(path):
        raise FileExistsError(
            f"{path} is being written by another command: wait for its end, or choose another "
            "output"
        )


def refuse_inside(path: Path, inputs: tuple[str | None, ...]) -> None:
    """Raises FileExistsError if `path` is, or lies in, one of the directories that are read."""
    for source in inputs:
        inside = source and path.resolve().is_relative_to(Path(source).resolve())
        if inside and Path(str(source)).is_dir():
            raise FileExistsError(
                f"{path} is, or lies in, {source}, which is read: choose another output"
            )


def _foreign_file(path: Path) -> Path | None:
    """What overwriting a directory would lose that `new_directory` did not make; or None."""
    if not path.is_dir():
        return path
    try:
        written = {*json.loads((path / WRITTEN).read_text()), WRITTEN}
    except (OSError, ValueError, TypeError):
        written = ADAPTER
    return next((path / name for name in _files(path) if name not in written), None)


def _files(path: Path) -> list[str]:
    """All files and links below a directory, and empty directories, by their paths from there."""
    found = []
    for place, directories, names in os.walk(path):
        links = [name for name in directories if Path(place, name).is_symlink()]
        empty = [] if directories or names or place == str(path) else [""]
        found += [os.path.relpath(Path(place, name), path) for name in names + links + empty]
    return sorted(found)


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

    What a killed process leaves, `recover` puts right.

    Args:
        path: The directory to make.
        overwrite: Replace what is there; it stays until the new one is complete.

    Raises:
        FileExistsError: As `refuse_existing` does.
        OSError: If its parent cannot be made or written, or the disk is full.
    """
    path = Path(os.path.realpath(path))
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = Path(tempfile.mkdtemp(dir=path.parent, prefix=_hidden_prefix(path)))
    new = hidden / "new"
    try:
        with locked(hidden):
            new.mkdir()
            yield new
            if not {*(names := _files(new))} <= ADAPTER:
                (new / WRITTEN).write_text(json.dumps(names, indent=1) + "\n")
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


def write_whole(file: Path, text: str) -> None:
    """Writes a text file that is replaced whole or not at all."""
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
