"""Models, adapters, rows and recipes read from buckets: the same as from this machine's disk."""

import contextlib
import dataclasses
import gzip
import json
import os
import re
import shutil
import socket
import subprocess
import sys

import fsspec
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from flax.traverse_util import flatten_dict
from fsspec.registry import _registry
from gcsfs.retry import HttpError
from servers import Faults, faulty_proxy, gcs_server, s3_server
from tiny_base import REPOSITORY, write_base

import genlora_jax as gl
from genlora_jax import cli, settings
from genlora_jax.data.rows import read_rows
from genlora_jax.evaluation.run import Evaluation
from genlora_jax.hf.base_model import ModelConfig, find_base, load_base
from genlora_jax.hf.checkpoint import locate
from genlora_jax.hf.load import load_llama
from genlora_jax.hf.peft_import import import_peft
from genlora_jax.mesh import one_device
from genlora_jax.remote_path import naming
from genlora_jax.storage import storage_path
from genlora_jax.training.find_adapter import find_adapter
from genlora_jax.training.provenance import checkpoint_digest, digest
from genlora_jax.training.recipe import Recipe
from genlora_jax.training.setup import check_start, prepare

ROWS = [{"prompt": f"{i} and é", "completion": f" {i % 5}" * (i % 7 + 1)} for i in range(9000)]
RECIPE = """
model: {{path: {here}/base, dtype: float32, param_dtype: float32}}
adapter: {{rank: 4, alpha: 8.0, group_size: 4, kernels: 2, targets: [q_proj, up_proj]}}
data: {{train: {here}/few.jsonl, eval: {here}/few.jsonl, length: 24, batch_size: 8}}
train: {{output: out, init_from: {here}/run, steps: 2}}
"""
EVALUATION = """
model: {{path: {here}/base}}
output: out
match: {{data: {here}/few.jsonl}}
"""


@pytest.fixture(scope="module", params=[s3_server, gcs_server], ids=["s3", "gs"])
def served(request):
    """A server, and a proxy before it that counts."""
    with request.param() as store, faulty_proxy(store) as proxy:
        yield store, proxy


only_s3 = pytest.mark.parametrize("served", [s3_server], indirect=True, ids=["s3"])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A base in shards and whole, adapters, rows and recipes on this machine."""
    here = tmp_path_factory.mktemp("here")
    whole = write_base(here / "whole", tie_word_embeddings=False, hidden_size=96, head_dim=24)
    model, params = load_llama(whole, dtype="float32", param_dtype="float32")
    gl.export_hf(here / "base", params, base=whole, max_shard_bytes=200_000)
    (here / "base" / "additional_chat_templates").mkdir()
    (here / "base" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    cfg = gl.GenLoRAConfig(
        rank=4, alpha=8.0, group_size=4, kernels=2, targets=["q_proj", "up_proj"]
    )
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: x + 0.1, adapter.trainable)
    adapter = dataclasses.replace(adapter, trainable=trainable)
    gl.save_adapter(here / "run" / "adapter", cfg, adapter, model=model)
    gl.export_peft(here / "peft", cfg, gl.generate_factors(cfg, adapter), base="")
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    (here / "rows.jsonl").write_text(lines)
    (here / "few.jsonl").write_text("".join(lines.splitlines(keepends=True)[:12]))
    (here / "rows.json").write_text(json.dumps(ROWS))
    cells = [f'{row["prompt"]},"{row["completion"]}"\n' for row in ROWS]
    (here / "rows.csv").write_text("prompt,completion\n" + "".join(cells))
    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, here / "rows.parquet", row_group_size=4000)
    (here / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pyarrow.CompressedOutputStream(str(here / "rows.jsonl.zst"), "zstd") as stream:
        stream.write(lines.encode())
    return here


@pytest.fixture(scope="module")
def there(here, served):
    """The URL of the same files in a bucket."""
    store, _ = served
    with pytest.MonkeyPatch.context() as patch:
        store.reach(patch)
        for name, place in (("recipe", "here"), ("remote", "there")):
            target = here if place == "here" else f"{store.url}/dir"
            (here / f"{name}.yaml").write_text(RECIPE.format(here=target))
            (here / f"{name}-evaluation.yaml").write_text(EVALUATION.format(here=target))
        fsspec.filesystem(store.url[:2]).put(f"{here}/", f"{store.url}/dir/", recursive=True)
    return storage_path(f"{store.url}/dir")


@pytest.fixture(autouse=True)
def proxy(served, monkeypatch):
    """The proxy, without faults, by which this process reaches the bucket."""
    store, proxy = served
    store.reach(monkeypatch, proxy.endpoint)
    monkeypatch.setattr("gcsfs.retry.random.random", lambda: -40)  # no pauses before it asks again
    proxy.faults = Faults()
    proxy.requests.clear()
    proxy.injected.clear()
    proxy.transferred = 0
    return proxy


def same(tree, other):
    flat, expected = flatten_dict(tree), flatten_dict(other)
    assert flat.keys() == expected.keys()
    for path, leaf in flat.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]))


# Models.


def test_a_model_in_a_bucket_is_the_local_one_bit_for_bit(here, there, proxy):
    cfg, mesh = {"dtype": "float32", "param_dtype": "float32"}, one_device()
    configs = [ModelConfig(path=str(place / "base"), **cfg) for place in (here, there)]
    (source, tokenizer), found = (find_base(config) for config in configs)
    assert found[0] == there / "base"
    assert found[1].chat_template == tokenizer.chat_template
    assert found[1]("some text")["input_ids"] == tokenizer("some text")["input_ids"]
    local = load_base(configs[0], (source, tokenizer), mesh)
    remote = load_base(configs[1], found, mesh)
    assert (remote.model, remote.stop) == (local.model, local.stop)
    same(remote.params, local.params)
    stored = sum(file.stat().st_size for file in (here / "base").iterdir() if file.is_file())
    assert proxy.transferred < 1.3 * stored + 300_000  # headers and listings beside the tensors


def test_faults_change_no_byte_of_a_model(here, there, proxy):
    proxy.faults = Faults(slow=0.05, delay=0.1, unavailable=0.05, cut=0.05)
    _, params = load_llama(str(there / "base"), param_dtype="float32")
    proxy.faults = Faults()
    assert sum(proxy.injected.values()) > 2
    same(params, load_llama(here / "base", param_dtype="float32")[1])


def test_the_digest_of_a_checkpoint_is_that_of_the_local_one(here, there, proxy):
    assert checkpoint_digest(there / "base") == checkpoint_digest(here / "base")
    assert len(proxy.requests) < 60
    assert digest(str(there / "rows.jsonl")) == digest(here / "rows.jsonl")


SHARE = """
import sys
import jax
import numpy as np
from genlora_jax.hf.load import load_llama
from genlora_jax.mesh import MeshConfig, make_mesh
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
_, params = load_llama(sys.argv[3], param_dtype="float32", mesh=make_mesh(MeshConfig(fsdp=2)))
shards = [leaf.addressable_shards[0] for leaf in jax.tree.leaves(params)]
np.savez(sys.argv[4], **{f"{i} {shard.index}": shard.data for i, shard in enumerate(shards)})
"""


@only_s3
def test_a_process_reads_its_share_of_a_model_alone(here, there, served, tmp_path):
    store, _ = served
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with faulty_proxy(store) as first, faulty_proxy(store) as second:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", SHARE, address, i, there / "whole", tmp_path / f"{i}.npz"],
                env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"} | store.environment(proxy.endpoint),
                cwd=REPOSITORY,
            )
            for i, proxy in (("0", first), ("1", second))
        ]
        assert [process.wait(200) for process in processes] == [0, 0]
        read = [proxy.transferred for proxy in (first, second)]
    size = (here / "whole" / "model.safetensors").stat().st_size
    # Headers, listings and what no mesh divides come on top.
    assert max(read) < 0.5 * size + 100_000, (read, size)
    leaves = jax.tree.leaves(load_llama(here / "whole", param_dtype="float32")[1])
    for i in (0, 1):
        for name, shard in np.load(tmp_path / f"{i}.npz").items():
            number, _, index = name.partition(" ")
            np.testing.assert_array_equal(shard, np.asarray(leaves[int(number)])[eval(index)])


# Rows.


@pytest.mark.parametrize(
    "name", ["jsonl", "json", "csv", "parquet", "jsonl.gz", "jsonl.zst"], ids=lambda name: name
)
def test_rows_in_a_bucket_are_the_local_ones(name, here, there, proxy):
    local, remote = f"{here}/rows.{name}", f"{there}/rows.{name}"
    rows = list(read_rows(remote))
    requests = len(proxy.requests)
    assert rows == [(place.replace(local, remote), row) for place, row in read_rows(local)]
    assert len(rows) == len(ROWS)
    assert requests <= 24
    proxy.faults = Faults(cut=0.2, unavailable=0.1)
    assert list(read_rows(remote)) == rows


# Adapters and commands.


@only_s3
def test_adapters_in_a_bucket_are_the_local_ones(here, there):
    _, params = load_llama(here / "whole", param_dtype="float32")
    adapters = []
    for place in (here, there):
        cfg, adapter = gl.load_adapter(find_adapter(str(place / "run")), params)
        adapters.append((cfg, adapter))
    assert adapters[0][0] == adapters[1][0]
    same(adapters[1][1].trainable, adapters[0][1].trainable)
    same(import_peft(there / "peft", params), import_peft(here / "peft", params))


COMMANDS = {
    "merge": "merge --base {0}/base --adapter {0}/run --out {1}",
    "export-peft": "export-peft --adapter {0}/run --base {0}/base --out {1}",
    "inspect": "inspect --adapter {0}/run",
    "inspect-peft": "inspect --adapter {0}/peft",
    "generate": "generate --model {0}/base --prompt and --adapter {0}/run --max_new_tokens 3",
}


@only_s3
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_read_from_a_bucket(command, here, there, tmp_path, capsys):
    said = []
    for number, place in enumerate((here, there)):
        cli.main(COMMANDS[command].format(place, tmp_path / str(number)).split())
        said.append(capsys.readouterr().out.replace(str(place), "HERE"))
    assert re.sub(r"\S+/1\b", "OUT", said[1]) == re.sub(r"\S+/0\b", "OUT", said[0])
    local, remote = tmp_path / "0", tmp_path / "1"
    files = {str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()}
    assert files == {str(file.relative_to(remote)) for file in remote.rglob("*") if file.is_file()}
    for name in files:
        content = (remote / name).read_bytes().replace(str(there).encode(), str(here).encode())
        assert content == (local / name).read_bytes(), name


@only_s3
def test_a_recipe_in_a_bucket_names_what_is_in_buckets(here, there):
    local = settings.parse(Recipe, ["--config", f"{here}/recipe.yaml"])
    assert settings.parse(Recipe, ["--config", f"{there}/recipe.yaml"]) == local
    assert settings.parse(Evaluation, ["--config", f"{there}/remote-evaluation.yaml"])
    remote = settings.parse(
        Recipe, ["--config", f"{there}/remote.yaml", "--train.steps", "3"], "finetune"
    )
    assert remote.train.steps == 3
    assert remote.model.path == f"{there}/base"
    assert check_start(remote.adapter, remote.train.init_from) == f"{there}/run/adapter"
    runs = [prepare(recipe, one_device(), lambda _: None) for recipe in (local, remote)]
    assert runs[1].origin == runs[0].origin
    same(runs[1].base.params, runs[0].base.params)


# What goes wrong.


@contextlib.contextmanager
def one_message(kind, url, *words):
    with pytest.raises(kind) as raised:
        yield
    said = str(raised.value)
    assert str(url) in said
    assert len(said) < 400
    assert said.count("\n") < 3
    for word in words:
        assert word in said, said


def uses(url):
    """Ways to read what is at a URL."""
    return {
        "model": lambda: locate(f"{url}/model"),
        "rows": lambda: list(read_rows(f"{url}/rows.jsonl")),
        "adapter": lambda: gl.load_adapter(f"{url}/adapter"),
        "recipe": lambda: settings.parse(Recipe, ["--config", f"{url}/recipe.yaml"]),
    }


@pytest.mark.parametrize("use", uses(""))
def test_what_is_not_there_is_named(use, there):
    for url in (there / "none", f"{str(there)[:5]}no-such-bucket/none"):
        with one_message((FileNotFoundError, ValueError), url):
            uses(url)[use]()


@pytest.mark.parametrize("use", uses(""))
def test_a_store_that_refuses_is_named(use, there, proxy):
    proxy.faults.refused = {"GET", "HEAD"}
    with one_message(PermissionError, there, "refuses"):
        uses(there)[use]()


def test_missing_credentials_are_named(there, monkeypatch, tmp_path):
    if str(there).startswith("gs"):  # whose emulator asks for none
        with one_message(PermissionError, there, "GOOGLE_APPLICATION_CREDENTIALS"), naming(there):
            raise HttpError({"code": 401, "message": "Anonymous caller does not have access"})
        return
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    for use in uses(there).values():
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with one_message(PermissionError, there, "AWS_ACCESS_KEY_ID", "aws configure"):
            use()


def test_a_store_that_does_not_answer_is_named(there, served, monkeypatch):
    store, _ = served
    with socket.create_server(("127.0.0.1", 0)) as free:
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    store.reach(monkeypatch, closed)
    with one_message(OSError, there, "check the network", "if that is set"):
        list(read_rows(f"{there}/rows.jsonl"))


def test_a_missing_package_is_named(there, monkeypatch):
    name, extra = ("gcsfs", "gcs") if str(there).startswith("gs") else ("s3fs", "s3")
    monkeypatch.setitem(sys.modules, name, None)
    for protocol in ("gs", "gcs", "s3"):  # else those that were imported before are found
        monkeypatch.delitem(_registry, protocol, raising=False)
    with one_message(ValueError, there, f'pip install "genlora_jax[{extra}]"'):
        list(read_rows(f"{there}/rows.jsonl"))


def test_damage_in_a_bucket_is_told_as_here(here, there, served, tmp_path):
    content = (here / "whole" / "model.safetensors").read_bytes()
    shutil.copytree(here / "whole", tmp_path / "cut")
    for wrong in (content[:-1], content[:100], content[:5], b"\xff" * 200):
        (there / "cut" / "config.json").write_bytes((here / "whole" / "config.json").read_bytes())
        for place in (tmp_path, there):
            (place / "cut" / "model.safetensors").write_bytes(wrong)
        with pytest.raises(ValueError) as local:
            load_llama(tmp_path / "cut")
        with pytest.raises(ValueError) as remote:
            load_llama(str(there / "cut"))
        assert str(remote.value) == str(local.value).replace(str(tmp_path), str(there))


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(here, there):
    file = there / "replaced" / "rows.jsonl"
    content = (here / "rows.jsonl").read_bytes()
    file.write_bytes(content)
    rows = read_rows(str(file))
    next(rows)
    file.write_bytes(content[::-1])
    with one_message(OSError, file, "run again"):
        list(rows)
