"""What running a grid in parallel gains, whether its runs are what they are alone, and how its page scales. Alone on the machine."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import Page, sync_playwright

from mnist_nb.grids import GridSpec, complete, plan_grid, write_grid
from mnist_nb.leaderboard import write_grid_page
from mnist_nb.pipeline import declared_parameters
from mnist_nb.runs import available_cores, update_run

PARAM = {"arch": "base,improved", "seed": "0:6", "epochs": "2", "train_images": "10000", "device": "cpu"}
SAME = ("valid_accuracy", "test_accuracy", "test_errors", "test_macro_f1", "int8_accuracy", "best_epoch")


def command(name: str, *words: str, threads: int | None = None) -> float:
    "Seconds that a command takes."
    start = time.perf_counter()
    env = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    subprocess.run([Path(sys.executable).parent / name, *words], env=env, check=True, stdout=sys.stderr)
    return time.perf_counter() - start


def figures(folder: Path) -> dict[str, Any]:
    "The metrics of a run that must not depend on how it was started."
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    return {name: metrics[name] for name in SAME}


@contextmanager
def opened(path: Path) -> Iterator[Page]:
    "A page in headless Chromium."
    program = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--headless", "--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 1000})
        page.goto(path.as_uri())
        yield page
        browser.close()


def measure_runs(reports: Path, picture: Path | None) -> dict[str, Any]:
    "The grid one by one and two at a time; and a picture of its page."
    param = [f"--param={name}={values}" for name, values in PARAM.items()]
    seconds = {jobs: command("mnist-grid", *param, f"--name=jobs-{jobs}", f"--jobs={jobs}", f"--reports={reports}") for jobs in (2, 1)}
    if picture:
        with opened(reports / "jobs-2" / "index.html") as page: page.screenshot(path=picture)
    record = json.loads((reports / "jobs-2" / "grid.json").read_text())
    return {"runs": len(record["runs"]), "seconds": seconds, "cores": available_cores(),
            "run_seconds": statistics.mean(run["seconds"] for run in record["runs"]),
            "run_core_seconds": statistics.mean(run["cpu_seconds"] for run in record["runs"])}


def measure_alone(reports: Path) -> dict[str, Any]:
    "Each run of the grid by itself: in how many are the metrics the same?"
    record = json.loads((reports / "jobs-2" / "grid.json").read_text())
    equal = {"alone": 0, "other_threads": 0}
    def alone(run):
        own = [f"--param={name}={value}" for name, value in run["parameters"].items()]
        command("mnist-report", "--run", run["run"], f"--reports={reports / 'alone'}", *own, threads=run["threads"])
    with ThreadPoolExecutor(2) as pool: list(pool.map(alone, record["runs"]))  # two commands side by side: nothing is timed here
    for run in record["runs"]:
        equal["alone"] += figures(reports / "alone" / run["run"]) == figures(reports / "jobs-2" / run["run"])
        equal["other_threads"] += figures(reports / "jobs-1" / run["run"]) == figures(reports / "jobs-2" / run["run"])
    return {"runs": len(record["runs"]), "equal": equal, "threads": record["runs"][0]["threads"]}


def synthetic_grid(folder: Path, seeds: int = 10, images: int = 10_000) -> None:
    "50 settings by some seeds, all done, with predictions, without any training."
    random, declared, labels = np.random.default_rng(0), declared_parameters(), np.arange(images) % 10
    param = {"arch": "base,cnn", "learning_rate": "log:1e-4:1e-2:5", "dropout": "lin:0:1:5", "seed": f"0:{seeds}"}
    record = plan_grid(GridSpec("synthetic", param))
    for run in record["runs"]:
        run |= {"status": "done", "seconds": 60.0, "cpu_seconds": 90.0, "threads": 2}
        given = run["parameters"]
        accuracy = 0.98 + 0.01 * (given["arch"] == "cnn") - 0.003 * abs(np.log10(given["learning_rate"]) + 3) + random.normal(0, 0.001)
        logits = np.eye(10, dtype=np.float32)[np.where(random.random(images) < accuracy, labels, (labels + 1) % 10)]
        parameters = complete(given, "default", declared)
        metrics = {"valid_accuracy": accuracy, "test_accuracy": float((logits.argmax(1) == labels).mean()), "training_seconds": 20.0,
                   "test_errors": int((logits.argmax(1) != labels).sum()), "test_images": images, "model_parameters": 1000}
        update_run(folder / run["run"], run=run["run"], status="done", created="2026", stages={}, parameters=parameters, metrics=metrics)
        np.savez_compressed(folder / run["run"] / "predictions.npz", labels=labels, logits=logits)
        (folder / run["run"] / "03_error_analysis.html").touch()
    write_grid(folder, record)


def measure_page(folder: Path) -> dict[str, Any]:
    "How long the page of 500 runs takes to build and to sort, and its size."
    synthetic_grid(folder)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        path = write_grid_page(folder)
        seconds.append(time.perf_counter() - start)
    with opened(path) as page:
        sort = """heading => { const start = performance.now(); heading.querySelector("button").click();
                               heading.getBoundingClientRect(); return performance.now() - start; }"""
        headings = page.query_selector_all(".runs thead th")
        milliseconds = [page.evaluate(sort, heading) for heading in headings for _ in range(2)]
    return {"runs": 500, "seconds": max(seconds), "bytes": path.stat().st_size, "sort_ms": max(milliseconds),
            "median_sort_ms": statistics.median(milliseconds)}


def sentences(measured: dict[str, Any]) -> str:
    "The figures as the README quotes them."
    runs, page, alone = measured["runs"], measured["page"], measured["alone"]
    one, two = (runs["seconds"][jobs] for jobs in ("1", "2"))
    same = f"{len(SAME)} metrics of {alone['equal']['alone']} of the {alone['runs']} runs"
    return (f"{runs['runs']} runs (two architectures, six seeds, two epochs on 10,000 images) took {one:.0f} s one by one and {two:.0f} s "
            f"two at a time, {two / one:.2f} of it; {same} were, to the last digit, those of the same run alone in as many threads. "
            f"The page of {page['runs']} runs takes {page['seconds']:.1f} s to build, has {page['bytes'] / 1e6:.1f} MB, and sorts within "
            f"{page['sort_ms']:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--only", choices=["runs", "alone", "page"], help="measure one part, and keep the others of --output")
    parser.add_argument("--reports", type=Path, help="empty folder for the runs, which stay there; of `runs`, for `alone`")
    options = parser.parse_args()
    measured = json.loads(options.output.read_text()) if options.only and options.output and options.output.exists() else {}
    picture = options.output and options.output.with_suffix(".png")
    with tempfile.TemporaryDirectory() as folder:
        reports = (options.reports or Path(folder) / "runs").resolve()
        for name, measure in (("runs", partial(measure_runs, reports, picture)), ("alone", partial(measure_alone, reports)),
                              ("page", partial(measure_page, Path(folder) / "synthetic"))):
            if options.only in (None, name): measured[name] = json.loads(json.dumps(measure()))
    print(json.dumps(measured, indent=1))
    if options.output: options.output.write_text(json.dumps(measured, indent=1) + "\n")
    if {"runs", "alone", "page"} <= measured.keys(): print(sentences(measured))


if __name__ == "__main__": main()
