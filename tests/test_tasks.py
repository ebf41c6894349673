"""Rows of all forms, what is asked of them, and how answers are judged."""

import itertools
from decimal import Decimal

import numpy as np
import pytest

from genlora_jax.data.rows import read_rows
from genlora_jax.evaluation.tasks import choices, code, match
from genlora_jax.evaluation.tasks import task as tasks
from genlora_jax.generation.answers import cut


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 and 7.\n#### 1,250", "1250"),
        ("#### $3.50 a day, 7 days", "3.5"),
        ("####", None),
        ("it is 12\n####", "12"),
        ("He has 3 and then 18.0 left.", "18"),
        ("16-3 = <<16-3=13>>13", "13"),
        ("it fell to -5", "-5"),
        ("$1,234,567.89!", "1234567.89"),
        ("of 1,2 and 3", "3"),
        ("none", None),
        ("half is .5", "0.5"),
    ],
)
def test_final_numbers(text, number):
    assert match.final_number(text) == (None if number is None else Decimal(number))


def test_answers_are_compared_as_numbers_where_the_expected_one_is_one():
    assert match.matches("so 18 of them", " 9 + 9\n#### 18")
    assert match.matches("8 crackers", "8.0")
    assert not match.matches("8 crackers", " 8 apples")
    assert match.matches(" 8 apples\n", " 8 apples")
    assert not match.matches("nothing", "8.0")
    assert not match.matches("8 apples", "8.0", "text")
    for expected in ("1,250", "$1,250", " 1250.", "1,250.00\n"):
        assert match.matches("The answer is $1,250.", expected)
        assert not match.matches("The answer is 1.", expected)
    assert cut("a Question: b\n\nc", ["\n\n", "Question:"]) == "a "


ASKED = "Please choose the correct answer to the question: Who?\n\nAnswer1: a cat Answer2: a dog"
HUB = {"text": ["a cat", "a dog"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who?", "choices": ["a cat", "a dog"], "answer": 1},
        {"question": "Who?", "choices": HUB, "answerKey": "2"},
        {"question_stem": "Who?", "choices": HUB, "answerKey": "2"},
        {"instruction": f"{ASKED}\n\nAnswer format: answer1/answer2", "answer": "answer2"},
    ],
)
def test_forms_of_a_question_with_options(row):
    item, _ = choices._item("here", row)
    assert item == choices.Item("Who?", ["a cat", "a dog"], 1)
    assert choices.formatted(item, "text") == ("Question: Who?\nAnswer:", ["a cat", "a dog"])
    lettered = "Question: Who?\nA. a cat\nB. a dog\nAnswer:"
    assert choices.formatted(item, "letter") == (lettered, ["A", "B"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "choices": ["a", "b"], "answer": 2}, "here: answer must be an index"),
        ({"question": "Who?", "choices": ["a", "b"], "answer": True}, "answer must be an index"),
        ({"question": "Who?", "choices": "ab", "answer": 0}, "choices must be a list"),
        ({"choices": ["a", "b"], "answer": 0}, "'question' is missing"),
        ({"question": "Who?", "choices": HUB, "answerKey": "C"}, "answerKey 'C'"),
        ({"question": "Who?", "choices": HUB | {"label": None}, "answerKey": "C"}, "answerKey 'C'"),
        ({"instruction": "Who?", "answer": "answer1"}, "no question with Answer1"),
        (
            {"instruction": f"{ASKED}\n\nAnswer format: answer1/answer2", "answer": "answer3"},
            "answer 'answer3' is none of",
        ),
    ],
)
def test_bad_questions_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        choices._item("here", row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a"},
        {"question": "a"},
        {"messages": []},
        {"messages": ["hi", "there"]},
        {"messages": [{"role": "assistant", "content": "a"}]},
        {"text": "a"},
    ],
)
def test_bad_problems_are_named(row):
    with pytest.raises(ValueError, match="here: "):
        match._problem("here", row)


def test_worked_examples_come_first():
    shown = [("Q: a\nA:", " b")]
    assert tasks.with_examples("Q: c\nA:", shown) == "Q: a\nA: b\n\nQ: c\nA:"
    turns = [{"role": "user", "content": "Q: a\nA:"}, {"role": "assistant", "content": "b"}]
    asked = {"role": "user", "content": "Q: c\nA:"}
    assert tasks.with_examples("Q: c\nA:", shown, chat=True) == [*turns, asked]
    with pytest.raises(ValueError, match="shots"):
        tasks.with_examples([asked], shown)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_pass_at_k_is_the_share_of_subsets_with_one_that_passes(k):
    for passed in range(6):
        programs = [i < passed for i in range(5)]
        subsets = list(itertools.combinations(programs, k))
        assert code.pass_at_k(5, passed, k) == pytest.approx(np.mean([any(s) for s in subsets]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"samples": 0}, "samples must be a whole number >= 1"),
        ({"samples": 4}, "set temperature"),
        ({"temperature": -1.0}, "temperature must be a finite number >= 0"),
        ({"top_p": 0.0}, "top_p must lie"),
        ({"max_new_tokens": -3}, "max_new_tokens must be a whole number >= 1"),
    ],
)
def test_settings_of_answers_that_cannot_be_are_named(settings, message):
    for config in (match.MatchConfig, code.CodeConfig):
        with pytest.raises(ValueError, match=message):
            config(data="x", **settings)


def test_programs_take_time_and_cover_k():
    with pytest.raises(ValueError, match="k must lie between 1 and samples"):
        code.CodeConfig(data="x", k=[2])
    with pytest.raises(ValueError, match=r"seconds \(0\)"):
        code.CodeConfig(data="x", seconds=0)


def test_more_options_than_letters_are_named():
    item = choices.Item("Which?", [str(i) for i in range(27)], 0)
    with pytest.raises(ValueError, match=r"26 letters, 27 options .*Which"):
        choices.formatted(item, "letter")


def test_rows_that_do_not_suit_the_settings_are_named():
    problems = [match.Problem("How many?", " 3"), match.Problem("How many?", " many")]
    match.check(match.MatchConfig(data="x"), problems)
    with pytest.raises(ValueError, match=r"match.answer is number, and ' many' has none"):
        match.check(match.MatchConfig(data="x", answer="number"), problems)
    plain = [choices.Item("Ann has", ["a", "b"], 0, plain=True)]
    choices.check(choices.ChoicesConfig(data="x"), plain)
    with pytest.raises(ValueError, match="needs rows with question"):
        choices.check(choices.ChoicesConfig(data="x", style="letter"), plain)


def test_a_json_array_is_read_like_lines(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[\n {"text": "a"},\n {"text": "b"}\n]')
    assert list(read_rows(str(file))) == [
        (f"{file}:2", {"text": "a"}),
        (f"{file}:3", {"text": "b"}),
    ]
    for text, message in (('[{"text": 1},\n', ":2: not JSON"), ("[1]", ":1: a row must be")):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_rows(str(file)))


@pytest.mark.shared
def test_every_real_row_can_be_asked(shared):
    counts = {}
    for name in ("arc_easy/train", "arc_easy/test", "openbookqa/train", "openbookqa/test"):
        items = choices.read(str(shared / "data" / f"{name}.json"))
        counts[name] = len(items)
        for item in items:
            for style in ("text", "letter"):
                prompt, options = choices.formatted(item, style)
                assert prompt.endswith("Answer:")
                assert len(options) >= 3
    for name in ("gsm8k/train.jsonl", "gsm8k/test.jsonl", "svamp/test.json"):
        problems = match.read(str(shared / "data" / name))
        counts[name] = len(problems)
        assert all(match.matches(p.expected, p.expected, "number") for p in problems)
    exercises = code.read(str(shared / "data" / "mbpp.jsonl"))
    for exercise in exercises:
        compile(code.trial(exercise, exercise.solution).program, "mbpp", "exec")
    assert {**counts, "mbpp": len(exercises)} == {
        "arc_easy/train": 2251,
        "arc_easy/test": 2376,
        "openbookqa/train": 4957,
        "openbookqa/test": 500,
        "gsm8k/train.jsonl": 7473,
        "gsm8k/test.jsonl": 1319,
        "svamp/test.json": 1000,
        "mbpp": 974,
    }
