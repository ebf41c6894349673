"""Metrics: a JSON line a record, TensorBoard, Weights & Biases if asked for, a progress bar."""

import contextlib
import json
import os
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from genlora_jax.atomic_files import disk_full, scratch_directory, write_whole
from genlora_jax.storage import is_remote

FILE = "metrics.jsonl"
FLUSH_SECONDS = 60  # between which TensorBoard sees nothing new
PLAIN_LINES = 20  # of progress in a run whose output is no terminal


class MetricsLog:
    """Writes records of `{"step": n, name: value, ...}` under a run's directory.

    Nothing is appended to an object: for a bucket the files grow on this machine, and `flush`
    uploads them whole.

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
        directory: Any,
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
        if damaged := damaged_lines(directory):
            lines = ", ".join(map(str, damaged))
            print(f"{directory / FILE}: left out what is no record, in line {lines}")
        kept = [json.dumps(record) + "\n" for record in read_records(directory, start)]
        self._bucket: str | None = None
        self._stack = contextlib.ExitStack()
        if is_remote(directory):
            self._bucket = str(directory)
            directory = self._local = self._stack.enter_context(scratch_directory())
        path = directory / FILE
        if kept or path.exists():
            write_whole(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")
        (directory / "tensorboard").mkdir(exist_ok=True)
        self._board = _Board(directory / "tensorboard", start)
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
        self._bar.close()
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):  # of a full disk, on which `write` has failed
                file.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()
        # Another error must not be hidden by one that follows from it.
        with self._stack, contextlib.suppress(*[Exception] * (exc[0] is not None)):
            self._upload()

    def flush(self) -> None:
        """Has all records be where the run's directory is, if that is a bucket."""
        if self._primary and self._bucket is not None:
            self._board.flush()
            self._upload()

    def _upload(self) -> None:
        if self._bucket is not None:
            # Imported here, as most runs write to this machine.
            from genlora_jax.bucket_directories import upload

            files = [self._local / FILE, *(self._local / "tensorboard").iterdir()]
            upload(self._local, self._bucket, [str(f.relative_to(self._local)) for f in files])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records values, in `metrics.jsonl` when it returns; OSError if the disk is full."""
        if not self._primary:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            self._board.write(step, values)
        except OSError as error:
            if full := disk_full(error):
                raise OSError(
                    f"{full}: the metrics of step {step} were not written to {self._file.name}. "
                    "Make room there, and go on with --train.resume true"
                ) from error
            raise
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


class _Board:
    """A file for TensorBoard, written here: `SummaryWriter`'s thread dies of a full disk unseen."""

    def __init__(self, directory: Any, start: int):
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")
        self._flushed = time.monotonic()
        # Hides what an earlier process wrote of later steps.
        begun = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=start + 1, session_log=begun))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
            self._writer.write_event(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._writer.close()


def read_records(directory: Any, step: int) -> list[dict[str, float]]:
    """A run's records up to a step; `damaged_lines` are left out."""
    records = (_record(line) for line in _lines(directory))
    return [record for record in records if record is not None and record["step"] <= step]


def damaged_lines(directory: Any) -> list[int]:
    """The numbers of the lines that are no records, as a kill leaves a last one."""
    return [i for i, line in enumerate(_lines(directory), 1) if line and _record(line) is None]


def _lines(directory: Any) -> list[bytes]:
    path = directory / FILE
    return path.read_bytes().split(b"\n") if path.exists() else []


def _record(line: bytes) -> dict[str, float] | None:
    """What a line holds; None if it is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    return record if all(type(value) in (int, float) for value in record.values()) else None
