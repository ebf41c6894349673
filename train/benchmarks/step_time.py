"""A training step as the one-GPU recipe ships it, and tuned, beside PEFT and PEFT with Liger.

    python -m train.benchmarks.step_time

LLaMA's shapes with random weights in bfloat16. Our arms take `train/recipes/llama3_8b_gpu.yaml`
and change what their name says. Tokens a second are those of the median step. Memory is what the
compiler reserves for ours, and the allocator's peak for PyTorch. PEFT's arms need PyTorch and peft,
and `liger-kernel` for Liger; Unsloth's need `unsloth`; `torchtune_model` says what torchtune's
need. An arm that cannot run says why.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genlora_jax.training.provenance import provenance
from train.benchmarks import peft_step
from train.benchmarks.measuring import RESULTS, product_rate, time_step, write_result
from train.benchmarks.random_base import SIZES

RECIPE = Path(__file__).parent.parent / "recipes" / "llama3_8b_gpu.yaml"
RESULT = RESULTS / "step_time.json"
SEGMENTS = 4  # examples in a packed row
LORA = ("--adapter.class_path", "genlora_jax.LoRAConfig", "--adapter.alpha", "128")
NOT_PACKED = ("--data.pack", "false")
PACKED = ("--segments", str(SEGMENTS))


def batch(rows: int, length: int, *more: str) -> tuple[str, ...]:
    """A step of one micro-batch."""
    sizes = ("--data.batch_size", str(rows), "--data.length", str(length))
    return (*sizes, "--train.accumulate", "1", *more)


@dataclass(frozen=True)
class Arm:
    """One program: changes of the recipe for ours, flags of `peft_step` for PEFT's.

    Of ours, `kept` is the number of layers, the last ones, that keep their products while the
    others recompute all, as `remat: auto` may choose.
    """

    name: str
    size: str = "llama-8b"
    recipe: tuple[str, ...] | None = None
    peft: tuple[str, ...] | None = None
    kept: int | None = None


def peft(rows: int, length: int, *flags: str) -> tuple[str, ...]:
    return ("--rows", str(rows), "--length", str(length), *flags)


def in_20_gib(rows: int, kept: int) -> Arm:
    name = f"GenLoRA, in 20 GiB, {rows} x 2048, {kept} layers kept"
    return Arm(name, recipe=batch(rows, 2048), kept=kept)


OURS = [
    Arm("GenLoRA r=64, the recipe as it is", recipe=()),
    Arm("the same, not packed", recipe=NOT_PACKED),
    Arm("LoRA r=64, the recipe otherwise", recipe=(*LORA, "--adapter.rank", "64")),
    Arm("LoRA r=16, the recipe otherwise", recipe=(*LORA, "--adapter.rank", "16")),
    Arm("GenLoRA, all recomputed, 4 x 2048", recipe=batch(4, 2048, "--model.remat", "full")),
    Arm("GenLoRA, products kept, 2 x 2048", recipe=batch(2, 2048, "--model.remat", "dots")),
    Arm("GenLoRA, 2 x 4096", recipe=batch(2, 4096)),
    Arm("GenLoRA, 1 x 8192", recipe=batch(1, 8192)),
    Arm("GenLoRA, 1 x 8192, not packed", recipe=batch(1, 8192, *NOT_PACKED)),
    Arm("1B: GenLoRA, 8 x 2048", size="llama3.2-1b", recipe=batch(8, 2048)),
]
PEFT = [
    Arm("PEFT, 2 x 2048", peft=peft(2, 2048)),
    Arm("PEFT + Liger, 2 x 2048", peft=peft(2, 2048, "--liger")),
    Arm("PEFT, checkpointing, 4 x 2048", peft=peft(4, 2048, "--checkpointing")),
    Arm("PEFT + Liger, checkpointing, 4 x 2048", peft=peft(4, 2048, "--liger", "--checkpointing")),
    Arm("PEFT + Liger, 2 x 4096", peft=peft(2, 4096, "--liger")),
    Arm("1B: PEFT + Liger, 8 x 2048", size="llama3.2-1b", peft=peft(8, 2048, "--liger")),
]
# Run where `--only` asks for arms.
MORE_OF_OURS = [
    *(in_20_gib(rows, kept) for rows, kept in ((1, 16), (2, 5), (1, 19), (1, 21), (1, 22))),
    Arm("1B: GenLoRA, 1 x 8192, not packed", "llama3.2-1b", recipe=batch(1, 8192, *NOT_PACKED)),
    Arm("1B: GenLoRA, 1 x 8192", size="llama3.2-1b", recipe=batch(1, 8192)),
    Arm("1B: GenLoRA, 2 x 8192", size="llama3.2-1b", recipe=batch(2, 8192)),
]
MORE_OF_PEFT = [
    Arm("PEFT + torch.compile, 2 x 2048", peft=peft(2, 2048, "--compile")),
    Arm("PEFT + torch.compile + Liger, 2 x 2048", peft=peft(2, 2048, "--compile", "--liger")),
    Arm("PEFT + Liger, 1 x 8192, packed", peft=peft(1, 8192, "--liger", *PACKED)),
    Arm("Unsloth, 2 x 2048", peft=peft(2, 2048, "--unsloth")),
    Arm("Unsloth, checkpointing, 2 x 2048", peft=peft(2, 2048, "--unsloth", "--checkpointing")),
    Arm("Unsloth, checkpointing, 4 x 2048", peft=peft(4, 2048, "--unsloth", "--checkpointing")),
    Arm("torchtune, compiled, 2 x 2048", peft=peft(2, 2048, "--torchtune", "--compile")),
    Arm(
        "torchtune, compiled, checkpointing, 4 x 2048",
        peft=peft(4, 2048, "--torchtune", "--compile", "--checkpointing"),
    ),
    Arm("1B: PEFT + torch.compile, 8 x 2048", "llama3.2-1b", peft=peft(8, 2048, "--compile")),
    Arm(
        "1B: PEFT + Liger, 1 x 8192, packed", "llama3.2-1b", peft=peft(1, 8192, "--liger", *PACKED)
    ),
]


def measure_peft(arm: Arm, steps: int) -> dict[str, Any]:
    """Step time and peak memory in a process of its own; `error` if it failed."""
    assert arm.peft is not None
    found = peft_step.measure(["--size", arm.size, "--steps", str(steps), *arm.peft])
    rows, length = int(arm.peft[1]), int(arm.peft[3])
    return found if "error" in found else found | {"tokens_per_s": rows * length / found["step_s"]}


@dataclass(frozen=True)
class Program:
    """The recipe's own step, and what it is called with.

    Attributes:
        recipe: The recipe with the arm's changes.
        make: The jitted step under a `remat` policy, or under one for each layer.
        remat: The arm's.
        operands: State, parameters and batch.
    """

    recipe: Any
    make: Callable[[Any], Any]
    remat: Any
    operands: tuple[Any, ...]


def program_of(arm: Arm, base: tuple[Any, Any]) -> Program:
    """The step of an arm of ours on a base."""
    import jax

    from genlora_jax.adapter import init_adapter
    from genlora_jax.settings import parse
    from genlora_jax.training.optim import make_optimizer
    from genlora_jax.training.recipe import Recipe
    from genlora_jax.training.step import init_state, make_train_step
    from train.benchmarks.random_base import random_batch

    assert arm.recipe is not None
    recipe = parse(Recipe, ["--config", str(RECIPE), *arm.recipe])
    model, params = base
    as_scanned = dataclasses.replace(recipe.model, scan=model.scan)
    remat: Any = as_scanned.policies(jax.default_backend())[0]
    if arm.kept is not None:
        layers = model.config.num_hidden_layers
        if arm.kept > layers:
            raise ValueError(f"{arm.name}: {arm.size} has only {layers} layers")
        remat = ("full",) * (layers - arm.kept) + ("dots",) * arm.kept
    segments = SEGMENTS if recipe.data.pack else 1
    # What packing allows for rows of so many examples, see `data.packing.max_segments`.
    most = 4 * -(-3 * segments // 8) if recipe.data.pack else 1
    size = dataclasses.replace(
        SIZES[arm.size], rows=recipe.data.batch_size, length=recipe.data.length
    )
    optimizer = make_optimizer(recipe.optim, 100)
    state = init_state(init_adapter(recipe.adapter, jax.random.key(0), params), optimizer)
    options = dataclasses.replace(recipe.step_options, max_segments=most)

    def make(remat: Any) -> Any:
        chosen = model.clone(remat=remat, attention=recipe.model.attention)
        return make_train_step(chosen, recipe.adapter, optimizer, options)

    inputs = jax.device_put(random_batch(size, segments))
    return Program(recipe, make, remat, (state, params, inputs))


def measure_ours(
    arm: Arm,
    base: tuple[Any, Any],
    steps: int,
    compiler_options: Mapping[str, Any] | None = None,
    describe: Callable[[Any], dict[str, Any]] = lambda compiled: {},
) -> dict[str, Any]:
    """Step time and memory of the recipe's own step, and what `describe` says of its program."""
    program = program_of(arm, base)
    lower = program.make(program.remat).lower
    options = compiler_options or None
    timing = time_step(lower, *program.operands, calls=steps + 2, compiler_options=options)
    seconds, data = timing.median(warmup=2), program.recipe.data
    return {
        "step_s": seconds,
        "tokens_per_s": data.batch_size * data.length / seconds,
        "peak_gib": timing.arguments_gib + timing.temporaries_gib,
        "compile_s": timing.compile_s,
    } | describe(timing.compiled)


def run(
    ours: list[Arm],
    peft: list[Arm],
    steps: int,
    size: str | None,
    output: Path,
) -> dict[str, Any]:
    """All arms: PyTorch's before JAX takes the memory. The result is written after each of ours."""
    rows: dict[str, Any] = {}
    for arm in peft:
        rows[arm.name] = measure_peft(replace_size(arm, size), steps)
        print(arm.name, rows[arm.name], flush=True)
    import jax

    from train.benchmarks.random_base import random_base

    where = provenance()
    result = {"device": jax.devices()[0].device_kind, "arms": rows}
    for name in dict.fromkeys(replace_size(arm, size).size for arm in ours):
        base = random_base(SIZES[name], scan=False)  # as the recipe has it on a GPU
        for arm in ours:
            if replace_size(arm, size).size != name:
                continue
            try:
                rows[arm.name] = measure_ours(replace_size(arm, size), base, steps)
            except jax.errors.JaxRuntimeError as error:
                rows[arm.name] = {"error": str(error).splitlines()[:1]}
            print(arm.name, rows[arm.name], flush=True)
            write_result(output, result, where)
        del base
    result["product_tflops"] = product_rate() / 1e12
    write_result(output, result, where)
    return rows


def replace_size(arm: Arm, size: str | None) -> Arm:
    return arm if size is None else dataclasses.replace(arm, size=size)


def main() -> None:
    """Measures, writes the result and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--size", choices=SIZES, help="one size for all arms, to try the script")
    parser.add_argument("--only", default="", help="arms whose name this pattern is found in")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    ours, theirs = (
        [
            arm
            for arm in (arms + more if options.only else arms)
            if re.search(options.only, arm.name)
        ]
        for arms, more in ((OURS, MORE_OF_OURS), (PEFT, MORE_OF_PEFT))
    )
    rows = run(ours, theirs, options.steps, options.size, options.output)
    table = Table("program", "step, ms", "tokens/s", "GiB")
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, str(row["error"]), "", "")
            continue
        peak = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        table.add_row(name, f"{1e3 * row['step_s']:,.0f}", f"{row['tokens_per_s']:,.0f}", peak)
    Console().print(table)


if __name__ == "__main__":
    main()
