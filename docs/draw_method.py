"""Draws `docs/method.svg`: one latent becomes r basis vectors. `python docs/draw_method.py`.

The curves and the bars are computed by the library, on a random latent.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np

from genlora_jax import GenLoRAConfig
from genlora_jax.generators import (
    basis_features,
    fixed_centers,
    generate,
    init_weights,
    normalize_latent,
    weight_shapes,
)

mpl.use("Agg")
import matplotlib.pyplot as plt

FILE = Path(__file__).with_name("method.svg")


def bars(axes: Any, values: np.ndarray, color: str, title: str) -> None:
    """A latent, or basis vectors, as an image of one column a vector."""
    axes.imshow(values, aspect="auto", cmap=color, interpolation="nearest")
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def main() -> None:
    """Draws the picture."""
    n, cfg = 32, GenLoRAConfig(rank=12, group_size=8, kernels=3, rbf_init=0.5)
    key = jax.random.key(3)
    z = cfg.latent_std * jax.random.normal(key, (n,))
    centers = fixed_centers(cfg, "picture")
    shapes = weight_shapes(cfg, n)
    normals = {part: jax.random.normal(key, shape) for part, shape in shapes.items()}
    generator = centers | init_weights(cfg, normals, z[None], centers)
    groups = normalize_latent(cfg, z)
    features = basis_features(cfg, groups, generator)
    basis = generate(cfg, z, generator)

    mpl.rcParams["svg.hashsalt"] = "genlora"  # the same file every time
    figure, axes = plt.subplots(
        1, 5, figsize=(10, 3), width_ratios=[0.4, 2.2, 2.6, 3.2, 3.6], layout="constrained"
    )
    bars(axes[0], np.asarray(z)[:, None], "RdBu", f"latent\n[n={n}]")
    bars(axes[1], np.asarray(groups), "RdBu", "normalised, in\ngroups of g=8")
    t = jnp.linspace(-3, 3, 200)
    for k in range(cfg.kernels):
        axes[2].plot(t, np.exp(-np.square(t - 1.6 * (k - 1)) / 2), color=f"C{k}")
    axes[2].plot(t, t / 3, "k--", lw=1)
    axes[2].set_title("K=3 Gaussian RBFs\nand a linear residual", fontsize=9)
    axes[2].set_xticks([])
    axes[2].set_yticks([])
    both = np.concatenate([np.asarray(features), np.asarray(groups)], axis=1)
    bars(axes[3], both, "viridis", "features [phi(t), t]\nof each group")
    bars(axes[4], np.asarray(basis), "RdBu", f"times r=12 generators: A\n[n={n}, r=12]")
    figure.savefig(FILE, metadata={"Date": None})
    print(FILE)


if __name__ == "__main__":
    main()
