"""Rows encoded in worker processes: read in pieces, each of which a process encodes by itself."""

import collections
import gc
import io
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import TYPE_CHECKING, Any

from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import Encoder, PlacedRow, batches_of_rows
from genlora_jax.data.examples import Encoded, Example, joined_examples
from genlora_jax.data.files import file_kind, json_lines, line_blocks
from genlora_jax.data.report import Tally
from genlora_jax.data.rows import checked, rows_or_errors
from genlora_jax.storage import storage_path
from genlora_jax.threads import processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Piece = Callable[[], Iterable[PlacedRow]]  # reads some rows of a source
AHEAD = 3  # pieces for each process, so that none waits


def source_pieces(source: str) -> Iterator[Piece]:
    """The rows of a source in pieces; see `rows_or_errors`.

    Lines are parsed where the piece is read. Other files are parsed here.
    """
    path = storage_path(source)
    if path.is_file() and file_kind(path.name) in (".jsonl", ".ndjson"):
        for number, lines in line_blocks(path):
            yield partial(lines_piece, source, lines, number)
    else:
        for batch in batches_of_rows(rows_or_errors(source)):
            yield partial(iter, batch)


def lines_piece(path: Any, lines: bytes, first_line: int) -> Iterator[PlacedRow]:
    """The rows of some lines of a file."""
    return checked(json_lines(path, io.BytesIO(lines), first_line))


class Workers:
    """Processes that encode rows.

    They are started anew, as a copy of this process would share its threads and devices.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig, processes: int | None = None
    ) -> None:
        """Starts them at the first piece; by default one for each core of this process."""
        self.processes = processes or processors()
        self._pool = ProcessPoolExecutor(
            self.processes,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(tokenizer, cfg),
        )

    def encode(self, pieces: Iterable[Piece]) -> Iterator[tuple[Encoded, Tally]]:
        """The examples of pieces, in order, and what became of each one's rows.

        Raises:
            ValueError: If a row is bad and not to be skipped: the first of them.
        """
        pending: collections.deque[Future[Any]] = collections.deque()
        failure = None
        pieces = iter(pieces)
        try:
            while True:
                try:
                    piece = next(pieces, None)
                except Exception as error:  # raised when it is its turn
                    piece, failure = None, error
                if piece is None:
                    break
                pending.append(self._pool.submit(_encode, piece))
                if len(pending) > AHEAD * self.processes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise OSError(
                "a process that tokenises rows ended, perhaps for want of memory: make room, or "
                "cut long rows"
            ) from error
        finally:
            for future in pending:
                future.cancel()
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Ends the processes."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_encoder: Encoder


def _start(tokenizer: "PreTrainedTokenizerFast", cfg: DataConfig) -> None:
    """Makes ready a process, of which there are as many as cores."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A job's signals reach all its processes. What they mean is its main process' to say, which
    # may want rows until it has saved; but none outlives it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer, cfg)
    gc.freeze()  # a twentieth of the time went into looking through what was imported


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)


def _encode(piece: Piece) -> tuple[Encoded, Tally]:
    rows: list[list[Example]] = []
    tally = Tally()
    for batch in batches_of_rows(piece()):
        examples, counted = _encoder(batch)
        rows += examples
        tally.add(counted)
    return joined_examples(rows), tally
