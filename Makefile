# The one interface. `make` alone lists what there is.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export DVC_NO_ANALYTICS := 1
STAMP := $(VENV)/.lock-installed

# A misspelt variable would be ignored, and the default trained.
KNOWN := MODEL MODELS EPOCHS SET NAME SIZE PX SEARCH PORT FOLDS OFF SEEDS TRIALS PAIRS PICTURES PYTHON VENV
UNKNOWN := $(filter-out $(KNOWN) MAKEFLAGS MFLAGS,$(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$v)))
ifneq ($(strip $(UNKNOWN)),)
$(error $(UNKNOWN): no such variable; known: $(KNOWN))
endif

.DEFAULT_GOAL := help
.PHONY: help setup setup-cpu repro train study crossval ablate tune ensemble schedule test test-all lint format ui compare models summary restore bench bench-peers bench-gpu lock clean

PIP := python -m pip install --disable-pip-version-check --quiet

define check_python
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "Thaw needs Python 3.11 or later; name one: make setup PYTHON=python3.11" >&2; exit 2; }
endef

define install_thaw
$(PIP) --no-deps --no-build-isolation --editable .
@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local core.no_scm true
@touch $(STAMP)
endef

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv from requirements.lock; does nothing when it is up to date

$(STAMP): requirements.lock pyproject.toml
	$(check_python)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --no-deps --require-hashes -r requirements.lock
	$(install_thaw)

# torch's builds for processors alone stand in an index of their own, which uv knows; hashes are of the usual builds.
setup-cpu: ## make .venv anew without CUDA, for Linux without a GPU
	$(check_python)
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) uv
	uv pip install --python $(VENV)/bin/python --torch-backend=cpu --no-deps \
	  $$(grep -oE '^torch(vision)?==[^ ]+' requirements.lock)
	$(MAKE) $(VENV)/without-cuda.lock
	$(PIP) --no-deps --require-hashes -r $(VENV)/without-cuda.lock
	$(install_thaw)

$(VENV)/without-cuda.lock: requirements.lock
	awk '/^[a-z]/ {keep = !/^(torch|torchvision|triton)==|^(cuda|nvidia)-/} keep' $< > $@

repro: setup ## run the chain: download, weights, augment, train, evaluate
	@python -m pipeline check
	dvc repro

train: setup ## another net, earlier results stay: MODEL=resnet18 [EPOCHS=5] [SET="train.batch_size=32 ..."]
	@python -m pipeline experiment $(if $(MODEL),--model '$(MODEL)') $(if $(EPOCHS),--epochs '$(EPOCHS)') $(if $(SET),--set $(SET))

study: setup ## a group of experiments: NAME=depth [SIZE=full]; without NAME, what there is
	@python -m pipeline study $(if $(NAME),--name '$(NAME)') $(if $(SIZE),--size '$(SIZE)')

schedule: setup ## what learns when, and at which rates [SET="train.phases=gradual_unfreezing"]
	@python -m pipeline schedule $(if $(SET),--set $(SET))

crossval: setup ## k-fold cross-validation [FOLDS=5]
	@python -m pipeline crossval $(if $(FOLDS),--folds '$(FOLDS)')

ablate: setup ## what each choice brings: OFF="train.mixup=0 train.clip=0" [SEEDS="0 1 2"] [NAME=...]
	@python -m pipeline ablate $(if $(OFF),--off $(OFF)) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(NAME),--name '$(NAME)')

tune: setup ## search parameters with Optuna [TRIALS=20] [NAME=...]
	@python -m pipeline tune $(if $(TRIALS),--trials '$(TRIALS)') $(if $(NAME),--name '$(NAME)')

ensemble: setup ## averaged probabilities of trained models: MODELS="resnet18 densenet121" [NAME=...]
	@python -m pipeline ensemble $(or $(MODELS),$(error name nets: make ensemble MODELS="resnet18 densenet121")) $(if $(NAME),--name '$(NAME)')

test: setup ## the tests, without the slow ones
	python -m pytest -q

test-all: setup ## every test
	python -m pytest -q -m 'slow or not slow'

lint: setup ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

format: setup ## let ruff lay the code out
	ruff check --fix .
	ruff format .

ui: setup ## MLflow's pages on 127.0.0.1 [PORT=5000]
	@python -m pipeline ui $(if $(PORT),--port $(PORT))

compare: setup ## MLflow's runs as a table, best first
	@python -m pipeline compare

models: setup ## the nets to be had [SEARCH='dense*']
	@python -m pipeline models $(if $(SEARCH),--search '$(SEARCH)')

summary: setup ## a net layer by layer: MODEL=scratch/vgg16 [PX=64]
	@python -m pipeline summary '$(or $(MODEL),$(error name a net: make summary MODEL=scratch/vgg16))' $(if $(PX),--px $(PX))

restore: setup ## train a U-Net to restore damaged pictures, for its encoder's weights [EPOCHS=20]
	@python -m pipeline restore $(if $(EPOCHS),--epochs $(EPOCHS))

# From cheap to dear. A bench's --help says what it compares and how long it takes.
BENCHES := startup step evaluate memory upkeep datapath throughput frozen loop scaling accuracy
# Those whose pictures may be one's own.
OF_PICTURES := frozen loop accuracy
# Of bench/accuracy.py, from cheap to dear.
CASES := fashion_90 photographs fashion_93
PEERS := .venv-peers
bench_flags = $(strip $(if $(filter accuracy,$(1)),--case $(CASES)) $(if $(PAIRS),--pairs '$(PAIRS)') \
  $(if $(PICTURES),$(if $(filter $(OF_PICTURES),$(1)),--pictures '$(PICTURES)')))

bench: setup ## Thaw's speed against bare loops, as ratios [NAME=frozen] [PAIRS=5] [PICTURES=FOLDER]
	$(if $(NAME),$(if $(filter $(NAME),$(BENCHES)),,$(error $(NAME): no such bench; there are $(BENCHES))))
	$(foreach name,$(or $(NAME),$(patsubst bench/%.py,%,$(wildcard $(BENCHES:%=bench/%.py)))),\
	  python bench/$(name).py $(call bench_flags,$(name)) &&) python bench/report.py

bench-peers: setup $(PEERS)/.installed ## against fastai, Hugging Face's Trainer and timm's loop, in .venv-peers [NAME=loop]
	$(if $(NAME),$(if $(filter $(NAME),$(OF_PICTURES)),,$(error $(NAME): has no peers; there are $(OF_PICTURES))))
	$(foreach name,$(or $(NAME),loop frozen accuracy),\
	  python bench/$(name).py $(if $(filter frozen,$(name)),--part plain) --peers \
	  --json bench/results/$(name)_peers.json $(call bench_flags,$(name)) &&) python bench/report.py

$(PEERS)/.installed: bench/peers.txt
	$(check_python)
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet -r bench/peers.txt
	@touch $@

bench-gpu: setup ## throughput of large nets against bare steps and timm's loop, where there is a GPU
	@python bench/gpu.py $(if $(PAIRS),--pairs '$(PAIRS)') && python bench/report.py

lock: ## resolve requirements.lock anew (needs uv)
	uv pip compile --universal --generate-hashes --python-version 3.11 --extra dev --no-annotate --no-header \
	  --quiet --output-file requirements.lock pyproject.toml

clean: ## remove the environment, the caches and what the stages made; pictures of yours and MLflow's runs stay
	rm -rf $(VENV) $(PEERS) data/raw data/prepared data/cache .dvc/cache .dvc/tmp .mypy_cache .pytest_cache .ruff_cache
	find models -mindepth 1 -maxdepth 1 ! -name no-weights ! -name metrics.json -exec rm -rf {} +
