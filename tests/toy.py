"""A checkout of the project whose stages take seconds: real package, real commands, toy notebooks."""

import os
import shutil
import sys
from pathlib import Path

import nbformat
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from mnist_nb.pipeline import STAGES

# A toy training sleeps weight_decay seconds an epoch, and is as accurate as dropout says. learning_rate 666 breaks it, 777 takes long.
TRAINING = """
import csv, os, time
os.makedirs(f"{run_dir}/checkpoints", exist_ok=True)
accuracy = round(0.8 + 0.1 * dropout + 0.001 * seed, 4)
rows = list(csv.DictReader(open(f"{run_dir}/history.csv"))) if resume else []
for epoch in range(len(rows) + 1, epochs + 1):
    time.sleep(60 if learning_rate == 777 else weight_decay)
    if learning_rate == 666: raise ArithmeticError("the number of the beast")
    rows.append({"epoch": epoch, "valid_accuracy": accuracy})
    with open(f"{run_dir}/history.tmp", "w", newline="") as file:
        table = csv.DictWriter(file, ["epoch", "valid_accuracy"])
        table.writeheader()
        table.writerows(rows)
    os.replace(f"{run_dir}/history.tmp", f"{run_dir}/history.csv")
    print(f"epoch {epoch}/{epochs}", flush=True)
for name in ("best_model", "last_model"):
    with open(f"{run_dir}/checkpoints/{name}.pth", "w") as file: file.write(f"{arch} {seed} {accuracy}")
metrics = {"valid_accuracy": accuracy, "best_epoch": epochs, "epochs": epochs, "training_seconds": 1.0, "images_per_second": 1000}
"""
ANALYSIS = """
import json
import numpy as np
labels = np.arange(100) % 10
logits = np.eye(10, dtype=np.float32)[labels]
wrong = 20 - int(read_run(run_dir)["metrics"]["valid_accuracy"] * 20)
logits[:wrong] = np.roll(logits[:wrong], 1, axis=1)
np.savez(f"{run_dir}/predictions.npz", labels=labels, logits=logits)
for name in ("metrics.json", "per_class.csv", "confusion_matrix.csv", "confusion_matrix.png"): open(f"{run_dir}/{name}", "w").write("{}")
metrics = {"test_accuracy": 1 - wrong / 100, "test_accuracy_interval": [0.5, 1.0], "test_errors": wrong, "test_images": 100,
           "test_macro_f1": 0.9}
"""
EXPORT = """
for name in ("model.onnx", "model.int8.onnx", "model.pt2", "export.json"): open(f"{run_dir}/{name}", "w").write("weights")
metrics = {"onnx_bytes": 7, "int8_bytes": 7, "int8_accuracy": 0.9, "model_bytes": 7}
"""
CODE = {"00_data": "metrics = {}", "01_models": "metrics = {'model_parameters': 3}", "02_training": TRAINING,
        "03_error_analysis": ANALYSIS, "04_export": EXPORT}

# A run without notebooks, in a process of its own that starts at once. learning_rate says what becomes of it; it sleeps weight_decay
# seconds an epoch.
PLAYED = """
import json, os, signal, subprocess, sys, time
def work():
    job = json.loads(sys.stdin.readline())
    plan = job["plan"]
    parameters, folder = plan["parameters"], os.path.join(job["reports"], plan["run"])
    os.makedirs(folder, exist_ok=True)
    def write(**fields):
        with open(os.path.join(folder, "run.json"), "w") as file: json.dump({**plan, "stages": {}, **fields}, file)
    def tell(**event): print(json.dumps(event), flush=True)
    write(stages={"02_training": {"status": "running"}})
    tell(stage="02_training", cell=1, cells=2)
    rate = parameters["learning_rate"]
    if rate == 666: return write(status="failed", error="Training: ArithmeticError: the number of the beast")
    if rate == 555: sys.exit("no memory left")
    if rate == 444: return open(os.path.join(folder, "run.json"), "w").write('{"status": "done", "metr')
    if rate == 777: subprocess.run(["sleep", "60"])
    print("no event")
    for epoch in range(1, parameters["epochs"] + 1):
        time.sleep(parameters["weight_decay"])
        tell(epoch=epoch, valid_accuracy=0.8 + 0.1 * parameters["dropout"])
    metrics = {"valid_accuracy": 0.8 + 0.1 * parameters["dropout"], "test_accuracy": 0.8, "training_seconds": 1.0}
    write(status="done", stages={}, metrics=metrics, seconds=2.0)
    tell(cpu_seconds=1.5)
"""


def toy_checkout(folder: Path,
                 real: tuple[str, ...] = (),  # stages to take as they are; they find their data by MNIST_NB_DATA
                ) -> Path:
    "Makes the checkout: the parameters of the stages are the real ones, so that the real checks apply."
    folder.mkdir(exist_ok=True)
    shutil.copytree(ROOT / "mnist_nb", folder / "mnist_nb", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "settings.ini", folder)
    (folder / "nbs").mkdir()
    for stage in STAGES:
        if stage in real:
            shutil.copy(ROOT / "nbs" / f"{stage}.ipynb", folder / "nbs")
            continue
        whole = nbformat.read(ROOT / "nbs" / f"{stage}.ipynb", as_version=4)
        parameters = next(cell for cell in whole.cells if "parameters" in cell.metadata.get("tags", []))
        code = f"from mnist_nb.runs import read_run, update_run\n{CODE[stage].strip()}\nupdate_run(run_dir, device='cpu', metrics=metrics)"
        cells = [new_markdown_cell("# Toy\n\n> A toy"), new_markdown_cell("# The run"),
                 new_code_cell(parameters.source, metadata={"tags": ["parameters"]}), new_code_cell(code)]
        nbformat.write(new_notebook(cells=cells, metadata=whole.metadata), folder / "nbs" / f"{stage}.ipynb")
    return folder


def toy_words(command: str, *words: str) -> list[str]:
    "A command such as grid or report, to be started in a toy checkout."
    return [sys.executable, "-c", f"import sys; from mnist_nb import cli; sys.exit(cli.{command}())", *map(str, words)]


def toy_env(folder: Path) -> dict[str, str]:
    "The environment for it."
    return {**os.environ, "PYTHONPATH": str(folder), "MNIST_NB_DATA": str(ROOT / "data" / "mnist"), "COLUMNS": "200"}
