"""Sweeps rates, seeds and alphas at once: `python train/sweep.py --config RECIPE.yaml --grid...`.

The same as `genlora sweep`; see `genlora_jax.training.sweep.sweep`.
"""

from genlora_jax.training.sweep.sweep import main

if __name__ == "__main__":
    main()
