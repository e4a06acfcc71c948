"""Why the defaults are what they are: each variant changes one of them, and is judged on validation images alone.

The test set is not read. Each training is written to recipe.json when it ends, so that an interrupted search goes on where it
was. Run it alone on the machine.
"""

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from mnist_nb.runs import environment, write_json
from mnist_nb.training import Settings, fit

VARIANTS = {
    "the defaults": {},
    "no augmentation": {"rotation": 0.0, "scale": 0.0, "translation": 0.0, "noise": 0.0},
    "no noise": {"noise": 0.0},
    "noise 0.05": {"noise": 0.05},
    "translation 2 pixels": {"translation": 2.0},
    "weight decay 0.01": {"weight_decay": 0.01},
    "weight decay 0.1": {"weight_decay": 0.1},
    "weight decay 1": {"weight_decay": 1.0},
}


def train(settings: Settings) -> dict:
    "The validation figures of one training."
    with tempfile.TemporaryDirectory() as folder: history = fit(settings, folder, device="cpu")
    best = history.loc[history.valid_loss.idxmin()]
    return {"settings": asdict(settings), "valid_accuracy": best.valid_accuracy, "valid_loss": best.valid_loss,
            "environment": environment()}


def table(results: list[dict], arch: str, seeds: list[int]) -> str:
    "Validation accuracy and loss of each variant, as Markdown."
    lines = ["| variant | validation accuracy | validation loss |", "|---|---|---|"]
    for name, changes in VARIANTS.items():
        wanted = [asdict(Settings(arch=arch, seed=seed, **changes)) for seed in seeds]
        rows = [result for result in results if result["settings"] in wanted]
        if len(rows) == len(seeds):
            accuracy, loss = (statistics.mean(row[key] for row in rows) for key in ("valid_accuracy", "valid_loss"))
            lines.append(f"| {name} | {accuracy:.2%} | {loss:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--arch", default="improved")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    results = json.loads(options.output.read_text()) if options.output.exists() else []
    for seed in options.seeds:
        for name, changes in VARIANTS.items():
            settings = Settings(arch=options.arch, seed=seed, **changes)
            if any(result["settings"] == asdict(settings) for result in results): continue
            print(f"{name}, seed {seed}", file=sys.stderr)
            results.append(train(settings))
            write_json(options.output, results)
    print(table(results, options.arch, options.seeds))


if __name__ == "__main__": main()
