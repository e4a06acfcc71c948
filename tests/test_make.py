"""`make` installs into `.venv` once, and makes it anew where it would run the code of another folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# Stands in for pip: no network, no gigabytes. Scripts name their interpreter and the package names its folder, as pip's do.
PIP = """import os, pathlib, sys, sysconfig
bin = pathlib.Path(sys.executable).parent
def script(name, code):
    (bin / name).write_text(f"#!{sys.executable}\\n{code}\\n")
    (bin / name).chmod(0o755)
script("pip", "")
if "--editable" in sys.argv:
    (pathlib.Path(sysconfig.get_path("purelib")) / "editable.pth").write_text(os.getcwd())
    script("mnist-report", "import mnist_nb; print('code of', mnist_nb.__file__)")
"""
PYTHON = f"""#!/bin/sh
if [ "$2" != venv ]; then exec {sys.executable} "$@"; fi
{sys.executable} -m venv --without-pip .venv
for folder in .venv/lib/python*/site-packages; do mkdir -p $folder/pip && cp "$(dirname "$0")/pip.py" $folder/pip/__main__.py; done
"""


def make(folder: Path, *words: str, **env: str) -> str:
    "Runs `make`; what it printed."
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL")}
    result = subprocess.run(["make", f"PYTHON={folder.parent / 'python'}", *words], cwd=folder, env={**environment, **env},
                            capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture
def project(tmp_path) -> Path:
    "A checkout with the real Makefile and a small package, installed by `make`."
    folder = tmp_path / "project"
    (folder / "mnist_nb").mkdir(parents=True)
    (folder / "mnist_nb" / "__init__.py").write_text("")
    for name in ("Makefile", "settings.ini", "setup.py"): shutil.copy(ROOT / name, folder)
    (tmp_path / "pip.py").write_text(PIP)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    assert "== making .venv" in make(folder, "report")
    return folder


def state(folder: Path) -> dict[str, int]:
    "When each file of an environment was written."
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*") if "__pycache__" not in path.parts}


def copied(project: Path) -> Path:
    subprocess.run(["cp", "-a", project, project.parent / "copy"], check=True)
    return project.parent / "copy"


def test_an_installed_environment_is_used_as_it_is(project):
    before = state(project / ".venv")
    output = make(project, "report")
    assert f"code of {project}/" in output and "making .venv" not in output and state(project / ".venv") == before


def test_a_copy_runs_its_own_code(project):
    copy, before = copied(project), state(project)
    output = make(copy, "report")
    assert f".venv is made anew: it belongs to {project}/.venv/bin" in output and f"code of {copy}/" in output
    assert state(project) == before
    assert "making .venv" not in make(copy, "report")


def test_a_moved_folder_runs_its_own_code(project):
    moved = project.rename(project.parent / "moved")
    output = make(moved, "report")
    assert "made anew" in output and f"code of {moved}/" in output


def test_an_environment_whose_python_is_gone_is_made_anew(project):
    (project / ".venv" / "bin" / "python").unlink()
    (project / ".venv" / "bin" / "python").symlink_to(project / "no_such_python")
    output = make(project, "report")
    assert ".venv is made anew: it does not start" in output and f"code of {project}/" in output


def test_another_folders_package_is_replaced(project):
    other = project.parent / "other" / "mnist_nb"
    shutil.copytree(project / "mnist_nb", other)
    next(project.glob(".venv/lib/python*/site-packages/editable.pth")).write_text(str(other.parent))
    output = make(project, "report")
    assert f".venv is made anew: it belongs to {other}" in output and f"code of {project}/" in output


def test_a_linked_environment_is_never_changed(project):
    second, before = project.parent / "second", state(project)
    shutil.copytree(project, second, ignore=shutil.ignore_patterns(".venv"))
    (second / ".venv").symlink_to(project / ".venv")
    output = make(second, "report", PYTHONPATH=str(second))  # shared on purpose, as git worktrees may
    assert f"code of {second}/" in output and "making .venv" not in output
    output = make(second, "report")
    assert "made anew" in output and f"code of {second}/" in output and not (second / ".venv").is_symlink()
    assert state(project) == before


def test_an_unfinished_installation_goes_on(project):
    (project / ".venv" / "installed").unlink()
    (project / ".venv" / "downloaded").touch()
    (project / ".venv" / "bin" / "pip").unlink()  # as in an environment that uv made
    output = make(project, "report")
    assert "making .venv" in output and "made anew" not in output and (project / ".venv" / "downloaded").exists()


@pytest.mark.parametrize("form", ['#!/bin/sh\n\'\'\'exec\' "{}" "$0" "$@"\n\' \'\'\'\n', "#!/bin/sh\n'''exec' {} \"$0\" \"$@\"\n' '''\n"])
def test_long_paths_and_spaces_in_scripts_are_understood(project, form):
    "pip writes scripts in this form where `#!` cannot hold the path."
    (project / ".venv" / "bin" / "pip").write_text(form.format(project / ".venv/bin/python3"))
    assert "making .venv" not in make(project, "report")
    (project / ".venv" / "bin" / "pip").write_text(form.format("/somewhere/else/.venv/bin/python3"))
    assert "it belongs to /somewhere/else/.venv/bin" in make(project, "-n", "report")


def test_every_target_that_uses_the_environment_checks_it(project):
    copy = copied(project)
    targets = [line.split()[1] for line in make(copy, "help").splitlines()]
    assert {"report", "test", "slow", "notebooks", "lab"} <= set(targets)
    recipes = {target: make(copy, "-n", target) for target in targets}
    assert [target for target in targets if "rm -rf .venv" not in recipes[target]] == [
        target for target in targets if ".venv/bin/" not in recipes[target]]
    assert "rm -rf .venv" not in recipes["clean"] + recipes["help"]
