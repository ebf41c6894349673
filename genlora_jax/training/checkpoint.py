"""Checkpoints: adapter, optimizer, step, random state and place in the data; never the base."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from genlora_jax.methods import config_to_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.step import TrainState

STATE, DATA, SHAPES, ADAPTER = "state", "data", "shapes", "adapter"


class Checkpoints:
    """The checkpoints of one run: the last k, the best, and those of every so many steps.

    A checkpoint is written beside its place and renamed, so that a killed process leaves the
    last complete one.

    Args:
        directory: Where they lie.
        keep: How many of the latest to keep.
        keep_every: Keep also those of steps that this divides.
        adapter: The run's adapter; what is restored must have had the same, but for `dropout`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        adapter: AdapterConfig | None = None,
    ):
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            get_metric_fn=lambda metrics: -metrics["eval_loss"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        kept = [policies.LatestN(keep), best]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=policies.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        self._adapter = {} if adapter is None else config_to_json(adapter)
        self._saving: Any = None
        self._damaged: set[int] = set()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc: object) -> None:
        self.wait()
        self._checkpointer.close()

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(
        self, state: TrainState, data: grain.DatasetIterator, eval_loss: float | None = None
    ) -> None:
        """Saves the state and the place in the data, in the background.

        A save waits for the one before, and leaving the block for the last.
        """
        step = int(state.step)
        self.wait()
        if self.latest() == step and step not in self._damaged:
            return
        metrics = None if eval_loss is None else {"eval_loss": eval_loss}
        # The place in the data is the same in all processes, so that any number of them can resume.
        self._saving = self._checkpointer.save_checkpointables_async(
            step,
            {STATE: _plain(state)},
            overwrite=step in self._damaged,
            metrics=metrics,
            custom_metadata={
                SHAPES: _shapes(state),
                DATA: data.get_state(),
                ADAPTER: self._adapter,
            },
        )

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        if self._saving is not None:
            self._saving.result()

    def restore(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint: returns its state, and sets `data` to its place.

        Args:
            state: A state of the same shapes.
            data: The iterator of the same data set, which is moved.

        Raises:
            ValueError: If the checkpoint is of another adapter, or none can be read. A damaged
                one is named on stderr, and the one before it taken.
        """
        for step in sorted((saved.step for saved in self._checkpointer.checkpoints), reverse=True):
            try:
                return self._restore(step, state, data)
            except _Misfit as error:
                raise ValueError(str(error)) from None
            except Exception as error:  # whatever Orbax makes of a damaged file
                self._damaged.add(step)
                print(
                    f"checkpoint {step} cannot be read ({type(error).__name__}: "
                    f"{str(error).splitlines()[0]}); going back to the one before it",
                    file=sys.stderr,
                )
        raise ValueError(f"{self._checkpointer.directory}: no checkpoint in it can be read")

    def _restore(self, step: int, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        # Asked beforehand: Orbax would find out halfway, with tasks of its own under way.
        saved = self._checkpointer.metadata(step).custom_metadata or {}
        if saved[SHAPES] != _shapes(state):
            raise _Misfit(
                f"{self._checkpointer.directory}: checkpoint {step} does not fit this recipe's "
                "adapter and optimizer; resume with the recipe that the run was started with"
            )
        # Settings that change no shape would change what the state means.
        if said := difference(saved.get(ADAPTER, {}), self._adapter):
            raise _Misfit(f"{self._checkpointer.directory}: checkpoint {step} was trained {said}")
        loaded = self._checkpointer.load_checkpointables(
            step, {STATE: jax.tree.map(_abstract, _plain(state))}
        )
        data.set_state(saved[DATA])
        leaves = jax.tree.leaves(loaded[STATE])
        return jax.tree.unflatten(jax.tree.structure(state), leaves)


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting that two adapters' configs in JSON do not share; dropout may differ."""
    shared = before.keys() & now.keys() - {"dropout"}
    for field in sorted(shared, key=lambda field: (field != "method", field)):
        if before[field] != now[field]:
            name = "the method" if field == "method" else f"adapter.{field}"
            return f"with {name} {before[field]!r}, and the recipe has {now[field]!r}"
    return None


class _Misfit(Exception):
    """A checkpoint of another adapter."""


def _plain(state: TrainState) -> dict[str, Any]:
    """The state as nested containers that Orbax knows, leaves in the same order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _shapes(state: TrainState) -> list[str]:
    return [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(state)]


def _abstract(leaf: Any) -> Any:
    leaf = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))
