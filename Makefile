# make train   set up if needed, then train (ARGS="--model vgg16 --dataset cifar10" passes flags on)
# make test    set up if needed, then run the whole test suite

PYTHON ?= python3
ARGS ?= --model resnet50 --dataset digits
BIN := .venv/bin

.PHONY: train test setup

train: setup
	$(BIN)/python -m fastres.train $(ARGS)

test: setup
	$(BIN)/python -m pytest

setup: .venv/ready

.venv/ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" ninja "torch>=2.11" torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dali,dev]"
	touch $@
