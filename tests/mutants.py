"""Do the tests notice when a line of the code is wrong? `make mutants` breaks one line after another and runs the tests of its module.

Each mutation of `mutations.toml` is made in a copy of the checkout, in the module and in the notebook cell that exports it. Then the tests
of the module are run there: its notebook, and the quick ones of its pytest files, whatever takes least time first. The mutation is killed
as soon as one fails. Only if none does, those tests are run that need a small run of their own. What survives is listed: a promise that no
test holds the code to.
"""

import argparse
import fcntl
import json
import os
import queue
import shutil
import sys
import tempfile
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

from notebooks import copy_checkout, in_copy, run_notebook, run_pytest, train_scratch

ROOT = Path(__file__).resolve().parent.parent
FILES = {  # the pytest files of each module, in tests/; those that are not there are left out
    "data": ["data", "commands"], "models": ["models", "training", "commands"], "training": ["training", "commands"],
    "recipes": ["training", "pipeline"], "runs": ["runs", "failures", "pipeline"], "metrics": ["statistics", "error_analysis"],
    "slices": ["statistics", "error_analysis"], "inspection": ["statistics", "error_analysis"],
    "display": ["error_analysis", "pages"], "error_analysis": ["error_analysis", "statistics"], "export": ["export", "inference"],
    "inference": ["inference"], "serving": ["serving"], "pipeline": ["failures", "runs", "pipeline"], "widgets": ["widgets", "lab"],
    "decoding": ["serving"], "grids": ["grids"], "batch": ["grids"], "leaderboard": ["statistics", "grids"],
    "cli": ["commands", "pipeline", "inference"]}
IN_RUNS = ("data", "models", "training", "recipes", "runs", "metrics", "slices", "inspection", "display", "error_analysis", "export",
           "inference", "pipeline")  # modules that a run is made by: the ready-made one says nothing about them
OWN_RUN = ["pipeline", "error_analysis"]  # pytest files that look at the small run; for modules that draw, also at its pages
BROWSER = {"browser", "axe", "lab"}  # fixtures of tests in a browser, which are slow
TIMES = ROOT / "build" / "mutants_times.json"  # how long tests took when they were last tried on the unbroken code
LONG = 8.0        # seconds that a test may take to be among the quick ones
MOST_ALIVE = 0.05  # share of survivors


@dataclass
class Mutation:
    "A line that is wrong."
    module: str
    name: str
    breaks: str  # the promise that no longer holds
    old: str     # text that occurs once
    new: str


@dataclass
class Step:
    "Something to run on a copy: a notebook, or tests of a pytest file."
    name: str
    work: list = field(default_factory=list)  # a function for `in_copy`, and its words
    ready_run: bool = True                    # whether the small run of the unbroken code is used; if not, this is the last resort
    seconds: float | None = None              # that it takes on the unbroken code; None: not known yet
    measuring: threading.Lock = field(default_factory=threading.Lock)


def load_mutations(path: Path = ROOT / "tests" / "mutations.toml") -> list[Mutation]:
    "All mutations, module by module."
    with open(path, "rb") as file: modules = tomllib.load(file)
    mutations = [Mutation(module, **fields) for module, own in modules.items() for fields in own]
    names = [(mutation.module, mutation.name) for mutation in mutations]
    if twice := {name for name in names if names.count(name) > 1}: raise ValueError(f"mutations of the same name: {twice}")
    return mutations


def notebook_of(module: str) -> str:
    "The notebook that exports a module."
    return next(path.stem for path in sorted((ROOT / "nbs").rglob("*.ipynb")) if f'"#| default_exp {module}"' in path.read_text())


def replace_once(text: str, mutation: Mutation, where: str) -> str:
    "The text with the mutation; raises when it does not fit any more."
    if (found := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.module}, {mutation.name}: its text occurs {found} times in {where}, not once. Mend mutations.toml:\n"
                         f"{mutation.old}")
    return text.replace(mutation.old, mutation.new)


def mutated_files(mutation: Mutation) -> dict[str, str]:  # content by path
    "The module and the notebook with the mutation."
    module, notebook = Path("mnist_nb") / f"{mutation.module}.py", Path("nbs") / f"{notebook_of(mutation.module)}.ipynb"
    content = json.loads((ROOT / notebook).read_text())
    exported = [cell for cell in content["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).startswith("#| export")]
    separator = "\n# end of a cell\n"
    sources = replace_once(separator.join("".join(cell["source"]) for cell in exported), mutation, str(notebook)).split(separator)
    for cell, source in zip(exported, sources, strict=True): cell["source"] = source.splitlines(keepends=True)
    code = replace_once((ROOT / module).read_text(), mutation, str(module))
    compile(code, str(module), "exec")  # a mutation that is no Python would be killed by anything
    return {str(module): code, str(notebook): json.dumps(content, ensure_ascii=False, indent=1) + "\n"}


class Quick:
    "A pytest plugin: leaves out what is slow or not wanted, and measures the rest."
    def __init__(self, times: dict[str, float], own_run: bool | None, browser: bool):
        self.times, self.own_run, self.browser, self.measured = times, own_run, browser, {}

    def wanted(self, item) -> bool:
        names = set(item.fixturenames)
        return (not item.get_closest_marker("slow") and self.times.get(item.nodeid, 0) <= LONG and (self.browser or not names & BROWSER)
                and (self.own_run is None or self.own_run == ("small_run" in names)))

    def pytest_collection_modifyitems(self, items) -> None:
        items[:] = sorted(filter(self.wanted, items), key=lambda item: self.times.get(item.nodeid, 0))

    def pytest_runtest_logreport(self, report) -> None:
        self.measured[report.nodeid] = self.measured.get(report.nodeid, 0) + report.duration


def run_quick(files: str,    # of tests/, separated by spaces
              own_run: str,   # "False" or "True": without the tests of the small run, or only those; "None": all
              measure: str = "",  # whether the times are to be remembered
             ) -> int:
    "Tests of pytest files, in the copy; exit code 0 also where none is left."
    import pytest
    times, only = json.loads(TIMES.read_text()) if TIMES.exists() else {}, {"None": None, "True": True, "False": False}[own_run]
    plugin = Quick(times, only, browser=only is True)
    code = run_pytest(*files.split(), "-x", "-q", "-p", "no:cacheprovider", plugins=[plugin])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED: code = 0
    if measure and code == 0: remember(plugin.measured)
    return int(code)


def remember(measured: dict[str, float]) -> None:  # seconds by test
    "Adds times to those that are known, so that later ones need not run what is long."
    TIMES.parent.mkdir(parents=True, exist_ok=True)
    with open(TIMES.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = json.loads(TIMES.read_text()) if TIMES.exists() else {}
        TIMES.write_text(json.dumps({**known, **{name: round(seconds, 2) for name, seconds in measured.items()}}, indent=1))


class Workshop:
    "Copies of the checkout in a temporary folder, and what the tests need there."
    def __init__(self, folder: Path, jobs: int):
        folder.chmod(0o755)  # a test of the container works as another user
        self.folder, self.copies, self.steps = folder, queue.Queue(), {}
        for number in range(jobs): self.copies.put(copy_checkout(ROOT, folder / f"copy-{number}"))
        self.scratch = folder / "scratch"

    def steps_of(self, module: str) -> list[Step]:
        "What to run for a module."
        own, notebook = module in IN_RUNS, notebook_of(module)
        steps = [self.steps.setdefault(notebook, Step(notebook, [run_notebook, notebook]))]
        for name in FILES[module]:
            if (ROOT / "tests" / f"test_{name}.py").exists(): steps.append(self.pytest_step([name], "False" if own else "None"))
        if own: steps.append(self.pytest_step(OWN_RUN + ["pages"] * (module in ("display", "error_analysis")), "True"))
        return steps

    def pytest_step(self, names: list[str], own_run: str) -> Step:
        files = " ".join(f"tests/test_{name}.py" for name in names)
        name = {"None": files, "False": f"{files} without a run", "True": f"{files} with a run of their own"}[own_run]
        return self.steps.setdefault(name, Step(name, [run_quick, files, own_run], ready_run=own_run != "True"))

    def run(self, copy: Path, step: Step, seconds: float) -> tuple[int | None, float, str]:  # exit code, seconds, last words
        "A step on a copy."
        shutil.rmtree(copy / "reports" / "scratch", ignore_errors=True)
        if self.scratch.exists(): shutil.copytree(self.scratch, copy / "reports" / "scratch")
        with tempfile.TemporaryDirectory(dir=self.folder) as own:
            Path(own).chmod(0o755)
            log, env = Path(own) / "log", {"TMPDIR": own}
            if step.ready_run and (self.folder / "runs" / "small").exists(): env["TESTS_SMALL_RUN"] = str(self.folder / "runs")
            start = time.perf_counter()
            code = in_copy(copy, *step.work, log=log, seconds=seconds, **env)
            return code, time.perf_counter() - start, log.read_text(errors="replace")[-3000:]

    def prepare(self, with_run: bool) -> None:
        "Makes what is made once, with the unbroken code."
        copy = self.copies.get()
        shutil.rmtree(copy / "reports" / "scratch", ignore_errors=True)
        made = in_copy(copy, train_scratch, log=self.folder / "log", seconds=600) == 0
        if made and with_run: made = in_copy(copy, make_run, str(self.folder / "runs"), log=self.folder / "log", seconds=900) == 0
        if not made: raise SystemExit(f"the unbroken code fails:\n{(self.folder / 'log').read_text()[-3000:]}")
        shutil.copytree(copy / "reports" / "scratch", self.scratch)
        self.copies.put(copy)

    def measure(self, step: Step, copy: Path | None = None) -> None:
        "How long a step takes on the unbroken code, once. Ends everything if it fails there."
        with step.measuring:
            if step.seconds is not None: return
            own = copy or self.copies.get()
            work = [*step.work, "measure"] if step.work[0] is run_quick else step.work
            code, seconds, words = self.run(own, Step(step.name, work, step.ready_run), 1200)
            if not copy: self.copies.put(own)
            if code != 0: raise SystemExit(f"{step.name}: fails on the unbroken code:\n{words}")
            step.seconds = seconds
            print(f"unbroken: {step.name} passes in {seconds:.0f} s", flush=True)

    def try_mutation(self, mutation: Mutation, steps: list[Step]) -> dict:
        "What became of a mutation."
        copy, start, killer = self.copies.get(), time.perf_counter(), None
        files = mutated_files(mutation)
        quick = sorted((step for step in steps if step.ready_run), key=lambda step: step.seconds)
        try:
            for step in [*quick, *(step for step in steps if not step.ready_run)]:
                self.measure(step, copy)
                for path, content in files.items(): (copy / path).write_text(content)
                code, _, _ = self.run(copy, step, seconds=30 + 5 * step.seconds)
                for path in files: shutil.copyfile(ROOT / path, copy / path)
                if code != 0:
                    killer = step.name + (", which does not end" if code is None else "")
                    break
        finally: self.copies.put(copy)
        seconds = round(time.perf_counter() - start, 1)
        outcome = f"by {killer}" if killer else mutation.breaks
        print(f"{'killed  ' if killer else 'SURVIVED'} {mutation.module}: {mutation.name} ({outcome}; {seconds:.0f} s)", flush=True)
        return {"module": mutation.module, "name": mutation.name, "breaks": mutation.breaks, "killed_by": killer, "seconds": seconds}


def make_run(folder: str) -> int:
    "Makes the small run of the tests, in the copy."
    sys.path.insert(0, str(Path.cwd() / "tests"))
    from conftest import make_small_run
    make_small_run(Path(folder))
    return 0


def choose_mutations(mutations: list[Mutation], only: list[str]) -> list[Mutation]:
    "Those of a module, or else of a name or a part of one."
    modules = {mutation.module for mutation in mutations}
    def fits(mutation, word): return word == mutation.module if word in modules else word.lower() in mutation.name.lower()
    chosen = [mutation for mutation in mutations if not only or any(fits(mutation, word) for word in only)]
    if not chosen: raise SystemExit(f"no mutation is called {', '.join(only)}: see --list")
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description="Break one line of the code after another, and see whether the tests notice.")
    parser.add_argument("--only", action="append", default=[], metavar="MODULE_OR_NAME", help="these mutations only; may be repeated")
    parser.add_argument("--jobs", type=int, default=2, help="mutations at a time (default: 2)")
    parser.add_argument("--list", action="store_true", help="list the mutations, check that each fits, and stop")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "mutants.json", help="summary (default: build/mutants.json)")
    options = parser.parse_args()
    mutations, start = choose_mutations(load_mutations(), options.only), time.perf_counter()
    for mutation in mutations: mutated_files(mutation)
    if options.list:
        for mutation in mutations: print(f"{mutation.module:15} {mutation.name}: {mutation.breaks}")
        return 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(options.jobs) as pool:
        workshop = Workshop(Path(folder), options.jobs)
        steps = {module: workshop.steps_of(module) for module in {mutation.module for mutation in mutations}}
        workshop.prepare(with_run=any(module not in IN_RUNS for module in steps))
        list(pool.map(workshop.measure, {id(step): step for own in steps.values() for step in own if step.ready_run}.values()))
        results = list(pool.map(lambda mutation: workshop.try_mutation(mutation, steps[mutation.module]), mutations))
    alive = [result for result in results if not result["killed_by"]]
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps({"tried": len(results), "killed": len(results) - len(alive), "survivors": alive,
                                          "seconds": round(time.perf_counter() - start), "results": results}, indent=1) + "\n")
    print(f"\n{len(results) - len(alive)} of {len(results)} mutations are killed ({1 - len(alive) / len(results):.1%}), in "
          f"{(time.perf_counter() - start) / 60:.0f} min; {options.output}")
    for result in alive: print(f"  survived: {result['module']}: {result['name']}. No test holds the code to this: {result['breaks']}.")
    return 1 if len(alive) > MOST_ALIVE * len(results) else 0


if __name__ == "__main__": sys.exit(main())
