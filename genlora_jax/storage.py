"""Paths, on this machine or in a bucket: `gs://` and `s3://` URLs beside local ones."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

REMOTE = ("gs://", "s3://")
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}
CREDENTIALS = {
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
}
# What libraries say of a bucket, by what it means; in lower case.
SAYINGS = {
    "credentials": ("credentials", "anonymous caller", "unauthenticated", "invalidaccesskeyid"),
    "refused": ("access denied", "accessdenied", "forbidden", "permission_denied", "signature"),
    "bucket": ("bucket does not exist", "nosuchbucket"),
    "unreached": ("could not connect", "cannot connect", "timeout", "unavailable", "slow down"),
}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL of an object store."""
    return os.fspath(path).startswith(REMOTE)


def storage_path(path: str | os.PathLike[str]) -> Any:
    """A path with the methods of `pathlib.Path`, wherever it leads."""
    if not is_remote(path):
        return Path(path)
    from etils import epath  # only where something is read or written there

    _forget_listings()
    return epath.Path(path)


def file_system(url: str | os.PathLike[str]) -> Any:
    """The file system, as fsspec has it, of a bucket's URL."""
    import fsspec

    _forget_listings()
    return fsspec.filesystem(_protocol(url))


def _forget_listings() -> None:
    """What other processes write is seen: no listing is older than the question."""
    import fsspec

    for protocol in ("gs", "gcs", "s3"):
        fsspec.config.conf.setdefault(protocol, {}).setdefault("use_listings_cache", False)


def listed(url: str | os.PathLike[str]) -> list[str]:
    """The names of all objects below a URL, from there on, in order."""
    names = (name.partition("://")[2] or name for name in file_system(url).find(os.fspath(url)))
    prefix = os.fspath(url).partition("://")[2].rstrip("/") + "/"
    return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))


def upload(directory: Path, url: str | os.PathLike[str], names: Iterable[str]) -> None:
    """Writes files of a directory below a URL, one after the other, each of them whole."""
    for name in names:
        file_system(url).put_file(str(directory / name), f"{os.fspath(url)}/{name}")


@contextlib.contextmanager
def reaching(path: str | os.PathLike[str]) -> Iterator[None]:
    """While entered, what keeps a bucket from being reached is raised as an OSError that says so.

    Anything else, such as a missing file, is raised as it is; nothing changes for a local path.
    """
    try:
        yield
    except Exception as error:
        if is_remote(path) and (reason := _unreachable(os.fspath(path), error)):
            raise OSError(reason) from error
        raise


def _unreachable(url: str, error: BaseException) -> str | None:
    """Why a bucket could not be reached, and what to do; None if an error says something else."""
    protocol, bucket = _protocol(url), "/".join(url.split("/")[:3])
    said: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ImportError):
            if PACKAGES[protocol] not in str(cause):
                return None
            return (
                f"{url}: {protocol}:// needs {PACKAGES[protocol]}: pip install "
                f'"genlora_jax[{dict(gs="gcs", s3="s3")[protocol]}]"'
            )
        said.append(f"{type(cause).__module__}.{type(cause).__name__}: {cause}")
        cause = cause.__cause__ or cause.__context__
    text = " ".join(said).lower()
    if not any(name in text for name in ("botocore", "gcsfs", "google", "aiohttp", "kvstore")):
        return None
    meant = next((k for k, words in SAYINGS.items() if any(w in text for w in words)), None)
    advice = {
        "credentials": f"{url}: no valid credentials for {protocol}://: {CREDENTIALS[protocol]}",
        "refused": f"{url}: {bucket} refuses it: these credentials lack the permission, or see "
        "another account's bucket",
        "bucket": f"{url}: there is no bucket {bucket}: create it, or mend the name",
        "unreached": f"{url}: {bucket} cannot be reached ({str(error).splitlines()[0]:.120}): "
        "check network and endpoint, and try again",
    }
    return advice.get(meant or "")


def _protocol(url: str | os.PathLike[str]) -> str:
    return os.fspath(url).partition("://")[0]
