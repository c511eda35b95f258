"""The tokenizer of a Hugging Face directory, as `transformers.PreTrainedTokenizerFast` reads its files.

`tokenizer.json` is the tokenizer. `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`
name special tokens, which are added where it lacks them. The chat template is the first found of
`chat_template.jinja`, `tokenizer_config.json` and `chat_template.json`. Ids that end a turn are in
`generation_config.json` or `config.json`.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ppow_jax.errors import UserError
from ppow_jax.targets.tokenizer import ENDS, Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_IDS = 2**31
_SLOW = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")


class _File:
    """A JSON object in a file; empty where there is none.

    Raises:
      UserError: it cannot be read, or holds something else.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.values = path, {}
        if not path.is_file():
            return
        try:
            text = path.read_text("utf-8-sig")
            self.values = json.loads(text)
            if r"\ud" in text.lower():  # also a half of a surrogate pair, which no tokenizer takes
                json.dumps(self.values, ensure_ascii=False).encode()
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{path}: no readable JSON file ({e}); fetch it again") from e
        if not isinstance(self.values, dict):
            raise self.wrong("", self.values, "an object: keys and their values")

    def wrong(self, key: str, value: Any, expected: str) -> UserError:
        """The error of a key that holds something else than expected."""
        found = " ".join(filter(None, [key, _short(value)]))
        return UserError(f"{self.path}: found {found}, expected {expected}")

    def get(self, key: str, kind: type, expected: str, default: Any = None) -> Any:
        """A value of its type; `default` where it is missing or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.wrong(key, value, expected)
        return value

    def token(self, key: str, value: Any) -> AddedToken:
        """A token, which files hold as its text or as an object with its flags."""
        if isinstance(value, str):
            return AddedToken(value, special=True, normalized=False)
        expected = "a token: its text, or an object with its 'content' and flags"
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise self.wrong(key, value, expected)
        flags = {flag: value[flag] for flag in _FLAGS if flag in value}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise self.wrong(key, value, f"{expected} (true or false)")
        return AddedToken(value["content"], **{"special": False} | flags)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of a directory.

    Raises:
      UserError: naming the file and the key: something is missing, cannot be read or is of another type.
    """
    about = _File(directory / "tokenizer_config.json")
    core, pad = read_core(directory / "tokenizer.json")
    special = _add_tokens(core, directory, about, pad)
    core.encode_special_tokens = about.get("split_special_tokens", bool, "true or false", False)
    written = [core.token_to_id(token) for token in (special.get("eos_token", ""), *ENDS)]
    stops = tuple(dict.fromkeys(i for i in (*written, *_ends(directory, core)) if i is not None))
    if not stops:
        raise UserError(f"{directory}: found no eos_token_id in its files, expected the ids that end a text")
    return Tokenizer(core, _template(directory, about), stops, special)


def read_core(file: pathlib.Path) -> tuple[tokenizers.Tokenizer, str | None]:
    """What `tokenizer.json` holds, without the cutting, padding and chance that it may be saved with.

    Returns:
      The tokenizer, and the text of the token that it padded with, if it did.

    Raises:
      UserError: it is not there or cannot be read, or gives tokens other ids than it says.
    """
    if not file.is_file():
        slow = [name for name in _SLOW if (file.parent / name).is_file()]
        where = str(file.parent)
        remedy = "fetch it"
        if slow:
            load = f"from transformers import AutoTokenizer as A; A.from_pretrained({where!r})"
            remedy = f'make it of {slow[0]}: python -c "{load}.save_pretrained({where!r})"'
        raise UserError(
            f"{where}: found no tokenizer.json, expected the fast tokenizer of the model; {remedy}"
        )
    parsed = _File(file)
    try:
        core = tokenizers.Tokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # the library raises nothing more specific, and a panic of it is no Exception
        reason = " ".join(str(e).split())
        raise UserError(
            f"{file}: no readable tokenizer ({reason}); expected the model's tokenizer.json"
        ) from e
    pad = core.padding["pad_token"] if core.padding else None
    core.no_truncation()
    core.no_padding()
    if getattr(core.model, "dropout", None):
        core.model.dropout = None
    for token in parsed.get("added_tokens", list, "a list of tokens", []):
        if core.token_to_id(token["content"]) != token["id"]:
            at = core.token_to_id(token["content"])
            raise parsed.wrong("added_tokens", token, f"the id {at} by the tokens before it")
    return core, pad


def _add_tokens(
    core: tokenizers.Tokenizer, directory: pathlib.Path, about: _File, pad: str | None
) -> dict[str, str]:
    """Adds special tokens that the tokenizer lacks; returns the texts of all by name, for the template."""
    listed = about.get("added_tokens_decoder", dict, "tokens by id", {})
    for key in sorted(listed, key=lambda key: (len(key), key)):
        where = f"added_tokens_decoder.{key}"
        _add(core, about.token(where, listed[key]), key, about, where)
    named = {"pad_token": AddedToken(pad, special=True)} if pad else {}
    others: list[AddedToken] = []
    files = [about]
    if "added_tokens_decoder" not in about.values:  # files of old: what it says is in files of its own
        files.append(_File(directory / "special_tokens_map.json"))
        legacy = _File(directory / "added_tokens.json")
        for token in legacy.values:
            legacy.get(token, int, "an id")
        for token, at in sorted(legacy.values.items(), key=lambda item: item[1] or 0):
            _add(core, AddedToken(token), at, legacy, token)
    for file in files:
        for key, value in file.values.items():
            if key in _LISTS and isinstance(value, list):
                others += [file.token(key, token) for token in value]
            elif key in _LISTS and isinstance(value, dict):
                named |= {name: file.token(f"{key}.{name}", token) for name, token in value.items()}
            elif key in _LISTS and value is not None:
                raise file.wrong(key, value, "a list of tokens, or tokens by name")
            elif key in _NAMED or (key.endswith("_token") and isinstance(value, str)):
                named |= {key: file.token(key, value)} if value is not None else {}
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    missing = [token for token in (*named.values(), *others) if token.content not in known]
    core.add_special_tokens(missing)
    return {name: token.content for name, token in named.items()}


def _add(core: tokenizers.Tokenizer, token: AddedToken, at: Any, file: _File, key: str) -> None:
    """Adds a token that a key gives an id, unless it is there."""
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    if token.content not in known:
        (core.add_special_tokens if token.special else core.add_tokens)([token])
    found = core.token_to_id(token.content)
    if str(found) != str(at):
        raise UserError(
            f"{file.path}: found {key}, the token {token.content!r} with the id {at}, expected {found}, the "
            "id that it has in tokenizer.json or by the tokens before it"
        )


def _ends(directory: pathlib.Path, core: tokenizers.Tokenizer) -> list[int]:
    """Ids that end a turn, by the first file that has any."""
    for name in ("generation_config.json", "config.json"):
        file = _File(directory / name)
        text = file.get("text_config", dict, "a group of keys", {})
        found = file.values.get("eos_token_id", text.get("eos_token_id"))
        if found is None or found == []:
            continue
        ids = found if isinstance(found, list) else [found]
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or any(not 0 <= i < _IDS or core.id_to_token(i) is None for i in ids):
            raise file.wrong("eos_token_id", found, "an id of the tokenizer, or a list of such")
        return ids
    return []


def _template(directory: pathlib.Path, about: _File) -> str:
    """The chat template; of several that have names, the one called `default`."""
    single = directory / "chat_template.jinja"
    if single.is_file():
        try:
            return single.read_text("utf-8")
        except (OSError, ValueError) as e:
            raise UserError(f"{single}: no readable text ({e}); fetch it again") from e
    for file in (about, _File(directory / "chat_template.json")):
        found = file.values.get("chat_template")
        if isinstance(found, list):
            found = _by_name(file, found)
        if isinstance(found, Mapping):
            if "default" not in found:
                raise file.wrong(
                    "chat_template",
                    list(found),
                    "one called 'default'; write the one to use into " + single.name,
                )
            found = found["default"]
        if isinstance(found, str) and found:
            return found
        if found:
            raise file.wrong("chat_template", found, "a text, or a list of such with names")
    raise UserError(
        f"{directory}: found no {single.name} and no 'chat_template' in tokenizer_config.json; write the "
        f"model's template into {single.name}"
    )


def _by_name(file: _File, found: list) -> dict[str, str]:
    try:
        return {template["name"]: template["template"] for template in found}
    except (TypeError, KeyError) as e:
        raise file.wrong("chat_template", found, "a list of objects with 'name' and 'template'") from e
