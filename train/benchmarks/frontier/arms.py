"""The study's arms: settings under a name, and the grid of rates that each is swept over."""

from typing import Any

import genlora_jax as gl

ALPHA = 2.0  # over the rank: every arm's delta has scale 2

# Four a decade. An arm's grid starts at its method's first rate.
RATES = [10 ** (exponent / 4) for exponent in range(-16, 0)]  # 1e-4 to 0.56
FIRST = {"lora": 1e-3, "genlora": 1e-3}


def lora(rank: int, **fields: Any) -> gl.AdapterConfig:
    return gl.LoRAConfig(rank=rank, alpha=ALPHA * rank, **fields)


def genlora(rank: int, group: int, kernels: int | None, **fields: Any) -> gl.AdapterConfig:
    """Groupwise; `kernels=None` is the linear residual alone."""
    own = {"basis": None} if kernels is None else {"kernels": kernels}
    return gl.GenLoRAConfig(rank=rank, alpha=ALPHA * rank, group_size=group, **own | fields)


ARMS: dict[str, gl.AdapterConfig] = {
    "lora r=1": lora(1),
    "lora r=2": lora(2),
    "lora r=4": lora(4),
    "lora r=8": lora(8),
    "lora r=32": lora(32),
    # Residual alone, by rank and by group size.
    "residual r=8 g=8": genlora(8, 8, None),
    "residual r=16 g=16": genlora(16, 16, None),
    "residual r=32 g=16": genlora(32, 16, None),
    "residual r=32 g=32": genlora(32, 32, None),
    "residual r=64 g=16": genlora(64, 16, None),
    "residual r=128 g=8": genlora(128, 8, None),
    # What the RBFs are worth: by number, beside the residual and alone, from zero or not.
    "rbf K=4 r=16 g=16": genlora(16, 16, 4),
    "rbf K=16 r=16 g=16": genlora(16, 16, 16),
    "rbf K=8 r=32 g=16": genlora(32, 16, 8),
    "rbf K=16 r=16 g=16, half": genlora(16, 16, 16, rbf_init=0.5),
    "rbf K=64 r=16 g=4, half": genlora(16, 4, 64, rbf_init=0.5),
    "rbf alone K=16 r=16 g=16": genlora(16, 16, 16, residual=False),
    "rbf alone K=64 r=16 g=4": genlora(16, 4, 64, residual=False),
    "chebyshev K=2 r=16 g=16": genlora(16, 16, 2, basis="chebyshev", rbf_init=0.5),
    # Scopes.
    "residual r=16 g=16, group": genlora(16, 16, None, normalize="group"),
    "residual r=16 g=16, none": genlora(16, 16, None, normalize="none", latent_std=1.0),
    "residual r=16 g=16, own generators": genlora(16, 16, None, share_generators=False),
    "residual r=16 g=16, shared latents": genlora(
        16, 16, None, share_generators=False, share_latents=True
    ),
    "elementwise g=256 r=32": genlora(32, 256, 4, generator="elementwise"),
    "seeded r=16 g=16": genlora(16, 16, None, latents="seeded"),
}
