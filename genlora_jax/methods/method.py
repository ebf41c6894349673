"""What a method is: a module with two functions."""

from typing import Any, Protocol

import jax

from genlora_jax.targets import AdapterSpec, Target

Tree = dict[str, Any]
Kernels = tuple[jax.Array, ...]


class Method(Protocol):
    """A method's module, entered in `adapter.METHODS` under its config's class."""

    def init(
        self, cfg: Any, key: jax.Array, target: Target, spec: AdapterSpec, kernels: Kernels
    ) -> tuple[Tree, Tree]:
        """What a target's adapter starts at.

        Args:
            cfg: The method's config.
            key: PRNG key of the target.
            target: The target, of L layers.
            spec: The adapter's static part.
            kernels: The base's kernels `[layers, d_in, d_out]`, L layers in all, for a config with
                `reads_base`; else empty.

        Returns:
            Leaves that are trained and leaves that are kept, `{group: {name: ...}}` each; float32.
            The name is the target's, or another for what it shares: that is kept of the first
            target that brings it.
        """
        ...

    def factors(self, cfg: Any, groups: Tree, target: Target, spec: AdapterSpec) -> Tree:
        """The factors of a target.

        Args:
            cfg: The method's config.
            groups: What `init` made for all targets, trained and kept, `{group: {name: ...}}`.
            target: The target.
            spec: The adapter's static part.

        Returns:
            Leaves over all layers: A `a` `[L, d_in, r]` and B `b` `[L, r, d_out]`, unscaled, and
            with them perhaps `magnitude` `[L, d_out]`; or `delta` `[L, d_in, d_out]` alone.
        """
        ...
