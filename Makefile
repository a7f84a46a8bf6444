# The first that runs and can make a .venv, unless `make PYTHON=...` names another: what pyenv puts in the
# path is there even if it does not run.
PYTHON ?= $(firstword $(foreach python,python3.11 python3.12 python3.13,\
	$(shell $(python) -c 'import ensurepip, venv' 2> /dev/null && echo $(python))))
NEEDED := Python 3.11, 3.12 or 3.13 is needed, with its module venv: install one, or name it, as in make PYTHON=/folder/python3.12
BIN := .venv/bin
MADE := .venv/made
# A .venv whose Python has gone is made anew.
$(shell $(BIN)/python -c '' 2> /dev/null || rm -f $(MADE))

.PHONY: demo test smoke soak lint

# Train on a small data set that it draws itself, served by an S3 server of its own.
demo: $(MADE)
	$(BIN)/python demo.py

test: $(MADE) lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The main job, a worker's death, a resume and staging: whether these versions of all libraries do.
smoke: $(MADE)
	$(BIN)/python -m pytest -m smoke

# Five minutes of misfortunes, in an order that a seed decides.
soak: $(MADE)
	$(BIN)/python benchmarks/soak.py --minutes 5 --seed 0

lint: $(MADE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The file is there once all is installed: what was interrupted is made anew.
$(MADE): requirements.txt requirements-dev.txt constraints.txt
	$(if $(PYTHON),,$(error $(NEEDED)))
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -c constraints.txt
	touch $(MADE)
