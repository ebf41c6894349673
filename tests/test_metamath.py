"""PEFT's protocol on MetaMathQA: batches, the judgement of answers, and a run on a tiny base."""

import argparse
import json

import numpy as np
import pytest
from tiny_base import TOKENIZER, write_base

from train.benchmarks import metamath

ROWS = [
    (
        f"What is {i} plus {i}?" + " Mind the sum." * (i % 3),
        f"It is {2 * i}.\nThe answer is: {2 * i}",
    )
    for i in range(11)
]


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("equal to $4^2 = \\boxed{16}$.The answer is: 16", "The answer is: 16", True),
        ("so 5 + 3 = 8.\nThe answer is 8.", "He has 5+3=<<5+3=8>>8.\n#### 8", True),
        ("The final answer is: $18.00.", "#### 18", True),
        ("The answer is: 20/35", "The answer is: 4/7", True),
        ("The answer is: 50%", "#### 50", True),
        ("The answer is: 8\n\nQuestion: 9", "#### 8", True),
        ("The answer is: 9. No. The answer is: 8", "#### 8", True),
        ("The answer is: x+1", "The answer is: x+1", True),
        ("The answer is: 1/0", "The answer is: 5", False),
        ("The answer is: 7", "#### 8", False),
        ("It is 8", "#### 8", False),
        ("The answer is: eight", "#### 8", False),
    ],
)
def test_answers_are_judged_as_peft_does(given, expected, right):
    assert metamath.is_right(given, expected) is right


def test_a_row_without_an_answer_is_refused():
    with pytest.raises(ValueError, match="no final answer in the row's response"):
        metamath.is_right("The answer is: 1", "nothing")


def test_batches_are_those_of_transformers_padded_with_end_tokens():
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.pad_token = tokenizer.eos_token
    found = list(metamath.batches(ROWS, tokenizer, 4, width=16))
    assert [len(batch["input_ids"]) for batch in found] == [4, 4, 4]
    texts = [metamath.TEMPLATE.format(query=query) + response for query, response in ROWS]
    order = sorted(texts, key=lambda text: -len(tokenizer(text)["input_ids"]))
    for i, batch in enumerate(found):
        chosen = order[4 * i : 4 * i + 4]
        padded = tokenizer(chosen, padding=True, padding_side="right", return_tensors="np")
        ids, counts = padded["input_ids"], padded["attention_mask"].sum(axis=1)
        # The first padding is trained: it is the end token.
        trained = np.arange(ids.shape[1])[None] <= counts[:, None]
        rows, width = ids.shape
        assert batch["input_ids"].shape[1] % 16 == 0
        np.testing.assert_array_equal(batch["loss_mask"][:rows, :width], trained)
        np.testing.assert_array_equal(batch["input_ids"][:rows, :width][trained], ids[trained])
        assert not batch["loss_mask"][:, width:].any()
        assert not batch["loss_mask"][rows:].any()


def run(tmp_path, rates, **more):
    """A small run's result."""
    tmp_path.mkdir(exist_ok=True)
    base = write_base(tmp_path / "base", max_position_embeddings=512)
    metamath_rows = [
        {"query": query, "response": response, "type": "x"} for query, response in ROWS
    ]
    gsm8k = [{"question": query, "answer": f"#### {i}"} for i, (query, _) in enumerate(ROWS)]
    (tmp_path / "gsm8k").mkdir()
    for file, rows in (
        ("metamath.jsonl", metamath_rows),
        ("gsm8k/train.jsonl", gsm8k),
        ("gsm8k/test.jsonl", gsm8k),
    ):
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    adapter = {"method": "genlora", "rank": 4, "group_size": 4, "targets": ["q_proj"]}
    arguments = {
        "base": base,
        "adapter": json.dumps(adapter),
        "name": "genlora/tiny",
        "metamath": tmp_path / "metamath.jsonl",
        "gsm8k": tmp_path / "gsm8k",
        "steps": 4,
        "eval-steps": 2,
        "max-new-tokens": 3,
        "dtype": "float32",
        "out": tmp_path / "result.json",
    }
    given = [part for k, v in (arguments | more).items() for part in (f"--{k}", str(v))]
    metamath.main([*given, "--rate", *map(str, rates)])
    return json.loads((tmp_path / "result.json").read_text())


def test_a_run_writes_the_fields_of_peft(tmp_path, capsys):
    result = run(tmp_path, [1e-3])
    assert set(result) == {"run_info", "train_info", "meta_info"}
    info = result["train_info"]
    assert [metric["step"] for metric in info["metrics"]] == [2, 4, 4]
    assert [("test accuracy" in metric) for metric in info["metrics"]] == [False, False, True]
    assert info["metrics"][-1]["train samples"] == 16
    assert info["num_trainable_params"] == 2 * (24 + 24) + 2 * 4 * 4 * 4
    assert result["run_info"]["train_config"]["max_steps"] == 4
    shown = capsys.readouterr().out
    assert "genlora/tiny (ours)" in shown
    assert "lora r=32" in shown


def test_the_loss_of_rows_that_are_not_trained_chooses_the_rate(tmp_path, capsys):
    result = run(tmp_path, [1e-12, 1e-2], **{"held-out": 1})
    losses = {float(rate): loss for rate, loss in result["held_out_losses"].items()}
    assert losses[1e-2] < losses[1e-12]
    assert result["run_info"]["train_config"]["optimizer_kwargs"]["lr"] == 1e-2
    assert capsys.readouterr().out.count('test accuracy"') == 1
    with pytest.raises(SystemExit):
        run(tmp_path / "second", [1e-3, 1e-2])
    assert "--held-out" in capsys.readouterr().err
    some = metamath.Data.of(arguments_of(tmp_path, held_out=1))
    assert [*some.tuned, *some.held_out] == [*metamath.Data.of(arguments_of(tmp_path)).tuned]
    assert len(some.held_out) == 1
    with pytest.raises(SystemExit, match=f"has {len(ROWS)} rows"):
        metamath.Data.of(arguments_of(tmp_path, held_out=len(ROWS)))


def test_the_time_of_training_has_that_of_the_batches(tmp_path, monkeypatch):
    clock, made = [0.0], metamath.batches

    def slow(*arguments):
        for batch in made(*arguments):
            clock[0] += 10.0
            yield batch

    monkeypatch.setattr(metamath, "batches", slow)
    monkeypatch.setattr(metamath.time, "perf_counter", lambda: clock[0])
    # The device works while the host makes the next batch.
    assert run(tmp_path, [1e-3])["train_info"]["train_time"] == 4 * 10.0


def arguments_of(tmp_path, held_out=0):
    """What says which rows are read."""
    return argparse.Namespace(
        metamath=str(tmp_path / "metamath.jsonl"),
        gsm8k=str(tmp_path / "gsm8k"),
        held_out=held_out,
        test_rows=None,
    )
