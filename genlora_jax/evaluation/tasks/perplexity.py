"""Perplexity: how likely the model finds the completions that it would be trained on."""

import math
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import jax

from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import encode
from genlora_jax.data.packing import eval_batches
from genlora_jax.data.rows import read_rows
from genlora_jax.data.sources import MemorySource
from genlora_jax.evaluation.tasks.task import Result, TaskConfig
from genlora_jax.generation.subject import Subject
from genlora_jax.training.step import evaluate, make_eval_step
from genlora_jax.validation import no_result


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig(TaskConfig):
    """Completions to predict; rows have the forms of training data.

    Attributes:
        length: Tokens in a row of a batch.
        overlong: What becomes of longer rows, as `data.overlong` of a recipe; with the recipe's
            value the loss is that of its evaluations. `split` suits long texts.
    """

    length: int = 1024
    overlong: Literal["drop", "truncate", "split", "error"] = "drop"


def read(source: str, limit: int | None = None) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a source, each with its place; raises as `read_rows` does."""
    rows = [*islice(read_rows(source), limit)]
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def run(subject: Subject, cfg: PerplexityConfig, rows: list[tuple[str, dict[str, Any]]]) -> Result:
    """Loss over the completions of rows.

    Returns:
        `loss` (mean over their tokens, nats), `perplexity` (its exponential), and counts: of
        examples, their tokens, and rows longer than `cfg.length`.

    Raises:
        ValueError: If a row has no field that can be predicted, or no row is left.
    """
    shape = DataConfig(
        train="perplexity", length=cfg.length, batch_size=subject.batch_size, overlong=cfg.overlong
    )
    source = rows[0][0].rpartition(":")[0] if rows else "perplexity"
    examples, report = encode(iter(rows), subject.tokenizer, shape, source)
    print(report)
    batches = [jax.device_put(b) for b in eval_batches(MemorySource(examples), shape)]
    loss = evaluate(make_eval_step(subject.model), subject.params, subject.factors, batches)
    if not math.isfinite(loss):
        raise no_result("losses")
    metrics = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "examples": report.examples,
        "tokens": report.trained_tokens,
        "overlong": report.overlong,
    }
    return Result(metrics, [])
