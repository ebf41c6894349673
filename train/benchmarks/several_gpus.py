"""Scaling over the GPUs of one host: meshes beside one GPU, PEFT with DDP and FSDP, and the plan.

    python -m train.benchmarks.several_gpus

The recipe is `train/recipes/llama3_8b_gpu_8.yaml` as it ships, with its rows a GPU on however many
GPUs there are, so that linear scaling is a step as long as on one. Random weights in bfloat16,
packed rows of four examples. All programs are compiled first, several at a time, and then run one
after another. PEFT runs with Liger and checkpointing, a process a GPU. NVLink multicast is off.
"""

import argparse
import dataclasses
import gc
import math
import re
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genlora_jax import sharding
from genlora_jax.training.provenance import provenance
from train.benchmarks.measuring import GIB, RESULTS, gpu_events, union, write_result
from train.benchmarks.peft_step import measure as measure_peft
from train.benchmarks.random_base import SIZES

RECIPE = Path(__file__).parent.parent / "recipes" / "llama3_8b_gpu_8.yaml"
RESULT = RESULTS / "several_gpus.json"
BEGAN = time.perf_counter()
SEGMENTS = 4  # examples in a packed row
# Collectives that XLA lets wait for one another while computation goes on; by default one.
OVERLAP = (("xla_gpu_experimental_parallel_collective_overlap_limit", 4),)
MOST_SEGMENTS = 8  # what packing allows for such rows, see `data.packing.max_segments`


@dataclass(frozen=True)
class Arm:
    """One program of ours: a mesh, rows a GPU, and changes of the recipe."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    rows: int = 4
    length: int = 2048
    size: str = "llama-8b"
    recipe: tuple[str, ...] = ()
    xla: tuple[tuple[str, Any], ...] = ()  # options of the compiler, as `compiler_options` has them

    @property
    def gpus(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def mesh(self) -> dict[str, int]:
        return {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}

    @property
    def name(self) -> str:
        axes = ", ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        options = (f"{name.removeprefix('xla_gpu_')}={value}" for name, value in self.xla)
        changed = ", ".join(("", *self.recipe[1::2], *options))
        return f"{self.family}: {axes or 'one GPU'}{changed}"

    @property
    def family(self) -> str:
        """What it shares with the arm of one GPU that it is compared with."""
        return f"{self.size}, {self.rows} x {self.length} a GPU"


def arms(gpus: int) -> list[Arm]:
    """The programs for so many GPUs, of which half are measured too."""
    if gpus == 1:
        return [Arm()]
    half = gpus // 2
    axes = [{axis: n} for n in dict.fromkeys((half, gpus)) for axis in ("data", "fsdp", "tensor")]
    mixed = [{"data": 2, "fsdp": half}, {"fsdp": half, "tensor": 2}] if half > 1 else []
    meshes = [m for m in [{}, *axes, *mixed] if math.prod(m.values()) > 1 or not m]
    long = [Arm(rows=1, length=8192, **m) for m in ({}, {"data": gpus}, {"fsdp": gpus})]
    large = ("--model.scan", "true")  # 80 layers one by one would compile for minutes
    return [
        *(Arm(**mesh) for mesh in meshes),
        *(Arm(xla=OVERLAP, **mesh) for mesh in meshes if math.prod(mesh.values()) == gpus),
        Arm(fsdp=gpus, xla=OVERLAP, recipe=large),
        *long,
        *(
            Arm(rows=1, size="llama-70b", recipe=large, **{axis: gpus}, xla=xla)
            for axis, xla in (("fsdp", ()), ("fsdp", OVERLAP), ("tensor", ()))
        ),
    ]


@dataclass(frozen=True)
class Program:
    """A lowered step, and what its arguments are made of."""

    arm: Arm
    recipe: Any
    mesh: Any
    optimizer: Any
    lowered: Any


def lower(arm: Arm) -> Program:
    """The recipe's step on an arm's mesh, from shapes alone."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from genlora_jax.hf.load import sharded_shapes
    from genlora_jax.mesh import BATCH, MeshConfig, make_mesh
    from genlora_jax.models.llama import parameter_shapes
    from genlora_jax.training.optim import make_optimizer
    from genlora_jax.training.step import make_train_step
    from train.benchmarks.random_base import random_model

    recipe = arm_recipe(arm)
    mesh = make_mesh(MeshConfig(**arm.mesh), jax.devices()[: arm.gpus])
    model = random_model(SIZES[arm.size], mesh, scan=bool(recipe.model.scan))
    remat = recipe.model.policies(jax.default_backend())[0]
    model = model.clone(remat=remat, attention=recipe.model.attention)
    optimizer = make_optimizer(recipe.optim, 100)
    options = dataclasses.replace(recipe.step_options, max_segments=MOST_SEGMENTS)
    step = make_train_step(model, recipe.adapter, optimizer, options, mesh=mesh)
    params = sharded_shapes(mesh, parameter_shapes(model.clone(mesh=None)))
    state = jax.eval_shape(lambda: _state(recipe, optimizer, params))
    where = sharding.state_shardings(mesh, state)
    state = jax.tree.map(lambda leaf, where: leaf.update(sharding=where), state, where)
    size = (recipe.data.batch_size, recipe.data.length)
    ids = jax.ShapeDtypeStruct(size, jnp.int32, sharding=NamedSharding(mesh, P(BATCH)))
    batch = dict.fromkeys(("input_ids", "segment_ids", "positions"), ids)
    batch["loss_mask"] = ids.update(dtype=jnp.bool_)
    return Program(arm, recipe, mesh, optimizer, step.lower(state, params, batch))


def arm_recipe(arm: Arm) -> Any:
    """The recipe with an arm's batch and changes."""
    from genlora_jax.settings import parse
    from genlora_jax.training.recipe import Recipe

    sizes = ("--data.batch_size", str(arm.rows * arm.gpus), "--data.length", str(arm.length))
    recipe = parse(Recipe, ["--config", str(RECIPE), *sizes, *arm.recipe])
    shape: Any = recipe.model.shape
    size = SIZES[arm.size]
    shape = dataclasses.replace(shape, **size.shape, head_dim=size.config.head_dim)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, shape=shape))


def _state(recipe: Any, optimizer: Any, params: Any) -> Any:
    import jax

    from genlora_jax.adapter import init_adapter
    from genlora_jax.training.step import init_state

    return init_state(init_adapter(recipe.adapter, jax.random.key(0), params), optimizer)


def run(program: Program, compiled: Any, steps: int) -> dict[str, Any]:
    """Seconds of a step, memory, and how much of its collectives computation hides."""
    import jax
    import numpy as np

    from train.benchmarks.random_base import random_base, random_batch

    arm, recipe, mesh = program.arm, program.recipe, program.mesh
    size = dataclasses.replace(SIZES[arm.size], rows=arm.rows * arm.gpus, length=arm.length)
    began = time.perf_counter()
    _, params = random_base(size, mesh, scan=bool(recipe.model.scan))
    state = _state(recipe, program.optimizer, params)
    state = jax.device_put(state, sharding.state_shardings(mesh, state))
    batch = sharding.place_batch(mesh, random_batch(size, SEGMENTS))
    jax.block_until_ready(params)
    made = time.perf_counter() - began
    seconds, losses = [], []
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = compiled(state, params, batch)
        losses.append(float(np.asarray(metrics["loss"])))
        seconds.append(time.perf_counter() - began)
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"{arm.name}: losses {losses}")
    memory = compiled.memory_analysis()
    step = statistics.median(seconds[2:])
    found = {
        "step_s": step,
        "tokens_per_s": size.rows * size.length / step,
        "peak_gib": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / GIB,
        "losses": losses,
        "made_s": made,
    }
    if arm.gpus > 1:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                state, metrics = compiled(state, params, batch)
                jax.block_until_ready(metrics)
            found |= collectives(Path(folder))
    return found | planned(program)


def collectives(folder: Path) -> dict[str, float]:
    """Seconds of a step's collectives on a GPU, and of those the seconds that nothing hides.

    Means over the GPUs of a profile. A collective is hidden while a kernel that is none runs beside
    it.
    """
    whole, bare = [], []
    for events in gpu_events(folder):
        spans = [(e.start_ns, e.start_ns + e.duration_ns, "nccl" in e.name.lower()) for e in events]
        moving = union([(a, b) for a, b, moves in spans if moves])
        if moving:
            busy = union([(a, b) for a, b, moves in spans if not moves])
            both = union([*moving, *busy])
            whole.append(length(moving))
            bare.append(length(both) - length(busy))
    if not whole:
        return {}
    return {
        "collectives_s": statistics.mean(whole) / 1e9,
        "collectives_not_hidden_s": statistics.mean(bare) / 1e9,
    }


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def planned(program: Program) -> dict[str, Any]:
    """What `genlora plan` says of the same step on GPUs of 80 GiB."""
    from genlora_jax.mesh import MeshConfig
    from genlora_jax.plan.chips import parse_topology
    from genlora_jax.plan.estimate import estimate

    chip = parse_topology(f"gpu:{program.arm.gpus}x80").chip
    guess = estimate(program.recipe, chip, MeshConfig(**program.arm.mesh))
    return {
        "planned_gib": (guess.arguments + guess.temporaries) / GIB,
        "planned_s": guess.seconds,
        "planned_received_gib": sum(guess.moved.values()) / GIB,
    }


def measure_files(gpus: int, size: str) -> dict[str, float]:
    """Seconds to merge, export and load a model sharded over all GPUs, and to save its state."""
    import jax

    import genlora_jax as gl
    from genlora_jax.mesh import MeshConfig, make_mesh
    from train.benchmarks.merge_export import write_config
    from train.benchmarks.random_base import random_base

    mesh = make_mesh(MeshConfig(fsdp=gpus), jax.devices()[:gpus])
    recipe = arm_recipe(Arm(fsdp=gpus, size=size))
    held = {"base": random_base(SIZES[size], mesh, scan=False)[1]}
    adapter = gl.init_adapter(recipe.adapter, jax.random.key(0), held["base"], mesh=mesh)
    factors = gl.generate_factors(recipe.adapter, adapter)
    seconds = {}
    folder = Path(tempfile.mkdtemp())

    def timed(name: str, work: Any) -> Any:
        began = time.perf_counter()
        result = jax.block_until_ready(work())
        seconds[name] = time.perf_counter() - began
        return result

    try:
        write_config(folder / "base", SIZES[size])
        timed("merge_compiled_s", lambda: gl.merge(held["base"], factors))
        held["merged"] = timed("merge_s", lambda: gl.merge(held.pop("base"), factors))
        out = folder / "merged"
        timed("export_s", lambda: gl.export_hf(out, held.pop("merged"), base=folder / "base"))
        gc.collect()
        timed("load_s", lambda: gl.load_llama(out, mesh=mesh, scan=False)[1])
        timed("save_adapter_s", lambda: gl.save_adapter(folder / "a", recipe.adapter, adapter))
        timed("load_adapter_s", lambda: gl.load_adapter(folder / "a")[1])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return seconds


def measure_peers(gpus: int, tiny: bool, steps: int) -> dict[str, Any]:
    """PEFT on one GPU, and with DDP and FSDP on several; what fits runs beside another."""
    rows, length = 4, 64 if tiny else 2048
    shape = ["--size", "tiny" if tiny else "llama-8b", "--rows", str(rows), "--length", str(length)]
    flags = [*shape, "--steps", str(steps), "--checkpointing", *([] if tiny else ["--liger"])]
    beside = [(gpus // 2, "ddp")] if gpus > 3 else []
    rounds = [[(1, ""), *beside], *([[(gpus, "ddp")], [(gpus, "fsdp")]] if gpus > 1 else [])]
    found: dict[str, Any] = {}

    def peer(run: tuple[int, str], first: int) -> None:
        count, kind = run
        row = measure_peft([*flags, *(["--shard", kind] if kind else [])], count, first)
        if "step_s" in row:
            row["tokens_per_s"] = count * rows * length / row["step_s"]
        name = "PEFT + Liger, " + (f"{kind.upper()} on {count} GPUs" if kind else "one GPU")
        found[name] = row | {"gpus": count, "family": "PEFT"}
        print(name, found[name], flush=True)

    for together in rounds:
        with ThreadPoolExecutor() as pool:
            list(pool.map(peer, together, (0, 1)))
    return found


def measure_ours(options: argparse.Namespace, chosen: list[Arm], keep: Any) -> None:
    """Compiles all programs and runs one after another; `keep` gets each one's result."""
    from jax.errors import JaxRuntimeError

    programs = []
    with ThreadPoolExecutor(max_workers=8) as pool:
        for arm in chosen:
            program = lower(arm)
            programs.append((program, pool.submit(program.lowered.compile, dict(arm.xla))))
            print(f"{time.perf_counter() - BEGAN:.0f} s: lowered {arm.name}", flush=True)
        for program, compiling in programs:
            try:
                compiled = compiling.result()
                print(f"{time.perf_counter() - BEGAN:.0f} s: {program.arm.name}", flush=True)
                if time.perf_counter() - BEGAN > options.seconds:
                    raise TimeoutError("no time left")
                wait([future for _, future in programs])  # compilers time kernels on the GPUs
                found = run(program, compiled, options.steps)
            except (JaxRuntimeError, TimeoutError) as error:
                found = {"error": str(error).splitlines()[:1]}
            about = {"gpus": program.arm.gpus, "family": program.arm.family}
            keep(program.arm.name, found | program.arm.mesh | about)
            gc.collect()


def main() -> None:
    """Measures, writes the result after each arm and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script")
    parser.add_argument("--only", default="", help="arms whose name this pattern is found in")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no arm begins after these")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    where = provenance()
    result: dict[str, Any] = {"arms": {}}

    def keep(name: str, found: dict[str, Any]) -> None:
        result["arms"][name] = found
        print(name, found, flush=True)
        write_result(options.output, result, where)

    if re.search(options.only, "PEFT"):
        result["arms"] |= measure_peers(options.gpus, options.tiny, options.steps)
    chosen = arms(options.gpus)
    if options.tiny:
        chosen = [dataclasses.replace(arm, size="tiny", length=arm.length // 32) for arm in chosen]
    measure_ours(options, [arm for arm in chosen if re.search(options.only, arm.name)], keep)
    if re.search(options.only, "files"):
        result["files"] = measure_files(options.gpus, "tiny" if options.tiny else "llama-8b")
    write_result(options.output, result, where)
    show(result)


def show(result: dict[str, Any]) -> None:
    """Prints a table; the share of linear scaling is that of tokens/s a GPU on one."""
    rows = result["arms"]
    table = Table(
        "program", "step, ms", "tokens/s", "of linear", "GiB", "planned", "collectives, ms"
    )
    for name, row in rows.items():
        if "error" in row:
            table.add_row(name, str(row["error"]))
            continue
        ones = [r for r in rows.values() if r["gpus"] == 1 and r["family"] == row["family"]]
        one = ones[0].get("tokens_per_s") if ones else None
        share = f"{row['tokens_per_s'] / row['gpus'] / one:.1%}" if one else ""
        moved = f"{1e3 * row['collectives_s']:.0f}" if "collectives_s" in row else ""
        bare = f" ({1e3 * row['collectives_not_hidden_s']:.0f} bare)" if moved else ""
        memory = "" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"
        planned = f"{row['planned_gib']:.1f}" if "planned_gib" in row else ""
        numbers = f"{1e3 * row['step_s']:,.0f}", f"{row['tokens_per_s']:,.0f}"
        table.add_row(name, *numbers, share, memory, planned, moved + bare)
    Console().print(table)
    print(result.get("files"))


if __name__ == "__main__":
    main()
