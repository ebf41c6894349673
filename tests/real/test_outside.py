"""What people have around the project: an environment without PyTorch, a model that chats."""

import subprocess
import sys
import tomllib
from importlib.metadata import requires

import pytest
from tiny_base import REPOSITORY, TOKENIZER, write_base
from transformers.utils.import_utils import is_jinja_available

from genlora_jax.evaluation.tasks.match import MatchConfig, Problem, run
from genlora_jax.generation.subject import load_subject

CHAT = """
import sys
sys.modules["torch"] = None  # as if it were not there
from genlora_jax.hf import base_model
source, tokenizer = base_model.find_base(base_model.ModelConfig(path=sys.argv[1]))
base_model.model_config(source)
tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
print(tokenizer.apply_chat_template([dict(role="user", content="Hi")], tokenize=False))
"""


def test_without_pytorch_a_chat_is_rendered_and_nothing_is_said():
    command = [sys.executable, "-c", CHAT, str(TOKENIZER)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[Hi]\n", "")


def test_what_transformers_renders_chats_with_comes_with_the_package():
    # It has jinja2 by way of PyTorch, which a JAX environment lacks.
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(n for n in requires("transformers") if "extra" not in n)]
    assert is_jinja_available()
    assert any(need.lower().startswith("jinja2") for need in needed)


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_questions_to_a_chat_model_without_its_template_are_remarked_on(tmp_path, capsys, template):
    subject = load_subject(str(write_base(tmp_path / "base")), dtype="float32")
    subject.tokenizer.chat_template = template
    problem = Problem("Hi", "Ho")
    run(subject, MatchConfig(data="rows.jsonl", max_new_tokens=2), [problem])
    assert ("chat: true" in capsys.readouterr().out) == (template is not None)
    chat = [{"role": "user", "content": "Hi"}]
    if template:
        run(subject, MatchConfig(data="rows.jsonl", max_new_tokens=2), [Problem(chat, "Ho")])
        assert "chat: true" not in capsys.readouterr().out
