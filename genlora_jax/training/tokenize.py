"""Tokenising a recipe's data to a cache, which its runs then read at random: `genlora tokenize`."""

from collections.abc import Sequence

from genlora_jax.data.cache_writing import write_cache
from genlora_jax.hf.base_model import find_base
from genlora_jax.settings import run_command
from genlora_jax.training.recipe import Recipe
from genlora_jax.validation import require


def tokenize(recipe: Recipe) -> None:
    """Writes the caches of `data.train` and `data.eval` in `data.cache`.

    Raises:
        FileNotFoundError: If data or base are not there.
        ValueError: If the recipe names no `data.cache`, or a row is bad.
    """
    require(recipe.data.cache is not None, "data.cache is missing: name a directory for the cache")
    _, tokenizer = find_base(recipe.model)
    for sources in (recipe.data.train, recipe.data.eval):
        if sources:
            write_cache(sources, tokenizer, recipe.data)


def main(args: Sequence[str] | None = None) -> None:
    """Command line."""
    run_command(Recipe, tokenize, args)


if __name__ == "__main__":
    main()
