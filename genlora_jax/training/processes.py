"""Runs of several processes: how they find one another, and stop together."""

import functools
import os
import signal
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from genlora_jax.training.interrupt import Interruption

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def join(heartbeat: int = 100) -> None:
    """Joins the processes of a run, before JAX is used for anything else.

    By the environment's variables JAX_COORDINATOR_ADDRESS (host:port of process 0),
    JAX_NUM_PROCESSES and JAX_PROCESS_ID; without them as JAX finds out itself on TPU pods, SLURM,
    Kubernetes and under MPI.

    Args:
        heartbeat: Seconds of silence after which a process counts as lost, and all others end.

    Raises:
        ValueError: If some of the variables are missing, or nothing can be found out.
    """
    initialize = functools.partial(jax.distributed.initialize, heartbeat_timeout_seconds=heartbeat)
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    missing = [name for name, value in given.items() if not value]
    try:
        if not missing:
            initialize(given[ADDRESS], int(given[COUNT] or 0), int(given[INDEX] or 0))
        elif len(missing) < len(given):
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


def gather_to_primary(tree: Any) -> Any:
    """A tree whose arrays the primary can read whole; all processes must call it together.

    An array of which other processes hold shards is all-gathered a layer (an index of its first
    axis) at a time, and is None in all but the primary.
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


class Stopping:
    """Tells when to stop: after the same step in all processes if any of them is to end.

    One process: SIGINT or SIGTERM. Several: SIGTERM, of which JAX lets the others know.
    """

    def __init__(self) -> None:
        self._interruption = Interruption() if jax.process_count() == 1 else None

    def __enter__(self) -> "Stopping":
        if self._interruption is not None:
            self._interruption.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._interruption is not None:
            self._interruption.__exit__(*exc)

    def after(self, step: int) -> int | None:
        """The signal to stop on after this step, or None."""
        if self._interruption is not None:
            return self._interruption.signal
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None
