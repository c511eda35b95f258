"""The restart that asks for huge pages."""

import os
import sys

import pytest

from ppow_jax import huge_pages


class Restarted(Exception):
    pass


@pytest.fixture
def execv(monkeypatch):
    def execv(path, argv):
        raise Restarted(path, argv, os.environ["GLIBC_TUNABLES"])

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is put back
    monkeypatch.delenv("GLIBC_TUNABLES")


def test_the_same_command_is_started_again_once(monkeypatch, execv):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "ppow_jax.main", "--workdir=w"])
    with pytest.raises(Restarted) as restarted:
        huge_pages.restart_with()
    assert restarted.value.args == (sys.executable, sys.orig_argv, "glibc.malloc.hugetlb=1")
    huge_pages.restart_with()  # the variable is set now


@pytest.mark.parametrize(("platform", "tunables"), [("linux", ""), ("linux", "a=1"), ("darwin", None)])
def test_nothing_is_started_again_elsewhere_or_against_the_users_wish(monkeypatch, execv, platform, tunables):
    monkeypatch.setattr(sys, "platform", platform)
    if tunables is not None:
        monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    huge_pages.restart_with()
    assert os.environ.get("GLIBC_TUNABLES") == tunables
