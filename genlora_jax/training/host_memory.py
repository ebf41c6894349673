"""Memory of a run on CPUs: what a step frees is kept for the next one."""

import ctypes
import importlib.metadata
import importlib.util
import sys

import jax

# glibc's names of what `mallopt` sets (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1  # a threshold that nothing reaches

_one_heap = False


def share_one_heap() -> None:
    """Has all threads allocate in one heap where JAX has CPUs alone; before it starts its own.

    glibc gives each thread another heap, and keeps large freed blocks in the first alone. Only a
    command may call this, for its own process.
    """
    global _one_heap
    _one_heap = _only_cpus() and _mallopt(M_ARENA_MAX, 1)


def keep_memory(device: jax.Device) -> None:
    """Has this process keep the memory that it frees, if it is a command that computes on a CPU.

    By default what a step frees goes back to the system, and each of its pages is made anew, filled
    with zeros, at the next step: a tenth of a step's time.
    """
    if _one_heap and device.platform == "cpu":
        _mallopt(M_MMAP_MAX, 0)
        _mallopt(M_TRIM_THRESHOLD, NEVER)


def _only_cpus() -> bool:
    """Whether JAX will find no other device, without having it look for one."""
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]  # defined as JAX starts
        return True
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not (plugins or importlib.util.find_spec("libtpu"))


def _mallopt(option: int, value: int) -> bool:
    """Sets an option of glibc; False where there is another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and bool(mallopt(option, value))
