"""The pictures in the README of what moves: the page of the service, and the widgets in JupyterLab."""

import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import nbformat
from lab import ROOT, STROKES, chromium, draw, jupyterlab, open_notebook, run_all
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import Browser

PLACE = ROOT / "benchmarks"
WIDGETS = {  # by the name of the picture
    "digit_pad": """from mnist_nb.widgets import *
from mnist_nb.recipes import Settings, apply_recipe
import tempfile
DigitPad({"improved": "reports/reference/model.int8.onnx"}, folder=tempfile.mkdtemp())""",
    "error_browser": """browser = ErrorBrowser.from_run("reports/scratch", errors=True)
browser.selected = int(browser.indices[0])
browser""",
    "playground": "AugmentationPlayground(draws=4)",
    "monitor": """monitor = TrainingMonitor(Settings(**apply_recipe("fast", {"epochs": 20, "train_images": 20_000})), tempfile.mkdtemp())
monitor.start()
monitor"""}


@contextmanager
def service():
    "The address of a service."
    process = subprocess.Popen([str(Path(sys.executable).parent / "mnist-serve"), "--port", "0"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    try: yield re.match(r"http://\S+", process.stderr.readline())[0]
    finally:
        process.kill()
        process.communicate()


def page_of_the_service(browser: Browser) -> None:
    with service() as address:
        for name, size, scheme in (("page_light", (900, 720), "light"), ("page_phone", (375, 720), "dark")):
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme, has_touch=size[0] < 400,
                                    is_mobile=size[0] < 400)
            page.goto(address)
            draw(page, "#pad", STROKES["3"][0] if size[0] > 400 else STROKES["7"][1])
            page.mouse.move(0, 0)
            page.wait_for_timeout(500)
            page.screenshot(path=PLACE / f"{name}.png")
            page.close()


def widgets_in_jupyterlab(browser: Browser) -> None:
    with jupyterlab() as (folder, address):
        metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
        nbformat.write(new_notebook(cells=list(map(new_code_cell, WIDGETS.values())), metadata=metadata), folder / "nbs" / "widgets.ipynb")
        page = browser.new_page(viewport={"width": 1250, "height": 3200})
        open_notebook(page, address, "widgets")
        run_all(page)
        page.locator(".digit-pad .clear").click()
        draw(page, "canvas.pad", STROKES["5"][1])
        page.wait_for_timeout(6000)  # the training has come some way
        for name, number in zip(WIDGETS, range(len(WIDGETS))):
            page.locator(".jp-OutputArea-output .mnist-nb").nth(number).screenshot(path=PLACE / f"{name}.png")
        page.close()


def main() -> None:
    with chromium() as browser:
        page_of_the_service(browser)
        widgets_in_jupyterlab(browser)


if __name__ == "__main__": main()
