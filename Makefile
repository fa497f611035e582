# make demo: the whole main job on the built-in world. make test: everything that CI checks. Both install what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := paths.runs=runs/demo
METHODS := linear,task_arithmetic,ties,dare_linear,varm,sce

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: setup demo test lint clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,tensorboard,big,lora,joblib,optuna]'
	touch $@

demo: setup
	$(BIN)/python train.py -m source=tiny_a,tiny_b,tiny_c $(DEMO) hydra.sweep.dir=runs/demo/targets
	$(BIN)/python train.py objective=sft $(DEMO) hydra.run.dir=runs/demo/sft
	$(BIN)/python merge.py -m merge=$(METHODS) merge.scale=search $(DEMO) hydra.sweep.dir=runs/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) cache runs .mypy_cache .ruff_cache .pytest_cache
