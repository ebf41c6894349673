"""The study's arms: settings under a name, and the grid of rates that each is swept over."""

from dataclasses import dataclass, replace
from typing import Any

import genlora_jax as gl

ALPHA = 2.0  # over the rank: every arm's delta has scale 2
PER_DECADE = 4
# Exponents (in steps of the grid) of the first rates to try: 1.8e-3 and 5.6e-4.
FIRST = {"hard": -11, "known": -13}


def rate_at(exponent: int) -> float:
    """A rate of the grid, four a decade."""
    return float(f"{10 ** (exponent / PER_DECADE):.3g}")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A setting whose rates are swept.

    Attributes:
        cfg: The adapter.
        ratio: Rate of the generators over that of the latents.
        b_ratio: Rate of B over that of A, as in LoRA+.
        basis_ratio: Rate of the basis functions over that of the residual.
        warm_start: Share of the steps in which a LoRA is trained, to which the adapter is fitted.
        shift: Steps of the grid from where other arms' rates start to where this one's do.
        weight_decay: Decoupled, of every array of the adapter.
    """

    cfg: gl.AdapterConfig
    ratio: float = 0.3
    b_ratio: float = 1.0
    basis_ratio: float = 1.0
    warm_start: float = 0.0
    shift: int = 0
    weight_decay: float = 0.0


def lora(
    rank: int, kind: Any = gl.LoRAConfig, *, b_ratio: float = 1.0, shift: int = 0, **fields: Any
) -> Arm:
    """LoRA or a relative of it."""
    cfg = kind(rank=rank, alpha=ALPHA * rank, **fields)
    return Arm(cfg=cfg, b_ratio=b_ratio, shift=shift)


def genlora(rank: int, group: int, kernels: int = 0, *, ratio: float = 0.3, **fields: Any) -> Arm:
    """One set of generators a target; `kernels=0` is the linear residual alone."""
    cfg = gl.GenLoRAConfig(
        rank=rank, alpha=ALPHA * rank, group_size=group, kernels=kernels, **fields
    )
    # Basis functions that carry part of the initial variance need a lower rate.
    carried = cfg.kernels > 0 and (cfg.rbf_init > 0 or not cfg.residual)
    return Arm(cfg=cfg, ratio=ratio, shift=-2 if carried else 0)


def across(rank: int, group: int, kernels: int = 0, **fields: Any) -> Arm:
    """One set of generators for all targets."""
    return genlora(rank, group, kernels, share_across_targets=True, **fields)


def b_only(rank: int, group: int, kernels: int = 0, **fields: Any) -> Arm:
    """One set of generators for all targets, on side B; A is random."""
    return across(rank, group, kernels, side_a="seeded", **fields)


MAIN: dict[str, Arm] = {
    "lora r=1": lora(1),
    "lora r=2": lora(2),
    "lora r=4": lora(4),
    "lora r=8": lora(8),
    "lora r=32": lora(32),
    "target r=16 g=16": genlora(16, 16),
    "target r=32 g=16": genlora(32, 16),
    "target r=64 g=16": genlora(64, 16),
    "target r=128 g=16": genlora(128, 16),
    "model r=32 g=16": across(32, 16),
    "model r=64 g=16": across(64, 16),
    "model r=128 g=16": across(128, 16),
    "model r=64 g=32": across(64, 32),
    "model r=128 g=32": across(128, 32),
    "rbf model K=16 r=64 g=16": across(64, 16, 16),
    "rbf model K=16 r=64 g=16, half": across(64, 16, 16, rbf_init=0.5),
    "dora r=1": lora(1, gl.DoRAConfig),
    "vera r=1024": Arm(cfg=gl.VeRAConfig(rank=1024), shift=4),
    "elementwise g=256 r=32": genlora(32, 256, 4, generator="elementwise"),
}

MORE: dict[str, Arm] = {
    # By group size.
    "target r=8 g=8": genlora(8, 8),
    "target r=32 g=8": genlora(32, 8),
    "target r=32 g=32": genlora(32, 32),
    "model r=32 g=8": across(32, 8),
    "model r=32 g=32": across(32, 32),
    "model r=112 g=32": across(112, 32),
    "model r=28 g=64": across(28, 64),
    "model r=64 g=64": across(64, 64),
    # Latents: seeded, shared by layers.
    "seeded model r=64 g=32": across(64, 32, latents="seeded"),
    "latents of all layers r=16 g=16": genlora(16, 16, share_generators=False, share_latents=True),
    "layer r=16 g=16": genlora(16, 16, share_generators=False),
    # RBFs beside the residual and alone, by number; other families.
    "rbf target K=4 r=16 g=16": genlora(16, 16, 4),
    "rbf model K=16 r=64 g=32": across(64, 32, 16),
    "rbf model K=64 r=32 g=16": across(32, 16, 64),
    "rbf model K=64 r=32 g=16, half": across(32, 16, 64, rbf_init=0.5),
    "rbf alone model K=64 r=32 g=4": across(32, 4, 64, residual=False),
    "rbf alone model K=256 r=32 g=8": across(32, 8, 256, residual=False),
    "chebyshev model K=2 r=32 g=16, half": across(32, 16, 2, basis="chebyshev", rbf_init=0.5),
    "fourier model K=2 r=32 g=16, half": across(32, 16, 2, basis="fourier", rbf_init=0.5),
    "bspline model K=4 r=32 g=16, half": across(32, 16, 4, basis="bspline", rbf_init=0.5),
    # The elementwise form as compression likes it: many RBFs, few groups.
    "elementwise K=32 g=4096 r=16": genlora(16, 4096, 32, generator="elementwise"),
    "elementwise K=32 g=4096 r=16, half": genlora(
        16, 4096, 32, generator="elementwise", rbf_init=0.5
    ),
    "elementwise K=16 g=256 r=32, half": genlora(
        32, 256, 16, generator="elementwise", rbf_init=0.5
    ),
    # Scopes of the normalisation, and rates.
    "model r=32 g=16, group": across(32, 16, normalize="group"),
    "model r=32 g=16, none": across(32, 16, normalize="none", latent_std=1.0),
    "model r=32 g=16, ratio 0.1": across(32, 16, ratio=0.1),
    "model r=32 g=16, ratio 1": across(32, 16, ratio=1.0),
    "model r=128 g=32, ratio 0.1": across(128, 32, ratio=0.1),
    "model r=128 g=32, ratio 1": across(128, 32, ratio=1.0),
    "model r=128 g=32, latents 0.1": across(128, 32, latent_std=0.1),
    "rbf model K=64 r=32 g=16, ratio 1": across(32, 16, 64, ratio=1.0),
    # Other methods.
    "lora+ r=4 x4": lora(4, b_ratio=4.0, shift=-1),
    "lora+ r=4 x16": lora(4, b_ratio=16.0, shift=-2),
    "dora r=4": lora(4, gl.DoRAConfig),
    "pissa r=4": lora(4, gl.PiSSAConfig, shift=-2),
    "vera r=256": Arm(cfg=gl.VeRAConfig(rank=256), shift=4),
    "full": Arm(cfg=gl.FullConfig(), shift=-6),
}

LEAN: dict[str, Arm] = {
    "b model r=64 g=16": b_only(64, 16),
    "b model r=128 g=16": b_only(128, 16),
    "b model r=256 g=16": b_only(256, 16),
    "b model r=128 g=32": b_only(128, 32),
    "b model r=256 g=32": b_only(256, 32),
    "b model r=64 g=64": b_only(64, 64),
    "b target r=64 g=16": genlora(64, 16, side_a="seeded"),
    "b target r=128 g=16": genlora(128, 16, side_a="seeded"),
    "b model r=128 g=16, gates": b_only(128, 16, gates=True),
    "b model r=128 g=32, gates": b_only(128, 32, gates=True),
    "model r=128 g=32, gates": across(128, 32, gates=True),
    "model r=64 g=16, gates": across(64, 16, gates=True),
    "b model r=128 g=32, ratio 1": b_only(128, 32, ratio=1.0),
    "rbf b model K=16 r=128 g=16": b_only(128, 16, 16),
    "model r=256 g=32": across(256, 32),
    "b model r=64 g=64, gates": b_only(64, 64, gates=True),
    "lora-fa r=2": lora(2, side_a="seeded"),
    "lora-fa r=4": lora(4, side_a="seeded"),
    "lora-fa r=8": lora(8, side_a="seeded"),
    "lora-fa r=16": lora(16, side_a="seeded"),
}

HADAMARD: dict[str, Arm] = {
    "h lora r=1": lora(1, hadamard=True),
    "h lora r=4": lora(4, hadamard=True),
    "h lora r=8": lora(8, hadamard=True),
    "h model r=64 g=16": across(64, 16, hadamard=True),
    "h model r=64 g=32": across(64, 32, hadamard=True),
    "h model r=128 g=32": across(128, 32, hadamard=True),
    "h model r=32 g=64": across(32, 64, hadamard=True),
    "h b model r=128 g=32, gates": b_only(128, 32, gates=True, hadamard=True),
}

PLAIN: dict[str, Arm] = {
    "lora r=64": lora(64),
    "model r=16 g=128": across(16, 128),
    "model r=128 g=64": across(128, 64),
    **MAIN,
    **MORE,
    **LEAN,
    **HADAMARD,
}
# Arms that are repeated with dropout, and with weight decay, at these rates of it.
DROPPED = {
    "lora r=4": (0.1, 0.3),
    "lora r=8": (0.1, 0.3),
    "lora r=32": (0.1, 0.3, 0.5),
    "lora r=64": (0.1, 0.3, 0.5),
    "h lora r=4": (0.1,),
    "h model r=32 g=64": (0.1,),
    "model r=64 g=32": (0.1,),
    "model r=28 g=64": (0.1, 0.3),
    "model r=16 g=128": (0.1,),
    "model r=64 g=64": (0.1, 0.3),
    "model r=128 g=64": (0.1, 0.3),
}
DECAYED = {"lora r=8": (1.0,), "lora r=32": (1.0,), "model r=64 g=64": (1.0,)}
REGULAR: dict[str, Arm] = {
    f"{name}, dropout {rate}": replace(PLAIN[name], cfg=replace(PLAIN[name].cfg, dropout=rate))
    for name, rates in DROPPED.items()
    for rate in rates
} | {
    f"{name}, decay {decay:g}": replace(PLAIN[name], weight_decay=decay)
    for name, decays in DECAYED.items()
    for decay in decays
}

FEW = (
    "lora r=1",
    "lora r=4",
    "lora r=32",
    "model r=64 g=32",
    "model r=128 g=32",
    "b model r=128 g=32, gates",
    "h lora r=4",
    "h model r=64 g=32",
)
FINAL = (
    *FEW,
    "lora r=2",
    "lora r=8",
    "model r=64 g=64",
    "b model r=128 g=16, gates",
    "b model r=64 g=64, gates",
    "rbf model K=16 r=64 g=32",
    "h lora r=1",
    "h model r=128 g=32",
    "h model r=32 g=64",
    "dora r=1",
    "vera r=1024",
)
ARMS = PLAIN | REGULAR
SETS: dict[str, dict[str, Arm]] = {
    "main": MAIN,
    "more": MORE,
    "lean": LEAN,
    "hadamard": HADAMARD,
    "regular": REGULAR,
    "few": {name: ARMS[name] for name in FEW},
    "final": {name: ARMS[name] for name in FINAL},
}
