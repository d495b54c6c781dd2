# Each target sets up what it needs, so any of them works as the first command after a clone.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test servers soak lint bench bench-remote bench-encode bench-train bench-eval bench-gpu

PYTHON ?= python3
PY := .venv/bin/python

help:   ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 20

setup: .venv/ready-test   ## make .venv with everything the demo and the tests need (once)

demo: .venv/ready-test   ## pictures to columns to a study of two VAEs, demo/report.html
	$(PY) -m eval.demo

test: .venv/ready-test   ## run the tests
	PYTHONDONTWRITEBYTECODE= HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

servers: .servers/ready   ## install object stores for the slow tests: Azurite, S3, Google Cloud Storage, nginx (a minute)

soak: .venv/ready-test .servers/ready   ## run every sweep of faults in full, or go on with it; writes SOAK.md
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m slow tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.soak $(ARGS)

lint: .venv/ready-test   ## check format, style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: .venv/ready-bench .venv-peers/ready   ## measure reading, beside other libraries
	$(PY) -m shards bench --peers .venv-peers/bin/python --json bench/results.json $(ARGS)

bench-remote: .venv/ready-bench .venv-peers/ready   ## measure reading from an object store on loopback, near, limited and late, beside other libraries (fifteen minutes; nginx if it is installed)
	OMP_NUM_THREADS=1 $(PY) -m tests.bench.reading.remote --json bench/remote.json $(ARGS)

bench-encode: .venv/ready-test   ## measure the encode engine: overhead, encoder-busy share, many shards (half an hour)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m encode bench --json bench/encode.json $(ARGS)

bench-train: .venv/ready-test   ## measure the trainer: its step beside a bare loop, power averages, resuming, what caching saves (a quarter of an hour)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m train bench --json bench/train.json $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.bench.evaluation.online --json bench/online.json $(ARGS)

bench-eval: .venv/ready-test   ## measure evaluation: generating beside a bare loop, features beside clean-fid, distances, probes of columns (half an hour)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.bench.evaluation.generate --json bench/generate.json $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.bench.evaluation.features --json bench/features.json $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.bench.evaluation.distances --json bench/distances.json $(ARGS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m tests.bench.evaluation.probe --json bench/probe.json $(ARGS)

bench-gpu: .venv/ready-test   ## measure what needs a GPU: products, encoders, training steps, pictures (ten minutes; ARGS="--only train")
	HF_HUB_OFFLINE=1 $(PY) -m tests.bench.gpu --json bench/gpu.json $(ARGS)

# Other loaders pin versions that break ours, so they get an environment of their own. What they leave open they take from
# the project's by a .pth file: the same torch for all, and 3 GB less.
.venv-peers/ready: bench/peers.txt | .venv/ready-bench
	@[ -x .venv-peers/bin/python ] || $(PY) -m venv .venv-peers
	@$(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-peers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	@echo "installing other loaders into .venv-peers (2 to 6 minutes, 1 GB)"
	@.venv-peers/bin/python -m pip install --disable-pip-version-check --progress-bar off -r bench/peers.txt \
	  > .venv-peers/pip.log 2>&1 || { tail -20 .venv-peers/pip.log; exit 1; }
	@touch $@

# Servers that the slow tests start, each with packages of its own.
.servers/ready: tests/servers/requirements.txt | .venv/ready-test
	@command -v npm > /dev/null || { echo "npm: not found. Run: apt-get install npm"; exit 1; }
	@[ -x /usr/sbin/nginx ] || command -v nginx > /dev/null || { echo "nginx: not found. Run: apt-get install nginx-light"; exit 1; }
	@echo "installing servers into .servers (200 MB)"
	@npm install --prefix .servers --no-audit --no-fund --loglevel error azurite@3.37.0 s3rver@3.7.1
	@[ -x .servers/python/bin/python ] || $(PY) -m venv .servers/python
	@.servers/python/bin/python -m pip install --disable-pip-version-check --quiet --progress-bar off -r tests/servers/requirements.txt
	@touch $@

# A stamp for each set of extras; pip is asked again when the list of packages changes.
.venv/ready-test: extras := demo,test
.venv/ready-bench: extras := demo,test,bench
.venv/ready-bench: | .venv/ready-test
.venv/ready-%: pyproject.toml constraints.txt
	@[ -x $(PY) ] || $(PYTHON) -c 'import sys; v = sys.version.split()[0]; (3, 11) <= sys.version_info < (3, 13) or sys.exit(f"found Python {v}; this needs 3.11 or 3.12: make setup PYTHON=python3.12")'
	@[ -x $(PY) ] || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing packages into .venv (the first time 2 to 10 minutes and 7 GB)"
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(extras)]' 2>&1 | awk '\
	  /^Requirement already/ { next } \
	  /^Collecting/          { if (++found % 20 == 0) print "  " found " packages found"; fflush(); next } \
	  /^Installing collected/ { print "  unpacking (the longest part)"; fflush(); next } \
	  /^ *Downloading.*GB|^ *Downloading.*[0-9][0-9][0-9]\.[0-9] MB|ERROR|error|WARNING|^Successfully built/ { print "  " $$0; fflush() }'
	@touch $@
