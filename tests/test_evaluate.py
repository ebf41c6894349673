"""Evaluation: scores and answers against PyTorch, the script from end to end."""

import itertools
import json
import math
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from tiny_base import REPOSITORY, write_base
from tiny_models import perturb, random_llama
from transformers import AutoModelForCausalLM

import genlora_jax as gl
from genlora_jax.data.rows import read_rows
from genlora_jax.evaluation import harness, scoring
from genlora_jax.evaluation import run as script
from genlora_jax.evaluation.scoring import encode_pair, log_likelihoods
from genlora_jax.evaluation.tasks import choices, code, match, perplexity
from genlora_jax.evaluation.tasks import task as tasks
from genlora_jax.generation.answers import answers
from genlora_jax.generation.decoding import _advance, _read
from genlora_jax.generation.subject import Subject, load_subject

QUESTIONS = REPOSITORY / "train" / "quickstart" / "data" / "test.jsonl"
POSITIONS = 64
EXACT = {"dtype": "float32", "param_dtype": "float32"}
FLOAT32 = 1e-5  # relative, of a sum of log-probabilities


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("evaluated") / "base", initializer_range=1.0)


@pytest.fixture(scope="module")
def subject(base):
    return load_subject(str(base), batch_size=4, **EXACT)


@pytest.fixture(scope="module")
def reference(base):
    """The same model in PyTorch."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def score(reference):
    """A function that scores a continuation in PyTorch, one row without padding."""

    def one(context, continuation):
        ids = [*context, *continuation][-POSITIONS - 1 :]
        with torch.no_grad():
            logits = reference(torch.tensor([ids[:-1]])).logits[0].double()
        own, count = torch.tensor(ids[1:]), len(continuation)
        picked = torch.log_softmax(logits, -1).gather(1, own[:, None])[-count:, 0]
        greedy = bool((logits.argmax(-1) == own)[-count:].all())
        return float(picked.sum()), greedy

    return one


@pytest.fixture(scope="module")
def continue_greedily(reference):
    def one(ids, count):
        # No end-of-sequence token, or padding would be called for.
        out = reference.generate(
            torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        return out[: out.index(2)] if 2 in out else out

    return one


def random_ids(seed, *lengths):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, 512, n).tolist() for n in lengths]


def test_log_likelihoods_are_those_of_pytorch(subject, score, continue_greedily):
    lengths = [(1, 1), (3, 9), (20, 2), (7, 30), (90, 5), (1, POSITIONS), (11, 4)]
    pairs = [tuple(random_ids(i, *both)) for i, both in enumerate(lengths)]
    pairs.append((pairs[1][0], continue_greedily(pairs[1][0], 6)))
    found = log_likelihoods(subject, pairs)
    expected = [score(*pair) for pair in pairs]
    np.testing.assert_allclose(
        [s.logprob for s in found], [logprob for logprob, _ in expected], rtol=FLOAT32
    )
    assert [s.greedy for s in found] == [greedy for _, greedy in expected]
    assert found[-1].greedy
    assert not found[1].greedy


def test_lengths_of_a_bucket_are_compiled_once(subject):
    log_likelihoods(subject, [tuple(random_ids(0, 4, 5))])
    before = scoring._score._cache_size()
    for lengths in ((9, 3), (2, 20), (30, 1)):
        log_likelihoods(subject, [tuple(random_ids(0, *lengths))] * 6)
    assert scoring._score._cache_size() == before


def test_an_adapter_that_reaches_the_head_scores_as_the_merged_model():
    model, params = random_llama()
    cfg = gl.LoRAConfig(rank=2, targets=["q_proj", "lm_head"])
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), params))
    factors = gl.generate_factors(cfg, adapter)
    plain = Subject(model=model, params=params, factors={}, tokenizer=None, batch_size=4)
    pairs = [tuple([i % 61 for i in ids] for ids in random_ids(i, 6, 4)) for i in range(3)]
    found, merged, base = (
        [score.logprob for score in log_likelihoods(subject, pairs)]
        for subject in (
            replace(plain, factors=factors),
            replace(plain, params=gl.merge(params, factors)),
            plain,
        )
    )
    np.testing.assert_allclose(found, merged, rtol=FLOAT32)
    assert not np.allclose(found, base, rtol=1e-3)


def test_a_continuation_too_long_or_after_nothing_is_refused(subject):
    for pair in (([], [5]), ([5], []), ([5], [6] * (POSITIONS + 1))):
        with pytest.raises(ValueError, match="cannot score"):
            log_likelihoods(subject, [pair])


def test_pairs_are_cut_where_the_context_ends(subject):
    whole = subject.encode("Mia has plums.")
    for context in ("Mia has", "Mia has "):
        before, after = encode_pair(subject, context, "Mia has plums."[len(context) :])
        assert before == subject.encode("Mia has")
        assert before + after == whole
    assert encode_pair(subject, "", "Mia has")[0] == [subject.prefix]


def test_answers_are_those_of_pytorch(subject, continue_greedily):
    prompts = [
        subject.encode(row["prompt"])[:40]
        for _, row in itertools.islice(read_rows(str(QUESTIONS)), 6)
    ]
    said = answers(subject, prompts, max_new_tokens=10)
    expected = [subject.tokenizer.decode(continue_greedily(ids, 10)) for ids in prompts]
    assert [text for (text,) in said] == expected
    assert len(set(expected)) > 1


def test_prompts_of_every_length_compile_once(subject):
    prompts = random_ids(0, *range(1, 55))
    programs = [(_advance._cache_size(), _read._cache_size())]
    for some, new in ((prompts, 9), (prompts[7:30], 9), (prompts[:20], 30)):
        answers(subject, some, max_new_tokens=new)
        programs.append((_advance._cache_size(), _read._cache_size()))
    assert max(programs[1][i] - programs[0][i] for i in (0, 1)) <= 1
    assert programs[1] == programs[2] == programs[3]


def test_samples_differ_and_come_back_with_the_seed(subject):
    prompts = [subject.encode("Mia has"), subject.encode("Tom")]
    settings = {"max_new_tokens": 10, "temperature": 1.0, "samples": 3}
    first, again = (answers(subject, prompts, seed=1, **settings) for _ in range(2))
    assert first == again != answers(subject, prompts, seed=2, **settings)
    assert [len(set(texts)) for texts in first] == [3, 3]


def test_a_prompt_without_room_loses_its_beginning(subject):
    (long,) = random_ids(0, 100)
    settings = {"max_new_tokens": 10}
    assert answers(subject, [long], **settings) == answers(subject, [long[-54:]], **settings)
    with pytest.raises(ValueError, match="max_new_tokens"):
        answers(subject, [long], max_new_tokens=POSITIONS)


def test_conversations_are_asked_in_the_chat_template(subject, monkeypatch):
    prompt = [{"role": "user", "content": "Mia has 14 plums."}]
    with pytest.raises(ValueError, match="no chat template"):
        subject.encode_prompt(prompt)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    monkeypatch.setattr(subject.tokenizer, "chat_template", template)
    expected = subject.tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
    assert subject.encode_prompt(prompt) == expected["input_ids"]
    # lm-eval renders first; what the template begins with does not come twice.
    assert subject.encode(subject.render(prompt)) == expected["input_ids"]
    row = {"messages": [*prompt, {"role": "assistant", "content": "14"}]}
    problem, _ = match._problem("here", row)
    assert (problem.prompt.messages, problem.expected) == (prompt, "14")
    (row,) = match.run(subject, match.MatchConfig(data="x", max_new_tokens=8), [problem]).rows
    assert row["prompt"] == prompt


def test_blank_lines_end_the_answers_of_a_base_but_not_of_a_chat(subject, monkeypatch):
    said = "Mia gives 6.\n\n14 - 6 = 8\n#### 8"
    monkeypatch.setattr(tasks, "answers", lambda subject, prompts, **_: [[said]] * len(prompts))
    monkeypatch.setattr(subject.tokenizer, "chat_template", "{{ messages[0].content }}")
    asked = "Mia has 14 plums."
    text, chat = match.Problem(asked, "8"), match.Problem([{"role": "user", "content": asked}], "8")
    settings = match.MatchConfig(data="x", max_new_tokens=8)
    found = [row["answers"] for row in match.run(subject, settings, [text, chat]).rows]
    assert found == [["Mia gives 6."], [said]]
    for cfg in (replace(settings, stop=[]), replace(settings, chat=True)):
        assert match.run(subject, cfg, [text]).metrics["exact_match"] == 1.0
    assert match.run(subject, replace(settings, stop=["8"]), [chat]).metrics["exact_match"] == 0.0


def test_prompts_that_lose_their_beginning_are_counted(subject):
    long, short = "Mia has 14 plums and Tom has 5 kites. " * 9, "Mia has"
    assert len(subject.encode(short)) < POSITIONS < len(subject.encode(long))
    problems = [match.Problem(text, "8") for text in (long, short)]
    found = match.run(subject, match.MatchConfig(data="x", max_new_tokens=8), problems)
    assert found.metrics["cut_prompts"] == 1
    items = [choices.Item(text, ["a", "b"], 0) for text in (long, short)]
    assert choices.run(subject, choices.ChoicesConfig(data="x"), items).metrics["cut_prompts"] == 1


# What lm-eval asks


def test_rolling_log_likelihoods_predict_every_token_once(subject, score):
    texts = ["Mia has 14 plums and Tom has 5 kites in a red bag. " * n for n in (1, 6)] + [""]
    found = harness.loglikelihood_rolling(subject, texts)
    expected = []
    for text in texts:
        ids = [subject.prefix, *subject.encode(text, special=False)]
        total, done = 0.0, 1
        while done < len(ids):
            stop = min(done + POSITIONS, len(ids))
            total += score(ids[max(stop - POSITIONS - 1, 0) : done], ids[done:stop])[0]
            done = stop
        expected.append(total)
    assert len(subject.encode(texts[1])) > POSITIONS
    np.testing.assert_allclose(found, expected, rtol=FLOAT32)


def test_requests_are_answered_in_order_whatever_their_settings(subject, continue_greedily):
    contexts = ["Mia has", "Tom has 5", "", "Ida"]
    most = [8, 6, 8, 6]
    requests = [
        (context, {"until": ["<never>"], "max_gen_toks": n, "do_sample": False, "temperature": 0.7})
        for context, n in zip(contexts, most, strict=True)
    ]
    prompts = [subject.encode(context) or [subject.prefix] for context in contexts]
    expected = [
        subject.tokenizer.decode(continue_greedily(ids, n), skip_special_tokens=True)
        for ids, n in zip(prompts, most, strict=True)
    ]
    assert harness.generate_until(subject, requests) == expected
    until = expected[0][4:6]
    cut = harness.generate_until(subject, [(contexts[0], requests[0][1] | {"until": until})])
    assert cut == [expected[0][: expected[0].index(until)]]
    pairs = [("Mia has", " 14"), ("", "Tom")]
    found = harness.loglikelihood(subject, pairs)
    assert found == log_likelihoods(subject, [encode_pair(subject, *pair) for pair in pairs])
    with pytest.raises(ValueError, match="num_beams"):
        harness.generate_until(subject, [("a", {"num_beams": 4})])


# The script


@pytest.fixture
def run(base, run_main, tmp_path):
    """A function that runs the script's main: returns exit status, stdout and stderr."""

    def call(*arguments, model=base):
        settings = ["--model.path", model, "--output", tmp_path / "out", "--batch_size", "4"]
        settings += [x for name, value in EXACT.items() for x in (f"--model.{name}", value)]
        return run_main(script.main, *settings, *arguments)

    return call


@pytest.fixture
def exercises(tmp_path):
    file = tmp_path / "exercises.jsonl"
    rows = [{"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "code": "add = sum"}] * 2
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_script_with_an_adapter(run, base, subject, score, exercises, tmp_path):
    cfg = gl.LoRAConfig(rank=2, targets=["v_proj"])
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), subject.params))
    gl.save_adapter(tmp_path / "adapter", cfg, adapter, model=subject.model)
    factors = gl.generate_factors(cfg, adapter)
    gl.export_peft(tmp_path / "peft", cfg, factors, base=base)
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": "Who?", "choices": ["a cat", "dogs"], "answer": i % 2} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = {
        "perplexity": {"data": [str(QUESTIONS)], "limit": 3, "length": 64},
        "match": {"data": str(QUESTIONS), "limit": 3, "max_new_tokens": 8},
        "choices": {"data": [str(questions)]},
        "code": {
            "data": str(exercises),
            "allow_code": True,
            "allow_open_sandbox": True,
            "max_new_tokens": 8,
        },
    }
    settings = [x for name, own in chosen.items() for x in (f"--{name}", json.dumps(own))]
    status, out, err = run("--adapter", tmp_path / "adapter", *settings)
    assert (status, err) == (0, "")
    first = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"jax", "transformers"} <= set(first["versions"])
    assert first["commit"]
    assert first["settings"]["match"]["limit"] == 3
    walls = first["sandbox"]
    assert {"network", "writing", "processes", "signals"} <= {*walls["closed"], *walls["open"]}
    for name, count in (("perplexity", 3), ("match", 3), ("choices", 6), ("code", 2)):
        ((source, entry),) = first["results"][name].items()
        assert entry["rows"] == count
        assert entry["sha256"] == sha256(Path(source).read_bytes()).hexdigest()
        assert name in out
    for name, count in (("match", 3), ("choices", 6), ("code", 2)):
        lines = (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()
        assert len(lines) == count
    assert first["results"]["choices"][str(questions)]["accuracy"] == 0.5
    assert first["results"]["code"][str(exercises)]["pass@1"] == 0.0

    # The same adapter in PEFT's format gives the same; the base alone does not.
    found = {"ours": first["results"]["perplexity"][str(QUESTIONS)]["loss"]}
    for name, more in (("peft", ["--adapter", tmp_path / "peft"]), ("base", [])):
        status, _, err = run("--overwrite", "true", *more, *settings[:2])
        assert (status, err) == (0, "")
        results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
        found[name] = results["perplexity"][str(QUESTIONS)]["loss"]
    assert found["peft"] == pytest.approx(found["ours"], rel=FLOAT32)
    assert found["base"] != pytest.approx(found["ours"], rel=1e-3)
    losses = []
    for _, row in itertools.islice(read_rows(str(QUESTIONS)), 3):
        prompt, whole = (
            subject.encode(text) for text in (row["prompt"], row["prompt"] + row["completion"])
        )
        completion = [*whole[len(prompt) :], subject.tokenizer.eos_token_id]
        losses.append((-score(prompt, completion)[0], len(completion)))
    expected = sum(loss for loss, _ in losses) / sum(count for _, count in losses)
    assert found["base"] == pytest.approx(expected, rel=FLOAT32)


def test_a_model_cut_over_devices_gets_the_same_results(run, subject, tmp_path):
    cfg = gl.LoRAConfig(rank=2)
    adapter = perturb(gl.init_adapter(cfg, jax.random.key(0), subject.params))
    gl.save_adapter(tmp_path / "adapter", cfg, adapter, model=subject.model)
    asked = [
        "--adapter",
        tmp_path / "adapter",
        "--match.data",
        str(QUESTIONS),
        "--match.limit",
        "6",
    ]
    asked += ["--match.max_new_tokens", "8", "--perplexity.data", str(QUESTIONS)]
    asked += ["--perplexity.limit", "6", "--perplexity.length", "64"]
    found = []
    for more in ([], ["--overwrite", "true", "--mesh.fsdp", "-1", "--mesh.tensor", "2"]):
        assert run(*asked, *more)[0] == 0
        results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
        lines = (tmp_path / "out" / "match.jsonl").read_text()
        found.append((results["perplexity"][str(QUESTIONS)]["loss"], lines))
    assert found[1][0] == pytest.approx(found[0][0], rel=FLOAT32)
    assert found[1][1] == found[0][1]
    status, _, err = run(*asked, "--overwrite", "true", "--mesh.data", "3")
    assert (status, err.splitlines()[0][:28]) == (1, "error: mesh data=3 x fsdp=-1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "nothing to evaluate"),
        (["--code.data", "{exercises}"], "set code.allow_code"),
        (["--match.data", "none.jsonl"], "no such data file: none.jsonl"),
        (["--match.data", "{exercises}"], "exercises.jsonl:1: needs fields"),
        (["--choices.data", str(QUESTIONS)], "test.jsonl:1: choices must be a list"),
        (["--match.data", str(QUESTIONS), "--match.limit", "0"], "limit must be at least 1"),
        (["--match.data", str(QUESTIONS), "--match.limitt", "3"], "'limitt' is not accepted"),
        (["--match.data", str(QUESTIONS), "--match.shots", "1"], "shots need examples"),
        (["--match.data", str(QUESTIONS), "--adapter", "nowhere"], "nowhere holds no adapter"),
        (["--match.data", str(QUESTIONS), "--match.max_new_tokens", "64"], "max_new_tokens (64)"),
        (
            ["--code.data", "{exercises}", "--code.shots", "3", "--code.examples", "{exercises}"],
            "has 2 rows: too few for 3 shots",
        ),
    ],
)
def test_what_cannot_be_evaluated_is_named_in_one_line(run, exercises, tmp_path, arguments, said):
    status, _, err = run(*(a.format(exercises=exercises) for a in arguments))
    assert status == 1
    assert err.startswith("error: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_rows_are_held_against_the_settings_before_the_model_is_loaded(run, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "How many?", "answer": "many"}))
    asked = ["--match.data", str(rows), "--match.answer", "number"]
    status, _, err = run(*asked, model=tmp_path / "nowhere")
    assert (status, "' many' has none" in err) == (1, True), err


def test_a_conversation_that_the_template_refuses_is_named_before_weights_are_read(run, tmp_path):
    model = write_base(tmp_path / "chat")
    (model / "model.safetensors").unlink()
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    )
    asked = {"role": "user", "content": "How many?"}
    told = [{"messages": [asked, {"role": "assistant", "content": "3"}]}]
    for name, more in (("fine", {}), ("tools", {"tools": [{"name": "count"}]})):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(told[0] | more))
    sources = json.dumps([str(tmp_path / f"{name}.jsonl") for name in ("fine", "tools")])
    status, _, err = run("--match.data", sources, model=model)
    assert (status, "tools.jsonl:1: the chat template makes no use of 'tools'" in err) == (1, True)


def test_fields_of_rows_that_are_not_used_are_said(subject, tmp_path, capsys):
    row = {"question": "Is it?", "answer": "no", "context": "It is not.", "empty": ""}
    choice = row | {"choices": ["yes", "no"], "answer": 1}
    program = {"text": "Add.", "test_list": ["assert add(1, 2) == 3"], "context": "In Python."}
    for task, content in ((match, row), (choices, choice), (code, program)):
        (tmp_path / "rows.jsonl").write_text(json.dumps(content))
        (_,) = task.read(str(tmp_path / "rows.jsonl"))
        out = capsys.readouterr().out
        used = ", ".join(repr(name) for name in sorted(content.keys() - {"context", "empty"}))
        assert out == f"{tmp_path / 'rows.jsonl'}: 1 rows of {used}; not used: 'context'\n"
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    cfg = perplexity.PerplexityConfig(data=str(tmp_path / "rows.jsonl"), length=32)
    perplexity.run(subject, cfg, perplexity.read(cfg.data))
    assert "completion of answer\n  not used: 'context'" in capsys.readouterr().out


def test_a_prompt_that_is_no_utf_8_is_refused(subject):
    with pytest.raises(ValueError, match=r"the prompt holds '\\udcff', half a character"):
        subject.encode_prompt(b"caf\xff".decode("utf-8", "surrogateescape"))


# Real models and data


@pytest.mark.shared
def test_a_real_model_on_real_rows(shared, run, tmp_path):
    data = shared / "data"
    arc = [str(data / name / "test.json") for name in ("arc_easy", "openbookqa")]
    chosen = {
        "match": {
            "data": str(data / "gsm8k" / "test.jsonl"),
            "limit": 3,
            "shots": 1,
            "examples": str(data / "gsm8k" / "train.jsonl"),
            "max_new_tokens": 12,
        },
        "choices": {"data": arc, "limit": 4},
        "code": {
            "data": str(data / "mbpp.jsonl"),
            "limit": 2,
            "allow_code": True,
            "allow_open_sandbox": True,
            "max_new_tokens": 12,
        },
    }
    settings = [x for name, own in chosen.items() for x in (f"--{name}", json.dumps(own))]
    status, _, err = run(*settings, model=shared / "models" / "stories260k")
    assert (status, err) == (0, "")
    (out,) = tmp_path.glob("out")
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260k").eval()
    subject = load_subject(str(shared / "models" / "stories260k"), **EXACT)
    for line in (out / "choices.jsonl").read_text().splitlines():
        row = json.loads(line)
        for option, found in zip(row["options"], row["log_likelihoods"], strict=True):
            ids = subject.encode(f"{row['prompt']} {option}")
            start = len(subject.encode(row["prompt"]))
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].double()
            picked = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])
            assert math.isclose(found, float(picked[start - 1 :].sum()), rel_tol=FLOAT32)
