"""Evaluates a model or an adapter: `genlora evaluate --config EVALUATION.yaml`.

Any field can be given on the command line (`--match.limit 100`); `--print_config` shows what would
run. A task runs if it has settings: `perplexity`, `match`, `choices`, `code`. The output directory
then holds `results.json`, and `TASK.jsonl` with prompts and answers.
"""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from genlora_jax.atomic_files import new_directory, refuse_existing
from genlora_jax.evaluation.tasks import choices, code, match, perplexity
from genlora_jax.evaluation.tasks.choices import ChoicesConfig
from genlora_jax.evaluation.tasks.code import CodeConfig
from genlora_jax.evaluation.tasks.match import MatchConfig
from genlora_jax.evaluation.tasks.perplexity import PerplexityConfig
from genlora_jax.evaluation.tasks.task import AnswerConfig, PromptConfig, read_examples
from genlora_jax.generation.answers import room
from genlora_jax.generation.subject import Subject, rendered, subject_of
from genlora_jax.hf.base_model import ModelConfig, find_base, load_base
from genlora_jax.mesh import MeshConfig, make_mesh, one_device
from genlora_jax.settings import keep_compilations, parse, report_errors
from genlora_jax.training.find_adapter import find_adapter, remark_on_base
from genlora_jax.training.provenance import digest, provenance

TASKS: dict[str, Any] = {"perplexity": perplexity, "match": match, "choices": choices, "code": code}
Items = dict[tuple[str, str], list[Any]]  # the rows of each task's sources


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated, on what; the fields of the YAML.

    Attributes:
        model: A base or a merged model.
        output: The directory to make.
        adapter: An adapter's directory, one of `save_adapter` or of PEFT.
        batch_size: Rows of a batch.
        overwrite: Replace an existing output.
        mesh: Devices of this process over which the model is sharded; one device if it is left out.
        perplexity: Completions to predict.
        match: Questions to answer.
        choices: Questions with options.
        code: Programs to write.
    """

    model: ModelConfig
    output: str
    adapter: str | None = None
    batch_size: int = 16
    overwrite: bool = False
    mesh: MeshConfig | None = None
    perplexity: PerplexityConfig | None = None
    match: MatchConfig | None = None
    choices: ChoicesConfig | None = None
    code: CodeConfig | None = None

    def __post_init__(self) -> None:
        """Raises ValueError that names the field at fault."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if not any(getattr(self, name) for name in TASKS):
            raise ValueError(f"nothing to evaluate: give settings for one of {', '.join(TASKS)}")


def evaluate(cfg: Evaluation) -> dict[str, Any]:
    """Runs an evaluation; returns what it writes to `results.json`."""
    if cfg.adapter:
        cfg = dataclasses.replace(cfg, adapter=find_adapter(cfg.adapter))
    inputs = (cfg.model.path, cfg.adapter)
    refuse_existing(cfg.output, overwrite=cfg.overwrite, inputs=inputs)
    asked = {name: task for name in TASKS if (task := getattr(cfg, name))}
    # Every row is read, and the sandbox tried, before minutes of loading and not after.
    items = _read(asked)
    walls = code.check_sandbox(cfg.code) if cfg.code else None
    mesh = one_device() if cfg.mesh is None else make_mesh(cfg.mesh)
    found = find_base(cfg.model, cfg.adapter)
    _check_prompts(asked, items, found[1])
    if cfg.adapter:
        remark_on_base(cfg.adapter, found[0])
    base = load_base(cfg.model, found, mesh)
    subject = subject_of(base, cfg.adapter, batch_size=cfg.batch_size)
    with new_directory(cfg.output, overwrite=cfg.overwrite) as directory:
        scores, lines = _run(subject, asked, items)
        report = {"results": scores, "settings": dataclasses.asdict(cfg), "sandbox": walls}
        report |= provenance()
        (directory / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        for name, text in lines.items():
            if text:
                (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return report


def _read(asked: dict[str, Any]) -> Items:
    """The rows of every source of every task, and checks of them against the task's settings."""
    items = {
        (name, source): TASKS[name].read(source, task.limit)
        for name, task in asked.items()
        for source in task.sources
    }
    for (name, _), rows in items.items():
        if check := getattr(TASKS[name], "check", None):
            check(asked[name], rows)
    for name, task in asked.items():
        if isinstance(task, PromptConfig):
            read_examples(task, TASKS[name].read)
    return items


def _check_prompts(asked: dict[str, Any], items: Items, tokenizer: Any) -> None:
    """Raises ValueError if a conversation does not go with the chat template."""
    for (name, _), rows in items.items():
        if isinstance(asked[name], AnswerConfig):
            for prompt in TASKS[name].prompts(asked[name], rows):
                if not isinstance(prompt, str):
                    rendered(prompt, tokenizer)


def _run(
    subject: Subject, asked: dict[str, Any], items: Items
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Metrics by task and source, and the lines of each task's file."""
    for task in asked.values():
        if isinstance(task, AnswerConfig):
            room(subject, task.max_new_tokens)
    scores: dict[str, dict[str, Any]] = {name: {} for name in asked}
    lines = dict.fromkeys(asked, "")
    for (name, source), rows in items.items():
        began = time.monotonic()
        result = TASKS[name].run(subject, asked[name], rows)
        scores[name][source] = result.metrics | {
            "rows": len(rows),
            "seconds": round(time.monotonic() - began, 2),
            "sha256": digest(source),
        }
        lines[name] += "".join(json.dumps({"data": source} | row) + "\n" for row in result.rows)
        shown = ", ".join(f"{metric} {value:.6g}" for metric, value in result.metrics.items())
        print(f"{name}, {source}, {len(rows):,} rows: {shown}")
    return scores, lines


def main(args: Sequence[str] | None = None) -> None:
    """Command line."""
    with report_errors():
        keep_compilations()
        cfg = parse(Evaluation, args, "evaluate")
        evaluate(cfg)
        print(f"results: {cfg.output}")


if __name__ == "__main__":
    main()
