# Two commands: `make demo` animates a portrait of two people, `make test` runs everything. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.installed
CPU_WHEELS := https://download.pytorch.org/whl/cpu
S := data_samples

# Two threads on a busy machine waste their time spinning; lines as they come; Jupyter's usual folders; pip as it is.
export OMP_WAIT_POLICY ?= passive
export PYTHONUNBUFFERED ?= 1
export JUPYTER_PLATFORM_DIRS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: browser colab-check help install demo test bench check export in-step lint docs lab readme notebooks wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | while IFS=$$'\t' read -r name what; do printf '  make %-12s %s\n' "$$name" "$$what"; done

# torch first and alone. On Linux, PyPI's build brings 3 GB of CUDA: without an NVIDIA driver take the CPU build,
# from pip's own places if they have it, else from pytorch.org if that answers.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fantasy-nb needs Python 3.11 or 3.12; say which: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@index=""; if [ "$$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null \
	  && ! ls $${PIP_FIND_LINKS:-/nonexistent}/torch-*+cpu*.whl >/dev/null 2>&1 \
	  && $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_WHEELS)/torch/', timeout=8)" 2>/dev/null; \
	then index="--extra-index-url $(CPU_WHEELS)"; fi; \
	set -x; $(BIN)/pip install --quiet $$index "$$(grep '^torch==' constraints.txt)" 'setuptools>=77'
	$(BIN)/pip install --quiet --no-build-isolation --constraint constraints.txt --editable '.[dev,docs,scale,wan]'
	@touch $@

install: $(READY) ## make .venv and install everything into it

demo: $(READY) ## animate the two-person portrait with two drivers: out/demo.mp4 and out/demo.png
	mkdir -p out
	$(BIN)/fantasy-animate $(S)/portrait_two.png --drive $(S)/driver_a.mp4 --drive $(S)/driver_b.mp4 --compare --sheet out/demo.png -o out/demo.mp4

test: $(READY) ## every test, the notebooks executed among them
	$(BIN)/pytest

bench: $(READY) ## 30 guided steps, our DiT beside diffusers': time, memory, same films (options: tools/bench_dit.py --help)
	$(BIN)/python tools/bench_dit.py

colab-check: $(READY) ## every chapter from the wheel in an empty folder: Python 3.12, NumPy 2 (long; options: tools/colab_check.py --help)
	$(BIN)/python tools/colab_check.py

browser: ## Chromium for the tests of widgets (Debian and Ubuntu; elsewhere install it and set CHROMIUM=/path/to/it)
	@command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { as=""; [ "$$(id -u)" = 0 ] || as=sudo; $$as apt-get update -q && $$as apt-get install -y -q --no-install-recommends chromium; }

check: $(READY) in-step lint test docs ## what CI runs: export in step, lint, tests, docs

in-step: $(READY)
	$(BIN)/python tools/in_step.py

lint: $(READY)
	$(BIN)/ruff check fantasy_nb tests tools docs

export: $(READY) ## notebooks -> fantasy_nb/*.py
	$(BIN)/nbdev-export

notebooks: $(READY) ## export, run every notebook again and store what it shows
	$(BIN)/nbdev-export
	for n in nbs/*.ipynb; do $(BIN)/python tools/nb.py run "$$n"; done

readme: $(READY) ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/readme.py

docs: $(READY) ## the book as a site, without the network: docs/_build/html/index.html
	$(BIN)/python docs/build.py

lab: $(READY) ## read and run the book in JupyterLab
	@$(BIN)/jupyter labextension disable "@jupyterlab/apputils-extension:announcements" 2>/dev/null || true
	$(BIN)/jupyter lab nbs $$([ "$$(id -u)" = 0 ] && echo --allow-root)

wheel: $(READY) ## dist/fantasy_nb-*.whl, samples and weights inside
	rm -rf build
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	rm -rf build
	@ls -l dist

clean: ## remove what is made, but .venv
	rm -rf out build dist docs/_build docs/_staged .pytest_cache .ruff_cache .hypothesis
