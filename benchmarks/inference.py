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
from PIL import Image, ImageDraw
from torchvision import transforms

from mnist_nb.data import load_test_digits, photo_of
from mnist_nb.export import eager_logits, export_model, median_seconds
from mnist_nb.inference import Predictor, load_onnx, plot_steps, prepare
from mnist_nb.models import count_parameters, load_model
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
        fit(Settings(**apply_recipe(recipe, {"arch": arch, "seed": seed})), place, device="cpu")
        (place / "done").touch()
    return place / "best_model.pth"


def measure_exports(checkpoint: Path, test) -> dict[str, dict]:
    "Size and accuracy of each kind of export."
    model, content = load_model(checkpoint)
    return {name: export_model(model, content, checkpoint.parent / name, test) for name in NAMES}


def usual_path(model: torch.nn.Module):
    "One picture as such projects usually predict it: Pillow, torchvision's transforms, torch; from a file, or from an array."
    model = model.eval()
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
    predictor = Predictor(checkpoint.parent / "model.int8.onnx")
    for name, source in (("from a PNG file", picture), ("from an array", test.images[0])):
        for path, run in (("usual path", usual[name]), ("our path", lambda source: predictor.predict(source, top_k=1))):
            rows.setdefault(path, {})[name] = 1000 * median_seconds(lambda run=run, source=source: run(source), at_least=2)
    photo = photo_of(test.images[0], np.random.default_rng(0))
    rows["our path"]["from a photo"] = 1000 * median_seconds(lambda: predictor.predict(photo), at_least=2)
    torch.set_num_threads(available_cores())
    return rows


def as_photos(test) -> tuple[np.ndarray, float]:
    "Each test image as a photo, brought back into MNIST's form; and the share of photos in which several digits are seen."
    prepared = (prepare(photo_of(image, np.random.default_rng(number))) for number, image in enumerate(test.images))
    images, n_digits = zip(*((item.image, item.n_digits) for item in prepared))  # not the large steps on the way: they would fill gigabytes
    return np.stack(images), float(np.mean(np.array(n_digits) > 1))


def measure_photos(model: Path, test, photos: np.ndarray) -> dict[str, float]:
    "Accuracy on the test images as they are, and as photos; and how many of them are called unlike any digit."
    predictor = Predictor(model)
    (clean, clean_unlike), (photo, photo_unlike) = predictor.judge(test.images), predictor.judge(photos)
    return {"clean_accuracy": float((clean.argmax(1) == test.labels).mean()), "clean_unlike": float(clean_unlike.mean()),
            "photo_accuracy": float((photo.argmax(1) == test.labels).mean()), "photo_unlike": float(photo_unlike.mean())}


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
    test, models = load_test_digits(), {}
    checkpoints = {arch: [train(folder, arch, recipe, seed) for seed in SEEDS] for arch, recipe in PLAN}
    print("making photos", flush=True)
    photos, several = as_photos(test)
    for arch, recipe in PLAN:
        models[arch] = {"recipe": recipe, "parameters": count_parameters(load_model(checkpoints[arch][0])[0]),
                        "exports": [measure_exports(checkpoint, test) for checkpoint in checkpoints[arch]],
                        "photos": [measure_photos(checkpoint.parent / "model.int8.onnx", test, photos) for checkpoint in checkpoints[arch]],
                        "milliseconds": measure_speed(checkpoints[arch][0], test)}
        print(json.dumps(models[arch]["milliseconds"], indent=1), flush=True)
    model, picture = (checkpoints["improved"][0].parent / name for name in ("model.int8.onnx", "digit.png"))
    predict = [str(Path(sys.executable).parent / "mnist-predict"), "--image", str(picture), "--model", str(model)]
    fuzz = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py"], check=True, capture_output=True)
    return {"models": models, "photos_with_several": several, "predict_seconds": wall_seconds(predict),
            "import_seconds": wall_seconds([sys.executable, "-c", "import mnist_nb.inference"]), "damaged_files": json.loads(fuzz.stdout)}


def spread(values: list[float], digits: int = 2) -> str:
    "Mean and standard deviation of shares, in per cent."
    return f"{100 * statistics.mean(values):.{digits}f} ± {100 * statistics.stdev(values):.{digits}f}%"


def table(measured: dict) -> str:
    "The figures as the README shows them."
    lines = ["| model, recipe | file | size | test accuracy | changed predictions | 1 image, 1 thread | 256 images, 2 threads |",
             "|---|---|---|---|---|---|---|"]
    for arch, own in measured["models"].items():
        originals = [exports["model.onnx"]["original_accuracy"] for exports in own["exports"]]
        rows = {"torch, eager": (own["parameters"] * 4, originals, 0)}
        for name in ("model.onnx", "model.int8.onnx"):
            files = [exports[name] for exports in own["exports"]]
            rows[name] = (files[0]["bytes"], [file["accuracy"] for file in files], max(file["changed_predictions"] for file in files))
        for name, (size, accuracy, changed) in rows.items():
            time_of = own["milliseconds"][name]
            lines.append(f"| `{arch}`, `{own['recipe']}` | {name} | {size / 1000:,.0f} kB | {spread(accuracy)} | {changed} | "
                         f"{time_of['1 at once, 1 threads']:.3f} ms | {256_000 / time_of['256 at once, 2 threads']:,.0f} images/s |")
    return "\n".join(lines)


def sentences(measured: dict) -> str:
    "More figures, as the README quotes them."
    own = measured["models"]["improved"]
    usual, ours = own["milliseconds"]["usual path"], own["milliseconds"]["our path"]
    alone = own["milliseconds"]["model.int8.onnx"]["1 at once, 1 threads"]
    clean, photo, unlike = (spread([result[name] for result in own["photos"]])
                            for name in ("clean_accuracy", "photo_accuracy", "photo_unlike"))
    return (f"One picture at a time, on one thread, `Predictor` with `improved` in 8 bits takes {ours['from an array']:.2f} ms for an "
            f"MNIST array, {ours['from a PNG file']:.2f} ms for an MNIST image in a PNG file, and {ours['from a photo']:.0f} ms for a "
            f"photo. The usual path (Pillow, torchvision's Resize and ToTensor, torch), which does not look for the digit, takes "
            f"{usual['from an array']:.2f} and {usual['from a PNG file']:.2f} ms for the first two. The 8-bit model alone, from array to "
            f"digit, takes {alone:.3f} ms; the usual path takes {usual['from an array'] / alone:.1f} times as long. `mnist-predict` takes "
            f"{measured['predict_seconds']:.2f} s for one PNG file, start and end of the process included. As photos, the 10,000 test "
            f"images are recognised with {photo}, as they are with {clean}; {unlike} of the photos are called unlike any digit, and "
            f"{measured['photos_with_several']:.2%} are taken for several digits.")


def draw(path: Path, test) -> None:
    "The README's picture: several pictures, step by step."
    photos = [photo_of(test.images[number], np.random.default_rng(number)) for number in (0, 1, 4, 3)]
    negative = np.asarray(Image.open(io.BytesIO(photo_of(test.images[8], np.random.default_rng(8))))) ^ 255
    ink = np.asarray(Image.fromarray(test.images[11]).resize((140, 140), Image.Resampling.BICUBIC))[:, :, None] / 255
    coloured = np.pad((1 - ink) * [0.2, 0.6, 0.2] + ink * [0.85, 0.3, 0.2], ((20, 60), (50, 30), (0, 0)), mode="edge")
    sheet, two, pen = np.full((600, 500), 215, np.uint8), np.full((60, 80), 250, np.uint8), Image.new("L", (200, 240), 240)
    sheet[420:476, 360:416] -= np.kron(test.images[15], np.ones((2, 2), np.uint8)) // 2
    two[12:40, 8:36] -= test.images[61] // 2
    two[20:48, 44:72] -= test.images[63] // 2
    ImageDraw.Draw(pen).line([(60, 40), (140, 36), (100, 110), (150, 150), (120, 200), (60, 190)], fill=40, width=3)
    plot_steps([*photos, negative, coloured, sheet, np.asarray(pen), two]).savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--folder", type=Path, help="keep the trained models here, and use those that are there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary: measured = measure(options.folder or Path(temporary))
    print(table(measured), sentences(measured), sep="\n\n")
    if options.output:
        options.output.write_text(json.dumps(measured, indent=1) + "\n")
        draw(options.output.with_suffix(".png"), load_test_digits())


if __name__ == "__main__": main()
