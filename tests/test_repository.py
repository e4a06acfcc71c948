"""Notebooks and modules say the same, and are in the state in which they belong in git."""

import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser

import nbformat
import pytest
from conftest import ROOT, executable
from mutants import load_mutations, mutated_files

from mnist_nb.pipeline import FULL_RUN, STAGES, declared_parameters
from mnist_nb.recipes import Settings

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def test_modules_are_what_the_notebooks_generate(tmp_path):
    for name in ("nbs", "mnist_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for file in (tmp_path / "mnist_nb").glob("*.py"): file.unlink()
    subprocess.run([executable("nbdev_export")], cwd=tmp_path, check=True, capture_output=True)
    generated = {file.name: file.read_text() for file in (tmp_path / "mnist_nb").glob("*.py")}
    committed = {file.name: file.read_text() for file in (ROOT / "mnist_nb").glob("*.py")}
    different = sorted(name for name in {*generated, *committed} if generated.get(name) != committed.get(name))
    assert not different, f"these modules differ from the notebooks: {different}. Run `make notebooks` and commit."


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    dirty = [cell.source[:60] for cell in code if cell.outputs or cell.execution_count is not None]
    dirty += [cell.source[:60] for cell in notebook.cells if set(cell.metadata) - {"tags"}]
    assert not dirty and set(notebook.metadata) <= {"kernelspec"}, f"{path.name} is not clean: {dirty}. Run `make notebooks`."


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_starts_with_title_and_blurb(path):
    cells = nbformat.read(path, as_version=4).cells
    assert re.match(r"# .+\n\n> .+", cells[0].source), f"{path.name}: the first cell is a title and a one-line blurb"
    assert path.stem == "index" or cells[1].source.startswith("#| default_exp ")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_has_one_parameters_cell_where_its_run_begins(stage):
    cells = nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", as_version=4).cells
    tagged = [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{stage}: papermill needs exactly one cell tagged 'parameters'"
    assert cells[tagged[0] - 1].source == "# The run"
    assert not any(cell.source.startswith("#| export") for cell in cells[tagged[0]:]), "the run only calls and shows"
    for line in cells[tagged[0]].source.splitlines():
        assert re.fullmatch(r"\w+ = \S+ +# .+", line), f"{stage}: {line!r} is not `name = value  # comment`"


def test_a_full_run_trains_with_the_defaults_of_the_commands():
    declared = declared_parameters()
    for name in Settings.__dataclass_fields__: assert declared[name].default == getattr(Settings(), name), name
    for name, own in Settings.__dataclass_fields__.items(): assert declared[name].help == own.metadata["help"], name
    assert set(FULL_RUN) == {"epochs", "train_images", "valid_images", "test_images"}


def test_default_run_is_quick():
    for stage in STAGES:
        source = next(cell.source for cell in nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", as_version=4).cells
                      if "parameters" in cell.metadata.get("tags", []))
        for name, value in re.findall(r"^(epochs|\w+_images) = (\d+)", source, re.MULTILINE):
            assert int(value) <= (2 if name == "epochs" else 4000), f"{stage}: {name} = {value}"


def test_mutations_fit_the_code():
    mutations = load_mutations()
    for mutation in mutations: mutated_files(mutation)  # raises where its text is not there exactly once
    assert len(mutations) >= 100 and {path.stem for path in (ROOT / "mnist_nb").glob("[a-z]*.py")} == {own.module for own in mutations}


def test_version_stands_in_one_place():
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    assert f'"{config["DEFAULT"]["version"]}"' in (ROOT / "mnist_nb" / "__init__.py").read_text()


def test_oldest_versions_are_the_lower_ends():
    config = ConfigParser()
    config.read(ROOT / "settings.ini")
    lower = dict(re.findall(r"([\w-]+)>=([\d.]+)", config["DEFAULT"]["requirements"]))
    oldest = dict(re.findall(r"^([\w-]+)==([\d.]+?)(?:\.\*)?$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    assert not set(lower) - set(oldest)
    for name, version in lower.items():
        assert f"{oldest[name]}.0.0".split(".")[:len(version.split("."))] == version.split("."), name


def test_readme_names_only_targets_and_commands_that_exist():
    readme, makefile = (ROOT / "README.md").read_text(), (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    scripts = set(re.findall(r"(mnist-\w+)=", (ROOT / "settings.ini").read_text()))
    assert set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)))) <= targets
    assert set(re.findall(r"\b(mnist-[a-z]+)\b", readme)) <= scripts


def test_readme_links_lead_somewhere():
    for file in ("README.md", "CONTRIBUTING.md", "docs/deploy.md"):
        for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", (ROOT / file).read_text()):
            target = "".join(target)
            assert target.startswith("http") or (ROOT / file).parent.joinpath(target).exists(), f"{file} links to {target}"


def test_readme_shows_the_figures_that_were_measured():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try: import accuracy, grid, inference, lab, page, serving, speed  # noqa: E401
    finally: sys.path.pop(0)
    names = "accuracy", "attack", "grid", "inference", "lab", "page", "serving", "speed"
    measured = {name: json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()) for name in names}
    readme = (ROOT / "README.md").read_text()
    assert accuracy.table(measured["accuracy"]) in readme and speed.table(measured["speed"]) in readme
    assert inference.table(measured["inference"]) in readme
    other = json.loads((ROOT / "benchmarks" / "speed_avx2.json").read_text())
    assert speed.processors({"AVX-512 BF16": measured["speed"], "AVX2": other}) in readme
    said = [page.sentence(measured["page"]), inference.sentences(measured["inference"]), serving.sentences(measured["serving"]),
            lab.sentence(measured["lab"]), grid.sentences(measured["grid"]), serving.attack_sentences(measured["attack"])]
    assert all(words in " ".join(readme.split()) for words in said)
    assert all(map(accuracy.is_current, measured["accuracy"])), "a recipe has changed since: run benchmarks/accuracy.py again"
    rows = [(result["recipe"], result["settings"]["arch"], result["settings"]["seed"]) for result in measured["accuracy"]]
    assert sorted(rows) == sorted((*row, seed) for row in accuracy.PLAN for seed in range(3))


def test_a_built_package_holds_templates_and_scripts(tmp_path):
    left_out = shutil.ignore_patterns(".*", "reports", "data", "node_modules", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, tmp_path / "source", ignore=left_out)
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")], cwd=tmp_path / "source",
                   check=True, capture_output=True)
    for folder in ("templates/report", "static", "static/page", "static/demo"):
        built = {path.name for path in (tmp_path / "lib" / "mnist_nb" / folder).iterdir()}
        assert built == {path.name for path in (ROOT / "mnist_nb" / folder).iterdir()}


def test_links_of_the_reference_pages_lead_to_files_of_a_clone():
    folder = ROOT / "reports" / "reference"
    names = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    for stage in STAGES:
        links = re.findall(r'<a [^>]*href="([^"#:]+)[#"]', (folder / f"{stage}.html").read_text())
        assert len(set(links) & {f"{other}.html" for other in STAGES}) >= 4 and set(links) <= set(names)


def test_reference_run_is_a_whole_one():
    folder = ROOT / "reports" / "reference"
    run = json.loads((folder / "run.json").read_text())
    assert run["status"] == "done" and list(run["stages"]) == list(STAGES)
    assert run["parameters"]["train_images"] == 54_000 and run["metrics"]["test_images"] == 10_000
    names = subprocess.run(["git", "ls-files", "."], cwd=folder, capture_output=True, text=True, check=True).stdout.split()
    assert {f"{stage}.html" for stage in STAGES} <= set(names)
    assert not [name for name in names if name.endswith((".pth", ".pt2", ".ipynb"))]
    assert "predictions.npz" in names  # other runs are compared with it
    assert [name for name in names if name.endswith(".onnx")] == ["model.int8.onnx"]  # predicts before anything was trained
    assert sum((folder / name).stat().st_size for name in names) < 7e6
