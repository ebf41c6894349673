"""Checkpoints of all that training changes, and of the place in the data; not of the base."""

import contextlib
import errno
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
from orbax.checkpoint import v1 as ocp

from genlora_jax.adapter_files import spec_to_json
from genlora_jax.atomic_files import disk_full
from genlora_jax.base.quantise import Quantisation
from genlora_jax.methods import config_from_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.storage import is_remote
from genlora_jax.training.checkpoint_reading import (
    ADAPTER,
    BASE,
    DATA,
    DIGEST,
    ORIGIN,
    SETTINGS,
    SHAPES,
    STATE,
    SUMS,
    leaf_name,
    load_arrays,
    read_metadata,
)
from genlora_jax.training.checkpoint_storage import naming_bucket, open_checkpointer, unreachable
from genlora_jax.training.checksums import checksums, json_digest
from genlora_jax.training.step import TrainState
from genlora_jax.validation import first_not_finite

ROOM = 2**20  # bytes of disk that a checkpoint takes at most beside its arrays


class Data(Protocol):
    """Batches whose place in the data can be saved."""

    def get_state(self) -> Any:
        """The place, as JSON takes it; the same in all processes, which call this together."""

    def set_state(self, state: Any) -> None:
        """Goes to a place; raises ValueError if it is of other data, an older version, or both."""


class Checkpoints:
    """The checkpoints of one run: the last k, the best, and those of every so many steps.

    A checkpoint is written beside its place and renamed, so that a killed process leaves the
    last complete one. Its arrays have the names of the state's leaves. Its metadata has their
    checksums, the adapter's settings, and fingerprints of base and data.

    Args:
        directory: The directory of the checkpoints.
        keep: How many of the latest to keep.
        keep_every: Keep also those of steps that this divides.
        base_config: Digest of the base's config; see `adapter_files.config_fingerprint`.
        origin: Fingerprints of the content of what a recipe names, by its field: `data.train`.
        before_save: Called before each save; raises if nothing may be written any more.
    """

    def __init__(
        self,
        directory: Any,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        base_config: str | None = None,
        origin: Mapping[str, str] | None = None,
        before_save: Callable[[], object] = dict,
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
        with naming_bucket(directory):
            self._checkpointer = open_checkpointer(
                directory,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                cleanup_tmp_directories=True,
            )
        self._base_config = base_config
        self._origin = dict(origin or {})
        self.before_save = before_save
        self._damaged: set[int] = set()
        self.whole = self.latest()  # but for one that is being written, or was in vain

    def __enter__(self) -> "Checkpoints":
        # Each of Orbax's threads logs, with a traceback, what is raised here as well; some late.
        self._log_level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.wait()
        finally:
            with naming_bucket(self._checkpointer.directory), contextlib.ExitStack() as stack:
                stack.callback(logging.getLogger("absl").setLevel, self._log_level)
                self._checkpointer.close()  # raises once more what has failed

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        saved = (checkpoint.step for checkpoint in self._checkpointer.checkpoints)
        return max((step for step in saved if step not in self._damaged), default=None)

    def best_loss(self, step: int) -> float:
        """The lowest evaluation loss of checkpoints up to a step; infinity if none has one."""
        saved = [found for found in self._checkpointer.checkpoints if found.step <= step]
        losses = [dict(found.metrics or {}).get("eval_loss", math.inf) for found in saved]
        return min(losses, default=math.inf)

    def save(self, state: TrainState, data: Data, eval_loss: float | None = None) -> None:
        """Saves the state and the place in the data, in the background.

        A save waits for the one before, and the end of the `with` block waits for the last.

        Raises:
            FloatingPointError: If an array of the state is not finite; it is named.
            OSError: If the disk is full.
        """
        step = int(state.step)
        self.wait()
        if self.latest() == step:
            return
        leaves = named_leaves(state)
        if name := first_not_finite(leaves):
            raise FloatingPointError(f"{name} is not finite after step {step}, and is not saved")
        metadata = {
            SHAPES: _shapes(state),
            DATA: data.get_state(),
            SETTINGS: spec_to_json(state.adapter.spec, self._base_config),
            ORIGIN: self._origin,
            SUMS: checksums(leaves),
        }
        self.before_save()
        with self._reporting_full_disk():
            self._check_room(leaves)
            self._checkpointer.save_checkpointables_async(
                step,
                {STATE: leaves},
                overwrite=step in self._damaged,
                force=bool(self._damaged),  # also before a damaged one
                metrics=None if eval_loss is None else {"eval_loss": eval_loss},
                custom_metadata=metadata | {DIGEST: json_digest(metadata)},
            )

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what went wrong with it."""
        with self._reporting_full_disk():
            self._checkpointer.wait()
        self.whole = self.latest()

    def _check_room(self, leaves: Mapping[str, Any]) -> None:
        """Raises OSError if the disk cannot take a checkpoint, which would end in many errors."""
        if is_remote(self._checkpointer.directory):
            return
        size = sum(leaf.nbytes for leaf in leaves.values())
        if shutil.disk_usage(self._checkpointer.directory).free < 1.01 * size + ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _reporting_full_disk(self) -> Iterator[None]:
        try:
            with naming_bucket(self._checkpointer.directory):
                yield
        except Exception as error:
            if full := disk_full(error):
                raise OSError(
                    f"{full}: no checkpoint was written to {self._checkpointer.directory}. Make "
                    "room there, and go on with --train.resume true"
                ) from error
            raise

    def restore(self, state: TrainState, data: Data) -> TrainState:
        """The newest checkpoint: returns its state, and sets `data` to its place.

        Args:
            state: A state of the same shapes, which is returned if there is no checkpoint yet.
            data: The batches of the same data, which go to its place.

        Raises:
            ValueError: If the checkpoint is of another adapter, base or data, or none can be read.
                A damaged one is named on stderr, and the one before it is taken.
        """
        self.wait()
        steps = sorted((saved.step for saved in self._checkpointer.checkpoints), reverse=True)
        for step in steps:
            try:
                return self._restore(step, state, data)
            except _MisfitError:
                raise
            except Exception as error:  # whatever Orbax makes of a damaged file
                if unreachable(self._checkpointer.directory, error):  # nothing is lost yet
                    with naming_bucket(self._checkpointer.directory):
                        raise
                self._damaged.add(step)
                print(
                    f"checkpoint {step} cannot be read ({type(error).__name__}: "
                    f"{str(error).splitlines()[0][:200]}); going back to the one before it",
                    file=sys.stderr,
                )
        if steps:
            raise ValueError(
                f"{self._checkpointer.directory}: no checkpoint in it can be read; start a new run "
                "with another train.output"
            )
        return state

    def _restore(self, step: int, state: TrainState, data: Data) -> TrainState:
        # Checked before Orbax would find out, halfway and with background tasks running.
        place = f"{self._checkpointer.directory}: checkpoint {step}"
        saved = read_metadata(self._checkpointer, step)
        shapes = _shapes(state)
        numbered = isinstance(saved[SHAPES], list)  # version 0.1 named leaves by their position
        if saved[SHAPES] != (list(shapes.values()) if numbered else shapes):
            raise _MisfitError(
                f"{place} does not fit this recipe's adapter and optimizer; resume with the recipe "
                "that the run was started with"
            )
        older = {"config": saved.get(ADAPTER), "base": saved.get(BASE, {})}
        settings = saved.get(SETTINGS, older)
        # Settings that change no shape can change what the state means.
        if difference := adapter_difference(state.adapter.config, settings["config"]):
            raise _MisfitError(f"{place} was trained {difference}")
        base = {"shapes": state.adapter.spec.fingerprint, "config": self._base_config}
        for part, digest in base.items():
            if digest and (settings["base"].get(part) or digest) != digest:
                raise _MisfitError(
                    f"{place} was trained on another base: the {part} of model.path differ"
                )
        stored = settings["base"].get("quantisation")
        then, now = stored and Quantisation(**stored), state.adapter.spec.quantisation
        if then != now:
            raise _MisfitError(
                f"{place} was trained on a base in {then or 'bf16'}; the recipe's is in "
                f"{now or 'bf16'}. Set model.base_dtype to what it was, or start a new run from "
                "its adapter, with train.init_from"
            )
        for field, digest in self._origin.items():
            if saved.get(ORIGIN, {}).get(field, digest) != digest:
                raise _MisfitError(
                    f"{place} was trained with another content of {field}. Resume with what it "
                    "was, or start a new run from its adapter, with train.init_from"
                )
        try:
            data.set_state(saved[DATA])
        except ValueError as error:
            raise _MisfitError(f"{place} {error}") from error
        leaves = named_leaves(state)
        if numbered:
            leaves = {f"{i:05d}": leaf for i, leaf in enumerate(leaves.values())}
        loaded = load_arrays(self._checkpointer, step, leaves, saved)
        return jax.tree.unflatten(jax.tree.structure(state), [loaded[name] for name in leaves])


class _MisfitError(ValueError):
    """A checkpoint of another adapter, base or data."""


def named_leaves(state: TrainState) -> Mapping[str, Any]:
    """The state's leaves in order, by names such as `adapter.trainable.latents...`."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {leaf_name(path): leaf for path, leaf in leaves}


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
