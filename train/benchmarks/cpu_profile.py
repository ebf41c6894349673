"""Where the time of a step on CPUs goes, ours and PyTorch's with PEFT: milliseconds by kind.

    python -m train.benchmarks.cpu_profile --model SmolLM2-135M --text grimm.txt

The steps are those of `cpu_step`. Where two of our instructions run at once, both count half.
"""

import argparse
import collections
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from genlora_jax.training.provenance import provenance
from train.benchmarks.cpu_step import PEFT, peft_steps, step_parser, write_recipe
from train.benchmarks.measuring import RESULTS, median_ms, time_step, write_result

OURS = "GenLoRA r=10 g=16"
BASE, ADAPTER = "products of the base and the head", "products of the adapter"
NARROW = 16  # an axis no longer than this is an adapter's rank
NAMED = {
    "attention": r"self_attn/while|scaled_dot_product",
    "loss": r"log_?softmax|nll|jvp\(\)/while|\(head\)",
    "stacks of the scan": r"jit\(dynamic_(update_)?index_in_dim\)",
}


def kind_of(name: str, product: bool, sizes: list[int]) -> str:
    """The kind of an operation: by its sizes if it is a product, else by its name or scope."""
    if product and "self_attn/while" not in name:
        return ADAPTER if min(sizes) <= NARROW else BASE
    found = [kind for kind, pattern in NAMED.items() if re.search(pattern, name.lower())]
    return (found or ["elsewhere"])[0]


def kinds_of(text: str) -> dict[str, str]:
    """The kind of each instruction of a compiled program."""
    bodies: dict[str, list[str]] = {}
    body, lines = "", []
    for line in text.splitlines():
        if line and not line.startswith((" ", "}")) and "{" in line:
            body = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        elif " = " in line:
            lines.append(line.strip().removeprefix("ROOT ").lstrip("%"))
            bodies.setdefault(body, []).append(lines[-1])
    shapes = {line.split(" = ")[0]: line.split(" = ")[1].split(" ")[0] for line in lines}
    kinds = {}
    for line in lines:
        name = line.split(" = ")[0]
        called = re.search(r"calls=%?([\w.-]+)", line)
        whole = [line, *(bodies.get(called[1], []) if called else [])]
        dots = [
            re.findall(r"%?([\w.-]+)", part.split("dot(")[1])[:2]
            for part in whole
            if " dot(" in part
        ]
        operands = [shapes.get(operand, "") for pair in dots for operand in pair]
        sizes = [int(n) for shape in operands for n in re.findall(r"\d+", shape.split("{")[0][3:])]
        scope = (re.findall(r'op_name="([^"]*)"', line) or [""])[0]
        kinds[name] = kind_of(scope, bool(dots), sizes)
        if not scope and re.match(r"(wrapped_broadcast|copy)", name):
            kinds[name] = "stacks of the scan"  # made, filled with zeros, and copied into loops
    return kinds


def shares(events: list[tuple[float, float, str]]) -> dict[str, float]:
    """Milliseconds by kind of events (start, end, kind), each instant divided by what runs."""
    edges = sorted((t, side, kind) for s, e, kind in events for t, side in ((s, 1), (e, -1)))
    running: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for (begin, side, kind), (end, *_) in itertools.pairwise(edges):
        running[kind] += side
        count = sum(running.values())
        for other, many in running.items() if count else [("between instructions", 1)]:
            total[other] += (end - begin) * many / max(count, 1) / 1e6
    return dict(total)


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """A step of GenLoRA as `genlora finetune` makes it."""
    import jax

    from genlora_jax.settings import parse
    from genlora_jax.training import finetune
    from genlora_jax.training.host_memory import keep_memory, share_one_heap
    from genlora_jax.training.recipe import Recipe

    share_one_heap()
    with tempfile.TemporaryDirectory() as scratch:
        recipe_file = write_recipe(options, Path(scratch), OURS, Path(scratch))
        recipe = parse(Recipe, ["--config", str(recipe_file)])
        mesh = finetune.recipe_mesh(recipe)
        run = finetune.prepare(recipe, mesh)
        optimizer = finetune.make_optimizer(recipe.optim, run.steps)

        def initial_state() -> Any:
            adapter = finetune.initial_adapter(recipe.adapter, 0, None, run.base, mesh=mesh)
            return finetune.init_state(adapter, optimizer)

        with finetune.feed(recipe, run) as batches:
            operands = run.base.params, batches.take(None)
        step = finetune.make_train_step(
            run.base.model, recipe.adapter, optimizer, run.options, mesh=mesh
        )
        keep_memory(jax.devices()[0])
        timing = time_step(step.lower, initial_state(), *operands, calls=options.steps)
        state = initial_state()
        with jax.profiler.trace(scratch):
            jax.block_until_ready(timing.compiled(state, *operands))
        file = next(Path(scratch).rglob("*.xplane.pb"))
        kinds = kinds_of(timing.compiled.as_text())
        events = [
            (event.start_ns, event.start_ns + event.duration_ns, kinds[event.name])
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes
            for line in plane.lines
            for event in line.events
            # A loop runs while what is in it does.
            if event.name in kinds and not event.name.startswith(("while", "call", "conditional"))
        ]
    return {"step_ms": 1e3 * timing.median(), "by_kind_ms": shares(events)}


def peft(options: argparse.Namespace) -> dict[str, Any]:
    """A step of PEFT's LoRA."""
    import torch

    step = peft_steps(options)
    step_ms = median_ms(lambda: next(step), options.steps - 1)
    with torch.profiler.profile(record_shapes=True) as profile:
        began = time.perf_counter()
        next(step)
        whole = 1e3 * (time.perf_counter() - began)
    total: collections.Counter[str] = collections.Counter()
    for entry in profile.key_averages(group_by_input_shape=True):
        sizes = [n for shape in entry.input_shapes for n in shape if isinstance(n, int)]
        kind = kind_of(entry.key, entry.key == "aten::mm", sizes)
        total[kind] += entry.self_cpu_time_total / 1e3
    total["elsewhere"] += whole - sum(total.values())
    return {"step_ms": step_ms, "by_kind_ms": dict(total)}


def main() -> None:
    """Profiles both, each in a process of its own, prints a table and writes the result."""
    parser = step_parser(main.__doc__)
    parser.add_argument("--only", choices=("ours", "peft"), help="be the process of one")
    options = parser.parse_args()
    if options.only:
        print(json.dumps({"ours": ours, "peft": peft}[options.only](options)))
        return
    found = {}
    for name, only in ((OURS, "ours"), (PEFT, "peft")):
        command = [sys.executable, "-m", "train.benchmarks.cpu_profile", *sys.argv[1:]]
        done = subprocess.run([*command, "--only", only], check=True, stdout=subprocess.PIPE)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    shape = {name: getattr(options, name) for name in ("rows", "length", "steps")}
    result = {"model": options.model.name, **shape, "arms": found}
    write_result(RESULTS / f"cpu_profile_{options.model.name}.json", result, provenance())
    table = Table("ms", *found)
    kinds = dict.fromkeys(kind for arm in found.values() for kind in arm["by_kind_ms"])
    for kind in kinds:
        table.add_row(kind, *(f"{arm['by_kind_ms'].get(kind, 0):,.0f}" for arm in found.values()))
    table.add_row("step, not profiled", *(f"{arm['step_ms']:,.0f}" for arm in found.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
