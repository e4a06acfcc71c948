"""Notebooks and commands, each in a process of its own that has the large libraries already; the notebooks in a copy of the checkout.

`nbdev_test` runs the same cells, but in the checkout: there a notebook writes to `reports/scratch`. Here nothing is written to it, and
a notebook is a test among the others, so that all of them share the processor's cores.
"""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

FRESH = multiprocessing.get_context("forkserver")  # its server imports the libraries once, and is copied for each process
FRESH.set_forkserver_preload([
    "torch", "torchvision.datasets", "torchvision.transforms.v2", "matplotlib.pyplot", "seaborn", "pandas", "scipy.stats",
    "sklearn.model_selection", "sklearn.manifold", "cleanlab.filter", "papermill", "nbconvert", "ipywidgets", "anywidget", "onnx",
    "distributed", "optuna", "fastapi", "uvicorn", "execnb.shell", "nbdev.test", "fastcore.test", "pytest"])


def copy_checkout(root: Path,    # of the checkout
                  folder: Path,  # of the copy, which is not there yet
                 ) -> Path:      # `folder`
    "A copy with its own modules, notebooks, tests and reports; everything else is linked, and only read."
    folder.mkdir(parents=True)
    for name in ("mnist_nb", "nbs", "tests"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*", "node_modules"))
    (folder / "reports").mkdir()
    own = ("mnist_nb", "nbs", "tests", "reports", "models", "samples", "demo", "runs", ".git", ".venv")
    for path in [*root.iterdir(), root / "reports" / "reference", root / "tests" / "node_modules"]:
        copy = folder / path.relative_to(root)
        if path.exists() and path.name not in own and not path.name.startswith((".pytest", ".ruff")): copy.symlink_to(path)
    return folder


def in_copy(copy: Path,        # of a checkout
            work: Callable,     # called with `words` in a process that imports the copy's modules
            *words: str,
            log: Path,          # what it prints
            seconds: float,     # how long it may take
            **env: str,         # variables of its environment
           ) -> int | None:    # its exit code; None: it took too long
    "Does some work on a copy of the checkout, in a process of its own."
    return forked(work, words, copy, copy, (log, log), seconds, {"PYTHONDONTWRITEBYTECODE": "1", **env})


def forked(work: Callable, words: tuple[str, ...],
           checkout: Path,           # whose modules are imported
           folder: Path,             # to work in
           output: tuple[Path, Path],  # for stdout and stderr
           seconds: float, env: dict[str, str],
          ) -> int | None:           # exit code; None: it took too long
    "Does some work in a process of its own. Ends whatever that leaves running."
    search = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", **env}
    process = FRESH.Process(target=begin, args=(work, words, folder, output, env))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass  # nothing is left of it
    process.join()
    return None if late else process.exitcode


def begin(work: Callable, words: tuple[str, ...], folder: Path, output: tuple[Path, Path], env: dict[str, str]) -> None:
    "What the process does first."
    os.setsid()
    for stream, path in enumerate(output, 1): os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = sys.__stdout__ = open(1, "w", buffering=1, closefd=False)
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    tempfile.tempdir = None  # the server had another one, perhaps
    sys.dont_write_bytecode = "PYTHONDONTWRITEBYTECODE" in env
    first = env["PYTHONPATH"].split(os.pathsep)
    sys.path[:] = [*first, *(path for path in sys.path if path and path not in first)]
    sys.exit(work(*words))


def run_command(name: str,     # of a console script
                words: tuple[str, ...], checkout: Path, folder: Path, seconds: float, env: dict[str, str],
               ) -> subprocess.CompletedProcess:
    "Runs a command to its end, in a process of its own."
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "stdout", Path(place) / "stderr"
        code = forked(start_command, (name, *words), checkout, folder, output, seconds, env)
        printed = [path.read_text() for path in output]
    if code is None: raise subprocess.TimeoutExpired([name, *words], seconds, *printed)
    return subprocess.CompletedProcess([name, *words], code, *printed)


def start_command(name: str, *words: str) -> int | None:
    "What the console script does."
    script, = entry_points(group="console_scripts", name=name)
    sys.argv = [str(Path(sys.executable).parent / name), *words]
    return script.load()()


def run_notebook(name: str,  # of a notebook of the copy, without .ipynb
                ) -> int:    # exit code
    "All cells of a notebook, as `nbdev_test` runs them, until one fails."
    from nbdev.test import test_nb
    passed, _ = test_nb(Path.cwd() / "nbs" / f"{name}.ipynb", skip_flags=["notest"])
    return 0 if passed else 1


def train_scratch() -> int:
    "Trains the model of `reports/scratch`."
    from mnist_nb.training import run_checkpoint
    run_checkpoint("reports/scratch")
    return 0


def run_pytest(*words: str, plugins: tuple = ()) -> int:
    "pytest in the copy."
    import pytest
    sys.argv = ["pytest", *words]
    return pytest.main([*words], plugins=list(plugins))
