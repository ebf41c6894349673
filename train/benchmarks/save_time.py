"""How long a run takes to save, against the notice that clouds give before they end it.

    JAX_PLATFORMS=cpu python -m train.benchmarks.save_time [DIRECTORY]

The state of each adapter, as the recipes shape it, is filled with numbers and saved as training
does: checked, with checksums, and waited for. It goes below DIRECTORY.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from genlora_jax.adapter import count_parameters, init_adapter
from genlora_jax.plan.sizes import shapes_of
from genlora_jax.settings import parse
from genlora_jax.training.checkpoint import Checkpoints, named_leaves
from genlora_jax.training.optim import make_optimizer
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.step import init_state
from train.benchmarks.measuring import GIB, RESULTS, write_result

RECIPES = Path(__file__).parent.parent / "recipes"
LORA = ("--adapter", "LoRAConfig", "--adapter.rank", "16")
STATES = (
    ("llama3_8b_v5e_16.yaml", ()),
    ("llama3_70b_v5p_64.yaml", ()),
    ("llama3_8b_v5e_16.yaml", LORA),
)
TIMES = 5


class Place:
    """A place in the data."""

    def get_state(self) -> dict[str, int]:
        return {"next": 0}


def filled_state(name: str, changed: tuple[str, ...]) -> Any:
    """A recipe's training state, of random numbers."""
    recipe = parse(Recipe, ["--config", str(RECIPES / name), *changed])
    shapes, optimizer = shapes_of(recipe).params, make_optimizer(recipe.optim, 100)
    adapter = jax.eval_shape(lambda p: init_adapter(recipe.adapter, jax.random.key(0), p), shapes)
    state = jax.eval_shape(lambda adapter: init_state(adapter, optimizer), adapter)
    rng = np.random.default_rng(0)

    def fill(leaf: Any) -> jax.Array:
        if leaf.dtype == np.float32:
            return jax.numpy.asarray(rng.standard_normal(leaf.shape, np.float32))
        return jax.numpy.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, state)


def main() -> None:
    results, where = [], provenance()
    for name, changed in STATES:
        state = filled_state(name, changed)
        size = sum(leaf.nbytes for leaf in named_leaves(state).values())
        seconds = []
        below = sys.argv[1] if sys.argv[1:] else None
        with (
            tempfile.TemporaryDirectory(dir=below) as directory,
            Checkpoints(Path(directory) / "checkpoints") as checkpoints,
        ):
            for step in range(1, TIMES + 1):
                saved = dataclasses.replace(state, step=jax.numpy.asarray(step, state.step.dtype))
                began = time.perf_counter()
                checkpoints.save(saved, Place())  # type: ignore[arg-type]
                checkpoints.wait()
                seconds.append(time.perf_counter() - began)
        results.append(
            {
                "recipe": name,
                "changed": changed,
                "parameters": count_parameters(state.adapter),
                "gib": size / GIB,
                "median_seconds": statistics.median(seconds),
                "most_seconds": max(seconds),
            }
        )
        print(results[-1])
    write_result(RESULTS / "save_time.json", {"states": results}, where)


if __name__ == "__main__":
    main()
