"""Metrics: a JSON line a record, TensorBoard, Weights & Biases if asked for, a progress bar."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from genlora_jax.atomic_files import write_whole

FILE = "metrics.jsonl"
PLAIN_LINES = 20  # of progress in a run whose output is no terminal


class MetricsLog:
    """Writes records of `{"step": n, name: value, ...}` under a run's directory.

    Args:
        directory: The run's directory, which gets `metrics.jsonl` and `tensorboard/`.
        steps: Length of the run.
        start: Step that the run resumes from; later records of an earlier process are dropped.
        wandb: Project at Weights & Biases, or None.
        settings: The recipe, for Weights & Biases.
        progress: Whether to show a progress bar.
        primary: Whether this is the process that writes; the others' records go nowhere.
    """

    def __init__(
        self,
        directory: Path,
        *,
        steps: int,
        start: int,
        wandb: str | None,
        settings: dict[str, Any],
        progress: bool,
        primary: bool,
    ):
        self._primary = primary
        if not primary:
            return
        path = directory / FILE
        if path.exists():
            kept = [json.dumps(record) + "\n" for record in read_records(directory, start)]
            write_whole(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        # None: only where stderr is a terminal. A log file gets a line now and then instead.
        disable = None if progress else True
        self._bar = tqdm(total=steps, initial=start, unit="step", disable=disable)
        self._plain_every = max(steps // PLAIN_LINES, 1) if progress and self._bar.disable else 0
        self._wandb_run = None
        if wandb:
            import wandb as client

            self._wandb_run = client.init(
                project=wandb, dir=str(directory), config=settings, resume="allow"
            )

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._primary:
            return
        for writer in (self._bar, self._file, self._board):
            writer.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values; on disk when it returns."""
        if not self._primary:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb_run is not None:
            self._wandb_run.log(values, step=step)

    def advance(self, step: int, **shown: str) -> None:
        """Moves the progress bar on to a step and shows values beside it."""
        if not self._primary:
            return
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._plain_every and step % self._plain_every == 0:
            print(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)

    def print_line(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._primary:
            self._bar.write(text)


def read_records(directory: Path, step: int) -> list[dict[str, float]]:
    """A run's records up to a step, without a last line that a kill left half-written."""
    path, records = directory / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            record = json.loads(line)
            if record["step"] <= step:
                records.append(record)
    return records
