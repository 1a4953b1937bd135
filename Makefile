# make demo | make test: each creates .venv and installs everything itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# faiss-gpu where a GPU answers, faiss-cpu elsewhere: only one may be installed.
EXTRA := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
DEMO ?= demo
SRC ?=
DATASET ?= folder
DEMO_FLAGS ?=
SECONDS ?= 60
SEED ?= 0
MOST ?= 1000000

.PHONY: help install install-simd demo test soak fuzz lint format docs bench gpu-kit clean

help:  ## Show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(VENV)/.installed: setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "Installing into $(VENV) (torch alone is several GB: minutes on the first run) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$(EXTRA),dev]"
	@touch $@

install: $(VENV)/.installed  ## Create .venv with everything in it

install-simd: install  ## Swap Pillow for pillow-simd (needs a C compiler, libjpeg and zlib headers)
	$(BIN)/python -m pip uninstall --yes pillow
	CC="cc -mavx2" $(BIN)/python -m pip install --no-binary pillow-simd pillow-simd

demo: install  ## Raw video to report; on your own videos with SRC=folder DATASET=hmdb51|ucf101|kinetics|folder
	$(BIN)/seco demo --out "$(DEMO)" $(if $(SRC),--src "$(SRC)" --dataset "$(DATASET)") $(DEMO_FLAGS)

test: install  ## Run all tests with line coverage
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=85

soak: install  ## Run the tests that take long: many more kills and resumptions
	$(BIN)/python -m pytest -m soak --timeout=7200

fuzz: install  ## Feed every command with damaged files for SECONDS (60); what is found is kept in fuzz-found/
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) --most $(MOST)

lint: install  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Build the documentation into build/site; any broken link is an error
	rm -rf build/docs && mkdir -p build/docs
	cp --parents *.md LICENSE CITATION.cff docs/*.md docs/*.svg docs/images/* benchmarks/results/*.md build/docs
	cp -r --parents examples/*.ipynb build/docs
	$(BIN)/mkdocs build --strict --quiet

bench: install  ## The demo over three seeds (about an hour); see benchmarks/ for the others
	$(BIN)/python benchmarks/demo_seeds.py --work "$(DEMO)-seeds" --parallel 2

gpu-kit: install  ## Pack .gpu/ for benchmarks/gpu.sh on a machine with a GPU, and rehearse it on the CPU
	$(BIN)/python -m benchmarks.gpu.kit

clean:  ## Remove what make made
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .coverage*
