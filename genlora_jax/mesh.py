"""Meshes of devices: their axes and their sizes. `sharding.py` says which array uses which axis.

`data` replicates the base and shards the batch. `fsdp` shards both: a layer's kernels are
all-gathered where and when they are needed. `tensor` shards the base and the work within a layer.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # the axes that shard a batch


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Sizes of the mesh's axes; one of them may be -1: what the others leave.

    Attributes:
        data: Replicas of the base, each with its shard of the batch.
        fsdp: Shards of the base, each also with its shard of the batch.
        tensor: Shards of every layer's work.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        for axis in AXES:
            size = getattr(self, axis)
            if type(size) is not int or (size != -1 and size < 1):
                raise ValueError(f"mesh.{axis} must be at least 1, or -1, got {size}")
        if sum(getattr(self, axis) == -1 for axis in AXES) > 1:
            raise ValueError("mesh: only one of data, fsdp and tensor can be -1")


def resolve(cfg: MeshConfig, count: int) -> MeshConfig:
    """The config with its -1 filled in for so many devices.

    Raises:
        ValueError: If its sizes do not multiply to that number.
    """
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    if count % given or (-1 not in sizes.values() and given != count):
        product = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"mesh {product} does not fit the {count} devices that there are")
    return MeshConfig(**{a: count // given if size == -1 else size for a, size in sizes.items()})


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a config.

    Args:
        cfg: Sizes of its axes.
        devices: By default all devices of all processes.

    Raises:
        ValueError: If the sizes do not multiply to the number of devices.
    """
    from jax.experimental.mesh_utils import create_device_mesh

    devices = jax.devices() if devices is None else devices
    cfg = resolve(cfg, len(devices))
    sizes = [getattr(cfg, axis) for axis in AXES]
    # Split: an axis need not be one or more whole axes of a TPU's torus.
    grid = create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def one_device() -> Mesh:
    """The mesh of this process's first device."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH)
