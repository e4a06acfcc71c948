"""The README's pictures of a report, and how big and how fast the page is: the error analysis in headless Chromium."""

import argparse
import json
import shutil
import statistics
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright


def first_paint(browser: Browser, path: Path) -> float:
    "Milliseconds from the start of loading to the first content on the screen."
    page = browser.new_page(viewport={"width": 1080, "height": 800})
    page.goto(path.as_uri())
    page.wait_for_function("performance.getEntriesByName('first-contentful-paint').length")
    milliseconds = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.close()
    return milliseconds


def sentence(measured: dict) -> str:
    "The figures as the README quotes them."
    return (f"one file of {measured['bytes'] / 1e6:.1f} MB, of which headless Chromium shows the first screen after "
            f"{measured['first_paint_ms'] / 1000:.1f} s; the stage that makes it took {measured['stage_seconds']:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", default=Path("reports/reference"), help="run folder (default: reports/reference)")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    path = options.run.resolve() / "03_error_analysis.html"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                                             args=["--headless", "--no-sandbox", "--disable-gpu"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1080, "height": 1080}, color_scheme=scheme)
            page.goto(path.as_uri())
            page.screenshot(path=path.with_name(f"screenshot_{scheme}.png"))
            page.close()
        measured = {"bytes": path.stat().st_size, "first_paint_ms": statistics.median(first_paint(browser, path) for _ in range(5)),
                    "stage_seconds": json.loads((options.run / "run.json").read_text())["stages"]["03_error_analysis"]["seconds"]}
        browser.close()
    print(sentence(measured))
    if options.output: options.output.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__": main()
