"""The documentation's site is built from `docs/` without a warning: every link, anchor and name is there."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="no mkdocs: .[docs]")
def test_it_is_built_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    page = (tmp_path / "results_objectives" / "index.html").read_text()
    assert '<img alt="difference of tau' in page and (tmp_path / "figures" / "objectives.png").exists()
    assert "ppow_jax.objectives.base" in (tmp_path / "api" / "index.html").read_text()
