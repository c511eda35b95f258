"""The export: what it holds, and whom it refuses."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ppow_jax import run
from ppow_jax.errors import UserError
from ppow_jax.models.target import fingerprint
from ppow_jax.parallel import checkpoint, partition
from ppow_jax.stages import export
from ppow_jax.targets.load import load as load_target
from ppow_jax.training import drafters


@pytest.fixture(scope="module")
def manifest(finished) -> dict:
    return json.loads((finished.workdir / "export" / "manifest.json").read_text())


@pytest.fixture
def copied(finished, tmp_path):
    """The export, free to be damaged."""
    return shutil.copytree(finished.workdir / "export", tmp_path / "export")


def test_manifest(finished, manifest):
    target = json.loads((finished.workdir / "target.json").read_text())
    report = json.loads((finished.workdir / "report.json").read_text())
    assert manifest["format"] == 1
    assert manifest["run"] == "cst"
    assert manifest["target"]["path"] == "markov:0"
    assert manifest["target"]["fingerprint"] == target["fingerprint"]
    assert manifest["target"]["shape"]["width"] == 32 and manifest["target"]["shape"]["vocab_size"] == 31
    assert manifest["params_sha256"] == report["drafters"]["cst"]["params_sha256"]
    assert manifest["drafter"]["vocab_size"] == 20 and manifest["drafter"]["mlp_hidden"] == 16
    assert manifest["config"]["train"]["supervise"]["steps"] == 30
    # offsets of ascending ids start at or above 0 and never fall
    d2t = manifest["d2t"]
    assert len(d2t) == 20 and d2t[0] >= 0 and d2t == sorted(d2t) and d2t[-1] + 19 < 31


def test_what_is_loaded_is_what_was_trained(finished, manifest):
    config, params, vocab = export.load(finished.workdir / "export", manifest["target"]["fingerprint"])
    trained = drafters.load(runs.build(finished.workdir), "cst")
    assert jax.tree.structure(params) == jax.tree.structure(trained.params)
    jax.tree.map(np.testing.assert_array_equal, params, trained.params)
    assert vocab.dtype == jnp.int32
    assert vocab.tolist() == np.asarray(trained.vocab).tolist()
    assert config == trained.drafter.config


def test_another_target_is_refused(finished, manifest):
    other, params, _ = load_target(
        dataclasses.replace(finished.settings.target, path="markov:1"), partition.make_mesh((1, 1, 1))
    )
    with pytest.raises(UserError) as caught:
        export.load(finished.workdir / "export", fingerprint(other, params))
    assert manifest["target"]["fingerprint"][:12] in str(caught.value)
    assert "belongs to target" in str(caught.value) and "markov:0" in str(caught.value)


def test_no_export_there(tmp_path):
    with pytest.raises(UserError, match=r"no manifest.json; expected what the export stage wrote"):
        export.load(tmp_path, "0" * 64)


def test_foreign_parameters_are_refused(copied, manifest):
    """Readable, of the right shape, and not those that the manifest describes."""
    _, params, _ = export.load(copied, manifest["target"]["fingerprint"])
    params["head"]["weight"] = params["head"]["weight"].at[0, 0].add(1e-3)
    checkpoint.save_params(copied / "drafter", params)
    with pytest.raises(UserError, match=r"the parameters are not those of the manifest; export again"):
        export.load(copied, manifest["target"]["fingerprint"])


@pytest.mark.parametrize("damage", ["missing", "cut", "garbled manifest"])
def test_damage_is_one_clear_line(copied, manifest, damage):
    if damage == "missing":
        shutil.rmtree(copied / "drafter")
    elif damage == "cut":
        for path in (copied / "drafter").rglob("*"):
            if path.is_file() and path.stat().st_size > 1000:
                path.write_bytes(path.read_bytes()[:100])
    else:
        (copied / "manifest.json").write_text('{"format": 1')
    with pytest.raises(UserError) as caught:
        export.load(copied, manifest["target"]["fingerprint"])
    assert str(copied) in str(caught.value)
    assert "\n" not in str(caught.value)


def exported(finished, workdir, drafter: str) -> None:
    """Runs the stage for another drafter, on the prompts of the finished run."""
    settings = runs.make_settings(finished.workdir.parent, stages=("export",), export__drafter=drafter)
    run.run(settings, workdir)


def test_a_run_that_was_not_trained_cannot_be_exported(finished, tmp_path):
    workdir = shutil.copytree(finished.workdir, tmp_path / "w")
    before = runs.digest(workdir / "export")
    with pytest.raises(UserError, match=r"config.export.drafter: the run 'ppow' is neither"):
        exported(finished, workdir, "ppow")
    assert runs.digest(workdir / "export") == before


def test_exporting_again_replaces_the_drafter(finished, tmp_path, manifest):
    workdir = shutil.copytree(finished.workdir, tmp_path / "w")
    exported(finished, workdir, "supervise")
    again = json.loads((workdir / "export" / "manifest.json").read_text())
    assert again["run"] == "supervise"
    assert again["params_sha256"] != manifest["params_sha256"]
    export.load(workdir / "export", manifest["target"]["fingerprint"])


@pytest.mark.parametrize(
    ("server", "dtype", "said"),
    [
        ("llama", "float32", "config.export.server: found 'llama', expected sglang, vllm, vllm_tpu, llama"),
        ("sglang", "q4_0", "config.export.dtype: found 'q4_0', expected float32 or bfloat16 or float16"),
        ("llamacpp", "int8", "config.export.dtype: found 'int8', expected float32 or bfloat16 or float16"),
        ("llamacpp", "q8_0", "markov:0: a tokenizer of the kind"),  # letters: no kind of GGUF's
    ],
)  # fmt: skip
def test_what_a_server_cannot_read_is_said_before_the_work(server, dtype, said, tmp_path):
    with pytest.raises(UserError) as e:
        runs.run(tmp_path / "w", export__server=server, export__dtype=dtype)
    assert str(e.value).startswith(said)
    assert not (tmp_path / "w" / "responses").exists()
