"""Evaluates a model or an adapter: `python train/evaluate.py --config EVALUATION.yaml`.

The same as `genlora evaluate`; see `genlora_jax.evaluation.run`.
"""

from genlora_jax.evaluation.run import main

if __name__ == "__main__":
    main()
