# Every target creates the virtual environment that it needs. Variables:
#   PYTHON     interpreter, 3.10 or newer
#   VENV       folder of the environment
#   WORKERS    tests that run in parallel (default: one per core, at most 8)
#   TEST       options of pytest that do not select tests, such as `--full`
#   GPU_CHECK  options of gpu-check, such as `--minutes 9` or `--list`
#   GPU_TEN    options of gpu-ten
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= auto
BIN := $(VENV)/bin
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
PYTEST = $(BIN)/python -m pytest -q --durations=15
SIDE_BY_SIDE = -n $(WORKERS) --maxprocesses 8 --dist worksteal
SOURCES := pyproject.toml setup.py CMakeLists.txt $(CXX_SOURCES)

.PHONY: demo test bench-test lint format bench gpu-check gpu-ten report docs clean

demo: $(VENV)/.installed-train ## train on handwritten digits, print zero-shot accuracy, draw runs/digits/digits.png
	$(BIN)/python examples/train_digits.py

test: lint ## lint, and run all tests that need no GPU; tests that measure time run alone at the end
	@TIMEFORMAT='make test: %0R seconds'; time { \
	$(PYTEST) $(TEST) --ignore tests/benchmarks $(SIDE_BY_SIDE) -m "not alone" && \
	$(PYTEST) $(TEST) -m alone $$(grep -rlw mark.alone tests --include='test_*.py' --exclude-dir benchmarks); }

bench-test: $(VENV)/.installed-dev ## test the harness of the benchmarks
	$(PYTEST) $(TEST) tests/benchmarks

lint: $(VENV)/.installed-dev ## run linters and type checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/.installed-dev ## fix what lint would report, where that is automatic
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/.installed-dev ## time the losses on this machine; rows go to benchmarks/results
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only -q

gpu-check: $(VENV)/.installed-dev $(VENV)/.installed-bench-gpu ## run the tests and the benchmark on this GPU; call it again to resume
	$(BIN)/python -m benchmarks.gpu_check $(GPU_CHECK)

gpu-ten: $(VENV)/.installed-dev $(VENV)/.installed-bench-gpu ## measure a Hopper GPU for ten minutes; call it again to resume
	$(BIN)/python -m benchmarks.gpu_ten $(GPU_TEN)

report: $(VENV)/.installed-dev ## write benchmarks/REPORT.md and benchmarks/results/*.png from the rows
	$(BIN)/python -m benchmarks.report

docs: $(VENV)/.installed-docs ## build the documentation in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.installed-%: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@

clean:
	rm -rf $(VENV) build site *.egg-info fastclip/*.so fastclip/_*_build_report.txt
