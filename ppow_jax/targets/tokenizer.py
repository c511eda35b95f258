"""Tokenizer and chat template of a target."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jinja2
import jinja2.sandbox
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ppow_jax.errors import UserError

# Stands for a response while the text after it is rendered; no letters, which a template may fold.
_TURN = "\ufffe0\ufffe"
ENDS = ("<|endoftext|>",)  # end a text whatever the files say


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, and conversations to ids.

    Attributes:
      core: the `tokenizers` object; special tokens in the text are recognised.
      template: the model's chat template (jinja2).
      stop_ids: ids that end a turn; the first is the one that the template writes.
      bos, eos: texts of these tokens, for the template.
    """

    core: tokenizers.Tokenizer
    template: str
    stop_ids: tuple[int, ...]
    bos: str
    eos: str

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        return chat_template(self.template)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.core.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, nothing added."""
        return self.core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self.core.decode(list(ids), skip_special_tokens=False)

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        """The conversation as text, ending where the assistant's next turn begins."""
        return self._compiled.render(
            messages=list(messages),
            tools=None,
            documents=None,
            add_generation_prompt=True,
            bos_token=self.bos,
            eos_token=self.eos,
        )

    def first_turn(self, user: str) -> list[int]:
        """Ids up to the start of the response to the first user message."""
        return self.encode(self.render([{"role": "user", "content": user}]))

    def next_turn(self, user: str) -> list[int]:
        """Ids between the end of a response and the start of the next one.

        The response's own ids are kept as the target emitted them, never decoded and re-encoded; what is
        here begins with the end-of-turn token, so the split is at a token boundary.
        """
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": _TURN},
            {"role": "user", "content": user},
        ]
        _, found, after = self.render(messages).partition(_TURN)
        if not found:
            raise UserError("chat template: it leaves out what the assistant said before, expected all turns")
        ids = self.encode(after)
        return ids[next((at for at, i in enumerate(ids) if i in self.stop_ids), 0) :]


def _refuse(message: str) -> None:
    raise UserError(f"chat template: {message}")


def chat_template(source: str) -> jinja2.Template:
    """Compiles a chat template in jinja2's sandbox, with the settings that model authors assume.

    Raises:
      UserError: it is no template.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise UserError(f"chat template: line {e.lineno}: {e.message}") from e


_CONTROL, _ADDED = 3, 4  # kinds of tokens in GGUF files
_WORDS = (  # of llama 3 and, with another number of digits at once, of Qwen2
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _words(digits: str) -> list[pre_tokenizers.PreTokenizer]:
    expression = tokenizers.Regex(_WORDS % digits)
    return [
        pre_tokenizers.Split(expression, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


_BYTES: list[pre_tokenizers.PreTokenizer] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
_PRE = {  # tokenizer.ggml.pre -> how text is split before merges
    "gpt-2": _BYTES,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *_BYTES],
    "llama-bpe": _words("{1,3}"),
    "qwen2": _words(""),
}


def from_gguf(metadata: dict[str, Any]) -> Tokenizer:
    """Rebuilds a byte-level BPE tokenizer from GGUF metadata.

    Raises:
      UserError: a tokenizer or pre-tokenizer of another kind, no chat template, or metadata that are missing.
    """
    get = lambda key: metadata.get(f"tokenizer.ggml.{key}")  # noqa: E731

    def need(key: str) -> Any:
        if get(key) is None:
            raise UserError(
                f"GGUF metadata: found no tokenizer.ggml.{key}, expected it; convert the model again"
            )
        return get(key)

    if get("model") != "gpt2" or get("pre") not in _PRE:
        raise UserError(
            f"GGUF tokenizer {get('model')!r} with pre-tokenizer {get('pre')!r} is not supported; expected "
            f"'gpt2' with one of {', '.join(_PRE)}; the model's Hugging Face directory has its tokenizer.json"
        )
    if "tokenizer.chat_template" not in metadata:
        raise UserError("the GGUF file has no chat template; use an instruct model")
    tokens = need("tokens")
    merges = [tuple(pair.split(" ")) for pair in need("merges")]
    core = tokenizers.Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(tokens)},
            merges=merges,
            fuse_unk=False,
            ignore_merges=get("pre") == "llama-bpe",
        )
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(_PRE[need("pre")])
    core.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, need("token_type"), strict=True) if kind in (_CONTROL, _ADDED)]
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in control])
    written = [get("eos_token_id"), get("eot_token_id"), *_ends(tokens)]
    return with_stops(
        Tokenizer(
            core=core,
            template=metadata["tokenizer.chat_template"],
            stop_ids=tuple(dict.fromkeys(i for i in written if i is not None)),
            bos="" if get("bos_token_id") is None else tokens[get("bos_token_id")],
            eos=tokens[need("eos_token_id")],
        )
    )


def with_stops(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with that stop id first which its template writes behind a response."""
    first = next(iter(tokenizer.next_turn("?")), None)
    return dataclasses.replace(
        tokenizer, stop_ids=tuple(sorted(tokenizer.stop_ids, key=lambda i: i != first))
    )


def _ends(tokens: Sequence[str]) -> list[int]:
    """Tokens that end a text whatever the metadata says."""
    return [i for i, t in enumerate(tokens) if t in ENDS]
