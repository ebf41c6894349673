"""How long steps take: a watchdog for one that hangs, and the slowest of the processes."""

import collections
import contextlib
import faulthandler
import functools
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from genlora_jax.training import processes
from genlora_jax.training.metrics import MetricsLog

RECENT, FEWEST = 100, 10  # steps whose median says what is usual; fewer say nothing
TIMES, SHORTEST = 10, 10.0  # a step hangs that takes so many medians, and so many seconds
GIL_SECONDS = 1.0  # after which stacks are printed without Python's help
EVERY = 50  # steps between two comparisons of the processes
# Times the others' median; of the hosts' shares of a step, those over a twentieth of it count.
SLOW = 2.0
PROBE_SIZE, PROBE_SIZE_CPU = 4096, 256


class Watchdog:
    """Prints the stacks of all threads when a step takes ten times the median, or longer."""

    def __init__(self) -> None:
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Watches over a step."""
        began, limit, timer = time.monotonic(), self._limit(), None
        if limit is not None:
            timer = threading.Timer(limit, _print_stacks, (number, limit))
            timer.daemon = True
            timer.start()
            # If what hangs does not let Python go on, the timer cannot speak.
            faulthandler.dump_traceback_later(limit + GIL_SECONDS, file=2)
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()
                faulthandler.cancel_dump_traceback_later()
            self._recent.append(time.monotonic() - began)

    def median(self) -> float:
        """Median seconds of the last steps."""
        return statistics.median(self._recent)

    def _limit(self) -> float | None:
        enough = len(self._recent) >= FEWEST
        return max(TIMES * self.median(), SHORTEST) if enough else None


def _print_stacks(step: int, limit: float) -> None:
    faulthandler.cancel_dump_traceback_later()
    # Not `print`: whoever hangs may do so in one.
    who = f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
    heading = f"\nstep {step} has not ended after {limit:.0f} s, {who}. Its threads:\n"
    os.write(2, heading.encode())
    faulthandler.dump_traceback(file=2)


class Pace:
    """Watches over steps, and compares the processes' shares of them now and then.

    All processes take the same time for a step, as they wait for one another on the device. What
    tells them apart is what each does on its host while no device works for it, and how fast its
    device is by itself.

    Args:
        log: Where the comparisons go.
    """

    def __init__(self, log: MetricsLog):
        self._log, self._watchdog = log, Watchdog()
        self._host, self._device, self._steps = 0.0, 0.0, 0

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Measures and watches over a step."""
        began, self._device = time.monotonic(), 0.0
        with self._watchdog.step(number):
            yield
        self._host += time.monotonic() - began - self._device
        self._steps += 1

    def on_device(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that is given to the device, or waits for it: none of the host's time."""

        @functools.wraps(call)
        def timed(*args: Any) -> Any:
            began = time.monotonic()
            try:
                return call(*args)
            finally:
                self._device += time.monotonic() - began

        return timed

    def compare(self, step: int, running: Any) -> None:
        """Records, after some of the steps, which process is the slowest.

        All processes must call it after each step.

        Args:
            step: The step.
            running: Arrays of it that the device may still work on.
        """
        if jax.process_count() == 1 or step % EVERY:
            return
        jax.block_until_ready(running)
        mine = {"host": self._host / self._steps, "device": probe_seconds()}
        self._host, self._steps = 0.0, 0
        found = processes.gather_values(list(mine.values()))
        names = processes.host_names()
        record: dict[str, float] = {}
        for kind, seconds in zip(mine, found.T, strict=True):
            slowest = int(seconds.argmax())
            median = float(np.median(np.delete(seconds, slowest)))  # of two, the other's
            most = float(seconds[slowest])
            record[f"slowest_{kind}"] = slowest
            record[f"slowest_{kind}_seconds"] = most
            record[f"median_{kind}_seconds"] = median
            counts = kind == "device" or most > 0.05 * self._watchdog.median()
            if counts and most > SLOW * median:
                what = "a step's work on its host" if kind == "host" else "a product on its device"
                self._log.print_line(
                    f"step {step}: process {slowest} ({names[slowest]}) is the slowest: {what} "
                    f"took {most:.3g} s, the median of the others is {median:.3g} s"
                )
        self._log.write(step, record)


def probe_seconds() -> float:
    """Seconds of a product on the slowest of this process's devices; needs no other process."""
    operands = [_operand(device) for device in jax.local_devices()]
    seconds = []
    for operand in operands:
        best = []
        for _ in range(3):
            began = time.monotonic()
            _product(operand).block_until_ready()
            best.append(time.monotonic() - began)
        seconds.append(min(best))
    return max(seconds)


@functools.cache
def _operand(device: jax.Device) -> jax.Array:
    on_cpu = device.platform == "cpu"
    size = PROBE_SIZE_CPU if on_cpu else PROBE_SIZE
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    return jax.device_put(np.ones((size, size), dtype), device)


@jax.jit
def _product(x: jax.Array) -> jax.Array:
    return x @ x
