"""The files of bases as people have them; the expected values are those of transformers."""

import jax.numpy as jnp
import numpy as np

from genlora_jax.validation import first_not_finite


def test_the_first_array_that_is_not_finite_is_named():
    good = np.ones(3, np.float32)
    assert first_not_finite({"a": good, "b": [good.astype(jnp.bfloat16), np.arange(3)]}) is None
    for bad in (np.nan, np.inf, -np.inf):
        wrong = jnp.array([1, bad], jnp.bfloat16)
        assert first_not_finite({"a": good, "b": {"c": wrong}, "d": wrong}) == "b.c"
