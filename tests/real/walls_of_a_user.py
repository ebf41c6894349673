"""Prints what an ordinary user has of the sandbox; its files alone are loaded, without JAX."""

import os
import sys
import tempfile
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

with tempfile.TemporaryDirectory() as place:
    tempfile.tempdir = place
    kept = Path(place) / "kept"
    kept.touch(0o640)
    # What cannot be removed before its mode is changed, and a link among it.
    program = f"""
import os
os.mkdir('closed')
os.symlink({str(kept)!r}, 'closed/link')
os.chmod('closed', 0)
"""
    assert way.run(sandbox.Trial(program)).passed
    assert os.listdir(place) == ["kept"], "something is left"
    print(f"cleaned up, mode of a file outside:{oct(kept.stat().st_mode & 0o777)}")
