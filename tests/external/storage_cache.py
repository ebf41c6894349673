"""A cache of examples in a bucket, made of rows in one: the same as on this machine's disk."""

import json

import fsspec
import numpy as np
import pytest
from servers import gcs_server, s3_server
from tiny_base import TOKENIZER
from transformers import AutoTokenizer

from genlora_jax.data import cache_writing
from genlora_jax.data.cache import find_cache
from genlora_jax.data.cache_writing import write_cache
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import load_examples
from genlora_jax.storage import WRITTEN

ROWS = [{"prompt": f"{i} and é", "completion": f" {i % 5}" * (i % 7 + 1)} for i in range(2000)]


@pytest.mark.parametrize("server", [s3_server, gcs_server], ids=["s3", "gs"])
def test_a_cache_in_a_bucket_has_the_examples_of_its_rows(tmp_path, monkeypatch, server):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    expected, _ = load_examples(str(file), tokenizer, DataConfig(train=str(file)))
    monkeypatch.setattr(cache_writing, "SHARD", 100_000)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0})  # one worker starts the sooner
    with server() as store:
        store.reach(monkeypatch)
        bucket, url = fsspec.filesystem(store.url[:2]), f"{store.url}/rows.jsonl"
        bucket.put(str(file), url)
        cfg = DataConfig(train=url, cache=f"{store.url}/caches")
        directory = write_cache(url, tokenizer, cfg)
        assert directory.startswith(cfg.cache)
        source = find_cache(url, tokenizer, cfg)
        assert len(source) == len(expected)
        rows = np.random.default_rng(0).permutation(len(source))[:60]
        for row, (found,) in zip(rows, source.read(rows), strict=True):
            np.testing.assert_array_equal(found["input_ids"], expected[row]["input_ids"])
            np.testing.assert_array_equal(found["loss_mask"], expected[row]["loss_mask"])
        assert write_cache(url, tokenizer, cfg) == directory
        bucket.rm(url)
        assert find_cache(url, tokenizer, cfg).fingerprint == source.fingerprint
        bucket.rm(f"{directory}/{WRITTEN}")  # as it is until the upload is complete
        with pytest.raises(FileNotFoundError, match="run genlora tokenize"):
            find_cache(url, tokenizer, cfg)
