"""Greedy answers to prompts of many lengths, here and with `transformers.generate`, in one run.

    python -m train.benchmarks.decoding --model SmolLM2-135M --prompts 3800 --rows 256 --new 200

Prompts are random tokens of 8 to 120; an answer ends at any of a hundredth of the vocabulary's
tokens (`--ends`), so that rows end at many lengths. Transformers takes batches of prompts sorted by
length, padded on the left, in a random order until its time is over. Ours takes all prompts in one
call. Tokens are those of the answers, without the end; the first call, of the first batch, counts
towards `cold_s` alone. Without `--model`, weights are random, in SmolLM2-135M's shape with a head
of its own.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import genlora_jax as gl
from genlora_jax.generation.decoding import decode
from genlora_jax.hf.base_model import ModelConfig
from train.benchmarks.measuring import RESULTS, write_result

SHORTEST, LONGEST = 8, 120
Prompts = Sequence[list[int]]
Generate = Callable[[Prompts], list[list[int]]]


def random_model(directory: str) -> Path:
    """A checkpoint of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return Path(directory)


def make_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts, the longest first."""
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(SHORTEST, LONGEST + 1, count).tolist())[::-1]
    return [rng.integers(5, vocabulary, length).tolist() for length in lengths]


def timed(generate: Generate, first: Prompts, batches: Sequence[Prompts], limit: float) -> Any:
    """Seconds and tokens of batches until the time is over, after a first call that may compile."""
    began = time.perf_counter()
    generate(first)
    cold = time.perf_counter() - began
    began, answers = time.perf_counter(), []
    for batch in batches:
        answers.append(generate(batch))
        if (seconds := time.perf_counter() - began) > limit:
            break
    tokens = sum(len(ids) for batch in answers for ids in batch)
    rates = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    return {"cold_s": cold, "batches": len(answers), **rates}, answers


def ours(options: argparse.Namespace, stop: list[int], platform: str) -> Generate:
    """Greedy decoding with this library, as `genlora evaluate` loads the model."""
    cfg = ModelConfig(path=str(options.model))
    dtype, param_dtype = cfg.dtypes(platform)
    model, params = gl.load_llama(
        options.model, dtype=dtype, param_dtype=param_dtype, scan=cfg.scans(platform)
    )

    def generate(prompts: Prompts) -> list[list[int]]:
        return decode(
            model, params, prompts, max_new_tokens=options.new, stop=stop, rows=options.rows
        )

    return generate


def theirs(options: argparse.Namespace, stop: list[int], platform: str) -> Generate:
    """Greedy decoding of a batch with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    device, dtype = ("cpu", torch.float32) if platform == "cpu" else ("cuda", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()

    def generate(batch: Prompts) -> list[list[int]]:
        width = max(map(len, batch))
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
        real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch])
        settings = {"max_new_tokens": options.new, "do_sample": False, "pad_token_id": stop[0]}
        out = model.generate(
            ids.to(device), attention_mask=real.to(device), eos_token_id=stop, **settings
        )
        ends, found = set(stop), []
        for row in out[:, width:].tolist():
            found.append(row[: next((i for i, token in enumerate(row) if token in ends), None)])
        return found

    return generate


def measure(options: argparse.Namespace) -> None:
    """Runs the arms; the result is written after each."""
    import jax

    platform = jax.devices()[0].platform
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    prompts = make_prompts(options.prompts, vocabulary)
    batches = [prompts[i : i + options.rows] for i in range(0, len(prompts), options.rows)]
    order = np.random.default_rng(2).permutation(len(batches)).tolist()
    stop = np.random.default_rng(1).permutation(vocabulary)[: vocabulary // options.ends].tolist()
    shape = {name: getattr(options, name) for name in ("prompts", "rows", "new", "ends")}
    result: dict[str, Any] = {"model": options.model.name, **shape, "arms": {}}

    def arm(name: str, generate: Generate, parts: Sequence[Prompts], limit: float) -> Any:
        found, answers = timed(generate, parts[0][: options.rows], parts, limit)
        result["arms"][name] = found
        print(name, json.dumps(found), flush=True)
        write_result(options.output or RESULTS / f"decoding_{platform}.json", result)
        return answers

    (found,) = arm("genlora_jax", ours(options, stop, platform), [prompts], options.limit)
    mixed = [batches[i] for i in order]
    other = arm("transformers", theirs(options, stop, platform), mixed, options.limit)
    same = [
        ids == mine
        for batch, i in zip(other, order, strict=False)  # those that there was time for
        for ids, mine in zip(batch, found[i * options.rows :], strict=False)
    ]
    rates = [arm["tokens_per_second"] for arm in result["arms"].values()]
    result |= {"over_transformers": rates[0] / rates[1]}
    result |= {"same_answers": sum(same), "compared": len(same)}
    write_result(options.output or RESULTS / f"decoding_{platform}.json", result)
    print(json.dumps(result, indent=1))


def main() -> None:
    """Times both, compares their tokens and writes the result."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--ends", type=int, default=100, help="one of so many tokens ends one")
    parser.add_argument("--limit", type=float, default=60, help="seconds of an arm, about")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        options.model = options.model or random_model(directory)
        measure(options)


if __name__ == "__main__":
    main()
