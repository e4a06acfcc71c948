"""Why the recipes are what they are: each variant changes a setting or two of a starting point, judged on validation images alone.

The test set is not read. Each training is written to recipe.json when it ends, so that an interrupted search goes on where it
was. Accuracy and loss do not depend on what else the machine does; the seconds do. The trainings of the default were made at an
earlier commit (it is in their records), with torch's own dropout.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from mnist_nb.runs import environment, write_json
from mnist_nb.recipes import Settings
from mnist_nb.training import fit

ELASTIC = {"stretch": 0.1, "shear": 5.0, "elastic": 0.8, "noise": 0.0}
LONG = {"batch_size": 256, "learning_rate": 0.005, "weight_decay": 0.05, "dropout": 0.25, "precision": "auto", "patience": 1000, **ELASTIC}
SHORT = {"arch": "nano", "epochs": 1, "batch_size": 384, "learning_rate": 0.04, "weight_decay": 0.05, "precision": "auto",
         "rotation": 0.0, "scale": 0.0, "translation": 0.0, "noise": 0.0}
SEARCHES = {  # name: seeds, starting point, variants by name
    "default": ([0, 1], {}, {
        "as it is": {},
        "no augmentation": {"rotation": 0.0, "scale": 0.0, "translation": 0.0, "noise": 0.0},
        "no noise": {"noise": 0.0},
        "noise 0.05": {"noise": 0.05},
        "translation 2 pixels": {"translation": 2.0},
        "weight decay 0.01": {"weight_decay": 0.01},
        "weight decay 0.1": {"weight_decay": 0.1},
        "weight decay 1": {"weight_decay": 1.0},
    }),
    "best, improved": ([0], {**LONG, "epochs": 40}, {
        "as it is": {},
        "100 epochs": {"epochs": 100},
        "100 epochs, elastic 1.2 pixels": {"epochs": 100, "elastic": 1.2},
        "no elastic deformation": {"elastic": 0.0},
        "elastic 0.4 pixels": {"elastic": 0.4},
        "elastic 1.2 pixels": {"elastic": 1.2},
        "elastic 1.6 pixels": {"elastic": 1.6},
        "no dropout": {"dropout": 0.0},
    }),
    "best, cnn": ([0], {**LONG, "arch": "cnn", "epochs": 12}, {
        "as it is": {},
        "no elastic deformation": {"elastic": 0.0},
        "elastic 1.2 pixels": {"elastic": 1.2},
        "translation 2 pixels": {"translation": 2.0},
        "weight decay 0.5": {"weight_decay": 0.5},
        "dropout 1": {"dropout": 1.0},
        "learning rate 0.01": {"learning_rate": 0.01},
        "batch 128": {"batch_size": 128},
        "cutout 8 pixels": {"cutout": 8.0},
    }),
    "best, nano": ([0], {**LONG, "arch": "nano", "epochs": 20}, {
        "as it is": {},
        "elastic 1.2 pixels": {"elastic": 1.2},
        "weight decay 0.5": {"weight_decay": 0.5},
    }),
    "fast": ([0, 1, 2], SHORT, {
        "as it is": {},
        "batch 256, learning rate 0.02": {"batch_size": 256, "learning_rate": 0.02},
        "batch 512": {"batch_size": 512},
        "learning rate 0.02": {"learning_rate": 0.02},
        "learning rate 0.06": {"learning_rate": 0.06},
        "no label smoothing": {"label_smoothing": 0.0},
        "weight decay 0.5": {"weight_decay": 0.5},
        "float32": {"precision": "float32"},
        "light augmentation": {"rotation": 5.0, "scale": 0.05, "translation": 1.0},
    }),
}


def train(settings: Settings) -> dict:
    "The validation figures of one training."
    with tempfile.TemporaryDirectory() as folder: history = fit(settings, folder, device="cpu")
    best = history.loc[history.valid_loss.idxmin()]
    return {"settings": asdict(settings), "valid_accuracy": best.valid_accuracy, "valid_loss": best.valid_loss,
            "seconds": history.seconds.sum(), "environment": environment()}


def summary(results: list[dict], search: str) -> dict[str, list[dict]]:
    "The finished trainings of each variant, for those with all seeds."
    seeds, start, variants = SEARCHES[search]
    finished = {}
    for name, changes in variants.items():
        wanted = [asdict(Settings(**{**start, **changes, "seed": seed})) for seed in seeds]
        rows = [result for result in results if result["settings"] in wanted]
        if len(rows) == len(seeds): finished[name] = rows
    return finished


def table(results: list[dict]) -> str:
    "Validation accuracy and loss of each variant, as Markdown. Losses compare only at the same label smoothing."
    lines = ["| recipe | variant | trainings | validation accuracy | validation loss | seconds |", "|---|---|---|---|---|---|"]
    for search in SEARCHES:
        for name, rows in summary(results, search).items():
            accuracy, loss = (statistics.mean(row[key] for row in rows) for key in ("valid_accuracy", "valid_loss"))
            seconds = f"{statistics.mean(row['seconds'] for row in rows):.1f}" if search == "fast" else ""  # the others ran side by side
            lines.append(f"| {search} | {name} | {len(rows)} | {accuracy:.2%} | {loss:.4f} | {seconds} |")
    return "\n".join(lines)


def plot(results: list[dict]) -> Figure:
    "The validation error of each variant: a point a seed, a line at the mean of the starting point."
    searches = {search: finished for search in SEARCHES if (finished := summary(results, search))}
    figure, axes = plt.subplots(-(-len(searches) // 2), 2, figsize=(12, 2.9 * -(-len(searches) // 2)), layout="constrained", squeeze=False)
    for axis in axes.flat[len(searches):]: axis.axis("off")
    for axis, (search, finished) in zip(axes.flat, searches.items()):
        names = list(finished)[::-1]
        for place, name in enumerate(names):
            errors = [100 * (1 - row["valid_accuracy"]) for row in finished[name]]
            axis.plot(errors, [place] * len(errors), "o", color="C0" if name == "as it is" else "C1", markersize=5)
        axis.axvline(statistics.mean(100 * (1 - row["valid_accuracy"]) for row in finished["as it is"]), color="C0", alpha=0.4)
        highest = max(100 * (1 - row["valid_accuracy"]) for rows in finished.values() for row in rows)
        axis.set(title=search, yticks=range(len(names)), yticklabels=names, xlim=(0, highest * 1.06), xlabel="validation error, %")
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--searches", nargs="+", default=list(SEARCHES), choices=list(SEARCHES))
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    for search in options.searches:
        seeds, start, variants = SEARCHES[search]
        for name, changes in variants.items():
            for seed in seeds:
                settings = Settings(**{**start, **changes, "seed": seed})
                if any(result["settings"] == asdict(settings) for result in results): continue
                print(f"{search}: {name}, seed {seed}", file=sys.stderr)
                results.append(train(settings))
                write_json(options.output, results)
    print(table(results))
    plot(results).savefig(options.output.with_suffix(".png"), dpi=80)


if __name__ == "__main__": main()
