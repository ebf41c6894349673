"""The `genlora` command: fine-tune, evaluate, merge, export, inspect and try an adapter."""

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import jsonargparse
from rich.console import Console
from rich.table import Table

from genlora_jax.adapter import Adapter, count_parameters, generate_factors
from genlora_jax.adapter_files import load_adapter
from genlora_jax.analysis import count_above, effective_rank, parameters_by_target
from genlora_jax.atomic_files import refuse_existing
from genlora_jax.base.quantise import BaseDtype
from genlora_jax.factors import HIRA, by_module
from genlora_jax.factors.kind import Kind, Leaves
from genlora_jax.generation.answers import answers
from genlora_jax.generation.decoding import check_sampling
from genlora_jax.generation.subject import load_subject
from genlora_jax.hf.checkpoint import locate
from genlora_jax.hf.peft_export import export_peft
from genlora_jax.hf.peft_import import is_peft, read_modules
from genlora_jax.merge_files import Onto, merge_files, trained_quantisation
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.settings import keep_compilations, parse, parse_arguments, report_errors
from genlora_jax.targets import KernelLocation, split_layer
from genlora_jax.training.find_adapter import find_adapter, remark_on_base
from genlora_jax.validation import listed, require_int


def merge(
    base: str,
    adapter: str,
    out: str,
    dtype: str | None = None,
    base_dtype: BaseDtype | None = None,
    unquantised: list[str] | None = None,
    int4_group: int | None = None,
    onto: Onto = "dequantised",
    overwrite: bool = False,
) -> None:
    """Merges an adapter into its base and writes a Hugging Face checkpoint.

    Args:
        base: The base: directory, here or at `gs://` or `s3://`, or hub id.
        adapter: The adapter's directory, ours or a PEFT LoRA adapter's.
        out: The directory to make.
        dtype: Of the tensors written; by default the base's.
        base_dtype: How the base was quantised in training; by default what the adapter says.
        unquantised: As in training; by default what the adapter says, else `lm_head` alone.
        int4_group: Likewise; else 64.
        onto: The dequantised kernels, as trained on; or the base's own, and how logits then differ.
        overwrite: Replace an existing directory.
    """
    adapter = find_adapter(adapter)
    # Before minutes of loading, not after.
    refuse_existing(out, overwrite=overwrite, inputs=(base, adapter))
    source = locate(base)
    remark_on_base(adapter, source)
    trained_on = trained_quantisation(adapter, base_dtype, unquantised, int4_group)
    print("merged model:", merge_files(source, adapter, out, dtype, trained_on, onto, overwrite))


def export_peft_adapter(
    adapter: str, out: str, base: str | None = None, overwrite: bool = False
) -> None:
    """Writes an adapter as a plain PEFT LoRA adapter, for `peft` and vLLM.

    DoRA and `hadamard=True` (HiRA) become PEFT's own, which vLLM does not serve.

    Args:
        adapter: The adapter's directory.
        out: The directory to make.
        base: Name or path of the base, noted in the adapter's config.
        overwrite: Replace an existing directory.
    """
    adapter = find_adapter(adapter)
    refuse_existing(out, overwrite=overwrite, inputs=(base, adapter))
    cfg, loaded = load_adapter(adapter)
    factors, form = generate_factors(cfg, loaded), loaded.spec.quantisation
    named: Any = {"adapter": adapter, "quantisation": form, "overwrite": overwrite}
    export_peft(out, cfg, factors, base=base or "", **named)
    print(f"PEFT adapter: {out}")


def inspect(adapter: str) -> None:
    """Prints what an adapter adapts, what it costs and how much of its rank it uses.

    Args:
        adapter: The adapter's directory, ours or PEFT's.
    """
    adapter = find_adapter(adapter)
    console = Console()
    if is_peft(adapter):
        console.print(*_peft_inspection(adapter), sep="\n")
        return
    cfg, loaded = load_adapter(adapter)
    console.print(_inspection(cfg, loaded))
    count = count_parameters(loaded)
    text = f"{cfg.summary}: {count:,} parameters"
    if lora := sum(cfg.lora_size(target) or 0 for target in loaded.spec.targets):
        text += f"; LoRA of this rank has {lora:,} ({lora / count:.1f} x)"
    console.print(text)


def _table(kinds: Iterable[Kind]) -> Table:
    """An empty table of targets, which fits 80 columns."""
    columns = ("target", "layers", "shape", "parameters", "values\n> 1 %", "effective\nrank")
    caption = "values and rank: of the gain" if HIRA in kinds else None
    table = Table(*columns, box=None, padding=(0, 1, 0, 0), caption=caption)
    table.columns[0].overflow = "fold"  # a name must be read whole
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _add_row(
    table: Table, name: str, shape: tuple[int, int], count: int, values: jax.Array
) -> None:
    """A target's row, with its singular values `[layers, k]`."""
    table.add_row(
        name,
        str(len(values)),
        f"{shape[0]} x {shape[1]}",
        f"{count:,}",
        f"{count_above(values).mean():.1f}",
        f"{effective_rank(values).mean():.1f}",
    )


def _inspection(cfg: AdapterConfig, adapter: Adapter) -> Table:
    modules = by_module(generate_factors(cfg, adapter))
    table = _table(kind for kind, _ in modules.values())
    counts = parameters_by_target(adapter)
    for target in adapter.spec.targets:
        values = jnp.concatenate(
            [_singular_values(*modules[kernel.path], kernel) for kernel in target.kernels]
        )
        _add_row(table, target.name, (target.d_in, target.d_out), counts[target.name], values)
    if "shared" in counts:
        table.add_row("shared by targets", "", "", f"{counts['shared']:,}")
    return table


def _peft_inspection(path: str) -> tuple[Table, str]:
    """The targets of a PEFT adapter, and a line on the rest."""
    settings, kind, modules, others = read_modules(path)
    table = _table([kind])
    targets: dict[tuple[str, int, int], list[Leaves]] = {}
    (a, b), total = list(kind.axes)[:2], 0
    for name, leaves in modules.items():
        target, _ = split_layer(tuple(name.split(".")))
        targets.setdefault((target, len(leaves[a]), leaves[b].shape[-1]), []).append(leaves)
    for (target, *shape), found in targets.items():
        count = sum(value.size for leaves in found for value in leaves.values())
        rank = max(kind.rank(leaves) or 0 for leaves in found)
        padded = [kind.padded(leaves, rank) for leaves in found]
        values = kind.singular_values(
            {leaf: jnp.stack([x[leaf] for x in padded]) for leaf in (a, b)}
        )
        _add_row(table, target, (shape[0], shape[1]), count, values)
        total += count
    text = f"PEFT's {kind.name}, r {settings.get('r')}: {total:,} parameters"
    if base := settings.get("base_model_name_or_path"):
        text += f"; base {base}"
    return table, text + (f"; also {listed(others)}" if others else "")


def _singular_values(kind: Kind, leaves: Leaves, kernel: KernelLocation) -> jax.Array:
    """Singular values of the adapted layers' deltas or gains, `[layers, k]`."""
    values = kind.singular_values(leaves)
    return values[None] if kernel.stack is None else values[jnp.array(kernel.layers)]


def generate(
    model: str,
    prompt: str,
    *,
    adapter: str | None = None,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    dtype: str | None = None,
    base_dtype: BaseDtype | None = None,
) -> None:
    """Continues a prompt with a base, a merged model, or a base and an adapter.

    Args:
        model: Directory, here or at `gs://` or `s3://`, or hub id.
        prompt: The text to continue.
        adapter: An adapter's directory, ours or a PEFT LoRA adapter's.
        chat: The prompt is a user's message, for the tokenizer's chat template.
        max_new_tokens: Longest continuation.
        temperature: 0 for greedy, else softmax temperature.
        top_p: Sample from the most likely tokens of this total probability.
        seed: Seed of the sampling.
        dtype: Of parameters and computation; by default float32 on CPUs, else bfloat16.
        base_dtype: How kernels are stored; by default as the checkpoint has them.
    """
    check_sampling(max_new_tokens, temperature, top_p)
    require_int("seed", seed, 0)
    if adapter:
        adapter = find_adapter(adapter)
        remark_on_base(adapter, locate(model))
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype, "base_dtype": base_dtype}
    subject = load_subject(model, adapter, batch_size=1, **options)
    if subject.tokenizer.chat_template and not chat:
        print("note: the model has a chat template; --chat true asks in it", file=sys.stderr)
    ids = subject.encode_prompt([{"role": "user", "content": prompt}] if chat else prompt)
    if len(ids) + max_new_tokens > subject.positions:
        raise ValueError(
            f"prompt ({len(ids)} tokens) and max_new_tokens ({max_new_tokens}) exceed the "
            f"model's {subject.positions} positions"
        )
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    ((answer,),) = answers(subject, [ids], max_new_tokens=max_new_tokens, **sampling)
    print(answer if chat else f"{prompt}{answer}")
    if not answer:
        print("note: the model ended at once", file=sys.stderr)


def plan(config: str, topology: str, compile: bool = True) -> None:
    """Prints what a recipe needs on devices that need not be there, and which mesh suits them.

    Args:
        config: The recipe; its `model.shape` spares the download of the model.
        topology: That of a TPU, such as v5e:4x4, or gpu:8x80 for 8 GPUs of 80 GiB.
        compile: Compile the chosen mesh's program where libtpu can, a minute or two.
    """
    # Imported here, as it needs the extra `train`, which most commands do not.
    from genlora_jax.plan.chips import parse_topology
    from genlora_jax.plan.report import report
    from genlora_jax.training.recipe import Recipe

    report(parse(Recipe, ["--config", config]), parse_topology(topology), compiled=compile)


COMMANDS: dict[str, Callable[..., None]] = {
    "merge": merge,
    "export-peft": export_peft_adapter,
    "inspect": inspect,
    "generate": generate,
    "plan": plan,
}
# Commands whose settings are a recipe, and the modules that run them.
RECIPES = {
    "finetune": "genlora_jax.training.finetune",
    "sweep": "genlora_jax.training.sweep.sweep",
    "tokenize": "genlora_jax.training.tokenize",
    "evaluate": "genlora_jax.evaluation.run",
}


def _recipe_main(command: str) -> Callable[[Sequence[str]], None]:
    """Entry point of a command whose settings are a recipe."""
    # Imported here: they take the extra `train`, which the other commands do without.
    try:
        found: Callable[[Sequence[str]], None] = importlib.import_module(RECIPES[command]).main
    except ModuleNotFoundError as error:
        if (error.name or "genlora_jax").startswith("genlora_jax"):
            raise
        sys.exit(f'error: {command} needs {error.name}: pip install "genlora_jax[train]"')
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of the installed `genlora` command."""
    args = sys.argv[1:] if args is None else args
    if args and args[0] in RECIPES:
        _recipe_main(args[0])(args[1:])
        return
    parser = jsonargparse.ArgumentParser(prog="genlora", description=__doc__, exit_on_error=False)
    subcommands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        purpose = (function.__doc__ or "").splitlines()[0]
        command = jsonargparse.ArgumentParser(description=purpose, exit_on_error=False)
        command.add_function_arguments(function, skip={"overwrite"}, as_positional=False)
        if "overwrite" in signature(function).parameters:
            command.add_argument("--overwrite", action="store_true", help="replace what is there")
        subcommands.add_subcommand(name, command, help=purpose)
    for name in RECIPES:  # for `--help` to list them
        purpose = f"{name} by a recipe: genlora {name} --help"
        subcommands.add_subcommand(name, jsonargparse.ArgumentParser(), help=purpose)
    with report_errors():
        if not args:
            raise ValueError(f"give a command: {', '.join((*RECIPES, *COMMANDS))}; see --help")
        chosen = parse_arguments(parser, args)
        keep_compilations()
        COMMANDS[chosen.subcommand](**vars(chosen[chosen.subcommand]))


if __name__ == "__main__":
    main()
