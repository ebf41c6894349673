"""Steps on a quantised base of LLaMA's shapes: time and memory, beside PEFT with bitsandbytes.

    python -m train.benchmarks.quantised_base

Random weights, drawn and quantised a layer at a time, so that 70B fits one GPU. The recipe is
`train/recipes/llama3_8b_gpu.yaml` with rows that are not packed. An arm's `remat` says what is
recomputed; a recipe that says nothing recomputes all but products (`dots`) where layers are
scanned, else nothing (`none`). Memory is what the compiler reserves for ours, with the part of it
that is the base, and the allocator's peak for PyTorch. An arm that cannot run says why. `--size
tiny` tries the script on any machine.
"""

import argparse
import gc
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.benchmarks.measuring import GIB, RESULTS, write_result
from train.benchmarks.random_base import SIZES
from train.benchmarks.step_time import (
    LORA,
    NOT_PACKED,
    Arm,
    batch,
    measure_ours,
    measure_peft,
    peft,
)

RESULT = RESULTS / "quantised_base.json"
CHECKPOINTED = ("--checkpointing",)


@dataclass(frozen=True)
class Quantised:
    """One program of ours: a form of the base, and a batch."""

    form: str
    size: str = "llama-8b"
    rows: int = 1
    length: int = 2048
    remat: str = "full"
    scan: bool = False
    lora: bool = False

    @property
    def name(self) -> str:
        method = "LoRA r=16" if self.lora else "GenLoRA r=64"
        layers = "scanned" if self.scan else "unrolled"
        shape = f"{self.rows} x {self.length}"
        return f"{self.size}, {self.form}, {method}, {shape}, remat {self.remat}, {layers}"

    def arm(self, length: int | None) -> Arm:
        """The same, with changes of the recipe; `length` replaces its own."""
        changes = batch(self.rows, length or self.length, "--model.remat", self.remat, *NOT_PACKED)
        lora = (*LORA, "--adapter.rank", "16") if self.lora else ()
        return Arm(self.name, self.size, recipe=(*changes, *lora))


# Quantised layers are scanned on GPUs by default, those in bfloat16 are not.
OURS = [
    Quantised("nf4", scan=True),
    Quantised("bf16"),
    Quantised("nf4", size="llama-70b", rows=4, scan=True),
    Quantised("int8", scan=True),
    Quantised("nf4", rows=4, scan=True),
    Quantised("int4", scan=True),
    Quantised("nf4", lora=True, rows=4, scan=True),
    Quantised("nf4", size="llama-70b", scan=True),
    Quantised("nf4", length=32768, scan=True),
    Quantised("nf4", lora=True, scan=True),
    Quantised("nf4"),
    Quantised("bf16", remat="none"),
    Quantised("nf4", rows=4, remat="dots", scan=True),
    Quantised("nf4", rows=4),
]
PEFT = [
    Arm("PEFT + bitsandbytes NF4, 1 x 2048", peft=peft(1, 2048, "--nf4", *CHECKPOINTED)),
    Arm("PEFT + bitsandbytes NF4, 4 x 2048", peft=peft(4, 2048, "--nf4", *CHECKPOINTED)),
    Arm("PEFT, bf16, 1 x 2048", peft=peft(1, 2048, *CHECKPOINTED)),
]


def measure(arm: Quantised, size: str | None, length: int | None, steps: int) -> dict[str, Any]:
    """Step time and memory of one of ours; `error` if it failed."""
    import dataclasses

    import jax

    from genlora_jax.base.quantise import Quantisation
    from train.benchmarks.random_base import random_base

    arm = dataclasses.replace(arm, size=size or arm.size)
    form: Any = arm.form
    try:
        quantisation = None if arm.form == "bf16" else Quantisation(form)
        base = random_base(SIZES[arm.size], scan=arm.scan, quantisation=quantisation)
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(base[1])) / GIB
        found = measure_ours(arm.arm(length), base, steps) | {"base_gib": held}
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[:1]}
    stats = jax.devices()[0].memory_stats() or {}
    return found | {"allocator_peak_gib": stats.get("peak_bytes_in_use", 0) / GIB or None}


def main() -> None:
    """Measures, writes the result after each arm and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", choices=SIZES, help="one size for all arms, to try the script")
    parser.add_argument("--length", type=int, help="one length for all of our arms, likewise")
    parser.add_argument("--only", default="", help="arms whose name this pattern is found in")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for theirs in PEFT:  # before JAX takes the memory
        if re.search(options.only, theirs.name):
            changed = Arm(theirs.name, options.size or theirs.size, peft=theirs.peft)
            rows[theirs.name] = measure_peft(changed, options.steps)
            print(theirs.name, rows[theirs.name], flush=True)
    import jax

    for arm in OURS:
        if re.search(options.only, arm.name):
            rows[arm.name] = measure(arm, options.size, options.length, options.steps)
            print(arm.name, rows[arm.name], flush=True)
            write_result(options.output, {"device": jax.devices()[0].device_kind, "arms": rows})
            gc.collect()
    table = Table("program", "step, ms", "tokens/s", "base GiB", "peak GiB")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, str(row["error"]), "", "", "")
            continue
        sizes = (row.get("base_gib"), row["peak_gib"])
        shown = ["" if size is None else f"{size:.2f}" for size in sizes]
        table.add_row(name, f"{1e3 * row['step_s']:,.0f}", f"{row['tokens_per_s']:,.0f}", *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
