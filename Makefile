# make quickstart   real cells become labels, from an empty machine, in minutes
# make test         lint, types and tests against the installed wheel
# make test-slow    the longer checks
# make test-lowest  the main tests at the lowest versions that pyproject.toml allows
# make test-newest  the same at the newest versions there are
# make test-transformers  transformers' own tests of every model, on this package's classes
# make lint         lint and types only
# make docs         the documentation, into site/
# make benchmark-deps  R with Seurat and what else the rivals need; without it they are left out. Then who is ready
# make bench        cell types of unseen donors, beside logistic regression
# make bench-corpus speed and memory of making and reading a corpus, on an idle machine; half an hour
# make bench-gpu    correctness, speed and memory on a GPU; ten minutes
# make bench-speed  time and memory beside other libraries, on an idle machine; an hour

PYTHON ?= python3
VENV ?= .venv
# For example: make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
# For example: make bench-speed SPEED_ARGS="--repeats 3"
SPEED_ARGS ?=
# For example: make bench-corpus CORPUS_ARGS="--cells 1000000 --work /scratch/tokenizing"
CORPUS_ARGS ?=
# Threads that wait asleep instead of spinning: on a busy machine spinning threads halve the speed and more.
export OMP_WAIT_POLICY ?= PASSIVE
PIP := $(VENV)/bin/pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_ARGS)
# A browser for the test of the web page: Debian's, where it may be installed.
APT = env DEBIAN_FRONTEND=noninteractive timeout $(1) apt-get -qq -o DPkg::Lock::Timeout=120
BROWSER := { command -v chromium && command -v chromedriver; } >/dev/null \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get && $(call APT,300) update \
	&& $(call APT,300) install -y --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1
# Seurat for the comparison, Debian's too: 190 MB to fetch, 660 MB on disk.
R_PACKAGES := r-base-core r-cran-seurat r-cran-hdf5r
HAS_SEURAT := Rscript -e 'q(status = !all(c("Seurat", "hdf5r") %in% rownames(installed.packages())))' >/dev/null 2>&1
SEURAT := $(HAS_SEURAT) || { [ "$$(id -u)" = 0 ] && command -v apt-get && $(call APT,300) update \
	&& $(call APT,1800) install -y --no-install-recommends $(R_PACKAGES); } >/dev/null 2>&1
# The suite of the installed transformers: its wheel has no tests, its source distribution has, all but an empty file.
# For another copy: make test-transformers TRANSFORMERS_SOURCE=/path/of/a/checkout
define SUITE
version=$$($(VENV)/bin/python -c 'from importlib.metadata import version; print(version("transformers"))') \
	&& folder=$(VENV)/transformers-source && source=$$folder/transformers-$$version \
	&& { [ -e $$source/tests/__init__.py ] || { $(VENV)/bin/pip --disable-pip-version-check download --quiet --no-deps \
	--no-build-isolation --no-binary transformers --dest $$folder $(PIP_ARGS) transformers==$$version \
	&& tar -xzf $$folder/transformers-$$version.tar.gz -C $$folder && touch $$source/tests/__init__.py; }; }
endef
SOURCES := $(shell find modeling_screformer tokenization train annotation benchmarks model_cards -type f -not -name '*.pyc')

.PHONY: quickstart test test-slow test-transformers test-lowest test-newest lint docs benchmark-deps bench bench-corpus \
	bench-gpu bench-speed clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/screformer quickstart --output quickstart

test: lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m "not slow" --numprocesses auto --maxprocesses 4

test-slow: $(VENV)/.developed
	$(VENV)/bin/python -m pytest -m slow

# Python, torch and the rest at the lowest versions that pyproject.toml allows, and at the newest there are. For example:
# make test-lowest PYTHON=python3.10; make test-newest PYTHON=python3.13; TORCH=torch==2.13.0 where another build is wanted.
TORCH ?=
COMPATIBILITY_TESTS := $(addprefix tests/test_,loading.py modeling_screformer.py tokenization_screformer.py corpus.py \
	pretrain.py finetune.py annotate.py explain.py publish.py hub_round_trip.py released_checkpoints.py)
RUN_COMPATIBILITY = $(1)/bin/python -m pytest -o filterwarnings=default -m "not slow" $(COMPATIBILITY_TESTS)

test-lowest:
	$(PYTHON) -m venv --clear $(VENV)-lowest
	$(PYTHON) tests/lowest_versions.py $(TORCH) > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install --quiet --constraint $(VENV)-lowest/constraints.txt $(PIP_ARGS) $(TORCH) . pytest hypothesis
	OMP_NUM_THREADS=1 $(call RUN_COMPATIBILITY,$(VENV)-lowest)

test-newest:
	$(PYTHON) -m venv --clear $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --upgrade --upgrade-strategy eager $(PIP_ARGS) $(or $(TORCH),torch) . pytest hypothesis
	OMP_NUM_THREADS=1 $(call RUN_COMPATIBILITY,$(VENV)-newest)

test-transformers: $(VENV)/.developed
	$(PIP) parameterized
	$(if $(TRANSFORMERS_SOURCE),source=$(TRANSFORMERS_SOURCE),$(SUITE)) \
	&& TRANSFORMERS_SOURCE=$$source OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_transformers_common.py

lint: $(VENV)/.developed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.installed
	$(PIP) ".[docs]"
	$(VENV)/bin/mkdocs build --strict

benchmark-deps: $(VENV)/.installed
	$(PIP) ".[benchmarks]"
	@$(SEURAT) || echo "Seurat is left out of the comparison: as root, apt-get install $(R_PACKAGES)"
	$(VENV)/bin/screformer benchmark systems

bench: $(VENV)/.installed
	$(VENV)/bin/screformer benchmark donors --output benchmarks/results

bench-corpus: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/screformer benchmark tokenizing $(CORPUS_ARGS)
	$(VENV)/bin/screformer benchmark feeding

bench-gpu: $(VENV)/.developed
	$(VENV)/bin/screformer benchmark kernels
	$(VENV)/bin/screformer benchmark gpu

bench-speed: $(VENV)/.developed
	$(VENV)/bin/python -m screformer.benchmarks.attention $(SPEED_ARGS)
	$(VENV)/bin/python -m screformer.benchmarks.encoder $(SPEED_ARGS)

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

# torch first and alone, so that no other package's requirement picks another build of it.
$(VENV)/.requirements: $(VENV)/bin/pip pyproject.toml constraints.txt
	$(PIP) torch
	touch $@

# The wheel is what is tested: an editable tree would hide a file that the wheel lacks.
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	rm -rf build
	$(PIP) .
	$(PIP) --force-reinstall --no-deps .
	touch $@

$(VENV)/.developed: $(VENV)/.installed
	$(PIP) ".[dev]"
	@$(BROWSER) || echo "The test of the web page needs chromium and chromedriver, and will be skipped: install them"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info
