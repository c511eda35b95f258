"""`import ppow_jax`: the names that a script uses, on a run that has ended."""

import json
import re
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import runs
import small

import ppow_jax
from ppow_jax import api
from ppow_jax.config import from_config
from ppow_jax.decode import rounds as of_texts
from ppow_jax.decode.profile import Texts
from ppow_jax.drafters.eagle3 import weights_of
from ppow_jax.errors import ConfigError, UserError
from ppow_jax.objectives.supervised import Supervised
from ppow_jax.parallel import console
from ppow_jax.report import html
from ppow_jax.report.measure import Candidate
from ppow_jax.report.samples import round_as_text
from ppow_jax.training import drafters

ASSISTANT, TOKENS = 2, 16  # the token that a rendered question ends with


@pytest.fixture(scope="module")
def target(finished):
    return ppow_jax.load_target(finished.workdir)


@pytest.fixture(scope="module")
def drafter(finished, target):
    return ppow_jax.load_drafter(target, finished.workdir, run="supervise")


def test_the_names_are_there_and_jax_is_not_until_one_is_asked_for():
    code = (
        "import sys, ppow_jax; assert not {'jax', 'ppow_jax.api'} & set(sys.modules); "
        "assert set(ppow_jax.__all__) <= set(dir(ppow_jax))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [getattr(ppow_jax, name) for name in ppow_jax.__all__] == [
        getattr(api, name) for name in ppow_jax.__all__
    ]
    with pytest.raises(AttributeError, match="no attribute 'lord'"):
        _ = ppow_jax.lord


def test_an_answer_is_the_targets_own_with_and_without_a_drafter(target, drafter):
    text = small.walk(ASSISTANT, TOKENS)
    for who, shape in ((None, ""), (drafter, ""), (drafter, "chain:4"), (drafter, "tree:6x3x2")):
        seen: list[ppow_jax.Round] = []
        answer = ppow_jax.generate(target, "ab", who, shape=shape, max_new_tokens=TOKENS, watch=seen.append)
        assert answer.ids == text and not answer.finished
        assert answer.text == target.tokenizer.decode(text)
        assert seen == answer.rounds
        assert [i for r in answer.rounds for i in r.tokens] == text
        assert answer.tau == pytest.approx((TOKENS - 1) / (len(answer.rounds) - 1))
        assert answer.tokens_per_s == pytest.approx((TOKENS - 1) / answer.seconds)
        assert "".join(of["accepted"] + of["own"] for of in answer.texts) == answer.text
        assert [(of["drafted"], of["count"]) for of in answer.texts] == [
            (len(r.drafted), r.accepted) for r in answer.rounds
        ]
    assert ppow_jax.generate(target, "ab", max_new_tokens=1).rounds[1:] == []


def test_who_watches_slowly_does_not_slow_the_figures(target, drafter, monkeypatch):
    now = [0.0]

    def clock() -> float:  # reading it takes a second
        now[0] += 1
        return now[0]

    def slow(_: ppow_jax.Round) -> None:
        now[0] += 100

    monkeypatch.setattr(api, "time", types.SimpleNamespace(perf_counter=clock))
    answer = ppow_jax.generate(target, "ab", drafter, max_new_tokens=TOKENS, watch=slow)
    assert answer.prompt_seconds == 1
    assert answer.seconds == len(answer.rounds) - 1


def test_a_notebook_shows_an_answer_with_its_rounds(target, drafter):
    answer = ppow_jax.generate(target, "ab", drafter, shape="chain:3", max_new_tokens=TOKENS)
    page = answer._repr_html_()
    assert page.startswith('<div class="ppow_jax">') and "<body" not in page and ":root" not in page
    shown = page.replace(html.LEGEND, "")
    assert shown != page
    assert re.findall(r'<span class="seam">(\d)', shown) == [str(r.accepted) for r in answer.rounds[1:]]
    assert (
        answer.figures()[1]
        == f"tau {answer.tau:.2f} ({TOKENS - 1} tokens in {len(answer.rounds) - 1} passes)"
    )
    for line in answer.figures():
        assert f"<li>{line}</li>" in page
    plain = ppow_jax.generate(target, "ab", max_new_tokens=TOKENS)
    assert f'<div class="answer">{plain.text}</div>' in plain._repr_html_()
    assert "seam" not in plain._repr_html_().partition("</style>")[2]
    assert len(plain.figures()) == 1


def test_what_an_answer_says_is_escaped_in_a_notebook():
    text = dict.fromkeys(("accepted", "refused", "dropped", "own"), "<b>") | {"drafted": 2, "count": 1}
    rounds = [ppow_jax.Round([], 0, [1]), ppow_jax.Round([2, 3], 1, [4])]
    for texts in ([text, text], [text | {"drafted": 0}] * 2):
        page = ppow_jax.Answer("<b>", [1, 2, 4], False, rounds, texts, 1.0, 1.0)._repr_html_()
        assert "<b>" not in page and "&lt;b&gt;" in page


def test_rounds_are_those_of_the_simulation(target, drafter):
    answer = ppow_jax.generate(target, "ab", drafter, shape="chain:3", max_new_tokens=TOKENS)
    prompt = target.tokenizer.first_turn("ab")
    tokens = np.array([prompt + answer.ids], np.int32)
    taps = small.forward(target.target, target.target_params, jnp.asarray(tokens))[0].taps[:, 0]
    texts = Texts(taps, tokens, np.array([len(prompt)]), np.array([tokens.shape[1]]))
    (expected,) = of_texts.rounds_of(drafter.drafter, drafter.weights, texts, 3, TOKENS)
    assert [r.accepted for r in answer.rounds[1:]] == [r.accepted for r in expected]
    assert [r.own for r in answer.rounds[1:]] == [r.own for r in expected]
    for found, known in zip(answer.rounds[1:], expected, strict=True):
        assert found.drafted[: len(known.drafted)] == known.drafted


def test_a_conversation_is_rendered_by_the_template(target):
    said = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    said += [{"role": "user", "content": [{"type": "text", "text": "d"}]}]
    answer = ppow_jax.generate(target, said, max_new_tokens=4)
    assert answer.ids == ppow_jax.generate(target, "d", max_new_tokens=4).ids  # a chain of order 1
    with pytest.raises(UserError, match="messages: found 'assistant' as the last message's role"):
        ppow_jax.generate(target, said[:2])
    with pytest.raises(UserError, match=r"message 1 of 'messages': found 'judge' as its 'role'"):
        ppow_jax.generate(target, [{"role": "judge", "content": "x"}])


def test_above_temperature_0_the_seed_decides(target, drafter):
    sampled = [
        ppow_jax.generate(
            target, "ab", drafter, shape="chain:2", max_new_tokens=TOKENS, temperature=1.0, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    assert sampled[0].ids == sampled[1].ids != sampled[2].ids


def test_drafters_of_runs_and_of_exported_files(finished, target):
    last = ppow_jax.load_drafter(target, finished.workdir)
    assert last.run == "cst"
    files = ppow_jax.load_drafter(target, finished.workdir / "export" / "sglang")
    assert files.run == "imported"
    assert files.weights.vocab.tolist() == last.weights.vocab.tolist()
    ids = [ppow_jax.generate(target, "w", d, max_new_tokens=8).ids for d in (last, files)]
    assert ids[0] == ids[1] == small.walk(ASSISTANT, 8)


def test_a_target_alone_needs_no_workdir(finished, target):
    alone = ppow_jax.load_target("markov:0", taps=target.target.config.taps)
    assert alone.fingerprint == target.fingerprint
    assert ppow_jax.load_drafter(alone, finished.workdir).run == "cst"
    other = ppow_jax.load_target("markov:0", taps=(0, 1, 2))
    with pytest.raises(ConfigError, match=r"taps: found \(0, 1, 2\), expected \(1, 2, 3\)"):
        ppow_jax.load_drafter(other, finished.workdir)
    with pytest.raises(UserError, match="drafter of target"):
        ppow_jax.load_drafter(ppow_jax.load_target("markov:1"), finished.workdir)
    with pytest.raises(ConfigError, match=r"config.target.dtyp: unknown key"):
        ppow_jax.load_target("markov:0", dtyp="float32")


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"shape": "chain:2"}, "shape: found 'chain:2' without a drafter"),
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, expected 1 or more"),
        ({"temperature": -1.0}, "expected temperature >= 0"),
    ],
)
def test_what_cannot_be_decoded_is_named(target, wanted, says):
    with pytest.raises(ConfigError, match=says):
        ppow_jax.generate(target, "ab", **wanted)


def test_what_is_not_there_is_named(finished, target, drafter, tmp_path):
    with pytest.raises(ConfigError, match="shape: found 'bush:3', expected chain:K"):
        ppow_jax.generate(target, "ab", drafter, shape="bush:3")
    with pytest.raises(ConfigError, match="run: found 'ppow', expected one of supervise, cst"):
        ppow_jax.load_drafter(target, finished.workdir, "ppow")
    with pytest.raises(ConfigError, match=r"run: found 'cst', but .* is no workdir"):
        ppow_jax.load_drafter(target, finished.workdir / "export" / "sglang", "cst")
    with pytest.raises(ConfigError, match="no directory"):
        ppow_jax.load_drafter(target, tmp_path / "none")
    with pytest.raises(UserError, match="found no report"):
        ppow_jax.read_report(tmp_path)


def test_the_report_is_a_dict_that_a_notebook_shows(finished):
    report = ppow_jax.read_report(finished.workdir)
    assert list(report["drafters"]) == list(runs.RUNS)
    assert report == json.loads((finished.workdir / "report.json").read_text())
    page = report._repr_html_()
    assert page.startswith('<div class="ppow_jax">') and "<table>" in page
    for run in runs.RUNS:
        assert f">{run}</td>" in page
    assert page.count("<svg") == 3  # differences, acceptance by position, and during training


def test_a_config_is_loaded_changed_and_given_a_class(tmp_path):
    config = ppow_jax.load_config("tiny")
    config.train.mine = ppow_jax.training_run(Supervised, start="supervise", steps=3, window=2)
    found = from_config(config).train["mine"]
    assert found.objective == "ppow_jax.objectives.supervised:Supervised"
    assert (found.start, found.steps, found.method.window) == ("supervise", 3, 2)

    class Hidden(Supervised):
        pass

    with pytest.raises(ConfigError, match=r"found 'test_api:.*Hidden', expected supervised"):
        ppow_jax.training_run(Hidden)
    with pytest.raises(ConfigError, match=r"config: .*own.py cannot be loaded \(KeyError"):
        (tmp_path / "own.py").write_text("raise KeyError('x')\n")
        ppow_jax.load_config(tmp_path / "own.py")


def test_the_log_is_shown_on_standard_output(capsys, monkeypatch):
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(console.log, name, getattr(console.log, name))
    monkeypatch.setattr(console.log, "handlers", [])
    ppow_jax.show_log()
    ppow_jax.show_log()
    console.log.info("twice asked, once said")
    said = capsys.readouterr()
    assert said.out.count("twice asked, once said") == 1 and said.err == ""


def test_training_takes_a_name_a_file_or_a_configdict(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(api.run, "run", lambda settings, workdir: asked.append((settings, workdir)))
    file = tmp_path / "own.py"
    file.write_text("from ppow_jax.configs import tiny\nget_config = tiny.get_config\n")
    given = runs.config(tmp_path)
    before = given.to_dict()
    for config in ("tiny", file, given):
        ppow_jax.train(config, tmp_path / "w", {"train.supervise.steps": 7, "seed": 3})
        settings, workdir = asked.pop()
        assert (settings.train["supervise"].steps, settings.seed, workdir) == (7, 3, tmp_path / "w")
    assert given.to_dict() == before
    for key in ("train.supervise.stepz", "colours.red", "seed.red"):
        with pytest.raises(ConfigError, match=f"changes: unknown key '{key}', expected one of"):
            ppow_jax.train("tiny", tmp_path / "w", {key: 7})
    with pytest.raises(ConfigError, match=r"config.train.supervise.steps: found 'x'"):
        ppow_jax.train("tiny", tmp_path / "w", {"train.supervise.steps": "x"})
    with pytest.raises(ConfigError, match="config: no file 'tinny', expected a path or one of"):
        ppow_jax.train("tinny", tmp_path / "w")
    file.write_text("1 / 0")
    with pytest.raises(ConfigError, match=r"cannot be loaded \(ZeroDivisionError"):
        ppow_jax.train(file, tmp_path / "w")


def test_training_leaves_a_workdir(tmp_path):
    ppow_jax.train(runs.config(tmp_path), tmp_path / "w", {"stages": ("respond",)})
    assert (tmp_path / "w" / "responses").is_dir()
    with pytest.raises(ConfigError, match="run: found 'cst', expected one of none yet"):
        ppow_jax.load_drafter(ppow_jax.load_target(tmp_path / "w"), tmp_path / "w", "cst")


@pytest.mark.slow
@pytest.mark.real
def test_a_real_target_answers_in_whole_characters(smollm2):
    target = ppow_jax.load_target(f"package:{small.SMOLLM2}")
    begun = drafters.fresh(target, np.arange(8192, dtype=np.int32), None)
    weights = weights_of(begun.params, target.target_params, begun.vocab)
    drafter = Candidate("fresh", begun.drafter, weights, 0, 0.0, "")
    question = "Say hello in Japanese, and show an emoji."
    plain = ppow_jax.generate(target, question, max_new_tokens=24)
    known, shown = [], ""
    answer = ppow_jax.generate(target, question, drafter, shape="tree:8x3x3", max_new_tokens=24)
    for r in answer.rounds:
        as_text = round_as_text(target.tokenizer, known, r, special=False)
        shown, known = shown + as_text["accepted"] + as_text["own"], known + r.tokens
    assert answer.ids == plain.ids == known
    assert shown == answer.text.rstrip("\ufffd")
