"""Host memory of loading a checkpoint with kernels quantised, beyond what is loaded.

    JAX_PLATFORMS=cpu python -m train.benchmarks.quantised_loading --folder FOLDER

Random weights in one file: TinyLlama's shape with ten layers in bfloat16 (1.1 GB) and in float32,
and LLaMA-3.2-1B's with four, whose embedding is its largest tensor by far. Each form in a process
of its own, which has loaded the same file before, so that nothing is compiled: that takes 0.3 to
0.5 GiB for a moment, of whatever size a model. On CPUs host memory holds the result and what is
made on the way; the figure is the peak of the process less the memory at the start and less the
result, beside the largest tensor of the file.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from train.benchmarks.measuring import GIB, RESULTS, write_result
from train.benchmarks.merge_export import HostPeak, write_config
from train.benchmarks.random_base import SIZES, Size

RESULT = RESULTS / "quantised_loading.json"
TINYLLAMA = dataclasses.replace(SIZES["llama-1b"], num_hidden_layers=10)
LLAMA = dataclasses.replace(SIZES["llama3.2-1b"], num_hidden_layers=4)
FILES: dict[str, tuple[Size, Any]] = {
    "TinyLlama, bfloat16": (TINYLLAMA, ml_dtypes.bfloat16),
    "TinyLlama, float32": (TINYLLAMA, np.float32),
    "LLaMA-3.2-1B, bfloat16": (LLAMA, ml_dtypes.bfloat16),
}
FORMS = ("bf16", "int8", "nf4", "int4")


def write_model(directory: Path, size: Size, dtype: Any) -> None:
    """Writes a checkpoint of random numbers, a tensor at a time."""
    from flax.traverse_util import flatten_dict

    from genlora_jax.hf.names import tensors
    from genlora_jax.hf.tensorfile import TensorWriter
    from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes

    write_config(directory, size)
    shapes = parameter_shapes(LlamaForCausalLM(size.config))
    flat = flatten_dict(shapes)
    where = {t.name: t.shape_in_file(flat[t.path].shape) for t in tensors(shapes)}
    entries = {name: _Entry(shape, dtype) for name, shape in where.items()}
    rng = np.random.default_rng(0)
    with TensorWriter(directory / "model.safetensors", entries) as writer:
        for name, shape in where.items():
            writer.write(name, (0.02 * rng.standard_normal(shape, np.float32)).astype(dtype))


@dataclasses.dataclass(frozen=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: Any


def load(folder: Path, model: str, form: Any) -> dict[str, float]:
    """What loading takes in this process."""
    import jax

    import genlora_jax as gl

    jax.block_until_ready(gl.load_llama(folder / model, base_dtype=form)[1])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or the measured load would use what the first freed
    with HostPeak() as peak:
        params = jax.block_until_ready(gl.load_llama(folder / model, base_dtype=form)[1])
    return {
        "result_gib": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / GIB,
        "peak_gib": peak.gib,
    }


def main() -> None:
    """Measures, writes the result and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where files of 4 GB go")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        print(json.dumps(load(given.folder, *given.load)))
        return
    for name, (size, dtype) in FILES.items():
        if not (given.folder / name).exists():
            given.folder.mkdir(parents=True, exist_ok=True)
            write_model(given.folder / name, size, dtype)
    table, rows = Table("file", "form", "result GiB", "beyond it", "of the largest tensor"), []
    command = [sys.executable, "-m", "train.benchmarks.quantised_loading"]
    for name, (size, dtype) in FILES.items():
        largest = size.vocab_size * size.hidden_size * np.dtype(dtype).itemsize / GIB
        for form in FORMS:
            given_to = ["--folder", str(given.folder), "--load", name, form]
            done = subprocess.run([*command, *given_to], stdout=-1, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            beyond = row["peak_gib"] - row["result_gib"]
            share = beyond / largest
            rows.append({"file": name, "form": form} | row | {"of_largest_tensor": share})
            print(rows[-1], flush=True)
            table.add_row(name, form, f"{row['result_gib']:.3f}", f"{beyond:.3f}", f"{share:.2f}")
    write_result(RESULT, {"loads": rows})
    Console().print(table)


if __name__ == "__main__":
    main()
