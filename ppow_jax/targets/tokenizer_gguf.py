"""The tokenizer of a GGUF file: byte-level BPE, rebuilt from metadata."""

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ppow_jax.errors import UserError
from ppow_jax.targets.tokenizer import ENDS, Tokenizer

_CONTROL, _ADDED = 3, 4  # kinds of tokens
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
_PRE: dict[
    str, list[pre_tokenizers.PreTokenizer]
] = {  # tokenizer.ggml.pre -> how text is split before merges
    "gpt-2": _BYTES,
    "smollm": [pre_tokenizers.Digits(individual_digits=True), *_BYTES],
    "llama-bpe": _words("{1,3}"),
    "qwen2": _words(""),
}
_ELSEWHERE = "the model's Hugging Face directory has its tokenizer.json"


def from_gguf(metadata: Mapping[str, Any], where: str = "GGUF file") -> Tokenizer:
    """Rebuilds a tokenizer from GGUF metadata; `where` is the file, for errors.

    Raises:
      UserError: a tokenizer or pre-tokenizer of another kind, no chat template, or metadata that are missing,
        of a wrong type or do not fit together; naming the key.
    """
    read = _Metadata(metadata, where)
    model, pre = read.value("model", str, "a name"), read.value("pre", str, "a name", "")
    if model != "gpt2" or pre not in _PRE:
        raise UserError(
            f"{where}: GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; expected "
            f"'gpt2' with one of {', '.join(_PRE)}; {_ELSEWHERE}"
        )
    tokens, kinds = read.listed("tokens", str), read.listed("token_type", int, [])
    if kinds and len(kinds) != len(tokens):
        raise read.wrong("token_type", f"{len(kinds)} kinds", f"{len(tokens)}, as many as tokens")
    core = _core(read, tokens, ignore_merges=pre == "llama-bpe")
    core.pre_tokenizer = pre_tokenizers.Sequence(_PRE[pre])
    core.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _ADDED)]
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in control])
    ids = {name: read.id_of(f"{name}_token_id", tokens) for name in ("bos", "eos", "eot", "eom")}
    written = [ids["eos"], ids["eot"], ids["eom"], *(i for i, t in enumerate(tokens) if t in ENDS)]
    stops = tuple(dict.fromkeys(i for i in written if i is not None))
    if not stops:
        raise read.wrong("eos_token_id", "nowhere", f"the id that ends a text; {_ELSEWHERE}")
    named = {f"{name}_token": tokens[i] for name in ("bos", "eos") if (i := ids[name]) is not None}
    return Tokenizer(core, read.template(), stops, named)


def _core(read: "_Metadata", tokens: list[str], ignore_merges: bool) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise read.wrong("tokens", f"{twice!r} twice", f"every token once; {_ELSEWHERE}")
    merges = []
    for merge in read.listed("merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise read.wrong("merges", repr(merge), f"two tokens whose union is one too; {_ELSEWHERE}")
        merges.append((left, right))
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=ignore_merges)
    return tokenizers.Tokenizer(model)


class _Metadata:
    """The keys of a tokenizer in a GGUF file, each of its type."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values, self._where = values, where

    def wrong(self, key: str, found: Any, expected: str) -> UserError:
        """The error of a key that holds something else than expected."""
        return UserError(f"{self._where}: found {_full(key)} {found}, expected {expected}")

    def value(self, key: str, kind: type, expected: str, default: Any = None) -> Any:
        """A value of its type; `default` where there is none.

        Raises:
          UserError: another type, or it is missing and has no default.
        """
        found = self._values.get(_full(key), default)
        if not isinstance(found, kind) or isinstance(found, bool):
            raise self.wrong(
                key, "nowhere" if found is None else repr(found)[:60], f"{expected}; {_ELSEWHERE}"
            )
        return found

    def listed(self, key: str, kind: type, default: Any = None) -> list:
        """A list of values of a type; errors as of `value`."""
        plural = {str: "texts", int: "whole numbers"}[kind]
        found = self.value(key, list, f"a list of {plural}", default)
        wrong = next((x for x in found if not isinstance(x, kind) or isinstance(x, bool)), None)
        if wrong is not None:
            raise self.wrong(key, f"with {wrong!r} in it", f"a list of {plural}; {_ELSEWHERE}")
        return found

    def id_of(self, key: str, tokens: list[str]) -> int | None:
        """The id of a token; None: there is none."""
        found = self.value(key, int, "the id of a token", -1)
        if _full(key) in self._values and not 0 <= found < len(tokens):
            raise self.wrong(key, found, f"an id from 0 to {len(tokens) - 1}")
        return found if found >= 0 else None

    def template(self) -> str:
        """The chat template.

        Raises:
          UserError: there is none, or it is no text.
        """
        found = self.value("chat_template", str, "a text", "")
        if not found:
            raise UserError(f"{self._where}: the GGUF file has no chat template; use an instruct model")
        return found


def _full(key: str) -> str:
    return f"tokenizer.{key}" if key == "chat_template" else f"tokenizer.ggml.{key}"
