# CapGen: `make` shows the targets. The first one that needs it sets up .venv, once.
#
#   make PYTHON=/path/to/python   uses that interpreter; without it the first suitable one of CANDIDATES is taken.
#   Without a GPU a much smaller download is enough:
#   make PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
#   For a class without network: `make wheelhouse` once, where there is one; then, with the folder copied,
#   make setup WHEELHOUSE=wheelhouse   installs from it alone.

VENV := .venv
RUN := $(VENV)/bin/python
# Written last: a set-up that was interrupted has no stamp and is taken up again by the next make.
STAMP := $(VENV)/.complete
CANDIDATES := python3 python3.13 python3.12 python3.11 python

export PIP_DISABLE_PIP_VERSION_CHECK := 1
ifdef PIP_EXTRA_INDEX_URL
export PIP_EXTRA_INDEX_URL
endif
# With WHEELHOUSE=folder nothing is asked of any index, whatever the machine's own pip settings are.
ifdef WHEELHOUSE
INDEX := --isolated --no-index --find-links '$(WHEELHOUSE)'
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup check-python wheelhouse course test lint bench readme lab demo demo-picture notebooks bundles first-cells clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Sets $$chosen: 3.11 to 3.13 first, anything newer where there is nothing better; else says what was found and ends.
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

check-python: ## say which Python the set-up would use
	@$(CHOOSE_PYTHON); echo "$$chosen ($$("$$chosen" --version 2>&1))"

setup: $(STAMP) ## make .venv with the exact versions of constraints.txt

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

# Source distributions are built here, so that the class needs no compiler and no build tools.
wheelhouse: ## collect everything the set-up needs in wheelhouse/, for machines without network
	@$(CHOOSE_PYTHON); \
	"$$chosen" -m venv --clear .wheelhouse-venv && \
	.wheelhouse-venv/bin/python -m pip wheel -q -w wheelhouse -c constraints.txt \
		'setuptools>=77' pip -r requirements.txt '.[dev]' && \
	rm -rf .wheelhouse-venv wheelhouse/capgen_utils-* build
	@echo "wheelhouse/ holds $$(ls wheelhouse | wc -l) wheels for $$(uname -sm); then: make setup WHEELHOUSE=wheelhouse"

course: $(STAMP) ## the whole course in small; TRAIN=0 takes the captioners that ship
	$(RUN) -m capgen_utils course $(if $(filter 0,$(TRAIN)),--no-train)

test: lint ## ruff, mypy and all tests
	$(RUN) -m pytest

lint: $(STAMP) ## ruff, mypy and the order of the folders
	$(RUN) -m ruff check .
	$(VENV)/bin/lint-imports
	$(RUN) -m mypy

bench: $(STAMP) ## measure speed and memory
	$(RUN) benchmarks/run.py

readme: $(STAMP) ## put the figures of results/ into README.md
	$(RUN) benchmarks/readme.py

lab: $(STAMP) ## open the notebooks in JupyterLab
	$(RUN) -m jupyterlab notebooks

# Uploads come as one message each; the server's own limit of 10 MB is less than many a photograph.
demo: $(STAMP) ## open the demo as an app: caption your own photographs
	@$(RUN) -c 'import voila' 2>/dev/null || $(RUN) -m pip install -q $(INDEX) -c constraints.txt 'voila>=0.5.8'
	$(RUN) -m voila notebooks/demo.ipynb --Voila.tornado_settings="{'websocket_max_message_size': 209715200}"

demo-picture: $(STAMP) ## drive the demo in Chromium and keep results/demo.png
	@$(RUN) -c 'import voila' 2>/dev/null || $(RUN) -m pip install -q $(INDEX) -c constraints.txt 'voila>=0.5.8'
	$(RUN) benchmarks/demo.py

notebooks: $(STAMP) ## run every notebook from the first cell to the last
	$(RUN) -m capgen_utils course --keep

bundles: $(STAMP) ## write the trained captioners of drawn scenes small, into data/bundles
	$(RUN) -m capgen_utils.apps.authoring.ship

first-cells: $(STAMP) ## write the first cell and the badges of all notebooks; TAG=v0.1.0 for a release
	$(RUN) -m capgen_utils.apps.authoring.stamping $(if $(TAG),--tag $(TAG))

clean: ## delete caches and build outputs; .venv and data stay
	rm -rf build dist *.egg-info course-output .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -exec rm -rf {} +
