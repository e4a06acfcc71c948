"""Grids: the parts in this process, with runs that are played by a few lines of Python; the whole command with toy notebooks (slow)."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, executable, wait_for
from distributed import KilledWorker
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from scipy import stats
from toy import PLAYED, toy_checkout, toy_env, toy_words

from mnist_nb import batch, cli, grids, leaderboard
from mnist_nb.models import load_checkpoint
from mnist_nb.pipeline import declared_parameters, run_lock
from mnist_nb.recipes import Settings
from mnist_nb.runs import InputError, read_run, update_run
from mnist_nb.training import fit


class Toy:
    "A toy checkout, and the command `mnist-grid` in it."
    def __init__(self, folder, real=()):
        self.folder, self.reports = toy_checkout(folder, real), folder / "reports"

    def start(self, *words, name="grid", **env):
        return subprocess.Popen(toy_words(name, *words), cwd=self.folder, env={**toy_env(self.folder), **env}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    def grid(self, *words, **options):
        process = self.start(*words, **options)
        output, _ = process.communicate(timeout=240)
        return SimpleNamespace(code=process.returncode, output=output)

    def record(self, name): return json.loads((self.reports / name / "grid.json").read_text())

    def statuses(self, name): return {run["run"]: run["status"] for run in self.record(name)["runs"]}

    def page(self, name): return (self.reports / name / "index.html").read_text()


@pytest.fixture
def toy(tmp_path): return Toy(tmp_path)


def is_alive(process: psutil.Process) -> bool:  # false for one that is gone, and for a zombie
    try: return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error: return False


def words_of(process: psutil.Process) -> str:  # the command line; empty for one that is gone, and for a zombie
    try: return " ".join(process.cmdline())
    except psutil.Error: return ""


def family_of(pid: int) -> list[psutil.Process]:  # what a process has started; nothing if it is gone
    try: return psutil.Process(pid).children(recursive=True)
    except psutil.Error: return []


def with_kernel(pid: int) -> list[psutil.Process]:  # the family, once there is a kernel in it
    family = family_of(pid)
    return family if any("ipykernel_launcher" in words_of(process) for process in family) else []


def belongs_to(process: psutil.Process, folder: Path) -> bool:
    try: return process.environ().get("PYTHONPATH") == str(folder)
    except psutil.Error: return False


def at_work(folder: Path, *marks: str) -> list[psutil.Process]:
    "Processes that carry out runs of a folder, and their kernels."
    marks = marks or ("ipykernel_launcher", "mnist_nb.batch import work")
    return [process for process in psutil.process_iter() if any(mark in words_of(process) for mark in marks)
            and is_alive(process) and belongs_to(process, folder)]


def test_processes_that_are_gone_unborn_or_zombies_are_nobody():
    process = subprocess.Popen(["true"])
    zombie = psutil.Process(process.pid)
    wait_for(lambda: not is_alive(zombie))
    assert (words_of(zombie), family_of(process.pid), belongs_to(zombie, ROOT)) == ("", [], False)
    process.wait()
    assert (is_alive(zombie), words_of(zombie), family_of(process.pid), with_kernel(process.pid)) == (False, "", [], [])
    assert family_of(2**22 + 1) == batch.family_of(process) == []


@pytest.mark.slow
def test_three_runs_fail_each_in_its_own_way(toy):
    words = ["--name=bad", "--param=learning_rate=0.001,-1,666,777", "--param=weight_decay=0", "--run_timeout=30"]
    result = toy.grid(*words, "--jobs=2")
    assert result.code == 1, result.output
    assert toy.statuses("bad") == {"learning_rate-0.001": "done", "learning_rate--1.0": "failed", "learning_rate-666.0": "failed",
                                   "learning_rate-777.0": "failed"}
    reasons = ["learning_rate=-1.0 is out of range: give a number above 0", "Training: ArithmeticError: the number of the beast",
               "took longer than its time limit of 30 s"]
    for reason in reasons: assert reason in toy.page("bad") and reason in result.output
    assert "1 done, 3 failed" in result.output and "mnist-grid --name bad --resume" in result.output
    failed = json.loads((toy.reports / "bad" / "learning_rate-777.0" / "run.json").read_text())
    assert (failed["status"], failed["error"], at_work(toy.folder)) == ("failed", reasons[2], [])
    assert reasons[2] in (toy.reports / "bad" / "learning_rate-777.0" / "02_training.html").read_text()
    index = (toy.reports / "index.html").read_text()
    assert 'href="bad/index.html"' in index and "1 of 4 runs done" in index

    before = {path: path.stat().st_mtime_ns for path in toy.reports.glob("bad/learning_rate-0.001/*")}
    again = toy.grid("--name=bad", "--resume", "--run_timeout=6")
    assert again.code == 1 and "2 of 4 runs to do" in again.output  # the third is impossible, and said to be
    assert set(re.findall(r"^(learning_rate\S+): failed", again.output, re.MULTILINE)) == {
        "learning_rate--1.0", "learning_rate-666.0", "learning_rate-777.0"}
    assert before and {path: path.stat().st_mtime_ns for path in before} == before
    anew = toy.grid(*words)
    assert anew.code == 2 and "there is a grid 'bad' already" in anew.output


@pytest.mark.slow
def test_interrupted_then_resumed(toy):
    process = toy.start("--name=cut", "--param=seed=0:2", "--param=weight_decay=0.4", "--param=epochs=12", "--jobs=2")
    histories = wait_for(lambda: len(found := list(toy.reports.glob("cut/seed-*/history.csv"))) == 2 and found)
    assert len(at_work(toy.folder)) == 4
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    wait_for(lambda: not at_work(toy.folder), seconds=5)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and "interrupted" in output and "Traceback" not in output
    record = toy.record("cut")
    assert record["status"] == "interrupted" and {run["status"] for run in record["runs"]} == {"waiting"}
    assert "interrupted" in toy.page("cut")
    epochs = [len(path.read_text().splitlines()) - 1 for path in histories]
    assert all(1 <= done < 12 for done in epochs)

    result = toy.grid("--name=cut", "--resume")
    assert result.code == 0, result.output
    assert set(toy.statuses("cut").values()) == {"done"} and toy.record("cut")["status"] == "done"
    assert all(len(path.read_text().splitlines()) == 13 for path in histories)
    assert len(toy.record("cut")["sessions"]) == 2


@pytest.mark.slow
def test_a_killed_command_leaves_nothing_running(toy):
    process = toy.start("--name=killed", "--param=seed=0:2", "--param=weight_decay=30", "--jobs=2")
    wait_for(lambda: len(at_work(toy.folder)) == 4)
    process.kill()
    process.wait()
    wait_for(lambda: not at_work(toy.folder), seconds=10)
    dry = toy.grid("--name=killed", "--resume", "--dry_run")
    assert dry.code == 0 and "2 runs, 2 to do" in dry.output


@pytest.mark.slow
def test_hopeless_runs_are_given_up(toy):
    result = toy.grid("--name=halved", "--param=dropout=1,0", "--param=weight_decay=0.1", "--param=epochs=30", "--jobs=1", "--halving")
    assert result.code == 0, result.output
    assert toy.statuses("halved") == {"dropout-1.0": "done", "dropout-0.0": "stopped"}
    stopped = json.loads((toy.reports / "halved" / "dropout-0.0" / "run.json").read_text())
    assert "given up after epoch 1: its validation accuracy, 80.00%, is not among the best third" in stopped["error"]
    assert "given up after epoch 1" in (toy.reports / "halved" / "dropout-0.0" / "02_training.html").read_text()  # not "interrupted"
    assert (toy.reports / "halved" / "optuna.journal").exists()
    assert "is [dropout 1.0]: 90.00% (one seed)" in toy.page("halved")
    assert "0 to do" in toy.grid("--name=halved", "--resume", "--dry_run").output


@pytest.fixture
def played(tmp_path, monkeypatch):
    "Runs grids in this process, with runs that are played."
    project, reports = tmp_path / "project", tmp_path / "reports"
    (project / "mnist_nb").mkdir(parents=True)
    (project / "mnist_nb" / "__init__.py").touch()
    (project / "mnist_nb" / "batch.py").write_text(PLAYED)
    monkeypatch.setattr(batch, "project_root", lambda: project)
    def play(name, jobs=2, resume=False, spec=None, **param):
        own = grids.GridSpec(name, {"weight_decay": 0, "epochs": 1, **param}, **(spec or {}))
        return batch.run_grid(own, jobs=jobs, reports=reports, resume=resume)
    play.project, play.reports = project, reports
    return play


def by_name(record, key): return {run["run"]: run.get(key) for run in record["runs"]}


def test_each_run_ends_in_its_own_way(played, capsys):
    values = {"learning_rate": "0.001,-1,666,777,555,444"}
    record = played("bad", spec={"run_timeout": 4}, **values)
    statuses = {name.removeprefix("learning_rate-"): status for name, status in by_name(record, "status").items()}
    assert statuses == {"0.001": "done", **dict.fromkeys(("-1.0", "666.0", "777.0", "555.0", "444.0"), "failed")}
    reasons = {"-1.0": "learning_rate=-1.0 is out of range: give a number above 0",
               "666.0": "Training: ArithmeticError: the number of the beast", "777.0": "took longer than its time limit of 4 s",
               "555.0": "no memory left", "444.0": "its process ended with 0"}
    output, page = capsys.readouterr().out, (played.reports / "bad" / "index.html").read_text()
    for name, reason in reasons.items():
        assert by_name(record, "reason")[f"learning_rate-{name}"].startswith(reason) and reason in page and reason in output, name
    assert "learning_rate-0.001: done in" in output and "validation accuracy 90.00%" in output and "1 done, 5 failed" in output
    assert record["status"] == "failed" and record["sessions"][0]["runs"] == 5
    late, done = (read_run(played.reports / "bad" / f"learning_rate-{name}") for name in ("777.0", "0.001"))
    assert (late["status"], late["error"], late["stages"]["02_training"]["error"]) == ("failed", *[reasons["777.0"]] * 2)
    assert done["cpu_seconds"] == by_name(record, "cpu_seconds")["learning_rate-0.001"] == 1.5
    assert at_work(played.project, "mnist_nb.batch import work", "sleep") == []

    kept = {path: path.stat().st_mtime_ns for path in played.reports.glob("bad/learning_rate-0.001/*")}
    (played.reports / "bad" / "learning_rate-444.0" / "kept.txt").write_text("perhaps of use")
    again = played("bad", resume=True, spec={"run_timeout": 1}, **values)
    assert "grid bad: 4 of 6 runs to do" in capsys.readouterr().out and by_name(again, "status") == by_name(record, "status")
    assert kept and {path: path.stat().st_mtime_ns for path in kept} == kept
    assert (played.reports / "bad" / "learning_rate-444.0.damaged-1" / "kept.txt").exists()
    spent = by_name(again, "spent")["learning_rate-777.0"]["seconds"]
    assert spent >= 5  # in both attempts


DAMAGE = ['{"run": "seed-1", "status": "do', "", "[]", "null", "{}", '{"status": "done"}', "[" * 100_000]  # of a run.json


def test_a_record_is_whole_or_lost(tmp_path):
    whole = {"status": "done", "parameters": {}, "seconds": 1.0, "stages": {"00_data": {"status": "done"}}, "machine": {},
             "metrics": {"valid_accuracy": 1, "test_accuracy": 0.9}}
    odd = [{**whole, name: value} for name, value in {"status": 1, "parameters": [], "seconds": "1", "stages": {"00_data": 1}, "machine": 3,
                                                      "metrics": []}.items()]
    lacking = [{**whole, "metrics": {**whole["metrics"], name: value}} for name in whole["metrics"] for value in (None, "0.9", math.nan)]
    assert grids.recorded_run(tmp_path) == {}  # no record at all
    for content in [*DAMAGE, *map(json.dumps, [*odd, *lacking])]:
        (tmp_path / "run.json").write_text(content)
        assert grids.recorded_run(tmp_path) == {}, content
    for run in (whole, {"status": "failed", "parameters": {}}):
        (tmp_path / "run.json").write_text(json.dumps(run))
        assert grids.recorded_run(tmp_path) == run


def test_a_damaged_record_costs_its_run_and_nothing_else(played, capsys):
    played("x", seed="0:3")
    grid, broken = played.reports / "x", played.reports / "x" / "seed-1" / "run.json"
    words = ["--name=x", f"--reports={played.reports}", "--resume"]
    for number, content in enumerate((DAMAGE[0], '[]')):
        broken.write_text(content)
        assert cli.grid([*words, "--dry_run"]) == 0
        assert "3 runs, 1 to do" in capsys.readouterr().out
        page = leaderboard.write_grid_page(grid).read_text()
        assert re.search(r'2 <span class="done">done.*1 <span class="waiting">waiting', page) and grids.LOST in page
        with run_lock(grid):  # while the grid runs
            grids.write_grid(grid, {**grids.read_grid(grid), "status": "running"})
            assert '1 <span class="waiting">waiting' in leaderboard.write_grid_page(grid).read_text()
        if number: continue
        assert cli.grid(words) == 0
        assert "1 of 3 runs to do" in capsys.readouterr().out and read_run(broken.parent)["status"] == "done"
        assert (grid / "seed-1.damaged-1" / "run.json").read_text() == content
    shutil.rmtree(broken.parent)
    assert cli.grid(words) == 0 and read_run(broken.parent)["status"] == "done"


def test_a_page_that_cannot_be_written_does_not_end_a_grid(monkeypatch, tmp_path):
    shown, written = [], []
    def fail(path):
        written.append(path)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(leaderboard, "write_grid_page", fail)
    refresh = batch.Refresher(shown.append, tmp_path)
    for _ in range(3): refresh("batch")
    assert (shown, written) == (["batch"] * 3, [tmp_path])  # the page not each time


def test_nothing_to_do_needs_no_workers(played, capsys):
    played("x", seed="0:2")
    capsys.readouterr()
    assert cli.grid(["--name=x", f"--reports={played.reports}", "--resume", "--scheduler=tcp://127.0.0.1:1"]) == 0
    output = capsys.readouterr().out
    assert "0 of 2 runs to do: nothing to do" in output and "dask worker" not in output
    assert grids.read_grid(played.reports / "x")["status"] == "done" and len(grids.read_grid(played.reports / "x")["sessions"]) == 1


def test_parts_and_the_page_of_all(played, capsys):
    "Two machines do a part each; the last command collects them."
    words = [f"--reports={played.reports}", "--param=seed=0:3", "--param=weight_decay=0", "--param=epochs=1"]
    assert cli.grid(["--name=x", *words, "--part=2/2"]) == 0
    assert grids.read_grid(played.reports / "x")["status"] == "waiting"
    assert by_name(grids.read_grid(played.reports / "x"), "status") == {"seed-0": "waiting", "seed-1": "done", "seed-2": "waiting"}
    assert cli.grid(["--name=x", f"--reports={played.reports}", "--page"]) == 1
    assert cli.grid(["--name=x", f"--reports={played.reports}", "--resume", "--part=1/2", "--jobs=1"]) == 0
    assert cli.grid(["--name=x", f"--reports={played.reports}", "--page"]) == 0
    assert "3 done" in capsys.readouterr().out


def test_an_interrupted_grid_goes_on(played):
    "Ctrl-C while two runs are at work: their processes end, nothing is lost but them."
    def interrupt():
        wait_for(lambda: len(at_work(played.project)) == 2)
        os.kill(os.getpid(), signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt): played("cut", seed="0:3", weight_decay=30)
    thread.join()
    record = grids.read_grid(played.reports / "cut")
    assert record["status"] == "interrupted" and set(by_name(record, "status").values()) == {"waiting"}
    assert at_work(played.project) == [] and "interrupted" in (played.reports / "cut" / "index.html").read_text()
    assert by_name(batch.prepare_grid(grids.GridSpec(**record["spec"]), True, played.reports), "status") == by_name(record, "status")


@pytest.mark.parametrize("address", ["http://127.0.0.1:8787", "https://host:8787/status", "host", "tcp://host", "tcp://host:port", ""])
def test_what_cannot_be_a_scheduler_is_refused(address, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended: cli.grid([f"--scheduler={address}", f"--reports={tmp_path}", "--param=seed=0:2"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "give the address that `dask scheduler` prints, such as tcp://host:8786" in error
    assert "Traceback" not in error and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [OSError("timed out"), AssertionError(), TypeError("TLS expects a `ssl_context`"), ValueError("odd")])
def test_a_scheduler_that_does_not_answer_as_one_is_named(error, monkeypatch):
    def client(*_, **__): raise error
    monkeypatch.setattr(batch, "Client", client)
    with pytest.raises(InputError, match="no Dask scheduler at tcp://host:1 .*start one with `dask scheduler`"):
        with batch.open_cluster("tcp://host:1", 1): pass


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))


@pytest.mark.parametrize("content, said", [
    ("param:\n  seed: 0:3\n  arch: base\n  seed: 0:5\n", "line 4: seed is given twice, first in line 2"),
    ("recipe: fast\nparam: {seed: 1}\nrecipe: best\n", "line 3: recipe is given twice, first in line 1"),
    (BOMB, "characters with its aliases written out"), (f"{BOMB}param: *a8\n", "characters with its aliases written out"),
    (f"{BOMB[:BOMB.index('a3')]}param: *a2\n", "param is [[['x', 'x'"),
    ("param: {seed: &a [1, *a]}", "characters with its aliases written out"),
    ("param: {seed: [" + "1, " * 40_000 + "]}", "more than 100,000 characters"), ("[" * 1000, "nested too deeply"),
    ("", "is empty: say what to run"), ("# a comment\n", "is empty: say what to run"), ("recipe: fast\n", "gives no values"),
    ("param: {}\n", "gives no values"),
    ("param: {seed: 0:100000}", "seed=0:100000 would make 100,000 runs. A grid has at most 10,000"),
    ("param: {seed: 0:200, epochs: 1:101}", "this grid would make 20,000 runs"), ("param: {seed: [[1]]}", "seed: ['1'] is not a value"),
    (f"param: {{seed: {'9' * 5000}}}", "is not a value"),
    ("name: [a, b]\nparam: {seed: 1}", "name is ['a', 'b']: a single value is wanted"),
    ("param: {seed: 0:3", "is not valid YAML, line 1")])
def test_files_that_are_no_plan_are_refused_in_a_line(content, said, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit) as ended: cli.grid([str(path), f"--reports={tmp_path / 'reports'}", "--dry_run"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and len(error) < 500 + len(str(path))


def test_aliases_that_stay_small_are_fine(tmp_path):
    (tmp_path / "x.yaml").write_text("param: {learning_rate: &rates [1e-4, 1e-3], weight_decay: *rates}")
    assert grids.read_spec(tmp_path / "x.yaml").axes == {"learning_rate": [1e-4, 1e-3], "weight_decay": [1e-4, 1e-3]}


@pytest.mark.parametrize("param, sample, count", [
    ({"seed": "0:100000"}, None, "100,000"), ({"seed": range(10**10)}, None, "10,000,000,000"),
    ({"dropout": "lin:0:1:10001"}, None, "10,001"), ({"dropout": "lin:0:1:101", "seed": "0:100"}, None, "10,100"),
    ({"dropout": "lin:0:1", "seed": "0:3"}, 5000, "15,000"),
    ({"dropout": "lin:0:1"}, 10**9, "1,000,000,000")])
def test_a_grid_has_ten_thousand_runs_at_most(param, sample, count):
    with pytest.raises(InputError, match=f"would make {count} runs. A grid has at most 10,000"):
        grids.expand(grids.GridSpec("x", param, sample=sample))


def test_the_largest_grid_is_planned(monkeypatch):
    record = grids.plan_grid(grids.GridSpec("x", {"seed": "0:5000", "epochs": "1,2"}))
    assert len(record["runs"]) == len({run["run"] for run in record["runs"]}) == 10_000
    assert "10000 runs, 10000 to do" in grids.describe_grid(record, [], 2, 1)
    monkeypatch.setattr(grids, "MOST_RUNS", 3)
    record = grids.plan_grid(grids.GridSpec("x", {"seed": "0:3"}))
    record["runs"][0]["status"] = "done"  # it stays, beside three new ones
    with pytest.raises(InputError, match="this grid would make 4 runs"): grids.plan_grid(grids.GridSpec("x", {"seed": "1:4"}), record)


# What the page says

RATES = [float(f"{rate:.4g}") for rate in np.geomspace(1e-4, 1e-1, 12)]


def frame_of(accuracy, **axes) -> pd.DataFrame:
    "Runs that are done, one for each combination; `accuracy` takes their table."
    table = pd.MultiIndex.from_product(axes.values(), names=axes.keys()).to_frame(index=False)
    return table.assign(run=[f"run-{i}" for i in range(len(table))], status="done", valid_accuracy=accuracy(table))


def significant(frame, rounds=199, **options) -> list[str]:
    found = leaderboard.parameter_importance(frame, rounds=rounds, **options)
    return found.index[found.p <= 0.05].tolist()


def test_pure_noise_matters_in_one_page_of_twenty():
    "Learning rates and seeds that do nothing: a bar is drawn in 5% of the grids."
    random = np.random.default_rng(0)
    def noise(table): return 0.98 + random.normal(0, 0.002, len(table))
    pages = [leaderboard.parameter_importance(frame_of(noise, learning_rate=RATES, seed=range(2)), rounds=39) for _ in range(250)]
    assert 0.01 <= np.mean([(page.p <= 0.05).any() for page in pages]) <= 0.09  # 0.05, and three standard errors of 250 pages
    assert all(abs(np.mean([page.share[name] for page in pages])) < 0.04 for name in ("learning_rate", "seed"))  # nothing, on average


@pytest.mark.parametrize("settings, seeds, luck", [(2, 6, 0.0), (2, 6, 0.02), (4, 3, 0.01)])
def test_lucky_seeds_are_no_effect_of_the_setting(settings, seeds, luck):
    "Two settings with six seeds are enough for an effect to be seen, and seeds that differ do not make one."
    random = np.random.default_rng(0)
    def run(effect):
        own = random.normal(0, luck, seeds)
        return frame_of(lambda table: 0.9 + effect * (table.arch == "a") + own[table.seed] + random.normal(0, 0.002, len(table)),
                        arch=[*"abcd"[:settings]], seed=range(seeds))
    assert sum("arch" in significant(run(0), rounds=39) for _ in range(80)) <= 10  # 5% of 80, and three standard errors
    assert sum("arch" in significant(run(0.03)) for _ in range(10)) == 10


def test_what_matters_is_shown_and_nothing_beside_it():
    random = np.random.default_rng(0)
    def effect(table): return (0.98 + 0.01 * (table.arch == "cnn") - 0.004 * np.log10(table.learning_rate).add(2.5).abs()
                               + 0.003 * table.seed + random.normal(0, 0.001, len(table)))
    axes = {"arch": ["base", "cnn"], "learning_rate": RATES[:4], "dropout": [0.0, 0.5, 1.0], "seed": range(3)}
    pages = [significant(frame_of(effect, **axes)) for _ in range(30)]
    assert all({"arch", "learning_rate", "seed"} <= set(page) for page in pages)
    assert sum("dropout" in page for page in pages) <= 5  # 5% of 30, and three standard errors
    exact = leaderboard.parameter_importance(frame_of(lambda table: 0.9 + 0.05 * (table.arch == "cnn") + 0.0 * table.seed, **axes))
    assert exact.index[0] == "arch" and exact.share.round(6).tolist() == [1, 0, 0, 0] and exact.p["arch"] < 0.01


def draw(random, settings=20, seeds=3) -> pd.DataFrame:
    "Settings drawn at random, of which the learning rate matters, trained with some seeds."
    drawn = pd.DataFrame({"learning_rate": 10 ** random.uniform(-4, -1, settings), "dropout": random.random(settings)})
    table = pd.concat([drawn.assign(seed=seed) for seed in range(seeds)], ignore_index=True)
    accuracy = 0.97 - 0.02 * np.log10(table.learning_rate).add(2.5).abs() + random.normal(0, 0.001, len(table))
    return table.assign(run="run", status="done", valid_accuracy=accuracy)


def test_repetitions_of_a_setting_are_no_evidence_for_what_it_was_drawn_with():
    "Three seeds of twenty settings are twenty settings: else whatever varies beside the learning rate would seem to matter."
    random = np.random.default_rng(0)
    pages = [significant(draw(random), drawn=True) for _ in range(60)]
    assert sum("dropout" in page for page in pages) <= 8 and sum("learning_rate" in page for page in pages) >= 55
    untested = leaderboard.parameter_importance(draw(random))  # if they were not drawn, nothing says that they are independent
    assert untested.p.isna()["dropout"] and untested.p.notna()["seed"]


def test_parameters_that_only_vary_together_are_not_tested():
    random = np.random.default_rng(0)
    def half(arch, rates): return frame_of(lambda table: 0.9 + 0.05 * (arch == "cnn") + random.normal(0, 0.001, len(table)),
                                           arch=[arch], learning_rate=rates, seed=range(3))
    found = [leaderboard.parameter_importance(pd.concat([half("base", RATES[:6]), half("cnn", RATES[6:])], ignore_index=True), rounds=199)
             for _ in range(30)]
    assert all(math.isnan(table.p["arch"]) for table in found) and sum(table.p["learning_rate"] <= 0.05 for table in found) <= 5
    assert "Not tested, since too few runs differ in nothing else: arch." in leaderboard.describe_importance(found[0])


def test_holm_is_that_of_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(20) ** 3
    np.testing.assert_allclose(leaderboard.holm(p), multitest.multipletests(p, method="holm")[1])


def finish(grid_path, accuracy, predictions=False, **param):
    "A grid that is done, without any training."
    record = grids.plan_grid(grids.GridSpec("made", param))
    labels = np.arange(200) % 10
    for run in record["runs"]:
        run |= {"status": "done", "seconds": 60.0, "cpu_seconds": 90.0, "threads": 2, "reason": None}
        valid, test = accuracy(run["parameters"])
        metrics = {"valid_accuracy": valid, "test_accuracy": test, "test_errors": round(200 * (1 - test)), "test_images": 200,
                   "training_seconds": 20.0}
        parameters = grids.complete(run["parameters"], "default", declared_parameters())
        update_run(grid_path / run["run"], status="done", stages={}, parameters=parameters, metrics=metrics)
        logits = np.eye(10, dtype=np.float32)[np.where(np.arange(200) < 200 * (1 - test) - 0.5, (labels + 1) % 10, labels)]
        if predictions: np.savez(grid_path / run["run"] / "predictions.npz", labels=labels, logits=logits)
    grids.write_grid(grid_path, record)
    return record


def test_the_page_says_what_matters_or_that_nothing_does(tmp_path):
    random = np.random.default_rng(3)
    rates = ",".join(map(str, RATES))
    finish(tmp_path / "noise", lambda run: (0.98 + random.normal(0, 0.002), 0.97), learning_rate=rates, seed="0:2")
    noise = leaderboard.write_grid_page(tmp_path / "noise").read_text()
    assert "No parameter explains significantly more of the variance than chance. Not distinguishable from chance:" in noise
    assert 'class="bars"' not in noise and "what chance explains" not in noise
    finish(tmp_path / "real", lambda run: (0.9 + 0.05 * (run["arch"] == "cnn") + random.normal(0, 0.001), 0.9), arch="base,cnn", seed="0:6")
    real = leaderboard.write_grid_page(tmp_path / "real").read_text()
    assert re.search(r'<span>arch</span><i class="arch" style="width: (9\d|100)\.\d%"></i><span>(9\d|100)% \(p = 0\.0\d+\)', real)
    assert "<span>seed</span>" not in real and "Not distinguishable from chance: seed (p =" in real


def test_settings_are_ranked_by_validation_accuracy_never_by_test_accuracy(tmp_path):
    def accuracy(run): return {"base": (0.98, 0.90), "cnn": (0.97, 0.95), "nano": (0.96, 0.99)}[run["arch"]]
    record = finish(tmp_path / "made", accuracy, predictions=True, arch="nano,cnn,base", seed="0:2")
    ranked = leaderboard.rank_settings(leaderboard.load_runs(tmp_path / "made", record))
    assert ranked.setting.tolist() == ["arch base", "arch cnn", "arch nano"] and ranked.valid_mean.tolist() == [0.98, 0.97, 0.96]
    assert ranked.test_mean.tolist() == [0.90, 0.95, 0.99] and ranked.whole.all()
    assert ranked.runs[0] == ["arch-base_seed-0", "arch-base_seed-1"]
    best, second = leaderboard.describe_best(tmp_path / "made", ranked)
    assert "The best of 3 settings, by validation accuracy, is [arch base]: 98.00 ± 0.00%" in best
    assert "Its test accuracy is 90.00 ± 0.00%" in best and "[arch base] is worse than [arch cnn] on the test set: -5.00 points" in second
    (tmp_path / "made" / "arch-base_seed-1" / "run.json").write_text("{")  # no longer whole: ranked after those that are
    after = leaderboard.rank_settings(leaderboard.load_runs(tmp_path / "made", record))
    assert after.setting.tolist() == ["arch cnn", "arch nano", "arch base"] and after.done.tolist() == [2, 2, 1]


def mean_squares(d: np.ndarray) -> tuple[float, float, float]:  # (seeds, images) -> of seeds, of images, of the rest
    "Those of a two-way layout, from differences between all pairs of rows, of columns, and of both."
    seeds, images = d.shape
    rows, columns = np.triu_indices(seeds, 1), np.triu_indices(images, 1)
    contrasts = d[rows[0]] - d[rows[1]]
    contrasts = contrasts[:, columns[0]] - contrasts[:, columns[1]]
    return (images * ((d.mean(1)[rows[0]] - d.mean(1)[rows[1]]) ** 2).mean() / 2,
            seeds * ((d.mean(0)[columns[0]] - d.mean(0)[columns[1]]) ** 2).mean() / 2, (contrasts**2).mean() / 4)


@pytest.mark.parametrize("seeds, images, number", [(2, 7, 12), (3, 10, 5), (5, 20, 2), (4, 30, 3)])
def test_the_interval_of_a_difference_is_that_of_a_two_way_layout(seeds, images, number):
    random = np.random.default_rng(number)
    chance = 1 / (1 + np.exp(-random.normal(0, 2, (seeds, 1)) - random.normal(0, 2, images)))  # seeds and images both matter
    first, second = np.zeros((seeds, images), bool), random.random((seeds, images)) < chance
    of_seeds, of_images, rest = mean_squares(second.astype(float))
    variance = (of_seeds + of_images - rest) / (seeds * images)
    assert rest < min(of_seeds, of_images)  # so that it counts
    freedom = (of_seeds + of_images) ** 2 / (of_seeds**2 / (seeds - 1) + of_images**2 / (images - 1))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    result = leaderboard.compare_settings(first, second)
    np.testing.assert_allclose([result["difference"], result["low"], result["high"]], second.mean() + half * np.array([0, -1, 1]))
    assert (result["seeds"], result["images"]) == (seeds, images) and np.allclose(result["by_seed"], second.mean(1))
    opposite = leaderboard.compare_settings(second, first)
    assert math.isclose(opposite["low"], -result["high"])


def test_the_interval_with_one_seed_is_over_images():
    wrong = np.arange(50)[None] < 10
    result = leaderboard.compare_settings(wrong, np.ones((1, 50), bool))
    half = stats.t.ppf(0.975, 49) * math.sqrt(0.8 * 0.2 / 49)
    np.testing.assert_allclose([result["low"], result["high"]], [0.8 - half, 0.8 + half])


@pytest.mark.parametrize("seeds, spread, low, high", [(5, 0.1, 0.90, 0.965), (5, 0.5, 0.91, 0.975), (3, 0.1, 0.89, 0.965),
                                                      (5, 0.0, 0.94, 0.99)])
def test_the_interval_holds_the_truth_as_often_as_it_should(seeds, spread, low, high):
    "Settings that do not differ: 0 should be inside in 95% of the cases, neither fewer nor all."
    random = np.random.default_rng(0)
    def holds():
        hard, luck = random.normal(2, 1, 500), random.normal(0, spread, (2, seeds, 1))
        result = leaderboard.compare_settings(*(random.random((2, seeds, 500)) < 1 / (1 + np.exp(-hard - luck))))
        return result["low"] <= 0 <= result["high"]
    assert low <= np.mean([holds() for _ in range(600)]) <= high


def test_intervals_of_a_chart_leave_out_what_other_parameters_do():
    table = frame_of(lambda table: 0.9 + 0.05 * (table.arch == "cnn") + 0.001 * table.seed * (table.rate == 2), arch=["base", "cnn"],
                     rate=[1, 2, 3], seed=range(2))
    own = leaderboard.without_others(table[["arch", "rate", "seed", "valid_accuracy"]], "rate")
    spread = own.groupby(table.rate).std(ddof=0)
    np.testing.assert_allclose(spread, np.array([1 / 3, 2 / 3, 1 / 3]) * 0.001 / 2 * math.sqrt(3 / 2))
    values = np.array([0.90, 0.92, 0.97, 0.99])
    low, high = leaderboard.mean_interval(values.mean(), values)
    np.testing.assert_allclose((low, high), stats.ttest_1samp(values, 0).confidence_interval(0.95))
    chart = leaderboard.strip_chart("rate", table, (0.9, 0.951))
    assert (chart.count("<circle"), chart.count('class="interval"')) == (12, 3)
    assert leaderboard.strip_chart("seed", table, (0.9, 0.951)).count('class="interval"') == 0


def test_the_command_that_repeats_a_grid_makes_the_same_one():
    spec = grids.GridSpec("x", {"arch": ["base", "cnn"], "dropout": "lin:0:1"}, recipe="fast", sample=4, seed=3, run_timeout=60,
                          cell_timeout=50, halving=True)
    words = leaderboard.shlex.split(leaderboard.repeat_command({"grid": "x", "spec": grids.asdict(spec)}))
    assert words == ["mnist-grid", "--name", "x-again", "--recipe", "fast", "--param", "arch=base,cnn", "--param", "dropout=lin:0:1",
                     "--sample", "4", "--seed", "3", "--run_timeout", "60", "--cell_timeout", "50", "--halving"]


# Handing out and taking in


def test_a_hopeless_run_is_stopped_where_it_runs(one_run):
    future, run = pending(one_run), one_run.record["runs"][0]
    one_run.halving = SimpleNamespace(hopeless=lambda run, epoch, accuracy: "too poor" if accuracy < 0.5 else None, end=lambda *_: None)
    one_run.told({"key": future.key, "started": "tcp://a:1"})
    one_run.told({"key": future.key, "epoch": 1, "valid_accuracy": 0.9})
    one_run.told({"key": future.key, "epoch": 3, "valid_accuracy": 0.4})
    wait_for(lambda: one_run.sent)
    assert one_run.sent == [(batch.stop_runs, {future.key: ("stopped", "too poor")})]
    row, = batch.progress(one_run)
    assert (row[0], row[1], row[3], row[4]) == (run["run"], "tcp://a:1", "3", "40.00%") and run["status"] == "running"


def test_what_is_still_at_work_at_the_end_is_waiting(one_run, monkeypatch):
    clock = iter(range(0, 10**6, 10))  # the five seconds are over at once
    monkeypatch.setattr(batch, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    one_run.told({"key": pending(one_run).key, "started": "tcp://10.0.0.1:1"})
    one_run.workers = {"tcp://10.0.0.1:1": 1}
    one_run.close()
    assert one_run.record["runs"][0]["status"] == "waiting" and one_run.record["runs"][0]["reason"] == "interrupted"


def test_halving_keeps_the_best_third(tmp_path):
    runs = [{"run": f"dropout-{i}", "parameters": {"dropout": float(i)}, "status": "waiting"} for i in range(9)]
    halving = batch.Halving(tmp_path, {"grid": "x", "runs": runs})
    for run in runs: halving.begin(run, 9, [])
    verdicts = [halving.hopeless(run, 1, 0.9 - 0.01 * i) for i, run in enumerate(runs)]
    assert verdicts[:1] == [None] and all("given up after epoch 1" in verdict for verdict in verdicts[3:])
    assert halving.hopeless(runs[0], 3, 0.95) is None and halving.hopeless({**runs[0]}, 9, 0.1) is None  # its last epoch


def test_the_process_of_a_run_ends_when_nobody_waits_for_it(tmp_path):
    "The real process, without notebooks: it tells what happens, and ends with an entry in the record when its input is closed."
    code = """
import time
from mnist_nb import batch
def execute_run(plan, run_path, resume, cell_timeout, terminal):
    batch.update_run(run_path, **plan, status="running")
    print("not an event")
    terminal.cell("02_training", 1, 2)
    while True: time.sleep(0.05)
batch.execute_run, batch.environment = execute_run, dict
batch.work()
"""
    job = {"reports": str(tmp_path), "plan": {"run": "x", "git_commit": "abc", "parameters": {}}, "resume": False, "cell_timeout": None}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline()) == {"stage": "02_training", "cell": 1, "cells": 2}
        assert read_run(tmp_path / "x")["git_commit"] == "abc" and batch.is_running(tmp_path / "x")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["cpu_seconds"] > 0 and process.wait(20) == 0
    finally: process.kill()
    assert read_run(tmp_path / "x")["outcome"] == "waiting" and not batch.is_running(tmp_path / "x")


def test_the_threads_of_a_run_are_its_share_of_the_machine(tmp_path, monkeypatch):
    told = []
    worker = SimpleNamespace(get_current_task=lambda: "key", plugins={}, address="tcp://10.0.0.1:1", local_directory=str(tmp_path),
                             state=SimpleNamespace(nthreads=2, tasks={"key": SimpleNamespace(state="executing")}),
                             log_event=lambda topic, event: told.append((topic, event)))
    asked = []
    def supervise(job, root, tell, ending):
        asked.append(ending())
        batch.stop_runs({"key": ("stopped", "too poor")})
        asked.append(ending())
        worker.state.tasks = {}
        batch.STOPS.clear()
        asked.append(ending())
        return {"threads_given": job["threads"]}
    for name, value in {"get_worker": lambda: worker, "supervise": supervise, "available_cores": lambda: 8}.items():
        monkeypatch.setattr(batch, name, value)
    job = {"bundle": "", "topic": "t", "beside": {"10.0.0.1": 4}, "threads": None, "reports": str(tmp_path)}
    assert batch.run_job(job) == {"threads_given": 2, "threads": 2} and told == [("t", {"key": "key", "started": "tcp://10.0.0.1:1"})]
    assert asked == [None, ("stopped", "too poor"), ("waiting", "interrupted")]
    assert batch.run_job({**job, "beside": {}})["threads"] == 4 and batch.run_job({**job, "threads": 3})["threads"] == 3


def test_estimates_count_what_is_to_do(tmp_path):
    def run(seconds, rate, threads): return {"status": "done", "seconds": seconds, "parameters": {"arch": "base"},
                                            "machine": {"threads": threads},
                                            "metrics": {"training_seconds": 10.0, "images_per_second": rate}}
    past = [run(30.0, 1000.0, 1), run(30.0, 500.0, 4)]
    record = grids.plan_grid(grids.GridSpec("x", {"arch": "base", "seed": "0:4", "epochs": 2, "train_images": 5000, "valid_images": 100}))
    record["runs"][0] |= {"status": "done"}
    words = grids.describe_grid(record, past, jobs=2, threads=1)
    assert "4 runs, 3 to do" in words and words.count("about 30 s") == 3 and "about 45 s with 2 at a time" in words
    assert "about 1 min 0 s with 2 at a time" in grids.describe_grid(record, past, jobs=2, threads=4)


@contextmanager
def dask_cluster(folder: Path, names: str):
    "A scheduler, and workers in folders of their own: address, and the processes by name."
    for name in ("scheduler", *names): (folder / name).mkdir(parents=True)
    address = folder / "scheduler.json"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    words = ["scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={address}", "--dashboard-address=127.0.0.1:0"]
    processes = {"scheduler": subprocess.Popen([executable("dask"), *words], cwd=folder / "scheduler", **quiet)}
    try:
        wait_for(address.exists)
        for name in names:
            words = ["worker", f"--scheduler-file={address}", "--nthreads=1", "--local-directory=scratch", "--no-dashboard"]
            processes[name] = subprocess.Popen([executable("dask"), *words], cwd=folder / name, **quiet)
        yield json.loads(address.read_text())["address"], processes
    finally:
        for process in reversed(processes.values()): process.terminate()
        for process in processes.values():
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()


@pytest.mark.slow
def test_workers_elsewhere_and_one_dies(toy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with dask_cluster(elsewhere, "ab") as (address, workers):
        process = toy.start("--name=far", "--param=seed=0:4", "--param=weight_decay=0.2", "--param=epochs=3",
                            f"--scheduler={address}")
        def in_the_middle():
            done = (toy.reports / "far" / "grid.json").exists() and "done" in toy.statuses("far").values()
            return with_kernel(workers["b"].pid) if done else []
        family = wait_for(in_the_middle)
        for victim in (workers["b"], *(found for found in family if "spawn_main" in words_of(found))):
            with suppress(psutil.Error): victim.kill()
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
        runs = toy.record("far")["runs"]
        assert [run["status"] for run in runs] == ["done"] * 4 and output.count(": done in") == 4
        assert sorted(len(run["workers"]) for run in runs) == [1, 1, 1, 2]  # one was begun twice
        wait_for(lambda: not any(map(is_alive, family)), 10)
        assert not list((elsewhere / "a").rglob("mnist_nb-*"))  # what was sent there is gone
    for run in runs:
        folder = toy.reports / "far" / run["run"]
        stages = json.loads((folder / "run.json").read_text())["stages"]
        for stage, entry in stages.items():
            assert entry["outputs"] == batch.file_hashes(folder, entry["outputs"]), stage
        assert f"{run['parameters']['seed']}" in (folder / "checkpoints" / "best_model.pth").read_text()
    assert not list(toy.reports.rglob(".incoming*"))


@pytest.mark.slow
def test_workers_notice_that_nobody_waits(toy, tmp_path_factory):
    with dask_cluster(tmp_path_factory.mktemp("elsewhere"), "a") as (address, workers):
        process = toy.start("--name=lost", "--param=weight_decay=30", f"--scheduler={address}")
        family = wait_for(lambda: with_kernel(workers["a"].pid))
        family = [found for found in family if "ipykernel_launcher" in words_of(found)]
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(is_alive, family)), 15)
        assert workers["a"].poll() is None  # the worker lives on


class FakeFuture(SimpleNamespace):
    def result(self): return self.outcome
    def exception(self): return self.error
    def cancel(self): self.cancelled = True
    def add_done_callback(self, callback): pass


@pytest.fixture
def one_run(tmp_path, monkeypatch):
    "A batch of one run that was handed out, without anybody to do it."
    sent = []
    class FakeClient:
        status = "running"
        def nthreads(self): return {"tcp://10.0.0.1:1": 1}
        def subscribe_topic(self, topic, handler): pass
        def register_plugin(self, plugin, name): pass
        def unsubscribe_topic(self, topic): pass
        def unregister_worker_plugin(self, name): pass
        def cancel(self, futures): pass
        def run(self, *words, **options): sent.append(words)
        def submit(self, function, job, key, pure): return FakeFuture(key=key, job=job, cancelled=False)
    record = grids.plan_grid(grids.GridSpec("x", {"arch": "base", "seed": 0}))
    monkeypatch.setattr(batch, "pack_project", bytes)
    own = batch.Batch(FakeClient(), tmp_path / "x", record, record["runs"], elsewhere=True, jobs=None, threads=None)
    own.slots()
    own.submit(own.waiting.pop(0))
    own.sent = sent  # what workers were told
    return own


def pending(own): return next(iter(own.pending.values()))[0]


def test_a_resumed_grid_keeps_what_it_was_asked_for(tmp_path, capsys):
    spec = grids.GridSpec("more", {"arch": "base,cnn", "seed": 0}, recipe="fast", run_timeout=60)
    grids.write_grid(tmp_path / "more", grids.plan_grid(spec))
    words = ["--name=more", f"--reports={tmp_path}", "--resume", "--dry_run"]
    assert cli.grid([*words, "--param=seed=0:3"]) == 0
    assert "6 runs, 6 to do" in capsys.readouterr().out
    with pytest.raises(SystemExit): cli.grid([*words, "--recipe=best"])
    assert "was begun with the recipe 'fast'" in capsys.readouterr().err
    assert grids.read_grid(tmp_path / "more")["spec"]["param"] == {"arch": "base,cnn", "seed": 0}  # a dry run changes nothing


def test_the_first_failure_ends_all_if_so_asked(one_run):
    one_run.waiting.append({"run": "second", "parameters": {}, "status": "waiting"})
    one_run.jobs, future = 1, pending(one_run)
    future.status, future.error = "error", ZeroDivisionError("by zero")
    one_run.queue.put(("back", future))
    one_run.work(keep_going=False)
    assert one_run.record["runs"][0]["status"] == "failed" and [run["status"] for run in one_run.waiting] == ["waiting"]


def test_a_run_is_begun_twice_at_most(one_run):
    future, run = pending(one_run), one_run.record["runs"][0]
    for worker in "abc":
        assert run["status"] == "running" and not future.cancelled
        one_run.told({"key": future.key, "started": worker})
    assert run["status"] == "failed" and future.cancelled and run["reason"] == "its workers died, one after the other: a, b"


def test_a_scheduler_that_gives_up_sooner_is_asked_once_more(one_run):
    for begun, worker in enumerate("ab"):
        future = pending(one_run)
        one_run.told({"key": future.key, "started": worker})
        future.status, future.error = "error", KilledWorker(future.key, None, 0)
        one_run.back(future)
        assert one_run.record["runs"][0]["status"] == ("running", "failed")[begun]
    assert "its workers died, one after the other: a, b" in one_run.record["runs"][0]["reason"]


def archive(**run) -> bytes:
    "A run as it comes back from a worker."
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        if run: file.writestr("run.json", json.dumps(run))
        file.writestr("history.csv", "epoch")
    return stream.getvalue()


RETURNED = {"seconds": 7.0, "cpu_seconds": 9.0, "threads": 2, "status": "done", "reason": None}
WHOLE = {"status": "done", "parameters": {}, "stages": {}, "metrics": {"valid_accuracy": 0.9, "test_accuracy": 0.8}}


def give_back(own, content=None, sha256=None, **outcome):
    "A worker returns the run."
    future, run = pending(own), own.record["runs"][0]
    future.status, future.outcome = "finished", {**RETURNED, **outcome}
    if content is not None: future.outcome |= {"archive": content, "sha256": sha256 or batch.hashlib.sha256(content).hexdigest()}
    own.grid_path.mkdir(exist_ok=True)
    own.queue.put(("back", future))
    own.work(keep_going=True)
    return run


def test_a_run_from_elsewhere_gets_its_place(one_run):
    run = give_back(one_run, archive(**WHOLE))
    assert {name: run[name] for name in RETURNED} == RETURNED and run["spent"] == {"seconds": 7.0, "cpu_seconds": 9.0}
    assert sorted(path.name for path in (one_run.grid_path / run["run"]).iterdir()) == ["history.csv", "run.json"]
    assert grids.read_grid(one_run.grid_path)["runs"][0]["status"] == "done"


@pytest.mark.parametrize("content, sha256, reason", [
    (archive(**WHOLE), "no", "not as it was sent"),
    (b"no archive", None, "cannot be unpacked: BadZipFile"),
    (archive(**WHOLE)[:-9], None, "cannot be unpacked: BadZipFile"),
    (archive(**{**WHOLE, "stages": {"07_later": {"status": "done", "outputs": {}}}}), None, "a stage '07_later', which this version"),
    (archive(**{**WHOLE, "stages": {"02_training": {"status": "done", "outputs": {"history.csv": "0"}}}}), None, "other files than"),
    (archive(**{**WHOLE, "stages": {"02_training": {"status": "done"}}}), None, "other files than the stage 02_training wrote"),
    (archive(**{**WHOLE, "metrics": {}}), None, "no record of the run"),
    (archive(), None, "no record of the run")])
def test_what_does_not_come_back_whole_has_failed(one_run, content, sha256, reason):
    run = give_back(one_run, content, sha256)
    assert run["status"] == "failed" and "what came back is not whole: the archive " in run["reason"] and reason in run["reason"]
    assert not (one_run.grid_path / "run").exists() and not list(one_run.grid_path.glob(".incoming*"))


def test_a_run_that_failed_elsewhere_keeps_its_reason(one_run):
    run = give_back(one_run, archive(), status="failed", reason="its process ended with -9")
    assert (run["status"], run["reason"]) == ("failed", "its process ended with -9")


def test_a_result_that_says_too_little_fails_its_run_only(one_run):
    future = pending(one_run)
    future.status, future.outcome = "finished", {"status": "done"}
    one_run.back(future)
    assert one_run.record["runs"][0]["status"] == "failed" and "its result was lost: KeyError" in one_run.record["runs"][0]["reason"]


def test_a_task_that_raises_fails_its_run(one_run):
    future = pending(one_run)
    future.status, future.error = "error", ZeroDivisionError("by zero")
    one_run.back(future)
    assert (one_run.record["runs"][0]["status"], one_run.record["runs"][0]["reason"]) == ("failed", "ZeroDivisionError: by zero")


def test_a_lost_scheduler_is_not_the_fault_of_runs(one_run):
    future = pending(one_run)
    future.status, one_run.client.status = "cancelled", "closed"
    one_run.queue.put(("back", future))
    with pytest.raises(InputError, match="the connection to the scheduler was lost: go on with --resume"): one_run.work(keep_going=True)
    assert (one_run.record["runs"][0]["status"], one_run.pending) == ("waiting", {})


def test_threads_follow_the_cores_of_a_machine(one_run):
    assert pending(one_run).job["beside"] == {"10.0.0.1": 1}
    one_run.client.nthreads = lambda: {"tcp://10.0.0.1:1": 1, "tcp://10.0.0.1:2": 2, "tcp://10.0.0.2:1": 4}
    one_run.seen = -1e9
    assert one_run.slots() == 7
    one_run.submit({"run": "again", "parameters": {"arch": "base"}})
    assert [*one_run.pending.values()][1][0].job["beside"] == {"10.0.0.1": 3, "10.0.0.2": 4}
    one_run.beside, one_run.jobs = {}, 2  # at a time, in all
    one_run.submit({"run": "once more", "parameters": {"arch": "base"}})
    assert one_run.beside == {"10.0.0.1": 2, "10.0.0.2": 2}


@pytest.mark.slow
def test_a_run_of_a_grid_is_the_run_alone(tmp_path):
    "Real trainings, two at a time, and one of them in this process."
    toy = Toy(tmp_path, real=("02_training",))
    words = [f"--param={name}={value}" for name, value in SMALL.items()]
    result = toy.grid("--name=same", *words, "--param=seed=0,1", "--jobs=2", "--threads=1")
    assert result.code == 0, result.output
    settings = {name: value for name, value in SMALL.items() if name in Settings.__dataclass_fields__}
    fit(Settings(**settings, seed=1), tmp_path / "alone", device="cpu")
    ours = toy.reports / "same" / "seed-1"
    def history(path): return [line.split(",")[:5] for line in (path / "history.csv").read_text().splitlines()]
    first, second = history(tmp_path / "alone"), history(ours)
    assert first == second and len(first) == 3  # loss and accuracy to the last digit
    weights = [load_checkpoint(path / "best_model.pth")["model"] for path in (tmp_path / "alone", ours / "checkpoints")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_the_matrix_of_github(toy):
    "The commands of the example, one machine after the other, their folders put together as its last job does."
    workflow = yaml.safe_load((ROOT / "examples" / "github-actions.yml").read_text())
    runs, page = workflow["jobs"]["runs"], workflow["jobs"]["page"]
    parts = runs["strategy"]["matrix"]["part"]
    (toy.folder / "examples").mkdir()
    example = yaml.load((ROOT / "examples" / "grid.yaml").read_text(), yaml.BaseLoader)
    example["param"] = {"arch": ["base", "bsae"], "weight_decay": "0", "epochs": "1"}
    (toy.folder / "examples" / "grid.yaml").write_text(yaml.safe_dump(example))
    def commands(job): return [step["run"] for step in job["steps"] if "run" in step and "mnist-grid" in step["run"]]
    def paths(job): return {step["with"]["path"] for step in job["steps"] if "artifact" in step.get("uses", "")}
    assert paths(runs) == paths(page) == {f"reports/{example['name']}"}
    for part in parts:
        line, = commands(runs)
        line = line.replace("${{ matrix.part }}", str(part)).replace("${{ strategy.job-total }}", str(len(parts)))
        assert "$" not in line
        toy.grid(*line.split()[1:])
        shutil.move(toy.reports / example["name"], toy.folder / f"part-{part}")
    for part in parts:
        own = toy.folder / f"part-{part}"
        shutil.copytree(own, toy.reports / example["name"], dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*"))
    line, = commands(page)
    result = toy.grid(*line.split()[1:])
    assert result.code == 1 and "1 done, 1 failed" in result.output
    assert toy.page("rates").count('data-value="done"') == 1 and "did you mean" in toy.page("rates")
    assert all(run["seconds"] > 0 for run in toy.record("rates")["runs"] if run["status"] == "done")


def test_the_script_of_slurm_starts_workers(tmp_path):
    "What would be submitted, run here as two elements of the array."
    sys.path.insert(0, str(ROOT / "examples"))
    try: import slurm
    finally: sys.path.pop(0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # Ctrl-C stops the grid, as elsewhere
    with slurm.slurm_cluster(workers=2, cores=8, memory="8GB", walltime="01:00:00") as cluster:
        script = cluster.job_script()
        assert {"#SBATCH --array=1-2", "#SBATCH --cpus-per-task=8", "#SBATCH -t 01:00:00"} <= set(script.splitlines())
        (tmp_path / "job.sh").write_text(script)
        env = {**os.environ, "SLURM_ARRAY_JOB_ID": "7", "TMPDIR": str(tmp_path)}
        jobs = [subprocess.Popen(["bash", tmp_path / "job.sh"], env={**env, "SLURM_ARRAY_TASK_ID": str(task)}, start_new_session=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for task in (1, 2)]
        try:
            workers = wait_for(lambda: len(found := cluster.scheduler_info["workers"]) == 2 and found)
            assert {worker["name"] for worker in workers.values()} == {"worker-7-1", "worker-7-2"}
            assert {worker["nthreads"] for worker in workers.values()} == {1}
        finally:
            for job in jobs:
                with suppress(ProcessLookupError): os.killpg(job.pid, signal.SIGTERM)
            for job in jobs: job.wait(20)


def test_the_page_of_a_grid_sorts_filters_and_is_usable(browser, axe, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try: import grid
    finally: sys.path.pop(0)
    grid.synthetic_grid(tmp_path, seeds=2, images=200)
    path = grid.write_grid_page(tmp_path)
    page = browser.new_page(viewport={"width": 390, "height": 800})
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    def column(number): return [float(cell.inner_text()) for cell in page.query_selector_all(
        f".runs tbody tr:not([hidden]) td:nth-child({number})")]
    headings = [heading.inner_text() for heading in page.query_selector_all(".runs thead th")]
    at = headings.index("validation, %") + 1
    page.click(f".runs thead th:nth-child({at}) button")
    assert column(at) == sorted(column(at)) and len(column(at)) == 100
    page.click(f".runs thead th:nth-child({at}) button")
    assert column(at) == sorted(column(at), reverse=True)
    page.select_option("select[name=arch]", "cnn")
    assert len(column(at)) == 50 and "50 of 100 shown" in page.inner_text(".shown")
    page.click(".mnist-nb thead th:nth-child(5) button")
    settings = [row.inner_text() for row in page.query_selector_all(".mnist-nb tbody td:nth-child(5)")]
    assert [float(text.split()[0]) for text in settings] == sorted(float(text.split()[0]) for text in settings)
    page.add_script_tag(path=axe)
    assert page.evaluate("axe.run()")["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth") == 390 and requests == [path.as_uri()]
    page.close()


def test_the_dashboard_is_told():
    with batch.open_cluster(None, 1) as client: assert re.fullmatch(r"http://127\.0\.0\.1:\d+/status", batch.dashboard(client, None))


@pytest.mark.slow
def test_a_grid_in_a_notebook(toy):
    "A live table, a line for each run, and an interruption that leaves nothing running."
    code = ["from mnist_nb.batch import run_grid", "from mnist_nb.grids import GridSpec",
            "grid = run_grid(GridSpec('live', {'seed': range(2), 'weight_decay': 0}), jobs=2)"]
    slow = "grid = run_grid(GridSpec('slow', {'weight_decay': 30, 'epochs': 9}))"
    notebook = new_notebook(cells=[new_code_cell("\n".join(code)), new_code_cell(slow)])
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": toy.folder}})
    with client.setup_kernel(env=toy_env(toy.folder)):
        client.execute_cell(notebook.cells[0], 0)
        outputs = notebook.cells[0].outputs
        table, = (output.data["text/html"] for output in outputs if "text/html" in output.get("data", {}))
        assert "2 done" in table and "<th>stage</th>" in table
        text = "".join(output.text for output in outputs if output.output_type == "stream")
        assert {*re.findall(r"^(seed-\d): done", text, re.MULTILINE)} == {"seed-0", "seed-1"} and "grid live: 2 done" in text
        kernel = psutil.Process(client.km.provisioner.pid)
        def stop():
            wait_for(lambda: len(at_work(toy.folder)) == 3)  # this kernel, the process of the run, and its kernel
            with suppress(psutil.Error): kernel.send_signal(signal.SIGINT)
        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"): client.execute_cell(notebook.cells[1], 1)
        stopping.join()
        wait_for(lambda: at_work(toy.folder) == [kernel], seconds=5)
    assert toy.record("slow")["status"] == "interrupted"
