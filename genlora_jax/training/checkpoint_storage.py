"""Orbax's checkpoints in buckets, too: it knows `gs://` itself, and is taught `s3://` here."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from orbax.checkpoint import v1 as ocp

from genlora_jax.remote_path import naming
from genlora_jax.storage import is_remote

NO_ANSWER = (  # of TensorStore
    *("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"),
    *("UNAUTHENTICATED", "UNAVAILABLE"),
)


def open_checkpointer(directory: Any, **options: Any) -> Any:
    """Orbax's checkpointer for a directory or a prefix of a bucket.

    In a bucket a checkpoint is complete once it has Orbax's marker, which is written last.

    Args:
        directory: A `storage_path`.
        options: As `orbax.checkpoint.v1.training.Checkpointer` takes them.
    """
    if not is_remote(directory):
        return ocp.training.Checkpointer(directory.absolute(), **options)
    _teach_s3()
    context = ocp.Context()
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    return ocp.training.Checkpointer(str(directory), context=context, **options)


@contextlib.contextmanager
def naming_bucket(directory: Any) -> Iterator[None]:
    """Has what a bucket's libraries raise name the bucket, and say what to do."""
    if not is_remote(directory):
        yield
        return
    with naming(str(directory)):
        try:
            yield
        except ValueError as error:  # as TensorStore's errors are
            if not unreachable(directory, error):
                raise
            refused = "PERMISSION_DENIED" in str(error) or "UNAUTHENTICATED" in str(error)
            raise (PermissionError if refused else OSError)(str(error)) from error


def unreachable(directory: Any, error: Exception) -> bool:
    """Whether an error says that a bucket gave no answer; not that what it holds is damaged."""
    if not is_remote(directory) or isinstance(error, FileNotFoundError):
        return False
    library = type(error).__module__.partition(".")[0]
    said = any(status in str(error) for status in NO_ANSWER)
    return said or isinstance(error, OSError) or library in ("aiohttp", "botocore", "google")


@functools.cache
def _teach_s3() -> None:
    """Has Orbax ask TensorStore for `s3://` where it would refuse the path as a relative one.

    Orbax decides on TensorStore's driver in one function, which knows `gs://` and files. What it
    answers for a bucket of `gs://` holds for one of `s3://` but for the driver's name and settings.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    known: Callable[..., dict[str, Any]] = tensorstore_utils.build_kvstore_tspec

    def build_kvstore_tspec(directory: str, *args: Any, **options: Any) -> dict[str, Any]:
        if not directory.startswith("s3://"):
            return known(directory, *args, **options)
        spec: dict[str, Any] = _of_s3(known(f"gs{directory[2:]}", *args, **options))
        return spec

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _of_s3(spec: Any) -> Any:
    """A spec of TensorStore with the driver of S3 wherever it has that of GCS."""
    if not isinstance(spec, dict):
        return spec
    if "bucket" in spec:
        return {"driver": "s3", "bucket": spec["bucket"], "path": spec["path"], **_s3_server()}
    return {name: _of_s3(value) for name, value in spec.items()}


@functools.cache
def _s3_server() -> dict[str, Any]:
    """What TensorStore does not find out as AWS's own library does: the endpoint, above all."""
    import botocore.session

    session = botocore.session.get_session()
    meta, credentials = session.create_client("s3").meta, session.get_credentials()
    server: dict[str, Any] = {}
    if not (urlsplit(meta.endpoint_url).hostname or "").endswith((".amazonaws.com", ".aws")):
        server = {"endpoint": meta.endpoint_url, "aws_region": meta.region_name or "us-east-1"}
    if credentials is not None and credentials.method == "env":
        # Its search of all places would complain of each that is not there.
        server["aws_credentials"] = {"type": "environment"}
    return server
