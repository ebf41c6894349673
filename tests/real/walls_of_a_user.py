"""Prints which walls do not hold, way by way; the sandbox's files alone, without JAX."""

import os
import sys
import types
from pathlib import Path

LIBRARY = Path(__file__).resolve().parents[2] / "genlora_jax"
for name in ("", "evaluation", "evaluation.sandbox"):
    package = types.ModuleType(f"genlora_jax.{name}".rstrip("."))
    package.__path__ = [str(LIBRARY.joinpath(*name.split(".")))]
    sys.modules[package.__name__] = package

from genlora_jax.evaluation.sandbox import sandbox, walls  # noqa: E402

print(f"user:{os.geteuid()}")
for way in sandbox._ways(None):
    print(f"{way.name}:{' '.join(walls.open_walls(way))}")
