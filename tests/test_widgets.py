"""What the widgets do in Python: drawings, kept examples, filters and pages, a training that is stopped, runs. No browser."""

import json
import os
import threading
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, wait_for
from PIL import Image

from mnist_nb import widgets
from mnist_nb.data import AUGMENTATIONS, Augmentation, load_test_digits
from mnist_nb.recipes import Settings
from mnist_nb.runs import InputError
from mnist_nb.training import HISTORY, StepEnd, StopTraining
from mnist_nb.widgets import (AT_ONCE, AugmentationPlayground, DigitPad, ErrorBrowser, Later, RunPicker, TrainingMonitor, bars,
                              count_digits, keep_sample, render_strokes)

STROKES = json.loads((ROOT / "tests" / "strokes.json").read_text())


def centre(image: np.ndarray) -> tuple[float, float]:  # right, down, in pixels from the corner
    "The centre of mass."
    return tuple(image.sum(axis) @ (np.arange(28) + 0.5) / image.sum() for axis in (0, 1))


# Strokes

@pytest.mark.parametrize("digit", STROKES)
def test_a_drawing_is_centred_by_its_mass_in_a_box_of_twenty_pixels(digit):
    for strokes in STROKES[digit]:
        image = render_strokes(strokes)
        np.testing.assert_allclose(centre(image), 14.5, atol=0.1)
        rows, columns = (np.flatnonzero(image.max(axis) > 127) for axis in (1, 0))
        assert 18 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 20


def test_strokes_go_right_and_down():
    flat, steep = render_strokes([[[10, 50], [90, 50]]]), render_strokes([[[50, 10], [50, 90]]])
    assert (flat[14] > 0).sum() >= 18 and (steep[:, 14] > 0).sum() >= 18 and (flat == steep.T).all()
    corner = render_strokes([[[10, 10], [90, 10]], [[10, 10], [10, 90]]])  # a line on top and one on the left
    assert corner[:14, :14].sum() > 2 * corner[14:, 14:].sum()


def test_a_pen_is_as_wide_as_in_mnist():
    np.testing.assert_allclose(render_strokes([[[0, 0], [1, 0]]])[:, 10:18].sum(0) / 255, 2.6, atol=0.05)


def test_an_uneven_drawing_stays_on_the_paper():
    scribble = [[x, y] for x in (0, 1, 2, 3) for y in range(-3, 4)]  # heavy at one end of a long line
    image = render_strokes([scribble * 4, [[0, 0], [100, 0]]])
    line = np.flatnonzero(image.max(0) > 127)
    assert len(line) >= 18  # all of the line can be seen


# Examples

def test_examples_are_numbered_after_the_last_one(tmp_path):
    image = np.arange(784, dtype=np.uint8).reshape(28, 28)
    assert keep_sample(image, 0, tmp_path / "new").name == "digit_0_drawn_0000.png"
    (tmp_path / "new" / "digit_5_drawn_0041.png").touch()
    (tmp_path / "new" / "digit_5_drawn_copy.png").touch()
    path = keep_sample(image, 9, tmp_path / "new")
    assert path.name == "digit_9_drawn_0042.png" and (np.asarray(Image.open(path)) == image).all()


@pytest.mark.parametrize("label", [-1, 10])
def test_an_example_is_of_a_digit(label, tmp_path):
    with pytest.raises(InputError, match="give 0 to 9"): keep_sample(np.zeros((28, 28), np.uint8), label, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_bars_mark_the_most_probable_digit():
    html = bars("a <b>", np.array([0.1, 0.05, 0.05, 0.7, 0.1, 0, 0, 0, 0, 0]))
    assert html.count('class="best"') == 1 and '<tr class="best"><th scope="row">3</th>' in html and "70.0%" in html
    assert "a &lt;b&gt;" in html


# The pad

@pytest.fixture(scope="module")
def models(): return DigitPad({"one": ROOT / "reports" / "reference" / "model.int8.onnx"}).models


def test_a_message_keeps_the_drawing_as_it_was_meant(models, tmp_path):
    pad = DigitPad(models, folder=tmp_path / "kept")
    pad._handle_custom_msg({"keep": 8}, [])  # it looks like a 3; a person says that it is an 8
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["digit_8_drawn_0000.png"] and "1 there now" in pad.kept
    pad._handle_custom_msg({"something": "else"}, [])
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_an_answer_names_its_question_even_if_a_model_fails(models):
    pad = DigitPad({**models, "broken": next(iter(models.values()))})
    assert list(pad.probabilities) == ["one", "broken"] and pad.answers["to"] == 0
    pad.models["broken"] = None
    pad.question = {"number": 7, "strokes": []}
    assert pad.answers["to"] == 7 and "<p>" in pad.answers["html"]


ONE, SEVEN, BAR = [[30, 25], [30, 75]], [[60, 25], [85, 25], [70, 75]], [[63, 50], [82, 50]]


def test_several_digits_on_the_pad_get_a_warning(models):
    assert "separate" not in DigitPad(models, strokes=[SEVEN, BAR]).answers["html"]  # the bar is a stroke of its own
    pad = DigitPad(models, strokes=[ONE, SEVEN, BAR])
    assert "2 separate digits: they were read as one" in pad.answers["html"]
    pad.question = {"number": 1, "strokes": [[[x / 100, y / 100] for x, y in SEVEN]]}
    assert "separate" not in pad.answers["html"]


def test_strokes_are_several_digits_where_they_lie_apart():
    assert count_digits([]) == 0 and count_digits([[]]) == 0
    assert count_digits([ONE, SEVEN, BAR], pen=8) == 2 and count_digits([ONE, SEVEN], pen=40) == 1  # so wide a pen closes the gap
    assert count_digits([ONE, [[50, 40], [50, 60]]], pen=8) == 1  # a speck, or the rest of a digit: less than half as high
    assert count_digits([ONE, [[80, 25], [80, 75]], [[30, 50], [80, 50]]], pen=8) == 1  # an H: the last stroke joins the others
    assert count_digits([[[10, 10], [30, 30]], [[10, 60], [30, 90]], [[70, 20], [90, 60]]], pen=2) == 3


def test_without_a_drawing_nothing_is_asked_and_nothing_kept(models, tmp_path):
    pad = DigitPad(models, folder=tmp_path / "kept", strokes=[])
    assert pad.image is None and pad.probabilities == {} and pad.answers["html"] == ""
    pad.keep(3)
    assert "nothing to keep" in pad.kept and not (tmp_path / "kept").exists()


# The errors

@pytest.fixture(scope="module")
def digits(): return load_test_digits(200)


@pytest.fixture
def browser(digits):
    "Every third image is taken for the next digit; image i is predicted with a confidence of 0.5 + i / 1000."
    confidence, predicted = 0.5 + np.arange(200) / 1000, (digits.labels + (np.arange(200) % 3 == 0)) % 10
    probabilities = np.repeat((1 - confidence)[:, None] / 9, 10, axis=1)
    probabilities[np.arange(200), predicted] = confidence
    return ErrorBrowser(digits, probabilities)


def narrow(browser, **wanted) -> list[int]:
    browser.filter = {**browser.filter, **wanted}
    return browser.indices.tolist()


def test_errors_come_most_confident_first(browser):
    assert browser.indices.tolist() == list(range(198, -1, -3))
    assert narrow(browser, errors=False) == list(range(199, -1, -1))


def test_ends_of_the_confidence_are_included(browser):
    low, high = (float(browser.confidence[index]) for index in (30, 60))
    assert narrow(browser, errors=False, low=low, high=high) == list(range(60, 29, -1))


def test_filters_apply_together(browser, digits):
    label = digits.labels[3]
    errors = np.flatnonzero((np.arange(200) % 3 == 0) & (digits.labels == label))[::-1].tolist()
    assert narrow(browser, true=int(label)) == errors and errors
    assert narrow(browser, predicted=int(label)) == []
    assert narrow(browser, predicted=int(label + 1) % 10) == errors
    name = next(name for name in browser.slices if 0 < browser.members[name][errors].sum() < len(errors))
    assert narrow(browser, slice=name) == [index for index in errors if browser.members[name][index]]


def test_pages_follow_each_other_and_begin_anew_with_a_filter(browser):
    def shown(): return [item["index"] for item in browser.shown["items"]]
    everything = narrow(browser, errors=False)
    assert shown() == everything[:AT_ONCE] and browser.shown["count"] == 200
    browser.page = 1
    assert shown() == everything[AT_ONCE:2 * AT_ONCE] and browser.shown["first"] == AT_ONCE
    browser.page = 99
    assert browser.page == 3 and shown() == everything[3 * AT_ONCE:]
    narrow(browser, low=0.6)
    assert browser.page == 0 and browser.shown["first"] == 0
    narrow(browser, low=0.99)
    assert browser.shown == {"count": 0, "first": 0, "items": []} and browser.page == 0


def test_a_full_last_page_is_the_last(browser):
    narrow(browser, errors=False, low=float(browser.confidence[80]))  # 120 images: two full pages
    browser.page = 5
    assert browser.page == 1 and len(browser.shown["items"]) == AT_ONCE


@pytest.mark.parametrize("index", [-1, 200])
def test_an_image_that_is_not_there_has_no_explanation(browser, index):
    browser.selected = 0
    assert f"#0, true {browser.digits.labels[0]}, predicted {browser.predicted[0]}, 50.0%" in browser.detail
    browser.selected = index
    assert browser.detail == ""


def test_predictions_of_another_model_are_refused(digits, monkeypatch):
    logits = np.eye(10, dtype=np.float32)[digits.labels] * 5
    subject = SimpleNamespace(test=digits, numbers=np.arange(200), logits_of=lambda images: logits[:len(images)])
    monkeypatch.setattr(widgets, "load_subject", lambda run, n, device: subject)
    monkeypatch.setattr(widgets, "load_predictions", lambda run: (digits.labels, logits, np.arange(200)))
    assert ErrorBrowser.from_run("x", errors=False).shown["count"] == 200
    monkeypatch.setattr(widgets, "load_predictions", lambda run: (digits.labels, logits + 0.1, np.arange(200)))
    with pytest.raises(InputError, match="another model"): ErrorBrowser.from_run("x")
    monkeypatch.setattr(widgets, "load_predictions", lambda run: (digits.labels, logits, np.arange(200) + 1))
    with pytest.raises(InputError, match="other test images"): ErrorBrowser.from_run("x")


# The playground

def test_a_named_augmentation_sets_all_amounts(digits):
    playground = AugmentationPlayground(digits.images[:2], draws=3)
    assert playground.grid.shape == (3, 2, 28, 28) and playground.augmentation == AUGMENTATIONS["affine"]
    first = playground.src
    playground._handle_custom_msg({"named": "elastic"}, [])
    assert playground.augmentation == AUGMENTATIONS["elastic"] and playground.src != first
    playground.amounts = {**playground.amounts, "rotation": Augmentation().rotation}
    assert "rotation" not in playground.code  # the code names what differs
    second = playground.src
    playground.seed = 1
    assert playground.src != second and "manual_seed(1)" in playground.code


# A training

class ToyTraining:
    "In place of `fit`: an epoch has ten steps, each waits for a permission."
    def __init__(self): self.calls, self.steps = [], threading.Semaphore(0)

    def __call__(self, settings, save_dir, resume, on_step, watchers, **more):
        self.calls.append(resume)
        self.history = [*self.history] if resume else []
        while len(self.history) < settings.epochs:
            epoch = len(self.history) + 1
            for step in range(1, 11):
                assert self.steps.acquire(timeout=30)
                if settings.learning_rate > 1: raise InputError("learning_rate is too high")
                try: on_step(StepEnd(epoch, step, 10, SimpleNamespace(item=lambda step=step: 1 / step), 1000.0))
                except StopTraining: return pd.DataFrame(self.history, columns=HISTORY)
            self.history.append(dict.fromkeys(HISTORY, 0.5) | {"epoch": epoch, "valid_accuracy": 0.9 - epoch / 100})
            for watch in watchers: watch(SimpleNamespace(history=self.history))
        return pd.DataFrame(self.history, columns=HISTORY)


@pytest.fixture
def toy(monkeypatch):
    toy = ToyTraining()
    monkeypatch.setattr(widgets, "fit", toy)
    monkeypatch.setattr(TrainingMonitor, "running", None)
    return toy


@pytest.fixture
def front_end(monkeypatch):
    "As if a person sat at the notebook."
    kernel = SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}})
    monkeypatch.setattr(widgets, "get_ipython", lambda: SimpleNamespace(kernel=kernel))


def go(toy, steps: int) -> None: toy.steps.release(steps)


def test_stop_ends_after_the_current_step_and_go_on_continues(toy, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=3), tmp_path)
    assert (monitor.state, monitor.button) == ("ready", "Start")
    monitor.press("Start")
    assert (monitor.state, monitor.button) == ("training", "Stop")
    go(toy, 14)  # an epoch and four steps
    wait_for(lambda: monitor.last and monitor.last.epoch == 2 and monitor.last.step == 4, 30)
    assert len(monitor.losses) == 14 and len(monitor.rows) == 1
    monitor._handle_custom_msg({"pressed": "Stop"}, [])
    assert monitor.button == "" and "Stopping" in monitor.html
    go(toy, 1)
    assert len(monitor.wait()) == 1 and (monitor.state, monitor.button) == ("stopped", "Go on")
    assert toy.steps.acquire(blocking=False) is False  # no further step
    monitor.press("Start")  # a click on what the button no longer says
    assert monitor.state == "stopped"
    monitor.press("Go on")
    assert [at for at, loss in monitor.losses] == [step / 10 for step in range(1, 11)]  # of the whole epoch only
    go(toy, 20)
    assert monitor.wait().epoch.tolist() == [1, 2, 3] and (monitor.state, monitor.button) == ("done", "")
    assert toy.calls == [False, True] and "Done" in monitor.html and "89.00%" in monitor.html  # the best, not the last


def test_a_stop_that_comes_too_late_is_no_stop(toy, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=1), tmp_path, watchers=[lambda end: monitor.stop()]).start()
    go(toy, 10)
    assert len(monitor.wait()) == 1 and monitor.state == "done"


def test_one_training_at_a_time(toy, tmp_path):
    first, second = (TrainingMonitor(Settings(epochs=1), tmp_path / name) for name in ("first", "second"))
    first.start()
    second.press("Start")
    assert "first is under way" in second.html and second.state == "ready"
    go(toy, 10)
    first.wait()
    second.start()
    go(toy, 10)
    assert len(second.wait()) == 1


def test_a_training_that_fails_says_why(toy, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=1, learning_rate=2.0), tmp_path).start()
    go(toy, 1)
    with pytest.raises(InputError, match="too high"): monitor.wait()
    assert monitor.state == "failed" and "too high" in monitor.html


def test_interrupting_the_kernel_stops_the_training(toy, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=1), tmp_path).start()
    join, monitor.thread.join = monitor.thread.join, lambda *seconds: interrupt() if seconds else join()
    def interrupt():
        go(toy, 1)
        raise KeyboardInterrupt
    assert len(monitor.wait()) == 0 and monitor.state == "stopped"


def test_the_time_left_is_of_the_epochs_to_come(toy, tmp_path, monkeypatch):
    monitor = TrainingMonitor(Settings(epochs=4), tmp_path)
    monkeypatch.setattr(widgets.time, "perf_counter", lambda: 130.0)
    monitor.state, monitor.began, monitor.last = "training", (100.0, 1.0), StepEnd(2, 5, 10, None, 2345.6)  # half an epoch in 30 s
    assert monitor.words() == "Epoch 2 of 4, 2,346 images/s, about 150 s left."


def test_what_comes_after_a_training_appears_when_it_ends(toy, front_end, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=2), tmp_path).start()
    place = monitor.then(lambda: f"{len(monitor.history)} epochs")
    assert place.shown is None and monitor.state == "training"  # it did not wait
    go(toy, 11)
    wait_for(lambda: monitor.last and monitor.last.epoch == 2, 30)
    assert place.shown is None
    monitor.stop()
    go(toy, 1)
    wait_for(lambda: place.shown == "1 epochs", 30)
    assert monitor.then(lambda: "at once").shown == "at once"
    monitor.press("Go on")
    assert place.shown is None and "when the training has ended" in place.children[0].value
    go(toy, 10)
    wait_for(lambda: place.shown == "2 epochs", 30)


def test_after_a_first_epoch_that_was_not_finished_there_is_nothing_to_show(toy, front_end, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=2), tmp_path).start()
    place = monitor.then(lambda: pytest.fail("there is no model"))
    monitor.stop()
    go(toy, 1)
    wait_for(lambda: "before its first epoch" in place.children[0].value, 30)


def test_without_a_front_end_a_cell_waits_and_shows_errors(toy, tmp_path):
    monitor = TrainingMonitor(Settings(epochs=1), tmp_path).start()
    go(toy, 10)
    assert monitor.then(lambda: monitor.state).shown == "done"
    with pytest.raises(ZeroDivisionError): monitor.then(lambda: 1 / 0)
    assert "Done" in monitor._repr_mimebundle_()[0]["text/html"]


@pytest.mark.parametrize("shell, expected", [
    (None, False),
    (SimpleNamespace(), False),  # IPython in a terminal
    (SimpleNamespace(kernel=SimpleNamespace(get_parent=dict)), False),
    (SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": False}})), False),  # nbclient, papermill
    (SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda: {"content": {"allow_stdin": True}})), True),
])
def test_a_cell_knows_whether_a_person_can_answer(shell, expected, monkeypatch):
    monkeypatch.setattr(widgets, "get_ipython", lambda: shell)
    assert widgets.attended() is expected


def test_a_place_shows_widgets_tables_and_text(digits):
    table = Later(lambda: pd.DataFrame({"epoch": [1]}))
    table.fill()
    assert "<table" in table.children[0].value
    text = Later(lambda: "2 < 3")
    text.fill()
    assert text.children[0].value == "<p>2 &lt; 3</p>"
    playground = AugmentationPlayground(digits.images[:1], draws=1)
    widget = Later(lambda: playground)
    widget.fill()
    assert widget.children == (playground,) and "<img" in widget._repr_mimebundle_()["text/html"]


# Runs

@pytest.fixture
def reports(tmp_path):
    "Three runs; `old` is the oldest, and none was tested but `new`."
    for age, (name, accuracies) in enumerate({"new": [0.5, 0.9, 0.8], "middle": [0.6], "old": [0.7]}.items()):
        (tmp_path / name).mkdir()
        pd.DataFrame({"epoch": range(1, len(accuracies) + 1), "valid_accuracy": accuracies, "seconds": 10.0}).to_csv(
            tmp_path / name / "history.csv", index=False)
        run = {"parameters": {"arch": "base"}, "metrics": {"test_accuracy": 0.8765} if name == "new" else {}}
        (tmp_path / name / "run.json").write_text(json.dumps(run))
        os.utime(tmp_path / name / "history.csv", (1e9 - age, 1e9 - age))
    return tmp_path


def test_the_two_newest_runs_are_chosen(reports):
    picker = RunPicker(reports)
    assert picker.choices == ["new", "middle", "old"] and picker.chosen == ["new", "middle"]
    assert RunPicker(reports, []).chosen == [] and "No run is chosen" in RunPicker(reports, []).html
    with pytest.raises(InputError, match="did you mean 'old'"): RunPicker(reports, ["odl"])


def test_a_row_has_the_best_accuracy_and_all_seconds(reports):
    cells = RunPicker(reports, ["new"]).html
    assert "90.00%" in cells and "80.00%" not in cells and "87.65%" in cells and ">30<" in cells
    assert "87.65%" not in RunPicker(reports, ["old"]).html and "–" in RunPicker(reports, ["old"]).html


def test_two_runs_are_compared_if_both_have_predictions(reports):
    picker = RunPicker(reports, ["new", "middle"])
    assert "both need their test predictions" in picker.html
    labels, wrong = np.arange(1000) % 10, np.roll(np.eye(10, dtype=np.float32), 1, axis=1)
    for name, errors in {"new": 0, "middle": 300}.items():
        logits = np.eye(10, dtype=np.float32)[labels]
        logits[:errors] = wrong[labels[:errors]]
        np.savez(reports / name / "predictions.npz", labels=labels, logits=logits)
    picker.chosen = ["middle", "new"]
    assert "300" in picker.html and "Choose two runs" not in picker.html and "both need" not in picker.html
    picker.chosen = ["new", "middle", "old"]
    assert "Choose two runs" in picker.html


def test_a_run_that_is_gone_is_named(reports):
    picker = RunPicker(reports, [])
    (reports / "old" / "history.csv").unlink()
    picker.chosen = ["old"]
    assert "history.csv" in picker.html
    assert "There are no runs" in RunPicker(reports / "old").html
