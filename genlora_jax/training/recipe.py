"""Recipes: all settings of a run."""

from dataclasses import dataclass, field
from typing import Literal

from genlora_jax.data.config import DataConfig
from genlora_jax.hf.base_model import ModelConfig
from genlora_jax.mesh import MeshConfig
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.methods.genlora import GenLoRAConfig
from genlora_jax.training.optim import OptimConfig
from genlora_jax.training.step_options import StepOptions
from genlora_jax.validation import require, require_int


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run.

    Attributes:
        output: The run's directory.
        steps: Length of the run; None to go by `epochs`.
        epochs: Passes over the data, if `steps` is None.
        objective: What is trained for: `sft`, the completions of `data.train`; see
            `genlora_jax.training.objectives`.
        accumulate: Micro-batches into which a batch is split to save memory.
        eval_every: Steps between evaluations; None for one at the end only.
        save_every: Steps between checkpoints; None for one at the end only.
        keep: Latest checkpoints to keep, beside the best.
        keep_every: Keep also the checkpoints of every so many steps; None for none of them.
        chunk: Tokens whose logits exist at a time, in each shard of the batch.
        seed: Seed of the adapter's initial values and of dropout.
        init_from: An adapter directory to start from: ours, of the recipe's config, or a PEFT
            LoRA adapter, whose A and B a recipe for LoRA of its rank or more takes.
        resume: Go on from the newest checkpoint in `output`; `auto`: if a run is there, and else
            begin one, as a job does that is started again after each interruption.
        wandb: Project at Weights & Biases; needs the extra of that name.
        progress: Whether to show a progress bar.
        distributed: Whether this is one of several processes; see `processes.join`.
        heartbeat: Seconds of silence after which a process counts as lost, and all others end.
    """

    output: str
    steps: int | None = None
    epochs: int = 1
    objective: str = "sft"
    accumulate: int = 1
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    keep_every: int | None = None
    chunk: int = 1024
    seed: int = 0
    init_from: str | None = None
    resume: bool | Literal["auto"] = False
    wandb: str | None = None
    progress: bool = True
    distributed: bool = False
    heartbeat: int = 100

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        counts = ("steps", "epochs", "accumulate", "eval_every", "save_every", "chunk")
        for name in (*counts, "keep", "keep_every", "heartbeat"):
            if (value := getattr(self, name)) is not None:
                require_int(f"train.{name}", value, 1)
        require_int("train.seed", self.seed, 0)
        require(
            not self.keep_every or bool(self.save_every and self.keep_every % self.save_every == 0),
            f"train.keep_every ({self.keep_every}) must be a multiple of train.save_every "
            f"({self.save_every}): other steps are not saved",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run; the fields of a recipe's YAML.

    Attributes:
        model: The base.
        data: What is trained on.
        train: The run.
        adapter: The adapter.
        optim: The optimizer.
        mesh: The devices.
        show: Examples of `data.train` to print first, with what is trained of them.
    """

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    adapter: AdapterConfig = field(default_factory=GenLoRAConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    show: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError that names the fields at fault."""
        require_int("show", self.show, 0)
        require(
            self.data.batch_size % self.train.accumulate == 0,
            f"data.batch_size ({self.data.batch_size}) is no multiple of "
            f"train.accumulate ({self.train.accumulate})",
        )

    @property
    def step_options(self) -> StepOptions:
        """The options of the recipe's training and evaluation steps."""
        return StepOptions(
            accumulate=self.train.accumulate, chunk=self.train.chunk, packed=self.data.pack
        )
