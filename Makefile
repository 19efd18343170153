# CapGen: `make` lists the targets. The first target that needs .venv sets it up, once.
#
#   make PYTHON=/path/to/python   uses that interpreter, instead of the first suitable one of CANDIDATES.
#   Without a GPU, a much smaller download is enough:
#   make PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#   Without network: run `make wheelhouse` on a machine that has one, copy the folder, then
#   make setup WHEELHOUSE=wheelhouse   installs from that folder only.

VENV := .venv
RUN := $(VENV)/bin/python
# Written last, so that the next make continues an interrupted set-up.
STAMP := $(VENV)/.complete
CANDIDATES := python3 python3.13 python3.12 python3.11 python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef PIP_EXTRA_INDEX_URL
export PIP_EXTRA_INDEX_URL
endif
# With WHEELHOUSE=folder, pip contacts no index, whatever the machine's pip settings.
ifdef WHEELHOUSE
INDEX := --isolated --no-index --find-links '$(WHEELHOUSE)'
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup check-python wheelhouse course test lint bench readme lab demo demo-picture notebooks bundles first-cells clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Sets $$chosen: 3.11 to 3.13 first, then anything newer; otherwise prints what was found and fails.
define CHOOSE_PYTHON
chosen=; newer=; found=; \
set -- $(if $(PYTHON),"$(PYTHON)",$(CANDIDATES)); \
for candidate do \
	version=$$("$$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	found="$$found $$candidate is $$version;"; \
	case $$version in \
		3.11|3.12|3.13) chosen=$$candidate; break;; \
		[012].*|3.[0-9]|3.10) ;; \
		*) newer=$${newer:-$$candidate};; \
	esac; \
done; \
chosen=$${chosen:-$$newer}; \
if [ -z "$$chosen" ]; then \
	echo "CapGen needs Python 3.11 or newer. Found:$${found:- no Python that runs (tried: $$*).}" >&2; \
	echo "  -> install Python 3.12 (python.org, apt install python3.12-venv, brew install python@3.12," >&2; \
	echo "     conda create -n capgen python=3.12), then name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 1; \
fi
endef

check-python: ## print the Python that the set-up would use
	@$(CHOOSE_PYTHON); echo "$$chosen ($$("$$chosen" --version 2>&1))"

setup: $(STAMP) ## create .venv with the exact versions of constraints.txt

$(STAMP): requirements.txt constraints.txt pyproject.toml
	@rm -f $(STAMP)
	@if ! $(RUN) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
		$(CHOOSE_PYTHON); \
		echo "setting up $(VENV) with $$chosen"; \
		"$$chosen" -m venv --clear $(VENV) || { \
			echo "  -> this Python cannot make virtual environments; on Debian or Ubuntu: apt install python3-venv" >&2; \
			exit 1; }; \
	fi
	$(RUN) -m pip install -q $(INDEX) -c constraints.txt 'setuptools>=77' -r requirements.txt
	$(RUN) -m pip install -q $(INDEX) -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $(STAMP)

# Source distributions are built here, so that the other machines need no compiler.
wheelhouse: ## collect all packages in wheelhouse/, for machines without network
	@$(CHOOSE_PYTHON); \
	"$$chosen" -m venv --clear .wheelhouse-venv && \
	.wheelhouse-venv/bin/python -m pip wheel -q -w wheelhouse -c constraints.txt \
		'setuptools>=77' pip -r requirements.txt '.[dev]' && \
	rm -rf .wheelhouse-venv wheelhouse/capgen_utils-* build
	@echo "wheelhouse/ holds $$(ls wheelhouse | wc -l) wheels for $$(uname -sm); then: make setup WHEELHOUSE=wheelhouse"

course: $(STAMP) ## run all notebooks on drawn scenes; TRAIN=0 uses the captioners that ship
	$(RUN) -m capgen_utils course $(if $(filter 0,$(TRAIN)),--no-train)

# make test COVERAGE= leaves coverage out: the tests are faster without it.
COVERAGE ?= --cov --cov-report=term

# One process per core, up to four, each with one thread. The captioners that ship are tested;
# make test CAPGEN_FULL_TRAINING=1 trains all of them, and what they start from, and tests these.
test: lint ## lint, then all tests, with coverage
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 4 --dist worksteal $(COVERAGE)

lint: $(STAMP) ## ruff, mypy and the order of the folders
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

bench: $(STAMP) ## measure speed and memory
	$(RUN) benchmarks/run.py

readme: $(STAMP) ## generate the figures in README.md and docs/ from results/ and the parser
	$(RUN) benchmarks/readme.py

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(RUN) -m jupyterlab notebooks

# Each upload is one websocket message; the default limit of 10 MB is too low for many photographs.
demo: $(STAMP) ## open the demo as an app: caption your own photographs
	@$(RUN) -c 'import voila' 2>/dev/null || $(RUN) -m pip install -q $(INDEX) -c constraints.txt 'voila>=0.5.8'
	$(RUN) -m voila notebooks/demo.ipynb --Voila.tornado_settings="{'websocket_max_message_size': 209715200}"

demo-picture: $(STAMP) ## drive the demo in Chromium and write results/demo.png
	@$(RUN) -c 'import voila' 2>/dev/null || $(RUN) -m pip install -q $(INDEX) -c constraints.txt 'voila>=0.5.8'
	$(RUN) benchmarks/demo.py

notebooks: $(STAMP) ## run every notebook and store its outputs
	$(RUN) -m capgen_utils course --keep

bundles: $(STAMP) ## write the captioners of drawn scenes to data/bundles, 8 bits per weight
	$(RUN) -m capgen_utils.apps.authoring.ship

first-cells: $(STAMP) ## write the first cell and the badges of all notebooks; TAG=v0.1.0 for a release
	$(RUN) -m capgen_utils.apps.authoring.stamping $(if $(TAG),--tag $(TAG))

clean: ## delete caches and build outputs, but not .venv and data
	rm -rf build dist *.egg-info course-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
