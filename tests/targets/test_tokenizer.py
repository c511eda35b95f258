"""The tokenizer of a Hugging Face directory: what transformers makes of its files, and what is refused.

Ids and texts are those of transformers 5.19 for the same files.
"""

import dataclasses
import json
import pathlib

import pytest
import tokenizers
from chats import CHATML, END, NO_SYSTEM, START, TAGGED, TEXT_END, THINKING, blank_first, tokenizer
from test_huggingface import write_tokenizer
from tokenizers import models

from ppow_jax.errors import UserError
from ppow_jax.targets import tokenizer_files
from ppow_jax.targets.tokenizer import Tokenizer, with_stops
from ppow_jax.targets.tokenizer_files import read

USER = {"role": "user", "content": "ABCDEF"}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@pytest.fixture
def directory(tmp_path) -> pathlib.Path:
    """Ids 0 to 65 are `!` to a backquote, the blank and the line feed; then <|begin|>, <|eot|>, <|start|>,
    <|end|>."""
    write_tokenizer(tmp_path)
    return tmp_path


def change(file: pathlib.Path, **values) -> None:
    """Sets keys of a JSON file, made if need be; None: takes them away."""
    held = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({k: v for k, v in (held | values).items() if v is not None}))


def refused(directory: pathlib.Path, *said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(directory)
    assert "\n" not in str(caught.value)
    for words in said:
        assert words in str(caught.value), str(caught.value)


def test_what_a_file_was_saved_with_is_switched_off(directory):
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    whole = read(directory).first_turn("ABCDEF")
    assert len(whole) == 27
    model = json.loads((directory / "tokenizer.json").read_text())["model"] | {"dropout": 0.9}
    model["vocab"]["AB"], model["merges"] = 70, [["A", "B"]]
    change(directory / "tokenizer.json", truncation=cut, padding=pad)
    found = read(directory)
    assert found.first_turn("ABCDEF") == whole and found.variables["pad_token"] == "!"
    change(directory / "generation_config.json", eos_token_id=None)
    change(directory / "tokenizer.json", model=model, added_tokens=[])
    assert read(directory).encode("AB" * 9) == [70] * 9


@pytest.mark.parametrize(
    ("files", "text", "ids", "variables"),
    [
        ({"tokenizer_config": {"pad_token": "<pad>"}}, "A<pad>", [32, 70], {"pad_token": "<pad>"}),
        ({"tokenizer_config": {"pad_token": None, "unk_token": None}}, "A", [32], {}),
        ({"tokenizer_config": {"additional_special_tokens": ["<x>", "A"], "image_token": "<img>"}},
         "A<x><img>", [32, 71, 70], {"image_token": "<img>"}),
        ({"tokenizer_config": {"extra_special_tokens": {"sys_token": "<y>"}}}, "<y>", [70],
         {"sys_token": "<y>"}),
        ({"tokenizer_config": {"added_tokens_decoder": {
            "66": FLAGS | {"content": "<|begin|>"}, "71": FLAGS | {"content": "<t2>"},
            "70": FLAGS | {"content": "<tool>", "special": False}}}}, "<t2><tool>", [71, 70], {}),
        ({"special_tokens_map": {"bos_token": "<|start|>", "pad_token": FLAGS | {"content": "<p>"}}},
         "<p>", [70], {"bos_token": "<|start|>", "pad_token": "<p>"}),
        ({"tokenizer_config": {"added_tokens_decoder": {}}, "special_tokens_map": {"bos_token": "<zz>"}},
         "<", [27], {}),
        ({"added_tokens": {"<l>": 71, "<k>": 70}}, "<k><l>", [70, 71], {}),
        ({"tokenizer_config": {"eos_token": "A"}}, "BA", [33, 32], {"eos_token": "A"}),
        ({"tokenizer_config": {"add_bos_token": True, "add_eos_token": True}}, "A", [32], {}),
        ({"tokenizer_config": {"split_special_tokens": True}}, "<|end|>", [27, 29], {}),
        ({"tokenizer_config": {"eos_token": FLAGS | {"content": "<|eot|>", "rstrip": True}}}, "<|eot|> A",
         [67, 64, 32], {}),
    ],
)  # fmt: skip
def test_special_tokens_wherever_they_are_said(directory, files, text, ids, variables):
    for name, values in files.items():
        change(directory / f"{name}.json", **values)
    found = read(directory)
    assert found.encode(text) == ids
    assert found.variables == {"bos_token": "<|begin|>", "eos_token": "<|eot|>"} | variables


def test_flags_of_added_tokens(directory):
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    change(directory / "tokenizer.json", added_tokens=[token | {"rstrip": True} for token in added])
    assert read(directory).encode("<|end|> \n A") == [69, 32]


def test_the_template_wherever_it_is_said(directory):
    def rendered() -> str:
        return read(directory).render([USER])

    config = directory / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    change(config, chat_template=named)
    assert rendered() == "named"
    change(config, chat_template="text")
    change(directory / "chat_template.json", chat_template="of old")
    assert rendered() == "text"
    change(config, chat_template=None)
    assert rendered() == "of old"
    (directory / "chat_template.jinja").write_text("file é")
    assert rendered() == "file é"
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    refused(directory, "chat_template.jinja", "no readable text")
    (directory / "chat_template.jinja").unlink()
    change(config, chat_template=named[:1])
    refused(directory, "tokenizer_config.json: found chat_template ['tool_use']", "'default'")
    change(config, chat_template="")
    (directory / "chat_template.json").unlink()
    refused(directory, "found no chat_template.jinja and no 'chat_template' in tokenizer_config.json")


def test_ids_that_end_a_turn(directory):
    found = with_stops(read(directory))
    assert found.stop_ids == (69, 67)  # the template writes <|end|>; tokenizer_config.json says <|eot|>
    change(directory / "generation_config.json", eos_token_id=66)
    assert read(directory).stop_ids == (67, 66)
    change(directory / "generation_config.json", eos_token_id=[])
    change(directory / "config.json", text_config={"eos_token_id": [68, 67]})
    assert read(directory).stop_ids == (67, 68)
    change(directory / "config.json", eos_token_id=69)
    assert read(directory).stop_ids == (67, 69)
    for wrong in (70, -1, "69", [69, None], True, 1.5, {}):
        change(directory / "config.json", eos_token_id=wrong)
        refused(directory, "config.json: found eos_token_id", "an id of the tokenizer")
    (directory / "config.json").unlink()
    change(directory / "tokenizer_config.json", eos_token=None)
    refused(directory, "found no eos_token_id")


def test_a_tokenizer_for_slow_libraries_only(directory):
    (directory / "tokenizer.json").unlink()
    refused(directory, "found no tokenizer.json", "fetch it")
    (directory / "tokenizer.model").write_bytes(b"")
    refused(directory, "found no tokenizer.json", "make it of tokenizer.model: python -c", "save_pretrained")


def test_tokens_whose_ids_do_not_fit_together(directory):
    decoder = {"73": FLAGS | {"content": "<tool>"}}
    change(directory / "tokenizer_config.json", added_tokens_decoder=decoder)
    said = "found added_tokens_decoder.73, the token '<tool>' with the id 73, expected 70"
    refused(directory, "tokenizer_config.json: " + said)
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    change(directory / "tokenizer.json", added_tokens=added[1:])
    refused(directory, "tokenizer.json: found added_tokens {'id': 67", "the id 66")


WRONG = (None, True, 5, -1, 2**70, 1.5, "x", "", [], [5], ["x"], [None], {}, {"content": 5}, {"a": "b"}, [[]])


FILES = ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "generation_config")


@pytest.mark.parametrize("name", [f"{name}.json" for name in (*FILES, "chat_template")])
def test_no_value_of_another_type_ends_in_a_traceback(directory, name):
    """Every key of a file with values of every type: it is read, or refused with the file's name."""
    special = ("bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens")
    keys = {
        "tokenizer_config.json": (*special, "added_tokens_decoder", "split_special_tokens", "chat_template"),
        "special_tokens_map.json": (*special, "image_token"),
        "added_tokens.json": ("<k>",),
        "generation_config.json": ("eos_token_id",),
        "chat_template.json": ("chat_template",),
    }.get(name, tuple(json.loads((directory / name).read_text())) if name == "tokenizer.json" else ())
    file = directory / name
    if name == "chat_template.json":
        change(directory / "tokenizer_config.json", chat_template=None)
    before = file.read_text() if file.exists() else "{}"
    count = 0
    for key in keys:
        for value in WRONG:
            file.write_text(json.dumps(json.loads(before) | {key: value}))
            try:
                read(directory).encode("A<|end|>")
            except UserError as e:
                count += 1
                assert "\n" not in str(e) and str(directory) in str(e)
                if name not in ("tokenizer.json", "chat_template.json"):
                    assert name in str(e) and (key in str(e) or "chat_template.jinja" in str(e)), str(e)
    assert count > len(keys)
    for broken in ("", "{", "[]", "5", '"x"', "[" * 99999, '{"a": NaN'):
        file.write_text(broken)
        refused(directory, name)
    file.write_bytes(b"\xff\xfe")
    refused(directory, name)


def test_texts_that_cannot_be_encoded():
    with pytest.raises(UserError, match=r"^tokenizer: a text cannot be encoded .*'a\\ud800'"):
        tokenizer().encode("a\ud800")
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="<unk>"))
    with pytest.raises(UserError, match="cannot be encoded"):
        Tokenizer(words, CHATML, (0,), {}).encode("b")


def test_a_text_that_goes_on_gets_no_blank_before_it():
    text = blank_first()
    assert text.encode("ab") == [2, 3, 4] and text.encode_after("ab") == [3, 4]
    assert text.encode_after("") == [] and text.encode_after("</s>a") == [1, 3]
    assert text.added([2, 3], [2, 4, 1]) == " b</s>" and text.added([2, 3], [2, 4, 1], special=False) == " b"
    assert text.added([2, 3], []) == ""


def test_what_ids_add_to_a_text_whose_last_character_is_not_complete():
    text = tokenizer()
    first, second = text.encode("é")
    assert text.added([first], [second]) == "é"
    assert text.added(text.encode("a"), [first]) == "\ufffd"


@pytest.mark.parametrize(
    ("template", "first"),
    [
        (CHATML, END),
        (CHATML.replace("<e>", "<eot>"), TEXT_END),
        (THINKING, END),
        ("{{ messages[-1].content }}<e>", END),
        ("{{ messages[-1].content }}", TEXT_END),  # it writes none: the order stays
        # two questions are refused, so that one has to do
        ("{% if messages | length > 2 %}{{ raise_exception('one') }}{% endif %}" + CHATML, END),
    ],
)
def test_the_stop_that_the_template_writes_comes_first(template, first):
    assert tokenizer(template).stop_ids[0] == first


def test_a_template_that_cannot_render_a_question_is_refused_at_once():
    with pytest.raises(UserError, match=r"^chat template: line 1: never$"):
        tokenizer("{{ raise_exception('never') }}")
    assert tokenizer("{% if not mode %}{{ raise_exception('mode') }}{% endif %}" + CHATML, mode="on")


def test_system_messages():
    text = tokenizer()
    assert text.decode(text.first_turn("a", "be")) == "<s>system\nbe<e>\n<s>user\na<e>\n<s>assistant\n"
    standard = tokenizer("{% if messages[0].role != 'system' %}<s>you<e>{% endif %}" + CHATML)
    assert standard.decode(standard.first_turn("a")) == "<s>you<e><s>user\na<e>\n<s>assistant\n"
    assert standard.first_turn("a", "be") == text.first_turn("a", "be")
    with pytest.raises(UserError, match=r"^chat template: line 1: no system$"):
        tokenizer(NO_SYSTEM).first_turn("a", "be")
    with pytest.raises(UserError, match=r"^models/m: chat template: line 1: no system$"):
        dataclasses.replace(tokenizer(NO_SYSTEM), model="models/m").first_turn("a", "be")


ASSISTANT = "<s>user\na<e>\n<s>assistant\n"
THINKS = CHATML.replace("{{ m.c", "{{ '<think></think>' if m.role == 'assistant' }}{{ m.c")


@pytest.mark.parametrize(
    ("template", "before", "written"),
    [
        (CHATML, ASSISTANT, "b c <e>"),
        (TAGGED, ASSISTANT, "b c <e>"),
        # the end of the turn stands behind the tag, and still counts
        (TAGGED.replace("<e>{% endgeneration %}", "{% endgeneration %}<e>"), ASSISTANT, "b c <e>"),
        # what the assistant is given to begin with is no answer of its own
        (
            THINKS + "{{ '<think></think>' if add_generation_prompt }}",
            ASSISTANT + "<think></think>",
            "b c <e>",
        ),
        # as Qwen3's: the target would write it
        (THINKS, ASSISTANT, "<think></think>b c <e>"),
        (CHATML.replace("<e>", ""), ASSISTANT.replace("<e>", ""), "b c \n"),
    ],
)
def test_an_answer_that_is_there(template, before, written):
    text = tokenizer(template)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c "}]
    found, ids = text.written(messages)
    assert (found, text.decode(ids)) == (before, written)
    assert START not in ids


def test_an_answer_whose_beginning_the_template_hides():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(UserError, match=r"^chat template: with the response, .* \{% generation %\}"):
        tokenizer(THINKING).written(messages)


def test_a_template_that_leaves_out_what_the_user_says_is_refused():
    parts = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    for template in (parts, "{% for m in mesages %}{{ m.content }}{% endfor %}<s>"):
        with pytest.raises(UserError, match="the chat template leaves out what the user says"):
            with_stops(tokenizer(template))


@pytest.mark.parametrize(
    "values", [{"eos_token": "\ud800"}, {"chat_template": "\udfff"}, {"\ud800_token": "a"}]
)
def test_half_of_a_surrogate_pair(directory, values):
    change(directory / "tokenizer_config.json", **values)
    refused(directory, "tokenizer_config.json: no readable JSON file", "surrogates not allowed")
    change(
        directory / "tokenizer_config.json",
        **dict.fromkeys(values) | {"eos_token": "<|eot|>", "bos_token": "😀"},
    )
    if "chat_template" not in values:
        assert read(directory).bos == "😀"


def test_a_tokenizer_that_drops_all_of_a_text(directory):
    file = directory / "tokenizer.json"
    pattern = {"type": "Replace", "pattern": {"Regex": "[^0]"}, "content": ""}
    change(file, normalizer=pattern, added_tokens=[])
    change(directory / "generation_config.json", eos_token_id=[1])
    assert read(directory).encode_after("AB") == []


def test_a_panic_of_the_library_is_one_line(tmp_path, monkeypatch):
    """It is no Exception; of a damaged file it may come while it is read."""

    class PanicException(BaseException):
        """As pyo3 has it."""

    class Panics:
        @staticmethod
        def from_file(path):
            raise PanicException("slice index starts at 1 but ends at 0")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(tokenizer_files.tokenizers, "Tokenizer", Panics)
    with pytest.raises(UserError, match=r"tokenizer.json: no readable tokenizer \(slice index starts"):
        tokenizer_files.read_core(tmp_path / "tokenizer.json")
