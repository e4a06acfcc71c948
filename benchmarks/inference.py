"""How small, exact and fast the exports are, and how well pictures that are no MNIST images are recognised."""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from mnist_nb.data import load_test_digits, photo_of
from mnist_nb.export import KINDS, count_parameters, eager_logits, export_model, kind_of, median_seconds
from mnist_nb.inference import Predictor, load_onnx, prepare
from mnist_nb.models import load_model
from mnist_nb.recipes import Settings, apply_recipe
from mnist_nb.runs import available_cores
from mnist_nb.training import fit

ROOT = Path(__file__).resolve().parent.parent
PLAN = [("improved", "default"), ("nano", "best")]  # architecture, recipe
SEEDS = (0, 1, 2)
NAMES = ("model.onnx", "model.int8.onnx", "model.pt2")


def train(folder: Path, arch: str, recipe: str, seed: int) -> Path:
    "The checkpoint of a training."
    place = folder / f"{arch}-{recipe}-{seed}"
    if not (place / "done").exists():
        fit(Settings(**apply_recipe(recipe, {"arch": arch, "seed": seed})), place, device="cpu", quiet=True)
        (place / "done").touch()
    return place / "best_model.pth"


def measure_exports(checkpoint: Path, test) -> dict[str, dict]:
    "Size and accuracy of each kind of export."
    model, content = load_model(checkpoint)
    return {name: export_model(model, content, checkpoint.parent / name, test) for name in NAMES}


def usual_path(model: torch.nn.Module):
    "One picture as such projects usually predict it: Pillow, torchvision's transforms, torch; from a file, or from an array."
    prepare = transforms.Compose([transforms.Resize((28, 28)), transforms.ToTensor()])  # the model itself normalises
    def answer(image):
        with torch.no_grad(): return torch.softmax(model(prepare(image).unsqueeze(0)), dim=1).topk(1).indices.item()
    return {"from a PNG file": lambda path: answer(Image.open(path).convert("L")),
            "from an array": lambda array: answer(Image.fromarray(array).convert("L"))}


def measure_speed(checkpoint: Path, test) -> dict[str, dict[str, float]]:
    "Milliseconds a call, by runner, number of images, and threads."
    model, _ = load_model(checkpoint)
    rows = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runners = {"torch, eager": eager_logits(model),
                   **{name: load_onnx(checkpoint.parent / name, threads=threads).logits for name in ("model.onnx", "model.int8.onnx")}}
        for name, run in runners.items():
            for n in (1, 256):
                images = test.images[:n]
                rows.setdefault(name, {})[f"{n} at once, {threads} threads"] = \
                    1000 * median_seconds(lambda run=run, images=images: run(images).argmax(1), at_least=2)
    torch.set_num_threads(1)
    picture = checkpoint.parent / "digit.png"
    Image.fromarray(test.images[0]).save(picture)
    usual = usual_path(model)
    rows["usual path"] = {name: 1000 * median_seconds(lambda run=run, source=source: run(source), at_least=2)
                          for (name, run), source in zip(usual.items(), (picture, test.images[0]))}
    predictor = Predictor(checkpoint.parent / "model.int8.onnx")
    photo = photo_of(test.images[0], np.random.default_rng(0))
    rows["a photo, whole"] = {"read and prepare": 1000 * median_seconds(lambda: prepare(photo), at_least=2),
                              "predict": 1000 * median_seconds(lambda: predictor.predict(photo), at_least=2)}
    torch.set_num_threads(available_cores())
    return rows


def measure_photos(model: Path, test) -> dict[str, float]:
    "Accuracy on the test images as they are, and as photos."
    predictor = Predictor(model)
    photos = (photo_of(image, np.random.default_rng(number)) for number, image in enumerate(test.images))
    results = [result for _, result in predictor.predict_many(photos, 1)]
    probabilities, unlike = predictor.judge(test.images)
    return {"clean_accuracy": float((probabilities.argmax(1) == test.labels).mean()),
            "photo_accuracy": float(np.mean([result.digits[:1] == (label,) for result, label in zip(results, test.labels)])),
            "clean_unlike": float(unlike.mean()),
            "photo_unlike": float(np.mean(["unlike any digit" in result.warnings for result in results])),
            "photo_several": float(np.mean([any("separate" in warning for warning in result.warnings) for result in results]))}


def wall_seconds(words: list[str], rounds: int = 9) -> float:
    "The median time of a process, from start to end."
    durations = []
    for _ in range(rounds):
        start = time.perf_counter()
        subprocess.run(words, check=True, capture_output=True)
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


def measure(folder: Path) -> dict:
    "All figures."
    test, results = load_test_digits(), {"models": {}}
    for arch, recipe in PLAN:
        checkpoints = [train(folder, arch, recipe, seed) for seed in SEEDS]
        results["models"][arch] = {"recipe": recipe, "parameters": count_parameters(load_model(checkpoints[0])[0]),
                                   "exports": [measure_exports(checkpoint, test) for checkpoint in checkpoints],
                                   "milliseconds": measure_speed(checkpoints[0], test),
                                   "photos": [measure_photos(checkpoint.parent / "model.int8.onnx", test) for checkpoint in checkpoints]}
        print(json.dumps(results["models"][arch], indent=1), flush=True)
    model, picture = checkpoints[0].parent / "model.int8.onnx", checkpoints[0].parent / "digit.png"
    results["predict_seconds"] = wall_seconds([str(Path(sys.executable).parent / "mnist-predict"), "--image", str(picture), "--model", str(model)])
    results["import_seconds"] = wall_seconds([sys.executable, "-c", "import mnist_nb.inference"])
    results["fuzz"] = json.loads(subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py"], check=True, capture_output=True).stdout)
    return results
