"""How much of a groupwise RBF is no constant, no linear function and no function of the norm.

    python -m train.benchmarks.rbf_linearity

Latents and centres are drawn from N(0, 1). Distances in many dimensions concentrate: an RBF as wide
as the default is then nearly a constant plus a line, and the generators' linear residual is that
line already.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from genlora_jax.basis_functions import gaussian_rbf
from train.benchmarks.measuring import RESULTS, write_result

RESULT = RESULTS / "rbf_linearity.json"
GROUPS, KERNELS = 20_000, 16
# Group sizes g and widths h.
SETTINGS = (
    *((1, 2**0.5), (8, 2**0.5), (32, 2**0.5)),
    *((32, 1.0), (32, 0.7), (32, 0.5), (32, 0.35), (64, 0.5)),
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


def shares(group_size: int, width: float, seed: int = 0) -> dict[str, float]:
    """The shares of `COLUMNS`, each the mean over the features."""
    latents, centers = jax.random.split(jax.random.key(seed))
    t = jax.random.normal(latents, (GROUPS, group_size))
    c = jax.random.normal(centers, (KERNELS, group_size))
    features = np.asarray(gaussian_rbf(t, c, jnp.full(KERNELS, width)), np.float64)
    groups = np.asarray(t, np.float64)
    norms = np.square(groups).sum(axis=1, keepdims=True)
    constant = features.mean(axis=0) ** 2 / np.square(features).mean(axis=0)
    return {
        "constant": float(constant.mean()),
        "not_linear": float(unexplained(features, groups).mean()),
        "not_norm": float(unexplained(features, np.column_stack([groups, norms])).mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    rows = [{"g": g, "h": h, **shares(g, h)} for g, h in SETTINGS]
    table = Table("g", "h", *COLUMNS.values())
    for row in rows:
        values = (f"{100 * row[name]:.0f} %" for name in COLUMNS)
        table.add_row(str(row["g"]), f"{row['h']:.2f}", *values)
    Console().print(table)
    write_result(args.out, {"groups": GROUPS, "kernels": KERNELS, "rows": rows})


if __name__ == "__main__":
    main()
