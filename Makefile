PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: demo test lint

# Train on a small data set that it draws itself, served by an S3 server of its own.
demo: .venv
	$(BIN)/python demo.py

test: .venv lint
	$(BIN)/python -m pytest

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch .venv
