"""Bases of random weights in bfloat16 and batches of random tokens: real shapes, no downloads."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from genlora_jax.base.quantise import Quantisation
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.sharding import constrain, param_specs


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model's shape, and the batch `rows x length` that a step is measured with."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rows: int
    length: int

    @property
    def shape(self) -> dict[str, int]:
        """The model's fields, as `config.json` names them."""
        fields = dataclasses.asdict(self)
        return {name: fields[name] for name in fields if name not in ("rows", "length")}

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(**self.shape, head_dim=self.hidden_size // self.num_attention_heads)


def _size(
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    batch: tuple[int, int],
) -> Size:
    return Size(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        rows=batch[0],
        length=batch[1],
    )


SIZES = {
    "llama-8b": _size(4096, 14336, 32, 32, 8, 128256, (1, 2048)),
    "llama-70b": _size(8192, 28672, 80, 64, 8, 128256, (1, 2048)),
    "llama3.2-1b": _size(2048, 8192, 16, 32, 8, 128256, (2, 2048)),
    "llama-1b": _size(2048, 5632, 22, 32, 4, 32000, (2, 2048)),  # TinyLlama
    "small": _size(1024, 2816, 4, 16, 16, 8192, (2, 256)),
    "tiny": _size(64, 128, 2, 4, 2, 256, (2, 32)),
}


def random_model(size: Size, mesh: Mesh | None = None, *, scan: bool = True) -> LlamaForCausalLM:
    """The model alone; see `random_base`."""
    return LlamaForCausalLM(
        size.config,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        scan=scan,
        remat="full",
        attention="cudnn" if jax.default_backend() == "gpu" else "xla",
        mesh=mesh,
    )


def random_base(
    size: Size,
    mesh: Mesh | None = None,
    *,
    scan: bool = True,
    quantisation: Quantisation | None = None,
) -> tuple[LlamaForCausalLM, Any]:
    """A model that recomputes everything in its backward pass, and random parameters for it.

    Args:
        size: Its shape.
        mesh: Devices over which the parameters are sharded; None for one device.
        scan: Whether its layers are stacked.
        quantisation: How its layers' kernels are quantised, one after another; on one device.

    Returns:
        The model and its parameters, the same on every mesh.
    """
    model = random_model(size, mesh, scan=scan)
    shapes = parameter_shapes(model.clone(mesh=None))
    specs = flatten_dict(param_specs(shapes))
    flat = {}
    shapes = flatten_dict(shapes)
    quantised = set() if quantisation is None else quantisation.paths(shapes)
    for i, (path, leaf) in enumerate(shapes.items()):
        key = jax.random.fold_in(jax.random.key(0), i)
        where = None if mesh is None else NamedSharding(mesh, specs[path])
        form = quantisation if path in quantised else None
        flat[path] = _draw(key, leaf.shape, path[-1], where, form)
    return model, unflatten_dict(flat)


@functools.partial(jax.jit, static_argnames=("shape", "name", "where", "form"))
def _draw(
    key: jax.Array,
    shape: tuple[int, ...],
    name: str,
    where: NamedSharding | None,
    form: Quantisation | None = None,
) -> Any:
    """A parameter: norms 1, matrices N(0, 1 / d_in), a stack of them a layer at a time."""
    if len(shape) == 3:
        each = None if where is None else NamedSharding(where.mesh, P(*where.spec[1:]))
        # The random bits of a whole stack would take several times its memory.
        layers = jax.lax.map(
            lambda layer_key: _draw(layer_key, shape[1:], name, each, form),
            jax.random.split(key, shape[0]),
        )
        return constrain(layers, where)
    if name == "scale":
        return constrain(jnp.ones(shape, jnp.bfloat16), where)
    d_in = shape[-1] if name == "embedding" else shape[-2]
    value = d_in**-0.5 * jax.random.normal(key, shape, jnp.bfloat16)
    return constrain(value, where) if form is None else form.kernel(value)


def random_batch(size: Size, segments: int = 2) -> dict[str, np.ndarray]:
    """`size.rows` rows of random tokens, all of them trained, in so many segments each."""
    shape = (size.rows, size.length)
    each = -(-size.length // segments)
    segment, position = np.divmod(np.arange(size.length, dtype=np.int32), np.int32(each))
    ids = np.random.default_rng(0).integers(0, size.vocab_size, shape)
    return {
        "input_ids": ids.astype(np.int32),
        "loss_mask": np.ones(shape, bool),
        "segment_ids": np.tile(segment + 1, (size.rows, 1)),
        "positions": np.tile(position, (size.rows, 1)),
    }
