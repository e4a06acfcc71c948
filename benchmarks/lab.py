"""How long each notebook takes in JupyterLab, from Run All to its last cell, and how soon the pad answers. Alone on the machine."""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
STROKES = json.loads((ROOT / "tests" / "strokes.json").read_text())
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
         "--disable-component-update --disable-sync")
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
CELLS = "window.jupyterapp.shell.currentWidget.content.model.toJSON().cells"


@contextmanager
def chromium() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@contextmanager
def jupyterlab() -> Iterator[tuple[Path, str]]:
    "A folder with copies of the notebooks, and the address of a JupyterLab in it."
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        shutil.copytree(ROOT / "nbs", Path(folder) / "nbs", ignore=shutil.ignore_patterns(".*"))
        shutil.copy(ROOT / "jupyter_config.py", folder)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [str(Path(sys.executable).parent / "jupyter-lab"), "--config=jupyter_config.py", "--no-browser", f"--port={port}",
                 "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0", "--allow-root"]
        env = {**os.environ, "JUPYTER_CONFIG_DIR": f"{folder}/config", "JUPYTERLAB_WORKSPACES_DIR": f"{folder}/workspaces"}
        with open(os.devnull, "w") as nowhere: server = subprocess.Popen(words, env=env, cwd=folder, stdout=nowhere, stderr=nowhere)
        address = f"http://127.0.0.1:{port}/lab"
        while True:
            try: urllib.request.urlopen(address, timeout=5).close()
            except OSError: time.sleep(0.3)
            else: break
        yield Path(folder), address
        server.terminate()
        server.wait()


def open_notebook(page: Page, address: str, name: str) -> None:
    page.goto(f"{address}/tree/nbs/{name}.ipynb?reset")
    page.wait_for_function(f"() => {KERNEL}?.status === 'idle'", timeout=60_000)


def run_all(page: Page) -> float:  # seconds until the last cell with code is done
    "Runs a notebook."
    start = time.perf_counter()
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    page.wait_for_function(f"""() => {CELLS}.filter(cell => cell.cell_type === "code").every(cell => cell.execution_count)
      || {CELLS}.some(cell => (cell.outputs ?? []).some(output => output.output_type === "error"))""", timeout=300_000)
    return time.perf_counter() - start


def errors_in(page: Page) -> list[str]:
    "What went wrong in a notebook."
    return page.evaluate(f"""() => {CELLS}.flatMap((cell, number) => (cell.outputs ?? []).filter(output => output.output_type === "error")
      .map(output => `cell ${{number}}: ${{output.ename}}: ${{output.evalue}}`))""")


def watch(page: Page, troubles: list[str]) -> None:
    "Notes requests to elsewhere, and widgets that JupyterLab cannot show."
    def leaves(request): return not request.url.startswith(("http://127.0.0.1", "blob:", "data:"))
    page.on("request", lambda request: leaves(request) and troubles.append(request.url))
    page.on("console", lambda line: "widget" in line.text.lower() and line.type == "error" and troubles.append(line.text))


def close_notebook(page: Page) -> None:
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")


def draw(page: Page, pad: str, strokes: list) -> None:
    "Draws with the mouse; points are hundredths of the pad."
    box = page.locator(pad).bounding_box()
    for stroke in strokes:
        for number, (x, y) in enumerate(stroke):
            page.mouse.move(box["x"] + x / 100 * box["width"], box["y"] + y / 100 * box["height"])
            if number == 0: page.mouse.down()
        page.mouse.up()


def pad_latency(page: Page) -> list[float]:  # milliseconds, of each of the ten digits
    "From the last point of a drawing to the probabilities of it."
    page.evaluate("""() => { window.moved = window.answered = 0;
      document.querySelector("canvas.pad").addEventListener("pointermove", () => { window.moved = performance.now(); }, true);
      const watcher = new MutationObserver(() => { window.answered = performance.now(); });
      watcher.observe(document.querySelector(".answers"), { childList: true }); }""")
    times = []
    for strokes, _ in STROKES.values():
        page.locator(".digit-pad .clear").click()
        page.wait_for_timeout(300)
        draw(page, "canvas.pad", strokes)
        page.wait_for_timeout(500)
        times.append(page.evaluate("window.answered - window.moved"))
    return times


def sentence(result: dict) -> str:
    "What the README says."
    slowest = max(result["seconds"], key=result["seconds"].get)
    return (f"In each notebook, Run All takes {result['seconds'][slowest]:.0f} s at most (`{slowest}`), and the bars of the pad "
            f"follow the pen within {max(result['pad_ms']):.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="lab.json")
    options = parser.parse_args()
    result, troubles = {"seconds": {}}, []
    with chromium() as browser, jupyterlab() as (folder, address):
        for path in sorted(folder.glob("nbs/*.ipynb")):
            page = browser.new_page(viewport={"width": 1300, "height": 2000})
            watch(page, troubles)
            open_notebook(page, address, path.stem)
            result["seconds"][path.stem] = round(run_all(page), 1)
            troubles += [f"{path.stem}: {error}" for error in errors_in(page)]
            print(f"{path.stem}: {result['seconds'][path.stem]} s", flush=True)
            if path.stem == "06_widgets":
                page.locator("canvas.pad").scroll_into_view_if_needed()
                result["pad_ms"] = [round(float(value), 1) for value in np.array(pad_latency(page))]
            close_notebook(page)
            page.close()
    result["troubles"] = troubles
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(sentence(result), *troubles, sep="\n")
    sys.exit(bool(troubles))


if __name__ == "__main__": main()
