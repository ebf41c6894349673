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


def from_lora(rank: int, group: int, kernels: int = 0, **fields: Any) -> Arm:
    """Fitted to a LoRA that has a fifth of the steps; compression needs generators a target."""
    return replace(genlora(rank, group, kernels, **fields), warm_start=0.2, shift=2)


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
WARM: dict[str, Arm] = {
    "target r=32 g=16": genlora(32, 16),
    "target r=32 g=16, from lora": from_lora(32, 16),
}
ABLATION = RBFS | LORA | WARM | RELATIVES | TOGETHER
# Pairs with and without RBFs of as many parameters, and larger ones.
EQUAL: dict[str, Arm] = {
    "rbf K=8 r=51, h=spread": replace(across(51, GROUP, 8, bandwidth="spread"), shift=-1),
    "residual r=96 g=32": replace(across(96, GROUP), shift=-1),
    "target r=25 g=16 K=4, h=spread, from lora": from_lora(25, 16, 4, bandwidth="spread"),
    "target r=64 g=16, from lora": from_lora(64, 16),
    "target r=64 g=32, from lora": from_lora(64, 32),
    "residual g=48": replace(across(RANK, 48), shift=-1),
    "residual r=112 g=64": replace(across(112, 64), shift=-1),
    "rbf g=48, h=spread": replace(across(RANK, 48, KERNELS, bandwidth="spread"), shift=-1),
    "residual g=32, product": replace(across(RANK, GROUP, hadamard=True), shift=-1),
}
# As small as adapters of all kernels cannot be.
Q_AND_V = ("q_proj", "v_proj")
SMALL: dict[str, Arm] = {
    "lora r=1, q and v": lora(1, targets=Q_AND_V),
    "residual r=16 g=16, q and v": across(16, 16, targets=Q_AND_V),
    "uni-lora r=4 58k": Arm(cfg=gl.UniLoRAConfig(size=58_000), shift=0),
}
# By rank and group size, with RBFs and without; g = 32, r = 64 is above.
GRID: dict[str, Arm] = {
    f"{'rbf, h=spread' if kernels else 'residual'}, r={rank} g={group}": replace(
        across(rank, group, kernels, bandwidth="spread" if kernels else None), shift=-1
    )
    for rank, group in ((RANK, 8), (RANK, 16), (RANK, 64), (16, GROUP), (32, GROUP), (128, GROUP))
    for kernels in (0, KERNELS)
}
FIRST_LOOK = (
    *("lora r=1", "residual g=32", "rbf", "rbf, well, half of A", "lora r=4"),
    *("rbf, standardised", "rbf, h=0.5", "rbf, ridge", "rbf K=48 g=16, well, half of A"),
)
ARMS = ABLATION | EQUAL | SMALL | GRID
# The most telling first: a run may end before the last.
FINAL = (
    *("lora r=1", "residual g=32", "rbf K=8 r=51, h=spread", "target r=32 g=16, from lora"),
    *("target r=25 g=16 K=4, h=spread, from lora", "lora r=4", "lora r=2", "lora r=16"),
    *("target r=64 g=32, from lora", "rbf, h=spread", "residual r=96 g=32", "residual g=48"),
    *("sine-lora r=2", "rbf g=48, h=spread", "uni-lora r=4 436k", "target r=64 g=16, from lora"),
    *("residual r=112 g=64", "rbf, rate 0.1", "tied lora, A, r=16", "target r=32 g=16"),
    "residual g=32, product",
)
FEW = (
    *("lora r=1", "residual g=32", "rbf K=8 r=51, h=spread", "target r=32 g=16, from lora"),
    *("lora r=4", "target r=64 g=32, from lora", "lora r=16", "lora r=2"),
    *("target r=25 g=16 K=4, h=spread, from lora", "rbf, h=spread", "residual r=96 g=32"),
    *("target r=64 g=16, from lora", "sine-lora r=2", "residual g=48", "uni-lora r=4 436k"),
)
LATER = ("nola r=4 k=1024", "rbf K=120 g=8, well, half of A", "elementwise K=8 g=48, half of A")
SETS: dict[str, tuple[str, ...]] = {
    "ablation": tuple(dict.fromkeys((*FIRST_LOOK, *ABLATION))),
    "final": FINAL,
    "few": FEW,
    "grid": (*GRID, *LATER),
    "small": tuple(SMALL),
}
