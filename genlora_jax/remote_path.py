"""Files in buckets: read by ranges, several at once, each checked to be as long as it should be.

The file systems of `fsspec` ask again after a 503 or a cut connection, and find credentials. What
they raise at last becomes one message that names the URL.
"""

import contextlib
import fnmatch
import io
import logging
import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec
from etils.epath import gpath

from genlora_jax.threads import in_threads

FIRST = 1 << 16  # bytes of a stream's first request: many files are small, or only looked at
PART = 1 << 24  # of each other request: enough that its time is not that of its answer's first byte
REQUESTS = 8  # at once for one file
AHEAD = 2  # of a stream

PACKAGES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # and the extras that install them
CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
}
ENDPOINT = {"gs": "STORAGE_EMULATOR_HOST", "s3": "AWS_ENDPOINT_URL"}
# Parts of the names of classes of errors that the file systems' libraries have.
NO_CREDENTIALS = ("Credential", "TokenRetrieval", "SSO", "ProfileNotFound", "GoogleAuth", "Refresh")
NO_ANSWER = ("Connect", "Timeout", "HTTPClientError", "ClientError", "ProxyError")
BAD_REQUEST = ("Bad Request", "Bucket is requester pays")  # how a ValueError of gcsfs begins
# What other processes write is seen: a listing is never older than the question.
for _protocol in ("gs", "gcs", "s3"):
    fsspec.config.conf.setdefault(_protocol, {}).setdefault("use_listings_cache", False)
# They would print errors that are raised as well; whoever set logging up sees them still.
for _package, _ in PACKAGES.values():
    logging.getLogger(_package).addHandler(logging.NullHandler())


class RemoteError(OSError):
    """A store did not give what it was asked for."""


class RemotePath(gpath.PosixGPath):
    """A path below `gs://` or `s3://`: one of `epath`, with its own ways of reading."""

    def info(self) -> dict[str, Any] | None:
        """What the store says of a file or directory; None if there is none."""
        with naming(self), contextlib.suppress(FileNotFoundError):
            return dict(file_system(self).info(str(self)))
        return None

    def exists(self) -> bool:
        return self.info() is not None

    def is_file(self) -> bool:
        return (self.info() or {}).get("type") == "file"

    def is_dir(self) -> bool:
        return (self.info() or {}).get("type") == "directory"

    def iterdir(self) -> Iterator["RemotePath"]:
        with naming(self):
            found = file_system(self).ls(str(self), detail=False)
        names = {os.path.basename(name.rstrip("/")) for name in found}
        # A store may list the directory itself, if it has an object of that name.
        yield from (self / name for name in sorted(names - {"", self.name}))

    def glob(self, pattern: str) -> Iterator["RemotePath"]:
        """Files and directories by a pattern whose last part alone has wildcards."""
        directory, _, last = pattern.rpartition("/")
        with contextlib.suppress(FileNotFoundError):
            for path in (self / directory).iterdir():
                if fnmatch.fnmatchcase(path.name, last):
                    yield path

    def size_and_version(self) -> tuple[int, str]:
        """A file's bytes, and what differs between two contents of it: a generation or a digest.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if (found := self.info() or {}).get("type") != "file":
            raise FileNotFoundError(f"{self}: no such file: check the bucket and the path")
        versions = (found.get(name) for name in ("generation", "ETag", "etag", "LastModified"))
        return int(found["size"]), next((str(version) for version in versions if version), "")

    def open(self, mode: str = "r", **options: Any) -> Any:
        """As of `epath`, to write; to read, a stream that asks ahead."""
        if not mode.startswith("r"):
            return super().open(mode, **options)
        stream = io.BufferedReader(_Stream(self._blocks()), FIRST)
        return stream if "b" in mode else io.TextIOWrapper(stream, encoding="utf-8")

    def _blocks(self) -> Iterator[bytes]:
        """The content, in order: blocks are fetched while the one before them is used."""
        size, version = self.size_and_version()

        def block(start: int) -> bytes:
            content = self.read_range(start, min(PART, size - start))
            self.refuse_changed(version)  # or rows of one version would follow those of another
            return content

        yield self.read_range(0, min(FIRST, size))
        if size > FIRST:
            yield from in_threads(block, range(FIRST, size, PART), AHEAD)

    def read_bytes(self) -> bytes:
        size, version = self.size_and_version()
        content = self.read_range(0, size)
        if size > PART:  # one answer is of one version
            self.refuse_changed(version)
        return content

    def read_range(self, start: int, count: int) -> bytes:
        """As many bytes from a position on."""
        content = bytearray(count)
        self.read_into(memoryview(content), start)
        return bytes(content)

    def read_into(self, view: memoryview, start: int) -> None:
        """Fills a view with the bytes from a position on, by several requests at once.

        Raises:
            OSError: If the store does not give them all.
        """

        def fetch(first: int) -> None:
            part = view[first : first + PART]
            at = start + first
            with naming(self):
                got = file_system(self).cat_file(str(self), start=at, end=at + len(part))
            if len(got) != len(part):
                raise RemoteError(
                    f"{self}: {len(got)} bytes came instead of {len(part)}: it was changed while "
                    "it was read, or the connection was cut; run again"
                )
            part[:] = got

        if len(view) <= PART:  # without threads
            for first in range(min(1, len(view))):
                fetch(first)
            return
        for _ in in_threads(fetch, range(0, len(view), PART), REQUESTS):
            pass

    def refuse_changed(self, version: str) -> None:
        """Raises OSError if a file is no longer of the version that it was."""
        if self.size_and_version()[1] != version:
            raise RemoteError(f"{self} was replaced while it was read: run again")

    def at_random(self) -> BinaryIO:
        """The file, to be read from any position: each read is a request."""
        return _Ranges(self)  # type: ignore[return-value]


class _Stream(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._block = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block:
            self._block = memoryview(next(self._blocks, b""))
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._blocks.close()  # type: ignore[attr-defined]
        super().close()


class _Ranges(io.RawIOBase):
    """A file whose bytes are fetched where they are asked for."""

    def __init__(self, file: RemotePath):
        self._file, self._at, self._size = file, 0, file.size_and_version()[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (0, self._at, self._size)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._size - self._at, 0)]
        self._file.read_into(view, self._at)
        self._at += len(view)
        return len(view)


def file_system(url: str | os.PathLike[str]) -> Any:
    """The file system of `fsspec` that a URL is of.

    Raises:
        ValueError: If its package is not installed.
    """
    protocol = os.fspath(url).partition("://")[0]
    package, extra = PACKAGES[protocol]
    try:
        return fsspec.filesystem(protocol)
    except ImportError as error:
        raise ValueError(f'{url} needs {package}: pip install "genlora_jax[{extra}]"') from error


@contextlib.contextmanager
def naming(url: str | os.PathLike[str]) -> Iterator[None]:
    """Has errors of a store name the URL, and say what to do.

    Raises:
        FileNotFoundError: If there is no such bucket or object.
        PermissionError: If the store refuses, or no credentials are found.
        OSError: If the store cannot be reached, or another error is its answer.
    """
    try:
        yield
    except Exception as error:  # the libraries' errors have no common base class
        others = isinstance(error, ValueError) and not str(error).startswith(BAD_REQUEST)
        if others or isinstance(error, RemoteError):
            raise
        raise _named(os.fspath(url), error) from error


def _named(url: str, error: Exception) -> OSError:
    protocol = url.partition("://")[0]
    said = " ".join(str(error).split())[:200] or type(error).__name__
    names = [kind.__name__ for kind in type(error).__mro__]
    code = str(getattr(error, "code", ""))
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(f"{url}: no such bucket or file: check the URL ({said})")
    if code == "401" or any(part in name for part in NO_CREDENTIALS for name in names):
        return PermissionError(f"{url}: no valid credentials: {CREDENTIALS[protocol]} ({said})")
    if isinstance(error, PermissionError) or "Forbidden" in said:
        return PermissionError(
            f"{url}: the store refuses: let this account read, or write, there, or take another: "
            f"{CREDENTIALS[protocol]} ({said})"
        )
    if any(part in name for part in NO_ANSWER for name in names):
        return RemoteError(
            f"{url}: no answer: check the network, and {ENDPOINT[protocol]} if that is set ({said})"
        )
    return RemoteError(f"{url}: {said}")
