"""The pages in a real browser, from file://, as a reader opens them."""

import csv
import io
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.special import softmax

from mnist_nb.pipeline import STAGES, write_index
from mnist_nb.runs import update_run


class Reader:
    "Opens pages and notes what they ask for and what they complain about."
    def __init__(self, browser, **options):
        self.page, self.complaints, self.requests = browser.new_page(**options), [], []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path):
        self.page.goto(path.as_uri())
        return self.page


@pytest.fixture(autouse=True)
def close_pages(browser):
    "A page that stays open slows the next ones."
    yield
    for context in browser.contexts: context.close()


def pages(folder): return [folder / f"{stage}.html" for stage in STAGES]


@pytest.mark.parametrize("which", ["small", "reference"])
def test_pages_open_offline_without_complaint(browser, small_run, which):
    folder = small_run if which == "small" else ROOT / "reports" / "reference"
    reader = Reader(browser)
    for path in [*pages(folder), *([folder.parent / "index.html"] if which == "small" else [])]:
        page = reader.open(path)
        assert page.locator("h1").count() >= 1 and page.locator("main").is_visible()
        broken = page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
        assert broken == 0, path.name
    assert reader.complaints == []
    assert [url for url in reader.requests if not url.startswith(("file:", "data:"))] == []


def test_code_is_folded_until_asked_for(browser, small_run):
    page = Reader(browser).open(small_run / "03_error_analysis.html")
    code = page.locator(".results .highlight").first
    assert not code.is_visible() and not page.locator("details.parts .highlight").first.is_visible()
    page.get_by_label("Show code").check()
    assert code.is_visible()
    page.locator("details.parts > summary").click()
    assert page.locator("details.parts .highlight").first.is_visible()


def test_contents_and_stages_lead_where_they_say(browser, small_run):
    page = Reader(browser).open(small_run / "03_error_analysis.html")
    page.locator("details.parts > summary").click()
    for link in page.locator(".contents a").all():
        assert page.locator(f"[id='{link.get_attribute('href')[1:]}']").is_visible()
    page.get_by_role("link", name="Training", exact=True).click()
    assert page.locator("h1").first.inner_text().startswith("Training")


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_scrolls_sideways(browser, small_run, width):
    reader = Reader(browser, viewport={"width": width, "height": 800})
    for path in [*pages(small_run), small_run.parent / "index.html"]:
        page = reader.open(path)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name


def test_works_without_scripts(browser, small_run):
    page = Reader(browser, java_script_enabled=False).open(small_run / "03_error_analysis.html")
    page.get_by_label("Show code").check()
    assert page.locator(".results .highlight").first.is_visible()
    matrix, (labels, predicted, _) = page.locator(".matrix tbody td"), predictions(small_run)
    counts = [int(matrix.nth(10 * true + guess).get_attribute("data-value")) for true in range(10) for guess in range(10)]
    assert counts == [int(((labels == true) & (predicted == guess)).sum()) for true in range(10) for guess in range(10)]
    page.get_by_label("errors only").check()  # the choice of views is HTML
    assert matrix.first.locator(".count").evaluate("node => getComputedStyle(node).opacity") == "0"
    tables, pictures = page.locator(".results table"), page.locator(".results img")
    assert tables.count() >= 6 and all(table.is_visible() for table in tables.all())
    assert pictures.count() > 100 and page.locator(".results .maps svg").count() == 2


def predictions(run):
    "Labels, predictions and probabilities of a run, as it stored them."
    stored = np.load(run / "predictions.npz")
    return stored["labels"], stored["logits"].argmax(1), softmax(stored["logits"].astype(float), axis=1)


def numbers_of(run):
    "What the images of a run are called: their places in the test file."
    return np.load(run / "predictions.npz")["numbers"]


def surest(run, true, guess):
    "The images of a cell, surest first, by their numbers."
    labels, predicted, probabilities = predictions(run)
    inside = np.flatnonzero((labels == true) & (predicted == guess))
    return numbers_of(run)[inside[np.argsort(-probabilities[inside].max(1), kind="stable")]]


def shown_indices(page): return [int(item.get_attribute("data-index")) for item in page.locator(".chosen li").all()]


def test_a_click_on_a_cell_shows_its_images(browser, small_run):
    reader = Reader(browser)
    page = reader.open(small_run / "03_error_analysis.html")
    (labels, predicted, probabilities), numbers = predictions(small_run), numbers_of(small_run)
    wrong = np.flatnonzero(labels != predicted)
    pairs = sorted({(int(labels[i]), int(predicted[i])) for i in wrong})
    for true, guess in pairs[:12]:
        page.get_by_role("button", name=f"true {true}, predicted {guess}:").click()
        expected = surest(small_run, true, guess)
        assert shown_indices(page) == expected.tolist()[:60]
        first = expected[0]
        text = page.locator(".chosen li").first.inner_text()
        assert f"#{first}" in text and f"true {true}" in text and f"{guess} {probabilities[numbers == first, guess].item():.1%}" in text
    heading = page.locator(".chosen h3").inner_text()
    assert heading.startswith(f"True {true}, predicted {guess}: {len(expected)} image")
    hits = surest(small_run, 0, 0)
    page.get_by_role("button", name="true 0, predicted 0:").click()
    sample = shown_indices(page)
    assert len(sample) == 24 and sample == [i for i in hits if i in sample] and "a sample of 24" in page.locator(".chosen h3").inner_text()
    page.get_by_role("button", name=": 0 images").first.click()
    assert shown_indices(page) == [] and reader.complaints == []


def test_the_matrix_by_keyboard_alone(browser, small_run):
    page = Reader(browser).open(small_run / "03_error_analysis.html")
    page.get_by_label("counts").focus()
    page.keyboard.press("Tab")  # one stop: the chosen cell
    focused = page.locator(":focus")
    assert focused.get_attribute("aria-pressed") == "true"
    for _ in range(10): page.keyboard.press("ArrowUp")
    for _ in range(10): page.keyboard.press("ArrowLeft")
    assert focused.get_attribute("aria-label").startswith("true 0, predicted 0:")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert focused.get_attribute("aria-pressed") == "true"
    assert page.locator(".chosen h3").inner_text().startswith("True 1, predicted 1:")
    sample = shown_indices(page)
    assert sample and sample == [i for i in surest(small_run, 1, 1) if i in sample]


def test_the_map_shows_the_image_under_the_pointer(browser, small_run):
    reader = Reader(browser, viewport={"width": 1200, "height": 900})
    page = reader.open(small_run / "03_error_analysis.html")
    labels, predicted, _ = predictions(small_run)
    for which in range(2):
        drawing = page.locator(".maps svg").nth(which)
        drawing.scroll_into_view_if_needed()
        drawing.locator("circle[data-point]").nth(7).hover(force=True)
        text = page.locator(".results .tip").inner_text()
        index = np.flatnonzero(numbers_of(small_run) == int(text.split(",")[0].removeprefix("#"))).item()
        assert f"true {labels[index]}" in text and (f"predicted {predicted[index]}" in text) == (labels[index] != predicted[index])
    assert f"{(labels != predicted).sum()} errors are ringed" in page.locator(".maps svg").first.get_attribute("aria-label")
    page.mouse.move(0, 0)
    assert page.locator(".results .tip").is_hidden() and reader.complaints == []


def test_tables_can_be_had_as_csv(browser, small_run):
    page = Reader(browser).open(small_run / "03_error_analysis.html")
    with page.expect_download() as download: page.get_by_role("link", name="Download this table as each_digit.csv").click()
    rows = list(csv.DictReader(io.StringIO(download.value.path().read_text())))
    metrics = json.loads((small_run / "metrics.json").read_text())["per_class"]
    for row, known in zip(rows, metrics, strict=True):
        assert float(row["recall"]) == known["recall"] and float(row["F1 high"]) == known["f1_high"]
        assert int(row["support"]) == known["support"]
    with page.expect_download() as download: page.get_by_role("link", name="Download this table as confusion_matrix.csv").click()
    matrix = list(csv.reader(io.StringIO(download.value.path().read_text())))
    stored = list(csv.reader(io.StringIO((small_run / "confusion_matrix.csv").read_text())))
    assert [row[1:] for row in matrix[1:]] == [row[1:] for row in stored[1:]]


def test_tables_of_a_stage_sort(browser, small_run):
    page = Reader(browser).open(small_run / "03_error_analysis.html")
    table = page.locator("table", has=page.get_by_role("button", name="recall"))
    recalls = [row["recall"] for row in json.loads((small_run / "metrics.json").read_text())["per_class"]]
    table.get_by_role("button", name="recall").click()
    order = [int(cell.get_attribute("data-value")) for cell in table.locator("tbody th").all()]
    assert [recalls[digit] for digit in order] == sorted(recalls)


@pytest.mark.parametrize("width", [390, 1500])
def test_contents_follow_the_reader(browser, small_run, width):
    page = Reader(browser, viewport={"width": width, "height": 800}).open(small_run / "03_error_analysis.html")
    for name in ("Trust", "Suspect labels", "Comparison"):
        page.get_by_role("heading", name=name).evaluate("heading => heading.scrollIntoView()")
        page.wait_for_function("name => document.querySelector('.contents [aria-current]')?.innerText === name", arg=name)
        page.wait_for_function("""() => {
          const link = document.querySelector(".contents [aria-current]").getBoundingClientRect();
          return link.top >= 0 && link.bottom <= innerHeight && link.left >= 0 && link.right <= innerWidth; }""")


@pytest.mark.parametrize("scheme, width", [("light", 1200), ("dark", 390)])
def test_nothing_keeps_people_from_using_a_page(browser, axe, small_run, scheme, width):
    for path in [*pages(small_run), small_run.parent / "index.html"]:
        page = Reader(browser, color_scheme=scheme, viewport={"width": width, "height": 800}).open(path)
        if page.get_by_label("Show code").count(): page.get_by_label("Show code").check()
        if path.stem == "01_models":  # the folded parts are alike on all pages, and take axe long
            for part in page.locator("details").all(): part.evaluate("part => { part.open = true; }")
        page.wait_for_timeout(100)  # until the page has heard of it
        page.add_script_tag(path=axe)
        found = page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        grave = [(problem["id"], problem["nodes"][0]["html"]) for problem in found if problem["impact"] in ("serious", "critical")]
        assert not grave, f"{path.name}: {grave}"


def test_print_shows_results_alone(browser, small_run):
    page = Reader(browser).open(small_run / "03_error_analysis.html")
    page.emulate_media(media="print")
    for hidden in ("header", ".contents", ".views", ".chosen", ".csv >> nth=0"): assert not page.locator(hidden).is_visible(), hidden
    assert page.locator(".matrix table").is_visible() and page.locator(".headline strong").first.is_visible()


def test_dark_follows_the_system(browser, small_run):
    def brightness(scheme, path):  # of a screenshot, plots and digits included
        reader = Reader(browser, color_scheme=scheme, viewport={"width": 800, "height": 4000})
        return np.asarray(Image.open(io.BytesIO(reader.open(path).screenshot(type="jpeg"))).convert("L")).mean()
    for path in pages(small_run)[1:4]: assert brightness("dark", path) < 70 < 200 < brightness("light", path)


def test_page_of_all_runs_sorts(browser, tmp_path):
    for name, accuracy, seconds in (("a", 0.9, 100.0), ("b", 0.95, 20.0), ("c", 0.85, 3.0)):
        update_run(tmp_path / name, status="done", created=f"2026-01-0{'abc'.index(name) + 1}", stages={}, error=None,
                   parameters={"arch": "base", "seed": 0}, metrics={"test_accuracy": accuracy, "training_seconds": seconds})
    update_run(tmp_path / "d", status="failed", created="2026-01-04", stages={}, error="Training: it <broke>", parameters={})
    reader = Reader(browser)
    page = reader.open(write_index(tmp_path))

    def order(): return "".join(page.locator("tbody td:first-child").all_inner_texts())
    assert order() == "dcba"  # newest first
    page.get_by_role("button", name="test, %").click()
    assert order() == "cabd"  # what has no figure stays at the end
    page.get_by_role("button", name="test, %").click()
    assert order() == "bacd"
    page.get_by_role("button", name="training, s").click()
    assert order() == "cbad"  # as numbers, not as text
    assert "it <broke>" in page.locator("tbody").inner_text() and reader.complaints == []


def test_page_of_all_runs_filters_and_draws_curves(browser, tmp_path):
    for name, arch, seed in (("a", "base", 0), ("b", "cnn", 0), ("c", "cnn", 1)):
        update_run(tmp_path / name, status="done", created="2026-01-01", stages={}, parameters={"arch": arch, "seed": seed, "epochs": 2})
        (tmp_path / name / "history.csv").write_text("epoch,valid_accuracy\n1,0.9\n2,0.95\n")
    page = Reader(browser).open(write_index(tmp_path))

    def shown(): return sorted(page.locator("tbody tr:visible td:first-child").all_inner_texts())
    assert page.locator(".filters select").count() == 2  # what is the same in all runs is no choice
    page.get_by_label("arch").select_option("cnn")
    assert shown() == ["b", "c"]
    page.get_by_label("seed").select_option("1")
    assert shown() == ["c"] and page.get_by_role("status").inner_text() == "1 of 3 shown"
    page.get_by_label("arch").select_option("base")
    assert shown() == []
    for choice in page.locator(".filters select").all(): choice.select_option("")
    assert page.get_by_role("img", name="from 90.00% to 95.00% in 2 epochs").count() == 3


def test_reference_pages_state_the_figures_of_their_run(browser):
    folder = ROOT / "reports" / "reference"
    metrics = json.loads((folder / "metrics.json").read_text())
    page = Reader(browser).open(folder / "03_error_analysis.html")
    assert page.locator(".headline strong").all_inner_texts()[:2] == [f"{metrics['accuracy']:.2%}", str(metrics["errors"])]
    assert page.locator(".results .findings li").all_inner_texts() == metrics["findings"]
    assert (folder / "03_error_analysis.html").stat().st_size <= 6e6
