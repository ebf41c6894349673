"""Safetensors files, read and written a tensor at a time, without mapping the file.

A mapped file counts as memory of the process and is read page by page. A tensor read into a buffer
is faster by half, and several threads can work on one file. The library checks every header.
"""

import contextlib
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors

from genlora_jax.storage import is_remote
from genlora_jax.threads import WINDOW, in_threads
from genlora_jax.validation import refuse_pointer

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
NAMES = {kind: name for name, kind in DTYPES.items()}
# Those of quantised checkpoints.
QUANTISED = DTYPES | {
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
}
REMOTE_WINDOW = 8  # tensors in flight: an answer from a bucket takes a while to begin
PIECES, NEAR = 32, 1 << 16  # of a remote file: asked for at once; bytes that are fetched as one
HEADER, LONGEST = 1 << 16, 100_000_000  # bytes: what most headers fit in, and what none exceeds
BLOCK = 1 << 16  # numbers looked at a time, so that they stay in the cache
STRIP = 32  # rows transposed at a time: their columns' cache lines fit the cache


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype's name, its shape, and the position of its first byte."""

    kind: str
    shape: tuple[int, ...]
    start: int


class TensorFile:
    """The tensors of one file.

    Raises:
        ValueError: If the file is truncated or otherwise damaged.
    """

    def __init__(self, file: Path):
        self.file = file
        self.version: str | None = None  # of a file in a bucket
        with contextlib.ExitStack() as stack:
            local = file
            if is_remote(file):
                local, self.version = stack.enter_context(_local_header(file))
            refuse_pointer(local, named=file)
            try:
                with safetensors.safe_open(local, framework="numpy"):
                    pass  # sizes, offsets and dtypes in the header fit the file
            except safetensors.SafetensorError as error:
                raise ValueError(f"{file} is damaged or truncated: {error}") from error
            with local.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
            self.size = local.stat().st_size
        self.entries = {
            name: Entry(
                field["dtype"], tuple(field["shape"]), 8 + length + field["data_offsets"][0]
            )
            for name, field in header.items()
            if name != "__metadata__"
        }

    def read(
        self, name: str, rows: slice = slice(None), kinds: Mapping[str, np.dtype] = DTYPES
    ) -> np.ndarray:
        """A tensor, or some of its rows (positions on its first axis); other bytes are not read.

        Raises:
            ValueError: If its dtype is none of `kinds`, or the file ends too early.
        """
        entry = self.entries[name]
        if entry.kind not in kinds:
            raise ValueError(
                f"{self.file}: tensor {name} is of dtype {entry.kind}; {', '.join(DTYPES)} are read"
            )
        kind, shape, skip = kinds[entry.kind], entry.shape, 0
        if shape:
            first, last, _ = rows.indices(shape[0])
            skip = first * kind.itemsize * int(np.prod(shape[1:]))
            shape = (last - first, *shape[1:])
        value = _empty(shape, kind)
        view = memoryview(value.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
        if is_remote(self.file):
            self.file.read_into(view, entry.start + skip)  # type: ignore[attr-defined]
            return value
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(entry.start + skip)
            while view:  # a read may stop at 2 GiB
                if not (count := stream.readinto(view)):
                    raise ValueError(f"{self.file} ends within tensor {name}")
                view = view[count:]
        return value

    def pieces(self, places: Sequence[tuple[int, int]]) -> list[bytes]:
        """Bytes of the file, by the position of the first and their count, in order."""
        if is_remote(self.file):
            return _remote_pieces(self.file, places)
        found = []
        with self.file.open("rb") as stream:
            for start, count in places:
                stream.seek(start)
                found.append(stream.read(count))
        return found


@contextlib.contextmanager
def _local_header(file: Any) -> Iterator[tuple[Path, str]]:
    """A local file of the size of a remote one, whose header alone it has; the remote's version.

    The rest of it takes no room on the disk.
    """
    size, version = file.size_and_version()
    start = file.read_range(0, min(size, HEADER))
    end = min(size, LONGEST, 8 + int.from_bytes(start[:8], "little"))
    start += file.read_range(len(start), max(end - len(start), 0))
    with tempfile.NamedTemporaryFile(prefix="genlora-") as local:
        local.write(start)
        local.truncate(size)
        local.flush()
        yield Path(local.name), version


def _remote_pieces(file: Any, places: Sequence[tuple[int, int]]) -> list[bytes]:
    ranges: list[list[int]] = []  # where each begins and ends
    owners = []
    for start, count in places:
        if not ranges or start + count - ranges[-1][0] > NEAR:
            ranges.append([start, start])
        ranges[-1][1] = max(ranges[-1][1], start + count)
        owners.append(len(ranges) - 1)
    fetched = list(in_threads(lambda r: file.read_range(r[0], r[1] - r[0]), ranges, PIECES))
    starts = [start - ranges[at][0] for at, (start, _) in zip(owners, places, strict=True)]
    found = zip(owners, starts, places, strict=True)
    return [fetched[at][start : start + count] for at, start, (_, count) in found]


def window(directory: Path) -> int:
    """How many tensors are read at once."""
    return REMOTE_WINDOW if is_remote(directory) else WINDOW


class TensorWriter:
    """A new file of tensors, to be written in any order.

    `tensors` has, by name, anything with `shape` and `dtype`.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Any]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            kind = np.dtype(tensor.dtype)
            start, end = end, end + int(np.prod(tensor.shape)) * kind.itemsize
            header[name] = {
                "dtype": NAMES[kind],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        os.truncate(self._file, 8 + len(text) + end)
        self._put(struct.pack("<Q", len(text)) + text, 0)
        self._header, self._first = header, 8 + len(text)

    def write(self, name: str, value: np.ndarray) -> None:
        """Writes one tensor; threads may write several at once.

        Raises:
            ValueError: If it is not of the size that was announced.
        """
        start, end = self._header[name]["data_offsets"]
        if value.nbytes != end - start:
            raise ValueError(f"tensor {name} has {value.nbytes} bytes, not {end - start}")
        self._put(np.ascontiguousarray(value).reshape(-1).view(np.uint8), self._first + start)

    def _put(self, data: Any, start: int) -> None:
        view = memoryview(data)
        while view:  # a write may stop at 2 GiB
            count = os.pwrite(self._file, view, start)
            view, start = view[count:], start + count

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)


def _empty(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes: on CPUs, JAX takes it without a copy."""
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(kind).reshape(shape)


def is_finite(value: np.ndarray) -> bool:
    """Whether an array holds neither NaN nor infinity; as fast as memory is read."""
    kind = f"u{value.dtype.itemsize}"
    # Infinity is the exponent with all bits set, and a NaN has the same exponent.
    exponent = np.array(np.inf, value.dtype).view(kind)
    bits = value.reshape(-1).view(kind)
    blocks = (bits[start : start + BLOCK] for start in range(0, len(bits), BLOCK))
    return all((block & exponent).max() < exponent for block in blocks)


def transposes_on_host() -> bool:
    """Whether NumPy transposes tensors, by `transpose`: on CPUs, where XLA is slow at it."""
    return jax.default_backend() == "cpu"


def transpose(value: np.ndarray) -> np.ndarray:
    """A contiguous copy of the transpose, a strip at a time: full columns would miss the cache."""
    result = _empty(value.shape[::-1], value.dtype)
    # As plain integers, which NumPy copies without holding up other threads.
    source, target = (x.view(f"u{value.dtype.itemsize}") for x in (value, result))
    for start in range(0, len(source), STRIP):
        target[:, start : start + STRIP] = source[start : start + STRIP].T
    return result
