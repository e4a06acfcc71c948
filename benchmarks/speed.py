"""How fast training is, with everything it is compared with measured in the same run: the figures of the README's speed tables.

Run it alone on the machine (`make bench`). Rates are the best of several rounds, taken in turn, so that a slow moment of the
machine does not fall on one of them alone. bfloat16 is measured only where `precision=auto` would choose it.
"""

import argparse
import gzip
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
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
from mnist_nb.models import ARCHITECTURES, create_model
from mnist_nb.recipes import Settings, apply_recipe
from mnist_nb.runs import available_cores, environment, read_run, write_json
from mnist_nb.training import TrainingState, create_optimizer, draw_batches, evaluate, pick_precision, train_epoch

CPU, BATCH = torch.device("cpu"), 256


def seconds_of(call: Callable[[], object]) -> float:
    "How long a call takes."
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def gemm_rate(precision: torch.dtype, steps: int = 60) -> Callable[[], float]:
    "Measures all matrix multiplications of a training step of `improved`, forward and backward, and nothing else."
    shapes = [(layer.in_features, layer.out_features) for layer in create_model("improved").modules() if isinstance(layer, nn.Linear)]
    def draw(*shape): return torch.randn(*shape).to(precision)
    layers = [(draw(BATCH, inputs), draw(outputs, inputs), draw(BATCH, outputs), draw(outputs)) for inputs, outputs in shapes]

    def step() -> None:
        for i, (x, weight, gradient, bias) in enumerate(layers):
            torch.addmm(bias, x, weight.t())
            gradient.t() @ x
            if i: gradient @ weight  # the images need no gradient
    return lambda: BATCH * steps / seconds_of(lambda: [step() for _ in range(steps)])


def our_rate(settings: Settings, steps: int = 60, channels_last: bool = True, compiled: bool = False) -> Callable[[], float]:
    "Measures our training."
    images, labels = (torch.from_numpy(array) for array in load_digits("train"))
    torch.manual_seed(0)
    model = create_model(settings.arch, dropout=settings.dropout)
    model = model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    optimizer, _ = create_optimizer(model, settings, CPU)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    network = torch.compile(model) if compiled else model
    batches, precision = torch.randint(len(images), (steps, settings.batch_size)), pick_precision(settings.precision, CPU)
    def run() -> object: return train_epoch(network, optimizer, scheduler, images, labels, batches, settings, precision)
    return lambda: settings.batch_size * steps / seconds_of(run)


def usual_rate(transform: nn.Module, folder: str, steps: int) -> Callable[[], float]:
    "Measures the pipeline of most tutorials: a transform for each PIL image, a DataLoader with two workers, torch's own layers."
    data = MNIST(folder, train=True, transform=transforms.Compose([transform, transforms.ToTensor()]))
    torch.manual_seed(0)
    model = create_model("improved")
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Dropout): setattr(parent, name, nn.Dropout(layer.p))
    optimizer = torch.optim.AdamW(model.parameters())

    def rate() -> float:
        batches = iter(DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=2, drop_last=True))
        def step() -> None:
            images, labels = next(batches)
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels, label_smoothing=0.1)
            loss.backward()
            optimizer.step()
            loss.item()
        for _ in range(10): step()  # the workers have started, and their queue is as full as it will be
        return BATCH * steps / seconds_of(lambda: [step() for _ in range(steps)])
    return rate


def unpack_for_torchvision(folder: str) -> None:
    "The archives as torchvision's MNIST wants them."
    raw = Path(folder) / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in SHA256: (raw / name).write_bytes(gzip.decompress((find_data() / f"{name}.gz").read_bytes()))


def number_formats() -> list[str]:
    "float32, and what `precision=auto` chooses where that is another."
    return sorted({"float32", str(pick_precision("auto", CPU)).removeprefix("torch.")}, reverse=True)


def measure_rates(rounds: int, folder: str) -> dict[str, list[float]]:  # images a second, by name
    "All rates, in turn."
    calls = {}
    for precision in number_formats():
        calls[f"matrix multiplications alone, {precision}"] = gemm_rate(getattr(torch, precision))
        for name, augmentation in AUGMENTATIONS.items():
            calls[f"ours, {name}, {precision}"] = our_rate(Settings(batch_size=BATCH, precision=precision, **asdict(augmentation)))
    calls["usual, affine"] = usual_rate(transforms.RandomAffine(10, (1 / 28, 1 / 28), (0.9, 1.1)), folder, 60)
    calls["usual, elastic"] = usual_rate(transforms.ElasticTransform(alpha=40.0, sigma=4.0), folder, 20)  # about 0.8 pixels, as ours
    for arch in ("improved", "cnn", "nano"):
        base = {"arch": arch, "batch_size": BATCH, "precision": "auto", **asdict(AUGMENTATIONS["elastic"])}
        calls[f"{arch}: as in the recipe best"] = our_rate(Settings(**base), 30)
        if len(number_formats()) > 1: calls[f"{arch}: float32"] = our_rate(Settings(**{**base, "precision": "float32"}), 30)
        if arch != "improved": calls[f"{arch}: not channels-last"] = our_rate(Settings(**base), 30, channels_last=False)
        if shutil.which("g++"): calls[f"{arch}: torch.compile"] = our_rate(Settings(**base), 30, compiled=True)
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        print(f"rates, round {number} of {rounds}", file=sys.stderr, flush=True)
        for name, call in calls.items():
            rate = call()
            if number: rates[name].append(rate)  # round 0 warms up
    return rates


def reference_network() -> nn.Sequential:
    "A plain small CNN that reaches about 99% in an epoch."
    return nn.Sequential(nn.Conv2d(1, 24, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(24, 32, 3), nn.MaxPool2d(2), nn.ReLU(),
                         nn.Flatten(), nn.Linear(800, 256), nn.ReLU(), nn.Linear(256, 10))


def train_reference(seed: int) -> tuple[float, float]:  # seconds, test accuracy
    "One epoch of a plain CNN over the images, and in the number format, of the recipe `fast`: batch 256, Adam, one cycle up to 0.01."
    images, labels = (torch.from_numpy(array) for array in split_digits(load_digits("train"), seed=seed)[0])
    images = (to_unit(images) - 0.1307) / 0.3081
    torch.manual_seed(seed)
    model, steps, precision = reference_network(), len(images) // BATCH, pick_precision("auto", CPU)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    def epoch() -> None:
        for batch in torch.randperm(len(images))[:steps * BATCH].split(BATCH):
            optimizer.zero_grad()
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                loss = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
            scheduler.step()
    seconds, test = seconds_of(epoch), load_digits("test")
    with torch.no_grad(): logits = model.eval()((to_unit(torch.from_numpy(test.images)) - 0.1307) / 0.3081)
    return seconds, (logits.argmax(1) == torch.from_numpy(test.labels)).double().mean().item()


def train_fast(seed: int) -> tuple[float, float]:  # seconds, test accuracy
    "The recipe `fast`: the steps that `fit` takes, without what it does around them."
    settings = Settings(**apply_recipe("fast", {"seed": seed}))
    train, _ = split_digits(load_digits("train"), settings.train_images, settings.valid_images, settings.seed)
    images, labels = (torch.from_numpy(array) for array in train)
    state, precision = TrainingState.start(settings, train, CPU), pick_precision(settings.precision, CPU)
    def run() -> None:
        for _ in range(settings.epochs):
            batches = draw_batches(len(images), settings.batch_size, state.order)
            train_epoch(state.model, state.optimizer, state.scheduler, images, labels, batches, settings, precision)
    seconds, test = seconds_of(run), load_digits("test")
    return seconds, evaluate(state.model, torch.from_numpy(test.images), torch.from_numpy(test.labels))[1]


def measure_fast(seeds: int) -> dict[str, dict[str, list[float]]]:  # "seconds" and "test_accuracy" of "fast" and "reference"
    "The recipe `fast` and its reference, in turn, each first as often as second."
    runs = {"fast": [], "reference": []}
    train = {"fast": train_fast, "reference": train_reference}
    for name in train: train[name](1000)  # warms up
    for seed in range(seeds):
        for name in list(train)[::1 if seed % 2 else -1]:
            runs[name].append(train[name](seed))
            print(f"seed {seed}, {name}: {runs[name][-1][0]:.2f} s, {runs[name][-1][1]:.2%}", file=sys.stderr, flush=True)
    return {name: dict(zip(("seconds", "test_accuracy"), map(list, zip(*values)))) for name, values in runs.items()}


def peak_memory(arch: str) -> int | None:  # bytes; None where the system does not tell
    "What a training process holds at most: `mnist-train --recipe best`, one epoch."
    if not Path("/proc/self/status").exists(): return None
    code = ("import sys\nfrom pathlib import Path\nfrom mnist_nb import cli\ncli.train(sys.argv[1:])\n"
            "print([line.split()[1] for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')][0])")
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-c", code, "--recipe", "best", "--arch", arch, "--epochs", "1", "--save_dir", folder]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]) * 1024


def report_seconds() -> float:
    "All five stages of `make report`."
    with tempfile.TemporaryDirectory() as folder:
        command = Path(sys.executable).parent / "mnist-report"
        subprocess.run([command, "--run", "timed", "--reports", folder], check=True, stdout=subprocess.DEVNULL)
        return read_run(Path(folder) / "timed")["seconds"]


def table(results: dict) -> str:
    "The figures as Markdown."
    best = {name: max(values) for name, values in results["images_per_second"].items()}
    lines = ["| `improved`, batch 256 | images/s | share of the multiplications' rate | times the usual pipeline |", "|---|---|---|---|"]
    for precision in ("float32", "bfloat16"):
        if f"matrix multiplications alone, {precision}" not in best: continue
        gemm = best[f"matrix multiplications alone, {precision}"]
        lines.append(f"| matrix multiplications alone, {precision} | {gemm:,.0f} | | |")
        for name in AUGMENTATIONS:
            ours, usual = best[f"ours, {name}, {precision}"], best.get(f"usual, {name}")
            times = f"{ours / usual:.1f}" if usual else ""
            lines.append(f"| ours, `{name}`, {precision} | {ours:,.0f} | {ours / gemm:.2f} | {times} |")
    lines += [f"| the usual pipeline, {name}, float32 | {best[f'usual, {name}']:,.0f} | | |" for name in ("affine", "elastic")]
    names = {"as in the recipe best": "as in `best`", "float32": "float32 instead", "not channels-last": "not channels-last",
             "torch.compile": "with `torch.compile`"}
    names = {name: title for name, title in names.items() if any(key.endswith(f": {name}") for key in best)}
    lines += ["", f"| images/s, elastic, batch 256 | {' | '.join(names.values())} |", "|---|" + "---|" * len(names)]
    for arch in ("improved", "cnn", "nano"):
        rates = (best.get(f"{arch}: {name}") for name in names)
        lines.append(f"| `{arch}` | " + " | ".join(f"{rate:,.0f}" if rate else "" for rate in rates) + " |")
    fast, reference = results["fast"], results.get("reference")
    lines += ["", f"| {len(fast['seconds'])} seeds | training time | test accuracy |", "|---|---|---|"]
    for name, runs in (("recipe `fast`", fast), ("a plain CNN, one epoch", reference)):
        if runs: lines.append(f"| {name} | {spread(runs['seconds'])} s | {spread(runs['test_accuracy'], 100)}% |")
    lines.append("")
    if reference:
        share = statistics.mean(fast["seconds"]) / statistics.mean(reference["seconds"])
        lines[-1] += f"`fast` takes {share:.2f} of the plain CNN's time. "
    if memory := {arch: size for arch, size in results["peak_memory_bytes"].items() if size}:
        largest = max(memory, key=memory.get)
        lines[-1] += f"A training process holds {memory[largest] / 1e9:.2f} GB at most (`mnist-train --recipe best --arch {largest}`)."
    return "\n".join(lines)


def spread(values: list[float], factor: float = 1) -> str:
    "Mean ± standard deviation."
    return f"{statistics.mean(values) * factor:.2f} ± {statistics.stdev(values) * factor if len(values) > 1 else 0:.2f}"


def processors(measured: dict[str, dict]) -> str:  # results by kind of processor
    "The same figures on different kinds of processor, as Markdown. A figure that was not measured on one is left empty there."
    def rate(arch): return lambda results: f"{max(results['images_per_second'][f'{arch}: as in the recipe best']):,.0f} images/s"
    def share(results): return statistics.mean(results["fast"]["seconds"]) / statistics.mean(results["reference"]["seconds"])
    rows = {
        "`make report`, all five stages": lambda results: f"{results['report_seconds']:.0f} s",
        "recipe `fast`, training": lambda results: f"{spread(results['fast']['seconds'])} s",
        "recipe `fast`, test accuracy": lambda results: f"{spread(results['fast']['test_accuracy'], 100)}%",
        "a plain CNN, one epoch, test accuracy": lambda results: f"{spread(results['reference']['test_accuracy'], 100)}%",
        "time of `fast` divided by that of the plain CNN": lambda results: f"{share(results):.2f}",
        **{f"`{arch}`, training as in `best`": rate(arch) for arch in ("improved", "cnn", "nano")},
    }
    lines = [f"| two cores | {' | '.join(measured)} |", "|---|" + "---|" * len(measured)]
    for name, figure in rows.items():
        cells = []
        for results in measured.values():
            try: cells.append(figure(results))
            except KeyError: cells.append("")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict) -> Figure:
    "Rates of `improved` as bars."
    best = {name: max(values) for name, values in results["images_per_second"].items() if ":" not in name}
    names = list(best)[::-1]
    colours = ["C7" if name.startswith("matrix") else "C1" if name.startswith("usual") else "C0" for name in names]
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    bars = axis.barh(names, [best[name] for name in names], color=colours)
    axis.bar_label(bars, [f" {best[name]:,.0f}" for name in names], fontsize=8)
    axis.set(xlabel="images per second, improved, batch 256", xlim=(0, max(best.values()) * 1.12))
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="trainings of the recipe fast, and of its reference")
    parser.add_argument("--rounds", type=int, default=8, help="times each rate is taken")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    torch.set_num_threads(available_cores())
    print("report", file=sys.stderr, flush=True)
    results = {"report_seconds": report_seconds(), **measure_fast(options.seeds)}
    with tempfile.TemporaryDirectory() as folder:
        unpack_for_torchvision(folder)
        results["images_per_second"] = measure_rates(options.rounds, folder)
    print("memory", file=sys.stderr, flush=True)
    results["peak_memory_bytes"] = {arch: peak_memory(arch) for arch in ARCHITECTURES}
    write_json(options.output, {**results, "environment": environment()})
    print(table(results))
    plot(results).savefig(options.output.with_suffix(".png"), dpi=80)


if __name__ == "__main__": main()
