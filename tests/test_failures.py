"""What a run says when a stage goes wrong, tried on toy notebooks that need no torch, most of them without a kernel."""

import argparse
import errno
import json
import os
import re
import signal
import sys

import nbformat
import psutil
import pytest
from conftest import ROOT, kernels_of
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mnist_nb import pipeline, runs
from mnist_nb.cli import plain_errors
from mnist_nb.runs import InputError

PARAMETERS = """run_dir = ''  # run folder
resume = False  # go on
seed = 0  # seed
arch = 'toy'  # architecture
epochs = 1  # epochs"""
GOOD = """from mnist_nb.runs import update_run
update_run(run_dir, device="cpu", metrics={"test_accuracy": 0.5, "test_accuracy_interval": [0.4, 0.6], "test_errors": 1,
                                           "test_images": 2, "model_parameters": 3, "onnx_bytes": 4, "int8_bytes": 1,
                                           "training_seconds": 5})
from pathlib import Path
Path(run_dir, "model.txt").write_text(f"seed {seed}")
print("all is well")"""


class Toy:
    "A pipeline of two toy stages in a folder of its own."
    def __init__(self, folder):
        self.folder, self.reports, self.run = folder, folder / "reports", folder / "reports" / "toy"
        self.write("00_data", "print('loaded')")
        self.write("02_training", GOOD)
        self.write("03_error_analysis", "from pathlib import Path\nprint('model of', Path(run_dir, 'model.txt').read_text())")

    def write(self, stage, code):
        cells = [new_markdown_cell("# Toy\n\n> A toy"), new_markdown_cell("# The parts"), new_code_cell("half = 0.5"),
                 new_markdown_cell("# The run"),
                 new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
                 new_markdown_cell("## What came out"), new_code_cell(code), new_code_cell("print('the cell after')")]
        metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
        nbformat.write(new_notebook(cells=cells, metadata=metadata), self.folder / f"{stage}.ipynb")

    def start(self, **options): return pipeline.run_pipeline("toy", reports=self.reports, **options)

    def record(self): return json.loads((self.run / "run.json").read_text())

    def page(self, stage="02_training"): return (self.run / f"{stage}.html").read_text()


@pytest.fixture
def toy(tmp_path, monkeypatch, request):
    "Cells are executed in this process, but for tests of how kernels end."
    if not request.node.get_closest_marker("kernels"): request.getfixturevalue("no_kernels")
    monkeypatch.setattr(pipeline, "STAGES", {"00_data": pipeline.Stage(),
                                             "02_training": pipeline.Stage(outputs=("model.txt",), metrics=("test_accuracy",)),
                                             "03_error_analysis": pipeline.Stage(inputs=("model.txt",))})
    monkeypatch.setattr(pipeline, "check_ranges", lambda values: None)
    monkeypatch.setattr(pipeline, "notebook_path", lambda stage: tmp_path / f"{stage}.ipynb")
    return Toy(tmp_path)


def test_a_good_run(toy, capsys):
    assert toy.start()["status"] == "done" and toy.record()["status"] == "done"
    assert "toy: test accuracy 50.00%" in capsys.readouterr().out
    assert toy.page().index("all is well") < toy.page().index("half")


@pytest.mark.kernels
def test_a_cell_that_raises(toy, capsys):
    toy.write("02_training", "print('before it broke')\nraise ZeroDivisionError('no digits left')")
    assert toy.start()["status"] == "failed"
    record = toy.record()
    assert record["status"] == "failed" and record["error"] == "Training: ZeroDivisionError: no digits left"
    assert record["stages"]["00_data"]["status"] == "done" and record["stages"]["02_training"]["status"] == "failed"
    page = toy.page()
    first = page.index("This stage failed")
    assert first < page.index("ZeroDivisionError") < page.index("before it broke") < page.index("What came out")
    assert page.count("Traceback") >= 1 and f"{pipeline.resume_command(toy.run)}</code>" in page
    executed = nbformat.read(toy.run / "02_training.ipynb", 4)
    assert executed.metadata["mnist_nb"]["status"] == "failed"
    assert any("before it broke" in str(cell.get("outputs")) for cell in executed.cells)
    assert 'href="03_error_analysis.html"' not in page  # no link to a page that is not there
    assert 'href="03_error_analysis.html"' not in toy.page("00_data")
    output = capsys.readouterr().out
    assert "failed: Training: ZeroDivisionError" in output and f"--run toy --reports {toy.reports} --resume" in output
    assert "ZeroDivisionError" in (toy.reports / "index.html").read_text()


@pytest.mark.kernels
def test_a_cell_that_takes_too_long(toy):
    toy.write("02_training", "import time\ntime.sleep(60)")
    assert toy.start(cell_timeout=5)["status"] == "failed"
    assert toy.record()["status"] == "failed" and "longer than the time limit" in toy.page()
    assert "time.sleep" in toy.page().split("What came out")[0].replace("</span>", "").replace('<span class="n">', "").replace(
        '<span class="o">', "")


@pytest.mark.kernels
def test_a_kernel_that_dies(toy):
    toy.write("02_training", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert toy.start()["status"] == "failed"
    assert "the kernel died" in toy.record()["error"] and "the kernel died" in toy.page()


def test_resume_after_the_cause_is_mended(toy):
    toy.write("02_training", "raise ValueError('not yet')")
    toy.start()
    first = toy.record()["stages"]["00_data"]
    toy.write("02_training", GOOD)
    assert toy.start(resume=True)["status"] == "done"
    assert toy.record()["stages"]["00_data"] == first and toy.record()["error"] is None
    assert "This stage failed" not in toy.page()


def test_a_stage_that_leaves_less_than_it_should(toy):
    toy.write("02_training", GOOD.replace("model.txt", "modle.txt"))
    assert toy.start()["status"] == "failed"
    assert "without leaving model.txt" in toy.record()["error"]


def test_a_page_that_cannot_be_rendered(toy, monkeypatch):
    toy.write("02_training", "raise ValueError('first')")
    toy.start()
    toy.write("02_training", GOOD)
    render = pipeline.render
    monkeypatch.setattr(pipeline, "render", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    assert toy.start(resume=True)["status"] == "failed"
    monkeypatch.setattr(pipeline, "render", render)
    assert toy.record()["status"] == "failed" and "no space left" in toy.record()["error"]
    assert toy.start(resume=True)["status"] == "done" and "This stage failed" not in toy.page()


@pytest.mark.kernels
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption(toy, number):
    toy.write("02_training", f"import os, time\nos.kill({os.getpid()}, {int(number)})\ntime.sleep(60)")
    with pytest.raises(SystemExit) as end, plain_errors(argparse.ArgumentParser()): toy.start()
    assert end.value.code == 130
    assert toy.record()["status"] == "failed" and toy.record()["error"] == "Training: interrupted"
    assert "interrupted" in toy.page()
    index = (toy.reports / "index.html").read_text()
    assert "Training: interrupted" in index and ">running<" not in index
    assert psutil.wait_procs(kernels_of(os.getpid()), timeout=5)[1] == []


def test_resume_with_another_parameter_leaves_nothing_of_the_old_one(toy):
    toy.start()
    toy.write("02_training", "raise ValueError('not today')")
    assert toy.start(resume=True, given={"seed": 1})["status"] == "failed"
    record = toy.record()
    assert record["parameters"]["seed"] == 1 and "test_accuracy" not in record["metrics"]
    assert "03_error_analysis" not in record["stages"] and not (toy.run / "03_error_analysis.html").exists()
    assert not (toy.run / "model.txt").exists()
    toy.write("02_training", GOOD)
    assert toy.start(resume=True)["status"] == "done" and "model of seed 1" in toy.page("03_error_analysis")


def test_nothing_old_is_shown_under_new_parameters_whatever_fails(toy):
    toy.start()
    toy.write("00_data", "raise ValueError('first of all')")
    assert toy.start(resume=True, given={"seed": 1})["status"] == "failed"
    record = toy.record()
    assert record["error"] == "Data: ValueError: first of all" and list(record["stages"]) == ["00_data"]
    assert "test_accuracy" not in record["metrics"]
    assert sorted(path.name for path in toy.run.glob("*.html")) == ["00_data.html"]


def test_the_stage_named_is_the_one_that_failed_now(toy, capsys):
    toy.write("02_training", "raise ValueError('from training')")
    toy.start()
    toy.write("00_data", "raise ValueError('from data')")
    toy.start(resume=True)
    assert toy.record()["error"] == "Data: ValueError: from data"
    assert "00_data.html" in capsys.readouterr().out.split("failed: Data")[1]


def test_our_own_mistakes_keep_their_traceback(toy, monkeypatch):
    monkeypatch.setattr(pipeline, "file_hashes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): toy.start()
    assert toy.record()["status"] == "failed" and "ZeroDivisionError" in toy.record()["error"]


@pytest.mark.kernels
def test_the_kernel_asked_for_is_the_one_that_runs(toy, monkeypatch, tmp_path):
    folder = tmp_path / "share" / "kernels" / "toy-kernel"
    folder.mkdir(parents=True)
    (folder / "kernel.json").write_text(json.dumps({"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                                                    "display_name": "Toy", "language": "python", "env": {"TOY_KERNEL": "it is me"}}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    toy.write("03_error_analysis", "import os\nprint('kernel:', os.environ.get('TOY_KERNEL'))")
    assert toy.start(kernel="toy-kernel")["kernel"] == "toy-kernel"
    assert "kernel: it is me" in toy.page("03_error_analysis")


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("seed ?")])
def test_resume_repairs_an_output(toy, damage):
    toy.start()
    damage(toy.run / "model.txt")
    assert toy.start(resume=True)["status"] == "done"
    assert (toy.run / "model.txt").read_text() == "seed 0"


def test_resume_after_new_versions_of_the_libraries(toy, monkeypatch):
    toy.start()
    before = toy.record()["stages"]
    environment = pipeline.environment()
    monkeypatch.setattr(pipeline, "environment", lambda: {**environment, "versions": {"torch": "99"}})
    toy.start(resume=True)
    assert all(toy.record()["stages"][stage]["fingerprint"] != entry["fingerprint"] for stage, entry in before.items())


def test_resume_runs_a_stage_again_when_its_notebook_changed(toy):
    toy.start()
    first = toy.record()["stages"]
    toy.write("00_data", "print('loaded anew')")
    toy.start(resume=True)
    second = toy.record()["stages"]
    assert second["00_data"] != first["00_data"] and second["02_training"] == first["02_training"]
    assert "loaded anew" in toy.page("00_data")


def test_a_finished_run_is_deleted_only_when_that_is_asked_for(toy):
    toy.start()
    before = {path: path.read_bytes() for path in toy.run.iterdir() if path.is_file()}
    with pytest.raises(InputError, match="'toy' is finished.*--resume.*--replace.*another name"): toy.start()
    assert {path: path.read_bytes() for path in toy.run.iterdir() if path.is_file()} == before
    with pytest.raises(InputError, match="give one of them"): toy.start(replace=True, resume=True)
    toy.write("02_training", "raise ValueError('not today')")
    assert toy.start(replace=True)["status"] == "failed"
    toy.write("02_training", GOOD)
    assert toy.start()["status"] == "done"  # a run that failed is replaced without being asked


@pytest.mark.parametrize("writes", [0, 3])
def test_a_full_disk_is_named_whatever_could_not_be_written(toy, monkeypatch, capsys, writes):
    real, left = pipeline.write_json, [writes]
    def full(path, value):
        left[0] -= 1
        if left[0] < 0: raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, value)
    for module in (pipeline, runs): monkeypatch.setattr(module, "write_json", full)
    result = toy.start()
    assert result["status"] == "failed" and "No space left on device" in result["error"]
    output = capsys.readouterr().out
    assert "failed: " in output and "No space left on device" in output and "KeyError" not in output
    for page in re.findall(r"see +(\S+)", output): assert (toy.folder / page).exists()


def test_without_resume_nothing_of_the_old_run_stays(toy):
    toy.start()
    (toy.run / "left over.txt").write_text("from the old run")
    toy.start(replace=True)
    assert not (toy.run / "left over.txt").exists() and toy.record()["status"] == "done"


def test_a_folder_that_is_no_run_is_left_alone(toy):
    toy.run.mkdir(parents=True)
    (toy.run / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="something other than a run, such as thesis.txt"): toy.start()
    assert (toy.run / "thesis.txt").read_text() == "years of work"


def test_a_run_that_is_running_is_left_alone(toy):
    toy.start()
    before = toy.record()
    with pipeline.run_lock(toy.run):
        for resume in (False, True):
            with pytest.raises(InputError, match="is running now"): toy.start(resume=resume)
    assert toy.record() == before
    assert toy.start(resume=True)["status"] == "done"


def test_terminal_shows_the_running_cell(toy):
    class Screen:
        text = ""
        def write(self, text): self.text += text
        def flush(self): pass
        def isatty(self): return True
    screen = Screen()
    toy.start(terminal=pipeline.Terminal(screen))
    assert "02_training: cell 8 of 9" in screen.text


def test_a_bad_name_leaves_a_finished_run_alone(toy):
    toy.start()
    before = toy.record()
    with pytest.raises(InputError, match="did you mean 'seed'?"): toy.start(given={"sed": 1})
    assert toy.record() == before and (toy.run / "03_error_analysis.html").exists()


def test_the_command_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pipeline.resume_command(ROOT / "reports" / "x").endswith("mnist-report --run x --resume")
    assert pipeline.resume_command(tmp_path / "elsewhere" / "x").endswith("mnist-report --run x --reports elsewhere --resume")
