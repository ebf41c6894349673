"""Metrics: a JSON line a record, TensorBoard, Weights & Biases if asked for, a progress bar."""

import contextlib
import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tqdm import tqdm

from genlora_jax.files import write_whole

FILE = "metrics.jsonl"
PLAIN_LINES = 20  # of progress in a run whose output is no terminal


class MetricsLog:
    """Writes records of `{"step": n, name: value, ...}` under a run's directory.

    Args:
        directory: The run's directory: `metrics.jsonl` and `tensorboard/` lie there.
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
        start: int = 0,
        wandb: str | None = None,
        settings: dict[str, Any] | None = None,
        progress: bool = True,
        primary: bool = True,
    ):
        self._primary = primary
        if not primary:
            return
        self._path = directory / FILE
        _drop_after(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        # None: only where stderr is a terminal. A log file gets a line now and then instead.
        self._bar = tqdm(
            total=steps, initial=start, unit="step", disable=None if progress else True
        )
        self._plain_every = max(steps // PLAIN_LINES, 1) if progress and self._bar.disable else 0
        self._run = _wandb_run(wandb, directory, settings) if wandb else None

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._primary:
            return
        self._bar.close()
        self._file.close()
        self._board.close()
        if self._run is not None:
            self._run.finish()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values; on disk when it returns."""
        if not self._primary:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def advance(self, step: int, **shown: str) -> None:
        """Moves the progress bar on to a step and shows values beside it."""
        if not self._primary:
            return
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        if self._plain_every and step % self._plain_every == 0:
            print(f"step {step}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), flush=True)

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if self._primary:
            self._bar.write(text)


def read_records(directory: Path, step: int) -> list[dict[str, float]]:
    """A run's records up to a step; a line that a kill left half-written is none."""
    path, records = directory / FILE, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError, KeyError):
            record = json.loads(line)
            if record["step"] <= step:
                records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    """Removes records later than a step, and a last line that a kill left half-written."""
    if not path.exists():
        return
    kept = read_records(path.parent, step)
    write_whole(path, "".join(json.dumps(r) + "\n" for r in kept))


def _wandb_run(project: str, directory: Path, settings: dict[str, Any] | None) -> Any:
    import wandb

    return wandb.init(project=project, dir=str(directory), config=settings, resume="allow")
