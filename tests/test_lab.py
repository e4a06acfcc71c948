"""The widgets in a real JupyterLab, with a real kernel."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request

import nbformat
import pytest
from conftest import executable
from nbformat.v4 import new_code_cell, new_notebook

CELL = """import numpy as np
from mnist_nb.data import load_test_digits
from mnist_nb.display import ConfusionMatrix

digits = load_test_digits(300)
probabilities = np.eye(10)[np.where(np.arange(300) % 9 == 0, 8, digits.labels)] * 0.9 + 0.01
confusions = ConfusionMatrix(digits.images, digits.labels, probabilities)
confusions"""


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab of its own, in a folder with one notebook."
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}}
    nbformat.write(new_notebook(cells=[new_code_cell(CELL)], metadata=metadata), tmp_path / "look.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [executable("jupyter-lab"), "--no-browser", f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}",
             "--LabApp.expose_app_in_browser=True", "--ServerApp.port_retries=0", "--allow-root"]
    env = {**os.environ, "JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    server = subprocess.Popen(words, env=env, stdout=subprocess.DEVNULL, stderr=(tmp_path / "lab.txt").open("w"))
    address, end = f"http://127.0.0.1:{port}/lab", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}?reset", timeout=5).close()
            break
        except (urllib.error.URLError, OSError): time.sleep(0.3)
    yield address
    server.terminate()
    server.wait(timeout=20)


def value_of(page, expression):
    "What a Python expression is in the notebook's kernel."
    return page.evaluate("""async expression => {
      const { kernel } = window.jupyterapp.shell.currentWidget.sessionContext.session;
      const reply = await kernel.requestExecute({ code: "", user_expressions: { value: expression } }).done;
      return reply.content.user_expressions.value.data["text/plain"];
    }""", expression)


def test_the_choice_in_the_confusion_matrix_is_a_python_value(browser, lab):
    page = browser.new_page(viewport={"width": 1300, "height": 1600})
    page.goto(f"{lab}/tree/look.ipynb?reset")
    kernel = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel"
    page.wait_for_function(f"() => {kernel}?.status === 'idle'", timeout=60_000)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
    cell = page.get_by_role("button", name="true 7, predicted 8:")
    cell.click(timeout=60_000)
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
    page.close()
