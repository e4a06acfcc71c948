"""Test accuracy of recipes and architectures over several seeds: the figures of the README's results table.

Each training is written to accuracy.json when it ends, so that an interrupted benchmark goes on where it was. Run it alone:
two trainings at a time on the same cores slow each other many times over.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from mnist_nb.data import Digits, load_digits
from mnist_nb.models import count_parameters, load_model
from mnist_nb.recipes import Settings, apply_recipe
from mnist_nb.runs import environment, write_json
from mnist_nb.training import evaluate, fit, predict_logits

PLAN = [("default", "base"), ("default", "improved"), ("fast", "nano"), ("best", "base"), ("best", "improved"), ("best", "nano"),
        ("best", "cnn")]  # recipe, architecture


def is_current(result: dict) -> bool:
    "Whether a result was measured with its recipe as it is now."
    settings = result["settings"]
    return settings == asdict(Settings(**apply_recipe(result["recipe"], {"arch": settings["arch"], "seed": settings["seed"]})))


def averaged_accuracy(model: torch.nn.Module, test: Digits) -> float:
    "Accuracy when the probabilities of the image and its eight neighbours, shifted by a pixel, are averaged."
    images = torch.nn.functional.pad(torch.from_numpy(test.images), (1, 1, 1, 1))
    shifts = [predict_logits(model, images[:, down:down + 28, right:right + 28]).softmax(1) for down in range(3) for right in range(3)]
    return (sum(shifts).argmax(1) == torch.from_numpy(test.labels)).double().mean().item()


def train_and_test(settings: Settings) -> dict:  # accuracies are fractions, seconds of training alone
    "One training; the test set is read once, with the checkpoint that validation chose."
    with tempfile.TemporaryDirectory() as folder:
        history = fit(settings, folder, device="cpu")
        model, _ = load_model(Path(folder) / "best_model.pth")
    test = load_digits("test")
    _, accuracy = evaluate(model, torch.from_numpy(test.images), torch.from_numpy(test.labels))
    best = history.loc[history.valid_loss.idxmin()]
    return {"settings": asdict(settings), "parameters": count_parameters(model), "environment": environment(),
            "valid_accuracy": best.valid_accuracy, "test_accuracy": accuracy, "averaged_test_accuracy": averaged_accuracy(model, test),
            "best_epoch": int(best.epoch),
            "seconds": history.seconds.sum()}


def table(results: list[dict]) -> str:
    "Mean ± standard deviation for each recipe and architecture, as Markdown."
    lines = ["| recipe | model | parameters | epochs | validation accuracy | test accuracy | with 9 shifts averaged | training time |",
             "|---|---|---|---|---|---|---|---|"]
    for recipe, arch in PLAN:
        rows = [result for result in results if (result["recipe"], result["settings"]["arch"]) == (recipe, arch)]
        if not rows: continue
        def spread(name, rows=rows):
            values = [row[name] * 100 for row in rows]
            return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}%"
        lines.append(f"| `{recipe}` | `{arch}` | {rows[0]['parameters']:,} | {rows[0]['settings']['epochs']} | {spread('valid_accuracy')} "
                     f"| {spread('test_accuracy')} | {spread('averaged_test_accuracy')} "
                     f"| {statistics.mean(row['seconds'] for row in rows):.0f} s |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", nargs=2, metavar=("RECIPE", "ARCH"), help="one of the rows (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    results = [result for result in json.loads(options.output.read_text()) if is_current(result)] if options.output.exists() else []
    for recipe, arch in [tuple(options.only)] if options.only else PLAN:
        for seed in options.seeds:
            settings = Settings(**apply_recipe(recipe, {"arch": arch, "seed": seed}))
            if any(result["settings"] == asdict(settings) for result in results): continue
            print(f"{recipe}, {arch}, seed {seed}", file=sys.stderr)
            results.append({"recipe": recipe, **train_and_test(settings)})
            write_json(options.output, results)
    print(table(results))


if __name__ == "__main__": main()
