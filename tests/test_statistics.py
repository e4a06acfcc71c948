"""Every figure with its uncertainty against an independent computation: exact distributions, statsmodels, plain counts."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from scipy.special import softmax
from sklearn.metrics import log_loss
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from torch import nn

from mnist_nb import inspection, leaderboard, metrics, slices
from mnist_nb.data import Digits, load_digits, load_test_digits, sample_test_numbers, strata_order
from mnist_nb.display import Column, ConfusionMatrix, matrix_table
from mnist_nb.runs import InputError


def exact_quantiles(n: int, gained: int, lost: int, level: float) -> np.ndarray:
    "The ends of the central interval of gains minus losses among n images drawn with replacement, from their exact distribution."
    step = np.array([lost / n, 1 - (gained + lost) / n, gained / n])  # of one image: -1, 0, 1
    chances, power = np.ones(1), n
    while power:  # n-fold convolution by repeated squaring
        if power % 2: chances = np.convolve(chances, step)
        step, power = np.convolve(step, step), power // 2
    below = chances.cumsum()
    return np.array([np.searchsorted(below, (1 - level) / 2), np.searchsorted(below, (1 + level) / 2)]) - n


@pytest.mark.parametrize(("n", "gained", "lost"), [(1000, 40, 10), (5000, 60, 130), (500, 30, 30)])
def test_the_interval_of_a_comparison_is_an_exact_95_percent(n, gained, lost):
    labels, one, other = np.zeros(n, int), np.zeros(n, int), np.zeros(n, int)
    one[:gained], other[gained:gained + lost] = 1, 1
    result = metrics.compare(labels, one, other)
    found, exact = np.array(result["interval"]) * n, exact_quantiles(n, gained, lost, 0.95)
    assert np.abs(found - exact).max() <= 1  # in images; 90% and 99% lie at least 1.5 further in or out
    for level in (0.9, 0.99): assert np.abs(found - exact_quantiles(n, gained, lost, level)).min() > 1
    assert (result["difference"], result["only_second"], result["only_first"]) == ((gained - lost) / n, gained, lost)
    assert (result["first_accuracy"], result["second_accuracy"]) == (1 - gained / n, 1 - lost / n)
    assert result["p_value"] == pytest.approx(min(1, 2 * stats.binom.cdf(min(gained, lost), gained + lost, 0.5)))
    back = metrics.compare(labels, other, one)
    assert back["difference"] == -result["difference"] and back["p_value"] == result["p_value"]


def test_a_bootstrap_interval_is_an_exact_95_percent():
    matrix = np.array([[900, 60], [40, 1000]])
    def accuracy(drawn): return np.trace(drawn, axis1=-2, axis2=-1) / drawn.sum((-2, -1))
    low, high = metrics.bootstrap_interval(matrix, accuracy, draws=20_000)
    exact = stats.binom.ppf([0.025, 0.975], 2000, 0.95) / 2000
    np.testing.assert_allclose([low, high], exact, atol=1.5 / 2000)
    assert low < stats.binom.ppf(0.05, 2000, 0.95) / 2000 - 1 / 2000 and high > stats.binom.ppf(0.95, 2000, 0.95) / 2000 + 1 / 2000


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 10), (9886, 10_000), (81, 263), (30, 30)])
def test_wilson_agrees_with_statsmodels(hits, n):
    np.testing.assert_allclose(metrics.wilson_interval(hits, n), proportion_confint(hits, n, 0.05, method="wilson"), atol=1e-12)
    low, high = proportion_confint(hits, n, 0.05, method="wilson")
    np.testing.assert_allclose(metrics.f1_interval(hits, n), (2 * low / (1 + low), 2 * high / (1 + high)), atol=1e-12)


@pytest.fixture(scope="module")
def guesses():
    "Labels, and logits that are overconfident: probabilities of which the labels were drawn, three times as far apart."
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 10)) * 1.5
    labels = (softmax(logits, axis=1).cumsum(1) < random.random((4000, 1))).sum(1).clip(0, 9)
    return labels, logits * 3


def test_calibration_error_agrees_with_a_plain_count(guesses):
    labels, logits = guesses
    probabilities = softmax(logits, axis=1)
    confidence, right, gap = probabilities.max(1), probabilities.argmax(1) == labels, 0.0
    table = metrics.reliability(labels, probabilities)
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap += inside.sum() / 4000 * abs(confidence[inside].mean() - right[inside].mean())
            row = table[table.bin == k].iloc[0]
            assert (row.images, row.accuracy) == (inside.sum(), right[inside].mean())
            assert row.confidence == pytest.approx(confidence[inside].mean())
            low, high = proportion_confint(right[inside].sum(), inside.sum(), method="wilson")
            assert (row.low, row.high) == (pytest.approx(low), pytest.approx(high))
    figures = metrics.trust(labels, logits)
    assert figures["calibration_error"] == pytest.approx(gap)
    assert figures["overconfidence"] == pytest.approx(confidence.mean() - right.mean()) and figures["overconfidence"] > 0.1


def test_brier_score_and_likelihood_with_their_intervals(guesses):
    labels, logits = guesses
    figures, probabilities = metrics.trust(labels, logits, temperature=3.0), softmax(logits / 3, axis=1)
    assert figures["negative_log_likelihood"] == pytest.approx(log_loss(labels, probabilities, labels=range(10)))
    squares = np.array([((row - np.eye(10)[label]) ** 2).sum() for row, label in zip(probabilities, labels)])
    minus_logs = -np.log(probabilities[np.arange(4000), labels])
    for name, values in (("brier_score", squares), ("negative_log_likelihood", minus_logs)):
        assert figures[name] == pytest.approx(values.mean())
        expected = stats.norm.interval(0.95, values.mean(), values.std() / 4000**0.5)
        np.testing.assert_allclose(figures[f"{name}_interval"], expected, rtol=1e-4)


def test_the_limit_of_chance_is_passed_one_time_in_twenty(guesses):
    "Fresh draws of a calibrated model, 15 bins: a share of 5% lies above the limit."
    probabilities = softmax(guesses[1][:500] / 3, axis=1)
    limit, random, above = metrics.calibration_limit(probabilities), np.random.default_rng(5), []
    confidence = probabilities.max(1)
    place = np.ceil(confidence * 15).astype(int)
    for _ in range(4000):
        labels = (probabilities.cumsum(1) < random.random((500, 1))).sum(1)
        gaps = np.bincount(place, (probabilities.argmax(1) == labels) - confidence)  # of the sums in each bin
        above.append(np.abs(gaps).sum() / 500 > limit)
    assert 0.035 < np.mean(above) < 0.07


def test_the_temperature_is_the_most_likely_one(guesses):
    labels, logits = guesses
    scales = np.linspace(2.6, 3.4, 81)
    best = scales[np.argmin([log_loss(labels, softmax(logits / scale, axis=1), labels=range(10)) for scale in scales])]
    assert metrics.fit_temperature(labels, logits) == pytest.approx(best, abs=0.01) and 2.7 < best < 3.3
    assert metrics.fit_temperature(labels, logits / 10) == pytest.approx(best / 10, abs=0.01)


def test_setting_aside_takes_the_least_confident(guesses):
    labels, logits = guesses
    probabilities = softmax(logits, axis=1)
    order = np.argsort(-probabilities.max(1), kind="stable")
    rows = metrics.asking_table(metrics.coverage_curve(labels, probabilities), (0.0, 0.01, 0.1)).itertuples()
    for row, kept in zip(rows, (4000, 3960, 3600), strict=True):
        right = (probabilities.argmax(1) == labels)[order[:kept]]
        assert (row.asked, row.errors, row.accuracy) == (4000 - kept, (~right).sum(), pytest.approx(right.mean()))
        np.testing.assert_allclose((row.accuracy_low, row.accuracy_high), proportion_confint(right.sum(), kept, method="wilson"))


def test_macro_averages_leave_out_digits_that_never_occur():
    found = metrics.classification_metrics(np.array([3, 3, 4, 4]), np.array([3, 4, 4, 4]))
    assert found["macro"]["precision"] == pytest.approx((1 + 2 / 3) / 2) and found["macro"]["recall"] == pytest.approx(0.75)
    assert found["per_class"][3]["errors"] == 1 and found["per_class"][4]["errors"] == 0 and found["accuracy"] == 0.75
    low, high = proportion_confint(1, 2, method="wilson")
    assert (found["per_class"][3]["recall_low"], found["per_class"][3]["recall_high"]) == (pytest.approx(low), pytest.approx(high))


def test_holm_agrees_with_statsmodels():
    p_values = np.random.default_rng(0).random(14) ** 3
    np.testing.assert_allclose(slices.holm(p_values), multipletests(p_values, method="holm")[1])


def test_slices_agree_with_fisher_by_hand_and_holm():
    random = np.random.default_rng(1)
    members, right = random.random((3, 600)) < [[0.2], [0.5], [0.7]], random.random(600) < 0.9
    right &= ~members[0] | (random.random(600) < 0.8)  # the first slice is weaker
    frame = pd.DataFrame({"property": "made up", "slice": list("abc"), "range": "", "members": list(members)})
    p_values = []
    for inside in members:  # two-sided: every table with the same margins that is no more likely
        tables = stats.hypergeom(600, right.sum(), inside.sum())
        chances, own = tables.pmf(np.arange(601)), tables.pmf(right[inside].sum())
        p_values.append(chances[chances <= own * (1 + 1e-7)].sum())
    table = slices.slice_table(frame, right)
    np.testing.assert_allclose(table.p_value, multipletests(p_values, method="holm")[1])
    np.testing.assert_allclose(table.cost, [(~right[inside]).sum() - inside.sum() * (~right).mean() for inside in members])
    np.testing.assert_allclose(table.accuracy, [right[inside].mean() for inside in members])
    assert table.errors.tolist() == [(~right[inside]).sum() for inside in members] and table.images.tolist() == members.sum(1).tolist()
    assert "The weakest slice is made up, a" in slices.describe_weakest(table, right.mean())


def test_slices_are_thirds_and_halves_by_number_in_the_file():
    digits, numbers = load_test_digits(3000), sample_test_numbers(3000)
    cut = slices.cut_slices(digits.images, numbers)
    for name in set(slices.PROPERTIES) - {"size"}:  # sizes are whole pixels: many images have the same
        assert all(800 < members.sum() < 1200 for members in cut[cut.property == name].members)
    ink = digits.images.reshape(3000, -1).mean(1)
    by_ink = [ink[members].mean() for members in cut[cut.property == "ink"].members]
    assert by_ink == sorted(by_ink)
    students, employees = cut[cut.property == "writers"].members
    assert (students == (numbers < 5000)).all() and (employees == (numbers >= 5000)).all() and abs(students.sum() - 1500) <= 2


@pytest.mark.parametrize("n", [50, 1000, 5000, 9999])
def test_a_smaller_test_set_is_a_stratified_sample(n):
    "As many students' images as employees', the digits as often as in the whole; always the same; no image twice; by number in the file."
    numbers, everything = sample_test_numbers(n), load_digits("test")
    assert len(np.unique(numbers)) == n and (np.diff(numbers) > 0).all()
    assert abs((numbers < 5000).sum() - n / 2) <= 10
    assert np.abs(np.bincount(everything.labels[numbers], minlength=10) - np.bincount(everything.labels) * n / 10_000).max() <= 3
    np.testing.assert_array_equal(load_test_digits(n).images, everything.images[numbers])
    assert set(sample_test_numbers(n // 2)) < set(numbers)


def test_the_sample_never_changes():
    "Runs of different machines and times are compared image by image: these are the numbers that every version must draw."
    assert sample_test_numbers(12).tolist() == [1233, 1709, 2270, 2541, 3561, 4476, 4613, 6990, 7539, 7641, 8765, 9489]
    order = strata_order(np.arange(40) % 4)
    assert all(sorted(np.arange(40)[order[i:i + 4]] % 4) == [0, 1, 2, 3] for i in (0, 4, 36)) and not (np.diff(order) > 0).all()


def predictions(numbers, wrong=()):
    "Predictions of test images by number, wrong for some of them."
    labels = load_digits("test").labels[numbers]
    digits = np.where(np.isin(numbers, list(wrong)), (labels + 1) % 10, labels)
    return metrics.Predictions(labels, np.eye(10, dtype=np.float32)[digits], np.asarray(numbers))


def test_runs_on_different_samples_are_paired_by_image(tmp_path):
    few, many = predictions(sample_test_numbers(100), wrong=range(0, 10_000, 3)), predictions(sample_test_numbers(300), wrong=range(5000))
    labels, one, other = metrics.common_predictions(few, many)
    common = sample_test_numbers(100)
    np.testing.assert_array_equal(labels, load_digits("test").labels[common])
    np.testing.assert_array_equal(one != labels, common % 3 == 0)
    np.testing.assert_array_equal(other != labels, common < 5000)
    apart = predictions(np.setdiff1d(np.arange(200), common))
    with pytest.raises(InputError, match="no test image in common"): metrics.common_images(few, apart)
    with pytest.raises(InputError, match="their labels differ"): metrics.common_images(few, few._replace(labels=9 - few.labels))
    for name, run in (("few", few), ("many", many)):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "predictions.npz", **run._asdict())
    right = leaderboard.right_or_wrong(tmp_path, ["few", "many"])
    np.testing.assert_array_equal(right, [common % 3 != 0, common >= 5000])
    np.savez(tmp_path / "few" / "predictions.npz", labels=few.labels, logits=few.logits)  # as older versions wrote them
    np.testing.assert_array_equal(metrics.load_predictions(tmp_path / "few").numbers, np.arange(100))


def test_a_comparison_speaks_of_two_models_and_of_other_seeds():
    labels = np.zeros(1000, int)
    worse = np.where(np.arange(1000) < 50, 1, 0)
    words = metrics.describe_comparison(metrics.compare(labels, worse, labels), "a", "b")
    assert words.startswith("This model of b is better than this model of a: +5.00 points") and "with other seeds" in words
    words = metrics.describe_comparison(metrics.compare(labels, labels, worse), "a", "b")
    assert words.startswith("This model of b is worse than this model of a: -5.00 points") and "with other seeds" in words
    few = np.where(np.arange(1000) < 3, 1, 0)
    words = metrics.describe_comparison(metrics.compare(labels, labels, few), "a", "b")
    assert "may be chance" in words and "better" not in words and "with other seeds" in words
    assert "compared with itself" in metrics.describe_comparison(metrics.compare(labels, few, few), "a", "a")
    copies = metrics.describe_comparison(metrics.compare(labels, few, few), "a", "b")
    assert "the same prediction for each of the 1,000 images, 997 of them right" in copies and "copies of one model" in copies


def test_out_of_sample_means_out_of_sample(monkeypatch):
    "No image is judged by a model that was trained on it; each is judged once, and the answer stands at its place."
    images = np.zeros((90, 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(90)  # the number of an image is in its corner
    digits, trained, judged = Digits(images, np.arange(90) % 10), [], []
    def train_epoch(model, optimizer, scheduler, images, labels, batches, settings, *more):
        trained.append(set(images[:, 0, 0][batches.flatten()].tolist()))
        assert (labels == images[:, 0, 0].long() % 10).all()
    def predict_logits(model, images):
        judged.append(set(images[:, 0, 0].tolist()))
        return nn.functional.one_hot(images[:, 0, 0].long() % 7, 10).float() * 20
    monkeypatch.setattr(inspection, "train_epoch", train_epoch)
    monkeypatch.setattr(inspection, "predict_logits", predict_logits)
    probabilities = inspection.out_of_sample(digits)
    assert sorted(number for part in judged for number in part) == list(range(90)) and len(judged) == 3
    epochs = len(trained) // 3
    for i, part in enumerate(judged): assert not set.union(*trained[i * epochs:(i + 1) * epochs]) & part
    np.testing.assert_array_equal(probabilities.argmax(1), np.arange(90) % 7)


def test_only_a_good_judge_suspects_labels():
    labels = np.arange(1000) % 10
    probabilities = np.eye(10)[labels] * 0.98 + 0.002
    doubtful = labels.copy()
    doubtful[:5] = (labels[:5] + 1) % 10
    assert set(inspection.suspect_labels(doubtful, probabilities)) == set(range(5))
    for wrong, judge in ((95, True), (105, False)):  # right on 90% or more
        said = probabilities.copy()
        said[-wrong:] = np.roll(said[-wrong:], 1, axis=1)
        assert bool(len(inspection.suspect_labels(labels, said))) == judge


def test_saliency_of_a_linear_model_is_its_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    images = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    weights = model[1].weight.detach().view(10, 28, 28)
    found = inspection.saliency(model, images, np.array([3, 7]), np.array([8, 1]))
    np.testing.assert_allclose(found, torch.stack([weights[3] - weights[8], weights[7] - weights[1]]), atol=1e-6)


def test_nearest_is_nearest():
    random = torch.Generator().manual_seed(0)
    points, among = torch.randn(5, 4, generator=random), torch.randn(40, 4, generator=random)
    plain = np.argsort(((points[:, None] - among) ** 2).sum(2).numpy(), axis=1)[:, :3]
    np.testing.assert_array_equal(inspection.nearest(points, among), plain)


def test_corruptions_go_both_ways_and_leave_the_generator_alone():
    bars = np.zeros((40, 28, 28), np.uint8)
    bars[:, 4:24, 12:16] = 255
    torch.manual_seed(0)
    before = torch.get_rng_state()
    slants = slices.measure_slant(slices.corrupt(bars, "shear", 30))
    assert torch.equal(before, torch.get_rng_state()) and 5 < (slants > 20).sum() < 35 and (np.abs(slants) > 20).all()
    moved = slices.corrupt(bars, "shift", 4).astype(float)
    right = (moved.sum(1) * np.arange(28)).sum(1) / moved.sum((1, 2)) - 13.5
    down = (moved.sum(2) * np.arange(28)).sum(1) / moved.sum((1, 2)) - 13.5
    np.testing.assert_allclose(np.hypot(right, down), 4, atol=0.3)
    assert right.min() < -2 and right.max() > 2 and down.min() < -2 and down.max() > 2
    holes = slices.corrupt(np.full((40, 28, 28), 255, np.uint8), "occlusion", 10) == 0
    assert len({hole.tobytes() for hole in holes}) > 35
    table = slices.corruption_table(lambda images: np.full(len(images), 1), bars, np.repeat([1, 2], 20))
    assert (table.accuracy == 0.5).all() and len(table) == 30
    np.testing.assert_allclose(table[["accuracy_low", "accuracy_high"]].iloc[0], proportion_confint(20, 40, method="wilson"))


def test_matrix_rows_are_true_digits_and_images_keep_their_numbers():
    labels, numbers = np.array([4, 4, 4, 9]), np.array([70, 80, 90, 100])
    probabilities = np.full((4, 10), 0.01)
    probabilities[[0, 1, 2, 3], [9, 9, 4, 9]] = [0.5, 0.8, 0.9, 0.7]
    shown = ConfusionMatrix(np.zeros((4, 28, 28), np.uint8), labels, probabilities, numbers=numbers)
    assert [item["index"] for item in shown.images["4,9"]["shown"]] == [80, 70]  # surest first
    assert shown.selected == [4, 9] and shown.indices.tolist() == [1, 0]
    assert shown.images["4,9"]["shown"][0]["top"][0] == (9, 0.8) and "9,4" not in shown.images
    table = matrix_table(metrics.count_confusions(labels, probabilities.argmax(1)), "view")
    assert 'data-label="true 4, predicted 9: 2 images"' in table and 'data-label="true 9, predicted 4: 0 images"' in table
    assert '<span class="count">2</span><span class="share">66.7</span>' in table  # of the true digit


def test_a_cell_shows_its_interval_and_its_bar():
    column = Column("recall", "{:.1%}", interval=True, scale=(0.5, 1.0))
    cell = column.cell({"recall": 0.9, "recall_low": 0.75, "recall_high": 0.95}, "recall")
    assert "--low:0.500;--high:0.900" in cell and "90.0%<small>75.0 to 95.0</small>" in cell
    assert "--shade:0.250" in Column("lost", "{:.1%}", heat=(1.0, 0.6)).cell({"lost": 0.9}, "lost")
