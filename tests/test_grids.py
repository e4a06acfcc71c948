"""Grids from end to end: the real command in a checkout with toy notebooks; one grid with real ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, SMALL, executable, wait_for
from distributed import KilledWorker
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook
from toy import toy_checkout, toy_env, toy_words

from mnist_nb import batch, cli, grids
from mnist_nb.models import load_checkpoint
from mnist_nb.recipes import Settings
from mnist_nb.runs import InputError
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


def is_alive(process: psutil.Process) -> bool: return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def at_work(folder) -> list[psutil.Process]:
    "Processes that carry out runs of a folder, and their kernels."
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            words = " ".join(process.info["cmdline"] or [])
            if not ("ipykernel_launcher" in words or "mnist_nb.batch import work" in words): continue
            if is_alive(process) and process.environ().get("PYTHONPATH") == str(folder): found.append(process)
        except psutil.Error: continue
    return found


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


def test_a_killed_command_leaves_nothing_running(toy):
    process = toy.start("--name=killed", "--param=seed=0:2", "--param=weight_decay=30", "--jobs=2")
    wait_for(lambda: len(at_work(toy.folder)) == 4)
    process.kill()
    process.wait()
    wait_for(lambda: not at_work(toy.folder), seconds=10)
    dry = toy.grid("--name=killed", "--resume", "--dry_run")
    assert dry.code == 0 and "2 runs, 2 to do" in dry.output


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
        for process in processes.values(): process.wait(20)


@pytest.mark.slow
def test_workers_elsewhere_and_one_dies(toy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    with dask_cluster(elsewhere, "ab") as (address, workers):
        process = toy.start("--name=far", "--param=seed=0:4", "--param=weight_decay=0.2", "--param=epochs=3",
                            f"--scheduler={address}")
        def in_the_middle():
            done = (toy.reports / "far" / "grid.json").exists() and "done" in toy.statuses("far").values()
            family = psutil.Process(workers["b"].pid).children(recursive=True) if done else []
            return family if any("ipykernel_launcher" in " ".join(found.cmdline()) for found in family) else None
        family = wait_for(in_the_middle)
        for victim in (workers["b"], *(found for found in family if "spawn_main" in " ".join(found.cmdline()))): victim.kill()
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
        family = wait_for(lambda: [found for found in psutil.Process(workers["a"].pid).children(recursive=True)
                                   if "ipykernel_launcher" in " ".join(found.cmdline())])
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
    class FakeClient:
        status = "running"
        def nthreads(self): return {"tcp://10.0.0.1:1": 1}
        def subscribe_topic(self, topic, handler): pass
        def register_plugin(self, plugin, name): pass
        def unsubscribe_topic(self, topic): pass
        def unregister_worker_plugin(self, name): pass
        def cancel(self, futures): pass
        def submit(self, function, job, key, pure): return FakeFuture(key=key, job=job, cancelled=False)
    record = grids.plan_grid(grids.GridSpec("x", {"arch": "base", "seed": 0}))
    monkeypatch.setattr(batch, "pack_project", bytes)
    own = batch.Batch(FakeClient(), tmp_path / "x", record, record["runs"], elsewhere=True, jobs=None, threads=None)
    own.slots()
    own.submit(own.waiting.pop(0))
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


@pytest.mark.parametrize("fields, reason", [
    ({"status": "finished", "outcome": {**dict.fromkeys(("seconds", "cpu_seconds", "threads"), 1), "status": "done", "reason": None,
                                        "archive": b"PK", "sha256": "no"}},
     "what came back is not whole: the archive is not as it was sent"),
    ({"status": "error", "error": ZeroDivisionError("by zero")}, "ZeroDivisionError: by zero")])
def test_what_does_not_come_back_whole_has_failed(one_run, fields, reason):
    future = pending(one_run)
    for name, value in fields.items(): setattr(future, name, value)
    one_run.back(future)
    assert one_run.record["runs"][0]["status"] == "failed" and reason in one_run.record["runs"][0]["reason"]
    assert not (one_run.grid_path / "arch-base").exists()


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
            for job in jobs: os.killpg(job.pid, signal.SIGTERM)
            for job in jobs: job.wait(20)


def test_the_page_of_a_grid_sorts_filters_and_is_usable(browser, axe, tmp_path):
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try: import grid
    finally: sys.path.pop(0)
    grid.synthetic_grid(tmp_path, seeds=2)
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
            kernel.send_signal(signal.SIGINT)
        stopping = threading.Thread(target=stop)
        stopping.start()
        with pytest.raises(CellExecutionError, match="KeyboardInterrupt"): client.execute_cell(notebook.cells[1], 1)
        stopping.join()
        wait_for(lambda: at_work(toy.folder) == [kernel], seconds=5)
    assert toy.record("slow")["status"] == "interrupted"
