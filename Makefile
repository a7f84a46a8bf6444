PYTHON ?= python3.11
BIN := .venv/bin
MADE := .venv/made

.PHONY: demo test soak lint

# Train on a small data set that it draws itself, served by an S3 server of its own.
demo: $(MADE)
	$(BIN)/python demo.py

test: $(MADE) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Five minutes of misfortunes, in an order that a seed decides.
soak: $(MADE)
	$(BIN)/python benchmarks/soak.py --minutes 5 --seed 0

lint: $(MADE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The file is there once all is installed: what was interrupted is made anew.
$(MADE): requirements.txt requirements-dev.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(MADE)
