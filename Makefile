# `make demo` and `make test` set everything up themselves, in .venv; `make help` lists the rest.

VENV   ?= .venv
BIN    := $(VENV)/bin
MARIN  ?= marin/.venv
TORCH  := torch==2.13.0
PIP    := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
# Puts this folder on Python's path. The default mode, an import hook, comes after the path: in the folder above a checkout
# called tomat, Python would import the checkout, which holds no module.
COMPAT := --config-settings editable_mode=compat

# Stamps carry a checksum of pyproject.toml, of this folder's path and of the mode: installing is redone when one of them
# changes, and not when a checkout or an editor merely touches the file.
KEY    := $(shell { cat pyproject.toml; pwd; echo $(COMPAT); } | cksum | cut -d' ' -f1)
BASE   := $(VENV)/.installed-$(KEY)
DEV    := $(VENV)/.installed-dev-$(KEY)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test pages check lint export clean-nbs readme docs serve dist first-hour hooks lock marin marin-test marin-lock install clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(BASE)  ## tokenize, train, predict and score on the packaged sample; writes demo-out/
	@$(BIN)/tomat demo --out demo-out

test: $(DEV)  ## run every notebook and every pytest test
	@$(BIN)/python scripts/run_tests.py

pages: $(DEV)  ## run every notebook and save what its cells print and draw now
	@$(BIN)/python scripts/run_tests.py --save

check: $(DEV)  ## ruff, mypy; exporting, cleaning and the README script would change nothing
	@$(BIN)/python scripts/check.py

lint: $(DEV)  ## ruff and mypy alone
	@$(BIN)/python scripts/check.py ruff mypy

export: $(DEV)  ## write tomat/ from nbs/
	@$(BIN)/nbdev-export

clean-nbs: $(DEV)  ## strip execution counts and editor metadata from the notebooks
	@$(BIN)/nbdev-clean

readme: $(DEV)  ## write README.md from nbs/index.ipynb
	@$(BIN)/python scripts/make_readme.py

docs: $(DEV)  ## write the site to _docs/
	@$(BIN)/python scripts/build_docs.py

serve: $(DEV)  ## write the site and show it on this computer, on port 8000 (PORT=... for another)
	@$(BIN)/python scripts/build_docs.py --serve $(or $(PORT),8000)

dist: $(DEV)  ## build the sdist and the wheel in dist/
	@rm -rf build dist
	@$(BIN)/python -m build -q --outdir dist .
	@rm -rf build

first-hour: dist  ## install dist/ in a new environment, predict, train and evaluate there; prints each step's seconds
	@$(BIN)/python scripts/first_hour.py dist

hooks: $(DEV)  ## git hooks of this clone: notebooks are committed clean and merge cell by cell
	@VENV=$(VENV) sh scripts/install_hooks.sh

lock: $(DEV)  ## write requirements.txt, the versions that images of other machines get
	@$(BIN)/python scripts/make_lock.py

marin:  ## make marin/.venv (Python 3.12, Levanter on the CPU) for the launcher of TPUs
	@sh marin/environment.sh $(MARIN)

marin-test: marin $(DEV)  ## train with Levanter on the packaged sample, and compare with torch
	@cd marin && TOMAT_PYTHON=$(abspath $(BIN))/python $(abspath $(MARIN))/bin/python -m pytest

marin-lock: marin  ## write the lock files of marin/ anew from marin/pyproject.toml
	@sh marin/lock.sh

install: $(DEV)  ## make .venv with everything that development needs

clean:  ## remove what the tools cached here; .venv and demo-out stay
	@rm -rf build dist _proc _docs .mypy_cache .pytest_cache .ruff_cache .hypothesis nbs/nbdev.yml nbs/.last_checked

# python3.11 is preferred; any python3 from 3.11 on will do.  A name can be on PATH and still not run, hence the trial.
$(VENV)/.created:
	@set -e; for python in python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; done; \
	if [ -z "$$found" ]; then echo "tomat needs Python 3.11 or newer: neither python3.11 nor a new enough python3 is on PATH." >&2; exit 1; fi; \
	echo "making $(VENV) with $$($$found --version)"; \
	$$found -m venv --clear $(VENV) || { echo "$$found cannot make a virtual environment: install its venv module (on Debian: python3-venv)." >&2; exit 1; }; \
	touch $@

# torch first and pinned: whatever asks for it later then takes this build, instead of gigabytes for a GPU that may not be there.
$(BASE): | $(VENV)/.created
	@echo "installing $(TORCH) into $(VENV) (1-2 minutes)"
	@$(PIP) install '$(TORCH)' || { echo "installing $(TORCH) failed: see pip's message above." >&2; exit 1; }
	@echo "installing tomat and what it runs on (1-2 minutes)"
	@$(PIP) install $(COMPAT) -e '.[train]' || { echo "installing tomat failed: see pip's message above." >&2; exit 1; }
	@touch $@

$(DEV): | $(BASE)
	@echo "installing the development tools (1 minute)"
	@$(PIP) install $(COMPAT) -e '.[dev]' || { echo "installing the development tools failed: see pip's message above." >&2; exit 1; }
	@touch $@
