"""LLaMA with random weights under torchtune, as its recipe has it: one of the peers of `peft_step`.

torchtune 0.6.1 needs torchao 0.13 or earlier, omegaconf and sentencepiece. Its adapters are in
bfloat16, as in its recipe `8B_lora_single_device`.
"""

import argparse
from types import SimpleNamespace
from typing import Any

from train.benchmarks.random_base import SIZES


def build(options: argparse.Namespace, device: str) -> Any:
    """LLaMA in bfloat16 with LoRA on its linear layers, called as a model of transformers is.

    `options.compile` compiles each layer and the loss, as torchtune does.
    """
    import torch
    from torchtune.models.llama3 import lora_llama3
    from torchtune.modules import TransformerSelfAttentionLayer
    from torchtune.modules.loss import CEWithChunkedOutputLoss
    from torchtune.modules.peft import get_adapter_params, set_trainable_params
    from torchtune.training import compile_loss, compile_model, set_activation_checkpointing

    shape = SIZES[options.size].shape
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = lora_llama3(
            ["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=shape["vocab_size"],
            num_layers=shape["num_hidden_layers"],
            num_heads=shape["num_attention_heads"],
            num_kv_heads=shape["num_key_value_heads"],
            embed_dim=shape["hidden_size"],
            intermediate_dim=shape["intermediate_size"],
            max_seq_len=options.length,
            lora_rank=options.rank,
            lora_alpha=2 * options.rank,
        )
    torch.set_default_dtype(torch.float32)
    set_trainable_params(model, get_adapter_params(model))
    loss_of = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_of.num_output_chunks)
    if options.checkpointing:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if options.compile:
        compile_model(model, verbose=False)
        loss_of = compile_loss(loss_of, verbose=False)

    class WithLoss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, labels: Any) -> Any:
            ignored = torch.full_like(labels[:, :1], loss_of.ignore_index)
            return SimpleNamespace(
                loss=loss_of(self.model(input_ids), torch.hstack((labels[:, 1:], ignored)))
            )

    return WithLoss().train()
