"""Fine-tunes a LLaMA with an adapter: `python train/finetune.py --config train/recipes/NAME.yaml`.

It does what `genlora finetune` does, whose loop is in `genlora_jax.training.finetune`, made to be
copied.
"""

from genlora_jax.training.finetune import main

if __name__ == "__main__":
    main()
