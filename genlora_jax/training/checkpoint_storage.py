"""Orbax's checkpoints in buckets, too: it knows `gs://` itself, and is taught `s3://` here.

TensorStore, which writes the arrays, would ask a bucket that answers nothing but 503 for a quarter
of an hour, and wait for ever for one that falls silent. Both are bounded here.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

from orbax.checkpoint import v1 as ocp

from genlora_jax.bucket_directories import remove_objects
from genlora_jax.remote_path import RemoteError, naming
from genlora_jax.storage import is_remote, listed
from genlora_jax.training.processes import is_primary

MARKER = "commit_success.txt"  # Orbax's, the last file of a checkpoint
NO_ANSWER = (  # of TensorStore
    *("ABORTED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"),
    *("UNAUTHENTICATED", "UNAVAILABLE"),
)

OUTPUT_ERRORS = (RemoteError, PermissionError, FileNotFoundError)

# Waits of 1, 2, 4, 8 and 16 seconds, as the libraries for single files have them.
RETRIES = {"max_retries": 5, "initial_delay": "1s", "max_delay": "16s"}
SILENCE = {  # seconds at less than a byte a second until a request has failed
    "TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS": "60",
    "TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES": "1",
}


def open_checkpointer(directory: Any, **options: Any) -> Any:
    """Orbax's checkpointer for a directory or a prefix of a bucket.

    In a bucket a checkpoint is complete once it has Orbax's marker, which is written last.

    Args:
        directory: A `storage_path`.
        options: As `orbax.checkpoint.v1.training.Checkpointer` takes them.
    """
    if not is_remote(directory):
        return ocp.training.Checkpointer(directory.absolute(), **options)
    _prepare_tensorstore()
    if options.pop("cleanup_tmp_directories", False):
        _remove_unfinished(directory)
    context = ocp.Context()
    context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    # Else threads wait ten minutes for a directory that a bucket refused, and the process for them.
    context.async_options.create_directories_asynchronously = False
    return ocp.training.Checkpointer(str(directory), context=context, **options)


def _remove_unfinished(directory: Any) -> None:
    """Removes what a kill left of checkpoints, before any process lists them.

    Orbax does so in a thread, and lists them meanwhile: a bucket has no directory any more once the
    last object is gone, and the run would end. All processes meet when they open a checkpointer.

    Raises:
        ValueError: If there are several and none is whole, which no kill leaves.
    """
    if not is_primary():
        return
    parts = {name: name.partition("/") for name in listed(directory)}
    steps = {step for step, slash, _ in parts.values() if slash and step.isdigit()}
    whole = {step for step, _, file in parts.values() if file == MARKER}
    if len(steps) > 1 and not whole:
        raise ValueError(
            f"{directory}: {len(steps)} checkpoints without {MARKER}; were they copied from a "
            "disk?\nresume there, or move them away"
        )
    unfinished = steps - whole
    remove_objects(str(directory), [name for name in parts if parts[name][0] in unfinished])


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


@contextlib.contextmanager
def naming_whole(directory: Any, whole: Callable[[], int | None]) -> Iterator[None]:
    """Has errors of a run's bucket say from where it can go on: `whole` is its last whole step."""
    try:
        yield
    except OUTPUT_ERRORS as error:
        if not is_remote(directory) or str(directory) not in str(error):
            raise
        kept = "no checkpoint was whole" if (step := whole()) is None else f"step {step} is saved"
        # A subclass may not be made of a message alone.
        kind = next(kind for kind in OUTPUT_ERRORS if isinstance(error, kind))
        raise kind(f"{error}. {kept}: go on with --train.resume true") from error


@functools.cache
def _prepare_tensorstore() -> None:
    """Has Orbax ask TensorStore for `s3://`, which it would refuse, and for a bucket patiently.

    Orbax decides on TensorStore's driver in one function, which knows `gs://` and files. What it
    answers for a bucket of `gs://` holds for one of `s3://` but for the driver's name and settings.
    """
    from orbax.checkpoint._src.serialization import tensorstore_utils

    for name, value in SILENCE.items():
        os.environ.setdefault(name, value)
    known: Callable[..., dict[str, Any]] = tensorstore_utils.build_kvstore_tspec

    def build_kvstore_tspec(directory: str, *args: Any, **options: Any) -> dict[str, Any]:
        if not is_remote(directory):
            return known(directory, *args, **options)
        protocol, _, path = directory.partition("://")
        spec = known(f"gs://{path}", *args, **options)
        return _of_bucket(spec, protocol)

    tensorstore_utils.build_kvstore_tspec = build_kvstore_tspec


def _of_bucket(spec: Any, protocol: str) -> Any:
    """A spec of TensorStore with other retries, and for S3 its driver, wherever a bucket is."""
    if not isinstance(spec, dict):
        return spec
    if "bucket" not in spec:
        return {name: _of_bucket(value, protocol) for name, value in spec.items()}
    if protocol == "gs":
        return spec | {"gcs_request_retries": RETRIES}
    place = {"driver": "s3", "bucket": spec["bucket"], "path": spec["path"]}
    return place | {"s3_request_retries": RETRIES} | _s3_server()


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
