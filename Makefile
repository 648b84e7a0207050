# Each target does all its own set-up on a fresh machine: Python 3.11 with venv, make, and a network for packages.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test check integration clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.cfg constraints.txt anymal/environment.py
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	$(BIN)/python anymal/environment.py
	touch $@

demo: install
	$(BIN)/python launch/demo.py

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/pyrefly check

integration: install
	$(BIN)/python tests/integration.py

clean:
	rm -rf $(VENV) runs *.egg-info
