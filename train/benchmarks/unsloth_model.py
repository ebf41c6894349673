"""LLaMA under Unsloth with its defaults, for `peft_step --unsloth`; it needs a GPU.

Unsloth loads a model from files, so a checkpoint is written for it. Nothing is asked of the
network. It compiles the layers and the loss, so the first steps take long.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.benchmarks.random_base import SIZES


def build(options: argparse.Namespace, targets: Sequence[str]) -> Any:
    """LLaMA with random weights in bfloat16 and LoRA on its linear layers.

    Checkpointing is Unsloth's own, which keeps the layers' inputs in the host's memory.
    """
    for name in ("HF_HUB_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        os.environ[name] = "1"
    # Where it writes the trainers that it patches; by default in the working directory.
    os.environ["UNSLOTH_COMPILE_LOCATION"] = os.path.join(tempfile.gettempdir(), "unsloth_compiled")
    import torch
    from unsloth import FastLanguageModel  # before transformers and peft, which it changes

    checkpointing = "unsloth" if options.checkpointing else False
    with tempfile.TemporaryDirectory() as folder:
        _write_checkpoint(options, Path(folder))
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=options.length,
            dtype=torch.bfloat16,
            load_in_4bit=False,
            use_gradient_checkpointing=checkpointing,
        )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
        else:
            torch.nn.init.ones_(parameter)
    model = FastLanguageModel.get_peft_model(
        model,
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0,
        bias="none",
        target_modules=list(targets),
        use_gradient_checkpointing=checkpointing,
    )
    return FastLanguageModel.for_training(model)


def _write_checkpoint(options: argparse.Namespace, folder: Path) -> None:
    """Configuration, tokenizer and weights of zeros, in a sparse file that takes no space."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(**SIZES[options.size].shape, max_position_embeddings=options.length)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "<pad>": 3, "<unk>": 0}, "<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    with torch.device("meta"):
        weights = LlamaForCausalLM(config).state_dict()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, weight in weights.items():
        begin, end = end, end + 2 * math.prod(weight.shape)
        where = {"shape": list(weight.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": "BF16"} | where
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
