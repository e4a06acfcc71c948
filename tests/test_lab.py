"""Notebooks and widgets in a real JupyterLab, with a real kernel."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import ROOT, executable
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import expect

from mnist_nb.metrics import load_predictions

STROKES = json.loads((ROOT / "tests" / "strokes.json").read_text())
KERNEL = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
DONE = """() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.every(
  cell => cell.cell_type !== "code" || cell.execution_count)"""
ERRORS = """() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells.flatMap((cell, number) =>
  (cell.outputs ?? []).filter(output => output.output_type === "error").map(output => `cell ${number}: ${output.evalue}`))"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "The folder and the address of a JupyterLab of its own, as `make lab` starts it."
    folder = tmp_path_factory.mktemp("lab")
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "jupyter_config.py", folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [executable("jupyter-lab"), "--config=jupyter_config.py", "--no-browser", f"--port={port}", "--IdentityProvider.token=",
             "--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0", "--allow-root"]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(folder / "config"), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces")}
    with open(folder / "lab.txt", "w") as log:
        server = subprocess.Popen(words, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=log)
    address, end = f"http://127.0.0.1:{port}/lab", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}?reset", timeout=5).close()
            break
        except (urllib.error.URLError, OSError): time.sleep(0.3)
    yield folder, address
    server.terminate()
    server.wait(timeout=20)


@pytest.fixture(scope="module")
def jupyterlab(browser, lab):
    "JupyterLab in a tab of the browser: it takes seconds to load."
    page = browser.new_page(viewport={"width": 1300, "height": 2400})
    page.goto(f"{lab[1]}?reset")
    page.wait_for_function("() => window.jupyterapp?.commands.hasCommand('docmanager:open')", timeout=60_000)
    yield page
    page.close()


@pytest.fixture
def notebook(jupyterlab, lab):
    """Opens a notebook: `notebook(name, cells)` with cells of its own, or `notebook(name)` for one of the project, whose words may be
    replaced, such as the folder that it writes to."""
    (folder, _), page, troubles = lab, jupyterlab, []
    heard = {"pageerror": lambda error: troubles.append(str(error)),
             "request": lambda request: request.url.startswith(("http://127.0.0.1", "blob:", "data:")) or troubles.append(request.url),
             "console": lambda line: "widget" in line.text.lower() and line.type == "error" and troubles.append(line.text)}
    for event, hear in heard.items(): page.on(event, hear)
    def open_notebook(name, *cells, **words):
        path = folder / "nbs" / f"{name}.ipynb"
        metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
        if cells: nbformat.write(new_notebook(cells=list(map(new_code_cell, cells)), metadata=metadata), path)
        else: path.write_text(replaced((ROOT / "nbs" / path.name).read_text(), words))
        page.evaluate("path => { window.jupyterapp.commands.execute('docmanager:open', { path }); }", f"nbs/{name}.ipynb")
        page.wait_for_function(f"""() => window.jupyterapp.shell.currentWidget?.context?.path === "nbs/{name}.ipynb"
          && {KERNEL}?.status === 'idle'""", timeout=60_000)
        run_all(page)
        return page
    yield open_notebook
    page.evaluate("""async () => {
      const widget = window.jupyterapp.shell.currentWidget;
      await widget?.sessionContext?.shutdown();
      widget?.dispose();  // without asking whether to save
    }""")
    for event, hear in heard.items(): page.remove_listener(event, hear)
    assert not troubles


def replaced(text: str, words: dict[str, str]) -> str:
    "A text in which each of some words stands for another one."
    for old, new in words.items():
        assert old in text
        text = text.replace(old, new)
    return text


def run_all(page) -> None:
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")


def wait_for_cells(page, seconds: float) -> None:
    "Waits until all cells are done, without an error."
    page.wait_for_function(f"() => ({DONE})() || ({ERRORS})().length", timeout=1000 * seconds)
    assert page.evaluate(ERRORS) == []


def value_of(page, expression):
    "What a Python expression is in the notebook's kernel, as `repr` writes it."
    return ast.literal_eval(page.evaluate("""async expression => {
      const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
      const reply = await kernel.requestExecute({ code: "", user_expressions: { value: expression } }).done;
      const { value } = reply.content.user_expressions;
      return value.data ? value.data["text/plain"] : JSON.stringify(`${value.ename}: ${value.evalue}`);
    }""", f"repr({expression})"))


def draw(page, strokes: list) -> None:
    "Draws with the mouse; points are hundredths of the pad."
    page.locator(".digit-pad .clear").click()
    pad = page.locator("canvas.pad").bounding_box()
    for stroke in strokes:
        for number, (x, y) in enumerate(stroke):
            page.mouse.move(pad["x"] + x / 100 * pad["width"], pad["y"] + y / 100 * pad["height"])
            if number == 0: page.mouse.down()
        page.mouse.up()


def until(page, expression: str, value: str) -> None:
    "Waits until a Python expression has a value."
    end = time.monotonic() + 60
    while (found := value_of(page, expression)) != value:
        assert time.monotonic() < end, f"{expression} is {found}, not {value}"
        page.wait_for_timeout(50)


def test_the_choice_in_the_confusion_matrix_is_a_python_value(notebook):
    page = notebook("matrix", """import numpy as np
from mnist_nb.data import load_test_digits
from mnist_nb.display import ConfusionMatrix

digits = load_test_digits(300)
probabilities = np.eye(10)[np.where(np.arange(300) % 9 == 0, 8, digits.labels)] * 0.9 + 0.01
confusions = ConfusionMatrix(digits.images, digits.labels, probabilities)
confusions""")
    page.get_by_role("button", name="true 7, predicted 8:").click(timeout=60_000)
    page.get_by_text("True 7, predicted 8:").wait_for()
    assert value_of(page, "confusions.selected") == "[7, 8]"
    shown = [int(item.get_attribute("data-index")) for item in page.locator(".chosen li").all()]
    assert value_of(page, "confusions.indices.tolist()") == str(shown) and len(shown) > 1
    page.keyboard.press("ArrowUp")
    page.keyboard.press("Enter")
    page.get_by_text("True 6, predicted 8:").wait_for()
    assert value_of(page, "confusions.selected") == "[6, 8]"
    value_of(page, "setattr(confusions, 'selected', [0, 0])")  # and the other way: Python chooses
    page.get_by_text("True 0, predicted 0:").wait_for()


def test_python_sees_what_is_drawn(notebook, tmp_path):
    page = notebook("pad", f"""from mnist_nb.widgets import DigitPad, render_strokes
model = "reports/reference/model.int8.onnx"
pad = DigitPad({{"one": model, "two": model}}, folder={str(tmp_path / "kept")!r})
pad""")
    page.locator(".bars").nth(1).wait_for(timeout=60_000)  # two models, and a drawing to begin with
    right = 0
    for digit, (strokes, _) in STROKES.items():
        draw(page, strokes)
        until(page, f"sum(map(len, pad.question['strokes'])) >= {sum(map(len, strokes))}", "True")
        page.wait_for_timeout(200)
        ink = page.evaluate("""() => Array.from(document.querySelector("canvas.seen").getContext("2d").getImageData(0, 0, 28, 28).data)
          .filter((_, i) => i % 4 === 0).map(value => 255 - value)""")
        assert value_of(page, "pad.image.ravel().tolist()") == str(ink)
        assert value_of(page, "abs(pad.image.astype(int) - render_strokes(pad.question['strokes'])).max() <= 1") in ("True", "np.True_")
        best = page.locator(".bars tr.best th").all_inner_texts()
        assert best == [value_of(page, f"int(pad.probabilities[{name!r}].argmax())") for name in ("one", "two")]
        right += best[0] == digit
    assert right >= 9
    assert page.locator("select.label").input_value() == ""  # a person says what was meant, not the model
    page.locator("select.label").select_option("4")
    page.get_by_role("button", name="Keep as example").click()
    expect(page.locator(".kept")).to_contain_text("digit_4_drawn_0000.png")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["digit_4_drawn_0000.png"]


def test_a_second_view_of_the_pad_lives_too(notebook):
    page = notebook("views", "from mnist_nb.widgets import DigitPad\npad = DigitPad('reports/reference/model.int8.onnx')\npad", "pad")
    page.locator("canvas.pad").nth(1).wait_for(timeout=60_000)
    for view, digit in ((1, "7"), (0, "4"), (1, "0")):
        page.locator(".digit-pad .clear").nth(view).click()
        pad = page.locator("canvas.pad").nth(view).bounding_box()
        for stroke in STROKES[digit][0]:
            for number, (x, y) in enumerate(stroke):
                page.mouse.move(pad["x"] + x / 100 * pad["width"], pad["y"] + y / 100 * pad["height"])
                if number == 0: page.mouse.down()
            page.mouse.up()
        for other in (0, 1): expect(page.locator(".digit-pad").nth(other).locator(".bars tr.best th")).to_have_text(digit)


def test_errors_are_filtered_explained_and_chosen(notebook, small_run):
    page = notebook("errors", f"""from mnist_nb.widgets import ErrorBrowser
browser = ErrorBrowser.from_run({str(small_run)!r})
browser""")
    labels, logits, numbers = load_predictions(small_run)
    predicted = logits.argmax(1)
    pairs, counts = np.unique(np.stack([labels, predicted])[:, labels != predicted], axis=1, return_counts=True)
    true, taken_for = map(int, pairs[:, counts.argmax()])
    for want_true, want_predicted in ((4, 9), (true, taken_for)):
        page.locator("[data-name=true]").select_option(str(want_true), timeout=60_000)
        page.locator("[data-name=predicted]").select_option(str(want_predicted))
        expected = np.flatnonzero((labels == want_true) & (predicted == want_predicted)).tolist()
        until(page, "sorted(map(int, browser.indices))", str(expected))
        expect(page.locator(".grid button")).to_have_count(min(60, len(expected)))
    shown = [int(button.get_attribute("data-index")) for button in page.locator(".grid button").all()]
    assert sorted(shown) == expected[:60] or len(expected) > 60
    first = page.locator(".grid button").first
    first.click()
    expect(page.locator(".detail")).to_contain_text(f"#{numbers[shown[0]]}, true {true}, predicted {taken_for}")
    expect(page.locator(".detail figure")).to_have_count(5)  # the image, its saliency, three training images
    assert value_of(page, "browser.selected") == str(shown[0])
    first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    until(page, "browser.selected", str(shown[1]))
    page.locator("[data-name=low]").fill("0.99")
    page.locator("[data-name=low]").blur()
    until(page, "browser.filter['low']", "0.99")
    value_of(page, "setattr(browser, 'filter', {**browser.filter, 'low': 0, 'true': 'any', 'predicted': 'any'})")
    page.locator("[data-name=errors]").uncheck()
    until(page, "len(browser.indices)", str(len(labels)))
    page.get_by_role("button", name="On", exact=True).click()
    expect(page.locator(".count")).to_have_text(f"{len(labels):,} images, 61 to 120")
    name = value_of(page, "browser.slices[1]").strip("'")
    page.locator("[data-name=slice]").select_option(name)
    until(page, "bool(len(browser.indices) == browser.members[browser.slices[1]].sum())", "True")


def test_the_printed_recipe_reproduces_the_grid(notebook):
    page = notebook("playground", """from mnist_nb.widgets import AugmentationPlayground
playground = AugmentationPlayground()
playground""")
    slider = page.locator("input[data-name=rotation]")
    slider.wait_for(timeout=60_000)
    before = page.locator("img.grid").get_attribute("src")
    slider.focus()
    for _ in range(5): page.keyboard.press("ArrowRight")
    until(page, "playground.augmentation.rotation", "15.0")
    page.get_by_role("button", name="Draw again").click()
    until(page, "playground.seed", "1")
    expect(page.locator("pre.code")).to_contain_text("Augmentation(rotation=15)")
    assert page.locator("img.grid").get_attribute("src") != before
    code = page.locator("pre.code").inner_text()
    assert value_of(page, f"(exec({code!r}, globals()), bool((grid.numpy() == playground.grid).all()))[1]") == "True"
    page.get_by_role("button", name="none").click()
    until(page, "playground.augmentation.is_none", "True")


def test_stop_keeps_a_checkpoint_that_resumes(notebook, tmp_path):
    page = notebook("monitor", f"""from mnist_nb.recipes import Settings
from mnist_nb.widgets import TrainingMonitor
monitor = TrainingMonitor(Settings(arch="base", epochs=40, train_images=6000, valid_images=500), {str(tmp_path / "run")!r})
monitor.start()
monitor""")
    expect(page.locator(".drawing")).to_contain_text("Best validation accuracy", timeout=60_000)  # an epoch is over
    expect(page.locator(".drawing")).to_contain_text("images/s")
    page.get_by_role("button", name="Stop").click()
    until(page, "monitor.state", "'stopped'")
    done = int(value_of(page, "len(monitor.history)"))
    assert 1 <= done < 40
    from mnist_nb.models import load_checkpoint
    assert len(load_checkpoint(tmp_path / "run" / "last_model.pth")["history"]) == done
    expect(page.locator(".drawing")).to_contain_text("Stopped")
    page.get_by_role("button", name="Go on").click()
    until(page, f"len(monitor.rows) > {done}", "True")
    page.get_by_role("button", name="Stop").click()
    until(page, "monitor.state", "'stopped'")
    assert value_of(page, "[row['epoch'] for row in monitor.rows] == list(range(1, len(monitor.rows) + 1))") == "True"


def test_runs_are_picked(notebook, small_run):
    page = notebook("runs", f"""from mnist_nb.widgets import RunPicker
picker = RunPicker({str(small_run.parent)!r}, chosen=[])
picker""")
    page.get_by_label("small").check(timeout=60_000)
    expect(page.locator(".drawing tbody th")).to_have_text("small")
    until(page, "list(picker.runs)", "['small']")


def changed_tour(folder, epochs) -> dict[str, str]:
    "What to replace in the tour: a test trains into its own folder, on fewer images."
    return {"reports/tour": str(folder / "tour"), r'{\"epochs\": 6}': rf'{{\"epochs\": {epochs}, \"train_images\": 6000}}'}


@pytest.mark.slow
def test_the_tour_runs_and_is_saved_clean(notebook, lab, tmp_path):
    changes = changed_tour(tmp_path, 3)
    page = notebook("index", **changes)
    wait_for_cells(page, 60)
    expect(page.locator(".error-browser .detail")).to_contain_text("Ink in red pixels speaks for", timeout=180_000)
    expect(page.locator(".drawing table").last).to_be_visible(timeout=60_000)  # of the last widget
    assert page.evaluate(ERRORS) == [] and value_of(page, "monitor.state") == "'done'"
    expect(page.locator(".jp-OutputArea-output").get_by_text("of the test images are right")).to_have_count(1)
    expect(page.locator("table.dataframe tbody tr")).to_have_count(3)
    assert page.locator(".digit-pad canvas.pad").count() == 1 and page.locator(".error-browser").count() == 1
    assert Path(value_of(page, "__import__('sys').prefix").strip("'")) == Path(sys.prefix)  # the kernel is the environment's
    page.evaluate("window.jupyterapp.shell.currentWidget.content.model.cells.get(0).sharedModel.setSource('# Changed\\n\\n> now')")
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    saved = lab[0] / "nbs" / "index.ipynb"
    for _ in range(100):
        if "# Changed" in saved.read_text(): break
        page.wait_for_timeout(100)
    notebook_as_saved = nbformat.read(saved, 4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook_as_saved.cells)
    original = nbformat.reads(replaced((ROOT / "nbs" / "index.ipynb").read_text(), changes), 4)
    original.cells[0].source = "# Changed\n\n> now"
    assert [(cell.id, cell.source, cell.metadata) for cell in notebook_as_saved.cells] == [
        (cell.id, cell.source, cell.metadata) for cell in original.cells]
    assert set(notebook_as_saved.metadata) <= {"kernelspec"}


def test_the_tour_can_be_stopped_after_run_all(notebook, tmp_path):
    page = notebook("index", **changed_tour(tmp_path, 100))
    stop = page.get_by_role("button", name="Stop")
    stop.wait_for(timeout=60_000)
    expect(page.locator(".drawing").first).to_contain_text("images/s", timeout=60_000)  # it is training
    wait_for_cells(page, 60)
    expect(page.get_by_text("This appears when the training has ended.")).to_have_count(4)
    stop.click()
    expect(page.locator(".drawing").first).to_contain_text("Stopped", timeout=2000)
    page.get_by_role("button", name="Go on").wait_for(timeout=2000)
    assert value_of(page, "monitor.state") == "'stopped'" and page.evaluate(ERRORS) == []
    page.locator(".digit-pad .clear").click()  # the rest of the tour is alive
    until(page, "pad.image is None", "True")


def test_after_run_all_widgets_are_as_their_cells_made_them(notebook, tmp_path):
    "The tests in the notebook work on widgets of their own."
    page = notebook("06_widgets")
    wait_for_cells(page, 180)
    assert value_of(page, "(pad.image == render_strokes(THREE)).all() and pad.kept == ''") in ("True", "np.True_")
    expect(page.locator(".digit-pad .bars tr.best th")).to_have_text(["3"])
    expect(page.locator(".digit-pad .kept")).to_have_text("")
    assert value_of(page, "(browser.page, browser.filter['errors'], browser.selected == browser.indices[0])").startswith("(0, True, ")
    expect(page.locator(".error-browser .detail")).to_contain_text("Ink in red pixels speaks for")
    assert value_of(page, "playground.augmentation == AUGMENTATIONS['affine'] and playground.seed == 0") == "True"
    until(page, "monitor.state", "'done'")
    assert value_of(page, "picker.chosen") == "['reference']"


def test_exported_widgets_show_something(browser, small_run, tmp_path):
    cells = ["from mnist_nb.widgets import *\nfrom mnist_nb.recipes import Settings\nimport tempfile",
             "DigitPad('reports/reference/model.int8.onnx')",
             f"browser = ErrorBrowser.from_run({str(small_run)!r})\nbrowser", "AugmentationPlayground()",
             "monitor = TrainingMonitor(Settings(arch='base', epochs=2, train_images=2000, valid_images=200), tempfile.mkdtemp())\n"
             "monitor.start()\nmonitor", "monitor.then(lambda: monitor.history)", "RunPicker(chosen=['reference'])"]
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=list(map(new_code_cell, cells)), metadata=metadata), tmp_path / "widgets.ipynb")
    subprocess.run([executable("jupyter"), "nbconvert", f"--config={ROOT / 'jupyter_config.py'}", "--execute", "--to", "html",
                    "widgets.ipynb"], cwd=tmp_path, check=True, capture_output=True)
    page = browser.new_context(offline=True, java_script_enabled=False).new_page()
    page.goto((tmp_path / "widgets.html").as_uri())
    shown = page.locator(".jp-OutputArea-output .mnist-nb")
    assert shown.count() == len(cells) - 2
    assert page.get_by_text("Done: base, 2 epochs").count() == 1 and page.locator("table.dataframe tbody tr").count() == 2  # it waited
    for number in range(shown.count()):
        box = shown.nth(number).bounding_box()
        assert box["height"] > 100 and box["width"] > 200
        assert shown.nth(number).locator("img, svg").count() >= 1 and re.search(r"\w", shown.nth(number).inner_text())
    page.context.close()
