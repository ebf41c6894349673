"""Our exports in llama.cpp and CTranslate2: converted by their own scripts, and the same logits.

Not collected with the rest: it needs the scripts and both engines, see the Makefile's `foreign`.
The bases are small but of Llama 3's form: grouped heads, a head of its own, for llama.cpp scaled
positions as well. (CTranslate2 scales positions for a context of 8192 alone.)
"""

import json
import subprocess
import sys

import ctranslate2
import jax
import numpy as np
import pytest
import torch
import xllamacpp
from tiny_base import REPOSITORY, write_base
from tiny_models import perturb
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import LlamaForCausalLM

import genlora_jax as gl

SCRIPTS = REPOSITORY / ".engines"
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "head_dim": 8,
    "bos_token_id": 1,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
IDS = [1, *np.random.default_rng(0).integers(259, 512, 39).tolist()]
CLOSE = 1e-5  # float32 on both sides, of the largest logit


def write_tokenizer(directory):
    """A tokenizer as SentencePiece makes them; llama.cpp knows others by their name alone."""
    special = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=tokens, show_progress=False)
    lines = (REPOSITORY / "train" / "quickstart" / "data" / "test.jsonl").read_text().splitlines()
    tokenizer.train_from_iterator([json.loads(line)["prompt"] for line in lines], trainer)
    text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*text, decoders.Strip(" ", 1, 0)])
    begin = {"single": "<s> $A", "special_tokens": [("<s>", 1)]}
    tokenizer.post_processor = processors.TemplateProcessing(**begin)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=True))
    settings = {"tokenizer_class": "LlamaTokenizerFast", **names}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("engines")


def export(directory, **changes):
    """Exports an adapter and the merged model of a random base; returns our logits by model."""
    base = write_base(directory / "base", **SHAPE, **changes)
    write_tokenizer(base)
    model, params = gl.load_llama(base, dtype="float32", param_dtype="float32")
    cfg = gl.GenLoRAConfig(rank=4, alpha=8.0, group_size=8)
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))
    factors = gl.generate_factors(cfg, adapter)
    gl.export_peft(directory / "peft", cfg, factors, base=base)
    gl.export_hf(directory / "merged", gl.merge(params, factors), base=base)
    ids = np.array([IDS])
    of_base, adapted = (gl.apply(model, params, tree, ids)[0] for tree in ({}, factors))
    assert not np.allclose(of_base, adapted, atol=0.1)
    return {"base": np.asarray(of_base), "adapted": np.asarray(adapted)}


def convert(*commands):
    """Runs converters side by side."""
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for process in [subprocess.Popen([sys.executable, *c], **output) for c in commands]:
        said, _ = process.communicate()
        assert process.returncode == 0, said


@pytest.fixture(scope="module")
def gguf(here):
    """The directory of the models and the adapter in llama.cpp's format, and our logits."""
    logits = export(here / "llama3", rope_parameters=LLAMA3)
    here = here / "llama3"
    hf, lora = (SCRIPTS / f"convert_{kind}_to_gguf.py" for kind in ("hf", "lora"))
    convert(
        [hf, here / "merged", "--outfile", here / "merged.gguf", "--outtype", "f32"],
        [hf, here / "base", "--outfile", here / "base.gguf", "--outtype", "f32"],
        [lora, here / "peft", "--base", here / "base", "--outfile", here / "peft.gguf"],
    )
    return here, logits


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "adapter", "expected"),
    [("base", None, "base"), ("merged", None, "adapted"), ("base", "peft", "adapted")],
)
def test_llama_cpp_predicts_the_same(gguf, model, adapter, expected):
    here, ours = gguf
    settings = xllamacpp.CommonParams()
    settings.model.path = str(here / f"{model}.gguf")
    settings.n_ctx, settings.n_parallel, settings.warmup = 64, 1, False
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter:
        lora = xllamacpp.CommonAdapterLoraInfo(str(here / f"{adapter}.gguf"), 1.0)
        settings.lora_adapters = [lora]
    asked = {"prompt": IDS, "n_predict": 1, "n_probs": 512, "temperature": 0.0}
    answer = xllamacpp.Server(settings).handle_completions(asked)
    (first,) = answer["choices"][0]["logprobs"]["content"]
    found = {token["id"]: token["logprob"] for token in first["top_logprobs"]}
    wanted = log_softmax(ours[expected][-1])
    assert first["id"] == wanted.argmax()
    np.testing.assert_allclose(
        [found[token] for token in range(512)], wanted, atol=CLOSE * np.abs(wanted).max()
    )


def test_ctranslate2_predicts_the_same(here):
    ours = export(here / "plain")
    converter = "from ctranslate2.converters.transformers import main; main()"
    convert(["-c", converter, "--model", here / "plain" / "merged", "--output_dir", here / "ct2"])
    vocabulary = json.loads((here / "ct2" / "vocabulary.json").read_text())
    generator = ctranslate2.Generator(str(here / "ct2"), compute_type="float32")
    found = np.array(generator.forward_batch([[vocabulary[token] for token in IDS]]))[0]
    # Each beside float64, as the errors of both together may be more than either's.
    twin = LlamaForCausalLM.from_pretrained(here / "plain" / "merged", dtype=torch.float64)
    with torch.no_grad():
        exact = twin(torch.tensor([list(IDS)])).logits[0].numpy()
    for logits in (found, ours["adapted"]):
        np.testing.assert_allclose(logits, exact, rtol=0, atol=CLOSE * np.abs(exact).max())
