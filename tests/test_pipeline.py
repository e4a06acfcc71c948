"""A run from end to end on a few real digits: its folder, its record, and the same again."""

import json
import os
import re
import subprocess

import nbformat
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from conftest import ROOT, SMALL, command, command_in, kernels_of, kill, report_words, wait_for
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from toy import toy_checkout, toy_env, toy_words

from mnist_nb import cli
from mnist_nb.data import load_test_digits
from mnist_nb.pipeline import STAGES


def read(path) -> dict: return json.loads(path.read_text())


def status(run) -> dict[str, str]: return {name: stage["status"] for name, stage in read(run / "run.json")["stages"].items()}


def test_run_folder_is_complete(small_run):
    expected = {"run.json", *(f"{stage}.{kind}" for stage in STAGES for kind in ("html", "ipynb")),
                *(name for stage in STAGES.values() for name in stage.outputs)}
    assert expected <= {str(path.relative_to(small_run)) for path in small_run.rglob("*")}
    assert not [path for path in small_run.rglob("*") if ".tmp." in path.name]


def test_run_json_says_what_was_done(small_run):
    run = read(small_run / "run.json")
    assert run["status"] == "done" and status(small_run) == dict.fromkeys(STAGES, "done")
    assert {name: run["parameters"][name] for name in SMALL} == SMALL
    assert run["seed"] == 0 and run["device"] == "cpu" and run["kernel"] == "python3"
    assert run["dataset"]["sha256"]["t10k-labels-idx1-ubyte"].startswith("ff7bcfd4")
    assert {"python", "torch", "papermill"} <= set(run["versions"])
    assert all(stage["seconds"] > 0 for stage in run["stages"].values())


def test_metrics_agree_with_the_predictions(small_run):
    labels, logits = (np.load(small_run / "predictions.npz")[name] for name in ("labels", "logits"))
    np.testing.assert_array_equal(labels, load_test_digits(1000).labels)
    predicted, metrics = logits.argmax(1), read(small_run / "metrics.json")
    assert metrics["accuracy"] == (labels == predicted).mean() and metrics["errors"] == (labels != predicted).sum()
    interval = binomtest(int((labels == predicted).sum()), 1000).proportion_ci(method="wilson")
    np.testing.assert_allclose(metrics["accuracy_interval"], [interval.low, interval.high])
    table = pd.read_csv(small_run / "per_class.csv")
    for name, column in zip(("precision", "recall", "f1", "support"), precision_recall_fscore_support(labels, predicted)):
        np.testing.assert_allclose(table[name], column)
    matrix = pd.read_csv(small_run / "confusion_matrix.csv", index_col=0)
    np.testing.assert_array_equal(matrix, confusion_matrix(labels, predicted))
    run = read(small_run / "run.json")["metrics"]
    assert (run["test_accuracy"], run["test_errors"], run["test_images"]) == (metrics["accuracy"], metrics["errors"], 1000)


def test_onnx_file_gives_the_predictions_of_the_report(small_run):
    stored = np.load(small_run / "predictions.npz")["logits"]
    images = load_test_digits(1000).images
    session = onnxruntime.InferenceSession(small_run / "model.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"images": images})[0], stored, atol=1e-4)
    files = read(small_run / "export.json")["files"]
    assert {name: file["bytes"] for name, file in files.items()} == {name: (small_run / name).stat().st_size for name in files}
    assert files["model.onnx"]["changed_predictions"] == files["model.pt2"]["changed_predictions"] == 0
    assert files["model.int8.onnx"]["bytes"] < 0.3 * files["model.onnx"]["bytes"]
    assert read(small_run / "run.json")["metrics"]["int8_accuracy"] == files["model.int8.onnx"]["accuracy"]


def test_terminal_shows_stages_epochs_and_headline(small_run):
    text = (small_run / "terminal.txt").read_text()
    assert [line[6:] for line in text.splitlines() if line.startswith("[")] == ["Data", "Models", "Training", "Error analysis", "Export"]
    assert re.findall(r"^  epoch (\d)/(\d)", text, re.MULTILINE) == [("1", "2"), ("2", "2")]  # the run's, not the examples'
    accuracy = read(small_run / "run.json")["metrics"]["test_accuracy"]
    assert f"small: test accuracy {accuracy:.2%} (95% interval " in text and "03_error_analysis.html" in text
    assert re.search(r"567,434 parameters, 2\.\d\d MB as ONNX, 0\.\d\d MB in 8 bits; trained in \d+ s on cpu", text)


def test_lessons_stay_in_the_notebook(small_run):
    lessons = [cell.source for path in ROOT.glob("nbs/*.ipynb") for cell in nbformat.read(path, 4).cells
               if "lesson" in cell.metadata.get("tags", [])]
    assert lessons
    executed = [cell.source for stage in STAGES for cell in nbformat.read(small_run / f"{stage}.ipynb", 4).cells]
    assert not set(lessons) & set(executed)


def test_pages_put_results_first_and_hold_everything(small_run):
    made_at = os.environ.get("TESTS_SMALL_RUN", small_run.parent)
    for stage in STAGES:
        page = (small_run / f"{stage}.html").read_text()
        assert page.count("<h1 ") == 1 and "fingerprint" not in page[:page.index('<details class="parts">')]
        assert page.index('class="results"') < page.index('<details class="parts">')
        assert not re.search(r"""<(script|link|img|iframe)[^>]*(src|href)=["']?(https?:)?//""", page)
        assert not re.search(r"@import|url\(\s*[\"']?https?:", page)
        assert str(ROOT) not in page and str(small_run.parents[3]) not in page.replace(str(made_at), "RUN")
        images = re.findall(r"<img [^>]*>", page)
        assert all(re.search(r'alt="[^"]{20,}"' if "digit" not in image else 'alt="[^"]{3,}"', image) for image in images)
        assert images or stage == "04_export"
    analysis = (small_run / "03_error_analysis.html").read_text()
    headings = ["Confusion matrix", "Each digit", "The worst errors", "Trust", "Weak slices", "Corrupted pictures", "Suspect labels",
                "Where the model puts the digits", "Comparison"]
    assert [re.sub("<.*", "", text) for text in re.findall(r"<h2 id=[^>]*>(.*)", analysis)][:9] == headings
    assert "small/03_error_analysis.html" in (small_run.parent / "index.html").read_text()


def test_resume_keeps_what_is_unchanged(small_run):
    before = read(small_run / "run.json")
    checkout = small_run.parent / "read_only" / "checkout"
    result = command_in(checkout, "mnist-report", "--run", "small", "--reports", small_run.parent, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("unchanged, kept") == 5  # its parameters came from the run, not from the defaults
    after = read(small_run / "run.json")
    assert after["stages"] == before["stages"] and after["metrics"] == before["metrics"]


@pytest.mark.parametrize("words, message", [
    (["--param", "epoch=3"], "unknown parameter 'epoch': did you mean 'epochs'?"),
    (["--param", "epochs=many"], "parameter epochs='many': a whole number is wanted"),
    (["--param", "arch=improvde"], "did you mean 'improved'?"),
    (["--recipe", "bset"], "unknown recipe 'bset': did you mean 'best'?"),
    (["--param", "epochs"], "give NAME=VALUE"),
    (["--param", "test_images=0"], "test_images=0 is out of range"),
    (["--param", "valid_images=6001"], "both together at most 60,000"),
    (["--param", "seed=1", "--param", "seed=2"], "parameter seed is given twice"),
    (["--cell_timeout", "0"], "give 1 or more seconds"),
    (["--run", "a/b"], "such as 'a-b'"),
    (["--device", "cdua"], "did you mean 'cuda'?"),
    (["--kernel", "pyton3"], "did you mean 'python3'?"),
    (["--param", "compare_with=never"], "there is no run 'never'"),
    (["--run", "never", "--resume"], "there is no run 'never'"),
])
def test_bad_input_is_refused_before_anything_starts(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end: cli.report([*words, f"--reports={tmp_path / 'reports'}"])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


@pytest.mark.slow
def test_plain_papermill_trains(tmp_path):
    result = command("papermill", ROOT / "nbs" / "02_training.ipynb", tmp_path / "out.ipynb", "--no-progress-bar",
                     "-p", "run_dir", tmp_path / "run", "-p", "epochs", "1", "-p", "arch", "base", "-p", "train_images", "1000")
    assert result.returncode == 0, result.stderr
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) == 1 and (tmp_path / "run" / "checkpoints" / "best_model.pth").exists()
    assert read(tmp_path / "run" / "run.json")["metrics"]["epochs"] == 1


@pytest.mark.slow
def test_killed_then_resumed(tmp_path):
    "A killed kernel in the real training stage; then the run is finished from where it was. The other stages are toys."
    run, checkout = tmp_path / "hard", toy_checkout(tmp_path / "checkout", real=("02_training",))
    options = {"cwd": checkout, "env": toy_env(checkout), "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(toy_words("report", *report_words("hard", tmp_path, epochs=6, train_images=8000)), **options)
    wait_for(lambda: (run / "history.csv").exists() and len(pd.read_csv(run / "history.csv")) >= 2 and kernels_of(process.pid))
    kill(kernels_of(process.pid))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert re.search(r"^  epoch 1/6", output, re.MULTILINE)  # shown while the stage was running, which never ended
    assert read(run / "run.json")["status"] == "failed" and status(run)["02_training"] == "failed"
    assert "the kernel died" in read(run / "run.json")["error"] and "the kernel died" in (run / "02_training.html").read_text()
    assert nbformat.read(run / "02_training.ipynb", 4).metadata["mnist_nb"]["status"] == "failed"
    assert "failed" in (tmp_path / "index.html").read_text()
    before = read(run / "run.json")["stages"]

    result = subprocess.run(toy_words("report", "--run", "hard", "--reports", tmp_path, "--resume"), **options)
    assert result.returncode == 0, result.stdout
    after = read(run / "run.json")
    assert after["status"] == "done" and after["error"] is None and status(run) == dict.fromkeys(STAGES, "done")
    assert all(after["stages"][stage] == before[stage] for stage in ("00_data", "01_models"))
    assert re.search(r"resumed after epoch [1-6] of 6", result.stdout)  # training went on, too
    assert pd.read_csv(run / "history.csv").epoch.tolist() == [1, 2, 3, 4, 5, 6]
