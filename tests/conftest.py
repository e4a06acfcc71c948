"""What several tests share: commands as a user runs them, one small real run, and what other processes are doing."""

import ast
import contextlib
import fcntl
import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from nbformat.v4 import new_output
from notebooks import copy_checkout, in_copy, run_command, train_scratch
from papermill.engines import Engine, papermill_engines
from read_only import report_on_read_only_checkout

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
os.environ.pop("TQDM_DISABLE", None)
os.environ["OMP_NUM_THREADS"] = "1"  # tests run two at a time: threads that wait for each other would take many times as long

ROOT = Path(__file__).resolve().parent.parent
GUARD = ROOT / "tests" / "guard"  # keeps this process, and all that it starts, from changing what belongs to the user
if os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] != str(GUARD):
    os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), *filter(None, [os.environ.get("PYTHONPATH")])])
    runpy.run_path(str(GUARD / "sitecustomize.py"))
SMALL = {"arch": "base", "epochs": 2, "train_images": 2000, "valid_images": 500, "test_images": 1000, "device": "cpu"}


def executable(name: str) -> str:
    "A console script of the environment that runs the tests."
    return str(Path(sys.executable).parent / name)


def command(name: str, *words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    "Runs a command to its end, in a process that has the large libraries already; `executable` names its script, for a bare one."
    return run_command(name, tuple(map(str, words)), ROOT, cwd, 300, env)


def report_words(run: str, reports: Path, **parameters) -> list[str]:
    "The command line of a small run."
    return ["--run", run, "--reports", str(reports), *(f"--param={name}={value}" for name, value in {**SMALL, **parameters}.items())]


def wait_for(condition, seconds: float = 120.0):
    "The first true value of `condition()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition(): return value
        time.sleep(0.05)
    raise AssertionError(f"nothing happened within {seconds} s")


def is_alive(process: psutil.Process) -> bool:
    "Whether a process runs: one that is gone, or a zombie, does not."
    try: return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error: return False


def command_line(process: psutil.Process) -> str:
    "What started a process; empty if it is gone, a zombie, or another user's."
    try: return " ".join(process.cmdline())
    except psutil.Error: return ""


def kernels_of(pid: int) -> list[psutil.Process]:
    "The kernels that run below a process; none if it is gone, or has none yet."
    try: family = psutil.Process(pid).children(recursive=True)
    except psutil.Error: return []
    return [process for process in family if "ipykernel_launcher" in command_line(process) and is_alive(process)]


def kill(processes: list[psutil.Process]) -> None:
    "Kills processes, of which some may have ended by themselves."
    for process in processes:
        with contextlib.suppress(psutil.Error): process.kill()


class Here(Engine):
    "An engine of papermill's that executes cells in this process: a stage takes milliseconds instead of the seconds of a kernel."
    @classmethod
    def execute_managed_notebook(cls, manager, kernel_name, stdout_file=None, on_cell_start=None, **options):
        names = {"__name__": "__main__"}
        for number, cell in enumerate(manager.nb.cells):
            manager.cell_start(cell, number)
            if on_cell_start: on_cell_start(cell=cell, cell_index=number)
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    if cell.cell_type == "code": exec(compile(cell.source, f"<cell {number}>", "exec"), names)
            except Exception as error:
                manager.cell_exception(cell, cell_index=number, exception=error)
                cell.outputs = [new_output("error", ename=type(error).__name__, evalue=str(error),
                                           traceback=["Traceback (most recent call last)", f"{type(error).__name__}: {error}"])]
                return
            finally:
                if text := printed.getvalue():
                    cell.outputs.insert(0, new_output("stream", text=text))
                    if stdout_file: stdout_file.write(text)
                manager.cell_complete(cell, cell_index=number)


@pytest.fixture
def no_kernels(monkeypatch):
    "Notebooks are executed in this process. For tests of what is done with them, not of how a kernel ends."
    monkeypatch.setitem(papermill_engines._engines, None, Here)


def imports_only(source: str) -> bool:
    "Whether a cell does nothing but import."
    return all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in ast.parse(source).body)


def write_without_examples(notebook: Path, target: Path) -> None:
    "A stage notebook with all that the run needs of the parts: what is exported. (The notebook's own test runs the examples.)"
    whole, cells, is_part = nbformat.read(notebook, as_version=4), [], True
    for cell in whole.cells:
        is_part &= cell.source != "# The run"
        example = cell.cell_type == "code" and not cell.source.startswith("#| ") and not imports_only(cell.source)
        if not (is_part and example) or "lesson" in cell.metadata.get("tags", []): cells.append(cell)
    whole.cells = cells
    nbformat.write(whole, target)


def leave_out_examples(checkout: Path) -> None:
    "Shortens most stages of a checkout to what the run needs; one keeps its examples, for the looks of its page."
    for stage in ("00_data", "02_training", "03_error_analysis", "04_export"):
        write_without_examples(ROOT / "nbs" / f"{stage}.ipynb", checkout / "nbs" / f"{stage}.ipynb")


def command_in(checkout: Path, name: str, *words: str) -> subprocess.CompletedProcess:
    "Runs a console script to its end, with the package of another checkout."
    return run_command(name, tuple(map(str, words)), checkout, checkout, 300, {"COLUMNS": "200"})


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    "A folder for what one of the processes that run tests makes for all."
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def make_once(folder: Path, make) -> Path:  # `folder`
    "Lets one process call `make(folder)`, while the others wait. If it fails, nobody tries again."
    done, failed = folder.with_suffix(".done"), folder.with_suffix(".failed")
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if failed.exists(): pytest.fail(f"{folder.name} could not be made: see the first failure")
        if not done.exists():
            failed.touch()
            make(folder)
            failed.rename(done)
    return folder


@pytest.fixture(scope="session")
def small_run(shared) -> Path:
    """The folder of a small run on real digits: all five stages, a few thousand images; it stays as it is.
    Beside it are the page of all runs and, in read_only/checkout, the checkout that it was made in."""
    return make_once(shared / "runs", make_small_run) / "small"


def make_small_run(reports: Path) -> None:
    "Makes the run, or takes a copy of the one that was made below $TESTS_SMALL_RUN before."
    if ready := os.environ.get("TESTS_SMALL_RUN"): return shutil.copytree(ready, reports, dirs_exist_ok=True)
    reports.mkdir()
    result, listings = report_on_read_only_checkout(report_words("small", reports), reports / "read_only", leave_out_examples)
    assert result.returncode == 0, result.stdout + result.stderr
    (reports / "read_only" / "listings.json").write_text(json.dumps(listings))
    (reports / "small" / "terminal.txt").write_text(result.stdout)


@pytest.fixture(scope="session")
def scratch(shared) -> Path:
    "The small model that the notebooks train for themselves, in `reports/scratch`, where they find none."
    def make(folder):
        copy, log = copy_checkout(ROOT, folder), folder / "log"
        assert in_copy(copy, train_scratch, log=log, seconds=120) == 0, log.read_text()
    return make_once(shared / "scratch", make) / "reports" / "scratch"


FIRST = [f"test_{name}.py" for name in ("lab", "serving", "grids", "training", "inference", "commands", "notebooks")]  # these take long


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is made once for a file stays in one process; all else is handed out test by test, what takes long first.
    One test makes the small run at once, and those that need it, too, come last."""
    def place(item): return FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST)
    def needs_run(item): return "small_run" in item.fixturenames
    for item in items:
        found = item._fixtureinfo.name2fixturedefs.values()
        if any(fixtures[-1].scope == "module" for fixtures in found): item.add_marker(pytest.mark.xdist_group(item.path.name))
    items.sort(key=lambda item: (needs_run(item), place(item)))
    if maker := next((item for item in items if needs_run(item) and not item.get_closest_marker("xdist_group")), None):
        items.remove(maker)
        items.insert(0, maker)


def missing(reason: str):
    "Something that not every laptop has: without it a test is skipped there, and fails where CI should run it."
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)


@pytest.fixture(scope="session")
def axe() -> Path:
    "axe-core, which finds what keeps people from using a page."
    script = ROOT / "tests" / "node_modules" / "axe-core" / "axe.min.js"
    if not script.exists(): missing("no axe-core: npm install --prefix tests --no-package-lock")
    return script


@pytest.fixture(scope="session")
def browser():
    "Headless Chromium."
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
    if program is None: missing("no Chromium on this machine: install Debian's chromium, or Google Chrome")
    from playwright.sync_api import sync_playwright
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=flags.split())
        yield chromium
        chromium.close()
