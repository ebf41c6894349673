"""The adapter to take of a run, finished or not."""

from genlora_jax.adapter_files import SETTINGS as OURS
from genlora_jax.adapter_files import write_adapter
from genlora_jax.atomic_files import recover
from genlora_jax.hf.peft_import import is_peft
from genlora_jax.storage import is_remote, storage_path

# In the order in which they are taken; `best` is that of a sweep.
NAMES = {
    "adapter": "that of the run's end",
    "adapter-best": "the run has not ended; this had the lowest evaluation loss",
    "best": "the sweep's best",
}


def find_adapter(path: str) -> str:
    """The directory of an adapter, given itself or the run that trained it.

    Of a run it is `adapter`, else `adapter-best`, else the adapter of the newest checkpoint, which
    is then written to `adapter-step-N`. What is taken of a run is printed.

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
        return path
    for name, reason in NAMES.items():
        if not is_remote(run):
            recover(run / name)
        if (run / name / OURS).is_file():
            print(f"adapter: {run / name}, {reason}")
            return str(run / name)
    if not checkpoints.is_dir():
        return path
    # Imported here, as it needs the extra `train`, which most commands do not.
    from genlora_jax.training.checkpoint_reading import saved_adapter

    if (found := saved_adapter(checkpoints)) is None:
        raise FileNotFoundError(
            f"{run} has no adapter, and no checkpoint to take one from: go on with "
            "genlora finetune --train.resume true"
        )
    step, settings, adapter = found
    taken = run / f"adapter-step-{step}"
    recover(taken)
    if not taken.exists():
        write_adapter(taken, settings, adapter)
    print(f"adapter: {taken}, that of the newest checkpoint of a run that has not ended")
    return str(taken)
