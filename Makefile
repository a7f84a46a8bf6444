PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test soak lint

# Train on a small data set that it draws itself, served by an S3 server of its own.
demo: .venv
	$(BIN)/python demo.py

test: .venv lint
	$(BIN)/python -m pytest

# Five minutes of misfortunes, in an order that a seed decides.
soak: .venv
	$(BIN)/python benchmarks/soak.py --minutes 5 --seed 0

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv
