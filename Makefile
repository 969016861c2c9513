# Names for the scripts, which hold the details; `make` alone lists them. ARGS goes to the script, URL says where a
# running Clarion answers.
.DEFAULT_GOAL := help
.PHONY: help dev test check up down logs reset demo verify benchmark
ARGS ?=
URL ?= http://127.0.0.1:8080
export URL

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

dev: ## everything in the foreground: Postgres, server, worker
	@scripts/dev $(ARGS)

test: ## the tests
	@scripts/test $(ARGS)

check: ## format, lint, types, imports, migrations, shell
	@scripts/check $(ARGS)

up: ## `make dev` in the background
	@scripts/background up $(ARGS)

down: ## stop what `make up` started
	@scripts/background down

logs: ## follow the log of `make up`
	@scripts/background logs

reset: ## stop it and remove its data (asks first, or CONFIRM=1)
	@scripts/setup && .venv/bin/python scripts/reset.py

demo: ## enqueue a few jobs on a running Clarion and show their results
	@scripts/demo

verify: ## prove each promise over HTTP, from outside
	@scripts/setup && for script in scripts/verify_*.py; do .venv/bin/python "$$script" $(ARGS) || exit; done

benchmark: ## measure throughput and latency beside the floor
	@scripts/setup && .venv/bin/python scripts/benchmark.py $(ARGS)
