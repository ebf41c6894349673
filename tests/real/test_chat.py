"""Conversations that people have, in templates that behave as well-known ones do.

The right tokens and masks are those of transformers' `apply_chat_template`.
"""

import json
import threading
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_base import TOKENIZER, write_base
from transformers import AddedToken, AutoTokenizer

from genlora_jax import cli
from genlora_jax.data import chat
from genlora_jax.data.chat import chat_passages, end_of_turn_token_ids
from genlora_jax.data.config import DataConfig
from genlora_jax.data.conversation import Conversation, conversation
from genlora_jax.data.encode import encode, load_examples
from genlora_jax.evaluation.tasks import match
from genlora_jax.generation.subject import Subject
from genlora_jax.training import finetune, setup
from genlora_jax.training.show import shown
from genlora_jax.training.sweep import sweep

# In these templates `[[` and `]]` stand for the marks of what the assistant writes, which some
# tokenizers' templates have and most have not.
CALL = "<call>{{ {'name': f.name, 'arguments': f.arguments} | tojson }}</call>"
CALLS = f"{{% for c in m.tool_calls or [] %}}{{% set f = c.function or c %}}{CALL}{{% endfor %}}"
CHATML = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}[[{{ m.content }}" + CALLS + "<|im_end|>\n]]"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As Llama 3.1: texts are trimmed, tools stand in the user's first message, one call at a time.
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' }}{% if m.role == 'assistant' %}[[{% if m.tool_calls %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
    "{% set f = m.tool_calls[0].function %}{{ {'name': f.name, 'parameters': f.arguments} | tojson "
    "}}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>]]{% else %}{% if tools and m.role == "
    "'user' and loop.first %}{% for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}{% endif %}"
    "{{ m.content | trim }}<|eot_id|>{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# As Gemma: no system message, user and model in turns.
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>model\n' }}[[{{ m.content | trim + '<|im_end|>\n' }}]]{% else %}"
    "{{ '<|im_start|>user\n' + m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)
# As Mistral: the system message and the tools stand before the user's last message, no cue.
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if system else messages %}{% set ns = namespace(last=0) %}"
    "{% for m in turns %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{{ bos_token }}{% for m in turns %}{% if m.role == 'user' %}{% if loop.index0 == "
    "ns.last %}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}[INST] {{ system }}{% else %}"
    "[INST] {% endif %}{{ m.content }}[/INST]{% elif m.role == 'tool' %}[RESULT]{{ {'content': "
    "m.content} | tojson }}{% else %}[[{{ ' ' }}{{ m.content }}" + CALLS + "{{ eos_token }}]]"
    "{% endif %}{% endfor %}"
)
# As Qwen3: earlier turns lose their thoughts, the last has some, perhaps empty.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "if '</think>' in m.content else '' %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ said }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined "
    "and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
FLAGS = [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False, "weight": 0}]
FLAGS += [{"trainable": False}, {"loss": False}]
ASKED = [{"role": "user", "content": "Two pies?"}]
TALK = [
    *ASKED,
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "Three, I say."},
]
RULED = [{"role": "system", "content": "You count."}, *TALK]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "count",
            "description": "Counts.",
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
        },
    }
]
ARGUMENTS = {"of": "pies", "é": [1, None]}
CALLED = [
    *ASKED,
    {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "count", "arguments": ARGUMENTS}}],
    },
    {"role": "tool", "content": 'They are "2"'},
    {"role": "assistant", "content": "Two."},
]


def plain(template):
    return template.replace("[[", "").replace("]]", "")


def marked(template):
    return template.replace("[[", "{% generation %}").replace("]]", "{% endgeneration %}")


@pytest.fixture
def tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    added = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_tokens([AddedToken(t, special=True) for t in added], special_tokens=True)
    return tokenizer


@pytest.fixture
def read(tmp_path, tokenizer):
    """A function that writes rows after a good one and reads them: the examples, and the report."""

    def read(*rows, template=CHATML):
        tokenizer.chat_template = template if isinstance(template, dict) else plain(template)
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ({"text": "Hi."}, *rows)))
        cfg = DataConfig(train=str(file), length=4096)
        examples, report = load_examples(str(file), tokenizer, cfg)
        return examples[1:], report

    return read


@pytest.fixture
def rendered(tokenizer):
    """A function that has transformers render a conversation: ids, and the assistant's mask."""

    def rendered(messages, template=CHATML, **options):
        out = tokenizer.apply_chat_template(
            messages,
            chat_template=marked(template),
            return_dict=True,
            return_assistant_tokens_mask=True,
            **options,
        )
        return out["input_ids"], [bool(x) for x in out["assistant_masks"]]

    return rendered


def parts(example):
    return example["input_ids"].tolist(), example["loss_mask"].tolist()


def trained(tokenizer, example):
    return tokenizer.decode(example["input_ids"][example["loss_mask"]])


# Which tokens, and which of them are trained.


@pytest.mark.parametrize("marks", [plain, marked])
@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (CHATML, TALK, None),
        (CHATML, RULED, None),
        (CHATML, CALLED, TOOLS),
        (LLAMA, RULED, None),
        (LLAMA, CALLED, TOOLS),
        (GEMMA, TALK, None),
        (MISTRAL, TALK, None),
        (MISTRAL, CALLED, TOOLS),
    ],
    ids=lambda value: None,
)
def test_tokens_and_masks_are_those_of_transformers(
    read, rendered, marks, template, messages, tools
):
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    (example,), report = read(row, template=marks(template))
    assert parts(example) == rendered(messages, template, tools=tools)
    assert sum(parts(example)[1]) > 3
    assert "several examples" not in str(report)


def test_tools_and_arguments_may_be_json_text(read, rendered, tmp_path, tokenizer):
    texts = json.loads(json.dumps(CALLED))
    texts[1]["tool_calls"][0]["function"]["arguments"] = json.dumps(ARGUMENTS)
    texts[1]["content"] = None
    (example,), report = read({"messages": texts, "tools": json.dumps(TOOLS)})
    assert parts(example) == rendered(CALLED, tools=TOOLS)
    assert "messages, tools: the assistant's turns" in str(report)
    texts[1]["tool_calls"] = json.dumps(texts[1]["tool_calls"])
    file = tmp_path / "rows.parquet"  # where every turn has every field, most of them null
    rows = [{"messages": texts, "tools": json.dumps(TOOLS)}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    (example,), _ = load_examples(str(file), tokenizer, DataConfig(train=str(file)))
    assert parts(example) == rendered(CALLED, tools=TOOLS)


def test_calls_of_several_tools_in_a_table_have_no_fields_of_one_another(
    tmp_path, rendered, tokenizer
):
    tokenizer.chat_template = plain(CHATML)
    other = json.loads(json.dumps(CALLED))
    other[1]["tool_calls"][0]["function"]["arguments"] = {"as": "number"}
    calls = [CALLED, other]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"messages": talk} for talk in calls]), tmp_path / "rows.parquet"
    )
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"messages": talk} for talk in calls]).save_to_disk(
        tmp_path / "saved"
    )
    for source in ("rows.parquet", "saved"):
        file = str(tmp_path / source)
        examples, _ = load_examples(file, tokenizer, DataConfig(train=file))
        assert [parts(example) for example in examples] == [rendered(talk) for talk in calls]


def test_messages_may_be_json_text(read, rendered):
    (example,), _ = read({"messages": json.dumps(TALK)})
    assert parts(example) == rendered(TALK)


@pytest.mark.parametrize(
    ("template", "endless"),
    [
        (marked(CHATML), False),
        (marked(CHATML.replace("<|im_end|>\n]]", "]]<|im_end|>\n")), True),
        (plain(CHATML).replace("<|im_end|>\n{%", "\n{%"), True),
    ],
    ids=["ends", "the mark leaves out the end", "no end"],
)
def test_turns_that_are_never_trained_to_end_are_reported(read, template, endless):
    _, report = read({"messages": TALK}, template=template)
    assert ("answers will not end" in str(report)) == endless
    assert "answers will not end" not in str(read({"text": "Hi."}, template=template)[1])


def test_a_call_without_arguments_and_without_a_type_is_a_call(read, rendered):
    call = {"name": "count"}
    talk = [*ASKED, {"role": "assistant", "tool_calls": [call]}]
    (example,), _ = read({"messages": talk, "tools": TOOLS})
    talk[1] = {"role": "assistant", "tool_calls": [call | {"arguments": {}}]}
    assert parts(example) == rendered(talk, tools=TOOLS)


def test_a_template_of_its_own_for_tools_is_taken(read, rendered):
    both = {"default": "{{ messages[0].content }}", "tool_use": plain(CHATML)}
    (example,), _ = read({"messages": CALLED, "tools": TOOLS}, template=both)
    assert parts(example) == rendered(CALLED, tools=TOOLS)


def test_text_parts_are_joined(read, rendered):
    halves = [{"type": "text", "text": text} for text in ("Two ", "pies?")]
    split = [{"role": "user", "content": halves}, *TALK[1:]]
    (example,), _ = read({"messages": split})
    assert parts(example) == rendered(TALK)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": m["role"].upper(), "content": m["content"]} for m in RULED]},
        {
            "conversations": [
                {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"]}
                for m in TALK
            ]
        },
    ],
    ids=["capitals", "ShareGPT"],
)
def test_other_names_of_roles_are_read(read, rendered, row):
    (example,), _ = read(row)
    assert parts(example) == rendered(RULED if "messages" in row else TALK)


def test_a_completion_of_messages_is_trained_and_its_prompt_is_not(read, rendered):
    ids, mask = rendered(TALK)
    first = rendered(TALK[:2])[1]
    (example,), _ = read({"prompt": TALK[:3], "completion": TALK[3:]})
    assert parts(example) == (ids, [False] * len(first) + mask[len(first) :])


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("template", [plain(CHATML), marked(CHATML)], ids=["plain", "marked"])
def test_a_turn_that_is_not_to_be_trained_is_not(read, rendered, flag, template):
    ids, mask = rendered(TALK)
    first = rendered(TALK[:2])[1]
    silent = [TALK[0], TALK[1] | flag, TALK[2], TALK[3] | {"weight": 1, "training": True}]
    (example,), _ = read({"messages": silent}, template=template)
    assert parts(example) == (ids, [False] * len(first) + mask[len(first) :])


def test_a_row_sets_variables_of_the_template(read, tokenizer):
    for name in ({"enable_thinking": False}, json.dumps({"enable_thinking": False})):
        (example,), _ = read({"messages": TALK[:2], "chat_template_kwargs": name}, template=QWEN3)
        cue = tokenizer.apply_chat_template(
            ASKED, add_generation_prompt=True, enable_thinking=False
        )
        untrained = example["input_ids"][~example["loss_mask"]].tolist()
        assert untrained == cue["input_ids"]
        assert trained(tokenizer, example) == "Two.<|im_end|>\n"


# A template that shows earlier turns otherwise.
THOUGHTS = [
    ASKED[0],
    {"role": "assistant", "content": "<think>\n1 + 1\n</think>\n\nTwo."},
    TALK[2],
    {"role": "assistant", "content": "<think>2 + 1</think>Three."},
]


@pytest.mark.parametrize(
    ("template", "messages", "tools"),
    [
        (QWEN3, THOUGHTS, None),
        (QWEN3, TALK, None),
        (MISTRAL, RULED, None),
        (MISTRAL, [*CALLED, *TALK], TOOLS),
    ],
    ids=["thoughts", "no thoughts", "system", "tools"],
)
def test_every_turn_is_trained_as_the_model_is_asked_for_it(
    read, tokenizer, template, messages, tools
):
    row = {"messages": messages} | ({"tools": tools} if tools else {})
    examples, report = read(row, template=template)
    assert "1 conversations in several examples" in str(report)
    found = []
    for example in examples:
        ids, mask = parts(example)
        edges = [i for i in range(1, len(ids)) if mask[i] != mask[i - 1]] + [len(ids)]
        found += [
            (ids[:start], ids[:stop]) for start, stop in zip(edges[::2], edges[1::2], strict=True)
        ]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    expected = [
        tuple(
            tokenizer.apply_chat_template(
                messages[: i + more], tools=tools, add_generation_prompt=not more
            )["input_ids"]
            for more in (0, 1)
        )
        for i in turns
    ]
    assert sorted(found) == sorted(expected)


# What is refused, with its place and what to do.


@pytest.mark.parametrize(
    ("row", "template", "said"),
    [
        ({"messages": RULED}, GEMMA, "refuses the conversation: no system role"),
        ({"messages": [*ASKED, *TALK]}, GEMMA, "refuses the conversation: roles must alternate"),
        ({"messages": TALK[1:]}, CHATML, "turn 1 is the assistant's and answers nothing"),
        ({"messages": TALK}, "{{ 1 + messages[0].content }}", "fails: TypeError"),
        ({"messages": TALK}, "{{ messages[0].none.none }}", "fails: UndefinedError"),
        ({"messages": TALK}, "{{ messages[0].content.index('none') }}", "fails: ValueError"),
        ({"messages": TALK}, "{% for m in messages %}", "fails: TemplateSyntaxError"),
        ({"messages": TALK}, "{{ '(' * 9 }}" + "(" * 9, "leaves out turn 1"),
        ({"messages": TALK}, "{{ " + "(" * 3000 + " }}", "fails: RecursionError"),
        ({"messages": TALK}, CHATML[:-11] + "<think>{% endif %}", "cue to answer is not how it"),
        ({"messages": TALK}, {"other": "a"}, "template"),
        ({"messages": CALLED}, CHATML.replace(CALLS, ""), "does not have its 'count'"),
        ({"messages": CALLED, "tools": TOOLS}, GEMMA, "makes no use of 'tools'"),
        ({"messages": RULED}, CHATML.replace("messages %}", "messages[1:] %}"), "turn 1 (system)"),
        (
            {"messages": [*ASKED, TALK[1] | {"reasoning_content": "1 + 1"}]},
            CHATML,
            "turn 2 has thoughts",
        ),
        (
            {"messages": [*ASKED, TALK[1] | {"reasoning_content": "1 + 1"}]},
            CHATML + "{# reasoning_content #}",
            "does not have its '1 + 1'",
        ),
        ({"messages": [{"role": "bot", "content": "Hi."}, *TALK]}, CHATML, "role 'bot'"),
        ({"messages": []}, CHATML, "messages must be a list"),
        ({"messages": [*TALK, "Bye."]}, CHATML, "turn 5 is no object"),
        ({"messages": [*ASKED, {"role": "assistant"}]}, CHATML, "neither content nor tool_calls"),
        ({"messages": [{"role": "user", "content": 3}]}, CHATML, "turn 1: content must be text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            CHATML,
            "turn 1: content must be text, or a list of text parts, and has a part of type "
            "'image_url'",
        ),
        ({"messages": [*ASKED, TALK[1] | {"weight": 0.5}]}, CHATML, "turn 2: weight is 0.5"),
        ({"messages": [*ASKED, TALK[1] | {"weight": "0"}]}, CHATML, "turn 2: weight is '0'"),
        ({"messages": [TALK[0] | {"train": True}, TALK[1]]}, CHATML, "turn 1 is the user's"),
        ({"messages": [*ASKED, TALK[1] | {"weight": 1, "train": False}]}, CHATML, "contradict"),
        ({"messages": TALK, "tools": "[1"}, CHATML, "tools is no JSON"),
        ({"messages": TALK, "tools": {"name": "count"}}, CHATML, "tools must be a list"),
        ({"messages": TALK, "tools": ["count"]}, CHATML, "tools must be a list of objects"),
        (
            {"messages": [*ASKED, {"role": "assistant", "tool_calls": [{"function": "count"}]}]},
            CHATML,
            "turn 2: tool_calls must be objects with a function's name",
        ),
        (
            {
                "messages": [
                    *ASKED,
                    {"role": "assistant", "tool_calls": [{"name": "count", "arguments": "pies"}]},
                ]
            },
            CHATML,
            "turn 2: the arguments of count is no JSON",
        ),
        ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, CHATML, "'tokenize'"),
        ({"messages": TALK, "chat_template_kwargs": {"mood": 1}}, CHATML, "no use of 'mood'"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}, TALK[1]]},
            CHATML,
            "half a character",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and "{" not in value else None,
)
def test_what_cannot_be_is_refused_with_its_place(read, row, template, said):
    with pytest.raises(ValueError) as refusal:
        read(row, template=template)
    text = str(refusal.value)
    assert "rows.jsonl:2: " in text
    assert said in text
    assert len(text) < 450


def test_a_conversation_with_nothing_to_train_says_why(read):
    with_bot = [TALK[0], TALK[1] | {"weight": 0}]
    silent = [TALK[0], TALK[1] | {"content": ""}]
    _, report = read({"messages": RULED[:2]}, {"messages": with_bot}, {"messages": silent})
    assert "3 rows with nothing to train on, left out" in str(report)
    assert (
        "rows.jsonl:2: no turn of the assistant's is trained and says something; roles system"
        in str(report)
    )
    _, report = read({"messages": [*silent, *TALK]})
    assert "1 turns of the assistant's say nothing, and are not trained" in str(report)


def test_a_greeting_of_the_assistants_is_left_as_it_is_with_weight_0(read, rendered):
    (example,), _ = read({"messages": [TALK[1] | {"weight": 0}, *TALK]})
    ids, mask = rendered([TALK[1], *TALK])
    first = len(rendered([TALK[1]])[0])
    assert parts(example) == (ids, [False] * first + mask[first:])


def test_thoughts_in_a_field_of_their_own_are_trained(read, tokenizer):
    thinking = CHATML.replace(
        "[[", "[[{% if m.thinking %}<think>{{ m.thinking }}</think>{% endif %}"
    )
    for name in ("thinking", "reasoning_content"):
        (example,), _ = read({"messages": [*ASKED, TALK[1] | {name: "1 + 1"}]}, template=thinking)
        assert trained(tokenizer, example) == "<think>1 + 1</think>Two.<|im_end|>\n"


def test_a_template_with_marks_but_none_for_a_turn_is_refused(read):
    template = marked(CHATML).replace("m.role == 'assistant'", "loop.last")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*turn 2"):
        read({"messages": TALK}, template=template)
    silent = [TALK[0], TALK[1] | {"weight": 0}, *TALK[2:]]
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*marks 1 spans for 2 turns"):
        read({"messages": silent}, template=template)


LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("in_main_thread", [True, False])
def test_a_template_that_does_not_end_is_ended(read, monkeypatch, in_main_thread):
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    found = []

    def run():
        with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*base takes longer than 0\.6 sec"):
            read({"messages": TALK}, template=CHATML + LOOPS)
        found.append(True)

    began = time.monotonic()
    if in_main_thread:
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert found
    assert time.monotonic() - began < 20
    read({"messages": TALK})  # nothing of it is left


# What ends a turn.


@pytest.mark.parametrize(
    ("template", "tokens"),
    [
        (CHATML, ["<|im_end|>"]),
        (LLAMA, ["<|eot_id|>"]),
        (GEMMA, ["<|im_end|>"]),
        (MISTRAL, ["</s>"]),
        (QWEN3 + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", None),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", []),
        ("{{ raise_exception('no') }}", []),
        (None, []),
    ],
    ids=["ChatML", "Llama", "Gemma", "Mistral", "Phi-3", "text", "refusal", "none"],
)
def test_the_tokens_that_end_a_turn(tokenizer, template, tokens):
    tokenizer.chat_template = template and plain(template)
    tokens = ["<|im_end|>", "</s>"] if tokens is None else tokens
    assert tokenizer.convert_ids_to_tokens(list(end_of_turn_token_ids(tokenizer))) == tokens


# Asking.


def subject(tokenizer):
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4096))
    return Subject(model=model, params=None, factors={}, tokenizer=tokenizer)


def test_evaluation_asks_with_the_tools_of_the_row(tokenizer):
    tokenizer.chat_template = plain(CHATML)
    problem, _ = match._problem("here:1", {"messages": CALLED, "tools": json.dumps(TOOLS)})
    ids = subject(tokenizer).encode_prompt(problem.prompt)
    expected = tokenizer.apply_chat_template(CALLED[:3], tools=TOOLS, add_generation_prompt=True)
    assert (ids, problem.expected) == (expected["input_ids"], "Two.")
    tokenizer.chat_template = plain(GEMMA)
    with pytest.raises(ValueError, match="here:1: the chat template makes no use of 'tools'"):
        subject(tokenizer).encode_prompt(problem.prompt)


def test_generate_without_chat_says_that_there_is_a_template(tokenizer, monkeypatch, capsys):
    monkeypatch.setattr(cli, "load_subject", lambda *_, **__: subject(tokenizer))
    monkeypatch.setattr(cli, "answers", lambda *_, **__: [[" yes"]])
    for template, options, hinted in (
        (None, {}, False),
        (plain(CHATML), {}, True),
        (plain(CHATML), {"chat": True}, False),
    ):
        tokenizer.chat_template = template
        cli.generate("model", "Well?", **options)
        out, err = capsys.readouterr()
        assert out == (" yes\n" if options else "Well? yes\n")
        assert ("--chat true" in err) == hinted


# Showing.


def test_shown_examples_mark_what_is_trained(read, tokenizer):
    odd = [
        {"role": "user", "content": "A\x1b[2J é\nB"},
        {"role": "assistant", "content": " C\n\nD"},
    ]
    (example,), _ = read({"messages": odd})
    ids, mask = parts(example)
    assert shown(7, example, tokenizer).splitlines() == [
        f"example 7: {len(ids)} tokens, {sum(mask)} of them trained",
        "  <|im_start|>user\\n",
        "  A\\x1b[2J é\\n",
        "  B<|im_end|>\\n",
        "  <|im_start|>assistant\\n",
        "+  C\\n",
        "+ \\n",
        "+ D<|im_end|>\\n",
    ]
    whole = {"input_ids": np.array([5, 6]), "loss_mask": np.array([True, True])}
    assert "1 of them trained\n  " in shown(1, whole, tokenizer)


@pytest.mark.parametrize("command", [finetune, sweep], ids=["finetune", "sweep"])
def test_examples_are_shown_before_the_base_is_loaded(command, run_main, tmp_path, monkeypatch):
    def stop(*_):
        raise ValueError("the base is loaded")

    monkeypatch.setattr(setup, "load_base", stop)
    write_base(tmp_path / "base")
    rows = [{"prompt": f"{i} and", "completion": f" {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = json.dumps({"train": str(tmp_path / "rows.jsonl"), "eval": str(tmp_path / "rows.jsonl")})
    model = ["--model.path", tmp_path / "base", "--train.output", tmp_path / "run", "--data", data]
    status, out, err = run_main(command.main, *model, "--data.batch_size", 8, "--show", 2)
    assert (status, "the base is loaded" in err) == (1, True)
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("+")] == ["+  0</s>", "+  1</s>"]
    assert not (tmp_path / "run").exists()
    status, _, err = run_main(command.main, *model, "--show", -1)
    assert status == 1
    assert "error: show must be" in err


# Anything else.
TEXT = st.text(max_size=6) | st.sampled_from(["Two.", "<think>a</think>b", "\ud800", "<|im_end|>"])
ODD = (
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats() | TEXT | st.lists(TEXT, max_size=2)
)
PART = st.fixed_dictionaries({"type": st.sampled_from(["text", "image", None]), "text": TEXT | ODD})
FUNCTION = st.fixed_dictionaries({"name": TEXT | ODD}, optional={"arguments": ODD | st.just("{}")})
CALLS_MADE = st.lists(FUNCTION | st.fixed_dictionaries({"function": FUNCTION}) | ODD, max_size=2)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "gpt", "HUMAN", "bot", None])
CHANGE = st.dictionaries(st.just("content"), TEXT, min_size=1) | st.fixed_dictionaries(
    {},
    optional={
        "role": ROLES,
        "content": TEXT | ODD | st.lists(PART, max_size=2),
        "tool_calls": CALLS_MADE | ODD,
        "weight": st.sampled_from([0, 1]) | ODD,
        "train": st.booleans(),
        "name": TEXT,
        "reasoning_content": TEXT,
    },
)


@st.composite
def talks(draw):
    """A conversation, some turns of which are changed, lost or said twice."""
    talk = list(draw(st.sampled_from([TALK, RULED, CALLED, THOUGHTS])))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(talk) - 1))
        talk[at] = talk[at] | draw(CHANGE)
    at = draw(st.integers(0, 3 * len(talk)))
    talk[at : at + draw(st.integers(0, 2))] = talk[:1] if draw(st.booleans()) else []
    return talk


ROW = st.fixed_dictionaries(
    {"messages": talks()},
    optional={"tools": st.just(TOOLS) | st.just("[]") | ODD, "chat_template_kwargs": ODD},
)


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA, GEMMA, MISTRAL, QWEN3, marked(CHATML)], ids=lambda _: None
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(row=ROW)
def test_any_row_is_read_or_refused_with_its_place(tokenizer, template, row):
    tokenizer.chat_template = plain(template)
    try:
        cfg = DataConfig(train="-", length=4096)
        examples, report = encode(iter([("here:1", row)]), tokenizer, cfg, "source")
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
    if refusal is not None:
        assert refusal.startswith(("here:1", "source: 0 examples"))
        assert len(refusal) < 450
        return
    talk = conversation(row, "here:1")
    assert isinstance(talk, Conversation)
    spans = [
        span
        for text, found in chat_passages(talk, tokenizer)
        for span in found
        if 0 <= span[0] < span[1] <= len(text)
    ]
    assert len(spans) == len(talk.trained)
    assert report.trained_tokens > 0
    assert len(examples) <= len(spans)
