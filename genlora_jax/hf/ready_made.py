"""Checkpoints that are quantised already: bitsandbytes' NF4, and FP8 with scales.

Both are read a tensor at a time as the floats they stand for. Where the kernels stay in NF4, its
codes and scales are taken as they are.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from genlora_jax.base.nf4 import BLOCK, LEVELS, NESTED_BLOCK, NF4, SCALES
from genlora_jax.base.nibbles import HALF, RUN
from genlora_jax.base.quantise import Quantisation
from genlora_jax.hf.checkpoint import CONFIG, Checkpoint, read_json
from genlora_jax.hf.names import Tensor, tensors
from genlora_jax.hf.tensorfile import DTYPES, QUANTISED
from genlora_jax.targets import split_layer
from genlora_jax.validation import LARGEST_FLOAT, require, require_float, require_int

STATE = ".quant_state.bitsandbytes__"
# What lies beside a quantised weight, and what is said of activations and caches, which are not
# quantised here.
BESIDE_NF4 = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", f"{STATE}nf4")
SCALE, INVERSE = "_scale", "_scale_inv"
ACTIVATIONS = (".input_scale", ".activation_scale", ".input_activation_scale")
FP8 = ("F8_E4M3", "F8_E5M2")
READ = "bitsandbytes (NF4), fp8, fbgemm_fp8 and compressed-tensors (float-quantized) are read"


def open_checkpoint(directory: Path) -> Checkpoint:
    """The tensors of a directory, as floats.

    Raises:
        FileNotFoundError: As `Checkpoint`.
        ValueError: As `Checkpoint`, or if they are quantised in a way that is not read.
    """
    settings = read_json(directory / CONFIG).get("quantization_config")
    if not settings:
        return Checkpoint(directory)
    refuse_other_formats(directory / CONFIG, settings)
    return ReadyMade(directory, settings)


def refuse_other_formats(file: Path, settings: Any) -> None:
    """Raises ValueError if a checkpoint is quantised in a way that is not read."""
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: quantization_config is no object")
    block = settings.get("weight_block_size") or (1, 1)
    try:
        require(len(block) == 2, f"two sizes, not {len(block)}")
        for size in (block[0], block[1]):
            require_int("a size", size, 1)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{file}: weight_block_size {block!r:.40}: {error}") from None
    method = settings.get("quant_method")
    found = f"quant_method {method!r}"
    if method == "bitsandbytes":
        found = "bitsandbytes in 8 bits" if settings.get("load_in_8bit") else "bitsandbytes"
        kind = settings.get("bnb_4bit_quant_type", "fp4")
        if settings.get("load_in_4bit") and kind == "nf4":
            return
        found += f" in {kind}" if settings.get("load_in_4bit") else ""
    elif method == "compressed-tensors":
        if (form := settings.get("format")) == "float-quantized":
            return
        found += f" of format {form!r}"
    elif method in ("fp8", "fbgemm_fp8"):
        return
    raise ValueError(f"{file}: quantized by {found}, which is not read; take the original ({READ})")


def stated_quantisation(file: Path, settings: Any) -> Quantisation:
    """How kernels are quantised already, by a config's `quantization_config` alone.

    Raises:
        ValueError: If it is in a way that is not read.
    """
    refuse_other_formats(file, settings)
    if settings["quant_method"] != "bitsandbytes":
        return Quantisation("bf16")
    # Parts of modules' paths, with the index of a layer: there, the module is left in all layers.
    skipped = settings.get("llm_int8_skip_modules") or ["lm_head"]
    parts = [re.escape(split_layer(tuple(name.split(".")))[0]) for name in skipped]
    return Quantisation("nf4", tuple(rf"(.*\.)?{part}(\..*)?" for part in parts))


def with_plain_scales(leaf: Any) -> Any:
    """The shapes of a kernel in NF4 whose scales are not quantised in turn; others as they are."""
    if not isinstance(leaf, NF4):
        return leaf
    absmax = leaf.absmax.update(dtype=np.float32)
    return dataclasses.replace(leaf, absmax=absmax, nested=None, offset=None)


class ReadyMade(Checkpoint):
    """A checkpoint with quantised tensors, which reads as the one it was made from."""

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        super().__init__(directory)
        self._block = settings.get("weight_block_size") or (0, 0)
        self._states = {}
        for name in super().names():
            if f"{STATE}fp4" in name:
                raise ValueError(f"{self.file(name)}: tensor {name}: fp4 is not read")
            if name.endswith(f"{STATE}nf4"):
                weight = name.removesuffix(f"{STATE}nf4")
                self._states[weight] = self._nf4_state(name)

    def _nf4_state(self, name: str) -> dict[str, Any]:
        """What a weight's `quant_state` says, checked."""
        weight = name.removesuffix(f"{STATE}nf4")
        try:
            state: dict[str, Any] = json.loads(self._stored(name).tobytes())
            require(len(state["shape"]) == 2, f"its shape is {state['shape']}")
            parts = [(weight, 2, ["U8"])]
            if nested := state.get("nested_blocksize"):
                require_float("nested_offset", state["nested_offset"], -LARGEST_FLOAT)
                parts += [(f"{weight}.absmax", state["blocksize"], ["U8"])]
                parts += [(f"{weight}.nested_absmax", state["blocksize"] * nested, ["F32"])]
            else:
                parts += [(f"{weight}.absmax", state["blocksize"], [*DTYPES])]
            for size in (*state["shape"], *(size for _, size, _ in parts)):
                require_int("a size", size, 1)
            count = math.prod(state["shape"])
            for tensor, each, kinds in parts:
                entry = self._where[tensor].entries[tensor]
                found = math.prod(entry.shape)
                require(found == -(-count // each), f"{tensor} has {found} values")
                require(entry.kind in kinds, f"{tensor} is of dtype {entry.kind}")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{self.file(name)}: tensor {name} is damaged: {reason}") from None
        maps = {f"{weight}.quant_map": LEVELS}
        if nested:
            maps[f"{weight}.nested_quant_map"] = SCALES
        for tensor, expected in maps.items():
            if not np.array_equal(self._stored(tensor), expected):
                raise ValueError(
                    f"{self.file(tensor)}: tensor {tensor} has levels that are not read"
                )
        return state

    def _stored(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """A tensor as the file has it."""
        if name not in self._where:
            raise ValueError(f"{self.directory}: tensor {name} is missing")
        return self._where[name].read(name, rows, QUANTISED)

    def names(self) -> set[str]:
        names = super().names()
        beside = {name + suffix for name in self._states for suffix in BESIDE_NF4}
        beside |= {name for name in names if name.endswith(ACTIVATIONS)}
        for name in names:
            if self._where[name].entries[name].kind in FP8:
                beside |= {name + SCALE, name + INVERSE}
        return names - beside

    def size_of(self, name: str) -> int:
        if name not in self._states:
            return super().size_of(name)
        return math.prod(self._states[name]["shape"]) * LEVELS.itemsize

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._states:
            super().check_shape(name, shape)
        elif (found := tuple(self._states[name]["shape"])) != shape:
            raise ValueError(f"{self.file(name)}: tensor {name} has shape {found}, not {shape}")

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        if name in self._states:
            return self._read_nf4(name, rows)
        if self._where[name].entries[name].kind in FP8:
            return self._scaled(name, self._stored(name, rows), rows)
        return super().read(name, rows)

    def _scaled(self, name: str, value: np.ndarray, rows: slice) -> np.ndarray:
        """FP8 times its scale: one of a tensor, of each row, or of each block."""
        found = [name + suffix for suffix in (SCALE, INVERSE) if name + suffix in self._where]
        if not found:
            raise ValueError(f"{self.file(name)}: tensor {name} is FP8 and has no {name}{SCALE}")
        scale = self._where[found[0]].read(found[0]).astype(np.float32)  # of floats alone
        shape = self._where[name].entries[name].shape
        first, last, _ = rows.indices(shape[0])
        down, across = self._block
        # Blocks first: of some sizes there are as many as rows.
        if (
            down
            and len(shape) == 2
            and scale.shape == (-(-shape[0] // down), -(-shape[1] // across))
        ):
            scale = scale[np.arange(first, last) // down].repeat(across, axis=1)[:, : shape[1]]
        elif scale.size == 1:
            scale = scale.reshape(1, 1)
        elif scale.shape in ((shape[0],), (shape[0], 1)):
            scale = scale.reshape(-1, 1)[first:last]
        else:
            raise ValueError(
                f"{self.file(name)}: tensor {found[0]} has shape {scale.shape}, which is not one "
                f"scale for each block of weight_block_size {self._block}"
            )
        return value.astype(np.float32) * scale

    def _scales(self, name: str) -> np.ndarray:
        """The scales of a weight's blocks, float32."""
        absmax, state = self._stored(f"{name}.absmax"), self._states[name]
        if absmax.dtype != np.uint8:
            return absmax.astype(np.float32)
        nested = self._stored(f"{name}.nested_absmax")
        each = nested.repeat(state["nested_blocksize"])[: absmax.size]
        return SCALES[absmax] * each + np.float32(state["nested_offset"])

    def _read_nf4(self, name: str, rows: slice) -> np.ndarray:
        state = self._states[name]
        shape, block = state["shape"], state["blocksize"]
        first, last, _ = rows.indices(shape[0])
        width = math.prod(shape[1:])
        start, stop = first * width, last * width  # among the weights, two of which share a byte
        packed = self._stored(name, slice(start // 2, -(-stop // 2))).reshape(-1)
        codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)
        codes = codes[start % 2 : start % 2 + stop - start]
        scales = self._scales(name)[np.arange(start, stop) // block]
        return (LEVELS[codes] * scales).reshape(last - first, *shape[1:])

    def has_nf4(self, name: str) -> bool:
        """Whether a tensor is NF4 in blocks that are also ours: of 64, none over two outputs."""
        state = self._states.get(name)
        return (
            state is not None
            and state["blocksize"] == BLOCK
            and state["shape"][1] % BLOCK == 0
            and state.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
        )

    def quantisation(self, order: Iterable[Tensor]) -> Quantisation:
        """How the tensors' kernels are quantised already."""
        if not self._states:
            return Quantisation("bf16")
        others = {
            split_layer(tensor.path[:-1])[0] for tensor in order if not self.has_nf4(tensor.name)
        }
        return Quantisation("nf4", tuple(sorted(others)))

    def shapes(self, shapes: Any) -> Any:
        """Shapes of parameters, for tensors in NF4 whose scales are not quantised in turn."""
        flat = flatten_dict(shapes)
        for tensor in tensors(shapes):
            state = self._states.get(tensor.name, {})
            if self.has_nf4(tensor.name) and not state.get("nested_blocksize"):
                flat[tensor.path] = with_plain_scales(flat[tensor.path])
        return unflatten_dict(flat)

    def nf4(self, name: str, dtype: Any) -> NF4:
        """A tensor in NF4 as a kernel in NF4, of NumPy arrays.

        Raises:
            ValueError: If its scales are not finite, or a weight would not be in the dtype.
        """
        state = self._states[name]
        d_out, d_in = state["shape"]
        packed = self._stored(name).reshape(d_out, -1, RUN // 2)
        # Their bytes hold neighbours, the first of them high; ours inputs 32 apart.
        runs = np.stack([packed >> 4, packed & 15], axis=-1).reshape(d_out, -1, RUN)
        codes = runs[..., :HALF] | (runs[..., HALF:] << 4)
        absmax = self._stored(f"{name}.absmax").reshape(d_out, -1)
        nested, offset = None, None
        if state.get("nested_blocksize"):
            nested = self._stored(f"{name}.nested_absmax")
            offset = np.float32(state["nested_offset"])
            self.refuse_unfit(f"{name}.nested_absmax", nested, nested.dtype)
        # The largest level is 1: where its scale is finite, so is a weight.
        self.refuse_unfit(f"{name}.absmax", self._scales(name), dtype)
        codes = np.ascontiguousarray(codes.reshape(d_out, -1).T)
        return NF4(codes, np.ascontiguousarray(absmax.T), nested, offset, d_in, dtype)
