"""Tokenizers, end tokens and what an export carries; the expected values are transformers'."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_base import TOKENIZER, write_base
from transformers import AutoTokenizer, GenerationConfig

import genlora_jax as gl
from genlora_jax import cli
from genlora_jax.generation.subject import load_subject
from genlora_jax.hf.base_model import ModelConfig, find_base
from genlora_jax.hf.tokenizer import check_rows, end_tokens, load_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER = CHATML.replace("\n", "\n\n")
PEFT_FILES = {"adapter_config.json", "adapter_model.safetensors", ".genlora.json"}
START, END = 510, 511  # of ChatML, in the place of the last two tokens


def write_tokenizer(directory, *, template=None, rename=True, add=(), **changes):
    """The quickstart's tokenizer with ChatML's marks in the last rows, or others added to it."""
    directory.mkdir(parents=True, exist_ok=True)
    data = json.loads((TOKENIZER / "tokenizer.json").read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [(START, "<|im_start|>"), (END, "<|im_end|>")] if rename else []
    for index, content in [*tokens, *add]:
        vocab = data["model"]["vocab"]
        vocab = {text: i for text, i in vocab.items() if i != index}
        data["model"]["merges"] = [m for m in data["model"]["merges"] if "".join(m) in vocab]
        data["model"]["vocab"] = vocab | {content: index}
        data["added_tokens"].append({"id": index, "content": content, "special": True} | flags)
    (directory / "tokenizer.json").write_text(json.dumps(data))
    config = json.loads((TOKENIZER / "tokenizer_config.json").read_text()) | changes
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return directory


def set_json(file, **changes):
    fields = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(fields | changes))


@pytest.fixture
def base(tmp_path):
    return write_base(tmp_path / "base")


@pytest.fixture
def merge(tmp_path, run_main):
    """A function that merges an adapter into a base by the command; returns the directory."""

    def run(base, adapter):
        given = ["--base", base, "--adapter", adapter, "--out", tmp_path / "out"]
        status, _, error = run_main(lambda: cli.main(["merge", *map(str, given)]))
        return (tmp_path / "out") if status == 0 else error

    return run


def write_adapter(directory, base):
    """A LoRA adapter of peft's, as it saves one."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    settings |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format(i, "A"): np.ones((1, 24), np.float32) for i in range(2)}
    tensors |= {name.format(i, "B"): np.ones((24, 1), np.float32) for i in range(2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


# End tokens.


def aligned(base):
    """The end tokens to which the trainer of transformers sets a model."""
    from transformers import AutoModelForCausalLM
    from transformers.trainer_utils import align_special_tokens

    model = AutoModelForCausalLM.from_pretrained(base)
    align_special_tokens(model, AutoTokenizer.from_pretrained(base))
    found = model.generation_config.eos_token_id
    return found if isinstance(found, list) else [found]


@pytest.mark.parametrize("generation", [None, 1, [1, 7], [1, 2]])
@pytest.mark.parametrize("stated", [1, 2])
def test_what_is_trained_as_the_end_ends_decoding_as_the_trainer_of_transformers_has_it(
    base, generation, stated, recwarn
):
    set_json(base / "config.json", eos_token_id=stated)
    if generation is not None:
        set_json(base / "generation_config.json", eos_token_id=generation)
    expected = aligned(base)
    recwarn.clear()
    ids = end_tokens(base, load_tokenizer(base))
    assert set(ids) == set(expected)
    assert len(ids) == len(set(ids))
    before = generation if isinstance(generation, list) else [generation or stated]
    if 2 in before:
        assert not recwarn.list
        assert ids == before
    else:
        assert ids == expected
        (warning,) = recwarn.list
        said = r"end a text with <s> \(1\).*, tokenizer and chat template with </s> \(2\): decoding"
        assert warning.category is UserWarning
        assert re.search(said, str(warning.message))


def test_a_model_without_any_other_stops_at_the_tokenizers_end(base):
    set_json(base / "config.json", eos_token_id=None)
    assert end_tokens(base, load_tokenizer(base)) == [2]


def test_the_mark_that_ends_a_turn_ends_decoding_and_is_exported(base, tmp_path):
    write_tokenizer(base, template=CHATML)
    set_json(base / "generation_config.json", eos_token_id=2, temperature=0.6, do_sample=True)
    said = r"end a text with </s> \(2\), tokenizer and chat template with <\|im_end\|> \(511\)"
    with pytest.warns(UserWarning, match=said):
        subject = load_subject(str(base), dtype="float32", param_dtype="float32")
    assert subject.stop == (END, 2)
    with pytest.warns(UserWarning, match=said):
        gl.export_hf(tmp_path / "out", subject.params, base=base)
    exported = GenerationConfig.from_pretrained(tmp_path / "out")
    assert exported.eos_token_id == [END, 2]
    assert (exported.temperature, exported.do_sample) == (0.6, True)
    # The export agrees with itself: nothing is left to be said.
    assert end_tokens(tmp_path / "out", load_tokenizer(tmp_path / "out")) == [END, 2]


def test_an_export_of_a_base_without_generation_config_gets_one_if_ends_differ(base, tmp_path):
    set_json(base / "config.json", eos_token_id=1, bos_token_id=1)
    _, params = gl.load_llama(base)
    with pytest.warns(UserWarning, match="decoding stops at each of them"):
        gl.export_hf(tmp_path / "out", params, base=base)
    exported = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (exported.eos_token_id, exported.bos_token_id) == ([2, 1], 1)
    set_json(base / "config.json", eos_token_id=2)
    gl.export_hf(tmp_path / "same", params, base=base)
    assert not (tmp_path / "same" / "generation_config.json").exists()


@pytest.mark.parametrize("ids", ["2", [2, None], -1, 2.0, {"a": 1}])
def test_end_tokens_that_are_no_ids_are_refused_by_name(base, ids):
    set_json(base / "generation_config.json", eos_token_id=ids)
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a whole"):
        end_tokens(base, load_tokenizer(base))


def test_an_export_to_peft_has_tokenizer_and_end_tokens(base, tmp_path):
    write_tokenizer(base, template=CHATML)
    cfg, (_, params) = gl.LoRAConfig(rank=2), gl.load_llama(base)
    factors = gl.generate_factors(cfg, gl.init_adapter(cfg, jax.random.key(0), params))
    with pytest.warns(UserWarning, match="decoding stops at each of them"):
        gl.export_peft(tmp_path / "out", cfg, factors, base=base)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [END, 2]
    found, expected = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "out", base))
    assert (found.get_vocab(), found.chat_template) == (expected.get_vocab(), CHATML)
    gl.export_peft(tmp_path / "hub", cfg, factors, base="someone/model")
    assert {file.name for file in (tmp_path / "hub").iterdir()} == PEFT_FILES


# Rows of the embedding.


def test_a_token_beyond_the_embedding_is_refused_before_weights_are_read(tmp_path):
    base = write_base(tmp_path / "base")
    write_tokenizer(base, rename=False, add=[(512, "[PAD]")])
    (base / "model.safetensors").unlink()
    said = r"token '\[PAD\]' of the tokenizer has id 512, but the embedding has 512 rows"
    with pytest.raises(ValueError, match=said):
        find_base(ModelConfig(path=str(base)))


def test_rows_beyond_the_tokens_do_no_harm(base):
    check_rows(load_tokenizer(base), 600, base)


# What an export carries.


def test_an_export_has_all_that_belongs_to_a_tokenizer_and_its_terms(base, tmp_path):
    write_tokenizer(base, template=CHATML)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = {"default": CHATML, "tool_use": OTHER, "rag": OTHER + "\n"}
    tokenizer.save_pretrained(base)
    assert (base / "additional_chat_templates" / "rag.jinja").is_file()
    carried = ["LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "vocab.json", "merges.txt"]
    carried += ["preprocessor_config.json", "processor_config.json", "special_tokens_map.json"]
    carried += ["tokenizer.model", "added_tokens.json"]
    left = ["README.md", "training_args.bin", "pytorch_model.bin", "trainer_state.json", ".hidden"]
    for name in [*carried, *left]:
        (base / name).write_text("{}")
    set_json(base / "generation_config.json", eos_token_id=[2, END])
    _, params = gl.load_llama(base)
    gl.export_hf(tmp_path / "out", params, base=base)
    found = {str(f.relative_to(tmp_path / "out")) for f in (tmp_path / "out").rglob("*.*")}
    assert not found & set(left)
    for name in [*carried, "generation_config.json", "tokenizer.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_an_adapters_own_tokenizer_and_template_are_used_and_carried_over(base, tmp_path, merge):
    write_tokenizer(base, rename=False, template=OTHER)
    set_json(base / "generation_config.json", eos_token_id=[2, END])
    adapter = write_adapter(tmp_path / "adapter", base)
    write_tokenizer(adapter, template=CHATML, eos_token="<|im_end|>")
    own = AutoTokenizer.from_pretrained(adapter)
    subject = load_subject(str(base), str(adapter), dtype="float32", param_dtype="float32")
    assert subject.tokenizer.get_vocab() == own.get_vocab()
    messages = [{"role": "user", "content": "Hi"}]
    expected = own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert subject.render(messages) == expected
    assert subject.tokenizer.eos_token_id == END
    out = merge(base, adapter)
    carried = AutoTokenizer.from_pretrained(out)
    assert carried.get_vocab() == own.get_vocab()
    assert (carried.chat_template, carried.eos_token) == (CHATML, "<|im_end|>")


def test_an_adapters_template_alone_takes_the_place_of_the_bases(base, tmp_path, merge):
    write_tokenizer(base, template=OTHER)
    set_json(base / "generation_config.json", eos_token_id=[2, END])
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text(CHATML)
    assert find_base(ModelConfig(path=str(base)), str(adapter))[1].chat_template == CHATML
    assert find_base(ModelConfig(path=str(base)))[1].chat_template == OTHER
    out = AutoTokenizer.from_pretrained(merge(base, adapter))
    assert out.chat_template == CHATML


def test_an_adapter_whose_tokenizer_contradicts_the_bases_is_refused_before_loading(
    base, tmp_path, merge
):
    adapter = write_adapter(tmp_path / "adapter", base)
    data = json.loads((base / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    by_id = {index: token for token, index in vocab.items()}
    vocab[by_id[300]], vocab[by_id[301]] = 301, 300
    (adapter / "tokenizer.json").write_text(json.dumps(data))
    shutil.copyfile(base / "tokenizer_config.json", adapter / "tokenizer_config.json")
    (base / "model.safetensors").write_bytes(b"")
    said = f"its tokenizer gives {by_id[300]!r} the id 301, that of {base} 300"
    assert said in merge(base, adapter)
    with pytest.raises(ValueError, match="the adapter was made for another base"):
        load_subject(str(base), str(adapter))


def test_an_adapters_tokenizer_with_more_tokens_than_rows_is_refused(base, tmp_path, merge):
    adapter = write_adapter(tmp_path / "adapter", base)
    write_tokenizer(adapter, rename=False, add=[(512, "<|new|>")])
    assert "token '<|new|>' of the tokenizer has id 512" in merge(base, adapter)


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "chat_template.jinja", "adapter_model.safetensors"]
)
def test_a_pointer_of_git_lfs_in_an_adapters_directory_is_called_one(base, tmp_path, merge, name):
    adapter = write_tokenizer(write_adapter(tmp_path / "adapter", base), template=CHATML)
    (adapter / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    assert f"{name} is a Git LFS pointer" in merge(base, adapter)


def test_a_pointer_of_git_lfs_for_an_adapter_of_ours_is_called_one(base, tmp_path):
    cfg, (_, params) = gl.LoRAConfig(rank=2), gl.load_llama(base)
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    file = tmp_path / "adapter" / "adapter.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d\n")
    with pytest.raises(ValueError, match=r"adapter\.safetensors is a Git LFS pointer"):
        gl.load_adapter(tmp_path / "adapter")


def test_a_damaged_tokenizer_is_refused_in_one_line(base):
    (base / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(ValueError, match="base has no usable tokenizer: ") as refused:
        load_tokenizer(base)
    assert len(str(refused.value).splitlines()) == 1


def test_the_code_of_a_tokenizer_is_neither_run_nor_asked_for(base, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    (base / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    own = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    set_json(base / "tokenizer_config.json", **own)
    with pytest.raises(ValueError, match="base has no usable tokenizer"):
        load_tokenizer(base)
    assert not (tmp_path / "ran").exists()


def test_the_merged_kernels_are_those_of_the_adapter(base, tmp_path, merge):
    adapter = write_adapter(tmp_path / "adapter", base)
    name = "model.layers.1.self_attn.q_proj.weight"
    before = load_file(base / "model.safetensors")[name]
    after = load_file(merge(base, adapter) / "model.safetensors")[name]
    np.testing.assert_allclose(after, before + 1, rtol=1e-6)
