"""Compression: GenLoRA fitted to the factors of a trained LoRA, beside LoRA of lower ranks.

    python -m train.benchmarks.compression --adapter qwen2.5-3b-lora-r4

Two questions. What error is left when a real adapter (rank 4 on q_proj and v_proj of Qwen2.5-3B)
is fitted by GenLoRA, at how many parameters, and what does truncation do with as many? And what
error is left when one latent generates several vectors: real basis vectors, random ones and
smooth ones?
"""

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.compression import minimise
from genlora_jax.generators import fixed_centers, generate, init_weights, weight_shapes
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "compression.json"
STEPS = 300
QWEN_3B = LlamaConfig(
    vocab_size=151936,
    num_hidden_layers=36,
    hidden_size=2048,
    intermediate_size=11008,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=128,
    attention_bias=True,
    tie_word_embeddings=True,
)
LINEAR = gl.GenLoRAConfig(rank=4, alpha=16.0, group_size=16, normalize="none")
RBF = dataclasses.replace(LINEAR, kernels=8)
# One group as long as the longest latent: a curve through R^4, and a point on it for each position.
CURVE = dataclasses.replace(LINEAR, generator="elementwise", group_size=2048)


def _per_layer(cfg: gl.GenLoRAConfig, **changes: Any) -> gl.GenLoRAConfig:
    """The config with a set of generators for each layer: the arms named `own`."""
    return dataclasses.replace(cfg, share_generators=False, **changes)


ARMS: dict[str, gl.AdapterConfig] = {
    **{f"LoRA r={r}": gl.LoRAConfig(rank=r) for r in (1, 2, 3)},
    **{f"residual, shared, g={g}": dataclasses.replace(LINEAR, group_size=g) for g in (8, 16, 32)},
    "residual, shared, g=16, r=8": dataclasses.replace(LINEAR, rank=8),
    "residual, shared, g=16, normalised": dataclasses.replace(LINEAR, normalize="latent"),
    "RBF K=8, shared, g=16": RBF,
    **{f"residual, own, g={g}": _per_layer(LINEAR, group_size=g) for g in (8, 16)},
    "RBF K=8, own, g=16": _per_layer(RBF),
    "elementwise K=32, shared": dataclasses.replace(CURVE, kernels=32),
    **{f"elementwise K={k}, own": _per_layer(CURVE, kernels=k) for k in (8, 32, 128)},
}
BASIS_ARMS = {
    **{f"residual g={g}": gl.GenLoRAConfig(group_size=g) for g in (8, 16, 32)},
    **{
        f"RBF K=8 g={g}": gl.GenLoRAConfig(kernels=8, rbf_init=0.5, group_size=g)
        for g in (8, 16, 32)
    },
    **{
        f"elementwise K={k}": gl.GenLoRAConfig(
            generator="elementwise", group_size=2048, kernels=k, rbf_init=0.5
        )
        for k in (8, 32, 128)
    },
}


def fit_basis(cfg: gl.GenLoRAConfig, vectors: Any, *, steps: int) -> dict[str, Any]:
    """Fits one latent and `cfg.rank` generators to as many vectors `[n, r]`.

    Returns:
        The relative error `|X' - X|_F / |X|_F`, the number of parameters, and the basis `[n, r]`.
    """
    vectors = jnp.asarray(vectors, jnp.float32)
    key, n = jax.random.key(0), vectors.shape[0]
    norm = jnp.linalg.norm(vectors)
    z = jnp.linalg.svd(vectors, full_matrices=False)[0][:, 0] * n**0.5
    centers = fixed_centers(cfg, "basis") if cfg.joint else {}
    normals = {p: jax.random.normal(key, shape) for p, shape in weight_shapes(cfg, n).items()}
    weights = init_weights(cfg, normals, z[None], centers)
    weights = jax.tree.map(lambda w: w * norm / cfg.rank**0.5, weights)

    def loss(tree: Any, target: jax.Array) -> jax.Array:
        error = generate(cfg, tree["latent"], tree["generator"]) - target
        return jnp.square(error).sum() / jnp.square(target).sum()

    start = {"latent": z, "generator": centers | weights}
    tree, _ = minimise(loss, start, vectors, steps=steps, learning_rate=0.1)
    return {
        "error": float(loss(tree, vectors)) ** 0.5,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(tree)),
        "basis": generate(cfg, tree["latent"], tree["generator"]),
    }


def smooth_vectors(n: int, r: int) -> np.ndarray:
    """Sums of the first few waves on n points: vectors of which neighbours are alike."""
    rng = np.random.default_rng(1)
    t = np.linspace(0, 2 * np.pi, n)[:, None]
    waves = np.concatenate([f(k * t) for k in range(1, 9) for f in (np.sin, np.cos)], axis=1)
    return waves @ rng.standard_normal((16, r))


def stored(vectors: np.ndarray) -> list[dict[str, Any]]:
    """Parameters and error of storing the best k directions of r vectors, k = 1 ... r - 1."""
    n, r = vectors.shape
    power = np.square(np.linalg.svd(vectors, compute_uv=False))
    return [
        {"error": float(np.sqrt(power[k:].sum() / power.sum())), "parameters": k * (n + r)}
        for k in range(1, r)
    ]


def compress(factors: Any) -> dict[str, Any]:
    """Every arm fitted to the adapter."""
    arms = {}
    for name, cfg in ARMS.items():
        began = time.perf_counter()
        _, report = gl.compress(cfg, factors, steps=STEPS)
        arms[name] = {
            "parameters": report.parameters,
            "error": report.error,
            "errors": report.errors,
            "seconds": time.perf_counter() - began,
            "config": dataclasses.asdict(cfg),
        }
        print(f"{name}: {report.parameters:,} parameters, error {report.error:.4f}", flush=True)
    return arms


def reconstruct(factors: Any) -> dict[str, Any]:
    """One latent for 8 vectors: real ones (two layers' A), random ones and smooth ones."""
    a = np.asarray(factors["model"]["layers"]["self_attn"]["q_proj"]["a"], np.float64)
    n = a.shape[1]
    targets = {
        "real": a[17:19].transpose(1, 0, 2).reshape(n, -1),
        "random": np.random.default_rng(0).standard_normal((n, 8)),
        "smooth": smooth_vectors(n, 8),
    }
    results = {}
    for name, vectors in targets.items():
        results[name] = {"stored": stored(vectors)}
        for arm, cfg in BASIS_ARMS.items():
            fitted = fit_basis(dataclasses.replace(cfg, rank=8), vectors, steps=STEPS)
            del fitted["basis"]
            results[name][arm] = fitted
    return results


def show(result: dict[str, Any]) -> None:
    """Prints both tables."""
    table = Table("arm", "parameters", "error", "q_proj", "v_proj")
    for name, arm in result["arms"].items():
        errors = {target.rsplit(".", 1)[-1]: error for target, error in arm["errors"].items()}
        each = [f"{errors[target]:.3f}" for target in ("q_proj", "v_proj")]
        table.add_row(name, f"{arm['parameters']:,}", f"{arm['error']:.3f}", *each)
    Console().print(table)
    basis = result["basis"]
    table = Table("one latent for 8 vectors", "parameters", *basis)
    for arm in BASIS_ARMS:
        count = basis["real"][arm]["parameters"]
        table.add_row(arm, f"{count:,}", *(f"{basis[name][arm]['error']:.3f}" for name in basis))
    for k, one in enumerate(basis["real"]["stored"], 1):
        each = [f"{basis[name]['stored'][k - 1]['error']:.3f}" for name in basis]
        table.add_row(f"{k} directions stored", f"{one['parameters']:,}", *each)
    Console().print(table)


def main() -> None:
    """Runs all arms, prints two tables and writes the result."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--adapter", type=Path, required=True)
    args = parser.parse_args()
    factors = gl.import_peft(args.adapter, parameter_shapes(LlamaForCausalLM(QWEN_3B)))
    began = time.perf_counter()
    result: dict[str, Any] = {"arms": compress(factors), "basis": reconstruct(factors)}
    result |= {"steps": STEPS, "seconds": time.perf_counter() - began}
    write_result(RESULT, result)
    show(result)


if __name__ == "__main__":
    main()
