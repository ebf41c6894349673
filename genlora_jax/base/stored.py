"""What a quantised kernel is: a few arrays, its parts, that stand for one."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp

from genlora_jax.base.products import matrix_product

Axis = Literal["in", "out", "other"]


class StoredKernel:
    """A kernel in another form than an array of floats; a subclass a form, each a pytree.

    To code that asks for its shape or takes a layer of a stack, it is the array it stands for.

    Attributes:
        name: The form's name in recipes.
        axes: The parts, and what the last dimensions of each follow: the kernel's inputs, which
            they may count in blocks, or its outputs. They are sharded as the kernel's are.
        dequantises: Whether a product needs the kernel as floats.
        rounds: Whether it stands for other numbers than it was made of.
        dtype: Dtype of the parameters that are not quantised; a merged kernel has it.
    """

    name: ClassVar[str]
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]]
    dequantises: ClassVar[bool] = True
    rounds: ClassVar[bool] = True
    dtype: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """`(..., d_in, d_out)`."""
        raise NotImplementedError

    def dequantised(self) -> jax.Array:
        """The kernel `[..., d_in, d_out]`, float32."""
        raise NotImplementedError

    @classmethod
    def of(cls, kernel: jax.Array, dtype: Any) -> Self:
        """A kernel `[..., d_in, d_out]` in this form; `dtype` is that of what is not quantised."""
        raise NotImplementedError

    def store(self, kernel: jax.Array) -> Self:
        """A kernel `[..., d_in, d_out]` stored as this one is."""
        return self.of(kernel, self.dtype)

    def times(self, x: jax.Array, *, prevent_cse: bool, wide: bool = False) -> jax.Array:
        """`x @ kernel` in the dtype of x, for a kernel without a stack; see `kernel.product`.

        The kernel is dequantised for this product alone, and once more for its gradient: kept in
        between, all layers' would take the memory of a base that is not quantised.
        """
        if prevent_cse:
            return _held_product(x, self, wide)
        product = functools.partial(_dequantised_product, wide=wide)
        return jax.checkpoint(product, prevent_cse=False)(x, self)

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


def _dequantised_product(x: jax.Array, kernel: StoredKernel, wide: bool) -> jax.Array:
    return matrix_product(x, kernel.astype(x.dtype), wide=wide)


# Each dequantisation waits for what the kernel is multiplied with. The barriers of `jax.checkpoint`
# do not hold: XLA for GPUs then keeps half the kernels from the forward to the backward pass.
# Scanned layers need none, as a loop is one. No gradient reaches the frozen parts.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _held_product(x: jax.Array, kernel: StoredKernel, wide: bool) -> jax.Array:
    x, kernel = jax.lax.optimization_barrier((x, kernel))
    return _dequantised_product(x, kernel, wide)


def _forward(x: jax.Array, kernel: StoredKernel, wide: bool) -> tuple[jax.Array, StoredKernel]:
    return _held_product(x, kernel, wide), kernel


def _backward(wide: bool, kernel: StoredKernel, dy: jax.Array) -> tuple[jax.Array, None]:
    dy, kernel = jax.lax.optimization_barrier((dy, kernel))
    return matrix_product(dy, kernel.astype(dy.dtype), axis=1, wide=wide), None


_held_product.defvjp(_forward, _backward)


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
