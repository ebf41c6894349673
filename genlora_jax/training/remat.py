"""`model.remat: auto`: the fastest step that fits the device's memory."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from genlora_jax.training.processes import broadcast_from_primary, gather_values

GIB = 2**30
# Assumed: a share of the memory for the next batch, evaluation, and gaps between arrays.
SPARE = 0.05


def step_that_fits(
    make: Callable[[Any], Any],
    policies: Sequence[str],
    device: jax.Device,
    print_line: Callable[[str], None],
    layers: int = 0,
) -> Callable[..., Any]:
    """A step that is chosen at its first call, by the memory of the compiled programs.

    Args:
        make: Makes the jitted step of a policy.
        policies: The fastest first. Each takes less memory than the one before, except that on
            GPUs which share the batch alone, `full` may take more than `dots` (`plan.memory`).
        device: One of those that the step runs on. On CPUs the first policy is taken, and the
            last where the memory is not known or no other fits.
        print_line: Prints the choice, if there is one.
        layers: Of the model, if each may have a policy of its own. Where the last policy alone
            fits, as many layers as fit then have the one before.
    """
    chosen: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal chosen
        if chosen is None:
            policy, chosen, reason = _choose(make, policies, device, layers, args)
            if len(policies) > 1:
                print_line(f"remat: {policy} ({reason})")
        return chosen(*args)

    return call


def _choose(
    make: Callable[[Any], Any],
    policies: Sequence[str],
    device: jax.Device,
    layers: int,
    args: Any,
) -> tuple[str, Any, str]:
    """A policy in words, its step, and why it is taken."""
    *others, last = policies
    if not others or device.platform == "cpu":
        return policies[0], make(policies[0]), "as on all CPUs"
    memory = broadcast_from_primary((device.memory_stats() or {}).get("bytes_limit", 0))
    if not memory:
        return last, make(last), "the device does not say how much memory it has"

    def held(step: Any) -> float:
        # The most of all processes: with unlike steps they would wait for one another for ever.
        return float(gather_values([held_bytes(step, args, device.platform)]).max())

    def reason(held: float) -> str:
        return f"{held / GIB:.1f} of {memory / GIB:.1f} GiB"

    room = (1 - SPARE) * memory
    most = math.inf
    for policy in others:
        step = make(policy)
        if (most := held(step)) < room:
            return policy, step, reason(most)
    step_of_last = make(last)
    for count in _counts(layers, most, lambda: held(step_of_last), room):
        step = make((last,) * (layers - count) + (others[-1],) * count)
        if (found := held(step)) < room:
            words = f"{others[-1]} in the last {count} of {layers} layers, {last} in the others"
            return words, step, reason(found)
    return last, step_of_last, f"no other fits {memory / GIB:.1f} GiB"


def _counts(layers: int, most: float, least: Callable[[], float], room: float) -> Iterator[int]:
    """In how many layers a policy may fit, the most first, of which all layers take `most` bytes.

    The first is by proportion; a program that differs from it by a layer or two is tried too.
    """
    if not layers or math.isinf(most) or (without := least()) >= min(most, room):
        return
    count = int(layers * (room - without) / (most - without))
    step = max(1, layers // 16)
    yield from (n for n in (count, count - step) if n > 0)


def held_bytes(step: Any, args: Any, platform: str) -> float:
    """Bytes of a step's arguments and temporaries on a device; infinite if its compiler refuses."""
    try:
        memory = step.lower(*args).compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf
    # On TPUs `temp_size_in_bytes` is up to a half more than the peak takes.
    if platform == "tpu":
        return float(memory.peak_memory_in_bytes)
    return float(memory.argument_size_in_bytes + memory.temp_size_in_bytes)
