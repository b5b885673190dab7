# make demo: set up, then compress the digits network that ships here, end to end
# make test: set up, then run the tests            make check: format, lint, types, fast tests
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "edgeprune needs Python 3.11 or newer, this is %s; try: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,test,dev,web]'
	touch $@

setup: $(VENV)/.ready

demo: setup
	$(BIN)/edgeprune compress examples/digits/digits.pt2 --data examples/digits/data.py:train \
	    --test examples/digits/data.py:test --latency 60% --images 256 --minutes 1 --out demo-out

test: setup
	$(BIN)/python -m pytest $(TESTS)

check: setup
	PYTHON=$(BIN)/python tools/check

.PHONY: setup demo test check
