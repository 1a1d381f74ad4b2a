# Needs Python >= 3.11, make and git. Everything else is installed into .venv; data and logs live under var/.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WORKERS ?= 2
ARGS ?=

.PHONY: help
help:  ## what can be typed here
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-19s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=python3.12"; exit 2; }
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[devstack,test,lint]'
	@touch $@

.PHONY: install
install: $(INSTALLED)  ## .venv with every dependency, at the versions of constraints.txt

.PHONY: lock
lock:  ## new constraints.txt: the newest versions that pyproject.toml admits
	@rm -rf var/lock && $(PYTHON) -m venv var/lock
	@var/lock/bin/python -m pip install --quiet --disable-pip-version-check -e '.[devstack,test,lint,screenshots]'
	@{ echo "# Every version of a tested installation (Python 3.11, Linux); made with: make lock"; \
	   var/lock/bin/python -m pip freeze --exclude-editable; } > constraints.txt
	@rm -rf var/lock

.PHONY: demo
demo: install  ## both pipelines end to end on this machine, in under two minutes
	@$(BIN)/python -m devstack.demo $(ARGS)

.PHONY: up
up: install  ## the same stack with the Dagster UI on 127.0.0.1:3000, until Ctrl-C
	@$(BIN)/python -m devstack.up $(ARGS)

.PHONY: report
report: install  ## one HTML page from the database: is anything wrong, and how is it going (ARGS="--out FILE")
	@$(BIN)/python -m scaling report $(ARGS)

.PHONY: test
test: install  ## the whole test suite
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup -m 'not slow' $(ARGS)

.PHONY: test-long
test-long: install  ## the long crash and property trials as well
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --timeout 1800 $(ARGS)

.PHONY: lint
lint: install  ## ruff, mypy --strict, import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --cache-dir var/import-linter
	@$(BIN)/mypy

.PHONY: format
format: install  ## let ruff mend what it can
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .

.PHONY: bench
bench: install  ## measure, into var/bench/ and the README's tables
	@$(BIN)/python -m bench.google_calendar
	@$(BIN)/python -m bench.readme

.PHONY: bench-sync
bench-sync: install  ## measure the calendar sync against its targets, in under 25 minutes (ARGS="--only pool")
	@$(BIN)/python -m bench.sync $(ARGS)
	@$(BIN)/python -m bench.readme

.PHONY: chaos-sync
chaos-sync: install  ## kill, freeze and cut off sync workers, then compare every row (ARGS="--trials 1000 --seed 1")
	@$(BIN)/python -m tests.sync_pipeline.chaos $(ARGS)

.PHONY: bench-archive
bench-archive: install  ## measure the archive against its targets and other tools (ARGS="--only duckdb month --rounds 1")
	@$(BIN)/python -m bench.archive $(ARGS)
	@$(BIN)/python -m bench.readme

.PHONY: chaos-archive
chaos-archive: install  ## kill and cut off archive workers, then look for every row (ARGS="--trials 1000 --seed 1")
	@$(BIN)/python -m tests.archive_pipeline.chaos $(ARGS)

.PHONY: bench-scaling
bench-scaling: install  ## measure the thresholds against their targets (ARGS="--only rules eta")
	@$(BIN)/python -m bench.scaling $(ARGS)
	@$(BIN)/python -m bench.readme

.PHONY: bench-observability
bench-observability: install  ## measure what watches the pipelines (ARGS="--only exporter": one)
	@$(BIN)/python -m bench.observability $(ARGS)
	@$(BIN)/python -m bench.readme

.PHONY: chaos-scaling
chaos-scaling: install  ## kill and freeze those who judge and act, then count actions (ARGS="--trials 1000 --seed 1")
	@$(BIN)/python -m tests.scaling.chaos $(ARGS)

.PHONY: screenshots
screenshots: install  ## new pictures for the README, from a running make up; needs a Chromium on the PATH
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[screenshots]'
	@$(BIN)/python docs/screenshots.py $(ARGS)

.PHONY: dashboards
dashboards: install  ## Grafana's dashboards as pages in var/preview, without Grafana, and their pictures; needs npm and a Chromium
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[screenshots]'
	@$(BIN)/python -m docs.dashboards $(ARGS)

.PHONY: clean
clean:  ## stop what this checkout left running and remove var/ (the .venv stays)
	@if [ -x $(BIN)/python ]; then $(BIN)/python -m devstack.processes clean; fi
	@rm -rf var build *.egg-info
