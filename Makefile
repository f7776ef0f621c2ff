# Two commands: `make train` sets up and trains on real images, `make test` sets up and tests.
# Both may be called again at any time; finished steps are skipped. STACK=intel|current and PYTHON=... choose what they use.
SHELL := /bin/bash
ifeq ($(origin VENV),undefined)
VENV := $(shell STACK='$(STACK)' PYTHON='$(PYTHON)' launch/install.sh --venv 2>/dev/null)
endif
PYTHON_ENV := $(VENV)/bin/python
RANKS ?= 2
DATA := data/fashion_mnist
RAW := $(if $(RAW_DIR),--raw_dir='$(RAW_DIR)',)

.PHONY: help train test labs check sessions smoke setup lint format docs reproduce tables wheelhouse lock clean

help:
	@echo "make train   set up, prepare Fashion-MNIST, train ResNet-50 on two MPI ranks (RANKS=N, RAW_DIR=FOLDER; 7 to 25 minutes)"
	@echo "make test    set up and run the tests: lint, types, training, MPI sessions (about 25 minutes the first time)"
	@echo "make labs    set up and run the tests with a disposable Slurm and with several hosts on one machine (as root; 10 minutes)"
	@echo "make check   lint, types and the quick tests that need no training (a minute and a half)"
	@echo "make sessions  all tests that start ranks with mpirun (about 6 minutes)"
	@echo "make smoke   set up and train a tiny network on synthetic data (half a minute after the set-up)"
	@echo "make reproduce  run every experiment behind docs/results.md (tens of hours; may be interrupted and called again), then make tables"
	@echo "make tables  update the tables and plots of the documents from experiments/results/*.csv"
	@echo "make setup   set up only: an environment with everything built that g++ allows (about 3 minutes), and the link .venv to it"
	@echo "make wheelhouse  put every package into wheelhouse/, for nodes without a network (docs/offline.md)"
	@echo "make lint    check style and types; make format corrects the style; make docs writes the generated pages; make lock updates the lock"
	@echo "make clean   remove the environments and caches, never data or runs"
	@echo "STACK=intel (Python 3.9 - 3.11) or STACK=current (3.10 - 3.13) chooses TensorFlow, PYTHON=FILE the interpreter (docs/stacks.md)"

setup:
	@STACK='$(STACK)' PYTHON='$(PYTHON)' VENV='$(VENV)' launch/install.sh

train: setup $(DATA)/manifest.json
	@PATH="$(abspath $(VENV))/bin:$$PATH" launch/local.sh $(RANKS) python -m resnet_cpu.train --flagfile=experiments/quickstart.flags
	@echo "curves: runs/quickstart/plots/curves.png   result: runs/quickstart/result.json   (rm -r runs/quickstart to train again)" >&2

$(DATA)/manifest.json: | setup
	@$(PYTHON_ENV) -m resnet_cpu.prepare fashion_mnist --data_dir=$(DATA) $(RAW) >&2

smoke: setup
	@PATH="$(abspath $(VENV))/bin:$$PATH" launch/local.sh $(RANKS) python -m resnet_cpu.train --flagfile=experiments/smoke.flags

reproduce: setup $(DATA)/manifest.json
	@status=0; PATH="$(abspath $(VENV))/bin:$$PATH" experiments/reproduce.sh || status=$$?; \
	  $(PYTHON_ENV) -m resnet_cpu.tables --runs='$(or $(RUNS),runs/reproduce)' >/dev/null && exit $$status

tables: setup
	@$(PYTHON_ENV) -m resnet_cpu.tables >/dev/null

PYTEST = PATH="$(abspath $(VENV))/bin:$$PATH" python -m pytest -q
PARALLEL = -n "$$(nproc)" --maxprocesses=8 --dist=loadgroup --no-loadscope-reorder
# Sessions of several ranks run by themselves: a rank that waits polls for its message, on a core that others need.
test: setup lint
	@$(PYTEST) -m "mpi and not multihost" $(PYTEST_ARGS) || (($$? == 5))
	@$(PYTEST) -m "not mpi and not slurm and not multihost" $(PARALLEL) $(PYTEST_ARGS) || (($$? == 5))

# A disposable Slurm, and hosts as network namespaces: their tests mostly wait, for daemons, requeues and lost hosts.
labs: setup
	@if (($$(id -u) == 0)) && command -v apt-get >/dev/null; then launch/slurm-lab/lab.sh install; \
	  command -v tc >/dev/null || apt-get install -y -q --no-install-recommends iproute2 >/dev/null; fi
	@$(PYTEST) -m "slurm or multihost" $(PARALLEL) $(PYTEST_ARGS) || (($$? == 5))

# Everything that needs no training and no ranks: for the time between two edits.
check: setup lint
	@$(PYTEST) -m "not training and not mpi and not slurm and not multihost" $(PARALLEL) $(PYTEST_ARGS)

# Real mpirun sessions of 2 to 4 ranks.
sessions: setup
	@$(PYTEST) -m "mpi and not multihost" $(PYTEST_ARGS)

lint: setup
	@$(PYTHON_ENV) -m ruff check -q . && $(PYTHON_ENV) -m ruff format -q --check . && $(PYTHON_ENV) -m mypy --no-error-summary

docs: setup
	@$(PYTHON_ENV) -c "from resnet_cpu import commandline; print(commandline.reference(), end='')" >docs/flags.md
	@$(PYTHON_ENV) tests/machine_trees.py >docs/placements.md

# For machines without a network (docs/offline.md). Run it where Python and processor are those of the nodes.
wheelhouse: setup
	@$(PYTHON_ENV) -m pip --disable-pip-version-check download -q -d wheelhouse --no-deps --require-hashes \
	  -r requirements/$$(sed -n 's/^stack //p' $(VENV)/installed).txt >&2
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON_ENV) -m pip --disable-pip-version-check download -q -d wheelhouse \
	  --no-deps --no-build-isolation --no-binary horovod --require-hashes -r requirements/horovod.txt >&2
	@du -sh wheelhouse >&2

format: setup
	@$(PYTHON_ENV) -m ruff format -q . && $(PYTHON_ENV) -m ruff check -q --fix .

# Needs `pip install uv`. Horovod is not in the locks: launch/install.sh builds it against what the lock installed.
LOCK = uv pip compile setup.cfg --extra mpi --extra tfds --extra plots --extra digits --extra test --extra build --universal \
  --generate-hashes --no-header --no-annotate
lock:
	$(LOCK) --extra intel --python-version 3.9 --constraint requirements/intel.in --output-file requirements/intel.txt
	$(LOCK) --extra current --python-version 3.10 --override requirements/current.overrides --output-file requirements/current.txt

clean:
	rm -rf .venv .venv-intel .venv-current build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
