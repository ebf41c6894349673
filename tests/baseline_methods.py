"""The methods that GenLoRA is compared with, as several test files try them."""

import numpy as np

import genlora_jax as gl

TARGETS = ["q_proj", "v_proj", "down_proj"]  # biases and none, wide and narrow
SHARED = {"rank": 3, "alpha": 6.0, "targets": TARGETS}
METHODS = {
    "rslora": gl.LoRAConfig(**SHARED, scaling="rslora"),
    "lora_fa": gl.LoRAConfig(**SHARED, side_a="seeded"),
    "hira": gl.LoRAConfig(**SHARED, hadamard=True),
    "dora": gl.DoRAConfig(**SHARED),
    "pissa": gl.PiSSAConfig(**SHARED),
    "vera": gl.VeRAConfig(rank=5, d_initial=0.3, targets=TARGETS),
    "full": gl.FullConfig(targets=TARGETS),
}
EPS = float(np.finfo(np.float32).eps)


def close(ours, theirs, terms=64):
    """Whether arrays agree to the rounding of sums of so many terms."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=terms * EPS * np.abs(theirs).max())
