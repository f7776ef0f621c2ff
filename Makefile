# Two commands: `make train` sets up and trains on real images, `make test` sets up and tests.
# Both may be called again at any time: what is done is not done twice.
SHELL := /bin/bash
VENV ?= .venv
PYTHON_ENV := $(VENV)/bin/python
RANKS ?= 2
DATA := data/fashion_mnist
RAW := $(if $(RAW_DIR),--raw_dir=$(RAW_DIR),)

.PHONY: help train test smoke setup lint format docs reproduce tables wheelhouse lock clean

help:
	@echo "make train   set up, prepare Fashion-MNIST, train ResNet-50 on $(RANKS) MPI ranks (about 15 minutes the first time)"
	@echo "make test    set up and run all tests (about 15 minutes the first time)"
	@echo "make smoke   set up and train a tiny network on synthetic data (half a minute after the set-up)"
	@echo "make reproduce  run every experiment behind docs/results.md again (hours; call it again to go on), then make tables"
	@echo "make tables  write the tables and plots of docs/results.md and README.md anew from experiments/results/*.csv"
	@echo "make setup   set up only: .venv with everything built (about 3 minutes)"
	@echo "make wheelhouse  put every package into wheelhouse/, for nodes without a network (docs/offline.md)"
	@echo "make lint    style, types; make format mends the style; make docs writes docs/flags.md and layouts.md; make lock resolves anew"
	@echo "make clean   remove the environment and caches, never data or runs"

setup:
	@VENV=$(VENV) launch/install.sh

train: setup $(DATA)/manifest.json
	@PATH="$(abspath $(VENV))/bin:$$PATH" launch/local.sh $(RANKS) python -m resnet_cpu.train --flagfile=experiments/quickstart.flags
	@echo "curves: runs/quickstart/plots/curves.png   result: runs/quickstart/result.json   (rm -r runs/quickstart to train anew)" >&2

$(DATA)/manifest.json: | setup
	@$(PYTHON_ENV) -m resnet_cpu.prepare fashion_mnist --data_dir=$(DATA) $(RAW) >&2

smoke: setup
	@PATH="$(abspath $(VENV))/bin:$$PATH" launch/local.sh $(RANKS) python -m resnet_cpu.train --flagfile=experiments/smoke.flags

reproduce: setup $(DATA)/manifest.json
	@PATH="$(abspath $(VENV))/bin:$$PATH" experiments/reproduce.sh
	@$(PYTHON_ENV) -m resnet_cpu.tables --runs=$(or $(RUNS),runs/reproduce) --documents=README.md,docs/results.md,docs/scaling.md >/dev/null

tables: setup
	@$(PYTHON_ENV) -m resnet_cpu.tables --documents=README.md,docs/results.md,docs/scaling.md >/dev/null

# MPI sessions by themselves: a rank that waits asks for its message again and again, on a core that others would use.
PYTEST = PATH="$(abspath $(VENV))/bin:$$PATH" python -m pytest -q
test: setup lint
	@if (($$(id -u) == 0)) && command -v apt-get >/dev/null; then launch/slurm-lab/lab.sh install; \
	  command -v tc >/dev/null || apt-get install -y -q --no-install-recommends iproute2 >/dev/null; fi
	@$(PYTEST) -m "mpi and not multihost" $(PYTEST_ARGS) || (($$? == 5))
	@$(PYTEST) -m "not mpi or multihost" -n "$$(nproc)" --maxprocesses=8 --dist=loadgroup --no-loadscope-reorder $(PYTEST_ARGS) || (($$? == 5))

lint: setup
	@$(PYTHON_ENV) -m ruff check -q . && $(PYTHON_ENV) -m ruff format -q --check . && $(PYTHON_ENV) -m mypy --no-error-summary

docs: setup
	@$(PYTHON_ENV) -c "from resnet_cpu import flags; print(flags.reference(), end='')" >docs/flags.md
	@$(PYTHON_ENV) tests/machine_trees.py >docs/layouts.md

# For machines without a network: docs/offline.md. Where this runs, Python and processor must be those of the nodes.
wheelhouse: setup
	@$(PYTHON_ENV) -m pip --disable-pip-version-check download -q -d wheelhouse --no-deps -r requirements.txt >&2
	@PATH="$(abspath $(VENV))/bin:$$PATH" $(PYTHON_ENV) -m pip --disable-pip-version-check download -q -d wheelhouse \
	  --no-deps --no-build-isolation --no-binary horovod horovod==$$(sed -n 's/^HOROVOD=//p' launch/install.sh) >&2
	@du -sh wheelhouse >&2

format: setup
	@$(PYTHON_ENV) -m ruff format -q . && $(PYTHON_ENV) -m ruff check -q --fix .

# Needs `pip install uv`. Horovod is not in the lock: launch/install.sh builds it against what the lock installed.
lock:
	uv pip compile setup.cfg --extra intel --extra mpi --extra tfds --extra plots --extra digits --extra test \
	  --extra build --universal --python-version 3.9 --no-header --no-annotate --output-file requirements.txt

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
