"""Merging on disk: a base's checkpoint and an adapter's directory to a merged checkpoint."""

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax.adapter_files import load_spec
from genlora_jax.base.quantise import BaseDtype, Quantisation, quantisation_of
from genlora_jax.hf.checkpoint import CONFIG, checkpoint_dtype, read_json
from genlora_jax.hf.export import export_hf
from genlora_jax.hf.load import load_llama, parse_dtype
from genlora_jax.hf.peft_import import is_peft, load_onto
from genlora_jax.hf.tokenizer import changed_generation_config
from genlora_jax.inject import apply
from genlora_jax.merge import merge
from genlora_jax.models.llama import LlamaForCausalLM

Onto = Literal["dequantised", "original"]
TOKENS = 256  # that the difference in logits is measured on


def trained_quantisation(
    adapter: str,
    base_dtype: BaseDtype | None,
    unquantised: Sequence[str] | None,
    int4_group: int | None,
) -> Quantisation | None:
    """How a base was quantised when an adapter was trained; None if neither it nor any flag says.

    What is given goes before what the adapter says; of another form than is given, that does not
    count. A PEFT adapter says nothing.

    Raises:
        ValueError: If the form is missing.
    """
    found = None if is_peft(adapter) else load_spec(adapter).quantisation
    if base_dtype is not None and (found is None or found.form != base_dtype):
        found = Quantisation(base_dtype)
    given: dict[str, Any] = {"unquantised": unquantised, "group": int4_group}
    given = {name: value for name, value in given.items() if value is not None}
    if given and found is None:
        raise ValueError("--unquantised and --int4_group take --base_dtype: give that as well")
    return found and dataclasses.replace(found, **given)


def merge_files(
    source: Path,
    adapter: str,
    out: str,
    dtype: str | None,
    trained_on: Quantisation | None,
    onto: Onto,
    overwrite: bool,
) -> str:
    """Writes the merged checkpoint.

    Args:
        source: The base's directory.
        adapter: The adapter's directory.
        out: The directory to make.
        dtype: Of the tensors written; by default the base's.
        trained_on: See `trained_quantisation`.
        onto: The kernels that the adapter was trained on, or those of the checkpoint.
        overwrite: Replace an existing directory.

    Returns:
        What was written, in words.

    Raises:
        ValueError: If the original kernels are asked for and the checkpoint has quantised ones.
    """
    if onto == "original":
        _refuse_quantised(source)
    changed_generation_config(source, adapter)  # refuses a tokenizer that does not fit
    stored_dtype = checkpoint_dtype(source)
    out_dtype = parse_dtype(dtype or stored_dtype)
    # No narrower than base or output, so that the merged kernel is rounded once.
    with jax.numpy_dtype_promotion("standard"):
        merge_dtype = jnp.promote_types(stored_dtype, out_dtype)

    def load(quantisation: Quantisation | None) -> tuple[LlamaForCausalLM, Any, Any]:
        options: dict[str, Any] = {}
        if quantisation is not None:
            options = {
                "base_dtype": quantisation.form,
                "unquantised": quantisation.unquantised,
                "int4_group": quantisation.group,
            }
        model, params = load_llama(source, dtype=merge_dtype, param_dtype=merge_dtype, **options)
        return load_onto(adapter, model, params, source)

    if trained_on is not None and not trained_on.rounds:
        trained_on = Quantisation("bf16")  # the same numbers
    quantised = trained_on is not None and trained_on.rounds
    compared = trained_on if quantised and onto == "original" else None
    if compared is not None:
        trained = _logits(*load(compared))
        with warnings.catch_warnings():  # that the base is stored otherwise: this says more
            warnings.filterwarnings("ignore", message=".* was trained on a base in ")
            model, params, factors = load(Quantisation("bf16"))
    else:
        model, params, factors = load(trained_on)
    quantisation = quantisation_of(params)
    merged = merge(params, factors, donate=True)
    if compared is not None:
        _warn_of_difference(trained, _logits(model, merged, {}), compared)
    export_hf(out, merged, base=source, adapter=adapter, dtype=out_dtype, overwrite=overwrite)
    onto_what = f", onto the kernels dequantised from {quantisation}" if quantisation else ""
    return f"{out} ({out_dtype}{onto_what})"


def _refuse_quantised(source: Path) -> None:
    """Raises ValueError if a checkpoint is quantised, and so does not hold the original kernels."""
    if made := read_json(source / CONFIG).get("quantization_config"):
        method = made.get("quant_method") if isinstance(made, dict) else made
        raise ValueError(
            f"--onto original: {source} is itself quantised (quant_method {method!r}) and does not "
            "hold the original kernels; leave it out, or give the original model as --base"
        )


def _logits(model: LlamaForCausalLM, params: Any, factors: Mapping[str, Any]) -> np.ndarray:
    """Logits after random tokens, float32."""
    cfg = model.config
    shape = (1, min(TOKENS, cfg.max_position_embeddings))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, shape).astype(np.int32)
    logits = jax.jit(lambda p, f: apply(model, p, f, ids).astype(jnp.float32))(params, factors)
    return np.asarray(logits)


def _warn_of_difference(trained: np.ndarray, merged: np.ndarray, form: Quantisation) -> None:
    difference = np.abs(merged - trained)
    agree = (merged.argmax(-1) == trained.argmax(-1)).mean()
    warnings.warn(
        f"the adapter was trained on kernels in {form} and is merged onto the original ones. "
        f"Logits of {trained.shape[1]} random tokens differ by {difference.mean():.3g} in the mean "
        f"and {difference.max():.3g} at most (their standard deviation is {trained.std():.3g}); "
        f"{agree:.1%} of the most likely tokens agree",
        stacklevel=3,
    )
