# What can be done here. Each target sets up what it needs, once. `make` alone lists them.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
LATEST := .venv-latest
VLLM   := .venv-vllm
RUN    ?= runs/handbook
PARALLEL := --numprocesses 2 --dist worksteal
BENCH  ?= $(basename $(notdir $(wildcard benchmarks/bench_*.py)))
TASK   := programs/handbook.toml programs/backends/in_process.toml
# The part of the tests that `make test-latest` runs.
CHOSEN := tests/test_compat.py tests/laws tests/lms tests/program tests/pairs tests/tuning/test_tuning.py
# Written when an installation has gone through; older than what it was made from, it is made again.
DEMO   := $(VENV)/.installed-demo
DEV    := $(VENV)/.installed
LONG   := $(VENV)/.installed-long
# Extras. A comma that stood in a call would end its argument.
SHOWN  := charts,gguf
TESTED := $(SHOWN),optimizers,retrieval,route,serve
# uv where it is there, else pip; $(call install,VENV,WHAT)
UV     := $(shell command -v uv)
PIP     = $(1)/bin/python -m pip install -qq --disable-pip-version-check
install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(PIP)) $(2)
TOGETHER := --constraint constraints.txt

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Otherwise every test process and every command that a test starts compiles the library anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup models demo report-screenshots evidence quality docs reference notebook test test-latest test-all check format vllm bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEMO) ## .venv with the tested versions of what `make demo` needs (a few minutes, once)

$(DEMO): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || { echo "setup: making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@$(if $(UV),,$(call PIP,$(VENV)) $(TOGETHER) --upgrade pip)
	@echo "setup: installing PyTorch, transformers, DSPy and what they need"
	@$(call install,$(VENV),$(TOGETHER) --editable '.[$(SHOWN)]')
	@touch $@

$(DEV): $(DEMO)
	@echo "setup: installing what the tests need"
	@$(call install,$(VENV),$(TOGETHER) --group dev --editable '.[$(TESTED)]')
	@touch $@

$(LONG): $(DEV)
	@echo "setup: installing what only the long tests, the documentation and the benchmarks need"
	@$(call install,$(VENV),$(TOGETHER) --group docs --group long --editable '.[all]')
	@touch $@

models: $(DEMO) ## the demo's two models into models/ (1.2 GB of downloads, 4.1 GB on disk, once)
	@$(BIN)/python demo/fetch_models.py

demo: models ## the whole of CoWest on real models, and its table (again: resumes; finished: shows it)
	@cat demo/stages.txt
	@$(BIN)/cowest cycle $(TASK) --run $(RUN)

report-screenshots: $(DEV) ## pictures of the demo's report (of a small scripted run before make demo) in build/screenshots; wants Chromium
	@$(BIN)/python demo/screenshots.py $(RUN)

evidence: $(DEV) models ## the table of the README: 3 seeds, all test questions, two controls (hours; resumable)
	@$(BIN)/python benchmarks/evidence.py

quality: $(DEV) models ## docs/RESULTS.md: the three domains of the paper, every arm and control (hours; resumable; wants their rows)
	@$(BIN)/python benchmarks/quality.py

# NO_MKDOCS_2_WARNING: the theme tells of a later MkDocs at every build, which the range in pyproject.toml keeps out.
docs: $(LONG) reference ## the documentation as a site in site/, offline; a warning is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "docs: open site/index.html"

reference: $(DEV) ## docs/reference/cli.md and toml.md, from the code
	@$(BIN)/python docs/make_reference.py

notebook: $(LONG) models ## docs/dspy.ipynb executed anew and stored with its outputs (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/python docs/execute_notebook.py

test: check ## check, then every law and one smoke of each real thing (minutes); without the real models theirs are skipped
	@$(BIN)/python demo/fetch_models.py || echo "test: no models, so the tests that need them are skipped"
	@$(BIN)/pytest $(PARALLEL)

test-all: $(LONG) check ## all of that and the long tests: kills, Ray, trackers, pages that train, the notebook, the site (half an hour)
	@$(BIN)/python demo/fetch_models.py || echo "test-all: no models, so the tests that need them are skipped"
	@$(BIN)/pyright --warnings
	@$(BIN)/pytest -m "slow or not slow" $(PARALLEL)
	@$(MAKE) --no-print-directory test-latest

# A user who installs today gets these versions, and not those of constraints.txt. PyTorch alone is the one there, of whichever build.
test-latest: ## a part of the tests with the newest versions of all dependencies, in .venv-latest
	@test -x $(LATEST)/bin/python || { echo "test-latest: making $(LATEST)"; $(PYTHON) -m venv $(LATEST); }
	@$(if $(UV),,$(call PIP,$(LATEST)) --upgrade pip)
	@grep '^torch==' constraints.txt > $(LATEST)/torch.txt
	@$(call install,$(LATEST),--upgrade $(if $(UV),,--upgrade-strategy eager) --constraint $(LATEST)/torch.txt --group test --editable '.[$(TESTED)]')
	@echo "test-latest: other versions than in constraints.txt:"
	@$(LATEST)/bin/python -m pip freeze --disable-pip-version-check --exclude-editable | sed 's/+.*//' | grep -vixFf constraints.txt || true
	@$(LATEST)/bin/pytest $(PARALLEL) $(CHOSEN)

check: $(DEV) ## ruff (lint and format) and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --level error

format: $(DEV) ## what ruff can mend by itself
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

vllm: $(VLLM)/.installed ## vLLM for the CPU in .venv-vllm (3.5 GB), for `make bench` and its own tests

# Its pins are not ours, so it gets an environment of its own. It imports only where the three packages it does not need are gone.
$(VLLM)/.installed: benchmarks/vllm-requirements.txt
	@echo "vllm: installing vLLM into $(VLLM)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install -qq --disable-pip-version-check --requirement $<
	@$(VLLM)/bin/pip uninstall -qq --disable-pip-version-check --yes torchvision torchaudio torchcodec
	@touch $@

bench: $(LONG) models ## speed beside what one would use instead: tables in build/bench and benchmarks/README.md (an hour, idle)
	@$(if $(filter bench_drafts,$(BENCH)),$(MAKE) --no-print-directory vllm,true) || echo "bench: vLLM cannot be installed here, so its row says so"
	@mkdir -p build/bench
	@set -e; for name in $(BENCH); do \
		echo "bench: $$name"; \
		$(BIN)/python benchmarks/$$name.py > build/bench/$$name.txt || { cat build/bench/$$name.txt; exit 1; }; \
		cat build/bench/$$name.txt; \
	done

clean: ## caches and build products; .venv*/, models/ and runs/ stay
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
