"""The base of a run: which model, how it is computed, and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
from jax.sharding import Mesh

from genlora_jax.base.quantise import BaseDtype, Quantisation
from genlora_jax.hf.checkpoint import locate, model_config
from genlora_jax.hf.load import load_llama
from genlora_jax.hf.tokenizer import check_rows, end_tokens, load_tokenizer
from genlora_jax.models.attention import Attention, choose_on, keeps_scores
from genlora_jax.models.config import LlamaConfig
from genlora_jax.models.llama import LlamaForCausalLM, Remat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base, and how it is computed.

    Attributes:
        path: Directory, here or at `gs://` or `s3://`, or hub id.
        dtype: Dtype of the computation. None: `float32` on CPUs, most of which only emulate
            bfloat16, else `bfloat16`.
        param_dtype: Dtype of the base's parameters. None: that of the computation on CPUs, where
            each step would convert them, else `bfloat16`.
        revision: Branch, tag or commit on the hub.
        scan: Layers scanned (fast to compile), or unrolled (faster on GPUs, which then copy neither
            kernels nor activations from and to stacks). None: unrolled on GPUs, but for a
            `base_dtype` of `int8`, `nf4` or `int4`; see `scans`.
        remat: What the backward pass recomputes: `none`, all but the outputs of projections and
            attention (`dots`), or all (`full`). Where a GPU scans layers no run trains with `none`:
            stacks of all activations are slower there than `dots`, and larger. None: the first of
            these that the device takes. `auto`: in a run, the first whose step fits the device's
            memory; of unrolled layers on a GPU, if none but `full` does, about as many are `dots`
            as fit.
        attention: `auto`, `xla`, `cudnn`, `splash` or `blocks`.
        base_dtype: How kernels are stored: `bf16`, as `param_dtype` says; `fp8_backward`, the
            same, but gradients are computed in FP8; or quantised to `fp8`, `int8`, `nf4` or
            `int4`. None: as the checkpoint has them.
        unquantised: Patterns of modules whose kernels are not quantised.
        int4_group: Inputs that share a scale in `int4`: 64 or 128.
        shape: The fields of the checkpoint's `config.json`, for planning without it.
    """

    path: str
    dtype: str | None = None
    param_dtype: str | None = None
    revision: str | None = None
    scan: bool | None = None
    remat: Literal["auto", "none", "dots", "full"] | None = None
    attention: Attention = "auto"
    base_dtype: BaseDtype | None = None
    unquantised: tuple[str, ...] = ("lm_head",)
    int4_group: int = 64
    shape: LlamaConfig | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        self.quantisation  # noqa: B018

    @property
    def quantisation(self) -> Quantisation:
        """How kernels are quantised, if the checkpoint's are not already."""
        return Quantisation(self.base_dtype or "bf16", self.unquantised, self.int4_group)

    def policies(self, platform: str) -> tuple[Remat, ...]:
        """What `remat` may stand for on `"cpu"`, `"gpu"` or `"tpu"`, the fastest first."""
        fastest = get_args(Remat)[platform == "gpu" and self.scans(platform) :]
        if self.remat == "auto":
            return fastest
        return (self.remat or fastest[0],)

    def check_remat(self, platform: str) -> None:
        """Refuses a policy that no run should train with.

        Raises:
            ValueError: If `remat` is `none` where a GPU scans layers.
        """
        if self.remat == "none" and platform == "gpu" and self.scans(platform):
            raise ValueError(
                "model.remat none: where a GPU scans layers, it stacks all activations, which is "
                "slower than to recompute some, and takes more memory; give dots or full"
            )

    def dtypes(self, platform: str) -> tuple[str, str]:
        """The dtypes of the computation and of the parameters on `"cpu"`, `"gpu"` or `"tpu"`."""
        dtype = self.dtype or ("float32" if platform == "cpu" else "bfloat16")
        return dtype, self.param_dtype or (dtype if platform == "cpu" else "bfloat16")

    def scans(self, platform: str) -> bool:
        """Whether layers are scanned on `"cpu"`, `"gpu"` or `"tpu"`.

        Unrolled layers are faster on GPUs, unless kernels are dequantised: codes are cheap to copy
        out of a stack, and XLA dequantises the kernels of unrolled layers ahead of their use. A
        checkpoint that is in NF4 already is the exception: without `base_dtype` it is unrolled,
        since no file is read here. Give `scan: true` for it.
        """
        if self.scan is not None:
            return self.scan
        return platform != "gpu" or self.quantisation.dequantises


@dataclass(frozen=True)
class Base:
    """A model as `ModelConfig` describes it.

    Attributes:
        source: Its directory.
        tokenizer: Its tokenizer, or that of the adapter it is used with.
        stop: Ids of the tokens that end a text.
        model: The Linen model.
        params: Its parameters.
    """

    source: Path
    tokenizer: "PreTrainedTokenizerFast"
    stop: tuple[int, ...]
    model: LlamaForCausalLM
    params: Any

    @property
    def attention(self) -> str:
        """Which attention the model runs where it lies, for the user."""
        model, devices = self.model, jax.tree.leaves(self.params)[0].devices()
        device = min(devices, key=lambda device: device.id)
        name = choose_on(
            device,
            model.attention,
            dtype=model.dtype,
            head_dim=model.config.head_dim,
            devices=len(devices),
        )
        slow = keeps_scores(name) and device.platform != "cpu"
        return f"{name}, which writes all scores to memory" if slow else name


def find_base(
    cfg: ModelConfig, adapter: str | None = None
) -> tuple[Path, "PreTrainedTokenizerFast"]:
    """A base's directory, downloaded if `path` is a hub id, and its tokenizer.

    Args:
        cfg: The base.
        adapter: The directory of an adapter, whose own tokenizer or chat template is then taken.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If it has no usable tokenizer, or one that does not fit the embedding, or its
            shape is not the `shape` that is given.
    """
    source = locate(cfg.path, revision=cfg.revision)
    config = model_config(source)
    for field, given in vars(cfg.shape).items() if cfg.shape else ():
        if given != (found := getattr(config, field)):
            raise ValueError(f"model.shape: {field} is {given}; the checkpoint has {found}")
    tokenizer = load_tokenizer(source, adapter)
    check_rows(tokenizer, config.vocab_size, source)
    return source, tokenizer


def load_base(cfg: ModelConfig, found: tuple[Path, "PreTrainedTokenizerFast"], mesh: Mesh) -> Base:
    """Loads the base that `find_base` found onto a mesh; raises as `load_llama` does."""
    source, tokenizer = found
    stop = tuple(end_tokens(source, tokenizer))
    options = {k: v for k, v in vars(cfg).items() if k not in ("path", "shape")}
    platform = mesh.devices.flat[0].platform
    options["scan"], options["remat"] = cfg.scans(platform), cfg.policies(platform)[0]
    options["dtype"], options["param_dtype"] = cfg.dtypes(platform)
    model, params = load_llama(source, **options, mesh=mesh)
    return Base(source, tokenizer, stop, model, params)
