"""The tokenizer of a base, or the one that an adapter brings, and the tokens that end a text."""

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genlora_jax.data.chat import end_of_turn_token_ids
from genlora_jax.hf.checkpoint import CONFIG, TEMPLATES, read_json, refuse_pointers
from genlora_jax.storage import copy_file, is_remote, storage_path
from genlora_jax.validation import refuse_pointer, require_int

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
TEMPLATE = "chat_template.jinja"
# What `save_pretrained` of a tokenizer or processor writes.
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt"),
    *("merges.txt", "spiece.model", "sentencepiece.*", "tekken.json", "*.tiktoken"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json"),
)


def load_tokenizer(directory: Path, adapter: str | Path | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer of a checkpoint, or the one in an adapter's directory if it has its own.

    An adapter's chat template without a tokenizer takes the place of the checkpoint's.

    Raises:
        ValueError: If there is none, or none that knows the position in the text of each token,
            or if the adapter's gives a token of the checkpoint's another id.
    """
    if adapter is not None:
        refuse_pointers(storage_path(adapter))
    own = _own_tokenizer(adapter)
    tokenizer = _load(own or directory)
    if own is not None and (directory / TOKENIZER[0]).is_file():
        theirs, ours = _load(directory).get_vocab(), tokenizer.get_vocab()
        for token in sorted(theirs.keys() & ours.keys(), key=theirs.__getitem__):
            if theirs[token] != ours[token]:
                raise ValueError(
                    f"{own}: its tokenizer gives {token!r} the id {ours[token]}, that of "
                    f"{directory} {theirs[token]}: the adapter was made for another base"
                )
    elif own is None and adapter is not None and (storage_path(adapter) / TEMPLATE).is_file():
        tokenizer.chat_template = (storage_path(adapter) / TEMPLATE).read_text(encoding="utf-8")
    return tokenizer


def _own_tokenizer(adapter: str | Path | None) -> Path | None:
    if adapter is None or not any((storage_path(adapter) / name).is_file() for name in TOKENIZER):
        return None
    return storage_path(adapter)


def _load(directory: Path) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    with _local(directory) as local:
        try:
            # False, or it would ask on the terminal whether to run the directory's own code.
            tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
        except Exception as error:  # the errors of its parsers have no common base class
            reason = " ".join(str(error).split()).replace(str(local), str(directory))[:300]
            raise ValueError(f"{directory} has no usable tokenizer: {reason}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{directory}: the tokenizer is not a fast one; it needs a tokenizer.json")
    if local != directory:
        tokenizer.name_or_path = str(directory)
    return tokenizer


@contextlib.contextmanager
def _local(directory: Path) -> Iterator[Path]:
    """A tokenizer's directory, or a copy of it if it is in a bucket: transformers reads no URLs."""
    if not is_remote(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="genlora-") as copy:
        copy_files(directory, (*TOKENIZER_FILES, *TEMPLATES, CONFIG), Path(copy))
        for file in Path(copy).glob("*.*"):
            refuse_pointer(file, named=directory / file.name)
        yield Path(copy)


def check_rows(tokenizer: "PreTrainedTokenizerFast", rows: int, directory: Path) -> None:
    """Raises ValueError if a tokenizer has a token beyond the embedding's rows.

    More rows than tokens are common and do no harm.
    """
    token, index = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if index >= rows:
        raise ValueError(
            f"{directory}: token {token!r} of the tokenizer has id {index}, but the embedding has "
            f"{rows} rows (vocab_size): remove the token, or take the tokenizer of this model"
        )


def end_tokens(directory: Path, tokenizer: "PreTrainedTokenizerFast") -> list[int]:
    """Ids of the tokens that end a text: those the files name, and those that are trained to.

    Training ends a completion with the tokenizer's end token, and a turn with the chat template's.
    One that the generation config (or else config) lacks is put before the others and warned of:
    so does the trainer of `transformers`.
    """
    stated = _stated(directory)
    trained = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    trained += end_of_turn_token_ids(tokenizer)[:1]
    missing = [token for token in dict.fromkeys(trained) if token not in stated]
    if missing and stated:
        said, added = (", ".join(_named(tokenizer, ids)) for ids in (stated, missing))
        warnings.warn(
            f"{directory}: generation config and config end a text with {said}, tokenizer and chat "
            f"template with {added}: decoding stops at each of them, and exports say so",
            stacklevel=2,
        )
    return missing + stated


def _stated(directory: Path) -> list[int]:
    """Ids of the tokens that end a text, as generation config or else config has them."""
    for file in (directory / GENERATION, directory / CONFIG):
        ids = read_json(file).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            for token in ids:
                require_int(f"{file}: eos_token_id", token, 0)
            return list(ids)
    return []


def _named(tokenizer: "PreTrainedTokenizerFast", ids: list[int]) -> list[str]:
    return [f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids]


def changed_generation_config(source: Path, adapter: str | Path | None) -> dict[str, Any]:
    """The generation config of an export, if it has to name more end tokens than the base's.

    Raises:
        ValueError: If the tokenizer, the base's or the adapter's own, does not fit the base.
    """
    if not ((_own_tokenizer(adapter) or source) / TOKENIZER[0]).is_file():
        return {}
    config, tokenizer = read_json(source / CONFIG), load_tokenizer(source, adapter)
    check_rows(tokenizer, config["vocab_size"], source)
    ids = end_tokens(source, tokenizer)
    if ids == _stated(source):
        return {}
    if (source / GENERATION).is_file():
        return read_json(source / GENERATION) | {"eos_token_id": ids}
    fields = ("bos_token_id", "pad_token_id")
    settings = {field: config[field] for field in fields if config.get(field) is not None}
    return settings | {"eos_token_id": ids}


def copy_tokenizer(source: Path, adapter: str | Path | None, directory: Path) -> None:
    """Copies the tokenizer and the chat templates, an adapter's own in the place of the base's."""
    own = _own_tokenizer(adapter)
    templates = own or source
    if own is None and adapter is not None and (storage_path(adapter) / TEMPLATE).is_file():
        templates = storage_path(adapter)
    copy_files(own or source, TOKENIZER_FILES, directory)
    copy_files(templates, TEMPLATES, directory)


def copy_files(source: Path, patterns: tuple[str, ...], directory: Path) -> None:
    """Copies the files of some patterns, under their paths below `source`."""
    for file in (file for pattern in patterns for file in source.glob(pattern)):
        if file.is_file():
            target = directory / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            copy_file(file, target)
