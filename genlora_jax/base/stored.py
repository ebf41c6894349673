"""What a quantised kernel is: a few arrays, its parts, that stand for one."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp

Axis = Literal["in", "out", "other"]


class StoredKernel:
    """A kernel in another form than an array of floats; a subclass a form, each a pytree.

    To code that asks for its shape or takes a layer of a stack, it is the array it stands for.

    Attributes:
        name: The form's name in recipes.
        axes: The parts, and what the last dimensions of each follow: the kernel's inputs, which
            they may count in blocks, or its outputs. They are sharded as the kernel's are.
        dtype: Dtype of the parameters that are not quantised; a merged kernel has it.
    """

    name: ClassVar[str]
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]]
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., d_in, d_out)`."""
        raise NotImplementedError

    def dequantised(self) -> jax.Array:
        """The kernel `[..., d_in, d_out]`, float32."""
        raise NotImplementedError

    def store(self, kernel: jax.Array) -> Self:
        """A kernel `[..., d_in, d_out]` in this form."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    def astype(self, dtype: Any) -> jax.Array:
        """The kernel in a dtype."""
        return self.dequantised().astype(dtype)

    def __jax_array__(self) -> jax.Array:
        return self.astype(self.dtype)

    def __getitem__(self, index: Any) -> Self:
        """Some kernels of a stack: an index of its first axis."""
        return jax.tree.map(lambda part: part[index], self)

    def parts(self) -> dict[str, Any]:
        """The arrays by name, less those that are absent."""
        return {name: part for name in self.axes if (part := getattr(self, name)) is not None}


def block_absmax(kernel: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """A kernel cut along its inputs, and the largest magnitude of each block.

    Where a block does not divide `d_in`, each output's last block is filled with zeros. Blocks
    keep the kernel's dtype: whoever widens them as he uses them has XLA hold no wide copy.

    Args:
        kernel: `[..., d_in, d_out]`.
        block: Inputs in a block.

    Returns:
        `[..., blocks, block, d_out]`, and float32 `[..., blocks, d_out]`.
    """
    *lead, d_in, d_out = kernel.shape
    missing = -d_in % block
    if missing:
        kernel = jnp.pad(kernel, [*[(0, 0)] * len(lead), (0, missing), (0, 0)])
    blocks = kernel.reshape(*lead, -1, block, d_out)
    return blocks, jnp.abs(blocks).max(axis=-2).astype(jnp.float32)
