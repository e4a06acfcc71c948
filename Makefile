# The first target to run makes .venv and installs the package into it; the others find it there.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= reports/reference/model.int8.onnx
ORT_WEB := 1.30.0

# A copied or moved folder has a .venv whose scripts run the code of the original. Such a .venv is made anew, and so is one that
# does not start, for example because its Python was removed. Where .venv is a link, only the link is removed. With PYTHONPATH set,
# the user decides which mnist_nb is imported.
CHECK := import os, re; from importlib.util import find_spec; \
	script = open(".venv/bin/pip").read() if os.path.exists(".venv/bin/pip") else ""; package = find_spec("mnist_nb"); \
	pairs = [(path, ".venv/bin") for path in re.findall(r"(/[^\n\"]*)/python", script)[:1]]; \
	pairs += [(os.path.dirname(package.origin), "mnist_nb")] if package and not os.environ.get("PYTHONPATH") else []; \
	foreign = [path for path, own in pairs if not (os.path.exists(path) and os.path.samefile(path, own))]; \
	print(*[f"it belongs to {path}" for path in foreign[:1]])
VENV_PROBLEM := $(shell if [ -e .venv ] || [ -L .venv ]; then $(BIN)/python -P -c '$(CHECK)' 2>/dev/null || echo "it does not start"; fi)

.PHONY: report test slow mutants bench lint notebooks lab runtime demo clean help FORCE

help:  ## show these lines
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

report: .venv/installed  ## train on MNIST and write the report to reports/improved/; again: run only what has changed
	$(BIN)/mnist-report --run improved $(if $(wildcard reports/improved/run.json),--resume)

test: .venv/installed  ## run the tests: lint, notebooks, pytest
	@$(MAKE) --no-print-directory lint
	@echo "== the tests, the notebooks' own among them"
	$(BIN)/python -m pytest tests -m "not slow" --numprocesses 3 --dist loadgroup --no-loadscope-reorder

slow: .venv/installed  ## run the tests that take long: several processes, killed workers, ten thousand requests
	$(BIN)/python -m pytest tests -m slow --numprocesses 2 --dist loadgroup --no-loadscope-reorder

mutants: .venv/installed  ## break the code line by line, and list what the tests do not notice
	$(BIN)/python tests/mutants.py $(MUTANTS)

bench: .venv/installed  ## measure the speed of training, prediction and service; with nothing else running
	$(BIN)/python benchmarks/speed.py --output speed.json
	$(BIN)/python benchmarks/inference.py --output inference.json
	$(BIN)/python benchmarks/serving.py --output serving.json

lint: .venv/installed  ## check the style of modules, notebooks and tests
	$(BIN)/ruff check .

notebooks: .venv/installed  ## after editing notebooks: clean them and generate mnist_nb/ anew
	$(BIN)/jupyter nbconvert --log-level WARN --clear-output --inplace nbs/*.ipynb
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export

lab: .venv/installed  ## open the notebooks in JupyterLab
	$(BIN)/jupyter trust nbs/*.ipynb
	$(BIN)/jupyter lab --config=jupyter_config.py $(if $(filter 0,$(shell id -u)),--allow-root) nbs/index.ipynb

runtime:  ## fetch ONNX Runtime for browsers, which make demo and its test need
	npm install --prefix build/npm --no-package-lock --no-fund --no-audit --loglevel error onnxruntime-web@$(ORT_WEB)

demo: .venv/installed runtime  ## build the page to draw on, with the model in it, for any file server: demo/
	$(BIN)/python -c "from mnist_nb.serving import write_demo; write_demo('demo', '$(MODEL)', 'build/npm/node_modules/onnxruntime-web/dist')"
	@echo "demo/ is ready: $(BIN)/python -m http.server --directory demo 8000, then open http://localhost:8000"

clean:  ## remove caches, samples and the notebooks' scratch run; trained models and runs stay
	rm -rf samples build demo .pytest_cache .ruff_cache reports/scratch
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.venv/installed: settings.ini setup.py $(if $(VENV_PROBLEM),FORCE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; name one with make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "Python's venv module is missing; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	$(if $(VENV_PROBLEM),$(info == .venv is made anew: $(VENV_PROBLEM))@rm -rf .venv)
	@echo "== making .venv and installing mnist_nb with its development tools (some minutes, a few GB: torch is large)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@
