"""Estimates of `genlora plan` against the compiler's figures, for TPUs that need not be there.

    pip install libtpu && JAX_PLATFORMS=cpu python -m train.benchmarks.plan [NUMBER ...]

A few minutes a program on two cores. With numbers, only those programs are compiled again, and the
results of the others stay.
"""

import dataclasses
import json
import sys
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
from train.benchmarks.measuring import RESULTS, write_result

RECIPES = Path(__file__).parent.parent / "recipes"
RESULT = RESULTS / "plan.json"
HADAMARD = ("--adapter.hadamard", "true")
FULL = ("--adapter", "FullConfig")
NONE, DOTS = (("--data.batch_size", "64", "--model.remat", remat) for remat in ("none", "dots"))
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
    # What `genlora plan` puts first for the recipes on slices of 64 chips.
    ("llama3_8b_v5e_16.yaml", (), "v5p:4x4x4", MeshConfig(data=32, fsdp=1, tensor=2)),
    ("llama3_8b_v5e_16.yaml", (), "v6e:8x8", MeshConfig(data=32, fsdp=1, tensor=2)),
    ("llama3_8b_32k_v5e_16.yaml", (), "v5p:4x4x4", MeshConfig(data=8, fsdp=1, tensor=8)),
    ("llama3_8b_32k_v5e_16.yaml", (), "v6e:8x8", MeshConfig(data=8, fsdp=1, tensor=8)),
    ("llama3_70b_v5p_64.yaml", (), "v5p:4x4x4", MeshConfig(data=32, fsdp=1, tensor=2)),
    ("llama3_70b_v5p_64.yaml", (), "v6e:8x8", MeshConfig(data=8, fsdp=2, tensor=4)),
    ("llama3_70b_v5p_64.yaml", (), "v6e:8x8", MeshConfig(fsdp=64)),
    # Quantised: cut over the chips, and whole on each of them.
    *(
        ("llama3_8b_v5e_16.yaml", ("--model.base_dtype", form), "v5e:4x4", mesh)
        for form in ("int8", "int4", "nf4")
        for mesh in (MeshConfig(fsdp=16), MeshConfig(data=16, fsdp=1))
    ),
    # All activations kept, or those of products alone.
    ("llama3_8b_v5e_16.yaml", NONE, "v5p:4x4x4", MeshConfig(fsdp=64)),
    ("llama3_8b_v5e_16.yaml", DOTS, "v5p:4x4x4", MeshConfig(fsdp=64)),
    ("llama3_8b_v5e_16.yaml", NONE, "v6e:8x8", MeshConfig(fsdp=64)),
    ("llama3_70b_v5p_64.yaml", NONE, "v5p:4x4x4", MeshConfig(fsdp=64)),
    (
        "llama3_8b_v5e_16.yaml",
        (*NONE, "--model.base_dtype", "int8"),
        "v5p:4x4x4",
        MeshConfig(fsdp=64),
    ),
)


def main() -> None:
    table = Table("recipe", "topology", "mesh", "arguments", "temporaries", "sum, estimated")
    origin = provenance()
    chosen = [int(number) for number in sys.argv[1:]] or list(range(len(PROGRAMS)))
    stored = json.loads(RESULT.read_text())["programs"] if sys.argv[1:] else []
    named = [[name, list(changed), where, vars(mesh)] for name, changed, where, mesh in PROGRAMS]
    fields = ("recipe", "changed", "topology", "mesh")
    results = {named.index([found[field] for field in fields]): found for found in stored}
    for number in chosen:
        name, changed, topology_name, mesh = PROGRAMS[number]
        recipe = parse(Recipe, ["--config", str(RECIPES / name), *changed])
        topology = parse_topology(topology_name)
        guess = estimate(recipe, topology.chip, mesh)
        began = time.perf_counter()
        found = compile_step(recipe, topology, mesh)
        results[number] = {
            "recipe": name,
            "changed": changed,
            "topology": topology_name,
            "mesh": dataclasses.asdict(mesh),
            "estimate": dataclasses.asdict(guess) | {"mesh": None},
            "compiled": dataclasses.asdict(found),
            "seconds_to_compile": round(time.perf_counter() - began, 1),
            "commit": origin["commit"],
        }
        # After each: this machine may not have the memory to compile a later one.
        programs = [results[number] for number in sorted(results)]
        write_result(RESULT, {"programs": programs}, origin)
        table.add_row(
            " ".join([name, *changed]),
            topology_name,
            " x ".join(map(str, dataclasses.astuple(mesh))),
            *(f"{size / GIB:.2f} GiB" for size in (found.arguments, found.temporaries)),
            f"{(guess.arguments + guess.temporaries) / (found.arguments + found.temporaries):.0%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
