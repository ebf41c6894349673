"""What to say when numbers are no longer finite: what was first, and what mends that."""

import math
from collections.abc import Mapping
from typing import Any

from genlora_jax.validation import first_not_finite

NAMES = {
    "loss": "the loss",
    "grad_norm": "the gradient's norm, unlike the loss,",
    "eval_loss": "the evaluation loss",
}
LOWER_RATE = "Lower optim.learning_rate"
OVERFLOW = "values overflow in model.dtype, or the data are at fault: try model.dtype float32"


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
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    first = next((name for name in ("loss", "grad_norm", "eval_loss") if name in wrong), None)
    if first is None and values.get("adapter_finite", 1.0):
        return
    advice = LOWER_RATE
    if first is None:
        what = f"the update of step {step} is not finite; its loss and gradient are"
    else:
        what = f"{NAMES[first]} is {values[first]} at step {step}"
        if name := first_not_finite(params):
            what += f", as {name} of the base is not finite"
            advice = "Take an undamaged copy of the base: no learning rate mends this"
        elif step == 1 and first != "eval_loss":
            advice = f"Nothing was trained before, so the rate is not at fault: {OVERFLOW}"
        elif first == "eval_loss":
            advice += f"; if the training loss is well, {OVERFLOW}"
    kept = f"the last good checkpoint, of step {saved}, is kept"
    raise FloatingPointError(
        f"{what}; {kept if saved is not None else 'nothing had been saved yet'}. {advice}"
    )
