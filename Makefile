# make repro      the whole study, half an hour on two cores        make test       the tests
# make report     the report, and what it still needs               make test-slow  browser, lm-eval, process and kill tests
# make lab        JupyterLab on the notebooks                       make extras     notebooks/extra, executed with their records
# Each makes .venv by itself, once. In an environment of your own the commands below work as they stand.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# DVC runs stages one by one; the entries of a matrix are independent, so two run at a time, each with a progress line of
# its own. With --wait-for-lock one waits while the other reads or writes dvc.lock. Last first: the longest block, RWKV7,
# stands last, and a long run at the end would run alone. A profile that trains on text takes all GPUs for each.
two_at_a_time = dvc stage list --name-only | grep -E '^$(1)(@|_|$$)' | tac | JETLAB_LINES=1 xargs -n 1 -P $(if $(shell grep -x 'text: null.*' params.yaml),2,1) dvc --wait-for-lock repro -s

.PHONY: repro report extras lab test test-slow
repro: .venv/.ok
	dvc repro placement
	$(call two_at_a_time,block)
	dvc repro blocks
	$(call two_at_a_time,variant)
	dvc repro jetblock
	$(call two_at_a_time,size)
	dvc repro hardware
	$(call two_at_a_time,distill)
	dvc repro

report: .venv/.ok
	dvc repro report

extras: .venv/.ok
	mkdir -p reports/extra
	for name in $(basename $(notdir $(wildcard notebooks/extra/*.ipynb))); do \
		python -m jetlab.run notebooks/extra/$$name.ipynb --out scratch/extra/$$name; \
		cp scratch/extra/$$name/notebook.ipynb reports/extra/$$name.ipynb; \
	done

lab: .venv/.ok
	jupyter lab notebooks

test: .venv/.ok
	OMP_NUM_THREADS=1 pytest -n 2

test-slow: .venv/.ok
	OMP_NUM_THREADS=1 pytest -n 2 -m slow

# uv installs in a quarter of pip's time, but reads none of pip's settings: hand over where this machine looks for
# packages; like pip, it then weighs several indexes equally. It compiles the bytecode now, or each first import would.
UV := uv==0.13.9
pip_setting = $$(.venv/bin/pip config get :env:.$(1) 2>/dev/null || .venv/bin/pip config get global.$(1) 2>/dev/null || true)
.venv/.ok: pyproject.toml constraints.txt
	@for python in python3 python3.13 python3.12 python3.11 none; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; done; \
	if [ $$python = none ]; then echo 'jetlab needs Python 3.11 or later, found none; install it, then make again' >&2; exit 1; fi; \
	echo "Making .venv with $$($$python --version)"; $$python -m venv .venv
	@.venv/bin/pip install -qq $(UV)
	@links="$(call pip_setting,find-links)"; index="$(call pip_setting,index-url)"; more="$(call pip_setting,extra-index-url)"; \
	if [ -n "$$links" ]; then export UV_FIND_LINKS="$$(echo $$links | tr ' ' ,)"; fi; \
	if [ -n "$$index" ]; then export UV_DEFAULT_INDEX="$$index"; fi; \
	if [ -n "$$more" ]; then export UV_INDEX="$$(echo $$more)" UV_INDEX_STRATEGY=unsafe-best-match; fi; \
	uv pip install --quiet --python .venv/bin/python --compile-bytecode -c constraints.txt -e '.[dev]'
	@touch $@
