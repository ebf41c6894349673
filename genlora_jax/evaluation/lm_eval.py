r"""The model `genlora_jax` of EleutherAI's lm-eval; needs the extra `lm-eval`.

    python -m genlora_jax.evaluation.lm_eval --model genlora_jax \
        --model_args path=BASE,adapter=ADAPTER --tasks arc_easy

is the `lm_eval` command with this model registered; all other arguments are lm-eval's. A batch has
16 rows unless `--batch_size` says otherwise, where lm-eval's own default is one.
"""

import sys
from typing import Any

import lm_eval.models  # noqa: F401  # lm-eval registers its models only while there is no other
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from genlora_jax.evaluation import harness
from genlora_jax.generation.subject import Subject, load_subject

ROWS = 16  # of a batch


@register_model("genlora_jax")
class GenLoRALM(LM):
    """A base, a merged model or a base with an adapter, as lm-eval asks.

    Args:
        path: Local directory or hub id.
        adapter: An adapter's directory, one of `save_adapter` or of PEFT.
        batch_size: Rows of a batch; "auto" for the default.
        max_batch_size: Not used.
        device: Not used: JAX's default device is taken.
        dtype: Dtype of parameters and computation; None: float32 on CPUs, else bfloat16.
        seed: Seed of the sampling.
        **options: Passed on to `load_subject`.
    """

    def __init__(
        self,
        path: str,
        adapter: str | None = None,
        *,
        batch_size: int | str = ROWS,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        seed: int = 0,
        **options: Any,
    ):
        super().__init__()
        rows = str(ROWS if batch_size == "auto" else batch_size)
        if not rows.isdecimal() or not int(rows):
            raise ValueError(f"batch_size must be auto or at least 1, got {batch_size!r}")
        self._name = f"{path}+{adapter}"
        self._seed = seed
        self._subject: Subject = load_subject(
            path, adapter, batch_size=int(rows), dtype=dtype, param_dtype=dtype, **options
        )

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        asked = [request.args for request in requests]
        return [(s.logprob, s.greedy) for s in harness.loglikelihood(self._subject, asked)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [request.args[0] for request in requests]
        return harness.loglikelihood_rolling(self._subject, texts)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked = [request.args for request in requests]
        return harness.generate_until(self._subject, asked, seed=self._seed)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self._subject.render(chat_history, cue=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._subject.tokenizer.chat_template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")


def with_batch_size(arguments: list[str]) -> list[str]:
    """The arguments of a run, with a batch size unless they or a file of settings may have one."""
    running = any(argument.startswith("--model") for argument in arguments)
    told = any(argument.startswith(("-b", "--b", "-C", "--config")) for argument in arguments)
    return [*arguments, "--batch_size", "auto"] if running and not told else arguments


if __name__ == "__main__":
    sys.argv = with_batch_size(sys.argv)
    cli_evaluate()
