"""What several tests share: commands as a user runs them, and one small real run."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from read_only import report_on_read_only_checkout

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with Ctrl-C ignored
os.environ.pop("TQDM_DISABLE", None)
os.environ["OMP_NUM_THREADS"] = "1"  # tests run two at a time: threads that wait for each other would take many times as long

ROOT = Path(__file__).resolve().parent.parent
SMALL = {"arch": "base", "epochs": 2, "train_images": 2000, "valid_images": 500, "test_images": 1000, "device": "cpu"}


def executable(name: str) -> str:
    "A console script of the environment that runs the tests."
    return str(Path(sys.executable).parent / name)


def command(name: str, *words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    "Runs a console script to its end."
    return subprocess.run([executable(name), *map(str, words)], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True,
                          timeout=300)


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


@pytest.fixture(scope="session")
def small_run(tmp_path_factory) -> Path:
    "The folder of a small run on real digits: all five stages, a few thousand images. One process makes it for all; it stays as it is."
    own = tmp_path_factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    shared.mkdir(exist_ok=True)
    with open(shared / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "small" / "terminal.txt").exists():
            result, listings = report_on_read_only_checkout(report_words("small", shared), shared / "read_only")
            assert result.returncode == 0, result.stdout + result.stderr
            (shared / "read_only" / "listings.json").write_text(json.dumps(listings))
            (shared / "small" / "terminal.txt").write_text(result.stdout)
    return shared / "small"


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
