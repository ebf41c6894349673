"""The adapter to take of a run, finished or not."""

import json
import warnings
from pathlib import Path
from typing import Any

from genlora_jax.adapter_files import SETTINGS as OURS
from genlora_jax.adapter_files import write_adapter
from genlora_jax.atomic_files import recover
from genlora_jax.hf.peft_import import is_peft
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.training.provenance import checkpoint_digest

# In the order in which they are taken; `best` is that of a sweep.
NAMES = {
    "adapter": "that of the run's end",
    "adapter-best": "the run has not ended; this had the lowest evaluation loss",
    "best": "the sweep's best",
}


def find_adapter(path: str) -> str:
    """The directory of an adapter, given itself or the run that trained it.

    Of a run it is `adapter`, else `adapter-best`, else the adapter of the newest checkpoint, which
    is then written to `adapter-step-N`. What is taken of a run is printed. A run that ended, was
    resumed with more steps and then stopped has an `adapter` of before, which is not taken.

    Args:
        path: The directory of an adapter (ours or PEFT's) or of a run.

    Raises:
        FileNotFoundError: If it is a run that has no adapter yet.
        OSError: If the adapter of a checkpoint cannot be written beside it.
    """
    run = storage_path(path)
    checkpoints = run / "checkpoints"
    if not is_remote(run):  # where only writers may
        recover(run)
    if not run.is_dir() or (run / OURS).exists() or is_peft(run):
        if run.name == "adapter" and (said := _outdated(run)):
            print(f"note: {said}; to take the newest, give {run.parent}")
        return path
    for name, reason in NAMES.items():
        if not is_remote(run):
            recover(run / name)
        if not (run / name / OURS).is_file():
            continue
        if name == "adapter" and (said := _outdated(run / name)):
            print(f"note: {said}; it is not taken")
            continue
        print(f"adapter: {run / name}, {reason}")
        return str(run / name)
    if not checkpoints.is_dir():
        return path
    # Imported here, as it needs the extra `train`, which most commands do not.
    from genlora_jax.training.checkpoint_reading import saved_adapter

    if (found := saved_adapter(checkpoints)) is None:
        raise FileNotFoundError(
            f"{run} has no checkpoint to take an adapter from: go on with genlora finetune "
            "--train.resume true"
        )
    step, settings, adapter = found
    taken = run / f"adapter-step-{step}"
    recover(taken)
    if not taken.exists():
        write_adapter(taken, settings, adapter)
    print(f"adapter: {taken}, that of the newest checkpoint of a run that has not ended")
    return str(taken)


def remark_on_base(adapter: str, source: Path) -> None:
    """Warns if an adapter was trained on other weights than those of a base of the same shapes."""
    try:
        trained = json.loads((storage_path(adapter) / OURS).read_text())["base"].get("tensors")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # PEFT's, which names its base; or damaged, which is said when it is loaded
    if trained and trained != checkpoint_digest(source):
        warnings.warn(
            f"{adapter} was trained on other weights than those of {source}: is it merged already, "
            "or converted, or another model of the same shapes?",
            stacklevel=2,
        )


def _outdated(adapter: Any) -> str | None:
    """How far a run has gone on after it wrote its `adapter`, in words; None if it has not."""
    try:
        step = int(json.loads((adapter / OURS).read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged, or of version 0.1
        return None
    saved = [int(f.name) for f in (adapter.parent / "checkpoints").glob("*") if f.name.isdecimal()]
    if (newest := max(saved, default=0)) <= step:
        return None
    return f"{adapter} is of step {step}, and its run has gone on to step {newest}"
