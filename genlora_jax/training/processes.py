"""Processes: how those of a run find one another, share values, and stop on a signal."""

import contextlib
import functools
import hashlib
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from genlora_jax.training.host_log import keep_log

LOGS = "logs"  # of a run's directory
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(heartbeat: int = 100) -> None:
    """Joins the processes of a run, before JAX is used for anything else.

    The environment's variables JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID say how. Without them JAX finds out on TPU pods, SLURM,
    Kubernetes and under MPI.

    Args:
        heartbeat: Seconds of silence after which a process counts as lost, and all others end.

    Raises:
        ValueError: If only some of the variables are set, or JAX cannot find out.
    """
    initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat)
    names = (ADDRESS, COUNT, INDEX)
    missing = [name for name in names if not os.environ.get(name)]
    try:
        if not missing:
            address, count, index = (os.environ[name] for name in names)
            initialize(address, int(count), int(index))
        elif len(missing) < len(names):
            raise ValueError(f"{', '.join(missing)} must be set as well")
        else:
            initialize()
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"train.distributed: cannot join the run's processes: {error}. Set {ADDRESS}, {COUNT} "
            f"and {INDEX}, or use a launcher that JAX knows"
        ) from error


def is_primary() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


def broadcast_from_primary(value: float) -> float:
    """The primary's value in all processes, to float32; all must call it together."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def text_of_primary(find: Callable[[], str]) -> str:
    """What the primary finds, at most 64 bytes, in all processes; all must call it together."""
    if jax.process_count() == 1:
        return find()
    return _text(multihost_utils.broadcast_one_to_all(_bytes(find() if is_primary() else "")))


def check_same(values: Mapping[str, object]) -> None:
    """Checks that all processes have the same values, by name; all must call it together.

    Raises:
        ValueError: In all of them, if one has another value.
    """
    if jax.process_count() == 1:
        return
    digests = [_bytes(hashlib.sha256(str(value).encode()).hexdigest()) for value in values.values()]
    gathered = _gather(np.stack(digests))
    for name, found in zip(values, gathered.swapaxes(0, 1), strict=True):
        others = np.flatnonzero((found != found[0]).any(axis=1))
        if len(others):
            raise ValueError(
                f"{name} is not the same in process {others[0]} ({host_names()[others[0]]}) as in "
                "process 0: give all hosts the same files"
            )


def gather_values(values: list[float]) -> np.ndarray:
    """Each process's values, to float32, in a row of its own; all must call it together."""
    return _gather(np.array(values, np.float32))


@functools.cache
def host_names() -> list[str]:
    """The name of each process's host, at most 64 bytes of it; all must call it together."""
    return [_text(name) for name in _gather(_bytes(socket.gethostname()))]


def _gather(values: np.ndarray) -> np.ndarray:
    """Each process's values along a first axis, also if there is one process."""
    gathered = np.asarray(multihost_utils.process_allgather(values))
    return gathered.reshape(-1, *values.shape)


def _bytes(text: str) -> np.ndarray:
    """At most 64 bytes of a text, uint8 `[64]`; see `_text`."""
    return np.frombuffer(text.encode()[:64].ljust(64, b"\0"), np.uint8)


def _text(values: Any) -> str:
    return np.asarray(values).tobytes().rstrip(b"\0").decode(errors="replace")


def keep_logs(output: str) -> None:
    """Keeps from now on what each of several processes prints, in `OUTPUT/logs/process-N.log`.

    They begin together: after the primary has found that the run's directory can be had.
    """
    if (count := jax.process_count()) == 1:
        return
    multihost_utils.sync_global_devices("the run's directory is checked")
    index = jax.process_index()
    devices = ", ".join(map(str, jax.local_devices()))
    heading = f"process {index} of {count}, {os.getpid()} on {socket.gethostname()}: {devices}"
    keep_log(f"{output}/{LOGS}/process-{index}.log", heading)


def gather_to_primary(tree: Any) -> Any:
    """A tree whose arrays the primary can read whole; all processes must call it together.

    An array with shards in other processes is all-gathered a layer (an index of its first axis) at
    a time, and is None in all processes but the primary.
    """

    def gather(leaf: jax.Array) -> Any:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        whole = np.empty(leaf.shape, leaf.dtype) if is_primary() else None
        for i in range(len(leaf)):
            layer = multihost_utils.process_allgather(leaf[i], tiled=True)
            if whole is not None:
                whole[i] = layer
        return whole

    return jax.tree.map(gather, tree)


class Interruption:
    """While entered, notes the first SIGINT or SIGTERM in `signal`; a second one ends at once.

    Both are acknowledged on stderr.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._handlers: dict[int, Any] = {}  # those from before, by signal

    def __enter__(self) -> "Interruption":
        numbers = (signal.SIGINT, signal.SIGTERM)
        self._handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Not `print`: the signal may have come in the midst of one.
        if self.signal is not None:
            os.write(2, b"\nended at once; nothing more was saved\n")
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"\nstopping after the step under way, and saving; once more to end at once\n")


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], int | None]]:
    """Yields a function of a step: the signal to stop on after it, or None.

    In one process that is SIGINT or SIGTERM. In several it is SIGTERM to any of them, of which JAX
    lets the others know, so that all stop after the same step.
    """
    if jax.process_count() == 1:
        with Interruption() as interruption:
            yield lambda _: interruption.signal
    else:
        reached = multihost_utils.reached_preemption_sync_point
        yield lambda step: signal.SIGTERM if reached(step) else None
