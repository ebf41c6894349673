"""Tokens of many rows at once, the cache that `genlora tokenize` writes, and files read lazily."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_base import REPOSITORY, TOKENIZER, write_base
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from genlora_jax import cli, remote_path
from genlora_jax.data import cache as cache_module
from genlora_jax.data import cache_writing, files, lazy, open_source, streaming, workers
from genlora_jax.data import rows_digest as rows_digest_module
from genlora_jax.data.cache import CacheSource, find_cache, source_fingerprint
from genlora_jax.data.cache_writing import write_cache
from genlora_jax.data.config import DataConfig, MixedSource
from genlora_jax.data.encode import load_examples
from genlora_jax.data.examples import examples_fingerprint
from genlora_jax.data.lazy import LazySource, LineFile
from genlora_jax.data.open_source import load_source
from genlora_jax.data.rows_digest import rows_digest
from genlora_jax.data.sources import source_parts
from genlora_jax.data.tokens import Text, tokenized
from genlora_jax.settings import dump, parse
from genlora_jax.training.recipe import Recipe

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = {
    "messages": [
        {"role": "user", "content": "Two pies?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And one?"},
        {"role": "assistant", "content": "Three, I say."},
    ]
}
ROWS = [
    {"prompt": "Ann has 3 pies.", "completion": " 3 pies\n☃"},
    {"question": "1 + 2?", "answer": "3", "source": "here"},
    {"text": "Ann has 3 pies and Bob has 4. " * 9},
    {"prompt": "Nothing?", "completion": ""},
    TALK,
    {"prompt": "Zoë 🙂", "completion": " é" * 40},
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture
def here(monkeypatch):
    """Has what worker processes do done in this process, and a file read in many blocks."""

    class Here:
        processes = 3

        def __init__(self, tokenizer, cfg, processes=None):
            self.encoder = workers.Encoder(tokenizer, cfg)

        def encode(self, pieces):
            for piece in pieces:
                workers._encoder = self.encoder
                yield workers._encode(piece)

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda *_: None  # noqa: E731

    monkeypatch.setattr(workers, "_encoder", None, raising=False)
    for module in (cache_writing, lazy):
        monkeypatch.setattr(module, "Workers", Here)
    monkeypatch.setattr(files, "BLOCK", 200)
    monkeypatch.setattr(lazy, "BLOCK", 200)
    monkeypatch.setattr(cache_writing, "SHARD", 1000)


def write(file, rows):
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(file)


def same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for name, dtype in (("input_ids", np.int32), ("loss_mask", bool)):
            assert ours[name].dtype == dtype
            np.testing.assert_array_equal(ours[name], theirs[name])


def flat(rows):
    return [example for examples in rows for example in examples]


# Which tokens are trained: those of whose places transformers says that they overlap a span.


def trained_tokenizer(model, trainer, normalizer, splitter, processor):
    texts = ["Ann has 3 pies and Bob has 4. ", "é ü ﬁ 🙂 n\u0303 \u00a0 a\u0300", "<s> </s>"]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    special = ["[UNK]", "<s>", "</s>"]
    options = {}
    if isinstance(splitter, pre_tokenizers.ByteLevel):
        options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    elif trainer is trainers.UnigramTrainer:
        options = {"unk_token": "[UNK]"}
    tokenizer.train_from_iterator(
        texts, trainer(vocab_size=400, special_tokens=special, show_progress=False, **options)
    )
    tokenizer.post_processor = processor
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)


BOTH_ENDS = processors.TemplateProcessing(
    single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
)
TOKENIZERS = {
    "bytes": (
        models.BPE(),
        trainers.BpeTrainer,
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        processors.ByteLevel(trim_offsets=False),
    ),
    "trimmed bytes": (
        models.BPE(),
        trainers.BpeTrainer,
        normalizers.NFC(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        processors.Sequence([processors.ByteLevel(trim_offsets=True), BOTH_ENDS]),
    ),
    "pieces": (
        models.BPE(unk_token="[UNK]", fuse_unk=True),
        trainers.BpeTrainer,
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        BOTH_ENDS,
    ),
    "words": (
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer,
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    ),
    "unigrams": (
        models.Unigram(),
        trainers.UnigramTrainer,
        normalizers.NFKD(),
        pre_tokenizers.Metaspace(),
        None,
    ),
}
MADE = {}
CHARACTERS = st.sampled_from([*"Aan h3.\n\t ", "é", "ﬁ", "🙂", "\u0303", "\u00a0", "</s>", "한"])


@pytest.mark.parametrize("kind", [*TOKENIZERS, "of the base"])
@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(
    texts=st.lists(st.lists(CHARACTERS, max_size=30).map("".join), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), min_size=4, max_size=4),
    plain=st.booleans(),
)
def test_trained_tokens_are_those_that_overlap_a_span(tokenizer, kind, texts, cuts, plain):
    if kind in TOKENIZERS:
        tokenizer = MADE.get(kind) or MADE.setdefault(kind, trained_tokenizer(*TOKENIZERS[kind]))
    one, two, three, four = sorted(cuts)
    spans = [(one, two), (three, four)]
    given_ = [Text(text, spans, plain, len(text)) for text in texts]
    for text, (ids, mask) in zip(texts, tokenized(given_, tokenizer), strict=True):
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=plain)
        expected = encoded["input_ids"]
        overlaps = [
            any(start < last and first < stop for start, stop in spans)
            for first, last in encoded["offset_mapping"]
        ]
        if plain:
            if expected and expected[-1] == tokenizer.eos_token_id:
                expected, overlaps = expected[:-1], overlaps[:-1]
            expected = [*expected, tokenizer.eos_token_id]
            overlaps = [*overlaps, any(overlaps)]
        assert ids.tolist() == expected
        assert mask.tolist() == overlaps


# The cache holds what memory would.


@pytest.mark.parametrize("overlong", ["drop", "truncate", "split"])
def test_a_cache_has_the_examples_and_the_report_of_memory(tmp_path, tokenizer, here, overlong):
    one = write(tmp_path / "one.jsonl", [*ROWS * 15, "{", *ROWS, "", '{"a": 1}'])
    two = tmp_path / "two.json"
    two.write_text(json.dumps(ROWS[:2]))
    cfg = DataConfig(
        train=[one, str(two)],
        cache=str(tmp_path / "cache"),
        length=48,
        overlong=overlong,
        bad_rows="skip",
        bad_rows_limit=0.1,
    )
    expected, report = load_examples(cfg.train, tokenizer, cfg)
    said = []
    directory = write_cache(cfg.train, tokenizer, cfg, said.append)
    source, read = load_source(cfg.train, tokenizer, cfg)
    assert isinstance(source, CacheSource)
    assert str(report) in str(read)
    assert str(report) in str(said[0])
    same(flat(source.read(range(len(source)))), expected)
    assert source.lengths.tolist() == [len(e["input_ids"]) for e in expected]
    assert source.mean_length == pytest.approx(np.mean(source.lengths))
    assert source.fingerprint == examples_fingerprint(expected)
    assert len([name for name in os.listdir(directory) if name.startswith("tokens-")]) > 2
    rows = np.random.default_rng(0).integers(0, len(source), 50)
    same(flat(source.read(rows)), [expected[row] for row in rows])
    assert write_cache(cfg.train, tokenizer, cfg, said.append) == directory
    assert "is there already" in said[-1]


def test_ranges_of_a_bucket_are_asked_for_at_once(tmp_path, tokenizer, here, monkeypatch):
    file = write(tmp_path / "rows.jsonl", ROWS * 9)
    cfg = DataConfig(train=file, cache=str(tmp_path / "cache"))
    directory = write_cache(file, tokenizer, cfg, lambda _: None)
    source = CacheSource(directory)
    expected = flat(source.read([5, 0, 20, 7]))
    bucket = fsspec.filesystem("memory")
    bucket.put(directory, "/cache", recursive=True)
    source.directory = "memory://cache"
    monkeypatch.setattr(cache_module, "is_remote", lambda _: True)
    monkeypatch.setattr(remote_path, "file_system", lambda _: bucket)
    same(flat(source.read([5, 0, 20, 7])), expected)


def test_a_bad_row_ends_tokenising_as_it_ends_a_run_and_leaves_nothing(tmp_path, tokenizer, here):
    rows = [*ROWS * 9, '{"prompt": "a"}', "{", *ROWS]
    file = write(tmp_path / "rows.jsonl", rows)
    cfg = DataConfig(train=file, cache=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"rows\.jsonl:55: field 'completion'") as expected:
        load_examples(file, tokenizer, cfg)
    with pytest.raises(ValueError, match=r"rows\.jsonl:55: ") as found:
        write_cache(file, tokenizer, cfg)
    assert str(found.value) == str(expected.value)
    assert os.listdir(tmp_path / "cache") == []
    with pytest.raises(FileNotFoundError, match="no such data"):
        write_cache(str(tmp_path / "none.jsonl"), tokenizer, cfg)


def test_a_cache_of_other_rows_or_settings_is_not_used(tmp_path, tokenizer, here):
    file = write(tmp_path / "rows.jsonl", ROWS)
    cfg = DataConfig(train=file, cache=str(tmp_path / "cache"))
    with pytest.raises(FileNotFoundError, match="run genlora tokenize"):
        find_cache(file, tokenizer, cfg)
    write_cache(file, tokenizer, cfg)
    other = AutoTokenizer.from_pretrained(TOKENIZER)
    shorter = DataConfig(train=file, cache=cfg.cache, length=64)
    for changed in ((other, cfg), (tokenizer, shorter)):
        with pytest.raises(FileNotFoundError, match="this tokenizer, chat template"):
            find_cache(file, *changed)
    text = (tmp_path / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text(text.replace("Ann", "Bob", 1))
    with pytest.raises(ValueError, match=r"other rows than .*rows\.jsonl"):
        find_cache(file, tokenizer, cfg)
    os.remove(file)  # a host that has the cache alone
    assert len(find_cache(file, tokenizer, cfg)) == 5
    (tmp_path / "rows.jsonl").write_text(text.replace("Ann", "Eve", 1))
    write_cache(file, tokenizer, cfg)
    assert len(find_cache(file, tokenizer, cfg)) == 5
    os.remove(file)
    with pytest.raises(ValueError, match="remove all but one"):
        find_cache(file, tokenizer, cfg)


def test_an_edit_that_keeps_a_file_s_size_is_seen(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    edited = bytearray(b"a" * 1_000_000)
    edited[5000] = 0  # between the places
    for whole in (1_000_000, 999_999):
        monkeypatch.setattr(rows_digest_module, "WHOLE", whole)
        path.write_bytes(b"a" * 1_000_000)
        os.utime(path, (1, 1))
        before = rows_digest([str(path)])
        assert rows_digest([str(path)]) == before
        path.write_bytes(edited)
        os.utime(path, (1, 1) if whole == 1_000_000 else (2, 2))
        assert rows_digest([str(path)]) != before


def test_an_edit_behind_a_link_is_seen(tmp_path):
    (real := tmp_path / "real").mkdir()
    (data := tmp_path / "data").mkdir()
    (real / "rows.jsonl").write_text("a")
    (data / "train").symlink_to(real)
    (real / "loop").symlink_to(data)
    before = rows_digest([str(data)])
    assert before is not None
    (real / "rows.jsonl").write_text("b")
    assert rows_digest([str(data)]) not in (before, None)


@pytest.mark.parametrize("name", ["tokens-00001.bin", "lengths.npy", "cache.json"])
def test_a_damaged_cache_is_refused(tmp_path, tokenizer, here, name):
    file = write(tmp_path / "rows.jsonl", ROWS * 9)
    cfg = DataConfig(train=file, cache=str(tmp_path / "cache"))
    directory = write_cache(file, tokenizer, cfg)
    path = tmp_path / "cache" / os.path.basename(directory) / name
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"damaged.*run genlora tokenize"):
        find_cache(file, tokenizer, cfg)


def test_a_cache_that_says_something_else_than_was_written_is_refused(tmp_path, tokenizer, here):
    """Numbers that fit one another, of which rows would be cut and mixed otherwise."""
    one, two = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:2])
    cfg = DataConfig(train=[one, two], cache=str(tmp_path / "cache"))
    directory = Path(write_cache(cfg.train, tokenizer, cfg))
    index, lengths = (directory / name for name in ("cache.json", "lengths.npy"))
    whole = {path: path.read_bytes() for path in (index, lengths)}
    swapped = json.loads(whole[index])
    swapped["rows"].reverse()
    index.write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"not as it was written: remove it, and run genlora"):
        CacheSource(str(directory))
    index.write_bytes(whole[index])
    np.save(lengths, np.load(lengths)[::-1])
    with pytest.raises(ValueError, match="not as it was written"):
        CacheSource(str(directory))
    lengths.write_bytes(whole[lengths])
    CacheSource(str(directory))


# Mixtures.


def test_a_mixture_has_a_part_for_each_source(tmp_path, tokenizer, here):
    one, two = write(tmp_path / "a.jsonl", ROWS), write(tmp_path / "b.jsonl", ROWS[:2])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: x}}\ntrain: {{output: y}}\ndata:\n  cache: {tmp_path}/cache\n  train:\n"
        f"    - {{path: {one}, weight: 2}}\n    - {{path: {two}, weight: 0.5}}\n"
    )
    cfg = parse(Recipe, ["--config", str(recipe)]).data
    assert cfg.train == [MixedSource(path=one, weight=2), MixedSource(path=two, weight=0.5)]
    again = tmp_path / "again.yaml"
    again.write_text(dump(parse(Recipe, ["--config", str(recipe)])))
    assert parse(Recipe, ["--config", str(again)]).data == cfg
    write_cache(cfg.train, tokenizer, cfg)
    cached, _ = load_source(cfg.train, tokenizer, cfg)
    memory, _ = load_source(cfg.train, tokenizer, DataConfig(train=cfg.train))
    for source in (cached, memory):
        assert [(part.rows, part.weight) for part in source.parts] == [(5, 2), (2, 0.5)]
    plain, _ = load_source([one, two], tokenizer, DataConfig(train=[one, two]))
    assert [(part.rows, part.weight) for part in plain.parts] == [(7, None)]
    with pytest.raises(ValueError, match="all sources a weight, or none"):
        DataConfig(train=[one, MixedSource(path=two, weight=1)])
    with pytest.raises(ValueError, match="weight must be a finite number > 0"):
        MixedSource(path=one, weight=0)


# Lazy files.


def test_a_large_file_is_read_as_it_is_in_memory(tmp_path, tokenizer, here, monkeypatch):
    rows = ["", "\ufeff", *ROWS[:3], "  ", "", *ROWS[3:], '{"text": 1}', *ROWS * 20, ""]
    file = write(tmp_path / "rows.jsonl", rows)
    other = write(tmp_path / "other.ndjson", ROWS)
    cfg = DataConfig(
        train=[file, other], length=48, overlong="split", bad_rows="skip", bad_rows_limit=0.1
    )
    expected, report = load_examples(cfg.train, tokenizer, cfg)
    fingerprint = source_fingerprint(cfg.train, tokenizer, cfg)
    monkeypatch.setattr(cache_module, "FORMAT", 99)  # a run goes on whatever caches are like
    monkeypatch.setattr(open_source, "LARGE", 10)
    # Its digest is made as its lines are found, and not by reading it once more.
    monkeypatch.setattr(rows_digest_module, "_file_digest", None)
    source, read = load_source(cfg.train, tokenizer, cfg)
    assert isinstance(source, LazySource)
    assert source.fingerprint == fingerprint
    assert "genlora tokenize" in str(read)
    assert len(source) == 6 * 22 + 1
    assert sum(part.rows for part in source.parts) == len(source)
    same(flat(source.read(range(len(source)))), expected)
    assert source.mean_length == pytest.approx(report.tokens / report.examples)
    assert source.read([6]) == [[]]
    same(flat(source.read([10, 2])), flat([source.read([10])[0], source.read([2])[0]]))


def test_a_bad_row_of_a_large_file_names_its_line(tmp_path, tokenizer, here, monkeypatch):
    path = tmp_path / "rows.jsonl"
    file = write(path, ["", *ROWS * 5, "{"])
    monkeypatch.setattr(lazy, "SAMPLE", 1)
    source = LazySource([LineFile(path)], [file], tokenizer, DataConfig(train=file))
    with pytest.raises(ValueError, match=r"rows\.jsonl:32: not JSON"):
        source.read([3, 30])
    cfg = DataConfig(train=file, bad_rows="skip")
    with pytest.raises(ValueError, match=r"1 of 32 rows are bad, more than data\.bad_rows_limit"):
        LazySource([LineFile(path)], [file], tokenizer, cfg).read(range(31))


def test_an_empty_file_is_refused_by_name(tmp_path, tokenizer, here, monkeypatch):
    file, empty = write(tmp_path / "rows.jsonl", ROWS), write(tmp_path / "none.jsonl", ["", " "])
    mixture = [MixedSource(path=file, weight=1), MixedSource(path=empty, weight=1)]
    with pytest.raises(ValueError, match="source 2 of the mixture has no rows: leave it out"):
        source_parts([6, 0], [1, 1])
    monkeypatch.setattr(open_source, "LARGE", 10)
    with pytest.raises(ValueError, match=r"none\.jsonl has no rows: leave it out"):
        load_source(mixture, tokenizer, DataConfig(train=mixture))


# Data sets of the hub, as they come.


def test_a_data_set_of_the_hub_is_streamed(tokenizer, here, monkeypatch, capsys):
    rows = [{"prompt": f"{i} pies?", "completion": f" {i}"} for i in range(100)]
    walks = []

    def load(name, split, *, streaming):
        assert (name, split, streaming) == ("someone/pies", "test", True)
        data = datasets.Dataset.from_list(rows).to_iterable_dataset()
        info = datasets.DatasetInfo(splits={"test": {"name": "test", "num_examples": 100}})
        walks.append(data)
        return datasets.IterableDataset(data._ex_iterable, info, datasets.Split.TEST)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(streaming, "WINDOW", 10)
    monkeypatch.setattr(streaming, "KEPT", 30)
    monkeypatch.setattr(streaming, "WALKS", 2)
    monkeypatch.setattr(lazy, "SAMPLE", 5)
    name = "someone/pies:test"
    cfg = DataConfig(train=name, streaming=True)
    source, report = load_source(name, tokenizer, cfg)
    assert [(part.rows, part.window) for part in source.parts] == [(100, 10)]
    assert "100 are read as the run goes, shuffled within windows of 10" in str(report)
    expected, _ = workers.Encoder(tokenizer, cfg)([(str(i), row) for i, row in enumerate(rows)])
    order = np.concatenate([np.random.default_rng(i).permutation(10) + 10 * i for i in range(10)])
    # An epoch's end beside the next one's begin.
    for row in [*order[:90].tolist(), 95, 3, 99, 5, 98]:
        same(source.read([row])[0], expected[row])
    assert len(walks) == 2
    assert capsys.readouterr().out == ""
    same(flat(source.read([60])), expected[60])
    same(flat(source.read([20])), expected[20])
    assert capsys.readouterr().out == f"{name}: reads it from its begin again, for row 21\n"
    with pytest.raises(ValueError, match=r"data\.streaming: rows\.jsonl is no data set"):
        load_source("rows.jsonl", tokenizer, cfg)
    rows.pop()
    with pytest.raises(ValueError, match="ends after 99 rows, fewer than stated"):
        load_source(name, tokenizer, cfg)[0].read([99])


def test_an_error_of_a_stream_comes_again():
    def rows():
        yield {"text": "one"}
        raise OSError("the line is cut")

    walk = streaming._Walk("pies", rows())
    for _ in range(2):
        with pytest.raises(ValueError, match="pies: row 2: the line is cut"):
            walk.row(3)
    assert walk.row(0)[1] == {"text": "one"}


# Processes.


def test_the_command_tokenises_in_processes(tmp_path, run_main):
    base = write_base(tmp_path / "base")
    file = write(tmp_path / "rows.jsonl", [row for row in ROWS if row is not TALK])
    held_out = write(tmp_path / "held_out.jsonl", ROWS[:2])
    data = {"train": file, "eval": held_out, "cache": str(tmp_path / "cache")}
    recipe = {"model": {"path": str(base)}, "data": data, "train": {"output": "x"}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    arguments = ("tokenize", "--config", tmp_path / "recipe.yaml")
    status, out, _ = run_main(cli.main, *arguments)
    assert status == 0
    assert len(os.listdir(tmp_path / "cache")) == 2
    tokenizer = AutoTokenizer.from_pretrained(base)
    cfg = DataConfig(**data)
    for source in (file, held_out):
        expected, report = load_examples(source, tokenizer, cfg)
        assert str(report) in out
        found = find_cache(source, tokenizer, cfg)
        same(flat(found.read(range(len(found)))), expected)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe | {"data": {"train": file}}))
    status, _, error = run_main(cli.main, *arguments)
    assert status
    assert "data.cache is missing" in str(status) + error


def test_no_process_outlives_the_one_that_began_it(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import os, signal\n"
        "from transformers import AutoTokenizer\n"
        "from genlora_jax.data.config import DataConfig\n"
        "from genlora_jax.data.workers import Workers\n"
        "if __name__ == '__main__':\n"
        f"    tokenizer = AutoTokenizer.from_pretrained({str(TOKENIZER)!r})\n"
        "    workers = Workers(tokenizer, DataConfig(train='-'), 1)\n"
        "    list(workers.encode([list]))\n"
        "    (number,) = workers._pool._processes\n"
        "    os.kill(number, signal.SIGTERM)\n"  # as a job's end does, to all its processes
        "    list(workers.encode([list]))\n"
        "    print(number, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    number = int(done.stdout)
    end = time.monotonic() + 20
    while os.path.exists(f"/proc/{number}") and time.monotonic() < end:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{number}")
