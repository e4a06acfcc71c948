"""The README's picture of a report: the first screen of an error analysis in headless Chromium."""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=Path("reports/reference/03_error_analysis.html"))
    page_path = parser.parse_args().page.resolve()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                                             args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1080, "height": 800})
        page.goto(page_path.as_uri())
        page.screenshot(path=page_path.with_name("screenshot.png"))
        browser.close()


if __name__ == "__main__": main()
