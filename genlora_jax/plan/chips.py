"""Chips, and topologies of them."""

import math
import re
from dataclasses import dataclass, replace

GIB = 2**30
SIZE = r"[1-9]\d{0,4}"  # of a side of a torus, or GPUs, or GiB


@dataclass(frozen=True)
class Chip:
    """What a chip can do, by the data sheet of its maker.

    Attributes:
        memory: Bytes of device memory that a program can have.
        flops: Bfloat16 FLOP a second.
        bandwidth: Bytes a second from and to device memory.
        link: Bytes a second out of the chip, summed over its links.
        tpu: Whether libtpu can compile for it.
        dimensions: Dimensions of the torus of its links; 0 for a switch.
    """

    memory: float
    flops: float
    bandwidth: float
    link: float
    tpu: bool
    dimensions: int

    @property
    def platform(self) -> str:
        """What JAX calls it."""
        return "tpu" if self.tpu else "gpu"


CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 1228e9, 300e9, True, 3),
    "v5e": Chip(15.75 * GIB, 197e12, 819e9, 200e9, True, 2),
    "v5p": Chip(95 * GIB, 459e12, 2765e9, 600e9, True, 3),
    "v6e": Chip(31.25 * GIB, 918e12, 1640e9, 448e9, True, 2),
}
# A GPU's memory is part of the topology's name. The rest is that of an H100 with NVLink.
GPU = Chip(0, 989e12, 3350e9, 450e9, False, 0)


@dataclass(frozen=True)
class Topology:
    """A number of chips of one kind, and the name that the user gave."""

    name: str
    chip: Chip
    count: int


def parse_topology(name: str) -> Topology:
    """A topology from its name: `v5e:4x4`, or `gpu:8x80` for 8 GPUs of 80 GiB.

    Raises:
        ValueError: If it is no topology's name.
    """
    kind, _, sizes = name.partition(":")
    if kind == "gpu" and (gpus := re.fullmatch(rf"({SIZE})x({SIZE})", sizes)):
        count, memory = map(int, gpus.groups())
        return Topology(name, replace(GPU, memory=memory * GIB), count)
    if kind in CHIPS and re.fullmatch(rf"{SIZE}(x{SIZE}){{0,2}}", sizes):
        return Topology(name, CHIPS[kind], math.prod(map(int, sizes.split("x"))))
    raise ValueError(
        f"topology {name!r} is not known: give a TPU's, such as v5e:4x4 ({', '.join(CHIPS)}), or "
        "gpu:8x80 for 8 GPUs of 80 GiB each"
    )
