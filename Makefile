# make train   set up if needed, then train (ARGS="--model vgg16 --dataset cifar10" passes flags on)
# make test    set up if needed, then run the whole test suite, two files at a time with one thread each
# make doctor  set up if needed, then check every fast part on this machine
# make bench   set up if needed, then run the benchmarks into benchmarks/results/
# make setup   set up, also where that is done already: after another torch or a compiler was installed
# make results render the README's tables from benchmarks/results/

PYTHON ?= $(or $(wildcard .venv/bin/python),python3)
ARGS ?= --model resnet50 --dataset digits
BIN := .venv/bin
MACHINE := $(shell (nvidia-smi --query-gpu=name --format=csv,noheader || sed -n 's/^model name.*: //p' /proc/cpuinfo) \
	2>/dev/null | head -n 1 | tr -cs 'A-Za-z0-9\n' -)

.PHONY: train test doctor bench results setup

train: .venv/ready
	$(BIN)/python -m fastres.train $(ARGS)

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

doctor: .venv/ready
	$(BIN)/python -m fastres.doctor

bench: .venv/ready
	$(BIN)/python -m pytest --benchmark-only \
		--benchmark-csv=benchmarks/results/bench-$(MACHINE)-$(shell date +%F).csv

results: .venv/ready
	$(BIN)/python benchmarks/render.py

setup:
	@rm -f .venv/ready
	@$(MAKE) --no-print-directory .venv/ready

.venv/ready: pyproject.toml setup.py $(wildcard csrc/*)
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and \
		'fastres needs Python 3.11 or later: name one with make PYTHON=python3.12 ...')"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check "setuptools>=77" ninja "torch>=2.11" torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[dali,dev]"
	touch $@
