"""Files of rows and forms of rows that people have, against `datasets` and the forms' origins."""

import gzip
import json
import math
import random
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_base import TOKENIZER
from transformers import AutoTokenizer

from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import load_examples
from genlora_jax.data.rows import read_rows, rows_or_errors
from genlora_jax.evaluation.tasks import match

ROWS = [
    {"prompt": "Zoë has 3 pies.", "completion": " 3 pies\n☃"},
    {"prompt": 'He said "one, two".', "completion": " 🙂"},
    {"prompt": "a\tb", "completion": " x\u2028y"},
]
PLAIN = {"prompt": "Ann?", "completion": " Yes."}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def load(tmp_path, tokenizer):
    """A function that writes rows to a JSONL file and reads it."""

    def read(rows, name="rows.jsonl", **changes):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = DataConfig(train=str(file), **({"length": 64} | changes))
        return load_examples(str(file), tokenizer, cfg)

    return read


def halves(tokenizer, example):
    """The text of an example that is not trained, and the text that is."""
    ids, mask = example["input_ids"], example["loss_mask"]
    return tokenizer.decode(ids[~mask]), tokenizer.decode(ids[mask])


# Which fields make prompt and completion.


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        # Alpaca: LLaMA-Factory puts the input on the line after the instruction.
        (
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            "Question: Add.\n1 2\nAnswer:",
            " 3",
        ),
        (
            {"instruction": "Add 1 2.", "input": "", "output": "3"},
            "Question: Add 1 2.\nAnswer:",
            " 3",
        ),
        ({"instruction": "Add 1 2.", "output": "3"}, "Question: Add 1 2.\nAnswer:", " 3"),
        # LLM-Adapters: its finetune.py trains the output.
        (
            {"instruction": "1 + 2?", "input": "", "output": "1 + 2 = 3", "answer": "3"},
            "Question: 1 + 2?\nAnswer:",
            " 1 + 2 = 3",
        ),
        ({"question": "1 + 2?", "answer": "3"}, "Question: 1 + 2?\nAnswer:", " 3"),
        ({"prompt": "1 + 2 =", "completion": " 3"}, "1 + 2 =", " 3"),
        # KTO's wanted completions are like any other.
        ({"prompt": "1 + 2 =", "completion": " 3", "label": True}, "1 + 2 =", " 3"),
        # A table of several forms has nothing in the columns of the others.
        (
            {"prompt": None, "question": "1 + 2?", "messages": None, "answer": "3"},
            "Question: 1 + 2?\nAnswer:",
            " 3",
        ),
        # What pandas writes for nothing.
        (
            {"instruction": "Add 1 2.", "input": math.nan, "output": "3"},
            "Question: Add 1 2.\nAnswer:",
            " 3",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_fields_make_prompt_and_completion(load, tokenizer, row, prompt, completion):
    (example,), report = load([row])
    assert halves(tokenizer, example) == (f"<s>{prompt}", f"{completion}</s>")
    kept = {name: value for name, value in row.items() if value is not None and value == value}
    assert match._problem("here", kept)[0].prompt == prompt  # evaluation asks as training does
    assert report.bad == 0


@pytest.mark.shared
@pytest.mark.parametrize("name", ["svamp", "llm_adapters/addsub", "llm_adapters/boolq"])
def test_llm_adapters_trains_the_output_and_is_asked_for_the_answer(shared, tokenizer, name):
    file = shared / "data" / name / "test.json"
    examples, report = load_examples(
        str(file), tokenizer, DataConfig(train=str(file), length=4096, overlong="error")
    )
    rows = json.loads(file.read_text())
    problems = match.read(str(file))
    assert len(examples) == len(rows) == len(problems)
    for row, example, problem in random.Random(0).sample(
        list(zip(rows, examples, problems, strict=True)), 20
    ):
        read, trained = halves(tokenizer, example)
        assert trained == f" {row['output']}</s>"
        assert row["instruction"] in read
        assert problem.prompt == f"Question: {row['instruction']}\nAnswer:"
        assert problem.expected == f" {row['answer']}"
    assert report.unused == ["answer"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"chosen": "b", "rejected": "c"}, "preference"),
        ({"prompt": "a", "completion": "b", "label": False}, "label is false"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "'input'"),
        ({"instruction": "a", "input": "b"}, "'output' is missing; has 'input', 'instruction'"),
        ({"instruction": "a", "output": 3}, "'output' is no text but int"),
        ({"question": None, "answer": "b"}, "needs fields .*; has 'answer'"),
        ({"prompt": "a", "completion": None}, "'completion'"),
        ({"text": ["a"]}, "needs fields"),
        ({f"column {i}": "a" for i in range(1000)}, "and 988 more$"),
        ({"a" * 1000: 1}, f"has '{'a' * 40}'$"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_row_of_another_form_is_named(load, row, message):
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{message}"):
        load([PLAIN, row])


def test_the_report_says_what_is_trained_and_what_is_not_used(load):
    rows = [
        {"instruction": "a", "input": "b", "output": "c", "answer": "d", "id": 0, "tags": []},
        {"instruction": "a", "input": "", "output": "c", "note": "", "id": 1, "source": "e"},
    ]
    _, report = load(rows)
    assert report.unused == ["answer", "id", "source"]
    lines = str(report).splitlines()
    assert len(lines) == 3
    assert "prompt of instruction and input, completion of output" in lines[1]
    assert all(f"'{name}'" in lines[2] for name in report.unused)
    _, report = load([*rows, PLAIN])
    assert "(2 rows)" in str(report)
    assert "prompt and completion (1 rows)" in str(report)
    _, report = load([PLAIN])
    assert report.unused == []
    assert len(str(report).splitlines()) == 2


def test_every_source_has_a_report(tmp_path, tokenizer):
    files = [str(tmp_path / name) for name in ("one.jsonl", "two.csv")]
    (tmp_path / "one.jsonl").write_text(json.dumps(PLAIN))
    (tmp_path / "two.csv").write_text("question,answer,page\nWho?,Ann,7\n")
    examples, report = load_examples(files, tokenizer, DataConfig(train=files, length=64))
    assert len(examples) == report.examples == 2
    assert report.tokens == sum(len(e["input_ids"]) for e in examples)
    first, second = str(report).split(files[1])
    assert "'page'" in second
    assert "'page'" not in first
    (tmp_path / "two.csv").write_text("question,answer\n")
    with pytest.raises(ValueError, match=r"two\.csv: 0 examples"):
        load_examples(files, tokenizer, DataConfig(train=files))


# Files.


def as_csv(rows, delimiter=","):
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(rows[0]), *(delimiter.join(map(cell, row.values())) for row in rows)]
    return ("\r\n".join(lines) + "\r\n").encode()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
UNESCAPED = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
MARK = b"\xef\xbb\xbf"


def gz(data):
    # Without a time: workers collect the same tests, and bytes are in their names.
    return gzip.compress(data, mtime=0)


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "data", "builder"),
    [
        ("rows.jsonl", UNESCAPED, "json"),
        ("rows.jsonl", MARK + JSONL, "json"),
        ("rows.JSONL", JSONL.replace(b"\n", b"\r\n"), "json"),
        ("rows.ndjson", JSONL.rstrip(), "json"),
        ("rows.json", JSONL, "json"),
        ("rows.json", ARRAY, "json"),
        ("rows.Json", MARK + ARRAY, "json"),
        ("pretty.json", b"\n".join(json.dumps(r, indent=1).encode() for r in ROWS), "json"),
        ("rows.jsonl.gz", gz(JSONL), "json"),
        ("parts.jsonl.gz", b"".join(gz(x + b"\n") for x in JSONL.splitlines()), "json"),
        ("rows.json.gz", gz(ARRAY), "json"),
        ("rows.jsonl.zst", zstd(JSONL), None),
        ("frames.JSONL.ZST", b"".join(zstd(x + b"\n") for x in JSONL.splitlines()), None),
        ("gzip.jsonl", gz(JSONL), None),  # a name that does not say it is compressed
        ("plain.jsonl.gz", JSONL, None),  # a browser has decompressed it
        ("marks.jsonl", b"".join(MARK + x + b"\n" for x in JSONL.splitlines()), None),
        ("rows.csv", as_csv(ROWS), "csv"),
        ("excel.csv", MARK + as_csv(ROWS), "csv"),
        ("rows.csv.gz", gz(as_csv(ROWS)), "csv"),
        ("rows.tsv", as_csv(ROWS, "\t"), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_is_read_as_datasets_reads_it(tmp_path, name, data, builder):
    file = tmp_path / name
    file.write_bytes(data)
    assert [row for _, row in read_rows(str(file))] == ROWS
    if builder is not None:
        datasets.disable_progress_bars()
        found = datasets.load_dataset(
            builder, data_files=str(file), split="train", cache_dir=str(tmp_path / "cache")
        )
        assert list(found) == ROWS


def test_columns_without_a_name_are_no_error(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("text,,\na,,\nb,c,\n")
    assert [row for _, row in read_rows(str(file))] == [
        {"text": "a", "column 2": "", "column 3": ""},
        {"text": "b", "column 2": "c", "column 3": ""},
    ]


def test_parquet_of_capitals_is_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.PARQUET")
    found = list(read_rows(str(tmp_path / "rows.PARQUET")))
    assert [row for _, row in found] == ROWS
    assert found[2][0] == f"{tmp_path / 'rows.PARQUET'}: row 3"


def test_cells_stay_as_they_are_written(tmp_path):
    """pandas would make 7.0 of 007, and nothing of NA."""
    file = tmp_path / "rows.csv"
    file.write_text('question,answer\nWhich?,007\nCode of Namibia?,NA\n\n"a\nb",\n')
    assert list(read_rows(str(file))) == [
        (f"{file}:2", {"question": "Which?", "answer": "007"}),
        (f"{file}:3", {"question": "Code of Namibia?", "answer": "NA"}),
        (f"{file}:5", {"question": "a\nb", "answer": ""}),
    ]


LINE = json.dumps(PLAIN).encode()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("rows.jsonl", JSONL.decode().encode("utf-16"), ":1: UTF-16"),
        ("rows.jsonl", JSONL.decode().encode("utf-16-be"), ":1: UTF-16"),
        ("rows.json", ARRAY.decode().encode("utf-16"), ":1: UTF-16"),
        ("rows.csv", as_csv(ROWS).decode().encode("utf-16"), ":1: UTF-16"),
        ("rows.jsonl", LINE + b'\n{"text": "caf\xe9"}\n', ":2: no UTF-8 .*Latin-1"),
        ("rows.json", b'[\n{"text": "a"},\n{"text": "caf\xe9"}]', ":3: no UTF-8 .*Latin-1"),
        ("rows.csv", b"text\na\ncaf\xe9\n", ":3: no UTF-8 .*Latin-1"),
        ("rows.jsonl", LINE + b'\n{"text": ' + b"[" * 20000, ":2: nested too deeply"),
        ("rows.jsonl", b'{"a": "\\ud800", "b": ' + b"[" * 985 + b"]" * 985 + b"}", ":1: "),
        ("rows.json", b"[\n" + b"[" * 20000, ":2: nested too deeply"),
        ("rows.jsonl", LINE + b'\n{"text": "a", "text": "b"}', ":2: field 'text' is there twice"),
        ("rows.jsonl", LINE + rb'\n{"text": "a \ud83d"}'.replace(rb"\n", b"\n"), ":2: .*half"),
        ("rows.json", rb'[{"text": ["a", {"b": "\udc00"}]}]', ":1: .*half"),
        ("rows.jsonl", b'{"text": "a", "n": ' + b"9" * 5000 + b"}", ":1: .*digits"),
        ("rows.jsonl", LINE + b"\n" + LINE[:20], ":2: not JSON"),
        ("rows.jsonl", LINE + b" " + LINE, ":1: not JSON"),
        ("rows.jsonl", b"<html>404</html>", ":1: not JSON"),
        ("rows.jsonl", b'{"text": "a\x00"}', ":1: "),
        ("rows.json", b"[\n" + LINE + b"\n" + LINE + b"]", ":3: not JSON"),
        ("rows.json", b"[" + LINE + b"] x", ":1: not JSON"),
        ("rows.json", b"[" + LINE + b",\n", ":2: not JSON"),
        ("rows.json", b'{\n "data": []', ":2: not JSON"),
        ("rows.csv", b"text,text\na,b\n", ":1: two columns are named 'text'"),
        ("rows.csv", b"prompt,completion\na,b\nc,d,e\n", ":3: 3 cells, .* 2 columns"),
        ("rows.csv", b"prompt,completion\na,b\nc\n", ":3: 1 cells, .* 2 columns"),
        ("rows.csv", b'prompt,completion\na,b\n"c,d\ne,f\n', ":3: no row of a table"),
        ("rows.csv", b'text\n"a"b\n', ":2: no row of a table"),
        ("rows.csv", b"prompt;completion\na;b\n", ":2: needs fields .*'prompt;completion'"),
        (
            "rows.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
            ":1: .*git lfs",
        ),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs"),
        ("rows.jsonl.gz", gz(JSONL)[:-9], ": damaged gzip"),
        ("rows.jsonl.gz", gz(JSONL) + b"more", ": damaged gzip"),
        ("rows.jsonl.zst", zstd(JSONL)[:-5], ": damaged zstd"),
        ("rows.parquet", b"PAR1" + b"\x00" * 100 + b"PAR1", ": no parquet, or damaged"),
        ("rows.parquet", b"", ": no parquet, or damaged"),
        ("rows.parquet.gz", gz(b"PAR1"), "decompress"),
        ("rows.jsonl", b"", ": 0 examples"),
        ("rows.json", b" ", ": 0 examples"),
        ("rows.json", b"[]", ": 0 examples"),
        ("rows.csv", b"", ": 0 examples"),
        ("rows.txt", b"text", "another kind than"),
        ("rows.jsonl.xz", b"\xfd7zXZ", "another kind than"),
        ("rows", LINE, "another kind than"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path, tokenizer, name, data, message):
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(str(file), tokenizer, DataConfig(train=str(file)))
    text = str(caught.value)
    assert text.startswith(str(file))
    assert len(text) < 500 + len(str(file))
    assert len(text.splitlines()) <= 3


@pytest.mark.parametrize(("name", "data"), [("a.parquet", b"PAR1"), ("a.jsonl.gz", gz(LINE))])
def test_what_it_takes_to_read_a_file_is_said(tmp_path, monkeypatch, name, data):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}: takes pyarrow .*pip install"):
        list(read_rows(str(tmp_path / name)))


def test_damaged_parquet_is_named(tmp_path):
    rows = [{"text": f"{i} pies and {i * i} nuts"} for i in range(3000)]
    file = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, file, row_group_size=500, write_page_checksum=True)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows\.parquet: row [0-9]+ or after it: .*damaged"):
        list(read_rows(str(file)))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, file)
    with pytest.raises(ValueError, match=r"rows\.parquet: two columns are named 'text'"):
        list(read_rows(str(file)))


@pytest.mark.parametrize(
    "source",
    [
        *("data.txt", "rows.jsonl.xz", "./rows", "../a/b", "/a/b", "a/b/c", "~/rows", "a/b.arrow"),
        *("rows.jsonl:train", "rows.JSON", "a\\b.csv", "rows.xlsx"),
    ],
)
def test_what_looks_like_a_file_is_never_sought_on_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets, "load_from_disk", lambda *_: pytest.fail("asked the disk"))
    with pytest.raises(FileNotFoundError, match="no such data file"):
        list(read_rows(source))


@pytest.mark.parametrize(
    "source", ["openai/gsm8k", "squad", "a/data-v1.5", "a/b.v2:test", "a/b_c:train[:10%]"]
)
def test_ids_of_the_hub_are_sought_there(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    name, _, split = source.partition(":")
    asked = []

    def load_dataset(name, split, streaming):
        assert not streaming
        asked.append((name, split))
        return datasets.Dataset.from_list([PLAIN])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_rows(source)) == [(f"{source}: row 1", PLAIN)]
    assert asked == [(name, split or "train")]


def test_a_data_set_that_breaks_off_is_named(monkeypatch):
    def rows(*_, **__):
        yield PLAIN
        raise ImportError("To support decoding images, please install 'Pillow'.")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(ValueError, match=r"^a/b: row 2: To support decoding"):
        list(read_rows("a/b"))


def test_a_saved_split_that_is_not_there_is_named(tmp_path):
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list([PLAIN])
    datasets.DatasetDict({"held_out": saved}).save_to_disk(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match=r"saved: .*train"):
        list(read_rows(str(tmp_path / "saved")))


# Bad rows.


def with_bad(tmp_path, good, *bad):
    file = tmp_path / "rows.jsonl"
    lines = [LINE.decode()] * good
    for i, line in enumerate(bad):
        lines.insert(2 * i + 1, line)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


BAD = [
    "{",
    '{"text": 1}',
    "[1]",
    r'{"prompt": "\ud800", "completion": "b"}',
    '{"prompt": "a"}',
    '{"a": 1, "a": 2}',
]


def test_bad_rows_are_skipped_counted_and_listed(tmp_path, tokenizer):
    file = with_bad(tmp_path, 1000, *BAD)
    cfg = DataConfig(train=str(file), bad_rows="skip", length=64)
    examples, report = load_examples(str(file), tokenizer, cfg)
    assert (len(examples), report.bad) == (1000, len(BAD))
    for i, text in enumerate(report.first_bad):
        assert text.startswith(f"{file}:{2 * i + 2}: ")
        assert text in str(report)
    file = with_bad(tmp_path, 2000, *["{"] * 15)
    _, report = load_examples(str(file), tokenizer, cfg)
    assert (report.bad, len(report.first_bad)) == (15, 10)


def test_too_many_bad_rows_stop_the_run(tmp_path, tokenizer):
    file = with_bad(tmp_path, 10, "{")
    cfg = DataConfig(train=str(file), bad_rows="skip", length=64)
    with pytest.raises(ValueError, match=r"rows\.jsonl: 1 of 11 rows are bad.*bad_rows_limit") as e:
        load_examples(str(file), tokenizer, cfg)
    assert f"{file}:2: not JSON" in str(e.value)
    cfg = DataConfig(train=str(file), bad_rows="skip", bad_rows_limit=0.1, length=64)
    assert load_examples(str(file), tokenizer, cfg)[1].bad == 1


@pytest.mark.parametrize("line", BAD)
def test_a_bad_row_is_an_error_by_default(tmp_path, tokenizer, line):
    file = with_bad(tmp_path, 5, line)
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: "):
        load_examples(str(file), tokenizer, DataConfig(train=str(file), length=64))


def test_whatever_a_tokenizer_raises_has_its_place(load, tokenizer, monkeypatch):
    def refuse(*_, **__):
        raise TypeError("TextEncodeInput must be Union")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: TypeError: TextEncodeInput"):
        load([PLAIN])


@pytest.mark.parametrize(
    "settings",
    [{"bad_rows": "drop"}, {"bad_rows_limit": -1.0}, {"bad_rows_limit": math.nan}],
    ids=str,
)
def test_the_config_names_the_field_at_fault(settings):
    (field,) = settings
    with pytest.raises(ValueError, match=rf"data\.{field}"):
        DataConfig(train="-", **settings)


# Rows far longer than what is asked of them.


class Watched:
    """A tokenizer that remembers the longest of the texts that it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.longest = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **options):
        assert isinstance(texts, list)
        self.longest = max(self.longest, *map(len, texts))
        return self.tokenizer(texts, **options)


def test_no_more_of_a_huge_row_is_tokenised_than_is_asked(tmp_path, tokenizer):
    text = "Ann has 3 pies and Bob has 4. " * 3000
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [PLAIN, {"text": text}])))
    watched = Watched(tokenizer)
    for overlong, count in (("drop", 1), ("truncate", 2)):
        cfg = DataConfig(train=str(file), length=32, overlong=overlong)
        examples, report = load_examples(str(file), watched, cfg)
        assert (len(examples), report.overlong) == (count, 1)
    expected = tokenizer(text)["input_ids"][:32]
    np.testing.assert_array_equal(examples[1]["input_ids"], expected)
    cfg = DataConfig(train=str(file), length=32, overlong="error")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: 90,000 characters"):
        load_examples(str(file), watched, cfg)
    assert watched.longest < 5000
    file.write_text(json.dumps({"text": "a" * 8_000_001}))
    cfg = DataConfig(train=str(file), length=32, overlong="split")
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: 8,000,001 characters .*shorter rows"):
        load_examples(str(file), watched, cfg)


# Whatever is in a file: rows, or an error that names a place.

KEYS = st.sampled_from(
    [
        "prompt",
        "completion",
        "question",
        "answer",
        "instruction",
        "input",
        "output",
        "text",
        "label",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
SEEDS = [
    JSONL,
    UNESCAPED,
    ARRAY,
    as_csv(ROWS),
    as_csv(ROWS, "\t"),
    gz(JSONL),
    zstd(JSONL),
]


@st.composite
def mutated(draw):
    """Bytes of a good file, of which some are changed, taken away, doubled or put in."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        stop = at + draw(st.integers(0, 6))
        data[at:stop] = draw(st.binary(max_size=6) | st.sampled_from([b'"', b"\n", b"\\ud8", b"["]))
    return bytes(data)


def check_any_file(directory, name, data, tokenizer):
    """Reads a file of any bytes: rows with their places, or ValueError or OSError with the file."""
    file = directory / name
    file.write_bytes(data)
    wrong = None
    try:
        for place, row in rows_or_errors(str(file)):
            assert place.startswith(str(file))
            assert isinstance(row, dict | ValueError)
            if isinstance(row, ValueError):
                assert str(row).startswith(str(file))
        cfg = DataConfig(train=str(file), length=16, bad_rows="skip", bad_rows_limit=1.0)
        load_examples(str(file), tokenizer, cfg)
    except (ValueError, OSError) as error:
        wrong = str(error)
    if wrong is not None:
        assert str(file) in wrong
        assert len(wrong.splitlines()) <= 3


quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz", "a.ndjson.zst"])


@quick
@given(name=NAMES, data=mutated() | st.binary(max_size=200))
def test_any_bytes_are_rows_or_an_error_with_a_place(tmp_path, tokenizer, name, data):
    check_any_file(tmp_path, name, data, tokenizer)


@quick
@given(data=st.binary(max_size=8), at=st.integers(0, 10**6), cut=st.integers(0, 30))
def test_any_parquet_is_rows_or_an_error_with_a_place(tmp_path, tokenizer, data, at, cut):
    file = tmp_path / "good.parquet"
    if not file.exists():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    good = file.read_bytes()
    at %= len(good)
    check_any_file(tmp_path, "a.parquet", good[:at] + data + good[at + cut :], tokenizer)


@quick
@given(rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=4), max_size=4))
def test_any_json_is_rows_or_an_error_with_a_place(tmp_path, tokenizer, rows):
    data = "\n".join(map(json.dumps, rows)).encode()
    check_any_file(tmp_path, "a.jsonl", data, tokenizer)
