"""The tokenizer of a GGUF file: byte-level BPE, rebuilt from metadata, or written as such."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ppow_jax.errors import UserError
from ppow_jax.models.fields import Fields
from ppow_jax.targets import gguf_files
from ppow_jax.targets.tokenizer import ENDS, Tokenizer

_NORMAL, _CONTROL, _ADDED, _UNUSED = 1, 3, 4, 5  # kinds of tokens
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
_REMEDY = "the model's Hugging Face directory has its tokenizer.json"


def from_gguf(metadata: Mapping[str, Any], where: str = "GGUF file") -> Tokenizer:
    """Rebuilds a tokenizer from GGUF metadata; `where` is the file, for errors.

    Raises:
      UserError: a tokenizer or pre-tokenizer of another kind, no chat template, or metadata that are missing,
        of a wrong type or do not fit together; naming the key.
    """
    groups = {
        prefix: Fields(
            {k.removeprefix(prefix): v for k, v in metadata.items() if k.startswith(prefix)},
            where,
            prefix,
            "a tokenizer",
            _REMEDY,
        )
        for prefix in ("tokenizer.", "tokenizer.ggml.")
    }
    read = groups["tokenizer.ggml."]
    model, pre = read.text("model"), read.text("pre", "")
    if model != "gpt2" or pre not in _PRE:
        raise UserError(
            f"{where}: GGUF tokenizer {model!r} with pre-tokenizer {pre!r} is not supported; expected "
            f"'gpt2' with one of {', '.join(_PRE)}; {_REMEDY}"
        )
    tokens, kinds = read.listed("tokens", str), read.listed("token_type", int, default=())
    if kinds and len(kinds) != len(tokens):
        expected = f"{len(tokens)}, as many as tokens"
        raise read.wrong("token_type", expected, f"{len(kinds)} kinds")
    core = _core(read, tokens, ignore_merges=pre == "llama-bpe")
    core.pre_tokenizer = pre_tokenizers.Sequence(_PRE[pre])
    core.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=False) if kind in (_CONTROL, _ADDED)]
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in control])
    ids = {
        name: read.whole(f"{name}_token_id", None, least=0, most=len(tokens) - 1)
        for name in ("bos", "eos", "eot", "eom")
    }
    written = [ids["eos"], ids["eot"], ids["eom"], *(i for i, t in enumerate(tokens) if t in ENDS)]
    stops = tuple(dict.fromkeys(i for i in written if i is not None))
    if not stops:
        raise read.wrong("eos_token_id", "the id that ends a text", "nowhere")
    named = {f"{name}_token": tokens[i] for name in ("bos", "eos") if (i := ids[name]) is not None}
    template = groups["tokenizer."].text("chat_template", "")
    if not template:
        raise UserError(f"{where}: the GGUF file has no chat template; use an instruct model")
    return Tokenizer(core, template, stops, named)


def _core(read: Fields, tokens: tuple[str, ...], ignore_merges: bool) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise read.wrong("tokens", "every token once", f"{twice!r} twice")
    merges = []
    for merge in read.listed("merges", str):
        left, _, right = merge.partition(" ")
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise read.wrong("merges", "two tokens whose union is one too", repr(merge))
        merges.append((left, right))
    model = models.BPE(vocab=vocab, merges=merges, fuse_unk=False, ignore_merges=ignore_merges)
    return tokenizers.Tokenizer(model)


# Tells the ways of splitting text apart.
_SAMPLE = "It's  12345 x2 DON'T\n\n def f(a_b):\r\n\treturn 3.14 \u00e9\u4e2d\u6587!!  "


def of_target(path: str, tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata of a target's tokenizer: its own GGUF file's where it is one, else as `metadata` makes it.

    Args:
      path: `config.target.path`.
      tokenizer, rows: as `metadata`.

    Raises:
      UserError: as `metadata`.
    """
    if not gguf_files.named(path):
        return metadata(tokenizer, rows)
    found = gguf_files.read(gguf_files.find(path)).metadata
    return {key: value for key, value in found.items() if key.startswith("tokenizer.")}


def metadata(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The metadata from which `from_gguf`, and llama.cpp, rebuild a tokenizer.

    Args:
      tokenizer: byte-level BPE.
      rows: of the target's embedding; ids without a token get one that is not used.

    Raises:
      UserError: a tokenizer of another kind, or one whose way of splitting text has no name here.
    """
    core = tokenizer.core
    about = json.loads(core.to_str())
    kind, split = about["model"]["type"], core.pre_tokenizer
    pre = None
    if kind == "BPE" and split is not None:
        found = [piece for piece, _ in split.pre_tokenize_str(_SAMPLE)]
        pre = next(
            (
                name
                for name, steps in _PRE.items()
                if found == [piece for piece, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(_SAMPLE)]
            ),
            None,
        )
    if pre is None:
        raise UserError(
            f"{tokenizer.model}: a tokenizer of the kind {kind} that splits text in its own way cannot be "
            f"written into a GGUF file; expected byte-level BPE as of {', '.join(_PRE)}"
        )
    added = core.get_added_tokens_decoder()
    tokens, kinds = [], []
    for i in range(rows):
        token = core.id_to_token(i)
        if token is None:
            tokens.append(f"[PAD{i}]")
            kinds.append(_UNUSED)
        else:
            tokens.append(token)
            special = i in added and added[i].special
            kinds.append(_CONTROL if special else _ADDED if i in added else _NORMAL)
    merges = [m if isinstance(m, str) else " ".join(m) for m in about["model"]["merges"]]
    ids = {name: core.token_to_id(text) for name in ("bos", "eos") if (text := getattr(tokenizer, name))}
    values = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": False,  # the template writes it
        "tokenizer.chat_template": tokenizer.template,
    }
    return values | {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
