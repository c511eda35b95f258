"""Prompt sources: the grammar, JSONL files, builtin prompts, and TFDS by name, without TensorFlow."""

import sys

import numpy as np
import pytest
import runs
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import file_utils

from ppow_jax.data import prompts
from ppow_jax.data.prompt import Prompt
from ppow_jax.errors import ConfigError, UserError

KEY = "respond.prompts"


def refusal(spec: str, kind: type[UserError] = UserError) -> str:
    """The message that `load` refuses a spec with; one line."""
    with pytest.raises(UserError) as caught:
        prompts.load(spec, KEY)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_grammar():
    assert prompts.parse(
        "a=builtin:chat/eval[:40], b-2.x=dir/f=1.jsonl ,c=tfds:gsm8k:1.0.0/test[:7],", KEY
    ) == [
        ("a", "builtin:chat/eval", 40),
        ("b-2.x", "dir/f=1.jsonl", None),
        ("c", "tfds:gsm8k:1.0.0/test", 7),
    ]
    assert prompts.parse(" ", KEY) == []


@pytest.mark.parametrize("spec", ["questions.jsonl", "a=", "=x.jsonl", "a b=x.jsonl", "a=x.jsonl,oops"])
def test_a_pair_that_is_none(spec):
    with pytest.raises(ConfigError, match=r"^config\.respond\.prompts: found '.*', expected NAME=SOURCE"):
        prompts.parse(spec, KEY)


def test_a_name_that_occurs_twice():
    assert refusal("a=x.jsonl,a=y.jsonl", ConfigError) == f"config.{KEY}: the name 'a' occurs twice"


def test_builtin_prompts_by_kind_and_split():
    found = prompts.load("m=builtin:maths/eval[:3],c=builtin:chat/train[:2]", KEY)
    assert {name: [p.id for p in ps] for name, ps in found.items()} == {
        "m": ["maths-eval-00000", "maths-eval-00001", "maths-eval-00002"],
        "c": ["chat-train-00000", "chat-train-00001"],
    }
    assert refusal("a=builtin:poems/train", ConfigError).startswith(f"config.{KEY}: ")
    assert refusal("a=builtin:maths", ConfigError).startswith(f"config.{KEY}: ")


def test_jsonl_rows_become_prompts(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(
        '{"id": 7, "category": "c", "turns": ["one", "two"], "answer": 3}\n\n'
        '{"turns": ["né\u2028e"]}\r\n',  # a line separator inside a string ends no line
        encoding="utf-8",
    )
    assert prompts.load(f"a={path}", KEY) == {
        "a": [Prompt("7", "c", ("one", "two")), Prompt("some/2", "", ("né\u2028e",))]
    }


def test_limit(tmp_path):
    path = runs.write_jsonl(tmp_path / "p.jsonl", [{"id": x, "turns": [x]} for x in "abc"])
    assert [p.id for p in prompts.load(f"a={path}[:2]", KEY)["a"]] == ["a", "b"]
    assert [p.id for p in prompts.load(f"a={path}[:9]", KEY)["a"]] == ["a", "b", "c"]
    assert "holds no prompts" in refusal(f"a={path}[:0]")
    assert "no file" in refusal(f"a={path}[1:]")  # not a limit, so part of the name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts; expected at least one"),
        (b"\n\n", "holds no prompts; expected at least one"),
        (b'{"turns": ["a"]}\n{"turns": \n', "p.jsonl:2: not JSON"),
        (b'["a"]\n', "p.jsonl:1: found list, expected an object"),
        (b'{"prompt": "a"}\n', "object 1 has no 'turns': expected a list of user messages"),
        (b'{"turns": ["a"]}\n{"turns": []}\n', "object 2 has no 'turns'"),
        (b'{"turns": "a"}\n', "object 1 has no 'turns'"),
        (b'{"turns": ["a", 3]}\n', "object 1 has no 'turns'"),
        (b'{"turns": ["\xff\xfe"]}\n', "p.jsonl: not UTF-8 text"),
    ],
)
def test_broken_jsonl_is_named_with_its_place(tmp_path, content, message):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    assert message in refusal(f"a={path}")


def test_missing_file_and_directory(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        assert refusal(f"a={path}") == f"{KEY}: no file {str(path)!r}; expected a JSONL file"


def test_ids_are_unique_over_all_sources(tmp_path):
    one = runs.write_jsonl(tmp_path / "one.jsonl", [{"id": "x", "turns": ["a"]}])
    two = runs.write_jsonl(tmp_path / "two.jsonl", [{"id": "x", "turns": ["b"]}])
    assert "id 'x' is in 'a' and in 'b'" in refusal(f"a={one},b={two}")


def prepare(directory, name: str, features: dict, rows: list[dict]) -> None:
    """A real TFDS dataset in ArrayRecord files, its class forgotten; one split, train."""

    def generate(self, rows: list[dict]):
        yield from enumerate(rows)

    # Registering would let TFDS build the dataset anew wherever it likes.
    with tfds.core.registered.skip_registration():
        builder = type(
            name,
            (tfds.core.GeneratorBasedBuilder,),
            {
                "VERSION": tfds.core.Version("1.0.0"),
                "_info": lambda self: tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                ),
                "_split_generators": lambda self, _: {"train": generate(self, rows)},
                "_generate_examples": generate,
                "__module__": __name__,
            },
        )
    builder(data_dir=directory, file_format="array_record").download_and_prepare()


@pytest.fixture
def tfds_directory(tmp_path):
    tfds.disable_progress_bar()
    tfds.core.add_data_dir(tmp_path)
    yield tmp_path
    file_utils.clear_registered_data_dirs()


def test_tfds_by_name_without_tensorflow(tfds_directory):
    text = tfds.features.Text()
    rows = [{"answer": f"{i}", "question": f"né {i}?"} for i in range(3)]
    prepare(tfds_directory, "TinyQuestions", {"answer": text, "question": text}, rows)
    found = prompts.load("q=tfds:tiny_questions/train", KEY)["q"]
    assert [p.id for p in found] == [f"tiny_questions/train/{i}" for i in range(3)]
    assert {p.turns for p in found} == {("né 0?",), ("né 1?",), ("né 2?",)}  # TFDS shuffles
    assert {p.category for p in found} == {"tiny_questions"}
    assert prompts.load("q=tfds:tiny_questions:1.0.0/train[:2]", KEY)["q"][1].turns == found[1].turns
    assert "tensorflow" not in sys.modules

    message = refusal("q=tfds:tiny_questions/test")
    assert message.startswith(f"{KEY}: tfds:tiny_questions/test cannot be read (Unknown split 'test'.")
    assert "expected tfds:NAME/SPLIT of a dataset prepared with file_format='array_record'" in message


def test_tfds_turns_come_before_other_text(tfds_directory):
    text = tfds.features.Text()
    features = {"question": text, "turns": tfds.features.Sequence(text)}
    prepare(tfds_directory, "TinyTurns", features, [{"question": "no", "turns": ["one", "two"]}])
    assert prompts.load("q=tfds:tiny_turns/train", KEY)["q"][0].turns == ("one", "two")


def test_tfds_without_text_or_name(tfds_directory):
    features = {"label": tfds.features.Scalar(np.int32)}
    prepare(tfds_directory, "TinyLabels", features, [{"label": 3}])
    assert "has the features ['label'], expected one of turns, prompt," in refusal("q=tfds:tiny_labels/train")
    assert "Dataset no_such_one not found" in refusal("q=tfds:no_such_one/train")
    assert "cannot be read" in refusal("q=tfds:tiny_labels")
