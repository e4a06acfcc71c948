"""The figures of a report, against other implementations of them, and reports of models that are extreme."""

import json
import re
import warnings

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from markupsafe import escape
from scipy.special import softmax
from scipy.stats import fisher_exact
from sklearn.metrics import log_loss, precision_recall_fscore_support
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from mnist_nb import error_analysis, metrics
from mnist_nb.data import Digits, load_digits, load_test_digits, sample_test_numbers
from mnist_nb.models import ARCHITECTURES, create_model, save_checkpoint
from mnist_nb.recipes import Settings


def table(page, heading):
    "The first table below a heading, as numbers by the name of the column."
    rows = page.locator(f"h2[id='{heading}']").evaluate("""heading => {
      const after = table => heading.compareDocumentPosition(table) & Node.DOCUMENT_POSITION_FOLLOWING;
      const table = [...document.querySelectorAll("table")].find(after);
      const names = [...table.tHead.rows[0].cells].map(cell => cell.innerText.trim());
      return [...table.tBodies[0].rows].map(row => Object.fromEntries([...row.cells].flatMap((cell, i) => [
        [names[i], cell.dataset.value], [`${names[i]} low`, cell.dataset.low], [`${names[i]} high`, cell.dataset.high]])));
    }""")
    return pd.DataFrame(rows).apply(pd.to_numeric, errors="coerce")


@pytest.fixture(scope="module")
def page(browser, small_run):
    page = browser.new_page()
    page.goto((small_run / "03_error_analysis.html").as_uri())
    return page


@pytest.fixture(scope="module")
def judged(small_run):
    stored = np.load(small_run / "predictions.npz")
    return stored["labels"], stored["logits"].astype(float)


def test_each_digit_agrees_with_scikit_learn_and_statsmodels(page, judged):
    labels, logits = judged
    predicted, shown = logits.argmax(1), table(page, "Each-digit")
    for name, values in zip(("precision", "recall", "F1", "support"), precision_recall_fscore_support(labels, predicted)):
        np.testing.assert_allclose(shown[name].astype(float), values)
    right, found = np.bincount(labels[labels == predicted], minlength=10), np.bincount(predicted, minlength=10)
    for name, n in (("precision", found), ("recall", np.bincount(labels))):
        low, high = proportion_confint(right, n, method="wilson")
        np.testing.assert_allclose(shown[f"{name} low"].astype(float), low)
        np.testing.assert_allclose(shown[f"{name} high"].astype(float), high)
    np.testing.assert_array_equal(shown.errors, np.bincount(labels) - right)
    low, high = proportion_confint(np.bincount(labels) - right, np.bincount(labels), method="wilson")
    np.testing.assert_allclose(shown["errors low"], low * np.bincount(labels), atol=1e-9)
    np.testing.assert_allclose(shown["errors high"], high * np.bincount(labels))
    jaccard = np.array(proportion_confint(right, np.bincount(labels) + found - right, method="wilson"))
    np.testing.assert_allclose(shown[["F1 low", "F1 high"]].T, 2 * jaccard / (1 + jaccard))


def test_trust_agrees_with_a_plain_count(page, judged, small_run):
    labels, logits = judged
    subject = error_analysis.load_subject(small_run, 1000, "cpu")
    valid = subject.logits_of(subject.valid.images).astype(float)  # the temperature comes from validation, not from the test set
    scales = np.exp(np.linspace(np.log(0.05), np.log(20), 2000))
    temperature = scales[np.argmin([log_loss(subject.valid.labels, softmax(valid / scale, axis=1), labels=range(10)) for scale in scales])]
    stored = json.loads((small_run / "metrics.json").read_text())["trust"]["temperature"]
    assert stored == pytest.approx(temperature, rel=0.01)
    shown = table(page, "Trust")
    for row, divisor in ((0, 1.0), (1, stored)):
        probabilities = softmax(logits / divisor, axis=1)
        confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
        gap = 0.0
        for k in range(15):
            inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
            if inside.any(): gap += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
        brier = np.mean([((p - np.eye(10)[label]) ** 2).sum() for p, label in zip(probabilities, labels)])
        assert float(shown["expected calibration error"][row]) == pytest.approx(gap)
        assert float(shown["Brier score"][row]) == pytest.approx(brier)
        assert float(shown["negative log-likelihood"][row]) == pytest.approx(log_loss(labels, probabilities, labels=range(10)))


def test_slices_agree_with_a_plain_count(page, judged):
    labels, logits = judged
    shown, right = table(page, "Weak-slices"), logits.argmax(1) == labels
    ink = load_test_digits(1000).images.reshape(1000, -1).mean(1)
    little = ink <= np.quantile(ink, 1 / 3)
    rows = page.locator("tr", has=page.get_by_role("rowheader", name="little", exact=True)).evaluate(
        "row => [...row.cells].map(cell => cell.dataset.value)")
    assert [float(rows[i]) for i in (2, 3, 6)] == [right[little].mean(), (~right[little]).sum(), little.sum()]
    assert float(rows[5]) >= fisher_exact([[right[little].sum(), (~right[little]).sum()],
                                           [right[~little].sum(), (~right[~little]).sum()]]).pvalue  # Holm makes it no smaller
    assert shown.images[:3].sum() == 1000


def test_heat_map_agrees_with_the_model(page, small_run):
    subject = error_analysis.load_subject(small_run, 1000, "cpu")
    shown = table(page, "Corrupted-pictures")
    negative = subject.logits_of(255 - subject.test.images).argmax(1) == subject.test.labels
    assert shown.severe.iloc[-1] == pytest.approx(negative.mean(), abs=0.003)  # a rounded grey value may tip an image
    brighter = np.minimum(subject.test.images.astype(int) + 51, 255).astype(np.uint8)
    assert shown.mild.iloc[-2] == pytest.approx((subject.logits_of(brighter).argmax(1) == subject.test.labels).mean(), abs=0.003)


def test_asking_agrees_with_a_plain_count(page, judged, small_run):
    labels, logits = judged
    temperature = json.loads((small_run / "metrics.json").read_text())["trust"]["temperature"]
    confidence = softmax(logits / temperature, axis=1).max(1)
    kept = np.argsort(-confidence, kind="stable")[:950]
    right = (logits.argmax(1) == labels)[kept]
    row = page.locator("tr", has=page.get_by_role("rowheader", name="5.0%"))
    cells = row.evaluate("row => [...row.cells].map(cell => Number(cell.dataset.value))")
    assert cells[1:] == [50, (~right).sum(), pytest.approx(right.mean())]


def test_mcnemar_agrees_with_statsmodels():
    random = np.random.default_rng(1)
    labels = random.integers(0, 10, 500)
    one, other = (np.where(random.random(500) < share, (labels + 1) % 10, labels) for share in (0.1, 0.06))
    both = [[np.sum((one == labels) & (other == labels)), np.sum((one == labels) & (other != labels))],
            [np.sum((one != labels) & (other == labels)), np.sum((one != labels) & (other != labels))]]
    assert metrics.compare(labels, one, other)["p_value"] == pytest.approx(mcnemar(both, exact=True).pvalue)


def test_the_bootstrap_interval_holds_what_it_promises():
    "Of many samples from the same population, the intervals of some 95% hold the population's F1."
    population, held = np.array([[80, 10, 0], [5, 90, 5], [5, 5, 100]]), []
    truth = metrics.f1_scores(population)
    for drawn in np.random.default_rng(0).multinomial(400, population.ravel() / population.sum(), size=200).reshape(200, 3, 3):
        low, high = metrics.bootstrap_interval(drawn, metrics.f1_scores, draws=300)
        held.append((low <= truth) & (truth <= high))
    assert 0.9 < np.mean(held) < 0.98


def toy_subject(valid_scale: float) -> error_analysis.Subject:
    "A model of ten pixels: on validation images its logits are so many times as large as on test images."
    random = np.random.default_rng(0)
    logits = random.integers(0, 8, (2000, 10))
    labels = (softmax(logits, axis=1).cumsum(1) < random.random((2000, 1))).sum(1).clip(0, 9)
    def digits(scale):
        images = np.zeros((2000, 28, 28), np.uint8)
        images[:, 0, :10] = logits * scale
        return Digits(images, labels)
    class Pixels(nn.Module):
        def forward(self, x): return x[:, 0, 0, :10] * 255
    return error_analysis.Subject(Pixels(), "toy", torch.device("cpu"), None, digits(valid_scale), digits(1), None,
                                  np.arange(2000) * 5)


def test_the_temperature_comes_from_validation_and_divides_the_logits_of_the_test_set():
    subject = toy_subject(valid_scale=4)
    assert subject.temperature == pytest.approx(4, rel=0.1) and toy_subject(valid_scale=1).temperature == pytest.approx(1, rel=0.1)
    np.testing.assert_allclose(subject.calibrated, softmax(subject.logits / subject.temperature, axis=1), atol=1e-7)
    np.testing.assert_allclose(subject.probabilities, softmax(subject.logits, axis=1), atol=1e-7)
    figures = error_analysis.trust_table(subject)[1]
    assert figures["before"]["calibration_error"] < figures["after"]["calibration_error"]  # what validation advises does harm here
    assert figures["after"]["negative_log_likelihood"] == pytest.approx(log_loss(subject.test.labels, subject.calibrated))


def test_the_worst_errors_are_those_with_the_least_probability_for_the_truth():
    subject = toy_subject(valid_scale=1)
    chances = subject.probabilities[np.arange(2000), subject.test.labels]
    wrong = sorted(np.flatnonzero(~subject.right), key=lambda index: chances[index])
    found = error_analysis.worst_errors(subject.test.labels, subject.logits, 30)
    np.testing.assert_allclose(chances[found], chances[wrong[:30]])
    assert not subject.right[found].any() and len(set(found)) == 30


def test_images_are_called_by_their_number_in_the_test_file():
    subject = toy_subject(valid_scale=1)
    pair = np.flatnonzero((subject.test.labels == 3) & (subject.predicted != 3))
    taken_for = np.bincount(subject.predicted[pair]).argmax()
    inside = pair[subject.predicted[pair] == taken_for]
    surest = inside[np.argsort(-subject.probabilities[inside, taken_for], kind="stable")][0]
    assert f'alt="Image {surest * 5}, 3 taken for {taken_for}"' in error_analysis.confusion_table(subject)
    gallery = error_analysis.suspect_gallery(subject.test, subject.probabilities, np.array([7]), subject.numbers)
    assert "#35: labelled" in gallery and "Image 35," in gallery
    assert subject.predictions.numbers is subject.numbers


def test_stored_predictions_say_which_images_they_are_of(tmp_path):
    subject = toy_subject(valid_scale=1)
    error_analysis.write_analysis(tmp_path, subject.predictions, metrics.classification_metrics(subject.test.labels, subject.predicted))
    stored = metrics.load_predictions(tmp_path)
    for own, other in zip(stored, (subject.test.labels, subject.logits, subject.numbers)): np.testing.assert_array_equal(own, other)
    table = pd.read_csv(tmp_path / "confusion_matrix.csv", index_col=0)
    assert table.loc[3, "5"] == ((subject.test.labels == 3) & (subject.predicted == 5)).sum()  # rows are true digits


def test_the_small_run_was_tested_on_the_sample(judged, small_run):
    assert metrics.load_predictions(small_run).numbers.tolist() == sample_test_numbers(1000).tolist()
    np.testing.assert_array_equal(judged[0], load_test_digits(1000).labels)


class Memory(nn.Module):
    "Knows some of the test images by heart, and nothing else."
    def __init__(self, images=200):
        super().__init__()
        digits = load_test_digits(images)
        known = create_model("base")[0](torch.from_numpy(digits.images).float().flatten(1) / 255)
        self.look, self.say = nn.Linear(784, images), nn.Linear(images, 10)
        with torch.no_grad():
            self.look.weight.copy_(known)
            self.look.bias.copy_(-0.5 * (known ** 2).sum(1))  # with it, the nearest image has the largest product
            self.say.weight.copy_(torch.eye(10)[torch.from_numpy(digits.labels)].T * 20)
            self.say.bias.zero_()

    def forward(self, x): return self.say((self.look(x.flatten(1)) * 5).softmax(1))


def sevens():
    "Says 7, whatever it is shown."
    network = ARCHITECTURES["base"]()
    nn.init.zeros_(network[-1].weight)
    with torch.no_grad(): network[-1].bias.copy_(torch.eye(10)[7] * 4)
    return network


def report_of(build, folder, monkeypatch, test_images, compare_with=""):
    "Runs the stage's second half on a model of its own, with warnings as errors; returns its variables."
    monkeypatch.setitem(ARCHITECTURES, "extreme", build)
    settings = vars(Settings(arch="base", train_images=1000, valid_images=200))
    save_checkpoint(folder / "checkpoints" / "best_model.pth", {"arch": "extreme", "model": create_model("extreme").state_dict(),
                                                                "settings": settings})
    cells = [cell for cell in nbformat.read(ROOT / "nbs" / "03_error_analysis.ipynb", 4).cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    names = {"display": lambda *shown, **options: None}
    exec(cells[2].source, names)  # the notebook's own imports
    names |= {name: value for name, value in vars(error_analysis).items() if not name.startswith("__")}
    exec(cells[at].source, names)
    names |= {"run_dir": str(folder), "test_images": test_images, "compare_with": compare_with, "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cell in cells[at + 1:]: exec(cell.source, names)
        assert "text/html" in names["confusions"]._repr_mimebundle_()[0]
    return names


def test_report_of_a_perfect_model(tmp_path, monkeypatch):
    names = report_of(Memory, tmp_path, monkeypatch, 200)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["errors"] == 0 and names["confusions"].selected == []
    for words in ("There are no errors.", "Every digit is recognised equally often: 100.00%.", "No slice is weak: there are no errors.",
                  "There is no error that a person could mend.", "cleanlab asks for a second look at none of the 200 test labels."):
        assert words in stored["findings"]
    assert "There are no errors to show." in error_analysis.error_gallery(names["subject"])


def test_report_of_a_model_that_always_says_seven(tmp_path, monkeypatch):
    names = report_of(sevens, tmp_path, monkeypatch, 500)
    found = json.loads((tmp_path / "metrics.json").read_text())["findings"]
    assert found[0] == "Every image is taken for a 7." and found[1].startswith("Most frequent of ")
    assert "No corruption lowers the accuracy." in found and any("says little about their labels" in words for words in found)
    assert [column for column in range(10) if names["matrix"][:, column].any()] == [7]
    assert json.loads((tmp_path / "run.json").read_text())["metrics"]["test_errors"] == (load_test_digits(500).labels != 7).sum()


def test_report_of_an_untrained_model(tmp_path, monkeypatch):
    torch.manual_seed(0)
    report_of(ARCHITECTURES["improved"], tmp_path, monkeypatch, 500)
    found = json.loads((tmp_path / "metrics.json").read_text())["findings"]
    assert "is not shown to be better than that of always saying" in found[0]
    assert "NaN" not in (tmp_path / "metrics.json").read_text()


@pytest.mark.parametrize("test_images", [1, 10])
def test_report_of_very_few_images(tmp_path, monkeypatch, test_images):
    report_of(Memory, tmp_path, monkeypatch, test_images)
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert stored["n"] == test_images and stored["macro"]["f1"] == 1.0


def test_report_that_compares(tmp_path, monkeypatch):
    report_of(Memory, tmp_path / "first", monkeypatch, 200)
    names = report_of(sevens, tmp_path / "second", monkeypatch, 500, compare_with="first")
    words = names["findings"][-1]
    sevens_there = (load_test_digits(200).labels == 7).sum()  # which are part of the larger sample
    assert words.startswith("This model of second is worse than this model of first: ") and "on 200 images" in words
    numbers = np.load(tmp_path / "first" / "predictions.npz")["numbers"]
    others = numbers[load_test_digits(200).labels != 7]
    shown = re.findall(r"<figcaption>#(\d+): (\d)", str(names["compared"]))
    assert [int(number) for number, _ in shown] == others[:12].tolist()
    assert all(load_digits("test").labels[int(number)] == int(label) for number, label in shown)
    assert f"0 images that only second gets right, {200 - sevens_there} that only first does" in words
    assert escape(words) in names["compared"] and names["compared"].count("<li>") == 12
    errors = re.findall(r'data-value="(\d+)">', str(names["compared"]))
    assert str(sevens_there) in errors
