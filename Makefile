# On a fresh machine `make demo` or `make test` alone sets everything up: a virtual environment, the packages,
# and llama.cpp, which is built once and kept in ~/.cache/mopeq-edge. The tests compare the patched llama.cpp with
# the stock one, so they need a build of each.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BUDGET_GB ?= 0.0085
FUZZ_SECONDS ?= 60
# a process for each core, with one thread each in torch
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

.PHONY: setup runtime stock browser demo test unit check fuzz format table clean

setup: $(READY)

# torch first and pinned: a loose range elsewhere would bring the CUDA build. The binding comes without its own
# libraries, because `runtime install` builds them together with the tools.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet cmake ninja
	CMAKE_ARGS=-DLLAMA_BUILD=OFF $(BIN)/pip install --quiet --no-cache-dir -e '.[calibrate,pictures,dev]'
	touch $(READY)

runtime: $(READY)
	$(BIN)/mopeq-edge runtime install

stock: $(READY)
	$(BIN)/mopeq-edge runtime install --stock

# Chromium for the tests of the report, by Debian's package where that may be installed; without it they are skipped.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		run=; [ "$$(id -u)" = 0 ] || run="sudo -n"; \
		command -v apt-get >/dev/null && $$run apt-get update -qq && \
		$$run env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no Chromium: the tests marked 'browser' will be skipped"

demo: runtime
	mkdir -p demo
	$(BIN)/mopeq-edge inspect examples/tiny-olmoe
	$(BIN)/mopeq-edge convert examples/tiny-olmoe demo/tiny-olmoe.gguf --target-gb $(BUDGET_GB) --work-dir demo/work --force
	$(BIN)/mopeq-edge convert examples/tiny-olmoe demo/tiny-olmoe-per-expert.gguf --layout per-expert \
		--target-gb $(BUDGET_GB) --work-dir demo/work --force
	for file in demo/tiny-olmoe.gguf demo/tiny-olmoe-per-expert.gguf; do \
		$(BIN)/pytest runtime_tests --model $$file --bench 128,32,3 --threads 1 || exit 1; done
	@ls -l demo/*.gguf

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: runtime stock browser check
	$(PYTEST)

unit: $(READY)
	$(PYTEST) -m "not runtime"

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Ten minutes of fuzzing guided by coverage, of every kind of file that is read: nothing is to be found.
fuzz: $(READY)
	$(BIN)/pip install --quiet -e '.[fuzz]'
	$(BIN)/python -m tools.fuzz all --seconds $(FUZZ_SECONDS)

# The README's tables: five budgets against llama-quantize's presets of the same imatrix, and both layouts at six.
table: runtime
	$(BIN)/python -m tools.compare_presets examples/tiny-olmoe --work-dir demo/presets
	$(BIN)/python -m tools.compare_layouts examples/tiny-olmoe --work-dir demo/presets

clean:
	rm -rf $(VENV) demo
