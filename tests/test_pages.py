"""The pages in a real browser, from file://, as a reader opens them."""

import json

import pytest
from conftest import ROOT

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
    assert page.locator(".results .highlight").first.is_visible() and page.locator("table").first.is_visible()


def test_dark_follows_the_system(browser, small_run):
    def brightness(scheme):
        page = Reader(browser, color_scheme=scheme).open(small_run / "02_training.html")
        return sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")))
    assert brightness("dark") < 150 < 600 < brightness("light")


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


def test_reference_pages_state_the_figures_of_their_run(browser):
    folder = ROOT / "reports" / "reference"
    metrics = json.loads((folder / "metrics.json").read_text())
    text = Reader(browser).open(folder / "03_error_analysis.html").locator(".results").inner_text()
    assert f"test accuracy {metrics['accuracy']:.2%}" in text and f"{metrics['errors']} of 10,000 wrong" in text
