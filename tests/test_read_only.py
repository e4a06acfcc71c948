"""A headless run reads the checkout and writes only below its run folder. The run that most tests share is made on a read-only checkout."""

import json
import sys
from fnmatch import fnmatch

import nbformat
import pytest
from conftest import ROOT, report_words
from read_only import copy_checkout, report_on_read_only_checkout, run_protected, write_protected

from mnist_nb.pipeline import STAGES, stage_notebook

# What Jupyter, IPython and matplotlib keep for themselves in the home of a user who has never started them.
CACHES = (".ipython/*", ".cache/matplotlib/*", ".config/matplotlib/*", ".local/share/jupyter/*", ".jupyter/*")


def test_the_protection_holds(tmp_path):
    "Also for root: otherwise the other tests would prove nothing."
    checkout = copy_checkout(tmp_path / "checkout")
    code = "import mnist_nb, pathlib; print(mnist_nb.__file__); pathlib.Path('reports').mkdir()"
    with write_protected(checkout):
        result = run_protected([sys.executable, "-c", code], checkout, tmp_path)
    assert result.stdout.strip() == str(checkout / "mnist_nb" / "__init__.py")
    assert result.returncode == 1 and "PermissionError" in result.stderr


def test_a_run_leaves_the_checkout_as_it_was(small_run):
    seen = json.loads((small_run.parent / "read_only" / "listings.json").read_text())
    assert len(seen["before"]) > 50 and seen["after"] == seen["before"]


def test_a_run_writes_below_its_folder_and_nowhere_else(small_run):
    left = small_run.parent / "read_only"
    assert {path.name for path in small_run.parent.iterdir()} <= {"small", "index.html", "read_only"}
    assert [path.name for path in (left / "temporary").rglob("*") if path.is_file()] == []  # torch makes an empty folder for a cache
    files = [str(path.relative_to(left / "home")) for path in (left / "home").rglob("*") if path.is_file()]
    assert [name for name in files if not any(fnmatch(name, cache) for cache in CACHES)] == []


@pytest.mark.slow
def test_a_run_with_all_examples_leaves_the_checkout_as_it_was(tmp_path):
    "The shared run leaves out most examples; here none is."
    result, seen = report_on_read_only_checkout(report_words("whole", tmp_path / "runs"), tmp_path / "left")
    assert result.returncode == 0, result.stdout + result.stderr
    assert seen["after"] == seen["before"] and {path.name for path in (tmp_path / "runs").iterdir()} == {"whole", "index.html"}


@pytest.mark.parametrize("stage", STAGES)
def test_no_example_of_a_stage_uses_the_scratch_run(stage):
    "Examples that do are lessons, which the pipeline leaves out; the parameters' default is replaced by the pipeline."
    examples = [cell for cell in stage_notebook(stage).cells if cell.cell_type == "code" and not cell.source.startswith("#| export")]
    sources = [cell.source for cell in examples if "parameters" not in cell.metadata.get("tags", [])]
    assert sources and not [source for source in sources if "scratch" in source]
    whole = nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", 4)
    assert any('run_dir = "reports/scratch"' in cell.source for cell in whole.cells)  # Run All in JupyterLab works
