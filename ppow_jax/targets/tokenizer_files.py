"""The tokenizer of a Hugging Face directory, as `transformers.PreTrainedTokenizerFast` reads its files.

`tokenizer.json` is the tokenizer. `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json`
name special tokens, which are added where it lacks them. The chat template is the first found of
`chat_template.jinja`, `tokenizer_config.json` and `chat_template.json`. Ids that end a turn are in
`generation_config.json` or `config.json`.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ppow_jax.errors import UserError
from ppow_jax.models import fields
from ppow_jax.models.fields import Fields
from ppow_jax.targets.tokenizer import ENDS, Tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_LISTS = ("extra_special_tokens", "additional_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_IDS = 2**31
_SLOW = ("tokenizer.model", "tiktoken.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")


def read(directory: pathlib.Path) -> Tokenizer:
    """The tokenizer of a directory.

    Raises:
      UserError: naming the file and the key: something is missing, cannot be read or is of another type.
    """
    about = fields.read_if_there(directory / "tokenizer_config.json")
    core, pad = read_core(directory / "tokenizer.json")
    special = _add_tokens(core, directory, about, pad)
    core.encode_special_tokens = about.flag("split_special_tokens")
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
    parsed = fields.read(file, "the tokenizer.json of a model")
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
    for token in parsed.mixed("added_tokens", list, "a list of tokens"):
        if core.token_to_id(token["content"]) != token["id"]:
            at = core.token_to_id(token["content"])
            said = fields.shown(token)
            raise parsed.wrong("added_tokens", f"the id {at} by the tokens before it", said)
    return core, pad


def _add_tokens(
    core: tokenizers.Tokenizer, directory: pathlib.Path, about: Fields, pad: str | None
) -> dict[str, str]:
    """Adds special tokens that the tokenizer lacks; returns the texts of all by name, for the template."""
    listed = about.mixed("added_tokens_decoder", dict, "tokens by id")
    for key in sorted(listed, key=lambda key: (len(key), key)):
        where = f"added_tokens_decoder.{key}"
        _add(core, _token(about, where, listed[key]), key, about, where)
    named = {"pad_token": AddedToken(pad, special=True)} if pad else {}
    others: list[AddedToken] = []
    files = [about]
    if "added_tokens_decoder" not in about.values:  # files of old: what it says is in files of its own
        files.append(fields.read_if_there(directory / "special_tokens_map.json"))
        legacy = fields.read_if_there(directory / "added_tokens.json")
        for token in legacy.values:
            legacy.whole(token, None, least=0)
        for token, at in sorted(legacy.values.items(), key=lambda item: item[1] or 0):
            _add(core, AddedToken(token), at, legacy, token)
    for file in files:
        for key, value in file.values.items():
            if key in _LISTS and isinstance(value, list):
                others += [_token(file, key, token) for token in value]
            elif key in _LISTS and isinstance(value, dict):
                named |= {name: _token(file, f"{key}.{name}", token) for name, token in value.items()}
            elif key in _LISTS and value is not None:
                raise file.wrong(key, "a list of tokens, or tokens by name")
            elif key in _NAMED or (key.endswith("_token") and isinstance(value, str)):
                named |= {key: _token(file, key, value)} if value is not None else {}
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    missing = [token for token in (*named.values(), *others) if token.content not in known]
    core.add_special_tokens(missing)
    return {name: token.content for name, token in named.items()}


def _token(file: Fields, key: str, value: Any) -> AddedToken:
    """A token, which files hold as its text or as an object with its flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    expected = "a token: its text, or an object with its 'content' and flags"
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise file.wrong(key, expected, fields.shown(value))
    flags = {flag: value[flag] for flag in _FLAGS if flag in value}
    if not all(isinstance(flag, bool) for flag in flags.values()):
        raise file.wrong(key, f"{expected} (true or false)", fields.shown(value))
    return AddedToken(value["content"], **{"special": False} | flags)


def _add(core: tokenizers.Tokenizer, token: AddedToken, at: Any, file: Fields, key: str) -> None:
    """Adds a token that a key gives an id, unless it is there."""
    known = {token.content for token in core.get_added_tokens_decoder().values()}
    if token.content not in known:
        (core.add_special_tokens if token.special else core.add_tokens)([token])
    found = core.token_to_id(token.content)
    if str(found) != str(at):
        raise file.error(
            f"found {key}, the token {token.content!r} with the id {at}, expected {found}, the id that it "
            "has in tokenizer.json or by the tokens before it"
        )


def _ends(directory: pathlib.Path, core: tokenizers.Tokenizer) -> list[int]:
    """Ids that end a turn, by the first file that has any."""
    for name in ("generation_config.json", "config.json"):
        file = fields.read_if_there(directory / name)
        text = file.mixed("text_config", dict, "a group of keys")
        found = file.values.get("eos_token_id", text.get("eos_token_id"))
        if found is None or found == []:
            continue
        ids = found if isinstance(found, list) else [found]
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not whole or any(not 0 <= i < _IDS or core.id_to_token(i) is None for i in ids):
            said = fields.shown(found)
            raise file.wrong("eos_token_id", "an id of the tokenizer, or a list of such", said)
        return ids
    return []


def _template(directory: pathlib.Path, about: Fields) -> str:
    """The chat template; of several that have names, the one called `default`."""
    single = directory / "chat_template.jinja"
    if single.is_file():
        try:
            return single.read_text("utf-8")
        except (OSError, ValueError) as e:
            raise UserError(f"{single}: no readable text ({e}); fetch it again") from e
    for file in (about, fields.read_if_there(directory / "chat_template.json")):
        found = file.values.get("chat_template")
        if isinstance(found, list):
            found = _by_name(file, found)
        if isinstance(found, Mapping):
            if "default" not in found:
                expected = f"one called 'default'; write the one to use into {single.name}"
                raise file.wrong("chat_template", expected, str(list(found)))
            found = found["default"]
        if isinstance(found, str) and found:
            return found
        if found:
            raise file.wrong("chat_template", "a text, or a list of such with names")
    raise UserError(
        f"{directory}: found no {single.name} and no 'chat_template' in tokenizer_config.json; write the "
        f"model's template into {single.name}"
    )


def _by_name(file: Fields, found: list) -> dict[str, str]:
    try:
        return {template["name"]: template["template"] for template in found}
    except (TypeError, KeyError) as e:
        raise file.wrong("chat_template", "a list of objects with 'name' and 'template'") from e
