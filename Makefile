# make demo: quantize the embedded network and show the report.   make lint: check the code.
# make docs: build the documentation, build/docs/html/index.html; METHODS=file.py:Class adds a method from outside.
# make test: run the tests but for the slow ones.   make test-all: run all of them.
PYTHON3 ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= lowbit-out
WORKERS ?= 2
MARK ?= not slow
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
export OMP_NUM_THREADS ?= 1

.PHONY: demo docs test test-all lint clean

demo: $(VENV)/.installed-demo
	$(BIN)/lowbit quantize --out $(OUT)

docs: $(VENV)/.installed-docs
	$(BIN)/python -W ignore -m scripts.docs $(addprefix --method ,$(METHODS))

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadgroup --durations 15 -m "$(MARK)" $(TESTS)

test-all: MARK =
test-all: test

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check src tests
	$(BIN)/mypy

# A stamp per set of extras, so that a second call installs nothing while these files stay as they are.
$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[onnx,data,train,kernels]"
	@touch $@

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[docs]"
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) ".[dev]"
	@touch $@

$(BIN)/python:
	@$(PYTHON3) -c "import sys; sys.exit(sys.version_info < (3, 11))" || { echo "lowbit needs Python 3.11 or newer; name one with: make $(MAKECMDGOALS) PYTHON3=/path/to/python3.11"; exit 1; }
	@$(PYTHON3) -m venv $(VENV) || { rm -rf $(VENV); echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache src/*.egg-info
