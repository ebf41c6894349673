"""What a pod reads of a checkpoint in a bucket when a run starts, and how long that must take.

    JAX_PLATFORMS=cpu python -m train.benchmarks.startup

Computed, not run: from the shapes of the recipes, by the rule of `genlora_jax.hf.load`. The rows of
a tensor are divided among all chips, or among as many as their number allows. The rates are
assumptions; a start takes at least the longest of the three times.
"""

import math
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict
from rich.console import Console
from rich.table import Table

from genlora_jax.hf.names import tensors
from genlora_jax.plan.sizes import shapes_of
from genlora_jax.settings import parse
from genlora_jax.training.provenance import provenance
from genlora_jax.training.recipe import Recipe
from train.benchmarks.measuring import RESULTS, write_result

RECIPES = Path(__file__).parent.parent / "recipes"
MODELS = {"8B": "llama3_8b_v5e_16.yaml", "70B": "llama3_70b_v5p_64.yaml"}
HOSTS, CHIPS_PER_HOST = (4, 16, 64, 256, 1024), 4
BYTES = 2  # of a value, in bfloat16
ASSUMED = {
    "bytes_per_second_of_a_host": 1e9,  # several streams of Python over TLS; its link has 12.5e9
    "bytes_per_second_of_the_bucket": 25e9,  # 200 Gbit/s, a project's usual quota in a region
    "requests_per_second_of_the_bucket": 5000,  # what a bucket begins with, before it scales
}


def read_by_a_pod(shapes: Any, hosts: int) -> dict[str, float]:
    """Bytes and requests of a start: those of one host, and of all."""
    chips, flat = hosts * CHIPS_PER_HOST, flatten_dict(shapes)
    of_host, in_all, requests = 0.0, 0, 0
    for tensor in tensors(shapes):
        shape = tensor.shape_in_file(flat[tensor.path].shape)
        size, parts = BYTES * math.prod(shape), math.gcd(shape[0], chips)
        of_host += size * min(CHIPS_PER_HOST / parts, 1)
        in_all += size * chips // parts
        requests += min(CHIPS_PER_HOST, parts)
    return {
        "bytes_of_a_host": of_host,
        "bytes_in_all": in_all,
        "requests_in_all": requests * hosts,
    }


def seconds(read: dict[str, float]) -> dict[str, float]:
    """The three times that a start takes at least."""
    by_host, by_bucket, by_requests = ASSUMED.values()
    return {
        "seconds_by_host": read["bytes_of_a_host"] / by_host,
        "seconds_by_bucket": read["bytes_in_all"] / by_bucket,
        "seconds_by_requests": read["requests_in_all"] / by_requests,
    }


def main() -> None:
    names = ("model", "hosts", "GB a host", "GB in all", "by host", "by bucket", "by requests")
    table, results = Table(*names), []
    for model, name in MODELS.items():
        recipe = parse(Recipe, ["--config", str(RECIPES / name)])
        shapes = shapes_of(recipe).params
        for hosts in HOSTS:
            read = read_by_a_pod(shapes, hosts)
            times = seconds(read)
            results.append({"model": model, "hosts": hosts} | read | times)
            gigabytes = (read["bytes_of_a_host"] / 1e9, read["bytes_in_all"] / 1e9)
            shown = (
                *(f"{size:,.2f}" for size in gigabytes),
                *(f"{t:.1f} s" for t in times.values()),
            )
            table.add_row(model, str(hosts), *shown)
    Console().print(table)
    result = {"starts": results, "assumed": ASSUMED, "chips_per_host": CHIPS_PER_HOST}
    write_result(RESULTS / "startup.json", result, provenance())


if __name__ == "__main__":
    main()
