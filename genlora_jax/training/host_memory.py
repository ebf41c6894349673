"""Memory of a run on CPUs: what a step frees is kept for the next one."""

import ctypes
import sys

import jax

# glibc's names of what `mallopt` sets (malloc.h).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MOST = 2**31 - 1


def keep_memory(device: jax.Device) -> None:
    """Has this process keep the memory that it frees, if it computes on a CPU in its main thread.

    By default what a step frees goes back to the system, and each of its pages is made anew, filled
    with zeros, at the next step: a tenth of a step's time. glibc keeps memory of the main thread
    alone, so the command `genlora` has JAX compute there. Elsewhere nothing happens.
    """
    computes_here = not jax.config.read("jax_cpu_enable_async_dispatch")
    if device.platform != "cpu" or sys.platform != "linux" or not computes_here:
        return
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):  # other C libraries have none
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, MOST)
