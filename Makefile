# Two commands for a fresh machine; each does all of its own set-up in $(VENV).
#
#   make demo   accelerate a model, verify it, fill a photo, show the speed-up (writes out/)
#   make test   the whole test suite
#
# PYTHON names the interpreter to start from (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test clean

demo: $(VENV)/installed
	$(VENV)/bin/inpaintrt demo -o out

# Two processes whose threads wait for each other by spinning would take five times as long.
test: $(VENV)/installed
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/pytest -n 2

# torch first, by its exact version: a resolver that only sees "torch>=2.11" may take a larger build than needed.
SOURCES := $(shell git ls-files --cached --others --exclude-standard csrc kernels inpaintrt cmake CMakeLists.txt pyproject.toml constraints.txt 2>/dev/null)
$(VENV)/installed: $(wildcard $(SOURCES))
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet torch==$(shell sed -n 's/^torch==//p' constraints.txt)
	$(VENV)/bin/pip install --quiet ".[test]"
	@touch $@

clean:
	rm -rf $(VENV) build dist out .ci-work
