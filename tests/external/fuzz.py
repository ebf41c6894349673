"""A fuzz target for each reader, a minute each: `make soak`.

Not collected with the rest. A reader may refuse what it is given, in a short message that names the
file. It may raise nothing else, take no longer than some seconds, and return nothing else than a
reference reads. `Target.known` is tried first; a failure prints its example and how to repeat it.
"""

import atexit
import contextlib
import copy
import functools
import io
import json
import os
import re
import shutil
import signal
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from servers import s3_server
from tiny_base import TOKENIZER, write_base

import genlora_jax as gl
from genlora_jax.bucket_directories import write_object
from genlora_jax.data.cache import CacheSource
from genlora_jax.data.cache_writing import write_cache
from genlora_jax.data.config import DataConfig, MixedSource
from genlora_jax.data.encode import load_examples
from genlora_jax.hf.checkpoint import INDEX, SINGLE, model_config
from genlora_jax.hf.names import tensors
from genlora_jax.methods import config_to_json
from genlora_jax.models.llama import LlamaForCausalLM, parameter_shapes
from genlora_jax.models.rope import rope_frequencies
from genlora_jax.settings import parse
from genlora_jax.storage import listed, storage_path
from genlora_jax.training.recipe import Recipe

SECONDS = float(os.environ.get("FUZZ_SECONDS", "60"))
ROUND = 50  # examples that one seed makes
PATIENCE = 20.0  # seconds that a reader may take
LONGEST = 480  # characters of a message, about three lines
REFUSALS = (ValueError, OSError, FloatingPointError)  # what `settings.report_errors` reports
FLOAT32 = {"dtype": "float32", "param_dtype": "float32"}
Files = dict[str, bytes]
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")


class Hang(BaseException):
    """No Exception, so that no reader takes it for one of its own."""


@contextlib.contextmanager
def patience():
    def give_up(*_):
        raise Hang(f"no answer after {PATIENCE:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What documents are changed to.
ODD = st.one_of(
    st.sampled_from([None, True, False, -1, 0, 1, 2, 3, 0.5, -0.5, 2**63, 10**400, 1e308, 1e-308]),
    st.sampled_from([float("nan"), float("inf"), "", "0", "none", "a", "../a", "\ud800"]),
    st.sampled_from([[], {}, [None], [[1]], {"a": 1}, json.loads("[" * 40 + "]" * 40)]),
    st.text(max_size=4),
)


@st.composite
def changed(draw, document, names=()):
    """A document with up to three of its values replaced, removed or added; `names` are of keys."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        holder = document
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if isinstance(holder, dict) and names:
                keys += [name for name in names if name not in holder]
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inner = holder[key] if key in holder or isinstance(holder, list) else None
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                holder = inner
                continue
            if draw(st.integers(0, 4)) or isinstance(holder, list) or key not in holder:
                holder[key] = copy.deepcopy(draw(ODD))  # it may be changed in turn
            else:
                del holder[key]
            break
    return document


@st.composite
def damaged(draw, data):
    """Bytes, one time in four with some of them changed, lost or put in."""
    data = bytearray(draw(data))
    for _ in range(draw(st.integers(1, 3)) if draw(st.integers(0, 3)) == 0 else 0):
        at = draw(st.integers(0, len(data)))
        end = at + draw(st.sampled_from([0, 1, 1, 4, len(data)]))
        data[at:end] = draw(st.binary(max_size=4))
    return bytes(data)


def documents(document, names=()):
    """Bytes of a changed JSON document."""
    return damaged(changed(document, names).map(lambda value: json.dumps(value).encode()))


# The files that are changed are made once.
@functools.cache
def workshop():
    here = Path(tempfile.mkdtemp(prefix="fuzz-"))
    base = write_base(here / "base", architectures=["LlamaForCausalLM"], pad_token_id=0)
    model, params = gl.load_llama(base, **FLOAT32)
    cfg = gl.GenLoRAConfig(rank=2, alpha=4.0, group_size=8)
    gl.save_adapter(here / "ours", cfg, gl.init_adapter(cfg, jax.random.key(0), params))
    twin = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 3},
        alpha_pattern={"q_proj": 5},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    get_peft_model(twin, settings).save_pretrained(here / "peft")
    twin = transformers.AutoModelForCausalLM.from_pretrained(base)
    twin.save_pretrained(here / "sharded", max_shard_size="20KB")
    _write_quantised(here)
    (here / "rows.jsonl").write_text('{"prompt": "1 and", "completion": " 2"}\n' * 40)
    cfg = DataConfig(train=str(here / "rows.jsonl"), cache=str(here / "caches"))
    with contextlib.redirect_stdout(io.StringIO()):
        os.rename(write_cache(cfg.train, tokenizer(), cfg), here / "cache")
    return here, model, params


def _write_quantised(here):
    """A base in NF4, as bitsandbytes and `transformers` write it, and one in FP8 with scales."""
    sizes = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 128}
    plain = write_base(here / "plain", architectures=["LlamaForCausalLM"], **sizes)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, device_map="cpu", dtype=torch.bfloat16
    ).save_pretrained(here / "nf4")
    tensors = {}
    for name, value in safetensors.torch.load_file(plain / SINGLE).items():
        tensors[name] = value
        if "proj" in name:
            blocks = [-(-size // 32) for size in value.shape]
            tensors[name] = value.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.linspace(0.5, 1.5, blocks[0] * blocks[1]).reshape(
                blocks
            )
    (here / "fp8").mkdir()
    safetensors.torch.save_file(tensors, here / "fp8" / SINGLE)
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (here / "fp8" / "config.json").write_text(json.dumps(config))


@functools.cache
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(TOKENIZER)


def content(path):
    return (workshop()[0] / path).read_bytes()


# Rows and chat templates.
TEXT = st.text(max_size=8) | st.sampled_from(["Mia has 14 plums.", " 3", "\u2028", "</s>", "é\r\n"])
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "User", "", None])
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES, "content": TEXT | ODD | st.just([{"type": "text", "text": "Hi"}])},
    optional={"weight": st.sampled_from([0, 1, 0.5]), "name": TEXT, "tool_calls": ODD},
)
CHAT = st.lists(MESSAGE, max_size=4) | st.just(
    [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Seven"}]
)
FIELDS = ("prompt", "completion", "question", "instruction", "input", "output", "answer", "text")
ROW = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), TEXT | ODD, max_size=4)
ROW = ROW | st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}) | ODD
ROW = ROW | st.fixed_dictionaries({"messages": CHAT}, optional={"tools": ODD, "system": TEXT})
CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = st.sampled_from(
    (
        *("{{ bos_token }}", "{% for m in messages %}", "{% endfor %}", "{% if loop.last %}"),
        *("{{ m.role }}: {{ m.content }}", "{% if m.role == 'assistant' %}", "{% else %}", "\n"),
        *("{% endif %}", "{% generation %}", "{% endgeneration %}", "{{ m.content | trim }}"),
        *("{{ raise_exception('no') }}", "{{ messages[0].content.split('a') }}", "{{ 1 / 0 }}"),
        *(
            "{{ m.tool_calls[0].function.name }}",
            "{% for i in range(99999) %}",
            "{{ m.__class__ }}",
        ),
        *("{{ 'a' * 10 ** 5 }}", "{% if add_generation_prompt %}", "{% set m = messages[-1] %}"),
    )
)
GENERATION = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = st.sampled_from([CHATML, GENERATION]) | st.lists(PIECES, max_size=8).map("".join)


@st.composite
def row_files(draw):
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".ndjson", ".JSONL"]))
    encoding = draw(st.sampled_from(["utf-8"] * 5 + ["utf-8-sig", "utf-16", "latin-1"]))
    rows = draw(st.lists(ROW, min_size=1, max_size=3))
    ascii_only = draw(st.booleans())
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    text = f"[{','.join(lines)}]" if draw(st.booleans()) and suffix == ".json" else "\n".join(lines)
    errors = "replace" if encoding == "latin-1" else "surrogatepass"
    return {f"rows{suffix}": draw(damaged(st.just(text.encode(encoding, errors))))}


def read_examples(directory):
    """What is trained of the rows there, in the template there; and all that was said about it."""
    said, template = io.StringIO(), directory / "chat_template.jinja"
    reader = copy.copy(tokenizer())
    reader.chat_template = template.read_text() if template.exists() else CHATML
    (source,) = directory.glob("rows.*")
    cfg = DataConfig(train=str(source), length=4096)
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        examples, report = load_examples(str(source), reader, cfg)
    return reader, examples, " ".join([said.getvalue(), str(report), *map(str, caught)])


def check_rows(directory, found):
    """Rows as `json` reads them; text of a row is in the tokens, or something is said of it."""
    reader, examples, said = found
    (source,) = directory.glob("rows.*")
    text = source.read_bytes().decode("utf-8-sig")
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    except json.JSONDecodeError:
        rows = [json.loads(line) for line in io.StringIO(text) if line.strip()]
    assert all(isinstance(row, dict) for row in rows)
    if len(examples) != len(rows):
        assert "left out" in said or "longer" in said, said
        return
    for example, row in zip(examples, rows, strict=True):
        decoded = reader.decode(example["input_ids"])
        for name, value in row.items():
            if isinstance(value, str) and value.strip():
                named = {name, repr(name)[1:-1], ascii(name)[1:-1]}
                assert value in decoded or any(n in said for n in named), (name, decoded, said)


def plain(message):
    """A message as every template knows it."""
    role = str(message["role"]).lower()
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    return message | {"role": role, "content": content}


def check_chat(directory, found):
    """Tokens as `transformers` renders the conversation, or a part of it that ends earlier.

    Trained are those that it marks, where the template says which the assistant generates.
    """
    reader, examples, _ = found
    row = json.loads((directory / "rows.jsonl").read_text())
    messages, tools = [plain(message) for message in row["messages"]], row.get("tools") or None
    tools = None if tools != tools else tools  # tables have NaN for what is not there
    renders = []
    for end in range(len(messages), 0, -1):
        with contextlib.suppress(Exception):
            text = reader.apply_chat_template(messages[:end], tools=tools, tokenize=False)
            renders.append(reader(text, add_special_tokens=False)["input_ids"])
    for example in examples:
        ids = example["input_ids"].tolist()
        assert any(ids == whole[: len(ids)] for whole in renders), reader.decode(ids)
    # Turns that are not to be trained, or say nothing, are marked all the same.
    untrained = any("weight" in m or not str(m["content"]).strip() for m in messages)
    if reader.chat_template == GENERATION and not untrained:
        marked = reader.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        for example in examples:
            expected = marked["assistant_masks"][: len(example["loss_mask"])]
            np.testing.assert_array_equal(example["loss_mask"], np.array(expected, bool))


# Bases.
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)


def check_config(directory, config):
    """Shapes and frequencies of the model that `transformers` builds from the same file."""
    theirs = transformers.AutoConfig.from_pretrained(directory)
    if theirs.num_hidden_layers > 8 or theirs.vocab_size > 10**6:
        return
    sizes = {name: value for name, value in vars(config).items() if name in SIZES}
    assert min(sizes.values()) > 0, sizes
    try:
        with torch.device("meta"):
            twin = transformers.AutoModelForCausalLM.from_config(theirs)
    except Exception:
        return  # over a field that only it has, such as pad_token_id
    shapes = parameter_shapes(LlamaForCausalLM(config, scan=False))
    leaves = flatten_dict(shapes)
    ours = {t.name: t.shape_in_file(leaves[t.path].shape) for t in tensors(shapes)}
    tied = {"lm_head.weight"} if theirs.tie_word_embeddings else set()
    state = {name: tuple(value.shape) for name, value in twin.state_dict().items()}
    assert ours == {name: shape for name, shape in state.items() if name not in tied}
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert bool(config.tie_word_embeddings) == bool(theirs.tie_word_embeddings)
    kind = theirs.rope_parameters["rope_type"]
    if kind == "default":
        expected = type(twin.model.rotary_emb).compute_default_rope_parameters(theirs)[0]
    else:
        expected = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](theirs)[0]
    np.testing.assert_allclose(rope_frequencies(config), expected.numpy(), rtol=1e-5)


def check_base(directory, found):
    """Parameters bit for bit as `safetensors` reads the files that `transformers` would take."""
    _, params = found
    if (directory / SINGLE).exists():
        arrays = safetensors.torch.load_file(directory / SINGLE)
    else:
        arrays = {}
        places = json.loads((directory / INDEX).read_text())["weight_map"]
        for file in set(places.values()):
            assert (directory / file).resolve().parent == directory.resolve(), file
            arrays |= safetensors.torch.load_file(directory / file)
    leaves = flatten_dict(params)
    for tensor in tensors(params):
        leaf = leaves[tensor.path]
        leaf = np.asarray(leaf if tensor.index is None else leaf[tensor.index])
        expected = arrays[tensor.name].float().numpy()
        np.testing.assert_array_equal(leaf.T if tensor.transposed else leaf, expected)


@functools.cache
def as_written(folder):
    """The parameters of a quantised base that nobody has changed."""
    return jax.tree.leaves(load_base(workshop()[0] / folder)[1])


def check_quantised(folder):
    """The parameters of the files as they were, where the tensors are as they were."""

    def check(directory, found):
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(found[1])]
        assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in leaves)
        if (directory / SINGLE).read_bytes() == content(f"{folder}/{SINGLE}"):
            for leaf, other in zip(leaves, as_written(folder), strict=True):
                np.testing.assert_array_equal(leaf, other)

    return check


@st.composite
def quantised_files(draw, folder):
    """A changed `quantization_config`; or changed tensors, of which NF4 has JSON in one of each."""
    if draw(st.booleans()):
        config = json.loads(content(f"{folder}/config.json"))
        names = ("weight_block_size", "bnb_4bit_quant_type", "format", "llm_int8_skip_modules")
        config["quantization_config"] = draw(changed(config["quantization_config"], names))
        return {"config.json": json.dumps(config).encode()}
    if draw(st.booleans()):
        return {SINGLE: draw(tensor_bytes(f"{folder}/{SINGLE}"))}
    arrays = safetensors.torch.load(content(f"{folder}/{SINGLE}"))
    name = draw(st.sampled_from(sorted(name for name in arrays if "layers" in name)))
    if "quant_state" in name:
        state = json.loads(arrays[name].numpy().tobytes())
        text = draw(documents(state, ("nested_offset", "shape")))
        arrays[name] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    else:
        kinds = (torch.float32, torch.uint8, torch.float8_e4m3fn, torch.bfloat16)
        kind = draw(st.sampled_from(kinds))
        arrays[name] = arrays[name].float().nan_to_num().to(kind)[: draw(st.integers(0, 200))]
    if draw(st.integers(0, 3)) == 0:
        del arrays[draw(st.sampled_from(sorted(arrays)))]
    return {SINGLE: safetensors.torch.save({k: v.contiguous() for k, v in arrays.items()})}


def split_header(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


@st.composite
def tensor_bytes(draw, path):
    """A safetensors file with a changed header, or with changed bytes."""
    header, body = split_header(content(path))
    document = json.dumps(draw(changed(header))).encode()
    document += b" " * (-len(document) % 8)
    return draw(damaged(st.just(len(document).to_bytes(8, "little") + document + body)))


@st.composite
def index_files(draw):
    """A changed index; sometimes a single file, of other values, beside its shards."""
    files = {INDEX: draw(documents(json.loads(content(f"sharded/{INDEX}"))))}
    if draw(st.integers(0, 3)) == 0:
        arrays = safetensors.torch.load(content(f"base/{SINGLE}"))
        files[SINGLE] = safetensors.torch.save({name: arrays[name] + 1 for name in arrays})
    return files


# Adapters.
def check_peft(directory, factors):
    """Deltas as peft adds them to the base, where peft takes the adapter."""
    twin = transformers.AutoModelForCausalLM.from_pretrained(workshop()[0] / "base")
    before = {name: value.clone() for name, value in twin.state_dict().items()}
    try:
        merged = PeftModel.from_pretrained(twin, directory).merge_and_unload().state_dict()
    except Exception:
        return  # peft is stricter, or needs what is not there
    flat, params = flatten_dict(factors), workshop()[2]
    for tensor in tensors(params):
        if tensor.path[-1] != "kernel":
            continue
        expected = (merged[tensor.name] - before[tensor.name]).numpy().T
        a, b = (flat.get((*tensor.path[:-1], leaf)) for leaf in "ab")
        if a is None:
            np.testing.assert_allclose(expected, 0, atol=1e-5, err_msg=tensor.name)
            continue
        a, b = (x if tensor.index is None else x[tensor.index] for x in (a, b))
        scale = 1e-5 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(a @ b, expected, atol=scale, err_msg=tensor.name)


def check_ours(directory, found):
    """The settings and the tensors that the files hold."""
    cfg, adapter = found
    stated = json.loads((directory / "adapter.json").read_text())["config"]
    read = config_to_json(cfg)
    assert {name: read[name] for name in stated} == stated
    arrays = safetensors.torch.load_file(directory / "adapter.safetensors")
    for path, value in flatten_dict({"trainable": adapter.trainable}, sep="/").items():
        np.testing.assert_array_equal(value, arrays[path].numpy())


# Caches of examples, and URLs.
def more_tokens(more):
    return content("cache/tokens-00000.bin") + more


def read_cache(directory):
    source = CacheSource(str(directory))
    return source, [example for (example,) in source.read(range(len(source)))]


def check_cache(_, found):
    """The examples and parts that were written."""
    source, examples = found
    assert source.parts == CacheSource(str(workshop()[0] / "cache")).parts
    expected = read_cache(workshop()[0] / "cache")[1]
    for example, other in zip(examples, expected, strict=True):
        for name in other:
            np.testing.assert_array_equal(example[name], other[name])


@functools.cache
def bucket():
    """A client of an S3 server, not of ours, and its bucket; the server ends with the process."""
    import boto3

    running, patch = contextlib.ExitStack(), pytest.MonkeyPatch()
    atexit.register(running.close)
    store = running.enter_context(s3_server())
    store.reach(patch)
    return boto3.client("s3"), store.url


NAMES = st.text(st.sampled_from("ab/.-_ ~#?%&=+:*[]{}@é\\\n\0'\"") | st.characters(), max_size=8)


def use_url(directory):
    """What is written to a URL, read back and listed."""
    place = f"{bucket()[1]}/{(directory / 'name').read_text()}"
    url = str(storage_path(place))  # as `Path` writes it: `a//b` is `a/b`
    try:
        write_object(url, b"content")
        found = storage_path(url).read_bytes()
    except REFUSALS as error:
        raise type(error)(str(error).replace(url, str(directory))) from error
    return url, found, storage_path(url).is_file(), listed(os.path.dirname(url))


def check_url(_, found):
    """The object that another client finds, under the very name."""
    client, place = bucket()
    url, content, is_file, names = found
    assert content == b"content"
    assert is_file
    assert names == [os.path.basename(url)], names
    listing = client.list_objects_v2(Bucket=place[5:]).get("Contents", ())
    keys = [found["Key"] for found in listing]
    for key in keys:
        client.delete_object(Bucket=place[5:], Key=key)
    assert keys == [url.removeprefix(f"{place}/")], (keys, url)


# Recipes.
MIXTURE = {
    "model": {"path": "a"},
    "data": {"train": [{"path": "a.jsonl", "weight": 2}, {"path": "b.csv", "weight": 0.5}]},
    "train": {"output": "a"},
}
RECIPE = {
    "model": {"path": "a", "dtype": "float32"},
    "adapter": {"rank": 4, "alpha": 8.0, "group_size": 4, "targets": ["q_proj"]},
    "data": {"train": "a.jsonl", "length": 8, "batch_size": 8, "pack": False},
    "optim": {"learning_rate": 0.003, "warmup": 0.1, "clip": 1.0},
    "train": {"output": "a", "steps": 3, "save_every": 7, "seed": 1},
    "mesh": {"data": 1, "fsdp": -1, "tensor": 1},
}


def as_yaml(document):
    return yaml.safe_dump(document).encode()


SETTINGS = {*RECIPE, *(name for part in RECIPE.values() for name in part)}


def check_recipe(directory, recipe):
    """Every value of the file in the recipe, as YAML reads it; no number that is not finite."""
    for part, fields in yaml.safe_load((directory / "recipe.yaml").read_bytes()).items():
        for name, value in (fields or {}).items():
            found = getattr(getattr(recipe, part), name)
            found = list(found) if isinstance(found, tuple) else found
            if isinstance(found, list):
                found = [vars(x) if isinstance(x, MixedSource) else x for x in found]
                weights = [x["weight"] for x in found if isinstance(x, dict)]
                assert all(0 < weight < np.inf for weight in weights), weights
            assert found == value or str(found) == str(value), (part, name, value, found)
            if isinstance(found, float):
                assert np.isfinite(found), (part, name, found)


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        files: The files that vary, by name.
        read: What is called on their directory.
        check: Compares what it returned with a reference.
        beside: Folder of the workshop whose other files lie beside them.
        known: What once failed, or might.
    """

    files: Callable[[], st.SearchStrategy[Files]]
    read: Callable[[Path], Any]
    check: Callable[[Path, Any], None]
    beside: str | None = None
    known: tuple[Files, ...] = ()


def only(file, data):
    return st.fixed_dictionaries({file: data})


def load_base(directory):
    return gl.load_llama(directory, **FLOAT32)


def load_peft(directory):
    return gl.import_peft(directory, workshop()[2])


def template_files():
    rows = st.fixed_dictionaries({"messages": CHAT}, optional={"tools": ODD})
    encoded = rows.map(lambda row: json.dumps(row).encode())
    templates = TEMPLATES.map(str.encode)
    return st.fixed_dictionaries({"rows.jsonl": encoded, "chat_template.jinja": templates})


def one_document(path, names=()):
    file = path.split("/")[1]
    return lambda: only(file, documents(json.loads(content(path)), names))


CONFIG_NAMES = (
    *("rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "layer_types"),
    *("attention_bias", "mlp_bias", "quantization_config", "hidden_act", "rms_norm_eps"),
)
PEFT_TENSORS = "adapter_model.safetensors"
PEFT_NAMES = ("modules_to_save", "use_dora", "use_rslora", "layers_to_transform", "lora_bias")
OPTIONS = ("eval", "overlong", "eps", "b1", "keep", "epochs", "chunk", "dropout", "final_ratio")
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}
FOREVER = {r"(([a-z_.0-9])*)*#": 4}
BACKTRACKING = [
    PLAIN | {"rank_pattern": FOREVER},
    PLAIN | {"alpha_pattern": FOREVER},
    PLAIN | {"target_modules": next(iter(FOREVER))},
]
ASKED = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
FOR_EVER = b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefghij")
)
TARGETS = {
    "rows": Target(
        row_files,
        read_examples,
        check_rows,
        known=(
            {"rows.jsonl": b'{"prompt": "\\ud800", "completion": "a"}'},
            {"rows.jsonl": b"[" * 100_000},
            {"rows.json": b"[" * 100_000},
            {"rows.jsonl": '{"prompt": "é", "completion": "a"}'.encode("latin-1")},
            {"rows.jsonl": '{"prompt": "é", "completion": "a"}'.encode("utf-16")},
            {"rows.jsonl": b'{"text": "a", "answer": "b"}'},
        ),
    ),
    "chat template": Target(
        template_files,
        read_examples,
        check_chat,
        known=(
            {"rows.jsonl": ASKED, "chat_template.jinja": FOR_EVER},
            {"rows.jsonl": ASKED, "chat_template.jinja": b"{{ 'a' * 10 ** 11 }}"},
            {"rows.jsonl": ASKED, "chat_template.jinja": b"{% endgeneration %}"},
        ),
    ),
    "config.json": Target(
        one_document("base/config.json", CONFIG_NAMES), model_config, check_config
    ),
    "index": Target(index_files, load_base, check_base, beside="sharded"),
    "safetensors": Target(
        lambda: only(SINGLE, tensor_bytes(f"base/{SINGLE}")), load_base, check_base, beside="base"
    ),
    "peft adapter's config": Target(
        one_document("peft/adapter_config.json", PEFT_NAMES),
        load_peft,
        check_peft,
        beside="peft",
        known=(
            *({"adapter_config.json": json.dumps(evil).encode()} for evil in BACKTRACKING),
            {"adapter_config.json": b'{"peft_type": "LORA", "kasa_config": {}}'},
        ),
    ),
    "peft adapter's tensors": Target(
        lambda: only(PEFT_TENSORS, tensor_bytes(f"peft/{PEFT_TENSORS}")),
        load_peft,
        check_peft,
        beside="peft",
    ),
    "adapter.json": Target(
        one_document("ours/adapter.json"),
        lambda directory: gl.load_adapter(directory, workshop()[2]),
        check_ours,
        beside="ours",
    ),
    "base in NF4": Target(
        lambda: quantised_files("nf4"), load_base, check_quantised("nf4"), beside="nf4"
    ),
    "base in FP8": Target(
        lambda: quantised_files("fp8"), load_base, check_quantised("fp8"), beside="fp8"
    ),
    "cache": Target(
        lambda: (
            one_document("cache/cache.json")()
            | only("lengths.npy", damaged(st.just(content("cache/lengths.npy"))))
            | only(
                "tokens-00000.bin",
                st.binary(max_size=8).map(content("cache/tokens-00000.bin").__add__),
            )
        ),
        read_cache,
        check_cache,
        beside="cache",
    ),
    "URL": Target(
        lambda: only("name", NAMES.filter(bool).map(lambda name: name.encode("utf-8", "replace"))),
        use_url,
        check_url,
    ),
    "recipe": Target(
        lambda: only(
            "recipe.yaml",
            damaged((changed(RECIPE, OPTIONS) | changed(MIXTURE, OPTIONS)).map(as_yaml)),
        ),
        lambda directory: parse(Recipe, ["--config", str(directory / "recipe.yaml")]),
        check_recipe,
        known=(
            {"recipe.yaml": BOMB.encode()},
            {"recipe.yaml": b"optim: {eps: .nan}"},
            {"recipe.yaml": b"data: {train: [null]}"},
        ),
    ),
}


def examine(target: Target, files: Files) -> bool:
    """Whether the files were read; raises whatever is wrong with how they were read or refused."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if target.beside:
            shutil.copytree(workshop()[0] / target.beside, directory, dirs_exist_ok=True)
        for file, data in files.items():
            (directory / file).write_bytes(data)
        try:
            with patience():
                found = target.read(directory)
        except REFUSALS as error:
            message = re.sub(r"\d{20,}", "9...", " ".join(str(error).split()))
            named = {name} if "recipe.yaml" not in files else {name, *SETTINGS}
            assert any(part in message for part in named), f"names no file: {message!r}"
            assert len(message.replace(name, "")) <= LONGEST, f"too long: {message!r}"
            return False
        target.check(directory, found)
        return True


@pytest.mark.parametrize("name", TARGETS)
def test_reader(name):
    target, read, seed = TARGETS[name], 0, 0
    workshop()
    for files in target.known:
        examine(target, files)

    def property(files):
        nonlocal read
        read += examine(target, files)

    limits = hypothesis.settings(
        max_examples=ROUND,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        hypothesis.seed(seed)(limits(hypothesis.given(files=target.files())(property)))()
        seed += 1
    print(f"{name}: of {seed * ROUND} examples {read} were read")
    assert read, "every example is refused"
