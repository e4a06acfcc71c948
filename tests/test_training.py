"""What training promises: to go on exactly after any end, alone or in a team, and to be watched without being changed."""

import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from conftest import command, executable
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mnist_nb import cli, data, export, inspection, training
from mnist_nb.data import AUGMENTATIONS, Digits, load_digits, pixel_statistics, split_digits
from mnist_nb.error_analysis import load_subject
from mnist_nb.models import create_model, load_checkpoint, load_model
from mnist_nb.recipes import RECIPES, Settings, apply_recipe

EPOCHS = 20
WORDS = ["--arch=nano", f"--epochs={EPOCHS}", f"--patience={EPOCHS}", "--train_images=600", "--valid_images=100", "--batch_size=50",
         "--learning_rate=0.005", "--precision=auto", "--elastic=1", "--cutout=4", "--cpu"]  # with all that draws random numbers
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
    assert cli.train([*WORDS, f"--save_dir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    kill_after([executable("mnist-train"), *WORDS, f"--save_dir={folder}"], 2, 0)
    assert 2 <= epochs_done(folder) < EPOCHS
    return folder


TINY = Settings(arch="nano", epochs=6, train_images=200, valid_images=100, batch_size=50, patience=2)


@pytest.fixture(scope="module")
def few() -> Digits:
    "Some of the training images, each different."
    return load_digits("train").take(np.arange(400))


def numbers_of(images, digits: Digits) -> set[int]:
    "Which of the digits the images are."
    places = {image.tobytes(): number for number, image in enumerate(digits.images)}
    return {places[np.asarray(image).tobytes()] for image in images}


@pytest.fixture
def scripted(monkeypatch, few):
    "Trains with losses that are given: returns the history. Each epoch writes its number into the weights."
    def train(folder, train_losses, valid_losses, settings=TINY):
        epochs, losses = iter(enumerate(train_losses, 1)), iter(valid_losses)
        def train_epoch(model, *more):
            epoch, loss = next(epochs)
            with torch.no_grad(): model.network[-1].bias.fill_(epoch)
            return training.EpochResult(loss, 1 - loss, 1.0)
        with monkeypatch.context() as patch:
            patch.setattr(training, "train_epoch", train_epoch)
            patch.setattr(training, "measure", lambda *words: (next(losses), 0.5))
            return training.fit(settings, folder, device="cpu", digits=few)
    return train


def weights_from(path) -> float: return load_checkpoint(path)["model"]["network.10.bias"][0].item()


def test_the_best_checkpoint_has_the_lowest_validation_loss(scripted, tmp_path):
    history = scripted(tmp_path, train_losses=[0.5, 0.4, 0.3, 0.2, 0.1, 0.05], valid_losses=[0.9, 0.7, 0.5, 0.6, 0.49, 0.55])
    assert history.train_loss.tolist() == [0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    assert history.valid_loss.tolist() == [0.9, 0.7, 0.5, 0.6, 0.49, 0.55] and history.epoch.tolist() == [1, 2, 3, 4, 5, 6]
    assert (weights_from(tmp_path / "best_model.pth"), weights_from(tmp_path / "last_model.pth")) == (5, 6)
    assert len(load_checkpoint(tmp_path / "best_model.pth")["history"]) == 5


def test_validation_loss_stops_training_and_training_loss_does_not(scripted, tmp_path):
    falling = [0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    stopped = scripted(tmp_path / "stopped", train_losses=falling, valid_losses=[0.5, 0.4, 0.4, 0.6, 0.1, 0.1])
    assert len(stopped) == 4 and weights_from(tmp_path / "stopped" / "best_model.pth") == 2  # two epochs without a lower one
    whole = scripted(tmp_path / "whole", train_losses=falling[::-1], valid_losses=falling)
    assert len(whole) == 6 and weights_from(tmp_path / "whole" / "best_model.pth") == 6
    patient = scripted(tmp_path / "patient", falling, [0.5, 0.4, 0.4, 0.6, 0.1, 0.2], replace(TINY, patience=3))
    assert len(patient) == 6 and weights_from(tmp_path / "patient" / "best_model.pth") == 5


@pytest.mark.parametrize(("changes", "cause", "other"), [
    ({"weight_decay": 1e5}, "weight_decay=100000 with learning_rate=0.001", "is far above"),
    ({"learning_rate": 1e30}, "learning_rate=1e+30 is far above", "weight_decay=0.5 with")])
def test_a_loss_that_is_no_number_names_the_setting_that_caused_it(changes, cause, other, few, tmp_path):
    with pytest.raises(training.InputError) as end:
        training.fit(replace(TINY, epochs=60, patience=60, **changes), tmp_path, device="cpu", digits=few)
    assert "loss became" in str(end.value) and cause in str(end.value) and other not in str(end.value)


def test_a_loss_that_is_no_number_blames_nobody_without_evidence(scripted, tmp_path):
    with pytest.raises(training.InputError, match="training loss became nan in epoch 2: neither learning_rate=0.001 nor weight_decay=0.5"):
        scripted(tmp_path / "train", [0.5, float("nan")], [0.5, 0.5])
    with pytest.raises(training.InputError, match="validation loss became inf in epoch 1: neither"):
        scripted(tmp_path / "valid", [0.5], [float("inf")])
    assert not (tmp_path / "valid" / "best_model.pth").exists()


def test_training_and_validation_see_different_images(monkeypatch, few, tmp_path):
    "The parts share no image; only training augments; pixels are normalised by those of the training part."
    trained, judged, augmented = [], [], []
    real_epoch, real_logits, real_augment = training.train_epoch, training.predict_logits, training.augment
    monkeypatch.setattr(training, "train_epoch", lambda *words: (trained.append(words[3]), real_epoch(*words))[1])
    monkeypatch.setattr(training, "predict_logits", lambda *words: (judged.append(words[1]), real_logits(*words))[1])
    monkeypatch.setattr(training, "augment", lambda *words: (augmented.append(len(words[0])), real_augment(*words))[1])
    training.fit(replace(TINY, epochs=2), tmp_path, device="cpu", digits=few)
    train, valid = numbers_of(trained[0], few), numbers_of(judged[0], few)
    assert (len(train), len(valid), len(judged), train & valid) == (200, 100, 2, set()) and augmented == [50] * 8
    shares = [np.bincount(few.labels[sorted(part)], minlength=10) / len(part) for part in (train, valid, range(400))]
    assert np.abs(shares[0] - shares[2]).max() < 0.011 and np.abs(shares[1] - shares[2]).max() < 0.016  # stratified
    model = load_checkpoint(tmp_path / "best_model.pth")["model"]
    mean_and_std = pixel_statistics(few.images[sorted(train)])
    np.testing.assert_allclose([model["normalize.mean"], model["normalize.std"]], mean_and_std, rtol=1e-6)
    assert abs(mean_and_std[0] - pixel_statistics(few.images)[0]) > 1e-5


def test_an_epoch_takes_each_image_once_in_an_order_of_its_own():
    generator = torch.Generator().manual_seed(0)
    first, second = (training.draw_batches(103, 10, generator) for _ in range(2))
    assert first.shape == (10, 10) and len(set(first.flatten().tolist())) == len(set(second.flatten().tolist())) == 100
    assert not torch.equal(first, second) and not torch.equal(first.flatten().sort().values, second.flatten().sort().values)
    assert not torch.equal(first.flatten(), torch.arange(100))


def one_epoch(few, **changes):
    "An epoch of a linear model on 100 images, without augmentation: model, weights before, result, schedule."
    settings = replace(TINY, train_images=100, epochs=3, **asdict(AUGMENTATIONS["none"]), **changes)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    before = model[1].weight.detach().clone()
    optimizer, scheduler = training.create_optimizer(model, settings, torch.device("cpu"))
    tensors = [torch.from_numpy(array[:100]) for array in few]
    result = training.train_epoch(model, optimizer, scheduler, *tensors, torch.arange(100).view(2, 50), settings)
    return model, before, result, scheduler


def test_label_smoothing_is_in_the_loss_of_training(few):
    for smoothing in (0.0, 0.3):
        torch.manual_seed(0)
        layer = torch.nn.Linear(784, 10)
        logits = layer(torch.from_numpy(few.images[:100]).flatten(1) / 255).detach().double().log_softmax(1)
        own, mean = -logits[torch.arange(100), torch.from_numpy(few.labels[:100])].mean(), -logits.mean()
        result = one_epoch(few, label_smoothing=smoothing, learning_rate=1e-12)[2]
        assert result.loss == pytest.approx(((1 - smoothing) * own + smoothing * mean).item(), rel=1e-5)
        assert result.accuracy == (logits.argmax(1).numpy() == few.labels[:100]).mean()
        assert training.measure(logits, torch.from_numpy(few.labels[:100]), smoothing)[0] == pytest.approx(result.loss, rel=1e-5)


def test_weight_decay_shrinks_weights_that_have_no_gradient(few):
    rates = training.learning_rates(replace(TINY, train_images=100, epochs=3, learning_rate=0.01))
    for decay in (0.0, 2.0):
        model, before, _, scheduler = one_epoch(few, weight_decay=decay, learning_rate=0.01)
        shrunk = (1 - rates[0] * decay) * (1 - rates[1] * decay)  # the corner pixel is paper in every image
        torch.testing.assert_close(model[1].weight[:, 0].detach(), before[:, 0] * shrunk)
        assert (model[1].weight - before)[:, 400].abs().min() > 1e-4 and scheduler.last_epoch == 2  # a step a batch
        assert model[1].weight.grad is None  # no gradient adds up over batches


def test_the_learning_rate_rises_for_30_percent_of_the_steps_and_ends_near_zero():
    rates = training.learning_rates(Settings(train_images=1000, valid_images=10, batch_size=10, epochs=4, learning_rate=0.02))
    assert len(rates) == 400 and rates.argmax() == 119 and rates.max() == pytest.approx(0.02)
    assert rates[0] == pytest.approx(0.02 / 25) and rates[-1] < 1e-5
    assert (np.diff(rates[:120]) > 0).all() and (np.diff(rates[119:]) < 0).all()


def test_validation_runs_without_dropout_and_leaves_the_model_training(few):
    model = create_model("improved").train()
    images = torch.from_numpy(few.images[:50])
    first, second = training.predict_logits(model, images), training.predict_logits(model, images, 7)
    torch.testing.assert_close(first, second)
    assert model.training and torch.equal(first, training.predict_logits(model.eval(), images)) and not model.training
    loss, accuracy = training.evaluate(model, images, torch.from_numpy(few.labels[:50]))
    assert accuracy == (first.argmax(1).numpy() == few.labels[:50]).mean()
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(first, torch.from_numpy(few.labels[:50])).item())


def test_settings_reach_the_model_and_the_seed_decides(few, tmp_path):
    settings = replace(TINY, arch="base", epochs=1, dropout=0.5)
    state = training.TrainingState.start(settings, few, torch.device("cpu"))
    assert [layer.p for layer in state.model.modules() if isinstance(layer, torch.nn.Dropout)] == [0.15] * 3
    assert (state.optimizer.param_groups[0]["weight_decay"], state.stopping.patience) == (settings.weight_decay, 2)
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        training.fit(replace(settings, seed=seed), tmp_path / name, device="cpu", digits=few)
        weights[name] = load_checkpoint(tmp_path / name / "best_model.pth")["model"]["network.1.weight"]
    assert torch.equal(weights["a"], weights["b"]) and not torch.equal(weights["a"], weights["c"])


def test_only_the_error_analysis_and_the_export_read_the_test_set(monkeypatch, tmp_path):
    "Training, out-of-sample predictions, the temperature and the calibration of an export do without."
    def read_archive(path, real=data.read_archive):
        assert "t10k" not in str(path), "the test set was read"
        return real(path)
    monkeypatch.setattr(data, "read_archive", read_archive)
    training.fit(replace(TINY, epochs=1), tmp_path / "checkpoints", device="cpu")
    model, checkpoint = load_model(tmp_path / "checkpoints" / "best_model.pth")
    inspection.out_of_sample(load_digits("train").take(np.arange(60)))
    parts = export.parts_of(checkpoint)
    assert [len(part.labels) for part in parts] == [200, 100] and set(export.calibrate(export.eager_logits(model), checkpoint))
    with pytest.raises(AssertionError, match="the test set was read"): load_subject(tmp_path, 10, "cpu")


def test_a_model_is_analysed_with_the_images_it_was_trained_on(tmp_path):
    settings = replace(TINY, epochs=1, seed=3)
    training.fit(settings, tmp_path / "checkpoints", device="cpu")
    subject, everything = load_subject(tmp_path, 20, "cpu"), load_digits("train")
    train, valid = split_digits(everything, 200, 100, seed=3)
    for own, part in ((subject.train, train), (subject.valid, valid)):
        np.testing.assert_array_equal(own.images, part.images)
        np.testing.assert_array_equal(own.labels, part.labels)
    np.testing.assert_array_equal(everything.images[subject.places], np.concatenate([train.images, valid.images]))
    np.testing.assert_array_equal(subject.test.images, load_digits("test").images[subject.numbers])
    valid_logits = training.predict_logits(subject.model, torch.from_numpy(valid.images)).numpy()
    np.testing.assert_allclose(subject.logits_of(valid.images), valid_logits, atol=1e-5)


def test_a_recipe_changes_the_defaults_and_is_overruled():
    assert apply_recipe("fast", {"epochs": 7}) == {**RECIPES["fast"], "epochs": 7} and apply_recipe("default", {}) == {}
    settings = Settings(rotation=1, scale=0.2, stretch=0.3, shear=4, translation=5, elastic=6, smoothness=7, noise=0.8, cutout=9)
    assert asdict(settings.augmentation) == {"rotation": 1, "scale": 0.2, "stretch": 0.3, "shear": 4, "translation": 5, "elastic": 6,
                                             "smoothness": 7, "noise": 0.8, "cutout": 9}


def test_killed_and_resumed_is_the_same(whole, cut_off, tmp_path, capsys):
    folder = shutil.copytree(cut_off, tmp_path / "cut")
    before = epochs_done(folder)
    assert cli.train([*WORDS, f"--save_dir={folder}", "--resume"]) == 0
    printed = capsys.readouterr().out
    assert f"resumed after epoch {before} of {EPOCHS}" in printed and printed.count("\nepoch ") == EPOCHS - before
    assert_same(folder, whole)


@pytest.mark.slow
def test_killed_three_times_and_resumed_is_the_same(whole, cut_off, tmp_path):
    folder, draw = shutil.copytree(cut_off, tmp_path / "cut"), random.Random(0)
    for _ in range(2):
        before = epochs_done(folder)
        kill_after([executable("mnist-train"), *WORDS, f"--save_dir={folder}", "--resume"], 1, draw.uniform(0, 0.1))
        assert before < epochs_done(folder) < EPOCHS
    result = command("mnist-train", *WORDS, f"--save_dir={folder}", "--resume")
    assert result.returncode == 0 and f"resumed after epoch {epochs_done(folder)}" not in result.stdout, result.stderr
    assert_same(folder, whole)


def test_killed_between_two_files_and_resumed_is_the_same(tmp_path):
    settings = Settings(arch="base", epochs=3, train_images=500, valid_images=100)
    code = ("import os, signal, sys\nfrom mnist_nb import training\nfrom mnist_nb.recipes import Settings\n"
            "real, calls = training.save_checkpoint, []\n"  # the fourth is the last model of the second epoch; the best is written
            "def fatal(*words):\n    calls.append(0)\n    if len(calls) == 4: os.kill(os.getpid(), signal.SIGKILL)\n    real(*words)\n"
            "training.save_checkpoint = fatal\n"
            f"training.fit({settings!r}, sys.argv[1], device='cpu', resume=True)")
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cut")], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL and epochs_done(tmp_path / "cut") == 1, result.stderr
    assert len(load_checkpoint(tmp_path / "cut" / "best_model.pth")["history"]) == 2
    for name in ("whole", "cut"): training.fit(settings, tmp_path / name, device="cpu", resume=True)
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
    assert cli.train([*WORDS, f"--save_dir={folder}", "--resume"]) == 0
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


@pytest.mark.parametrize("batch_size", [33, 2])
def test_a_batch_that_two_cannot_share(batch_size, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK"): monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"): monkeypatch.setenv(name, "2")
    with pytest.raises(training.InputError, match=f"batch_size={batch_size} cannot be shared by 2 processes: give a multiple of 2"):
        with training.join_team(torch.device("cpu"), batch_size): pass


@pytest.mark.slow
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
