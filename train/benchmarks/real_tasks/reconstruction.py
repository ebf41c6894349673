"""How well one latent generates the basis vectors of a LoRA that was trained on the real model.

    python -m train.benchmarks.real_tasks.reconstruction --adapter FOLDER

As in the paper's Figure 1: a latent and as many generators as the LoRA has ranks are fitted to the
columns of A, and of B, of some kernels, and beside them the best k directions of these vectors are
stored. Errors are relative, means over the kernels. The adapter is that of `input_on_gpu`, or of
any run with LoRA.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import genlora_jax as gl
from train.benchmarks.compression import fit_basis, stored
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "real_tasks" / "reconstruction.json"
STEPS = 300
ARMS = {
    **{f"residual g={g}": gl.GenLoRAConfig(group_size=g) for g in (8, 16, 32)},
    **{
        f"RBF K=16, h=sqrt 2 g={g}": gl.GenLoRAConfig(kernels=16, rbf_init=0.5, group_size=g)
        for g in (8, 16, 32)
    },
    **{
        f"RBF K=16, h=spread g={g}": gl.GenLoRAConfig(
            kernels=16, rbf_init=0.5, group_size=g, bandwidth="spread"
        )
        for g in (8, 16, 32)
    },
    **{
        f"elementwise k={k}": gl.GenLoRAConfig(
            generator="elementwise", group_size=4096, kernels=k, rbf_init=0.5
        )
        for k in (8, 32, 128)
    },
}
MODULES = ("q_proj", "v_proj", "down_proj")
LAYERS = (2, 15, 27)


def basis_vectors(adapter: gl.Adapter) -> list[np.ndarray]:
    """The columns of A and of B, `[n, r]`, of some kernels."""
    found = []
    for name, sides in adapter.trainable["factors"].items():
        if name.endswith(MODULES):
            for layer in LAYERS:
                found += [np.asarray(sides["a"][layer]), np.asarray(sides["b"][layer]).T]
    return found


def means(fits: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Parameters and error of several fits."""
    return {
        "parameters": round(np.mean([fit["parameters"] for fit in fits])),
        "error": round(float(np.mean([fit["error"] for fit in fits])), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    _, adapter = gl.load_adapter(parser.parse_args().adapter)
    vectors = basis_vectors(adapter)
    rank = vectors[0].shape[1]
    arms: dict[str, Any] = {}
    for name, cfg in ARMS.items():
        fitted = [fit_basis(dataclasses.replace(cfg, rank=rank), x, steps=STEPS) for x in vectors]
        arms[name] = means(fitted)
        print(name, arms[name], flush=True)
    for k, several in enumerate(zip(*map(stored, vectors), strict=True), 1):
        arms[f"directions stored k={k}"] = means(several)
    write_result(RESULT, {"vectors": len(vectors), "steps": STEPS, "arms": arms})


if __name__ == "__main__":
    main()
