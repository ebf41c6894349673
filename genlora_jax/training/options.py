"""How a step computes its batch; what it computes is the loss."""

from dataclasses import dataclass, replace

from jax.sharding import Mesh

from genlora_jax.mesh import batch_shards


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What a training or an evaluation step is told beside model, loss and optimizer.

    Attributes:
        accumulate: Micro-batches into which a batch's rows are split; a token weighs the same in
            each.
        chunk: Tokens whose logits exist at a time, in each shard of the batch.
        packed: Whether a row may hold several segments. Where none does, padding comes last, and
            attention needs no mask but the causal one.
    """

    accumulate: int = 1
    chunk: int = 1024
    packed: bool = True

    def over(self, mesh: Mesh | None) -> "StepOptions":
        """The options of the whole batch on a mesh: `chunk` counts the tokens of all shards."""
        return self if mesh is None else replace(self, chunk=self.chunk * batch_shards(mesh))
