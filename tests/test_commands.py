"""The console scripts as a user calls them."""

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import termios
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, SMALL, command, executable
from PIL import Image

from mnist_nb import cli
from mnist_nb.data import SHA256, load_digits
from mnist_nb.metrics import load_predictions
from mnist_nb.models import load_checkpoint, load_model, save_checkpoint
from mnist_nb.training import pick_device

TRAIN = [f"--{name}={value}" for name, value in SMALL.items() if name not in ("test_images", "device")] + ["--cpu"]
TIMES = ["images_per_second", "seconds"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    result = command("mnist-train", *TRAIN, f"--save_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder, result


MODEL = str(ROOT / "reports" / "reference" / "model.int8.onnx")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&-"])
@pytest.mark.parametrize("words, code", [
    (["mnist-predict", "seven.png", "--model", MODEL, "--csv"], 0), (["mnist-predict", "no.png", "seven.png", "--model", MODEL], 1),
    (["mnist-predict", "-", "--model", MODEL], 1), (["mnist-report", "--run", "x", "--reports", "reports", "--recipe", "none"], 2)])
def test_closed_streams_change_nothing_else(words, code, closed, tmp_path):
    "As some schedulers start commands."
    Image.fromarray(load_digits("test").images[0]).save(tmp_path / "seven.png")
    line = f"{shlex.join([executable(words[0]), *words[1:]])} {closed}"
    result = subprocess.run(["bash", "-c", line], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert result.returncode == code and "Traceback" not in result.stderr
    if "seven.png" in words and closed in ("2>&-", "<&-"): assert re.search("seven.png[:,] ?7", result.stdout)
    assert [path.name for path in tmp_path.iterdir()] == ["seven.png"]


def test_train_writes_a_model_that_loads(trained):
    folder, result = trained
    assert sorted(path.name for path in folder.iterdir()) == ["best_model.pth", "history.csv", "last_model.pth"]
    model, checkpoint = load_model(folder / "best_model.pth")
    assert model(torch.zeros(1, 1, 28, 28)).shape == (1, 10) and checkpoint["settings"]["epochs"] == 2
    history = pd.read_csv(folder / "history.csv")
    assert list(history.columns) == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "learning_rate",
                                     "gradient_norm", *TIMES]
    assert len(history) == 2 and history.valid_accuracy.iloc[-1] > 0.6
    assert len(re.findall(r"^epoch \d/2 .* images/s", result.stdout, re.MULTILINE)) == 2


def test_train_and_the_training_stage_do_the_same(trained, small_run):
    ours = pd.read_csv(trained[0] / "history.csv").drop(columns=TIMES)
    stage = pd.read_csv(small_run / "history.csv").drop(columns=TIMES)
    pd.testing.assert_frame_equal(ours, stage, check_exact=True)
    weights = [load_checkpoint(path)["model"] for path in (trained[0] / "best_model.pth", small_run / "checkpoints" / "best_model.pth")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_train_twice_is_the_same(trained, tmp_path):
    assert command("mnist-train", *TRAIN, f"--save_dir={tmp_path}").returncode == 0
    first, second = (pd.read_csv(folder / "history.csv").drop(columns=TIMES) for folder in (trained[0], tmp_path))
    pd.testing.assert_frame_equal(first, second, check_exact=True)


@pytest.mark.parametrize("words, message", [
    (["--gpu", "--cpu"], "not allowed with argument"),
    (["--arch", "improvde"], "did you mean 'improved'?"),
    (["--epochs", "0"], "epochs=0 is out of range: give 1 or more"),
    (["--batch_size", "0"], "batch_size=0 is out of range"),
    (["--batch_size", "54001"], "give 2 to the 54,000 training images"),
    (["--learning_rate", "-0.1"], "learning_rate=-0.1 is out of range"),
    (["--epochs", "three"], "invalid int value"),
    (["--train_images", "60000"], "at most 60,000"),
])
def test_train_refuses_bad_input_before_any_work(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end: cli.train([*words, f"--save_dir={tmp_path / 'models'}"])
    assert end.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize("call, words", [(cli.train, ["--gpu", "--save_dir"]), (cli.report, ["--device", "cuda", "--reports"])])
def test_cuda_without_cuda_is_an_error(call, words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as end: call([*words, str(tmp_path / "x")])
    assert end.value.code == 2 and "'cuda' was asked for, but torch" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_resume_from_a_corrupt_checkpoint_names_the_file(trained, tmp_path):
    last = tmp_path / "last_model.pth"
    shutil.copy(trained[0] / "best_model.pth", tmp_path)
    last.write_bytes((trained[0] / "last_model.pth").read_bytes()[:100_000])
    result = command("mnist-train", *TRAIN, "--resume", f"--save_dir={tmp_path}")
    assert result.returncode == 2 and f"{last} is not a readable checkpoint" in result.stderr and "Traceback" not in result.stderr
    assert "to start again, delete it" in result.stderr and last.stat().st_size == 100_000
    assert load_checkpoint(tmp_path / "best_model.pth")["arch"] == "base"


def test_resume_of_a_finished_training_changes_nothing(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "last_model.pth").read_bytes()
    assert command("mnist-train", *TRAIN, "--resume", f"--save_dir={tmp_path}").returncode == 0
    assert (tmp_path / "last_model.pth").read_bytes() == before
    other = command("mnist-train", *TRAIN, "--seed=1", "--resume", f"--save_dir={tmp_path}")
    assert other.returncode == 2 and "other values of seed" in other.stderr


def test_resume_without_a_checkpoint_is_an_error(tmp_path):
    result = command("mnist-train", *TRAIN, "--resume", f"--save_dir={tmp_path / 'x'}")
    assert result.returncode == 2 and "no last_model.pth" in result.stderr and not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = command("mnist-train", *TRAIN, f"--save_dir={tmp_path / 'file'}")
    assert result.returncode == 2 and "cannot be written to" in result.stderr and "epoch 1" not in result.stdout


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    save_checkpoint(path, {"arch": "base", "model": {}})

    def fail(checkpoint, temporary):
        Path(temporary).write_bytes(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"): save_checkpoint(path, {"arch": "improved", "model": {}})
    assert load_checkpoint(path)["arch"] == "base" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device("auto").type == expected and pick_device("cpu").type == "cpu"


def test_a_terminal_shows_images_per_second(tmp_path):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([executable("mnist-train"), *TRAIN, f"--save_dir={tmp_path}"], stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096): shown += chunk
    except OSError: pass  # the other end is closed
    assert process.wait(timeout=60) == 0
    assert re.search(rb"epoch 1/2: .*images/s", shown)


def test_extract_writes_the_images_it_names(tmp_path):
    result = command("mnist-extract", "--output_dir", tmp_path, "--per_digit", "2")
    assert result.returncode == 0 and result.stdout.startswith("20 images")
    digits = load_digits("test")
    for path in tmp_path.iterdir():
        label, index = map(int, re.fullmatch(r"digit_(\d)_sample_(\d+)\.png", path.name).groups())
        assert digits.labels[index] == label
        np.testing.assert_array_equal(np.asarray(Image.open(path)), digits.images[index])


def test_one_flipped_byte_is_refused(tmp_path):
    for name in SHA256: shutil.copy(ROOT / "data" / "mnist" / f"{name}.gz", tmp_path)
    damaged = tmp_path / "t10k-images-idx3-ubyte.gz"
    content = bytearray(gzip.decompress(damaged.read_bytes()))
    content[5000] ^= 1
    damaged.write_bytes(gzip.compress(bytes(content), 1))
    result = command("mnist-extract", "--output_dir", tmp_path / "out", MNIST_NB_DATA=str(tmp_path))
    assert result.returncode == 2 and "Traceback" not in result.stderr and not (tmp_path / "out").exists()
    assert str(damaged) in result.stderr and "expected 0fa7898d509279e4" in result.stderr and "git checkout" in result.stderr

    whole = bytearray((ROOT / "data" / "mnist" / damaged.name).read_bytes())
    whole[len(whole) // 2] ^= 1  # in the archive itself, as a bad disk would
    damaged.write_bytes(whole)
    result = command("mnist-extract", "--output_dir", tmp_path / "out", MNIST_NB_DATA=str(tmp_path))
    assert result.returncode == 2 and f"{damaged} is damaged" in result.stderr


ONLY_PREDICTING = """import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","): raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from mnist_nb import cli
sys.exit(getattr(cli, sys.argv[2])(sys.argv[3:]))"""
MORE = ("torch torchvision scipy pandas sklearn matplotlib seaborn cleanlab tqdm jupyter_client nbclient nbconvert nbformat papermill "
        "jinja2 markupsafe pygments fastcore onnx onnxscript distributed optuna rich psutil yaml fastapi starlette uvicorn h11 "
        "prometheus_client").split()


@pytest.mark.parametrize("name, words", [
    ("train", []), ("extract", []), ("optimize", ["--model", MODEL]), ("compare", ["reference", "reference"]),
    ("report", ["--reports", "new"]), ("grid", ["--param", "seed=0:2"]), ("serve", ["--port", "0"])])
def test_where_predicting_alone_is_installed_other_commands_say_what_they_lack(name, words, tmp_path):
    words = [sys.executable, "-c", ONLY_PREDICTING, ",".join(MORE), name, *words]
    result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert re.search(r"error: \w+ is (not installed here|missing here)", result.stderr) and "pip install" in result.stderr
    assert not list(tmp_path.iterdir())


def test_predicting_needs_no_more(tmp_path):
    Image.fromarray(load_digits("test").images[0]).save(tmp_path / "seven.png")
    words = [sys.executable, "-c", ONLY_PREDICTING, ",".join(MORE), "predict", str(tmp_path / "seven.png"), "--model", MODEL]
    assert "seven.png: 7" in subprocess.run(words, capture_output=True, text=True, check=True).stdout


SCRIPTS = sorted(script.name for script in entry_points(group="console_scripts") if script.value.startswith("mnist_nb."))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_needs_no_torch(name):
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    result = subprocess.run([executable(name), "--help"], env=env, capture_output=True, text=True)
    assert result.returncode == 0 and "usage: " + name in result.stdout
    imported = {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "argparse" in imported and "torch" not in imported


def test_compare_says_which_run_is_better(small_run, tmp_path):
    labels, logits, numbers = load_predictions(small_run)
    better = tmp_path / "better"
    better.mkdir()
    (better / "run.json").write_text("{}")
    mended = logits.copy()
    mended[:500] = np.eye(10)[labels[:500]] * 9
    np.savez(better / "predictions.npz", labels=labels, logits=mended, numbers=numbers)
    gained = int((logits[:500].argmax(1) != labels[:500]).sum())
    result = command("mnist-compare", small_run, "better", "--reports", tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("This model of better is better than this model of small: ")
    assert f"{gained} images that only better gets right, 0 that only small does" in result.stdout
    figures = json.loads(command("mnist-compare", "better", small_run, "--reports", tmp_path, "--json").stdout)
    assert figures["difference"] == -gained / 1000 and sum(row["difference"] for row in figures["by_digit"]) == gained
    misspelt = command("mnist-compare", "bettr", small_run, "--reports", tmp_path)
    assert misspelt.returncode == 2 and "did you mean 'better'?" in misspelt.stderr
