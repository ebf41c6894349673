"""The model `genlora_jax` under lm-eval itself, next to lm-eval's own model for PyTorch.

Not collected with the rest: it needs lm-eval, see the Makefile's `harness`.
"""

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tiny_base import REPOSITORY, write_base

import genlora_jax as gl
from genlora_jax.evaluation.lm_eval import GenLoRALM

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
{fields}
"""
KINDS = {
    "multiple_choice": """
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "generate_until": """
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{prompt}}{{completion}}"
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A base, an adapter merged and not, and tasks on the quickstart's questions."""
    here = tmp_path_factory.mktemp("harness")
    base = write_base(here / "base", max_position_embeddings=128, bos_token_id=1)
    model, params = gl.load_llama(base, dtype="float32", param_dtype="float32")
    cfg = gl.LoRAConfig(rank=2)
    adapter = gl.init_adapter(cfg, jax.random.key(0), params)
    adapter = jax.tree.map(lambda leaf: leaf + 0.1, adapter)
    gl.save_adapter(here / "adapter", cfg, adapter, model=model)
    merged = gl.merge(params, gl.generate_factors(cfg, adapter))
    gl.export_hf(here / "merged", merged, base=base)
    source = REPOSITORY / "train" / "quickstart" / "data" / "test.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()[:10]]
    rows = [row | {"choices": ["13 kites", "5", "all of them"], "answer": 1} for row in rows]
    data = here / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "tasks").mkdir()
    for kind, fields in KINDS.items():
        text = TASK.format(name=f"toy_{kind}", data=data, kind=kind, fields=fields)
        (here / "tasks" / f"{kind}.yaml").write_text(text)
    return here


@pytest.fixture(scope="module")
def run(workshop):
    """A function that has lm-eval run the tasks: returns each task's metrics and answers."""

    def evaluate(model, **settings):
        out = simple_evaluate(
            model=model,
            model_args=settings | {"dtype": "float32"},
            tasks=[f"toy_{kind}" for kind in KINDS],
            task_manager=TaskManager(include_path=str(workshop / "tasks")),
            batch_size=4,
            device="cpu",
            log_samples=True,
            bootstrap_iters=0,
        )
        answers = {
            name: [s["resps"] for s in sorted(samples, key=lambda s: s["doc_id"])]
            for name, samples in out["samples"].items()
        }
        return out["results"], answers

    return evaluate


def test_an_adapter_agrees_with_pytorch_on_the_merged_model(workshop, run):
    ours = run("genlora_jax", path=str(workshop / "base"), adapter=str(workshop / "adapter"))
    theirs = run("hf", pretrained=str(workshop / "merged"))
    for metric in ("acc,none", "acc_norm,none"):
        name = "toy_multiple_choice"
        assert ours[0][name][metric] == theirs[0][name][metric]
    found, expected = (
        np.array(
            [[float(option[0][0]) for option in row] for row in side[1]["toy_multiple_choice"]]
        )
        for side in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    said, expected = (side[1]["toy_generate_until"] for side in (ours, theirs))
    assert [row[0][0].strip() for row in said] == [row[0][0].strip() for row in expected]
    base = run("genlora_jax", path=str(workshop / "base"))
    assert base[1]["toy_multiple_choice"] != ours[1]["toy_multiple_choice"]


def test_whole_texts_agree_with_pytorch_where_it_adds_no_second_beginning(workshop, run):
    ours = run("genlora_jax", path=str(workshop / "base"))
    theirs = run("hf", pretrained=str(workshop / "base"), add_bos_token=False)
    found, expected = (
        np.array([float(np.squeeze(row)) for row in side[1]["toy_loglikelihood_rolling"]])
        for side in (ours, theirs)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_command_line(workshop, tmp_path):
    arguments = ["--model", "genlora_jax", "--model_args", f"path={workshop / 'base'}"]
    arguments += ["--tasks", "toy_multiple_choice", "--include_path", str(workshop / "tasks")]
    done = subprocess.run(
        [sys.executable, "-m", "genlora_jax.evaluation.lm_eval", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert "batch_size: auto" in done.stdout  # 16 rows; lm-eval's own default is one


def test_answers_do_not_depend_on_the_batch_size(workshop):
    requests = [SimpleNamespace(args=(f"{i} and", f" {i % 3} more")) for i in range(20)]
    one, many = (
        GenLoRALM(str(workshop / "base"), dtype="float32", batch_size=size) for size in (1, "auto")
    )
    assert many._subject.batch_size == 16
    found, expected = many.loglikelihood(requests), one.loglikelihood(requests)
    np.testing.assert_allclose([s for s, _ in found], [s for s, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("size", ["0", "many", "auto:4"])
def test_a_batch_size_that_is_none_is_refused(workshop, size):
    with pytest.raises(ValueError, match="batch_size must be auto or at least 1"):
        GenLoRALM(str(workshop / "base"), batch_size=size)


def test_chat_templates(workshop):
    model = GenLoRALM(str(workshop / "base"), dtype="float32")
    model._subject.tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    assert model.apply_chat_template([{"role": "user", "content": "a"}]) == "[a]"
    assert model.chat_template(True).startswith("{%")
