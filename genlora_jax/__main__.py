"""The installed `genlora` command, and `python -m genlora_jax`: `cli.main`, started without PyTorch.

`transformers` and tensorboardX import PyTorch where there is one. Neither needs it for what is
asked of them here, and it takes seconds of every start.
"""

import contextlib
import importlib
import sys

from genlora_jax import cli


def command() -> None:
    """Runs the command line of this process."""
    if len(sys.argv) > 2 and sys.argv[1] != "inspect":  # which has no use for a tokenizer
        leave_torch_out()
    cli.main()


def leave_torch_out() -> None:
    """Imports both as where PyTorch is not installed; later imports of PyTorch itself find it.

    Only for a process of a command: to its end `transformers` says that it has no models. Nothing
    happens where PyTorch has been imported.
    """
    if "torch" in sys.modules:
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # Python's word for: there is none
    try:
        # Asked once, and then remembered.
        importlib.import_module("transformers.utils").is_torch_available()
        with contextlib.suppress(ModuleNotFoundError):  # of the extra `train`
            importlib.import_module("tensorboardX")
    finally:
        del sys.modules["torch"]


if __name__ == "__main__":
    command()
