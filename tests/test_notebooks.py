"""The notebooks' own tests: see notebooks.py."""

import shutil

import pytest
from conftest import ROOT
from notebooks import copy_checkout, in_copy, run_notebook

# The tour (index) is run in JupyterLab, by make slow.
NOTEBOOKS = sorted(path.stem for path in (ROOT / "nbs").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, scratch, tmp_path):
    copy = copy_checkout(ROOT, tmp_path / "checkout")
    shutil.copytree(scratch, copy / "reports" / "scratch")
    code = in_copy(copy, run_notebook, name, log=tmp_path / "log", seconds=300)
    assert code == 0, ("took longer than 300 s\n" if code is None else "") + (tmp_path / "log").read_text()[-5000:]


def write_to_models() -> int:
    (ROOT / "models" / "mine").mkdir(parents=True)
    return 0


def test_notebooks_are_tested_under_the_same_guard(tmp_path):
    copy = copy_checkout(ROOT, tmp_path / "checkout")
    assert in_copy(copy, write_to_models, log=tmp_path / "log", seconds=60) == 1
    assert "belongs to the user" in (tmp_path / "log").read_text()
