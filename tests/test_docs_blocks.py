"""Every block and command of README.md and docs/ is run, or marked `<!-- not run: REASON -->`.

Blocks of Python are run page by page, in order. Blocks of shell that are not marked are run as slow tests, on
a small finished workdir. The flags of every command of the package are parsed by that command itself, whether
it is run or not. A block that is marked `<!-- of its day: REASON -->` is a record: nothing in it is checked.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import flag_parser
import pages
import pytest
import quick
from fakes import Fake
from pages import Block
from written import greedy

from ppow_jax import config, config_help
from ppow_jax.targets import families

BLOCKS = [block for page in pages.PAGES for block in pages.blocks(page)]
MARKS = ("not run", "of its day")
WORKDIR = "/tmp/ppow-quickstart"  # the pages' name for that of a finished run
NUMBERS = re.compile(r"(?<!\w)(STEPS|TEXTS|ANCHORS|K)(?!\w)")  # they stand for some
FOREIGN = {"dry-run", "help", "max-model-len", "no-deps", "scaling", "xla_cpu_opt_preset"}  # flags of others

KEYS = {line.partition(" = ")[0] for line in config_help.lines() if line.startswith("config.")}
PREFIXES = {key[: dot.start()] for key in KEYS for dot in re.finditer(r"\.|$", key)}
SECTIONS = "|".join({key.split(".")[1] for key in KEYS if key.count(".") > 1})
SOURCE = "".join(path.read_text() for path in (pages.ROOT / "ppow_jax").rglob("*.py"))
FLAGS = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', SOURCE))


def complaint(block: Block) -> str:
    """What is wrong with how a block is kept; empty: nothing."""
    for mark in MARKS:
        if (why := block.about(mark)) is not None:
            return "" if len(why.split()) > 1 else f"is marked {mark!r}; expected `<!-- {mark}: REASON -->`"
    if block.language not in ("python", "bash"):
        return f"found the language {block.language!r}, expected python or bash"
    words = pages.commands(block.text) if block.language == "bash" else []
    other = [" ".join(command) for command in words if not pages.own(command)]
    return f"found {other[0]!r}, which no test runs; mark it `<!-- not run: REASON -->`" if other else ""


def test_every_block_is_run_or_says_why_not():
    assert not [f"{block} {said}" for block in BLOCKS if (said := complaint(block))]
    assert len(BLOCKS) > 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```python\nx\n```", ""),
        ("```bash\nA=1 python -m ppow_jax.main \\\n  --x  # ls\n```", ""),
        ("```bash\npython -m ppow_jax.main && ls -l\n```", "found 'ls -l', which no test runs"),
        ("<!-- not run: wants a pod -->\n<!-- main -->\n```bash\nls\n```", ""),
        ("<!-- not run: wants a pod -->\ntext\n```bash\nls\n```", "found 'ls'"),
        ("<!-- not run: -->\n```bash\nls\n```", "is marked 'not run'; expected"),
        ("<!-- not run -->\n```python\nls\n```", "is marked 'not run'; expected"),
        ("- x\n\n  ```text\n  ls\n  ```", "found the language 'text'"),
        ("~~~\nls\n~~~", "found the language ''"),
    ],
)
def test_a_block_that_is_not_kept_is_found(text, said):
    (block,) = pages.blocks("page", text)
    assert complaint(block).startswith(said) and bool(complaint(block)) == bool(said)


def todays(text: str) -> str:
    """A record's command with the names that its keys have now, as docs/results.md says."""
    return re.sub(r"config\.(supervise|cst|ppow)\.", r"config.train.\1.", text)


def command_lines(configs: pathlib.Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Every command of the package, and flags of a config that stand alone: where, and the lines behind
    `python -m` of which one must be right. Configs that pages make are written to a directory."""
    for page in pages.PAGES:
        made = [b.text for b in pages.blocks(page) if "def get_config" in b.text]
        file = configs / f"{pathlib.Path(page).stem}.py"
        if made:
            file.write_text(made[0])
        for block in pages.blocks(page):
            if block.language == "bash" and block.about("of its day") is None:
                for words in filter(pages.own, pages.commands(block.text)):
                    yield str(block), [filled(words[2:], file)]
        for where, span in pages.spans(page):
            if not re.search(r"python -m ppow_jax|^--config", span):
                continue
            (words,) = pages.commands(todays(span))
            if pages.own(words):
                yield where, [filled(words[2:], file)]
            elif words[0].startswith("--config="):
                yield where, [filled(["ppow_jax.main", *words], file)]
            elif words[0].startswith("--config.") and "=" in words[0]:
                bases = ([str(file)] if made else []) + ["quickstart", "smollm2_135m"]
                yield where, [filled(["ppow_jax.main", f"--config={b}", *words], file) for b in bases]


def filled(words: list[str], file: pathlib.Path) -> list[str]:
    """A command line with something in the place of each name that stands for it."""
    named = {"--config=FILE": f"--config={file}", "--config=mine.py": f"--config={file}"}
    named["--config=configs/NAME.py"] = "--config=configs/quickstart.py"
    return [NUMBERS.sub("4", named.get(word, word)) for word in words if word != "FLAGS"]


def parsed(every: list[list[str]]) -> list[str]:
    """What is wrong with each command line."""
    command, environment = [sys.executable, flag_parser.__file__], os.environ | {"JAX_PLATFORMS": "cpu"}
    once = list(dict.fromkeys(map(tuple, every)))
    about = dict(cwd=pages.ROOT, env=environment, input=json.dumps(once), text=True, capture_output=True)
    answers = json.loads(subprocess.run(command, check=True, **about).stdout)
    return [answers[once.index(tuple(words))] for words in every]


def test_every_command_has_flags_and_keys_that_there_are(tmp_path):
    wrong = {
        ("ppow_jax.chat", "--wokdir=x"): "Unknown command line flag 'wokdir'",
        ("ppow_jax.main", "--config=tiny", "--config.train.ppow.stepz=3"): "unknown key 'stepz'",
        ("ppow_jax.main", "--config=tiny", "--config.runs=('x',)"): "config.runs: found 'x'",
        ("ppow_jax.bench", "decoed"): "found ['decoed']",
        ("ppow_jax.doktor",): "no module ppow_jax.doktor",
    }
    asked = list(command_lines(tmp_path))
    assert len(asked) > 60 and len({either[0][0] for _, either in asked}) >= 7
    every = [words for _, either in asked for words in either]
    answers = iter(parsed([*map(list, wrong), *every]))
    assert all(said in next(answers) for said in wrong.values())
    found = [(where, either[0], [next(answers) for _ in either]) for where, either in asked]
    assert not [f"{where} {' '.join(words)}: {said[0]}" for where, words, said in found if all(said)]


def unknown(span: str) -> list[str]:
    """The keys and flags in a piece of code that there are not."""
    names = re.findall(r"(?:^|[\s(-])(config\.[a-z_]+(?:\.\w+)*)", todays(span))
    if bare := re.fullmatch(rf"((?:{SECTIONS})(?:\.[A-Za-z_]+)+)(=.*)?", span):
        names.append(f"config.{bare[1]}")
    files = r"config\.(json|train\.\w+(\.X)?)|.*\.(py|md|json|jsonl|html)"  # X: any key
    keys = [(name, re.sub(r"^config\.train\.\w+\.", "config.train.NAME.", name)) for name in names]
    wrong = [name for name, key in keys if key not in PREFIXES and not re.fullmatch(files, name)]
    if not span.startswith(("jupyter ", "pip ", "ruff ")):
        flags = {flag for flag in re.findall(r"(?:^|\s)--([A-Za-z][\w-]*)", span)} - FOREIGN - {"config"}
        wrong += [f"--{flag}" for flag in flags if not {flag, flag.removeprefix("no")} & FLAGS]
    return wrong


def test_every_key_and_flag_that_the_text_names_is_one():
    assert unknown("config.train.mine.stepz=3 --nocompare") == ["config.train.mine.stepz"]
    assert unknown("x --wokdir=DIR") == ["--wokdir"]
    assert unknown("data.lenght=3") == ["config.data.lenght"] and not unknown("train.ppow.steps")
    found = [(where, name) for page in pages.PAGES for where, s in pages.spans(page) for name in unknown(s)]
    assert not found


@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS if block.language == "python"}))
def test_the_python_of_a_page_runs(page, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    names: dict = {"__name__": "page"}
    for block in pages.blocks(page):
        if block.language == "python" and block.about("not run") is None:
            text = block.text.replace(WORKDIR, str(finished.workdir))
            exec(compile("\n" * block.line + text, pages.ROOT / page, "exec"), names)
            if "get_config" in names:
                config.from_config(names.pop("get_config")())


SHELL = [b for b in BLOCKS if b.language == "bash" and not any(b.about(m) is not None for m in MARKS)]


@pytest.mark.slow
@pytest.mark.parametrize("block", SHELL, ids=str)
def test_the_shell_of_a_page_runs(block, finished, tmp_path):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.FLAGS}
    about = dict(cwd=tmp_path, env=environment, input="What is 17 times 3?\n", text=True, capture_output=True)
    server = Fake("vllm", lambda prompt, tokens: (greedy(prompt[-1], 4), False))
    with server as fake:
        places = {WORKDIR: finished.workdir, "DIR": finished.workdir, "PATH": finished.settings.target.path}
        places["FILE_OR_DIRECTORY"] = finished.workdir / "export" / "sglang"
        places |= {"http://HOST:PORT": fake.url, "http://HOST:OTHER_PORT": fake.url}
        for _, *words in pages.commands(block.text):
            pairs = [word.partition("=") for word in words]
            words = [flag + equals + str(places.get(value, value)) for flag, equals, value in pairs]
            done = subprocess.run([sys.executable, *words], **about)
            assert done.returncode == 0, (words, done.stdout, done.stderr)
            written = [value for flag, _, value in pairs if flag in ("--trace", "--html", "--svg")]
            assert all((tmp_path / name).stat().st_size for name in written)
