"""Merging, exporting and loading at size: device time, seconds on disk, memory.

    python -m train.benchmarks.merge_export --model llama-8b

Random weights in bfloat16. The floors are measured in the same run: for the merge, a program that
reads and writes every target kernel once; for export and load, the safetensors library on the same
bytes in shards of 5 GB, from and to host memory. Files lie in the page cache throughout.
"""

import argparse
import gc
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.table import Table
from safetensors import safe_open
from safetensors.numpy import save_file

import genlora_jax as gl
from train.benchmarks.measuring import GIB, RESULTS, median_ms, write_result
from train.benchmarks.random_base import SIZES, Size, random_base

# The package has a function of this name.
merge_module = importlib.import_module("genlora_jax.merge")
RANKS = (16, 32, 64)


def write_config(directory: Path, size: Size) -> None:
    """Writes the `config.json` of a model."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config | size.shape))


def measure_merges(params: Any, results: dict[str, Any]) -> Any:
    """Ours at several ranks, XLA's alone beside it, and the copy that bounds both."""
    calls = 9 if jax.default_backend() == "gpu" else 3
    cfg = gl.LoRAConfig(rank=1)
    targets = gl.init_adapter(cfg, jax.random.key(0), params).spec.targets
    paths = [(*kernel.path, "kernel") for target in targets for kernel in target.kernels]
    flat = flatten_dict(params)
    touch = jax.jit(lambda leaves: [x + jnp.bfloat16(1) for x in leaves], donate_argnums=0)
    kernels = [flat.pop(path) for path in paths]
    del params

    def copy() -> None:
        nonlocal kernels
        kernels = jax.block_until_ready(touch(kernels))

    results["kernel_bytes"] = sum(leaf.nbytes for leaf in kernels)
    results["copy_ms"] = median_ms(copy, calls)
    tree = unflatten_dict(flat | dict(zip(paths, kernels, strict=True)))
    del flat, kernels
    for rank in RANKS:
        adapter = gl.init_adapter(gl.LoRAConfig(rank=rank), jax.random.key(1), tree)
        noise = jax.tree.map(lambda x: x + jnp.float32(1e-3), adapter)
        factors = jax.block_until_ready(gl.generate_factors(gl.LoRAConfig(rank=rank), noise))

        def merge() -> None:
            nonlocal tree
            tree = jax.block_until_ready(gl.merge(tree, factors, donate=True))  # noqa: B023

        results[f"merge_r{rank}_ms"] = median_ms(merge, calls)
    if jax.default_backend() == "gpu":
        results[f"merge_r{RANKS[-1]}_extra_gib"] = program_memory(tree, factors) / GIB
    program = jax.jit(gl.merge, donate_argnums=0)  # within a program it is XLA's alone

    def merge_by_xla() -> None:
        nonlocal tree
        tree = jax.block_until_ready(program(tree, factors))

    results[f"merge_r{RANKS[-1]}_xla_ms"] = median_ms(merge_by_xla, calls)
    return tree


def program_memory(tree: Any, factors: Any) -> int:
    """Most memory of merging a kernel beyond its arguments; the result takes the kernel's."""
    extra = 0
    for kernel, kind, leaves in merge_module.pair_kernels(flatten_dict(tree), factors).values():
        lowered = merge_module._change_donating.lower(kernel, leaves, kind, "merge", True)
        memory = lowered.compile().memory_analysis()
        used = memory.temp_size_in_bytes + memory.output_size_in_bytes
        extra = max(extra, used - memory.alias_size_in_bytes)
    return extra


def measure_command(base: Path, params: Any, results: dict[str, Any]) -> None:
    """Peak memory of `genlora merge`, disk to disk, above that of a command without a model."""
    cfg = gl.LoRAConfig(rank=RANKS[0])
    adapter, merged = base.parent / "adapter", base.parent / "merged"
    gl.save_adapter(adapter, cfg, gl.init_adapter(cfg, jax.random.key(0), params))
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    # Read in the command's process: the kernel's figure for a child includes its parent.
    code = (
        "import sys; from pathlib import Path; from genlora_jax.cli import main; main();"
        "print(next(line for line in Path('/proc/self/status').read_text().splitlines()"
        " if line.startswith('VmHWM')))"
    )
    peaks = []
    for arguments in (
        ["inspect", "--adapter", adapter],
        ["merge", "--base", base, "--adapter", adapter, "--out", merged],
    ):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(int(printed.split()[-2]) * 1024)
    results["merge_command_host_gib"] = (peaks[1] - peaks[0]) / GIB
    shutil.rmtree(merged)


class HostPeak:
    """Peak of this process's resident memory within the block, above that at its start."""

    def __enter__(self) -> "HostPeak":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        self.start = self._read("VmRSS")
        return self

    def __exit__(self, *exc: object) -> None:
        self.gib = (self._read("VmHWM") - self.start) / GIB

    @staticmethod
    def _read(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure_files(params: Any, base: Path, results: dict[str, Any], times: int) -> None:
    """Export and load, and safetensors alone on the same bytes."""
    out, plain = base.parent / "export", base.parent / "plain"
    with HostPeak() as peak:
        results["export_s"] = []
        for _ in range(times):
            fresh(out)
            began = time.perf_counter()
            gl.export_hf(out, params, base=base)
            results["export_s"].append(round(time.perf_counter() - began, 2))
    results["export_host_gib"] = peak.gib
    sums = {path: jnp.sum(x.view(jnp.uint16).astype(jnp.uint32)) for path, x in _flat(params)}
    sums = jax.device_get(sums)
    results["bytes"] = sum(leaf.nbytes for _, leaf in _flat(params))
    for leaf in jax.tree.leaves(params):
        leaf.delete()

    with HostPeak() as peak:
        loaded = gl.load_llama(out)[1]
        results["load_s"] = []
        for _ in range(times):
            for leaf in jax.tree.leaves(loaded):
                leaf.delete()
            began = time.perf_counter()
            loaded = jax.block_until_ready(gl.load_llama(out)[1])
            results["load_s"].append(round(time.perf_counter() - began, 2))
    results["load_host_gib"] = peak.gib
    for path, leaf in _flat(loaded):
        assert int(jnp.sum(leaf.view(jnp.uint16).astype(jnp.uint32))) == int(sums[path]), path
    if jax.default_backend() == "cpu":
        measure_command(out, loaded, results)
    for leaf in jax.tree.leaves(loaded):
        leaf.delete()

    shards: dict[str, Any] = {}
    results["safetensors_read_s"] = []
    for _ in range(times):
        shards.clear()
        began = time.perf_counter()
        for file in sorted(out.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as stream:
                names = stream.keys()
                shards[file.name] = {name: stream.get_tensor(name) for name in names}
        results["safetensors_read_s"].append(round(time.perf_counter() - began, 2))
    results["safetensors_write_s"] = []
    for _ in range(times):
        fresh(plain)
        plain.mkdir()
        began = time.perf_counter()
        for name, arrays in shards.items():
            save_file(arrays, plain / name)
        results["safetensors_write_s"].append(round(time.perf_counter() - began, 2))


def fresh(directory: Path) -> None:
    """Removes a directory and waits for the disk, so that no write pays for the one before."""
    shutil.rmtree(directory, ignore_errors=True)
    os.sync()


def _flat(params: Any) -> list[tuple[tuple[str, ...], Any]]:
    return list(flatten_dict(params).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", choices=SIZES, default="llama-8b")
    parser.add_argument("--folder", type=Path, help="where to write files")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    results: dict[str, Any] = {"model": args.model}
    try:
        write_config(folder / "base", SIZES[args.model])
        with HostPeak() as peak:
            params = measure_merges(random_base(SIZES[args.model])[1], results)
        results["merge_host_gib"] = peak.gib
        measure_files(params, folder / "base", results, args.times)
    finally:
        shutil.rmtree(folder)
    name = f"merge_export_{args.model}_{jax.default_backend()}.json"
    write_result(args.out / name, results)
    table = Table("what", "figure")
    for field, value in results.items():
        table.add_row(field, f"{value:.4g}" if isinstance(value, float) else str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
