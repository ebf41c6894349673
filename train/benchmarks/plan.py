"""Estimates of `genlora plan` against the compiler's figures, for TPUs that need not be there.

    pip install libtpu && JAX_PLATFORMS=cpu python -m train.benchmarks.plan

A few minutes a program on two cores.
"""

import dataclasses
import json
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from genlora_jax.mesh import MeshConfig
from genlora_jax.plan.chips import GIB, parse_topology
from genlora_jax.plan.compiled import compile_step
from genlora_jax.plan.estimate import estimate
from genlora_jax.settings import parse
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe

RECIPES = Path(__file__).parent.parent / "recipes"
RESULT = Path(__file__).parent / "results" / "plan.json"
HADAMARD = ("--adapter.hadamard", "true")
FULL = ("--adapter", "FullConfig")
PROGRAMS = (
    ("llama3_8b_v5e_16.yaml", (), "v5e:4x4", MeshConfig(fsdp=16)),
    ("llama3_8b_v5e_16.yaml", HADAMARD, "v5e:4x4", MeshConfig(fsdp=16)),
    ("llama3_8b_v5e_16.yaml", FULL, "v5e:4x4", MeshConfig(fsdp=16)),
    ("llama3_8b_v5e_16.yaml", (), "v5e:4x4", MeshConfig(data=8, fsdp=1, tensor=2)),
    ("llama3_8b_v5e_16.yaml", HADAMARD, "v5e:4x4", MeshConfig(data=8, fsdp=1, tensor=2)),
    ("llama3_8b_v5e_16.yaml", FULL, "v5e:4x4", MeshConfig(fsdp=4, tensor=4)),
    ("llama3_8b_32k_v5e_16.yaml", (), "v5e:4x4", MeshConfig(data=4, fsdp=2, tensor=2)),
    ("llama3_70b_v5p_64.yaml", (), "v5p:2x4x4", MeshConfig(fsdp=32)),
    ("llama3_70b_v5p_64.yaml", (), "v5p:4x4x4", MeshConfig(fsdp=64)),
)


def main() -> None:
    table = Table("recipe", "topology", "mesh", "arguments", "temporaries", "sum, estimated")
    results, where = [], provenance()  # now, while the tree is clean
    for name, changed, place, mesh in PROGRAMS:
        recipe = parse(Recipe, ["--config", str(RECIPES / name), *changed])
        topology = parse_topology(place)
        guess = estimate(recipe, topology.chip, mesh)
        began = time.perf_counter()
        found = compile_step(recipe, topology, mesh)
        results.append(
            {
                "recipe": name,
                "changed": changed,
                "topology": place,
                "mesh": dataclasses.asdict(mesh),
                "estimate": dataclasses.asdict(guess) | {"mesh": None},
                "compiled": dataclasses.asdict(found),
                "seconds_to_compile": round(time.perf_counter() - began, 1),
            }
        )
        # After each: a later one may be too much for this machine.
        RESULT.write_text(json.dumps({"programs": results} | where, indent=1) + "\n")
        table.add_row(
            " ".join([name, *changed]),
            place,
            " x ".join(map(str, dataclasses.astuple(mesh))),
            *(f"{size / GIB:.2f} GiB" for size in (found.arguments, found.temporaries)),
            f"{(guess.arguments + guess.temporaries) / (found.arguments + found.temporaries):.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
