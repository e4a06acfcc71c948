"""What training promises: to go on exactly after any end, alone or in a team, and to be watched without being changed."""

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pandas as pd
import psutil
import pytest
import torch
from conftest import command, executable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_nb import cli, training
from mnist_nb.models import load_checkpoint, load_model
from mnist_nb.recipes import Settings

EPOCHS = 12
WORDS = ["--arch=nano", f"--epochs={EPOCHS}", "--train_images=3000", "--valid_images=500", "--batch_size=100", "--cpu",
         "--learning_rate=0.005", "--precision=bfloat16", "--elastic=1", "--cutout=4"]  # with all that draws random numbers
TEAM = ["--arch=nano", "--epochs=6", "--train_images=4000", "--valid_images=1000", "--learning_rate=0.005", "--cpu"]


def kill_after(words: list[str], epochs: int, seconds: float) -> None:
    "Starts a training and kills it, children and all, so many seconds after so many epochs. It must not have ended by itself."
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        epochs -= line.startswith("epoch ")
        if epochs <= 0: break
    time.sleep(seconds)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]  # in sessions of their own
    for member in family:
        with suppress(psutil.NoSuchProcess): member.kill()
    assert process.wait() == -signal.SIGKILL
    assert not psutil.wait_procs(family, timeout=30)[1]


def epochs_done(folder) -> int: return len(load_checkpoint(folder / "last_model.pth")["history"])


def flatten(value, name=""):
    "All that is in nested dicts and lists, with the way to it."
    if isinstance(value, (dict, list, tuple)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value): yield from flatten(inner, f"{name}/{key}")
    else: yield name, value


def assert_same(one, other) -> None:
    "Two trainings came to the same, bit by bit: weights, optimiser, schedule, random generators; and history, but for the times."
    first, second = ({name: value for name, value in flatten(load_checkpoint(folder / "last_model.pth"))
                      if not name.endswith(("/created", "/images_per_second", "/seconds"))} for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name
    histories = [pd.read_csv(folder / "history.csv").drop(columns=["images_per_second", "seconds"]) for folder in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    result = command("mnist-train", *WORDS, f"--save_dir={folder}")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    kill_after([executable("mnist-train"), *WORDS, f"--save_dir={folder}"], 2, 0)
    assert 2 <= epochs_done(folder) < EPOCHS
    return folder


def test_killed_three_times_and_resumed_is_the_same(whole, cut_off, tmp_path):
    folder, draw = shutil.copytree(cut_off, tmp_path / "cut"), random.Random(0)
    for _ in range(2):
        before = epochs_done(folder)
        kill_after([executable("mnist-train"), *WORDS, f"--save_dir={folder}", "--resume"], 1, draw.uniform(0, 0.3))
        assert before < epochs_done(folder) < EPOCHS
    result = command("mnist-train", *WORDS, f"--save_dir={folder}", "--resume")
    assert result.returncode == 0 and f"resumed after epoch {epochs_done(folder)}" not in result.stdout, result.stderr
    assert_same(folder, whole)


def test_killed_between_two_files_and_resumed_is_the_same(tmp_path):
    settings = Settings(arch="base", epochs=3, train_images=1000, valid_images=500)
    code = ("import os, signal, sys\nfrom mnist_nb import training\nfrom mnist_nb.recipes import Settings\n"
            "real, calls = training.save_checkpoint, []\n"  # the fourth is the last model of the second epoch; the best is written
            "def fatal(*words):\n    calls.append(0)\n    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n    real(*words)\n"
            "if len(sys.argv) > 2: training.save_checkpoint = fatal\n"
            f"training.fit({settings!r}, sys.argv[1], device='cpu', resume=True)")
    def run(name, *more): return subprocess.run([sys.executable, "-c", code, str(tmp_path / name), *more], capture_output=True, text=True)
    assert run("whole").returncode == 0
    assert run("cut", "fatal").returncode == -signal.SIGKILL and epochs_done(tmp_path / "cut") == 1
    again = run("cut")
    assert "resumed after epoch 1 of 3" in again.stdout, again.stderr
    assert_same(tmp_path / "cut", tmp_path / "whole")


def test_a_full_disk_while_writing_a_checkpoint(whole, cut_off, tmp_path):
    folder = shutil.copytree(cut_off, tmp_path / "cut")
    before = {path.name: path.read_bytes() for path in folder.glob("*.pth")}
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    words = [executable("mnist-train"), *WORDS, f"--save_dir={folder}", "--resume"]
    result = subprocess.run(words, preexec_fn=limit, capture_output=True, text=True)
    assert result.returncode == 1 and "_model.pth could not be written" in result.stderr and "Traceback" not in result.stderr
    assert {path.name: path.read_bytes() for path in folder.glob("*.pth")} == before
    assert not list(folder.glob(".*"))
    assert command("mnist-train", *WORDS, f"--save_dir={folder}", "--resume").returncode == 0
    assert_same(folder, whole)


def test_resume_with_another_architecture_is_refused(cut_off, tmp_path, capsys):
    folder = shutil.copytree(cut_off, tmp_path / "cut")
    before = (folder / "last_model.pth").read_bytes()
    with pytest.raises(SystemExit) as end:
        cli.train([*WORDS, "--arch=cnn", f"--save_dir={folder}", "--resume"])
    assert end.value.code == 2 and "it was trained with other values of arch" in capsys.readouterr().err
    assert (folder / "last_model.pth").read_bytes() == before


def torchrun(*words: str) -> list[str]:
    "The command line of two processes with mnist-train."
    return [executable("torchrun"), "--standalone", "--nproc_per_node=2", executable("mnist-train"), *words]


@pytest.mark.slow
def test_two_processes_train_one_model(tmp_path):
    alone = command("mnist-train", *TEAM, f"--save_dir={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    result = subprocess.run(torchrun(*TEAM, f"--save_dir={tmp_path / 'team'}"), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/6") == result.stdout.count("best epoch") == 1  # one speaks
    one, two = (pd.read_csv(tmp_path / name / "history.csv") for name in ("alone", "team"))
    assert len(two) == 6 and abs(two.valid_accuracy.iloc[-1] - one.valid_accuracy.iloc[-1]) < 0.02
    assert one.learning_rate.tolist() == two.learning_rate.tolist()  # as many steps, of the same global batch
    load_model(tmp_path / "team" / "best_model.pth")

    kill_after(torchrun(*TEAM, f"--save_dir={tmp_path / 'cut'}"), 2, 0)
    assert 2 <= epochs_done(tmp_path / "cut") < 6
    again = subprocess.run(torchrun(*TEAM, f"--save_dir={tmp_path / 'cut'}", "--resume"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("resumed after epoch") == 1, again.stderr
    assert_same(tmp_path / "cut", tmp_path / "team")
    states = [state["cpu"] for state in load_checkpoint(tmp_path / "team" / "last_model.pth")["random_states"]]
    assert len(states) == 2 and not torch.equal(*states)  # each draws augmentation and dropout of its own
    refused = command("mnist-train", *TEAM, f"--save_dir={tmp_path / 'team'}", "--resume")
    assert refused.returncode == 2 and "other values of processes" in refused.stderr


def test_a_batch_that_two_cannot_share_is_refused(tmp_path):
    result = subprocess.run(torchrun(*TEAM, "--batch_size=33", f"--save_dir={tmp_path}"), capture_output=True, text=True, timeout=300)
    assert result.returncode != 0 and result.stderr.count("batch_size=33 cannot be shared by 2 processes") == 1
    assert not list(tmp_path.iterdir())


def test_tensorboard_sees_everything_and_changes_nothing(tmp_path):
    words = ["--arch=base", "--epochs=2", "--train_images=1000", "--valid_images=500", "--cpu"]
    for name, more in (("plain", []), ("watched", ["--tensorboard"])):
        assert cli.train([*words, f"--save_dir={tmp_path / name}", *more]) == 0
    assert_same(tmp_path / "plain", tmp_path / "watched")
    events = EventAccumulator(str(tmp_path / "watched" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert cli.train([*words, "--tensorboard", f"--save_dir={tmp_path / 'watched'}", "--resume"]) == 0  # nothing left to do
    history = pd.read_csv(tmp_path / "watched" / "history.csv")
    assert {"train/loss", "valid/accuracy", "learning_rate", "gradient_norm", "images_per_second"} <= set(events.Tags()["scalars"])
    assert [point.value for point in events.Scalars("valid/loss")] == pytest.approx(history.valid_loss)
    assert [point.step for point in events.Images("confusion matrix (validation)")] == [1, 2]
    assert any(tag.startswith("augmented") for tag in events.Tags()["images"])


def test_without_tensorboard_the_error_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as end: cli.train(["--epochs=1", "--tensorboard", f"--save_dir={tmp_path}"])
    assert end.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err


def test_tensorboard_that_comes_late_sees_all_epochs(tmp_path):
    settings = Settings(arch="base", epochs=3, train_images=1000, valid_images=500)
    def stop(end):
        if len(end.history) == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): training.fit(settings, tmp_path, device="cpu", watchers=[stop])
    training.fit(settings, tmp_path, device="cpu", resume=True, watchers=[training.TensorBoard(tmp_path / "events")])
    assert [point.step for point in EventAccumulator(str(tmp_path / "events")).Reload().Scalars("train/loss")] == [1, 2, 3]


def test_live_curves_are_one_picture_that_changes(tmp_path, monkeypatch):
    shown = []
    class Handle:
        def update(self, figure, metadata): shown.append(("update", metadata["image/png"]["alt"]))
    def display(figure, display_id, metadata):
        shown.append(("display", metadata["image/png"]["alt"]))
        return Handle()
    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setenv("TQDM_DISABLE", "0")
    settings = Settings(arch="base", epochs=3, train_images=500, valid_images=100)
    training.fit(settings, tmp_path / "seen", device="cpu", watchers=[training.LiveCurves()])
    assert shown == [("display", "Learning curves up to epoch 1."), *(("update", f"Learning curves up to epoch {n}.") for n in (2, 3))]
    monkeypatch.setenv("TQDM_DISABLE", "1")  # as under papermill
    training.fit(settings, tmp_path / "unseen", device="cpu", watchers=[training.LiveCurves()])
    assert len(shown) == 3


def test_auto_goes_on_only_in_the_same_number_format(tmp_path, monkeypatch):
    settings = Settings(arch="base", epochs=2, train_images=500, valid_images=100, precision="auto")
    training.fit(settings, tmp_path, device="cpu")
    used = training.pick_precision("auto", torch.device("cpu"))
    other = torch.float32 if used == torch.bfloat16 else torch.bfloat16
    monkeypatch.setattr(training, "pick_precision", lambda name, device: other)
    with pytest.raises(training.InputError, match="other values of precision"): training.fit(settings, tmp_path, device="cpu", resume=True)


def test_what_is_given_wins_over_the_recipe(tmp_path, capsys):
    cli.train(["--recipe=fast", "--train_images=1000", "--valid_images=100", "--label_smoothing=0.3", f"--save_dir={tmp_path}"])
    settings = load_checkpoint(tmp_path / "last_model.pth")["settings"]
    assert settings["arch"] == "nano" and settings["epochs"] == 1 and settings["label_smoothing"] == 0.3
    assert "recipe fast" in capsys.readouterr().out
