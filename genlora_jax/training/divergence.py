"""What to say when numbers are no longer finite: what was first, and what mends that."""

import math
from collections.abc import Mapping
from typing import Any

from genlora_jax.validation import first_not_finite

NAMES = {
    "loss": "the loss",
    "grad_norm": "the gradient's norm, unlike the loss,",
    "eval_loss": "the evaluation loss, unlike that of training,",
}


def refuse_not_finite(adapter: Any, source: str) -> None:
    """Raises FloatingPointError if an adapter holds NaN or infinity; `source` says whose it is."""
    if name := first_not_finite(adapter):
        raise FloatingPointError(
            f"{source}: {name} holds a NaN or an infinity; take an adapter from before it diverged"
        )


def check_finite(step: int, values: Mapping[str, float], params: Any, saved: int | None) -> None:
    """Checks a step's metrics, and those of an evaluation after it.

    Args:
        step: The step.
        values: `loss`, `grad_norm` and `adapter_finite`, or `eval_loss`.
        params: The base's parameters, which are looked at if a loss is not finite.
        saved: The step of the newest checkpoint.

    Raises:
        FloatingPointError: If one is not finite. It says which was first, and what to do.
    """
    wrong = [name for name in NAMES if not math.isfinite(values.get(name, 0.0))]
    if wrong:
        what = f"{NAMES[wrong[0]]} is {values[wrong[0]]} at step {step}"
    elif values.get("adapter_finite", 1.0):
        return
    else:
        what = f"the update of step {step} is not finite; its loss and gradient are"
    kept = f"the last good checkpoint, of step {saved}, is kept"
    raise FloatingPointError(
        f"{what}; {kept if saved is not None else 'nothing had been saved yet'}. "
        f"{advice(step if {'loss', 'grad_norm'} & {*wrong} else step + 1, params)}"
    )


def advice(step: int, params: Any, rate: str = "optim.learning_rate") -> str:
    """What mends a loss or a gradient that is not finite at a step.

    Args:
        step: The step.
        params: The base's parameters.
        rate: The field that sets the learning rate.
    """
    if name := first_not_finite(params):
        return f"{name} of the base is not finite: take an undamaged copy; no rate mends this"
    if step <= 1:
        return (
            "Nothing was trained before, so the rate is not at fault: values overflow in "
            "model.dtype (try float32), or the data are odd"
        )
    return f"Lower {rate}; if it is low already, try model.dtype float32"
