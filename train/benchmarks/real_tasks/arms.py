"""The arms: what is compared on the real model, and sets of them."""

from dataclasses import replace
from typing import Any

import genlora_jax as gl
from train.benchmarks.frontier.arms import Arm, across, genlora, lora

RANK, GROUP, KERNELS = 64, 32, 16
WELL = {"standardize": True, "bandwidth": "spread", "centers": "latents"}


def rbf(
    kernels: int = KERNELS, group: int = GROUP, *, basis_ratio: float = 1.0, **fields: Any
) -> Arm:
    """RBFs beside the residual, one set of generators for the whole model."""
    arm = across(RANK, group, kernels, **fields)
    return replace(arm, basis_ratio=basis_ratio, shift=arm.shift // 2)


LORA: dict[str, Arm] = {f"lora r={rank}": lora(rank, shift=-1) for rank in (1, 2, 4, 16)}
# The RBFs of version 0.1, and each remedy alone.
RBFS: dict[str, Arm] = {
    "residual g=32": across(RANK, GROUP),
    "rbf": rbf(),
    "rbf, standardised": rbf(standardize=True),
    "rbf, h=0.5": rbf(bandwidth=0.5),
    "rbf, h=spread": rbf(bandwidth="spread"),
    "rbf, centres at latents": rbf(centers="latents"),
    "rbf, ridge": rbf(projection=1),
    "rbf, of 4 dimensions": rbf(projection=4),
    "rbf, rate 0.1": rbf(basis_ratio=0.1),
    "rbf, half of A": rbf(rbf_init=0.5),
}
# Remedies together; each pair (K, g) has as many generator parameters as the residual of g = 32.
TOGETHER: dict[str, Arm] = {
    "rbf, well": rbf(**WELL),
    "rbf, well, half of A": rbf(**WELL, rbf_init=0.5),
    "rbf, ridge, standardised, half of A": rbf(projection=1, standardize=True, rbf_init=0.5),
    "rbf K=48 g=16": rbf(48, 16),
    "rbf K=48 g=16, well, half of A": rbf(48, 16, **WELL, rbf_init=0.5),
    "rbf K=48 g=16, of 4 dimensions, standardised, half of A": rbf(
        48, 16, projection=4, standardize=True, rbf_init=0.5
    ),
    "rbf K=120 g=8, well, half of A": rbf(120, 8, **WELL, rbf_init=0.5),
    "residual g=16": across(RANK, 16),
    "elementwise K=8 g=48, half of A": genlora(32, 48, 8, generator="elementwise", rbf_init=0.5),
}
RELATIVES: dict[str, Arm] = {
    "uni-lora r=4 131k": Arm(cfg=gl.UniLoRAConfig(), shift=0),
    "uni-lora r=4 436k": Arm(cfg=gl.UniLoRAConfig(size=436_000), shift=0),
    "tied lora, A, r=16": lora(16, gl.TiedLoRAConfig, shift=-1),
    "tied lora, B, r=16": lora(16, gl.TiedLoRAConfig, shift=-1, tied="b"),
    "sine-lora r=2": lora(2, gl.SineLoRAConfig, shift=-2),
    "nola r=4 k=1024": lora(4, gl.NOLAConfig, count=1024),
}
# Compression needs a set of generators a target.
WARM: dict[str, Arm] = {
    "target r=32 g=16": genlora(32, 16),
    "target r=32 g=16, from lora": replace(genlora(32, 16), warm_start=0.2),
}
ARMS = RBFS | LORA | WARM | RELATIVES | TOGETHER
FIRST_LOOK = (
    *("lora r=1", "residual g=32", "rbf", "rbf, well, half of A", "lora r=4"),
    *("rbf, standardised", "rbf, h=0.5", "rbf, ridge", "rbf K=48 g=16, well, half of A"),
)
FINAL = (
    *("lora r=1", "lora r=2", "lora r=4", "lora r=16", "residual g=32"),
    *("rbf", "rbf, well, half of A", "rbf K=48 g=16, well, half of A"),
)
SETS: dict[str, tuple[str, ...]] = {
    # The most telling first: a run may end before the last.
    "ablation": tuple(dict.fromkeys((*FIRST_LOOK, *ARMS))),
    "final": FINAL,
}
