"""How a step computes the loss of a batch."""

from dataclasses import dataclass, replace

from jax.sharding import Mesh

from genlora_jax.mesh import batch_shards


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How a training or an evaluation step computes the loss of a batch.

    Attributes:
        accumulate: Micro-batches into which a batch's rows are split. All trained tokens of the
            batch weigh the same.
        chunk: Tokens whose logits exist at a time, in each shard of the batch.
        packed: Whether a row may hold several segments. If none does, padding comes last, and the
            causal mask is all that attention needs.
        max_segments: The most segments of a row, padding counted as one, if that is known: packed
            rows then need no mask where attention can do without. A batch with more gives NaN.
    """

    accumulate: int = 1
    chunk: int = 1024
    packed: bool = True
    max_segments: int | None = None

    def over(self, mesh: Mesh | None) -> "StepOptions":
        """These options with a `chunk` that counts the tokens of all shards of the batch."""
        return self if mesh is None else replace(self, chunk=self.chunk * batch_shards(mesh))
