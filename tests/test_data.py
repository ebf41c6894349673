"""Rows to batches: what is trained, what is left out, and how examples are packed."""

import json
import random
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny_base import TOKENIZER
from tiny_models import perturb, random_llama
from transformers import AutoTokenizer

import genlora_jax as gl
from genlora_jax.data.batches import train_batches
from genlora_jax.data.config import DataConfig
from genlora_jax.data.encode import load_examples
from genlora_jax.data.packing import eval_batches, max_segments
from genlora_jax.data.sources import MemorySource
from genlora_jax.evaluation.tasks import match
from genlora_jax.training.losses import cross_entropy, next_token_targets
from genlora_jax.training.step_options import StepOptions

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Shows the last answer as it is and an earlier one without what is in brackets.
FORGETFUL = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{{ m['content'] if loop.last else m['content'].split(']')[-1] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROBLEM = {"prompt": "Ann has 3 pies.", "completion": " 3 pies"}
TALK = {
    "messages": [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "Two pies?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "And one?"},
        {"role": "assistant", "content": "Three, I say."},
    ]
}
LONG = " ".join(["Ann has 3 pies and Bob has 4."] * 4)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.fixture
def load(tmp_path, tokenizer):
    """A function that writes rows to a JSONL file and reads it."""

    def read(rows, **settings):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        cfg = DataConfig(train=str(file), **({"length": 64} | settings))
        return load_examples(str(file), tokenizer, cfg)

    return read


def trained_text(tokenizer, example):
    return tokenizer.decode(example["input_ids"][example["loss_mask"]])


def whole_text(tokenizer, example):
    return tokenizer.decode(example["input_ids"])


def random_examples(count, longest, seed=0, vocab=512):
    """Examples that are all different: the first token is the example's number."""
    rng = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        ids = rng.integers(3, vocab, rng.integers(2, longest + 1)).astype(np.int32)
        ids[0] = i
        mask = rng.random(len(ids)) < 0.6
        mask[-1] = True
        examples.append({"input_ids": ids, "loss_mask": mask})
    return examples


def segments(batch):
    """The examples in a batch, in the order of rows, as (ids, mask) tuples."""
    found = []
    for ids, mask, segment, position in zip(
        *(np.asarray(batch[k]) for k in ("input_ids", "loss_mask", "segment_ids", "positions")),
        strict=True,
    ):
        for number in range(1, segment.max(initial=0) + 1):
            (places,) = np.nonzero(segment == number)
            assert len(places) > 0, "a segment number is skipped"
            assert (np.diff(places) == 1).all(), "an example is torn apart"
            assert position[places].tolist() == list(range(len(places)))
            found.append((tuple(ids[places].tolist()), tuple(mask[places].tolist())))
        padding = segment == 0
        assert not mask[padding].any()
        assert not np.diff(padding.astype(int)).min(initial=0) < 0, "padding inside a row"
    return found


def as_tuples(examples):
    return [(tuple(e["input_ids"].tolist()), tuple(e["loss_mask"].tolist())) for e in examples]


def take(dataset, count):
    iterator = iter(dataset)
    return [next(iterator) for _ in range(count)]


def order(batches):
    """Numbers of the examples, as `random_examples` numbers them."""
    return [ids[0] for batch in batches for ids, _ in segments(batch)]


# What is trained.


def test_a_completion_is_trained_with_its_end_and_its_prompt_is_not(load, tokenizer):
    (example,), report = load([PROBLEM])
    assert trained_text(tokenizer, example) == " 3 pies</s>"
    assert whole_text(tokenizer, example) == "<s>Ann has 3 pies. 3 pies</s>"
    assert (report.examples, report.tokens) == (1, len(example["input_ids"]))
    assert report.trained_tokens == example["loss_mask"].sum()


def test_a_completion_that_brings_its_own_end_gets_no_second_one(load, tokenizer):
    (plain,), _ = load([PROBLEM])
    (ended,), _ = load([PROBLEM | {"completion": PROBLEM["completion"] + "</s>"}])
    np.testing.assert_array_equal(plain["input_ids"], ended["input_ids"])
    np.testing.assert_array_equal(plain["loss_mask"], ended["loss_mask"])


@pytest.mark.parametrize("name", ["question", "instruction"])
def test_a_question_is_asked_as_in_evaluation(load, tokenizer, name):
    row = {name: "How many?", "answer": "3"}
    problem, _ = match._problem("here", row)
    (plain,), _ = load([{"prompt": problem.prompt, "completion": problem.expected}])
    (asked,), _ = load([row])
    assert as_tuples([asked]) == as_tuples([plain])
    assert whole_text(tokenizer, asked) == "<s>Question: How many?\nAnswer: 3</s>"
    (text,), _ = load([row | {"text": "Ann has 3 pies."}])
    assert whole_text(tokenizer, text) == "<s>Ann has 3 pies.</s>"


def test_characters_of_several_bytes_are_trained_whole(load, tokenizer):
    (example,), _ = load([{"prompt": "Zoë é →", "completion": " naïve ☃ done"}])
    assert trained_text(tokenizer, example) == " naïve ☃ done</s>"


def test_every_turn_of_the_assistant_is_trained_with_its_end_mark(load, tokenizer):
    tokenizer.chat_template = CHAT
    (example,), _ = load([TALK], length=128)
    assert trained_text(tokenizer, example) == "Two.</s>\nThree, I say.</s>\n"
    assert whole_text(tokenizer, example) == tokenizer.apply_chat_template(
        TALK["messages"], tokenize=False
    )


def test_a_text_is_trained_whole(load, tokenizer):
    (example,), _ = load([{"text": "Bob has 4 nuts."}])
    assert trained_text(tokenizer, example) == "Bob has 4 nuts.</s>"
    assert whole_text(tokenizer, example) == "<s>Bob has 4 nuts.</s>"


@pytest.mark.parametrize("row", [PROBLEM, {"text": "Bob has 4 nuts."}], ids=["problem", "text"])
def test_the_end_is_trained_even_if_padding_has_its_id(load, tokenizer, row):
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = load([row], batch_size=1)
    assert trained_text(tokenizer, examples[0]).endswith("</s>")
    (batch,) = eval_batches(MemorySource(examples), DataConfig(train="-", length=64, batch_size=1))
    targets, weights = next_token_targets(jax.tree.map(jnp.asarray, batch))
    assert int((targets == tokenizer.eos_token_id)[weights > 0].sum()) == 1


# Where rows come from.


def test_jsonl_parquet_and_saved_data_sets_hold_the_same_rows(tmp_path, load, tokenizer):
    rows = [PROBLEM, {"prompt": "Bob?", "completion": " Nuts."}]
    expected, _ = load(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_list(rows)
    saved.save_to_disk(tmp_path / "saved")
    splits = {"train": saved.select([0]), "held_out": saved}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "splits")
    for source in ("rows.parquet", "saved", "splits:held_out"):
        source = str(tmp_path / source)
        examples, report = load_examples(source, tokenizer, DataConfig(train=source, length=64))
        assert as_tuples(examples) == as_tuples(expected)
        assert report.source == source
    source = str(tmp_path / "splits")
    examples, _ = load_examples(source, tokenizer, DataConfig(train=source, length=64))
    assert as_tuples(examples) == as_tuples(expected[:1])


def test_messages_come_from_parquet_too(tmp_path, load, tokenizer):
    tokenizer.chat_template = CHAT
    expected, _ = load([TALK], length=128)
    file = tmp_path / "talks.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TALK]), file)
    examples, _ = load_examples(str(file), tokenizer, DataConfig(train=str(file), length=128))
    assert as_tuples(examples) == as_tuples(expected)


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path, tokenizer, name):
    file = str(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=name):
        load_examples(file, tokenizer, DataConfig(train=file))


@pytest.mark.shared
def test_real_questions_are_trained_as_they_come(shared, tokenizer):
    files = [str(shared / "data" / "gsm8k" / f"{name}.jsonl") for name in ("train", "test")]
    cfg = DataConfig(train=files, overlong="truncate")
    examples, report = load_examples(files, tokenizer, cfg)
    assert report.examples == 7473 + 1319
    assert trained_text(tokenizer, examples[-1]).removesuffix("</s>").rstrip()[-1].isdigit()


def test_several_sources_are_read_one_after_another(tmp_path, tokenizer):
    files = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    for number, file in enumerate(files):
        Path(file).write_text(json.dumps(PROBLEM | {"completion": f" {number} pies"}) + "\n")
    examples, report = load_examples(files, tokenizer, DataConfig(train=files))
    assert [trained_text(tokenizer, e) for e in examples] == [" 0 pies</s>", " 1 pies</s>"]
    assert report.source == ", ".join(files)
    Path(files[1]).write_text("[]")
    with pytest.raises(ValueError, match=r"two\.jsonl:1"):
        load_examples(files, tokenizer, DataConfig(train=files))


@pytest.mark.parametrize("line", ['{"prompt": "a", ', "[1, 2]", '"text"'])
def test_a_bad_line_is_named_with_its_number(tmp_path, tokenizer, line):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(PROBLEM)}\n\n{line}\n{json.dumps(PROBLEM)}\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:3: .*JSON"):
        load_examples(str(file), tokenizer, DataConfig(train=str(file)))


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({"prompt": "Ann?"}, "completion"),
        ({"completion": "Ann."}, "prompt"),
        ({"prompt": "Ann?", "completion": 3}, "completion"),
        ({"question": "Ann?"}, "answer"),
        ({"rows": "Ann?"}, "question and answer"),
        ({"messages": "Ann?"}, "messages"),
        ({"messages": [{"content": "Ann?"}]}, "role"),
    ],
    ids=str,
)
def test_a_row_without_its_fields_is_named(load, tokenizer, row, named):
    tokenizer.chat_template = CHAT
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{named}"):
        load([PROBLEM, row])


def test_messages_need_a_chat_template(load):
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*chat template"):
        load([TALK])


def test_a_turn_that_a_template_rewrites_later_has_an_example_of_its_own(load, tokenizer):
    tokenizer.chat_template = FORGETFUL
    plain, _ = load([TALK], length=128)
    assert trained_text(tokenizer, plain[0]) == "Two.</s>\nThree, I say.</s>\n"
    talk = json.loads(json.dumps(TALK))
    talk["messages"][2]["content"] = "[1 + 1] Two."
    examples, report = load([talk], length=128)
    assert [trained_text(tokenizer, example) for example in examples] == [
        "Three, I say.</s>\n",
        "[1 + 1] Two.</s>\n",
    ]
    assert "1 conversations in several examples" in str(report)


# What is left out.


def test_an_empty_set_is_refused(load):
    with pytest.raises(ValueError, match=r"rows\.jsonl: 0 examples.*nothing to train on"):
        load([])


def test_rows_without_a_completion_are_counted_and_left_out(load):
    idle = PROBLEM | {"completion": ""}
    examples, report = load([idle, PROBLEM, idle, {"text": ""}])
    assert len(examples) == report.examples == 1
    assert report.without_completion == 3
    assert "3 rows with nothing to train on" in str(report)


def test_a_set_of_such_rows_alone_is_refused(load):
    with pytest.raises(ValueError, match="2 rows with nothing to train on"):
        load([PROBLEM | {"completion": ""}] * 2)


def test_a_conversation_without_the_assistant_is_left_out(load, tokenizer):
    tokenizer.chat_template = CHAT
    _, report = load([PROBLEM, {"messages": TALK["messages"][:2]}])
    assert (report.examples, report.without_completion) == (1, 1)


def test_overlong_rows_are_dropped(load):
    examples, report = load([PROBLEM, {"text": LONG}], length=16, overlong="drop")
    assert (len(examples), report.overlong, report.without_completion) == (1, 1, 0)
    assert "1 rows longer than data.length, left out" in str(report)


def test_overlong_rows_are_truncated(load):
    (whole,), _ = load([{"text": LONG}], length=512)
    hopeless = {"prompt": LONG, "completion": " yes"}  # its completion lies beyond the cut
    examples, report = load([PROBLEM, {"text": LONG}, hopeless], length=16, overlong="truncate")
    assert (len(examples), report.overlong, report.without_completion) == (2, 2, 1)
    np.testing.assert_array_equal(examples[1]["input_ids"], whole["input_ids"][:16])
    np.testing.assert_array_equal(examples[1]["loss_mask"], whole["loss_mask"][:16])


def test_overlong_rows_are_split_without_losing_a_token(load):
    (whole,), _ = load([{"text": LONG}], length=512)
    assert len(whole["input_ids"]) % 16 != 1  # a piece of one token would have no target
    examples, report = load([PROBLEM, {"text": LONG}], length=16, overlong="split")
    pieces = examples[1:]
    assert report.overlong == 1
    assert {len(piece["input_ids"]) for piece in pieces[:-1]} == {16}
    for field in ("input_ids", "loss_mask"):
        joined = np.concatenate([piece[field] for piece in pieces])
        np.testing.assert_array_equal(joined, whole[field])


def test_overlong_rows_are_an_error_if_asked(load):
    (whole,), _ = load([{"text": LONG}], length=512)
    count = len(whole["input_ids"])
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: {count} tokens.*data\.length = 16"):
        load([PROBLEM, {"text": LONG}], length=16, overlong="error")
    examples, _ = load([PROBLEM, {"text": LONG}], length=count, overlong="error")
    assert len(examples) == 2  # of the very length: not too long


@pytest.mark.parametrize(
    "settings",
    [{"length": 1}, {"batch_size": 0}, {"overlong": "keep"}, {"train": []}, {"eval": ""}],
    ids=str,
)
def test_the_config_names_the_field_at_fault(settings):
    (field,) = settings
    with pytest.raises(ValueError, match=rf"data\.{field}"):
        DataConfig(**({"train": "-"} | settings))


# Batches.


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("epochs", [1, 3])
def test_every_example_appears_once_an_epoch(pack, epochs):
    examples = random_examples(23, 16)
    cfg = DataConfig(train="-", length=16, batch_size=4, pack=pack)
    batches = list(train_batches(MemorySource(examples), cfg, epochs=epochs))
    for batch in batches:
        assert {name: value.shape for name, value in batch.items()} == dict.fromkeys(
            ("input_ids", "loss_mask", "segment_ids", "positions"), (4, 16)
        )
        assert {name: value.dtype.kind for name, value in batch.items()} == {
            "input_ids": "i",
            "loss_mask": "b",
            "segment_ids": "i",
            "positions": "i",
        }
    seen = [example for batch in batches for example in segments(batch)]
    assert sorted(seen) == sorted(as_tuples(examples) * epochs)


def test_packing_saves_rows_and_its_absence_gives_each_example_one():
    examples = random_examples(40, 8)
    cfg = DataConfig(train="-", length=16, batch_size=4)
    alone = DataConfig(train="-", length=16, batch_size=4, pack=False)
    packed, single = (
        list(train_batches(MemorySource(examples), c, epochs=1)) for c in (cfg, alone)
    )
    assert len(single) == 10
    assert all((batch["segment_ids"].max(axis=1) == 1).all() for batch in single)
    assert len(packed) <= 5  # 5 tokens on average, 16 in a row


def test_every_epoch_has_its_own_order_and_the_seed_decides_it():
    examples = random_examples(24, 8)

    def epochs(seed):
        cfg = DataConfig(train="-", length=8, batch_size=4, pack=False, seed=seed)
        numbers = order(take(train_batches(MemorySource(examples), cfg), 18))
        return [numbers[i : i + 24] for i in range(0, 72, 24)]

    first, second, third = epochs(0)
    for epoch in (first, second, third):
        assert sorted(epoch) == list(range(24))
    assert first != list(range(24))
    assert first != second != third != first
    assert epochs(0) == [first, second, third]
    assert epochs(1)[0] != first


@pytest.mark.parametrize("pack", [True, False])
def test_an_iterator_goes_on_where_another_stood(pack):
    examples = random_examples(17, 12)
    cfg = DataConfig(train="-", length=16, batch_size=3, pack=pack)
    expected = take(train_batches(MemorySource(examples), cfg), 12)
    iterator = train_batches(MemorySource(examples), cfg)
    states = []
    for _ in range(8):  # more than an epoch
        states.append(json.dumps(iterator.get_state()))
        next(iterator)
    # In another order, and in an iterator that has been used: no trace of before may remain.
    other = train_batches(MemorySource(examples), cfg)
    for at in random.Random(0).sample(range(8), 8):
        other.set_state(json.loads(states[at]))
        for batch in expected[at : at + 4]:
            jax.tree.map(np.testing.assert_array_equal, next(other), batch)


@pytest.mark.parametrize("pack", [True, False])
def test_evaluation_sees_every_example_once_in_order(pack):
    examples = random_examples(13, 16)
    cfg = DataConfig(train="-", length=16, batch_size=4, pack=pack)
    batches = eval_batches(MemorySource(examples), cfg)
    assert {value.shape for batch in batches for value in batch.values()} == {(4, 16)}
    seen = [example for batch in batches for example in segments(batch)]
    if pack:  # best fit: an example may find room in an earlier row
        assert sorted(seen) == sorted(as_tuples(examples))
    else:
        assert seen == as_tuples(examples)
        assert len(batches) == 4
        assert (batches[-1]["segment_ids"].max(axis=1) == [1, 0, 0, 0]).all()


def test_no_batch_of_nothing_but_padding_is_made():
    examples = random_examples(8, 16)
    cfg = DataConfig(train="-", length=16, batch_size=4, pack=False)
    assert len(eval_batches(MemorySource(examples), cfg)) == 2


def test_packed_examples_lose_what_they_lose_alone():
    model, params = random_llama(num_hidden_layers=2)
    cfg = gl.LoRAConfig(rank=3, targets=["q_proj", "v_proj", "up_proj"])
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))
    factors = gl.generate_factors(cfg, adapter)
    examples = random_examples(11, 16, vocab=61)
    loss = jax.jit(lambda batch: cross_entropy(model, params, factors, batch, StepOptions())[0])
    shape = {"train": "-", "length": 24, "batch_size": 3}
    packed = eval_batches(MemorySource(examples), DataConfig(**shape))
    alone = [eval_batches(MemorySource([e]), DataConfig(**shape, pack=False))[0] for e in examples]
    assert max(int(batch["segment_ids"].max()) for batch in packed) > 1
    together = sum(float(loss(batch)) for batch in packed)
    single = [float(loss(batch)) for batch in alone]
    assert min(single) > 0
    assert together == pytest.approx(sum(single), rel=1e-5)


@pytest.mark.parametrize("length", [1024, 2048])
def test_no_row_has_more_segments_than_attention_expects_its_padding_included(length):
    cfg = DataConfig(train="-", length=length, batch_size=4)
    sizes = [*[40] * 60, *[length - 4] * 30]
    examples = [{"input_ids": np.ones(n, np.int32), "loss_mask": np.ones(n, bool)} for n in sizes]
    most = max_segments(MemorySource(examples), cfg)
    batches = [
        *eval_batches(MemorySource(examples), cfg),
        *train_batches(MemorySource(examples), cfg, epochs=1),
    ]
    changes = [np.diff(batch["segment_ids"], axis=1) != 0 for batch in batches]
    # The first rows of an evaluation hold nothing but short examples.
    assert max(change.sum(axis=1).max() + 1 for change in changes) == most
    tokens = sum(int((batch["segment_ids"] != 0).sum()) for batch in batches)
    assert tokens == 2 * sum(sizes)


def test_rows_of_many_short_segments_have_no_bound():
    examples = [{"input_ids": np.ones(10, np.int32), "loss_mask": np.ones(10, bool)}] * 50
    cfg = DataConfig(train="-", length=256, batch_size=1)
    assert max_segments(MemorySource(examples), cfg) is None
    assert eval_batches(MemorySource(examples), cfg)[0]["segment_ids"].max() == 25
