"""Files in buckets, over a file system in memory: what is asked for, and which answers pass."""

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.numpy import save_file

import genlora_jax as gl
from genlora_jax import bucket_directories, remote_path
from genlora_jax.adapter_files import load_spec
from genlora_jax.atomic_files import new_directory
from genlora_jax.data.rows import read_rows
from genlora_jax.hf.tensorfile import TensorFile
from genlora_jax.remote_path import FIRST, PART
from genlora_jax.storage import is_remote, storage_path
from genlora_jax.training.provenance import checkpoint_digest


class Store(MemoryFileSystem):
    """A store that counts what is asked of it, and may answer with too little or of another day."""

    store, cachable = {}, False
    short, generation = 0, 1

    def __init__(self):
        super().__init__()
        self.asked = []

    def info(self, path, **options):
        return super().info(path, **options) | {"generation": self.generation}

    def find(self, path, **options):
        return [name.removeprefix("s3://") for name in super().find(path, **options)]

    def cat_file(self, path, start=None, end=None, **options):
        self.asked.append((start, end))
        end = end and end - self.short
        return super().cat_file(path, start=start, end=end, **options)


@pytest.fixture
def store(monkeypatch):
    store = Store()
    store.store.clear()
    for module in (remote_path, bucket_directories):
        monkeypatch.setattr(module, "file_system", lambda url: store)
    return store


def put(store, path, content):
    store.pipe_file(f"s3://bucket/{path}", content)
    return storage_path(f"s3://bucket/{path}")


def test_a_local_path_is_none_of_these(tmp_path):
    assert type(storage_path(tmp_path)) is type(tmp_path)
    assert not is_remote(tmp_path)


@pytest.mark.parametrize(
    "path",
    ["org/name:train", "name:train[:10%]", "C:/rows", r"C:\rows", "runs/a:/b", "/runs:/a", "12:/a"],
)
def test_a_local_path_or_an_id_may_have_a_colon(path):
    assert not is_remote(path)
    assert storage_path(path) == Path(path)


@pytest.mark.parametrize(
    "url",
    ["gcs://b/a", "S3://b/a", "az://b/a", "abfs://c@b/a", "file:///a", Path("gs://b/a"), "s3:/b/a"],
)
def test_another_url_is_not_taken_for_a_local_path(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for take in (is_remote, storage_path, lambda url: new_directory(url).__enter__()):
        with pytest.raises(ValueError, match=re.escape(f"{url}: of URLs, gs:// and s3://")):
            take(url)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", [0, 1, FIRST, FIRST + 1, PART, 2 * PART + FIRST + 7])
def test_a_file_is_read_whole_in_few_large_requests(size, store):
    content = np.random.default_rng(0).bytes(size)
    file = put(store, "file", content)
    assert file.read_bytes() == content
    whole, store.asked = store.asked, []
    with file.open("rb") as stream:
        assert stream.read() == content
    assert len(whole) == -(-size // PART)
    assert len(store.asked) <= len(whole) + 1
    with file.at_random() as stream:
        stream.seek(-min(size, 3), 2)
        assert stream.read() == content[max(size - 3, 0) :]


def test_a_look_at_a_files_start_fetches_little(store):
    file = put(store, "file", bytes(3 * PART))
    with file.open("rb") as stream:
        stream.read(64)
    assert store.asked == [(0, FIRST)]


def test_paths_are_as_local_ones(store, tmp_path):
    for name in ("d/a.json", "d/b.json", "d/c.txt", "d/sub/e.json"):
        put(store, name, b"{}")
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    here, there = tmp_path / "d", storage_path("s3://bucket/d")
    assert str(there / "a.json") == "s3://bucket/d/a.json"
    assert (there / "a.json").parent == there
    for pattern in ("*", "*.json", "a*", "sub/*.json", "none/*"):
        found = sorted(str(path.relative_to(there)) for path in there.glob(pattern))
        assert found == sorted(str(path.relative_to(here)) for path in here.glob(pattern))
    for name in ("a.json", "sub", "none", "a.jso"):
        kinds = [(p / name).exists() + 2 * (p / name).is_file() for p in (here, there)]
        assert kinds[0] == kinds[1]
        assert (here / name).is_dir() == (there / name).is_dir()


def test_too_short_an_answer_is_never_taken_for_a_whole_file(store):
    file = put(store, "rows.jsonl", b'{"text": "a"}\n' * 9)
    store.short = 14
    for read in (file.read_bytes, lambda: list(read_rows(str(file)))):
        with pytest.raises(OSError, match=r"s3://bucket/rows.jsonl: 112 bytes came instead of 126"):
            read()


def test_a_file_that_is_replaced_meanwhile_is_noticed(store):
    file = put(store, "rows.jsonl", b'{"text": "a"}\n' * (FIRST // 4))
    rows = read_rows(str(file))
    next(rows)
    store.generation = 2
    with pytest.raises(OSError, match=r"s3://bucket/rows.jsonl was replaced while it was read"):
        list(rows)


@pytest.mark.parametrize("shapes", [[(3, 5)], [(0,), (400, 300), (7,), (0, 2)], [(70, 512)] * 3])
def test_tensors_in_a_bucket_are_the_local_ones(shapes, store, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal(s).astype(np.float32) for i, s in enumerate(shapes)}
    save_file(arrays, tmp_path / "model.safetensors")
    file = put(store, "m/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    opened = TensorFile(file)
    for name, value in arrays.items():
        np.testing.assert_array_equal(opened.read(name), value)
        np.testing.assert_array_equal(opened.read(name, slice(1, 3)), value[1:3])
    assert checkpoint_digest(file.parent) == checkpoint_digest(tmp_path)


def test_rows_of_a_tensor_are_fetched_alone(store, tmp_path):
    save_file({"t": np.zeros((1000, 64), np.float32)}, tmp_path / "t.safetensors")
    opened = TensorFile(put(store, "t.safetensors", (tmp_path / "t.safetensors").read_bytes()))
    store.asked.clear()
    opened.read("t", slice(100, 200))
    ((start, end),) = store.asked
    assert (start - opened.entries["t"].start, end - start) == (100 * 256, 100 * 256)


def test_a_long_header_is_read_whole(store, tmp_path):
    arrays = {f"a tensor of a long name, {i}": np.full(2, i, np.float32) for i in range(1500)}
    save_file(arrays, tmp_path / "model.safetensors")
    file = put(store, "model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    opened = TensorFile(file)
    assert opened.entries == TensorFile(tmp_path / "model.safetensors").entries
    assert opened.read("a tensor of a long name, 1499").tolist() == [1499, 1499]


def test_an_adapter_in_a_bucket_is_the_local_one(store, tmp_path):
    params = {"a": {"q_proj": {"kernel": jax.numpy.ones((8, 8))}}}
    cfg = gl.LoRAConfig(rank=2, targets=["q_proj"])
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    gl.save_adapter(tmp_path / "adapter", cfg, adapter)
    for file in (tmp_path / "adapter").iterdir():
        put(store, f"adapter/{file.name}", file.read_bytes())
    assert load_spec("s3://bucket/adapter").config == cfg
    found = gl.load_adapter("s3://bucket/adapter", params)[1]
    for leaf, expected in zip(jax.tree.leaves(found), jax.tree.leaves(adapter), strict=True):
        np.testing.assert_array_equal(leaf, expected)
    settings = json.loads((tmp_path / "adapter" / "adapter.json").read_text()) | {"format": 99}
    put(store, "adapter/adapter.json", json.dumps(settings).encode())
    with pytest.raises(ValueError, match=r"s3://bucket/adapter/adapter.json: its format is 99"):
        load_spec("s3://bucket/adapter")


def test_a_directory_that_came_meanwhile_is_not_replaced(store):
    for overwrite, match in ((False, "out exists"), (True, r"genlora wrote .*theirs")):
        writing = new_directory("s3://bucket/out", overwrite=overwrite)
        (writing.__enter__() / "ours").touch()
        put(store, "out/theirs", b"")
        with pytest.raises(FileExistsError, match=match):
            writing.__exit__(None, None, None)
        assert bucket_directories.listed("s3://bucket/out") == ["theirs"]
        store.rm_file("s3://bucket/out/theirs")


def test_removal_takes_names_and_no_patterns(store):
    for name in ("[ab]", "a", "b", "x?", "xy", "*"):
        put(store, f"d/{name}", b"")
    bucket_directories.remove_objects("s3://bucket/d", ["[ab]", "x?", "*", "gone"])
    assert bucket_directories.listed("s3://bucket/d") == ["a", "b", "xy"]
