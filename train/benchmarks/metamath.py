"""PEFT's comparison of methods on MetaMathQA, with a method of this library.

    python -m train.benchmarks.metamath --base meta-llama/Llama-3.2-3B --name genlora/default \
        --adapter '{"method": "genlora", "alpha": 128}' --rate 1e-3 --out genlora--default.json

It follows `method_comparison/MetaMathQA` of huggingface/peft: rows of at most 1,300 characters in
the data set's order, sorted by length within 20 batches of 4; all tokens trained; AdamW, a tenth of
the steps warm-up, then a cosine to 0; greedy answers to 50 rows of GSM8K's training part now and
then, and to its test part at the end. What differs: JAX instead of PyTorch, and "forgetting" is not
measured. The result has the same fields, and a row is printed beside the published ones.
`--metamath` and `--gsm8k` are hub ids, or local files of the same rows.

Of several rates, the loss of the last `--held-out` rows chooses one; those rows are not trained,
and only the chosen rate is tested.
"""

import argparse
import datetime
import itertools
import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import genlora_jax as gl
from genlora_jax.generation.answers import answers
from genlora_jax.hf.base_model import Base, ModelConfig, find_base, load_base
from genlora_jax.mesh import one_device
from genlora_jax.methods import config_from_json, config_to_json
from genlora_jax.methods.config import AdapterConfig
from genlora_jax.training.optim import OptimConfig, make_optimizer
from genlora_jax.training.provenance import provenance
from genlora_jax.training.step import evaluate, init_state, make_eval_step, make_train_step
from genlora_jax.training.step_options import StepOptions
from train.benchmarks.real_tasks.tasks import merged_subject

LONGEST, CHARACTERS, VALIDATION = 768, 1300, 50
OPTIONS = StepOptions(packed=False)
BUCKET = 20  # batches whose rows are sorted by length
WIDTH = 128  # rows are padded to a multiple, so that few lengths are compiled
TEMPLATE = "Question: {query} Think step by step.\nAnswer:"
MARKS = (
    *("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is "),
    "#### ",
)
# Test accuracy and parameters of rows that PEFT publishes, Llama-3.2-3B.
PUBLISHED: dict[str, tuple[float, int | None]] = {
    "lily r=140, MLP": (0.526, None),
    "lora r=64, rslora": (0.513, 18_350_080),
    "hira r=32": (0.513, 9_200_000),
    "lora r=32": (0.478, 9_175_040),
    "lokr r=32": (0.466, 2_300_000),
    "ia3": (0.455, 630_000),
    "unilora r=4": (0.408, 131_072),
    "vera": (0.354, 129_000),
}
Row = tuple[str, str]  # a query and its response


def final_answer(text: str) -> str | None:
    """What follows the last mark of an answer, up to the end of its line."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")


def number(text: str) -> float | None:
    """A number or a fraction of two; None for other texts."""
    above, *below = text.split("/")
    try:
        value = Decimal(above.strip())
        if below:
            divisor = Decimal(below[0].strip())
            value = value / divisor if len(below) == 1 and divisor else Decimal("nan")
    except InvalidOperation:
        return None
    return float(value) if value.is_finite() else None


def is_right(given: str, expected: str) -> bool:
    """Whether an answer ends as the expected one does: the same number, or else the same text.

    Raises:
        ValueError: If the expected one has no final answer.
    """
    ours, right = final_answer(given), final_answer(expected)
    if right is None:
        raise ValueError(f"no final answer in the row's response: {expected!r}")
    if ours is None:
        return False
    value, expected_value = number(ours), number(right)
    return ours == right if expected_value is None else value == expected_value


def read(source: str, part: str) -> list[Row]:
    """The rows of a `.jsonl` file or of a data set on the hub."""
    if Path(source).is_dir():
        source = str(Path(source) / f"{part}.jsonl")
    if Path(source).is_file():
        rows: Any = map(json.loads, Path(source).read_text(encoding="utf-8").splitlines())
    else:
        import datasets

        name = "main" if source.endswith("gsm8k") else None
        rows = datasets.load_dataset(source, name, split=part)
    return [
        (row.get("query", row.get("question")), row.get("response", row.get("answer")))
        for row in rows
    ]


def batches(
    rows: Sequence[Row], tokenizer: Any, size: int, width: int = WIDTH
) -> Iterator[dict[str, np.ndarray]]:
    """Batches in PEFT's order, each row followed by an end token where the longest leaves room."""
    for start in range(0, len(rows), size * BUCKET):
        bucket = rows[start : start + size * BUCKET]
        texts = [TEMPLATE.format(query=query) + response for query, response in bucket]
        found = [ids[:LONGEST] for ids in tokenizer(texts, verbose=False)["input_ids"]]
        order = sorted(range(len(found)), key=lambda i: -len(found[i]))
        for first in range(0, len(order), size):
            chosen = [found[i] for i in order[first : first + size]]
            longest = max(map(len, chosen))
            shape = (size, -(-longest // width) * width)
            ids, trained = np.zeros(shape, np.int32), np.zeros(shape, bool)
            for row, tokens in enumerate(chosen):
                tokens = [*tokens, tokenizer.eos_token_id][:longest]
                ids[row, : len(tokens)], trained[row, : len(tokens)] = tokens, True
            yield {
                "input_ids": ids,
                "loss_mask": trained,
                "segment_ids": trained.astype(np.int32),
                "positions": np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
            }


def accuracy(
    base: Base, adapter: gl.Adapter, rows: Sequence[Row], batch: int, tokens: int
) -> float:
    """The share of right answers to queries."""
    subject = merged_subject(base, adapter, batch)
    prompts = [subject.encode(TEMPLATE.format(query=query)) for query, _ in rows]
    given = answers(subject, prompts, max_new_tokens=tokens)
    return float(
        np.mean([is_right(text, right) for [text], (_, right) in zip(given, rows, strict=True)])
    )


@dataclass(frozen=True)
class Data:
    """Rows by what they are for."""

    tuned: Sequence[Row]
    held_out: Sequence[Row]
    validation: Sequence[Row]
    test: Sequence[Row]

    @classmethod
    def of(cls, options: argparse.Namespace) -> "Data":
        """Reads them."""
        rows = [row for row in read(options.metamath, "train") if len(" ".join(row)) <= CHARACTERS]
        tuned = len(rows) - options.held_out
        if options.held_out < 0 or tuned < 1:
            raise SystemExit(
                f"--held-out {options.held_out}: {options.metamath} has {len(rows)} rows"
            )
        asked = read(options.gsm8k, "train")
        np.random.seed(0)  # as PEFT draws them
        order = np.arange(len(asked))
        np.random.shuffle(order)
        validation = [asked[i] for i in order[:VALIDATION]]
        test = read(options.gsm8k, "test")[: options.test_rows]
        return cls(rows[:tuned], rows[tuned:], validation, test)


class Run:
    """A run at a rate: its settings, its base, and what has been measured."""

    def __init__(self, options: argparse.Namespace, base: Base, data: Data, rate: float) -> None:
        self.options, self.base, self.data, self.rate = options, base, data, rate
        self.cfg: AdapterConfig = config_from_json(json.loads(options.adapter))
        self.adapter = gl.init_adapter(self.cfg, jax.random.key(options.seed), base.params)
        self.metrics: list[dict[str, Any]] = []
        self.losses: list[jax.Array] = []
        self.tokens, self.train_seconds = 0, 0.0

    def train(self) -> None:
        """Trains, and measures on the way."""
        options, base = self.options, self.base
        optim = OptimConfig(
            learning_rate=self.rate,
            generator_ratio=options.generator_ratio,
            warmup=0.1,
            weight_decay=options.weight_decay,
        )
        optimizer = make_optimizer(optim, options.steps)
        state = init_state(self.adapter, optimizer, options.seed)
        step = make_train_step(base.model, self.cfg, optimizer, options=OPTIONS)
        endless = itertools.chain.from_iterable(
            batches(self.data.tuned, base.tokenizer, options.batch_size) for _ in itertools.count()
        )
        began = time.perf_counter()
        for count, batch in zip(range(1, options.steps + 1), endless, strict=False):
            state, metrics = step(state, base.params, batch)
            self.losses.append(metrics["loss"])
            self.tokens += int(batch["loss_mask"].sum())
            if count % options.eval_steps and count != options.steps:
                continue
            self.adapter = jax.block_until_ready(state.adapter)
            self.train_seconds += time.perf_counter() - began
            if count % options.eval_steps == 0:
                self.add("valid accuracy", count, self.data.validation)
            began = time.perf_counter()

    def held_out_loss(self) -> float:
        """Mean loss (nats) over the tokens of the held-out rows."""
        parts = list(batches(self.data.held_out, self.base.tokenizer, self.options.batch_size))
        factors = gl.generate_factors(self.cfg, self.adapter)
        loss = evaluate(make_eval_step(self.base.model, OPTIONS), self.base.params, factors, parts)
        print(f"rate {self.rate:g}: held-out loss {loss:.4f}", flush=True)
        return loss

    def test(self) -> float:
        """Accuracy on the test rows."""
        self.add("test accuracy", self.options.steps, self.data.test)
        self.metrics[-1] |= {"train total tokens": self.tokens, "forgetting": None}
        return self.metrics[-1]["test accuracy"]

    def add(self, name: str, step: int, rows: Sequence[Row]) -> None:
        """Measures the accuracy on some rows."""
        options, start = self.options, time.perf_counter()
        batch, tokens = options.eval_batch_size, options.max_new_tokens
        share = accuracy(self.base, self.adapter, rows, batch, tokens)
        seconds = time.perf_counter() - start
        before = sum(metric["eval time"] for metric in self.metrics)
        self.metrics.append(
            {
                "step": step,
                name: share,
                "train loss": float(jnp.mean(jnp.stack(self.losses[-options.eval_steps :]))),
                "train samples": step * options.batch_size,
                "eval time": seconds,
                "elapsed time": self.train_seconds + before + seconds,
            }
        )
        print(json.dumps(self.metrics[-1]), flush=True)

    def result(self, created: str, seconds: float) -> dict[str, Any]:
        """The result in PEFT's fields."""
        options, trained = self.options, gl.count_parameters(self.adapter)
        memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
        sizes = [leaf.size for leaf in jax.tree.leaves(self.base.params)]
        return {
            "run_info": {
                "created_at": created,
                "total_time": seconds,
                "experiment_name": options.name,
                "train_config": {
                    "model_id": options.base,
                    "dtype": options.dtype,
                    "max_seq_length": LONGEST,
                    "batch_size": options.batch_size,
                    "held_out_rows": options.held_out,
                    "batch_size_eval": options.eval_batch_size,
                    "max_steps": options.steps,
                    "eval_steps": options.eval_steps,
                    "query_template": TEMPLATE,
                    "seed": options.seed,
                    "grad_norm_clip": 1.0,
                    "optimizer_type": "AdamW",
                    "optimizer_kwargs": {
                        "lr": self.rate,
                        "weight_decay": options.weight_decay,
                        "generator_ratio": options.generator_ratio,
                    },
                    "lr_scheduler": "cosine",
                    "generation_kwargs": {"max_new_tokens": options.max_new_tokens},
                },
                "peft_config": config_to_json(self.cfg),
                "error_msg": "",
            },
            "train_info": {
                "accelerator_memory_max": memory,
                "train_time": self.train_seconds,
                "file_size": 4 * trained,
                "num_trainable_params": trained,
                "num_total_params": sum(sizes) + trained,
                "status": "success",
                "metrics": self.metrics,
            },
            "meta_info": {"system_info": platform.uname()._asdict(), **provenance()},
        }


def print_beside_published(name: str, share: float, parameters: int) -> None:
    """A table of the published rows and ours, the best first."""
    table = Table("method", "test accuracy", "parameters")
    rows = {**PUBLISHED, f"{name} (ours)": (share, parameters)}
    for method, (found, count) in sorted(rows.items(), key=lambda row: -row[1][0]):
        table.add_row(method, f"{100 * found:.1f} %", "" if count is None else f"{count:,}")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="hub id or directory")
    parser.add_argument("--adapter", default='{"method": "genlora"}', help="as JSON")
    parser.add_argument("--name", default="genlora/default")
    parser.add_argument("--metamath", default="meta-math/MetaMathQA")
    parser.add_argument("--gsm8k", default="openai/gsm8k")
    parser.add_argument("--rate", type=float, nargs="+", default=[1e-3], dest="rates")
    parser.add_argument(
        "--held-out", type=int, default=0, help="last rows, whose loss chooses the rate"
    )
    parser.add_argument("--generator-ratio", type=float, default=0.3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--eval-steps", type=int, default=250)
    parser.add_argument("--eval-batch-size", type=int, default=50)
    parser.add_argument("--test-rows", type=int, help="the first of GSM8K's test part; all")
    parser.add_argument("--max-new-tokens", type=int, default=300)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--scan", action="store_true", help="layers in one loop: compiles faster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    if len(options.rates) > 1 and not options.held_out:
        parser.error("several rates take --held-out, the number of rows that choose one of them")
    created = datetime.datetime.now(tz=datetime.UTC).replace(microsecond=0).isoformat()
    began = time.perf_counter()
    model = ModelConfig(
        path=options.base,
        dtype=options.dtype,
        param_dtype=options.dtype,
        scan=options.scan or None,
    )
    base = load_base(model, find_base(model), one_device())
    data = Data.of(options)
    runs = [Run(options, base, data, rate) for rate in options.rates]
    for run in runs:
        run.train()
    losses = [run.held_out_loss() for run in runs] if options.held_out else [0.0]
    best = runs[int(np.nanargmin(losses))]
    share = best.test()
    result = best.result(created, time.perf_counter() - began)
    if options.held_out:
        result["held_out_losses"] = dict(zip(options.rates, losses, strict=True))
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print_beside_published(options.name, share, gl.count_parameters(best.adapter))


if __name__ == "__main__":
    main()
