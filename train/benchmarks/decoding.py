"""Greedy answers to prompts of many lengths, here and with `transformers.generate`, in one run.

    python -m train.benchmarks.decoding --model SmolLM2-135M --prompts 3800 --rows 256 --new 200

Prompts are random tokens of 8 to 120; an answer ends at any of a tenth of the vocabulary's tokens,
so that rows end at many lengths. Both sort prompts by length and pad on the left. Tokens are those
of the answers, up to and without the end; the first batch of each width, which compiles, counts
towards `cold_s` alone.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

import genlora_jax as gl
from genlora_jax.generation.answers import padded
from genlora_jax.generation.decoding import decode
from genlora_jax.hf.base_model import ModelConfig
from train.benchmarks.measuring import RESULTS, write_result

SHORTEST, LONGEST = 8, 120


def make_batches(options: argparse.Namespace, vocabulary: int) -> list[list[list[int]]]:
    """Batches of prompts, the longest first."""
    rng = np.random.default_rng(0)
    lengths = sorted(rng.integers(SHORTEST, LONGEST + 1, options.prompts).tolist())[::-1]
    prompts = [rng.integers(5, vocabulary, length).tolist() for length in lengths]
    return [prompts[i : i + options.rows] for i in range(0, len(prompts), options.rows)]


def timed(generate: Any, batches: list[list[list[int]]]) -> dict[str, Any]:
    """Seconds and tokens of all batches, once with what compiles and once without."""
    began = time.perf_counter()
    for batch in {(padded(len(b[0])), len(b)): b for b in batches}.values():
        generate(batch)
    cold = time.perf_counter() - began
    began = time.perf_counter()
    answers = [generate(batch) for batch in batches]
    seconds = time.perf_counter() - began
    tokens = sum(len(ids) for batch in answers for ids in batch)
    return {"cold_s": cold, "seconds": seconds, "tokens_per_second": tokens / seconds} | {
        "answers": answers
    }


def ours(options: argparse.Namespace, stop: list[int], platform: str) -> Any:
    """Greedy decoding of a batch with this library."""
    cfg = ModelConfig(path=str(options.model))
    dtype, param_dtype = cfg.dtypes(platform)
    model, params = gl.load_llama(
        options.model, dtype=dtype, param_dtype=param_dtype, scan=cfg.scans(platform)
    )

    def generate(batch: list[list[int]]) -> list[list[int]]:
        width = padded(len(batch[0]))
        return decode(model, params, batch, max_new_tokens=options.new, stop=stop, width=width)

    return generate


def theirs(options: argparse.Namespace, stop: list[int], platform: str) -> Any:
    """Greedy decoding of a batch with transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    device, dtype = ("cpu", torch.float32) if platform == "cpu" else ("cuda", torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).eval()

    def generate(batch: list[list[int]]) -> list[list[int]]:
        width = len(batch[0])
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


def main() -> None:
    """Times both, compares their tokens and writes the result."""
    import jax

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    platform = jax.devices()[0].platform
    vocabulary = gl.load_llama(options.model)[0].config.vocab_size
    batches = make_batches(options, vocabulary)
    stop = np.random.default_rng(1).permutation(vocabulary)[: vocabulary // 10].tolist()
    arms = {"transformers": timed(theirs(options, stop, platform), batches)}
    arms["genlora_jax"] = timed(ours(options, stop, platform), batches)
    first, second = (
        [ids for batch in arm.pop("answers") for ids in batch] for arm in arms.values()
    )
    same = sum(a == b for a, b in zip(first, second, strict=True))
    rates = [arm["tokens_per_second"] for arm in arms.values()]
    print(f"{rates[1]:.1f} tokens/s, {rates[1] / rates[0]:.2f} x transformers' {rates[0]:.1f}")
    print(f"{same} of {len(first)} answers are the same")
    shape = {name: getattr(options, name) for name in ("prompts", "rows", "new")}
    result = {"model": options.model.name, **shape, "same_answers": same, "arms": arms}
    write_result(RESULTS / f"decoding_{platform}.json", result)


if __name__ == "__main__":
    main()
