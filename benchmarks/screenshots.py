"""The pictures in the README of what moves: the page of the service."""

import json
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "benchmarks"
STROKES = json.loads((ROOT / "tests" / "strokes.json").read_text())
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync")


@contextmanager
def service():
    "The address of a service."
    process = subprocess.Popen([str(Path(sys.executable).parent / "mnist-serve"), "--port", "0"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try: yield re.match(r"http://\S+", process.stderr.readline())[0]
    finally:
        process.kill()
        process.communicate()


def draw(page: Page, pad: str, strokes: list) -> None:
    "Draws with the mouse; points are hundredths of the pad."
    box = page.locator(pad).bounding_box()
    for stroke in strokes:
        for number, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"])
            if number == 0: page.mouse.down()
        page.mouse.up()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def page_of_the_service(browser: Browser) -> None:
    with service() as address:
        for name, size, scheme in (("page_light", (900, 720), "light"), ("page_phone", (375, 720), "dark")):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=size[0] < 400,
                                    is_mobile=size[0] < 400)
            page.goto(address)
            draw(page, "#pad", STROKES["3"][0] if size[0] > 400 else STROKES["7"][1])
            page.screenshot(path=PLACE / f"{name}.png")
            page.close()


def main() -> None:
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        page_of_the_service(browser)
        browser.close()


if __name__ == "__main__": main()
