"""The installed `genlora` command, and `python -m genlora_jax`: `cli.main`, started quickly.

A library must not set these things for the process that imports it; a command may, in its own.
"""

import contextlib
import gc
import importlib
import sys

from genlora_jax import cli
from genlora_jax.training.host_memory import share_one_heap

# Commands that read a tokenizer, but no model of `transformers`, as lm-eval in `evaluate` may.
READERS = ("finetune", "sweep", "tokenize", "generate", "merge")


def command() -> None:
    """Runs the command line of this process."""
    # Tracing makes many objects that stay: by default the search for cycles takes a sixth of a
    # second start.
    gc.set_threshold(10_000)
    if sys.argv[1:2] == ["finetune"]:
        share_one_heap()
    if sys.argv[1:2] and sys.argv[1] in READERS and not {"-h", "--help"} & {*sys.argv}:
        leave_torch_out()
    cli.main()


def leave_torch_out() -> None:
    """Imports `transformers` and tensorboardX as where PyTorch is not installed.

    Both import it where there is one, which takes seconds, and need it for nothing that commands
    ask of them. To the end of the process `transformers` says that it has no models; imports of
    PyTorch itself find it. Nothing happens where it has been imported.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's word for: there is none
    try:
        # Asked once, and then remembered.
        with contextlib.suppress(Exception):  # which the import that needs it will say
            importlib.import_module("transformers.utils").is_torch_available()
            if sys.argv[1] in ("finetune", "sweep"):
                importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


if __name__ == "__main__":
    command()
