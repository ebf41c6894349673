"""How much of a groupwise RBF is no constant, no linear function and no function of the norm.

    python -m train.benchmarks.rbf_linearity

Latents and centres are drawn from N(0, 1). Distances in many dimensions concentrate: an RBF as wide
as the default is then nearly a constant plus a line, and the generators' linear residual is that
line already. Below the widths are the settings that mend it.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.generators import basis_features, fixed_centers
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "rbf_linearity.json"
GROUPS, KERNELS = 20_000, 16
# Group sizes g and widths h, and other settings of the RBFs.
SETTINGS: tuple[tuple[int, dict[str, Any]], ...] = (
    *((1, {}), (8, {}), (32, {})),
    *((32, {"bandwidth": h}) for h in (1.0, 0.7, 0.5, 0.35)),
    (64, {"bandwidth": 0.5}),
    (32, {"standardize": True}),
    *((g, {"bandwidth": "spread"}) for g in (8, 32, 64)),
    (32, {"bandwidth": "spread", "standardize": True}),
    *((32, {"projection": d}) for d in (1, 2, 4)),
    (32, {"projection": 4, "bandwidth": "spread", "standardize": True}),
)
COLUMNS = {
    "constant": "of the power, constant",
    "not_linear": "of the variance, not linear in t",
    "not_norm": "nor in |t|^2",
}


def unexplained(features: np.ndarray, variables: np.ndarray) -> np.ndarray:
    """The share of each feature's variance that a constant and the variables leave, `[K]`."""
    design = np.column_stack([np.ones(len(variables)), variables])
    fit, *_ = np.linalg.lstsq(design, features, rcond=None)
    return (features - design @ fit).var(axis=0) / features.var(axis=0)


def shares(
    group_size: int, groups: int = GROUPS, seed: int = 0, **settings: Any
) -> dict[str, float]:
    """The shares of `COLUMNS`, each the mean over the features."""
    cfg = gl.GenLoRAConfig(rank=1, group_size=group_size, kernels=KERNELS, **settings)
    latents, centers = jax.random.split(jax.random.key(seed))
    t = jax.random.normal(latents, (groups, group_size))
    c = jax.random.normal(centers, (KERNELS, cfg.projection or group_size))
    generator = fixed_centers(cfg, "linearity") | {"centers": c}
    features = np.asarray(jax.jit(basis_features, static_argnums=0)(cfg, t, generator), np.float64)
    exact = np.asarray(t, np.float64)
    norms = np.square(exact).sum(axis=1, keepdims=True)
    constant = features.mean(axis=0) ** 2 / np.square(features).mean(axis=0)
    return {
        "constant": float(constant.mean()),
        "not_linear": float(unexplained(features, exact).mean()),
        "not_norm": float(unexplained(features, np.column_stack([exact, norms])).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = [{"g": g, **fields, **shares(g, **fields)} for g, fields in SETTINGS]
    table = Table("g", "settings", *COLUMNS.values())
    for (g, fields), row in zip(SETTINGS, rows, strict=True):
        values = (f"{100 * row[name]:.0f} %" for name in COLUMNS)
        table.add_row(str(g), ", ".join(f"{k} {v}" for k, v in fields.items()), *values)
    Console().print(table)
    write_result(args.out, {"groups": GROUPS, "kernels": KERNELS, "rows": rows})


if __name__ == "__main__":
    main()
