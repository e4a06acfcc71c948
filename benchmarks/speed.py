"""How fast training is, with everything it is compared with measured in the same run: the figures of the README's speed table.

Run it alone on the machine (`make bench`). Rates are the best of several rounds, taken in turn, so that a slow moment of the
machine does not fall on one of them alone.
"""

import argparse
import gzip
import os

import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import MNIST

from mnist_nb.data import AUGMENTATIONS, SHA256, find_data, load_digits, split_digits, to_unit
from mnist_nb.models import create_model
from mnist_nb.recipes import Settings, apply_recipe
from mnist_nb.runs import available_cores, environment, write_json
from mnist_nb.training import create_optimizer, draw_batches, evaluate, pick_precision, train_epoch

CPU, BATCH = torch.device("cpu"), 256


def seconds_of(call: Callable[[], object]) -> float:
    "How long a call takes."
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gemm_step(precision: torch.dtype) -> Callable[[], None]:
    "All matrix multiplications of a training step of `improved`, forward and backward, and nothing else."
    shapes = [(layer.in_features, layer.out_features) for layer in create_model("improved").modules() if isinstance(layer, nn.Linear)]
    def draw(*shape): return torch.randn(*shape).to(precision)
    layers = [(draw(BATCH, inputs), draw(outputs, inputs), draw(BATCH, outputs), draw(outputs)) for inputs, outputs in shapes]

    def step() -> None:
        for i, (x, weight, gradient, bias) in enumerate(layers):
            torch.addmm(bias, x, weight.t())
            gradient.t() @ x
            if i: gradient @ weight  # the images need no gradient
    return step


def our_epoch(settings: Settings, steps: int) -> Callable[[], object]:
    "So many steps of our training."
    images, labels = (torch.from_numpy(array) for array in load_digits("train"))
    torch.manual_seed(0)
    model = create_model(settings.arch, dropout=settings.dropout).to(memory_format=torch.channels_last)
    optimizer, _ = create_optimizer(model, settings, CPU)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    batches, precision = torch.randint(len(images), (steps, settings.batch_size)), pick_precision(settings.precision, CPU)
    return lambda: train_epoch(model, optimizer, scheduler, images, labels, batches, settings, precision)


def usual_rate(transform: nn.Module, steps: int, folder: str) -> float:  # images a second
    "The pipeline of most tutorials: a transform for each PIL image, a DataLoader with two workers, the same model and optimiser."
    whole = transforms.Compose([transform, transforms.ToTensor()])
    loader = DataLoader(MNIST(folder, train=True, transform=whole), batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True)
    torch.manual_seed(0)
    model = create_model("improved")
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Dropout): setattr(parent, name, nn.Dropout(layer.p))  # torch's own
    optimizer = torch.optim.AdamW(model.parameters())
    batches = iter(loader)
    def step() -> None:
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        loss.item()
    for _ in range(10): step()  # workers have started, and their queue is as full as it will be
    return BATCH * steps / seconds_of(lambda: [step() for _ in range(steps)])


def unpack_for_torchvision(folder: str) -> None:
    "The archives as torchvision's MNIST wants them."
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in SHA256: (raw / name).write_bytes(gzip.decompress((find_data() / f"{name}.gz").read_bytes()))


def reference_network() -> nn.Sequential:
    "A plain small CNN that reaches about 99% in an epoch."
    return nn.Sequential(nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10))


def train_reference(seed: int) -> tuple[float, float]:  # seconds, test accuracy
    "One epoch over 60,000 images as they are, batch 256, Adam, one cycle up to 0.01: data in memory, nothing else timed."
    images, labels = (torch.from_numpy(array) for array in load_digits("train"))
    images = (to_unit(images) - 0.1307) / 0.3081
    torch.manual_seed(seed)
    model, steps = reference_network(), len(images) // BATCH
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    def epoch() -> None:
        for batch in torch.randperm(len(images))[:steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            scheduler.step()
    seconds, test = seconds_of(epoch), load_digits("test")
    with torch.no_grad(): logits = model.eval()((to_unit(torch.from_numpy(test.images)) - 0.1307) / 0.3081)
    return seconds, (logits.argmax(1) == torch.from_numpy(test.labels)).double().mean().item()


def train_fast(seed: int) -> tuple[float, float]:  # seconds, test accuracy
    "The recipe `fast`, from the first step to the last: what `fit` does, without validation and checkpoints."
    settings = Settings(**apply_recipe("fast", {"seed": seed}))
    train, _ = split_digits(load_digits("train"), settings.train_images, settings.valid_images, settings.seed)
    images, labels = (torch.from_numpy(array) for array in train)
    torch.manual_seed(seed)
    model = create_model(settings.arch, dropout=settings.dropout).to(memory_format=torch.channels_last)
    optimizer, scheduler = create_optimizer(model, settings, CPU)
    order, precision = torch.Generator().manual_seed(seed), pick_precision(settings.precision, CPU)
    def run() -> None:
        for _ in range(settings.epochs):
            batches = draw_batches(len(images), settings.batch_size, order)
            train_epoch(model, optimizer, scheduler, images, labels, batches, settings, precision)
    seconds, test = seconds_of(run), load_digits("test")
    return seconds, evaluate(model, torch.from_numpy(test.images), torch.from_numpy(test.labels))[1]


def peak_memory() -> int:
    "Bytes that a training process holds at most: `mnist-train --recipe best`, one epoch."
    with tempfile.TemporaryDirectory() as folder:
        words = [str(Path(sys.executable).parent / "mnist-train"), "--recipe", "best", "--epochs", "1", "--save_dir", folder]
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
        usage = os.wait4(process.pid, 0)[2]
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="trainings of the recipe fast, and of its reference")
    parser.add_argument("--rounds", type=int, default=8, help="times each rate is taken")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    torch.set_num_threads(available_cores())
    def say(text): print(text, file=sys.stderr, flush=True)

    calls = {}
    for precision in ("float32", "bfloat16"):
        gemms = gemm_step(getattr(torch, precision))
        calls[f"matrix multiplications alone, {precision}"] = (lambda gemms=gemms: [gemms() for _ in range(60)], 60)
        for name, augmentation in AUGMENTATIONS.items():
            settings = Settings(batch_size=BATCH, precision=precision, **asdict(augmentation))
            calls[f"ours, {name}, {precision}"] = our_epoch(settings, 60), 60
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(options.rounds + 1):
        say(f"rates, round {number} of {options.rounds}")
        for name, (call, steps) in calls.items():
            rate = BATCH * steps / seconds_of(call)
            if number: rates[name].append(rate)  # round 0 warms up
    with tempfile.TemporaryDirectory() as folder:
        unpack_for_torchvision(folder)
        for name, transform, steps in (("affine", transforms.RandomAffine(10, (1 / 28, 1 / 28), (0.9, 1.1)), 100),
                                       ("elastic", transforms.ElasticTransform(alpha=60.0, sigma=4.0), 30)):
            say(f"the usual pipeline, {name}")
            rates[f"usual, {name}"] = [usual_rate(transform, steps, folder) for _ in range(2)]
    fast, reference = [], []
    for seed in range(options.seeds):
        fast.append(train_fast(seed))
        reference.append(train_reference(seed))
        say(f"fast: {fast[-1][0]:.2f} s, {fast[-1][1]:.2%}; its reference: {reference[-1][0]:.2f} s, {reference[-1][1]:.2%}")
    say("memory")
    results = {"images_per_second": rates, "fast": {"seconds": [run[0] for run in fast], "test_accuracy": [run[1] for run in fast]},
               "reference": {"seconds": [run[0] for run in reference], "test_accuracy": [run[1] for run in reference]},
               "peak_memory_bytes": peak_memory(), "environment": environment()}
    write_json(options.output, results)
    print(table(results))
    plot(results).savefig(options.output.with_suffix(".png"), dpi=80)


def table(results: dict) -> str:
    "The figures as Markdown."
    best = {name: max(values) for name, values in results["images_per_second"].items()}
    lines = ["| `improved`, batch 256 | images/s | share of the multiplications' rate | times the usual pipeline |", "|---|---|---|---|"]
    for precision in ("float32", "bfloat16"):
        gemm = best[f"matrix multiplications alone, {precision}"]
        lines.append(f"| matrix multiplications alone, {precision} | {gemm:,.0f} | | |")
        for name in AUGMENTATIONS:
            ours, usual = best[f"ours, {name}, {precision}"], best.get(f"usual, {name}")
            lines.append(f"| ours, `{name}`, {precision} | {ours:,.0f} | {ours / gemm:.2f} | {f'{ours / usual:.1f}' if usual else ''} |")
    lines += [f"| the usual pipeline, {name}, float32 | {best[f'usual, {name}']:,.0f} | | |" for name in ("affine", "elastic")]
    def spread(values, digits=2, factor=1): return (f"{statistics.mean(values) * factor:.{digits}f} ± "
                                                    f"{statistics.stdev(values) * factor if len(values) > 1 else 0:.{digits}f}")
    lines += ["", f"| {len(results['fast']['seconds'])} seeds | training time | test accuracy |", "|---|---|---|"]
    for name, key in (("recipe `fast`", "fast"), ("a plain CNN, one epoch", "reference")):
        lines.append(f"| {name} | {spread(results[key]['seconds'])} s | {spread(results[key]['test_accuracy'], factor=100)}% |")
    share = statistics.mean(results["fast"]["seconds"]) / statistics.mean(results["reference"]["seconds"])
    lines += ["", f"`fast` takes {share:.2f} of the plain CNN's time. A training process holds at most "
              f"{results['peak_memory_bytes'] / 1e9:.2f} GB (`mnist-train --recipe best`)."]
    return "\n".join(lines)


def plot(results: dict) -> Figure:
    "Rates as bars."
    best = {name: max(values) for name, values in results["images_per_second"].items()}
    names = list(best)[::-1]
    colours = ["C7" if name.startswith("matrix") else "C1" if name.startswith("usual") else "C0" for name in names]
    figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
    bars = axis.barh(names, [best[name] for name in names], color=colours)
    axis.bar_label(bars, [f" {best[name]:,.0f}" for name in names], fontsize=8)
    axis.set(xlabel="images per second, improved, batch 256", xlim=(0, max(best.values()) * 1.12))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__": main()
