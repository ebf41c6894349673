"""What a kind of factors is: one object that answers for its leaves everywhere."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

Leaves = dict[str, Any]  # the factors of one module, by leaf name
Axis = Literal["in", "rank", "out"]
EXACT = jax.lax.Precision.HIGHEST


def exact_matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b` in float32 at the highest precision."""
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=EXACT)


@dataclass(frozen=True)
class DenseCall:
    """One call of a Dense whose output is to be changed.

    Attributes:
        x: Inputs of the adapter `[..., d_in]`, after its dropout, in the dtype of `y`.
        y: Output of the Dense `[..., d_out]`.
        kernel: Returns the frozen kernel `[d_in, d_out]` in a dtype; reads it anew each time.
        prevent_cse: True where the kernel is quantised and layers are unrolled: XLA would
            otherwise merge the forward and backward dequantisation and keep the float kernel.
        product: The Dense's own way to multiply `[..., n]` with `[n, m]`; None if it is `@`.
        bias: The Dense's bias, or None.
        dropped: Whether dropout zeroed some of `x`.
        adapter_index: Int `[batch]`, each row's adapter; None if there is one for all rows.
    """

    x: jax.Array
    y: jax.Array
    kernel: Callable[[Any], jax.Array]
    prevent_cse: bool
    product: Callable[[jax.Array, jax.Array], jax.Array] | None
    bias: jax.Array | None
    dropped: bool
    adapter_index: jax.Array | None

    def times(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """`x @ w`, as the Dense multiplies."""
        return x @ w if self.product is None else self.product(x, w)


class Kind:
    """A kind of factors. A subclass without state; its one instance stands in `factors.KINDS`.

    Attributes:
        name: What users call it.
        axes: The leaves, and what the last dimensions of each are. Shapes, shardings and padding
            follow from it.
        scaled: The leaf that carries the scale; None if nothing does.
        option: The setting that makes such factors, for errors.
        combines: Whether factors can be summed, stacked by row and fitted.
        in_float32: Whether the leaves stay float32 where the model computes in less.
        peft: PEFT's tensor for each leaf, and whether it is the transpose of ours; empty if PEFT
            has no such adapter.
        peft_type: The `peft_type` of its PEFT adapter.
        peft_dora: The `use_dora` of its PEFT adapter.
    """

    name: ClassVar[str]
    axes: ClassVar[Mapping[str, tuple[Axis, ...]]]
    scaled: ClassVar[str | None] = None
    option: ClassVar[str] = ""
    combines: ClassVar[bool] = False
    in_float32: ClassVar[bool] = False
    peft: ClassVar[Mapping[str, tuple[str, bool]]] = {}
    peft_type: ClassVar[str] = "LORA"
    peft_dora: ClassVar[bool] = False

    def output(self, call: DenseCall, leaves: Leaves) -> jax.Array:
        """The Dense's changed output, like `call.y`."""
        raise NotImplementedError

    def merge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        """The kernel with the factors in it; both float32 `[..., d_in, d_out]`."""
        raise NotImplementedError

    def unmerge(self, kernel: jax.Array, leaves: Leaves) -> jax.Array:
        """Inverse of `merge`, to float32 rounding.

        Raises:
            ValueError: If a merge of this kind cannot be undone.
        """
        raise NotImplementedError

    def singular_values(self, leaves: Leaves) -> jax.Array:
        """Singular values of the delta (of HiRA's gain), `[..., k]`, largest first."""
        raise NotImplementedError

    def formed_values(self, leaves: Leaves) -> int:
        """Values of the kernel-sized arrays that a step forms; their gradients take as many."""
        return 0

    def stored_values(self, leaves: Leaves) -> int:
        """Values of kernel-sized leaves, which are sharded and gathered as kernels are."""
        return 0

    def rank(self, leaves: Leaves) -> int | None:
        """The factors' rank; None if they have none."""
        for leaf, axes in self.axes.items():
            if "rank" in axes:
                return int(leaves[leaf].shape[axes.index("rank") - len(axes)])
        return None

    def fits(self, leaves: Leaves, shape: tuple[int, ...]) -> bool:
        """Whether the leaves are those of a kernel `[..., d_in, d_out]`."""
        *lead, d_in, d_out = shape
        sizes = {"in": d_in, "out": d_out, "rank": self.rank(leaves)}
        return all(
            tuple(leaves[leaf].shape) == (*lead, *(sizes[axis] for axis in axes))
            for leaf, axes in self.axes.items()
        )

    def padded(self, leaves: Leaves, rank: int, pad: Callable[..., Any] = jnp.pad) -> Leaves:
        """The same factors with zeros up to a rank."""
        missing = rank - (self.rank(leaves) or rank)
        padded = {}
        for leaf, value in leaves.items():
            axes = self.axes[leaf]
            widths = [(0, missing if axis == "rank" else 0) for axis in axes]
            padded[leaf] = pad(value, [(0, 0)] * (value.ndim - len(axes)) + widths)
        return padded

    def describe(self, leaves: Leaves) -> str:
        """The leaves' shapes in words."""
        return " and ".join(str(tuple(leaves[leaf].shape)) for leaf in self.axes)
