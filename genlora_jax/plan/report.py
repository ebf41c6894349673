"""The plan as tables."""

from rich.console import Console
from rich.table import Table

from genlora_jax.mesh import MeshConfig, resolve
from genlora_jax.plan.chips import GIB, Topology
from genlora_jax.plan.compiled import Compiled, compile_step
from genlora_jax.plan.estimate import Estimate, fastest_that_fits
from genlora_jax.training.recipe import Recipe

SHOWN = 8


def report(recipe: Recipe, topology: Topology, *, compiled: bool = True) -> None:
    """Prints what a recipe needs on a topology; `compiled`: by the compiler as well, if it can.

    Raises:
        ValueError: If the recipe's mesh does not fit the topology, or no mesh has the memory.
    """
    console = Console()
    asked = resolve(recipe.mesh, topology.count)
    automatic = recipe.model.remat == "auto"
    recipe, ranked = fastest_that_fits(recipe, topology)
    if automatic:
        line = f"model.remat: {recipe.model.remat}, which auto stands for on the best mesh"
        console.print(f"{line} by this estimate; a run chooses for its own")
    console.print(_meshes(ranked, asked, topology))
    if not (chosen := ranked[0]).fits:
        raise ValueError(
            f"no mesh of {topology.name} has the memory by this estimate: try model.remat full, "
            "a larger train.accumulate, a shorter data.length, or more chips"
        )
    result = None
    if compiled and topology.chip.tpu:
        console.print("compiling ...")
        result = compile_step(recipe, topology, chosen.mesh)
    console.print(_details(chosen, result, topology))


def _meshes(ranked: list[Estimate], asked: MeshConfig, topology: Topology) -> Table:
    """The best meshes, and the recipe's wherever it ranks."""
    columns = ("data x fsdp x tensor", "GiB a chip", "received GiB", "seconds", "")
    table = Table(*columns, title=f"{topology.name}: estimates, best first")
    for found in [e for i, e in enumerate(ranked) if i < SHOWN or e.mesh == asked]:
        notes = ["too large"] * (not found.fits) + ["the recipe's"] * (found.mesh == asked)
        table.add_row(
            f"{found.mesh.data} x {found.mesh.fsdp} x {found.mesh.tensor}",
            f"{(found.arguments + found.temporaries) / GIB:.2f}",
            f"{sum(found.moved.values()) / GIB:.2f}",
            f"{found.seconds:.3g}",
            ", ".join(notes),
        )
    return table


def _details(chosen: Estimate, compiled: Compiled | None, topology: Topology) -> Table:
    """One mesh's estimate, beside the compiler's figures where there are some."""
    mesh = chosen.mesh
    title = f"mesh: {{data: {mesh.data}, fsdp: {mesh.fsdp}, tensor: {mesh.tensor}}}"
    table = Table("a chip", "estimate", "compiled", title=title)

    def row(name: str, estimate: float, found: float | None = None) -> None:
        shown = "-" if found is None else f"{found / GIB:.2f} GiB"
        table.add_row(name, f"{estimate / GIB:.2f} GiB", shown)

    def left(held: Estimate | Compiled) -> float:
        return topology.chip.memory - held.arguments - held.temporaries

    row("arguments", chosen.arguments, compiled.arguments if compiled else None)
    row("temporaries", chosen.temporaries, compiled.temporaries if compiled else None)
    row("memory left", left(chosen), left(compiled) if compiled else None)
    for name, size in chosen.moved.items():
        row(f"received for {name}", size)
    for name, size in (compiled.collectives if compiled else {}).items():
        table.add_row(name, "-", f"{size / GIB:.2f} GiB")
    table.add_row("TFLOP", f"{chosen.flops / 1e12:.1f}", "-")
    table.add_row("step, by its roofline", f"{chosen.seconds:.3g} s", "-")
    return table
