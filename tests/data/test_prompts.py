"""Prompt sources: the grammar, ids, files, builtin prompts, TFDS (without TensorFlow), and the hub."""

import sys
import types

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
    spec = "a=builtin:chat/eval[:40], b-2.x=dir/f=1.jsonl ,c=tfds:gsm8k:1.0.0/test[7:],d=x.jsonl[2:4],"
    assert prompts.parse(spec, KEY) == [
        ("a", "builtin:chat/eval", (None, 40)),
        ("b-2.x", "dir/f=1.jsonl", (None, None)),
        ("c", "tfds:gsm8k:1.0.0/test", (7, None)),
        ("d", "x.jsonl", (2, 4)),
    ]
    assert prompts.parse(" ", KEY) == prompts.parse(",", KEY) == []


def test_paths_with_commas_and_brackets():
    """A comma separates pairs only where NAME= follows, and the last [M:N] alone is a slice."""
    spec = "a=x,y z.jsonl,b=run[1]/a[2].jsonl[:3],c=odd[1:2].jsonl,d=x[1:2][:],e=x[5]"
    assert prompts.parse(spec, KEY) == [
        ("a", "x,y z.jsonl", (None, None)),
        ("b", "run[1]/a[2].jsonl", (None, 3)),
        ("c", "odd[1:2].jsonl", (None, None)),
        ("d", "x[1:2]", (None, None)),
        ("e", "x[5]", (None, None)),
    ]


@pytest.mark.parametrize(
    "spec", ["questions.jsonl", "a=", "=x.jsonl", "a b=x.jsonl", "x[:3]", "oops,a=x.jsonl"]
)
def test_a_pair_that_is_none(spec):
    with pytest.raises(ConfigError, match=r"^config\.respond\.prompts: found '.*', expected NAME=SOURCE"):
        prompts.parse(spec, KEY)


def test_a_name_that_occurs_twice():
    assert refusal("a=x.jsonl,a=y.jsonl", ConfigError) == f"config.{KEY}: the name 'a' occurs twice"


def test_builtin_prompts_by_kind_and_split():
    found = prompts.load("m=builtin:maths/eval[:3],c=builtin:chat/train[1:3]", KEY)
    assert {name: [p.id for p in ps] for name, ps in found.items()} == {
        "m": ["maths-eval-00000", "maths-eval-00001", "maths-eval-00002"],
        "c": ["chat-train-00001", "chat-train-00002"],
    }
    for source in ("builtin:poems/train", "builtin:maths", "builtin:maths/eval[5]"):
        assert refusal(f"a={source}", ConfigError).startswith(f"config.{KEY}: unknown ")


def test_rows_become_prompts(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(
        '{"id": 7, "category": "c", "turns": ["one", "two"], "answer": 3}\n\n'
        '{"turns": ["né\u2028e"], "category": null}\r\n'  # a line separator inside a string ends no line
        '{"id": 2.5, "system": "Be brief.", "messages": [{"role": "user", "content": "x"}, '
        '{"role": "assistant", "content": "y"}]}',
        encoding="utf-8",
    )
    assert prompts.load(f"a={path}", KEY) == {
        "a": [
            Prompt("7", "c", ("one", "two")),
            Prompt("a/2", "", ("né\u2028e",)),
            Prompt("2.5", "", ("x",), "Be brief.", ("y",)),
        ]
    }


def test_slices(tmp_path):
    path = runs.write_jsonl(tmp_path / "p.jsonl", [{"id": x, "turns": [x]} for x in "abcde"])
    for wanted, expected in {
        "[:2]": "ab",
        "[:9]": "abcde",
        "[2:4]": "cd",
        "[3:]": "de",
        "[:]": "abcde",
    }.items():
        assert "".join(p.id for p in prompts.load(f"a={path}{wanted}", KEY)["a"]) == expected
    for wanted in ("[:0]", "[5:]", "[4:2]"):
        assert refusal(f"a={path}{wanted}").startswith(f"{KEY}: {wanted} leaves none of the 5 prompts of ")
    for wanted in ("[-2:]", "[2]", "[::2]", "[1:2", ",b", "[:1" + "0" * 20 + "]"):
        message = refusal(f"a={path}{wanted}", UserError if wanted == "[1:2" else ConfigError)
        assert "no file" in message
    assert "with an optional [:N], [M:N] or [M:]" in refusal(f"a={path}[-2:]", ConfigError)
    odd = runs.write_jsonl(tmp_path / "p,q[2:4]", [{"turns": ["odd"]}])
    assert prompts.load(f"a={odd}[:]", KEY)["a"][0].turns == ("odd",)


def test_missing_file():
    expected = "expected JSON Lines or a JSON array (both may be gzipped) or Parquet"
    assert refusal("a=no/where.jsonl") == f"{KEY}: no file 'no/where.jsonl'; {expected}"


def test_a_file_without_prompts(tmp_path):
    for content in ("", "\n\n", "[]"):
        (tmp_path / "p.json").write_text(content)
        assert "holds no prompts; expected at least one" in refusal(f"a={tmp_path / 'p.json'}")


def test_rows_that_are_left_out_are_counted(tmp_path, caplog):
    tool = {"messages": [{"role": "tool", "content": "1"}]}
    rows = [{"turns": ["a"]}, tool, {"turns": []}, tool, {"turns": ["b"]}]
    path = runs.write_jsonl(tmp_path / "p.jsonl", rows)
    with caplog.at_level("WARNING", logger="ppow_jax"):
        assert [p.id for p in prompts.load(f"a={path}", KEY)["a"]] == ["a/1", "a/5"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: left out of 5 rows: 2 with tools (the first: {path}:2), 1 where the user says nothing "
        f"(the first: {path}:3)"
    ]
    caplog.clear()
    prompts.load(f"a={path}", KEY, warn=False)
    assert not caplog.records
    runs.write_jsonl(path, rows[1:4])
    assert refusal(f"a={path}").startswith(f"{path}: no prompt is left of 3 rows: 2 with tools (the first: ")


def test_an_id_that_occurs_twice_in_a_source(tmp_path):
    rows = [{"id": 7, "turns": ["a"]}, {"id": "x", "turns": ["b"]}, {"id": "7", "turns": ["c"]}]
    path = runs.write_jsonl(tmp_path / "p.jsonl", rows)
    assert refusal(f"a={path}[:1]") == (
        f"{path}:3: its id '7' is that of {path}:1 too; expected ids that are unique"
    )
    runs.write_jsonl(path, [{"turns": ["a"]}, {"id": "a/1", "turns": ["b"]}])
    assert f"{path}:2: its id 'a/1' is that of {path}:1 too" in refusal(f"a={path}")


@pytest.mark.parametrize(
    ("id_", "found"), [("[1]", "[1]"), ("{}", "{}"), ("true", "True"), ("NaN", "nan"), ('"\\ud800"', "'id'")]
)
def test_an_id_that_is_none(tmp_path, id_, found):
    (tmp_path / "p.jsonl").write_text(f'{{"id": {id_}, "turns": ["a"]}}\n')
    message = refusal(f"a={tmp_path / 'p.jsonl'}")
    assert message.startswith(f"{tmp_path / 'p.jsonl'}:1: ") and found in message


def ids(spec: str) -> dict[str, list[str]]:
    return {name: [p.id for p in of] for name, of in prompts.load(spec, KEY).items()}


def test_missing_ids_are_made_of_names(tmp_path):
    """Two files of one name; null and an empty string are no ids."""
    rows = [
        {"id": None, "turns": ["a"]},
        {"turns": ["b"]},
        {"id": "", "turns": ["c"]},
        {"id": "d", "turns": ["d"]},
    ]
    one, two = tmp_path / "one" / "test.jsonl", tmp_path / "two" / "test.jsonl"
    for path in (one, two):
        path.parent.mkdir()
        runs.write_jsonl(path, rows[:3])
    runs.write_jsonl(one, rows)
    found = ids(f"x={one},y={two}")
    assert found == {"x": ["x/1", "x/2", "x/3", "d"], "y": ["y/1", "y/2", "y/3"]}


def test_ids_that_several_sources_have_get_names_whatever_is_wanted_of_them(tmp_path):
    one, two = (
        runs.write_jsonl(tmp_path / name, [{"id": i, "turns": [str(i)]} for i in numbers])
        for name, numbers in (("one", (1, 2, 3)), ("two", (2, 3, 4)))
    )
    whole = {"a": ["1", "a/2", "a/3"], "b": ["b/2", "b/3", "4"]}
    assert ids(f"a={one},b={two}") == whole
    assert ids(f"b={two},a={one}") == whole
    assert ids(f"a={one}[:2],b={two}[2:]") == {"a": ["1", "a/2"], "b": ["4"]}
    assert ids(f"a={one}[:1],b={one}[1:]") == {"a": ["a/1"], "b": ["b/2", "b/3"]}
    twice = "a=builtin:code/eval[:1],b=builtin:code/eval[1:2]"
    assert ids(twice) == {"a": ["a/code-eval-00000"], "b": ["b/code-eval-00001"]}


def test_ids_that_names_do_not_make_unique(tmp_path):
    one = runs.write_jsonl(tmp_path / "one", [{"id": "1", "turns": ["a"]}, {"id": "a/1", "turns": ["a"]}])
    two = runs.write_jsonl(tmp_path / "two", [{"id": "1", "turns": ["b"]}])
    assert "the id 'a/1', made of a source's name and an id" in refusal(f"a={one},b={two}")
    assert ids(f"c={one},b={two}") == {"c": ["c/1", "a/1"], "b": ["b/1"]}


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


def test_tfds_messages_which_it_keeps_as_an_object_of_lists(tfds_directory):
    text = tfds.features.Text()
    features = {"id": text, "messages": tfds.features.Sequence({"role": text, "content": text})}
    said = [{"role": "user", "content": "né"}, {"role": "assistant", "content": "yes"}]
    prepare(tfds_directory, "TinyTalks", features, [{"id": "same", "messages": said}] * 2)
    found = prompts.load("q=tfds:tiny_talks/train", KEY)["q"]
    assert found == [Prompt(f"tiny_talks/train/{i}", "tiny_talks", ("né",), "", ("yes",)) for i in range(2)]


def test_tfds_text_that_is_no_text(tfds_directory):
    """Bytes of any kind are a feature of TFDS too."""
    features = {"text": tfds.features.Tensor(shape=(), dtype=np.bytes_)}
    prepare(tfds_directory, "TinyBytes", features, [{"text": b"\xff"}])
    assert "tfds:tiny_bytes/train: row 1: not UTF-8 text" in refusal("q=tfds:tiny_bytes/train")


class Hub(types.ModuleType):
    """Stands for the library `datasets`: what it is asked for, and two rows of one id."""

    def __init__(self) -> None:
        super().__init__("datasets")
        self.asked: list[tuple] = []

    def load_dataset(self, path: str, name: str | None, split: str) -> list[dict]:
        self.asked.append((path, name, split))
        if split != "train":
            raise ValueError(f"Unknown split {split!r}.\nShould be one of ['train'].")
        talk = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
        return [{"id": "x", "category": None, "prompt": None, "conversations": talk}] * 2


def test_a_data_set_of_the_hub(monkeypatch):
    hub = Hub()
    monkeypatch.setitem(sys.modules, "datasets", hub)
    found = prompts.load("h=hub:org/name.x", KEY)["h"]
    assert found == [Prompt(f"org/name.x/train/{i}", "", ("hi",), "", ("yo",)) for i in range(2)]
    assert prompts.load("h=hub:org/name.x/train[:1]", KEY)["h"] == found[:1]
    assert prompts.load("h=hub:org/name.x:main/train", KEY)["h"][0].id == "org/name.x:main/train/0"
    assert hub.asked == [("org/name.x", None, "train")] * 2 + [("org/name.x", "main", "train")]
    expected = "expected hub:ORG/NAME[:CONFIG][/SPLIT]"
    said = "hub:org/name/test cannot be read (Unknown split 'test'.)"
    assert refusal("h=hub:org/name/test") == f"{KEY}: {said}; {expected}"
    assert refusal("h=hub:name", ConfigError) == f"config.{KEY}: found 'hub:name', {expected}"


def test_the_hub_without_its_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("h=hub:org/name").endswith("which is missing; `pip install datasets`")


def test_tfds_without_text_or_name(tfds_directory):
    features = {"label": tfds.features.Scalar(np.int32)}
    prepare(tfds_directory, "TinyLabels", features, [{"label": 3}])
    message = refusal("q=tfds:tiny_labels/train")
    assert "tiny_labels/train: row 1: found the fields label; expected one of turns, messages," in message
    assert "Dataset no_such_one not found" in refusal("q=tfds:no_such_one/train")
    assert "cannot be read" in refusal("q=tfds:tiny_labels")
