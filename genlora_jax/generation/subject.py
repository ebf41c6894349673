"""What is evaluated: a model with its parameters, an adapter's factors and a tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from genlora_jax.data.chat import render
from genlora_jax.data.conversation import Conversation
from genlora_jax.hf.base_model import Base, ModelConfig, find_base, load_base
from genlora_jax.hf.peft_import import load_onto
from genlora_jax.mesh import one_device
from genlora_jax.models.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, str]]
# Text, or a conversation that the model is to continue.
Prompt = str | Messages | Conversation


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A base, a merged model, or a base with an adapter.

    Attributes:
        model: The model.
        params: Its parameters.
        factors: An adapter's factors; empty for none.
        tokenizer: The model's tokenizer.
        stop: Ids of the tokens that end a text.
        batch_size: Rows of a batch.
    """

    model: LlamaForCausalLM
    params: Any
    factors: Mapping[str, Any]
    tokenizer: "PreTrainedTokenizerFast"
    stop: tuple[int, ...] = ()
    batch_size: int = 16

    @property
    def positions(self) -> int:
        """The most tokens that the model can see."""
        return self.model.config.max_position_embeddings

    @property
    def prefix(self) -> int:
        """The token that begins a text without context."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, *self.stop):
            if token is not None:
                return token
        raise ValueError("the tokenizer has no token that begins or ends a text")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of a text to be continued: with the token that begins it, none that ends it.

        Raises:
            ValueError: If the text holds half a character, as a command line that is no UTF-8 does.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = ascii(text[error.start])
            raise ValueError(f"the prompt holds {half}, half a character: write UTF-8") from None
        begin = self.tokenizer.bos_token
        # A chat template may have written the first token already.
        special = special and not (begin and text.startswith(begin))
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        ends = special and len(ids) > 0 and ids[-1] == self.tokenizer.eos_token_id
        return list(ids[:-1] if ends else ids)

    def encode_prompt(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; a conversation is rendered in the tokenizer's chat template.

        Raises:
            ValueError: If it is a conversation that the tokenizer's chat template does not render.
        """
        if isinstance(prompt, str):
            return self.encode(prompt) or [self.prefix]
        return self.encode(self.render(prompt), special=False)

    def render(self, messages: Messages | Conversation, *, cue: bool = True) -> str:
        """A conversation as text, by default with the cue to answer.

        Raises:
            ValueError: If the tokenizer has no chat template, or one that does not render it.
        """
        return rendered(messages, self.tokenizer, cue=cue)


def rendered(
    messages: Messages | Conversation, tokenizer: "PreTrainedTokenizerFast", *, cue: bool = True
) -> str:
    """A conversation as text; raises as `Subject.render` does."""
    talk = messages if isinstance(messages, Conversation) else Conversation(messages)
    return render(talk, tokenizer, cue=cue)


def subject_of(base: Base, adapter: str | None = None, *, batch_size: int = 16) -> Subject:
    """A loaded base, alone or with an adapter: a directory of `save_adapter` or of PEFT.

    The tokenizer is the base's: `find_base` has taken the adapter's, if it has one of its own.

    Raises:
        FileNotFoundError: If there is no such adapter.
        ValueError: If it was made for another base.
    """
    model, params = base.model, base.params
    factors: Mapping[str, Any] = {}
    if adapter is not None:
        model, params, factors = load_onto(adapter, model, params, base.source)
    return Subject(
        model=model,
        params=params,
        factors=factors,
        tokenizer=base.tokenizer,
        stop=base.stop,
        batch_size=batch_size,
    )


def load_subject(
    path: str, adapter: str | None = None, *, batch_size: int = 16, **options: Any
) -> Subject:
    """Loads what is to be evaluated onto one device.

    Args:
        path: A base or a merged model: directory, here or in a bucket, or hub id.
        adapter: An adapter's directory, one of `save_adapter` or of PEFT.
        batch_size: Rows of a batch.
        **options: Fields of `ModelConfig`.

    Raises:
        FileNotFoundError: If there is no such model or adapter.
        ValueError: If the adapter does not fit the model.
    """
    cfg = ModelConfig(path=path, **options)
    base = load_base(cfg, find_base(cfg, adapter), one_device())
    return subject_of(base, adapter, batch_size=batch_size)
