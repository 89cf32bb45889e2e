# Two commands set up and run everything: `make demo` trains, `make test` tests. Each works first, on a fresh clone.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# constraints.txt has one version of every package, so that the environment is the one that CI ran with. A torch that is
# already there (a GPU machine's, in the Docker image) is left alone, with all that came with it and is new enough: the
# environment sees it.
# Without one, the CPU build comes first, so that no later step fetches CUDA packages.
FIND_TORCH = $(PYTHON) -c 'import importlib.metadata as m; print(m.version("torch").split("+")[0])' 2>/dev/null
# On a terminal pip shows what it fetches, with a bar for each download; elsewhere only what goes wrong.
QUIET = test -t 2 || echo -q
export PIP_CONSTRAINT := $(CURDIR)/$(VENV)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help venv lock demo test site slurm lint types gates format clean

# Where there is no CPU build of torch at hand: make demo TORCH_INDEX='--index-url https://download.pytorch.org/whl/cpu'
TORCH_INDEX ?=
WORKERS ?= 2

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */  make \1\t/' | expand -t 16

venv: $(VENV)/.installed  ## the environment in .venv that every other target uses

$(VENV)/.installed: pyproject.toml constraints.txt tools/versions.py
	@echo 'installing into $(VENV): a minute or two'
	found=$$($(FIND_TORCH)); quiet=$$($(QUIET)); \
	$(PYTHON) -m venv $${found:+--system-site-packages} $(VENV) && \
	$(PYTHON) tools/versions.py constrain $(PIP_CONSTRAINT) && \
	if [ -z "$$found" ]; then $(BIN)/pip install $$quiet torch $(TORCH_INDEX); fi && \
	$(BIN)/pip install $$quiet -e '.[dev]'
	touch $@

lock:  ## renew constraints.txt: the newest versions of everything, as installed by venv from then on
	TORCH_INDEX='$(TORCH_INDEX)' $(PYTHON) tools/versions.py lock

demo: venv  ## PPO on a small task with known results: under a minute, with a live view of the score
	$(BIN)/python -m megarl.train_ppo +conf=demo run.dir=runs/demo run.resume=never
	@$(BIN)/python -m megarl.run.curve runs/demo eval/optimality

# A file's tests share what they have set up, so that a file stays on one worker.
test: venv  ## the tests, on two workers (WORKERS=8 for more)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=25 --durations-min=5

# Not --quiet: --strict counts only the warnings that are shown.
site: $(VENV)/.docs  ## the documentation as a site in site/: open site/index.html; warnings and misspelt words are errors
	$(BIN)/typos docs README.md CHANGELOG.md CONTRIBUTING.md examples megarl
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'open site/index.html; site/external_links.txt lists links to other servers'

$(VENV)/.docs: $(VENV)/.installed
	quiet=$$($(QUIET)); $(BIN)/pip install $$quiet -e '.[docs]'
	touch $@

slurm: venv  ## the launchers on a Slurm of two and three nodes, where it is installed (slurm-wlm, munge)
	$(BIN)/python -m pytest -m 'slurm and not gate' tests/slurm

lint: venv  ## style: ruff's formatter and linter
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: venv  ## let ruff rewrite what it can, and put the pages' links to lines right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -m tests.doc_links

types: venv  ## mypy over the package
	$(BIN)/mypy

gates: venv  ## the long checks: kill storms, other dependency versions, fresh clones
	$(BIN)/python -m pytest -m gate --timeout=3600

clean:  ## remove the environment and what runs left
	rm -rf $(VENV) runs outputs multirun dist build site .pytest_cache .mypy_cache .ruff_cache
