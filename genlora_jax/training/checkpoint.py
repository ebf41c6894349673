"""Checkpoints of all that training changes, and of the place in the data; not of the base."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
from orbax.checkpoint import v1 as ocp

from genlora_jax.methods import config_from_json, config_to_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.step import TrainState

STATE, DATA, SHAPES, ADAPTER, BASE = "state", "data", "shapes", "adapter", "base"


class Checkpoints:
    """The checkpoints of one run: the last k, the best, and those of every so many steps.

    A checkpoint is written beside its place and renamed, so that a killed process leaves the
    last complete one. Its arrays have the names of the state's leaves. Its metadata has the
    adapter's config and the base's fingerprint.

    Args:
        directory: The directory of the checkpoints.
        keep: How many of the latest to keep.
        keep_every: Keep also those of steps that this divides.
        base_config: Digest of the base's config; see `adapter_files.config_fingerprint`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        base_config: str | None = None,
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
        self._base_config = base_config
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

        A save waits for the one before, and the end of the `with` block waits for the last.
        """
        step = int(state.step)
        self.wait()
        if self.latest() == step and step not in self._damaged:
            return
        # The place in the data is the same in all processes, so that any number of them can resume.
        self._checkpointer.save_checkpointables_async(
            step,
            {STATE: named_leaves(state)},
            overwrite=step in self._damaged,
            metrics=None if eval_loss is None else {"eval_loss": eval_loss},
            custom_metadata={
                SHAPES: _shapes(state),
                DATA: data.get_state(),
                ADAPTER: config_to_json(state.adapter.config),
                BASE: self._base(state),
            },
        )

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        self._checkpointer.wait()

    def restore(self, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        """The newest checkpoint: returns its state, and sets `data` to its place.

        Args:
            state: A state of the same shapes.
            data: The iterator of the same data set, which is moved.

        Raises:
            ValueError: If the checkpoint is of another adapter or of another base, or none can be
                read. A damaged one is named on stderr, and the one before it is taken.
        """
        self.wait()
        for step in sorted((saved.step for saved in self._checkpointer.checkpoints), reverse=True):
            try:
                return self._restore(step, state, data)
            except _MisfitError:
                raise
            except Exception as error:  # whatever Orbax makes of a damaged file
                self._damaged.add(step)
                print(
                    f"checkpoint {step} cannot be read ({type(error).__name__}: "
                    f"{str(error).splitlines()[0]}); going back to the one before it",
                    file=sys.stderr,
                )
        raise ValueError(f"{self._checkpointer.directory}: no checkpoint in it can be read")

    def _restore(self, step: int, state: TrainState, data: grain.DatasetIterator) -> TrainState:
        # Checked before Orbax would find out, halfway and with background tasks running.
        saved = self._checkpointer.metadata(step).custom_metadata or {}
        place = f"{self._checkpointer.directory}: checkpoint {step}"
        shapes = _shapes(state)
        numbered = isinstance(saved[SHAPES], list)  # version 0.1 named leaves by their position
        if saved[SHAPES] != (list(shapes.values()) if numbered else shapes):
            raise _MisfitError(
                f"{place} does not fit this recipe's adapter and optimizer; resume with the recipe "
                "that the run was started with"
            )
        # Settings that change no shape can change what the state means.
        if difference := adapter_difference(state.adapter.config, saved.get(ADAPTER)):
            raise _MisfitError(f"{place} was trained {difference}")
        for part, digest in self._base(state).items():
            if digest and (saved.get(BASE, {}).get(part) or digest) != digest:
                raise _MisfitError(
                    f"{place} was trained on another base: the {part} of model.path differ"
                )
        leaves = named_leaves(state)
        if numbered:
            leaves = {f"{i:05d}": leaf for i, leaf in enumerate(leaves.values())}
        loaded = self._checkpointer.load_checkpointables(step, {STATE: leaves})[STATE]
        data.set_state(saved[DATA])
        return jax.tree.unflatten(jax.tree.structure(state), [loaded[name] for name in leaves])

    def _base(self, state: TrainState) -> dict[str, str | None]:
        """Digests of the base: of its parameters' shapes and, if known, of its config."""
        return {"shapes": state.adapter.spec.fingerprint, "config": self._base_config}


class _MisfitError(ValueError):
    """A checkpoint of another adapter or base."""


def named_leaves(state: TrainState) -> Mapping[str, Any]:
    """The state's leaves in order, by names such as `adapter.trainable.latents...`."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def adapter_difference(recipe: AdapterConfig, saved: Mapping[str, Any] | None) -> str | None:
    """How an adapter's stored config differs from the recipe's, in words; None if it does not."""
    if not saved:
        return None
    try:
        difference = config_from_json(saved).first_difference(recipe)
    except ValueError as error:  # a setting that this version no longer has
        return f"with another version: {error}"
    if difference is None:
        return None
    field, saved_value, value = difference
    name = "the method" if field == "method" else f"adapter.{field}"
    return f"with {name} {saved_value!r}, and the recipe has {value!r}"


def _shapes(state: TrainState) -> dict[str, str]:
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in named_leaves(state).items()}
