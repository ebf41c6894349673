"""`train/finetune.py` in a process of its own."""

import os
import subprocess
import sys

from tiny_base import REPOSITORY


def start_finetune(recipe, *arguments, cache, script="train/finetune.py", **environment):
    """Starts the script on a recipe; what it compiles goes to a cache that runs can share.

    `script` may be one that changes something and then does the same. Its output is buffered as
    users have it.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, script, "--config", recipe, *arguments],
        cwd=REPOSITORY,
        env=inherited
        | {
            "PYTHONPATH": str(REPOSITORY),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
