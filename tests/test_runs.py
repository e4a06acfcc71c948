"""Records, locks and fingerprints of runs: what must hold on full disks, in shared folders, and for two writers at once."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

from mnist_nb import pipeline, runs
from mnist_nb.recipes import Settings
from mnist_nb.runs import InputError, atomic_write, git_commit, quota_cores, read_run, to_json, write_json


def test_a_reader_sees_the_old_content_or_the_new_and_nothing_between(tmp_path):
    path = tmp_path / "model.pth"
    path.write_text("old")
    with open(path) as reader:  # holds the file that is replaced
        with atomic_write(path) as temporary:
            temporary.write_text("new")
            assert path.read_text() == "old"
        assert reader.read() == "old"  # a copy into the file would change it under the reader
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_two_threads_write_the_same_file(tmp_path):
    path, both, errors = tmp_path / "run.json", threading.Barrier(2), []
    def write(text):
        try:
            for _ in range(20):
                with atomic_write(path) as temporary:
                    temporary.write_text(text)
                    both.wait(10)  # both have written and neither has replaced
        except Exception as error: errors.append(error)
    threads = [threading.Thread(target=write, args=(text,)) for text in ("one", "two")]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors and path.read_text() in ("one", "two") and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "model.pth").write_text("old")
    (tmp_path / "best_model.pth").symlink_to(tmp_path / "store" / "model.pth")
    with atomic_write(tmp_path / "best_model.pth") as temporary: temporary.write_text("new")
    assert (tmp_path / "best_model.pth").is_symlink() and (tmp_path / "store" / "model.pth").read_text() == "new"


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "metrics.json", {"loss": float("nan"), "all": [1.5, float("inf"), (float("-inf"), "NaN")]})
    def refuse(constant): raise AssertionError(constant)
    read = json.loads((tmp_path / "metrics.json").read_text(), parse_constant=refuse)
    assert read == {"loss": None, "all": [1.5, None, [None, "NaN"]]} and json.loads(to_json({"n": 3})) == {"n": 3}


@pytest.mark.parametrize("content", ["{", "", "[]", "3", '"run"'])
def test_a_damaged_record_is_said_to_be_one(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match="run.json"): read_run(tmp_path)


def test_a_commit_is_that_of_the_project_only(tmp_path, monkeypatch):
    def git(*words, cwd):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=cwd, check=True, capture_output=True)
    outer, inner = tmp_path / "outer", tmp_path / "outer" / "mnist_nb"
    inner.mkdir(parents=True)
    (outer / "file").write_text("")
    git("init", cwd=outer)
    git("add", ".", cwd=outer)
    git("commit", "-m", "foreign", cwd=outer)
    monkeypatch.setattr(runs, "project_root", lambda: inner)
    assert git_commit() is None
    monkeypatch.setattr(runs, "project_root", lambda: outer)
    assert len(git_commit()) == 40
    (outer / "file").write_text("changed")
    assert git_commit().endswith("-dirty")


@pytest.mark.parametrize("files, membership, cores", [
    ({"cpu.max": "150000 100000"}, "0::/", 1.5),                                                       # version 2
    ({"cpu.max": "max 100000"}, "0::/", float("inf")),
    ({"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, "0::/a/b", 0.5),                       # the group above is stricter
    ({"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/x", 3.0),  # version 1
    ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/", float("inf")),
    ({"memory/x/cpu.max": "100 100000"}, "5:memory:/x", float("inf")),                                  # another controller's
])
def test_quotas_of_control_groups(files, membership, cores, tmp_path):
    for name, content in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(content + "\n")
    (tmp_path / "membership").write_text(membership + "\n")
    assert quota_cores(tmp_path / "membership", tmp_path / "groups") == cores


def test_threads_follow_the_quota(monkeypatch):
    monkeypatch.setattr(runs, "quota_cores", lambda: 1.9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runs.available_cores() == 1 == runs.compute_threads()
    monkeypatch.setattr(runs, "quota_cores", lambda: 0.3)
    assert runs.available_cores() == 1
    monkeypatch.setattr(runs, "quota_cores", lambda: float("inf"))
    assert runs.available_cores() == 8 and runs.compute_threads(4) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "3,2")
    assert runs.compute_threads() == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    def refuse(*_): raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pipeline.run_lock(tmp_path / "x"):
        assert "without file locks" in capsys.readouterr().err
        assert pipeline.is_running(tmp_path / "x")
        with pytest.raises(InputError, match=f"is running now, in process {os.getpid()}"), pipeline.run_lock(tmp_path / "x"): pass
    assert not pipeline.is_running(tmp_path / "x")


def test_a_lock_that_may_not_be_written_is_read(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    opened = open
    def refuse(path, mode="r", *words, **more):
        if str(path).endswith(".lock") and mode != "r": raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, mode, *words, **more)
    monkeypatch.setattr("builtins.open", refuse)
    assert not pipeline.is_running(tmp_path)  # another user's run, which nobody runs now


def test_nothing_about_the_list_of_runs_ends_a_run(tmp_path, monkeypatch, capsys):
    for name, content in (("torn", '{"stages"'), ("odd", '{"stages": 3, "metrics": []}'), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
    (tmp_path / "good").mkdir()
    write_json(tmp_path / "good" / "run.json", {"stages": {}, "status": "done", "created": "2026-01-01"})
    page = pipeline.write_index(tmp_path).read_text()
    assert "good" in page and page.count("its record cannot be read") >= 2
    def full(*_): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(pipeline, "atomic_write", full)
    pipeline.write_index(tmp_path)
    assert "No space left on device" in capsys.readouterr().err


def test_a_long_name_is_refused():
    with pytest.raises(InputError, match="300 characters: give at most 100"): pipeline.check_run_name("x" * 300)


def test_python3_is_this_interpreter(tmp_path, monkeypatch):
    folder = tmp_path / "kernels" / "python3"
    folder.mkdir(parents=True)
    spec = {"argv": ["/no/such/python", "{connection_file}"], "display_name": "x", "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    manager = pipeline.kernel_options("python3")["kernel_manager_class"](kernel_name="python3")
    assert manager.kernel_spec.argv[0] == sys.executable
    assert "kernel_manager_class" not in pipeline.kernel_options("other")


RUN = {"kernel": "python3", "versions": {"torch": "2"}}


def mark(tmp_path, stage="02_training", parameters=None, **changes) -> str:
    return pipeline.fingerprint(stage, parameters or {"epochs": 3, "run_dir": "a"}, tmp_path, {**RUN, **changes})


def test_a_fingerprint_follows_what_a_stage_depends_on(tmp_path, monkeypatch):
    before = mark(tmp_path)
    assert mark(tmp_path, parameters={"epochs": 3, "run_dir": "b"}) == before  # a run that is moved stays the same
    assert mark(tmp_path, kernel="other") != before and mark(tmp_path, versions={"torch": "3"}) != before
    assert mark(tmp_path, parameters={"epochs": 4, "run_dir": "a"}) != before
    files = pipeline.module_files
    def changed(*sources): return {**files(*sources), "models": files(*sources)["models"] + "# changed"}
    monkeypatch.setattr(pipeline, "module_files", changed)
    assert mark(tmp_path) != before


@pytest.mark.parametrize("code", ["from mnist_nb.training import fit", "import mnist_nb.training", "import mnist_nb.training as t",
                                  "from mnist_nb import training", "from mnist_nb import (\n    training,\n)",
                                  "def f():\n    from mnist_nb import training"])
def test_every_way_to_import_a_module_counts(code):
    found = pipeline.module_files(code)
    assert {"training", "models", "runs"} <= set(found) and found["training"] == (ROOT / "mnist_nb" / "training.py").read_text()


def test_threads_are_part_of_what_was_done(tmp_path):
    (tmp_path / "00_data.ipynb").write_text((ROOT / "nbs" / "00_data.ipynb").read_text())
    entry = {"status": "done", "fingerprint": "x", "threads": 2, "outputs": {}}
    def is_unchanged(**changes): return pipeline.is_unchanged({**entry, **changes}, "x", 2, "00_data", tmp_path)
    assert is_unchanged()
    assert not is_unchanged(threads=1) and not is_unchanged(fingerprint="y") and not is_unchanged(status="failed")
    assert not is_unchanged(outputs={"model.pth": "1"})


@pytest.mark.parametrize("name", ["epochs", "learning_rate", "train_images", "seed"])
def test_text_instead_of_a_number_is_refused_with_the_remedy(name):
    with pytest.raises(InputError, match=f"{name}='3': a number is wanted.*With papermill, give it with -p, not with -r"):
        Settings(**{name: "3"})
